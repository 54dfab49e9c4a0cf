"""The page: a real Gradio server, asked by Gradio's own client."""

import socket
import sys

import clips_made
import pytest
from helpers import picture

from mantis_lite.chat import MantisChat
from mantis_lite.errors import RecipeError
from mantis_lite.web import launched, page

TOKENS = 12


@pytest.fixture(scope="module")
def chat(llava_folder):
    return MantisChat(llava_folder)


@pytest.fixture(scope="module")
def blocks(chat):
    pytest.importorskip("gradio", reason="gradio is not installed: see docs/serving.md")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    blocks = launched(page(chat, max_new_tokens=TOKENS), port)
    yield blocks
    blocks.close()


@pytest.fixture
def visit(blocks):
    """A visit to the page: its client asks with files, and gets what is shown."""
    from gradio_client import Client, handle_file

    def visit():
        client = Client(blocks.local_url, verbose=False)

        def ask(text, *files):
            question = {"text": text, "files": [handle_file(str(file)) for file in files]}
            return said(client.predict(question, api_name="/ask")[1])

        ask.client = client
        return ask

    return visit


def said(shown) -> list[tuple[str, str]]:
    """Who said what, of the messages that are shown; files as <file>."""
    found = []
    for message in shown:
        content = message["content"]
        parts = content if isinstance(content, list) else [content]
        for part in parts:
            words = part if isinstance(part, str) else part.get("text", "<file>")
            found.append((message["role"], words))
    return found


@pytest.mark.slow
def test_turns_are_those_of_the_chat_and_a_visits_own(chat, visit, tmp_path):
    (tmp_path / "red.png").write_bytes(picture(1))
    clip = clips_made.make(tmp_path / "clip.mp4", frames=20)
    own, ask = chat.fork(), visit()
    first = own("What is it?", images=[tmp_path / "red.png"], max_new_tokens=TOKENS)
    shown = [("user", "<file>"), ("user", "What is it?"), ("assistant", first)]
    assert ask("What is it?", tmp_path / "red.png") == shown
    second = own("And what moves?", videos=[clip], max_new_tokens=TOKENS)
    after = [*shown, ("user", "<file>"), ("user", "And what moves?"), ("assistant", second)]
    assert ask("And what moves?", clip) == after

    other = chat.fork()("And what moves?", max_new_tokens=TOKENS)
    assert visit()("And what moves?") == [("user", "And what moves?"), ("assistant", other)]
    assert chat.turns == []

    assert said(ask.client.predict(api_name="/undo")) == shown
    assert ask("Sure?")[:3] == shown
    assert said(ask.client.predict(api_name="/clear")) == []


@pytest.mark.slow
def test_an_answer_comes_in_pieces(visit):
    ask = visit()
    job = ask.client.submit({"text": "What is it?", "files": []}, api_name="/ask")
    job.result()
    assert len(job.outputs()) > 3


@pytest.mark.slow
def test_what_is_wrong_is_shown(visit, tmp_path):
    from gradio_client.exceptions import AppError

    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(AppError, match="cannot be read"):
        visit()("What is it?", tmp_path / "broken.png")


@pytest.mark.slow
def test_other_names_for_this_machine_are_not_answered(chat, blocks):
    port = int(blocks.local_url.rstrip("/").rpartition(":")[2])
    for host, expected in ((b"127.0.0.1", b" 200 "), (b"rebound.example", b" 400 ")):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /config HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % host)
            assert expected in connection.recv(32)
    assert not blocks.share and blocks.analytics_enabled is False and blocks.server_name == "127.0.0.1"
    with pytest.raises(RecipeError, match=f"port: {port} is taken"):
        launched(page(chat), port)


def test_gradio_that_is_missing_is_named(chat, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RecipeError, match=r"gradio is not installed\n  Install it: pip install 'gradio>=6\.31'"):
        page(chat)
