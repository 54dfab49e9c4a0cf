"""The OpenAI API: what MantisChat answers, asked by the official client; and all that is refused."""

import base64
import json
import os
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import clips_made
import pytest
from helpers import picture

from mantis_lite.chat import MantisChat
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.errors import RecipeError
from mantis_lite.generate import generate, text_of

openai = pytest.importorskip("openai", reason="the official client is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from mantis_lite.chat_request import Limits  # noqa: E402
from mantis_lite.serve import bound, create_app, key_for, serve, server  # noqa: E402

TOKENS = 24
KEY = "the key of this test"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n%s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def chat(llava_folder):
    return MantisChat(llava_folder)


@contextmanager
def serving(chat, key=None, **limits):
    """The port of a server of its own, in a thread."""
    with bound("127.0.0.1", 0) as listening:
        running = server(create_app(chat, "tiny-llava", key, Limits(**limits)))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def port(chat):
    with serving(chat, body=1 << 20, pictures=4, tokens=1500) as port:
        yield port


def client_of(port, key="none", **settings):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=120, **settings)


@pytest.fixture(scope="module")
def client(port):
    return client_of(port)


def link(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown(content: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": link(content)}}


def said(text: str, *pictures: bytes) -> dict:
    return {"role": "user", "content": [*map(shown, pictures), {"type": "text", "text": text}]}


def ask(client, messages, **fields):
    fields = {"model": "tiny-llava", "max_tokens": TOKENS} | fields
    return client.chat.completions.create(messages=messages, **fields)


def text(answer) -> str:
    return answer.choices[0].message.content


def refused(client, messages=None, **fields) -> str:
    """What a request that is wrong is told."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages or [said("Hello?")], **fields)
    return caught.value.body["message"]


def test_an_answer_is_that_of_the_chat(chat, client):
    answer = ask(client, [{"role": "user", "content": "What is in the picture?"}])
    assert text(answer) == chat.fork()("What is in the picture?", max_new_tokens=TOKENS)
    assert text(answer) and answer.model == "tiny-llava" and answer.choices[0].message.role == "assistant"


def test_turns_with_pictures_are_those_of_the_chat(chat, client):
    own = chat.fork()
    asked = [("Which is red?", [picture(1), picture(2)]), ("And here?", [picture(3)]), ("Sure?", [])]
    messages = []
    for words, pictures in asked:
        messages.append(said(words, *pictures))
        answer = ask(client, messages)
        assert text(answer) == own(words, images=pictures, max_new_tokens=TOKENS)
        messages.append(answer.choices[0].message)


def test_a_picture_stands_where_it_is_sent(chat, client):
    parts = [{"type": "text", "text": "Here: "}, shown(picture(1)), {"type": "text", "text": " What is <image>?"}]
    found = text(ask(client, [{"role": "user", "content": parts}]))
    before, after = said("Here:  What is <image>?", picture(1)), said("<image>", picture(1))
    assert found != text(ask(client, [before])) and text(ask(client, [after]))


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_stream_is_the_answer_in_pieces(client, pictures):
    messages = [said("What is in the picture?", *(picture(seed) for seed in range(pictures)))]
    whole = ask(client, messages)
    *chunks, last = ask(client, messages, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text(whole)
    assert len(chunks) > 3 and chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, whole.choices[0].finish_reason]
    assert last.choices == [] and last.usage == whole.usage and chunks[0].usage is None
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert ask(client, messages, stream=True).response.headers["content-type"].startswith("text/event-stream")


def test_a_system_turn_replaces_the_words_of_the_template(chat, client):
    messages = [{"role": "system", "content": "Be brief."}, said("What is it?", picture(1))]
    answer = ask(client, messages)
    own = chat.fork()
    own.encoder = replace(chat.encoder, system="Be brief.")
    assert text(answer) == own("What is it?", images=[picture(1)], max_new_tokens=TOKENS)
    assert text(answer) != text(ask(client, messages[1:]))


def test_a_clip_is_that_of_the_chat_and_its_file_goes(chat, client, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    clip = clips_made.make(tmp_path / "clip.mp4", frames=20)
    part = {"type": "video_url", "video_url": {"url": link(clip.read_bytes(), "video/mp4")}}
    answer = ask(client, [{"role": "user", "content": [part, {"type": "text", "text": "What moves?"}]}])
    assert text(answer) == chat.fork()("What moves?", videos=[clip], max_new_tokens=TOKENS)
    assert not any((tmp_path / "temporary").iterdir())
    assert "clip-1" in refused(
        client, [{"role": "user", "content": [part | {"video_url": {"url": link(b"no clip", "video/mp4")}}]}]
    )
    part["video_url"]["url"] = "data:video/mp4;base64,%"
    assert "clip 1 is not base64" in refused(client, [{"role": "user", "content": [part]}])
    assert not any((tmp_path / "temporary").iterdir())


def test_a_seed_draws_the_same_again(client):
    drawn = [text(ask(client, [said("Go on.")], temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert text(ask(client, [said("Go on.")], temperature=0)) == text(ask(client, [said("Go on.")]))
    assert text(ask(client, [said("Go on.")], temperature=1, top_p=1e-9)) == text(ask(client, [said("Go on.")]))


def answered(chat, words, most, *pictures):
    """The ids of an answer, and how many its prompt has."""
    turn = Turn("user", (*map(Image, pictures), words))
    prompt = chat.encoder.encode_prompt(Sample("", None, (turn,)))
    return generate(chat.model, chat.encoder, [prompt], most)[0], len(prompt)


def test_tokens_are_counted_and_limited(chat, client):
    for most in (1, 7):
        answer = ask(client, [said("What is it?", picture(1))], max_tokens=most)
        ids, prompt = answered(chat, "What is it?", most, picture(1))
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, len(ids)) == (prompt, most)
        assert answer.usage.total_tokens == prompt + most
        assert answer.choices[0].finish_reason == "length"
    assert ask(client, [said("What is it?")], max_completion_tokens=3).usage.completion_tokens == 3


def test_an_answer_that_ends_by_itself_stopped(chat, client, monkeypatch):
    ids, _ = answered(chat, "Go on.", TOKENS)
    end = next(token for token in ids[2:] if token not in ids[:2])
    monkeypatch.setattr("mantis_lite.generate.ends_of", lambda model, encoder: [end])
    answer = ask(client, [said("Go on.")])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == ids.index(end)
    assert text(answer) == text_of(chat.encoder, ids[: ids.index(end)])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_cuts_the_answer_wherever_its_pieces_end(client, stream):
    messages = [said("What is in the picture?")]
    whole = text(ask(client, messages))
    stop = whole[5:9]  # of several tokens
    if stream:
        chunks = list(ask(client, messages, stop=["not there", stop], stream=True))
        found, why = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        answer = ask(client, messages, stop=stop)
        found, why = text(answer), answer.choices[0].finish_reason
    assert (found, why) == (whole[: whole.index(stop)], "stop")
    assert text(ask(client, messages, stop=whole[-2:] + "and more")) == whole


def test_models_and_health(client, port):
    assert [model.id for model in client.models.list()] == ["tiny-llava"]
    assert b'{"status":"ok"}' in sent(port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        ask(client, [said("Hello?")], model="gpt-4o")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny-llava", input="x")


def test_a_key_is_asked_for_where_there_is_one(chat):
    with serving(chat, KEY) as port:
        assert text(ask(client_of(port, KEY), [said("Hello?")], max_tokens=2))
        for wrong in ("none", KEY + "x", "schl\u00fcssel"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                client_of(port, wrong).models.list()
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            ask(client_of(port), [said("Hello?")])


def test_without_a_key_only_this_machines_programs_are_answered(port):
    body = json.dumps({"model": "tiny-llava", "messages": [said("Hello?")], "max_tokens": 2}).encode()
    for header, expected in [
        (b"Host: 127.0.0.1", b" 200 "),
        (b"Host: localhost:8000", b" 200 "),
        (b"Host: [::1]:8000", b" 200 "),
        (b"Host: rebound.example", b" 403 "),
        (b"Host: 127.0.0.1.rebound.example", b" 403 "),
        (b"Host: [::1", b" 403 "),
        (b"Host: 127.0.0.1\r\nOrigin: https://elsewhere.example", b" 403 "),
    ]:
        found = sent(port, POST % (header, len(body)) + body)
        assert expected in found.partition(b"\r\n")[0], (header, found)
        assert b"access-control" not in found.lower()


def sent(port, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request)
        found = b""
        while piece := connection.recv(1 << 16):
            found += piece
        return found


def test_others_than_this_machine_need_a_key(monkeypatch):
    monkeypatch.delenv("MANTIS_LITE_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "machine.example"):
        with pytest.raises(RecipeError, match="there is no key\n  Set MANTIS_LITE_API_KEY"):
            serve("tiny", host=host)
    assert key_for("127.0.0.1") is key_for("::1") is key_for("localhost") is None
    monkeypatch.setenv("MANTIS_LITE_API_KEY", f" {KEY}\n")
    assert key_for("0.0.0.0") == KEY


def test_a_port_that_is_taken(port):
    with pytest.raises(RecipeError, match=rf"{port}: .*\n  Choose another port"):
        serve("tiny", port=port)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mantis_lite.serve")
    with pytest.raises(RecipeError, match=r"uvicorn is not installed\n  Install it: pip install 'mantis-lite\[serve"):
        import_module("mantis_lite.serve")


@pytest.mark.parametrize(
    "url", ["http://example.com/a.png", "https://example.com/a.png", "file:///etc/passwd", "/etc/passwd", "a.png", 1]
)
def test_pictures_elsewhere_are_refused(client, url):
    for kind in ("image_url", "video_url"):
        message = refused(client, [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}])
        assert "is no data: URL of a known format" in message and "links are not fetched" in message


def test_parts_of_other_kinds_are_refused(client):
    for part, found in [
        ({"type": "image", "path": "/etc/passwd"}, "part 1 of turn 1 has the type 'image'"),
        ({"type": "video", "video": "/etc/passwd"}, "has the type 'video'"),
        ({"type": "input_audio", "input_audio": {}}, "has the type 'input_audio'"),
        ({"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,"}}, "is no data: URL"),
        ({"type": "image_url", "image_url": {"url": link(picture(1)), "detail": "low"}}, "has the detail 'low'"),
        ({"type": "text", "text": 3}, '"text" of part 1 of turn 1 is a number'),
        ("text", "has the type a string"),
    ]:
        assert found in refused(client, [{"role": "user", "content": [part]}]), part


def test_a_broken_picture_is_named(client):
    for content, found in [
        (b"no picture", "picture 2, given as 10 bytes, cannot be read: not a JPEG"),
        (picture(1)[:60], "picture 2, given as 60 bytes, cannot be read"),
    ]:
        assert found in refused(client, [said("What?", picture(1), content)])
        with pytest.raises(openai.BadRequestError, match="cannot be read"):
            ask(client, [said("What?", picture(1), content)], stream=True)
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,%"}}
    assert "not base64" in refused(client, [{"role": "user", "content": [broken]}])


def test_turns_are_held_to_what_the_data_is(client):
    answered = {"role": "assistant", "content": "A dog."}
    for messages, found in [
        ([answered, said("Sure?")], "Begin and end with a turn of the user's"),
        ([said("What?"), answered], "Begin and end with a turn of the user's"),
        ([{"role": "system", "content": "Be brief."}], "Begin and end with a turn of the user's"),
        ([said("What?"), said("What?")], "turns 1 and 2 are both the user's"),
        ([said("What?"), {"role": "system", "content": "x"}, said("y")], "turn 2 is the system's"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "turn 1 has 'tool_call_id'"),
        ([{"role": "developer", "content": "x"}], "turn 1 has the role 'developer'"),
        ([{"role": "user", "content": None}], "turn 1 has no text"),
        ([{"role": "user", "content": "x", "name": "Ann"}], "turn 1 has 'name'"),
        (["x"], "turn 1 is a string"),
    ]:
        assert found in refused(client, messages), messages


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"presence_penalty": 0.5},
        {"logit_bias": {"5": 1}},
        {"store": True},
        {"reasoning_effort": "low"},
        {"extra_body": {"top_k": 5}},
        {"temperature": 3},
        {"temperature": 0.001},
        {"temperature": True},
        {"top_p": 2},
        {"seed": 1.5},
        {"temperature": "warm"},
        {"top_p": 0},
        {"max_tokens": 0},
        {"max_tokens": 5000},
        {"seed": 1 << 70},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": ""},
        {"messages": []},
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused(client, fields):
    messages = fields.get("messages", [said("Hello?")])
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages, **{key: value for key, value in fields.items() if key != "messages"})
    named = next(iter(fields.get("extra_body", fields)))
    assert named in caught.value.body["message"] and "\n  " in caught.value.body["message"]


def test_what_changes_nothing_is_taken(client):
    fields = {"n": 1, "user": "ann", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "tools": []}
    fields |= {"response_format": {"type": "text"}, "logprobs": False, "frequency_penalty": 0.0}
    assert text(ask(client, [said("Hello?")], **fields)) == text(ask(client, [said("Hello?")]))


def test_more_than_the_limits_allow(chat, client, port):
    assert "5 pictures and clips, and 4 are taken" in refused(client, [said("What?", *[picture(1)] * 5)])
    assert "positions" in refused(client, [said("word " * 800)], max_tokens=1500)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, [said("What?", b"x" * (1 << 20))])
    assert caught.value.status_code == 413
    chunked = POST.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") % b"Host: 127.0.0.1"
    body = (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 17 + b"0\r\n\r\n"
    assert b" 413 " in sent(port, chunked + body).partition(b"\r\n")[0]
    with serving(chat, pixels=10_000, seconds=0.5) as port:
        with pytest.raises(openai.APIStatusError, match="pixels together, and 10,000 are taken") as caught:
            ask(client_of(port), [said("What?", picture(3), picture(3), picture(1), picture(1, 60, 10))])
        assert caught.value.status_code == 413
        assert b" 408 " in sent(port, POST % (b"Host: 127.0.0.1", 9) + b"{").partition(b"\r\n")[0]


def test_what_is_no_json(port):
    half = json.dumps({"model": "tiny-llava", "messages": [said("half \ud83d")]}).encode()
    for body in (half, b"", b"{", b"\xff", b"[" * 100_000, b'{"model": 1' + b"1" * 5000 + b"}", b"[1]", b"null"):
        found = sent(port, POST % (b"Host: 127.0.0.1", len(body)) + body)
        assert b" 400 " in found.partition(b"\r\n")[0], body[:20]
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_two_at_once_are_both_answered(client):
    messages = [[said("What is it?", picture(seed))] for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda m: text(ask(client, m)), messages))
    assert both == [text(ask(client, m)) for m in messages] and both[0] != both[1]


@pytest.fixture
def slow(monkeypatch):
    """Answers that take long, and the number of those that are being made."""
    from mantis_lite import serve

    running: list[int] = []

    def stream(*args, **kwargs):
        running.append(1)
        try:
            for piece in original(*args, **kwargs):
                time.sleep(0.02)
                yield piece
        finally:
            running.pop()

    original = serve.stream
    monkeypatch.setattr(serve, "stream", stream)
    return running


def until(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_answer(client, port, slow, stream):
    started = time.monotonic()
    if stream:
        answer = ask(client, [said("Go on.")], max_tokens=1500, stream=True)
        next(answer)
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client, [said("Go on.")], max_tokens=1500, timeout=0.5)
    until(lambda: not slow)
    assert text(ask(client, [said("Hello?")], max_tokens=2))
    assert time.monotonic() - started < 15  # 30 s at least, if it had gone on


def test_a_full_queue_refuses_and_empties_again(chat, slow):
    with serving(chat, waiting=1) as port, ThreadPoolExecutor(2) as pool:
        client = client_of(port)
        answer = ask(client, [said("Go on.")], max_tokens=1000, stream=True)
        two = [pool.submit(ask, client, [said("Hello?")], max_tokens=2) for _ in range(2)]
        until(lambda: any(each.done() for each in two))
        turned_away, waits = sorted(two, key=lambda each: not each.done())
        with pytest.raises(openai.RateLimitError, match="too many requests are waiting") as caught:
            turned_away.result()
        assert caught.value.response.headers["retry-after"] == "5" and not waits.done()
        answer.close()
        assert text(waits.result()) and text(ask(client, [said("Hello?")], max_tokens=2))


def test_what_is_the_servers_fault_is_told_without_its_words(chat, client, monkeypatch, caplog):
    from mantis_lite import serve

    def broken(*args):
        yield from ["a"] * late
        raise RuntimeError("secret words")

    monkeypatch.setattr(serve, "stream", broken)
    late = 0
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, [said("Hello?")], stream=stream)
        assert "secret" not in str(caught.value)
    late = 1
    with pytest.raises(openai.APIError, match="the server failed"):
        list(ask(client, [said("Hello?")], stream=True))
    assert "secret words" in caplog.text


def test_a_server_that_is_stopped_lets_go_of_what_it_does(chat, slow):
    with serving(chat) as port:
        answer = ask(client_of(port), [said("Go on.")], max_tokens=1000, stream=True)
        next(answer)
        started = time.monotonic()
    assert time.monotonic() - started < 12 and not slow


def test_a_served_run_says_where_and_by_what_name(llava_folder, monkeypatch):
    from mantis_lite import serve as module

    shown = []
    monkeypatch.setattr(module, "server", lambda app: type("Server", (), {"run": lambda self, sockets: None})())
    serve(str(llava_folder), port=0, show=shown.append)
    assert shown[0].startswith(f"{llava_folder.name} at http://127.0.0.1:") and shown[0].endswith("without a key")
    assert os.sep not in shown[0].partition(" at ")[0]
