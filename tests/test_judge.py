"""A judge behind a real server on loopback: asked again where it pays, and what it fails at is counted."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import benchmarks_made
import pytest

from mantis_lite.errors import DataError, RecipeError
from mantis_lite.evaluate.asking import Said
from mantis_lite.evaluate.evaluation import result_of
from mantis_lite.evaluate.judge import Judge, JudgeError, judge_of
from mantis_lite.evaluate.mementos import judged, read_lists, read_synonyms
from mantis_lite.evaluate.run import run

REPLY = """Object list 1: [dog, ball]
Action list 1: [run, jump]
Object list 2: [pup, cat, ball, tree]
Action list 2: [run]"""


@pytest.fixture
def server():
    """Answers with the (status, text) that are lined up, the last of them again and again; keeps what it was asked.

    A status of 0 is no HTTP, and the text of 302 where it leads.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            self.server.asked.append((self.path, self.headers.get("Authorization"), body))
            status, text = self.server.says.pop(0) if len(self.server.says) > 1 else self.server.says[0]
            if not status:
                self.wfile.write(b"nonsense\n")
                return
            content = text if status != 200 else json.dumps({"choices": [{"message": {"content": text}}]})
            self.send_response(status)
            if status == 302:
                self.send_header("Location", text)
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_POST

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.says = [], [(200, REPLY)]
    threading.Thread(target=made.serve_forever, daemon=True).start()
    made.url = f"http://127.0.0.1:{made.server_port}/v1"
    yield made
    made.shutdown()
    made.server_close()


def test_it_is_asked_as_openais_api_is(server, monkeypatch):
    monkeypatch.setenv("MANTIS_LITE_JUDGE_KEY", "sesame")
    assert Judge(server.url, "some-model")("Which?") == REPLY
    ((path, key, body),) = server.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer sesame")
    assert body["model"] == "some-model" and body["temperature"] == 0
    assert body["messages"] == [{"role": "user", "content": "Which?"}]


@pytest.mark.parametrize("first", [(429, "slow down"), (503, ""), (200, None), (0, "")])
def test_it_is_asked_again_where_it_may_help(server, first):
    server.says = [first, first, (200, "at last")]
    assert Judge(server.url, "m", pause=0.01)("Which?") == "at last" and len(server.asked) == 3


def test_what_does_not_help_is_not_tried_again(server):
    server.says = [(400, "too long")]
    with pytest.raises(JudgeError, match=r"^status 400: too long$"):
        Judge(server.url, "m", pause=0.01)("Which?")
    assert len(server.asked) == 1
    server.says = [(500, "")]
    with pytest.raises(JudgeError, match="no answer after 5 tries: status 500"):
        Judge(server.url, "m", pause=0.01)("Which?")
    for status, said in {
        401: r"refuses the key \(401\)\n  Set its key in the environment variable MANTIS_LITE_JUDGE_KEY",
        404: r"has no some-model to chat with \(404\)\n  Check both",
    }.items():
        server.says = [(status, "")]
        with pytest.raises(RecipeError, match=said):
            Judge(server.url, "some-model", pause=0.01)("Which?")


def test_a_key_goes_nowhere_else(server, monkeypatch):
    """Nor to where an answer leads, or into what is said of a mistake."""
    monkeypatch.setenv("MANTIS_LITE_JUDGE_KEY", "sesame\n")
    server.says = [(302, f"{server.url}/elsewhere"), (200, REPLY)]
    Judge(server.url, "m")("Which?")
    assert [(path, key) for path, key, _ in server.asked] == [
        ("/v1/chat/completions", "Bearer sesame"),
        ("/v1/elsewhere", None),
    ]
    monkeypatch.setenv("MANTIS_LITE_JUDGE_KEY", "ses\name")
    with pytest.raises(RecipeError, match=r"^MANTIS_LITE_JUDGE_KEY: has characters that no key has\n  Set it again.$"):
        Judge(server.url, "m")("Which?")


@pytest.mark.parametrize(
    "url",
    [
        *("http://elsewhere", "http://localhost.elsewhere.org/v1", "http://localhost:80@elsewhere.org/v1"),
        *("https://", "https:///v1", "https://x y", "https://host/v1?key=1", "file:///etc/passwd", "ftp://localhost"),
    ],
)
def test_an_address_that_is_none_or_another_machines_unencrypted(url):
    with pytest.raises(RecipeError, match=r"^--judge: .*\n  Give an https:// address, or one of this machine.$"):
        Judge(url, "m")


@pytest.mark.parametrize(
    "url", ["https://api.openai.com/v1", "http://localhost:8000/v1", "http://127.0.0.1", "http://[::1]:80/"]
)
def test_an_address(url):
    assert Judge(url, "m").url == url


def test_four_lists_or_none():
    assert read_lists(REPLY) == [["dog", "ball"], ["run", "jump"], ["pup", "cat", "ball", "tree"], ["run"]]
    assert read_lists(REPLY.replace("Object list 1: [dog", "**Object list 1**: ['dog'"))[0] == ["dog", "ball"]
    for broken in (REPLY.replace("Action list 2", "Actions 2"), REPLY + "\nObject list 1: [x]", ""):
        with pytest.raises(JudgeError, match=r"list \d is [02] times in the reply"):
            read_lists(broken)


def test_rows_are_judged_with_synonyms_and_failures_are_counted(server, tmp_path):
    folder = benchmarks_made.mementos(tmp_path)
    (folder / "synonyms.json").write_text('{"objects": {"pup": "dog"}, "actions": {}}')
    benchmark = judged(Judge(server.url, "m", pause=0.01), read_synonyms(str(folder)))
    questions = benchmark.read(str(folder), "own")
    server.says = [*[(200, REPLY)] * 4, (200, "I would rather not."), (400, "no")]
    said = [result_of(benchmark, question, Said(at, "A pup.", None), "own") for at, question in enumerate(questions)]
    first = said[0].scores
    assert (first["objects_precision"], first["objects_recall"]) == (0.5, 1)
    assert (first["actions_precision"], first["actions_recall"]) == (1, 0.5) and first["reply"] == REPLY
    assert [found.scores.get("judge_failed") for found in said[4:]] == [
        "Object list 1 is 0 times in the reply",
        "status 400: no",
    ]
    more = benchmark.more(said)
    assert more["judge_failed"] == 2 and more["objects_f1"] == pytest.approx(2 / 3) == more["dl/objects_f1"]
    server.says = [(200, REPLY.replace("pup, cat, ball, tree", "pup, Dog, cat, tree"))]
    for protocol, precision in (("own", 1 / 3), ("upstream", 1 / 4)):
        scores = result_of(benchmark, questions[0], Said(0, "A pup.", None), protocol).scores
        assert scores["objects_precision"] == precision, "in the original Dog is no dog"
    (folder / "synonyms.json").write_text('{"objects": []}')
    with pytest.raises(DataError, match=r"synonyms.json: not two mappings of words to words\n"):
        read_synonyms(str(folder))


def test_the_command_has_answers_judged(server, tmp_path, llava_folder):
    folder = benchmarks_made.mementos(tmp_path / "copy")
    judge = Judge(server.url, "m")
    (found,) = run(str(llava_folder), [f"mementos={folder}"], to=tmp_path / "out", max_new_tokens=3, judge=judge)
    assert found.summary["judge"] == "m" and found.summary["more"]["objects_f1"] == pytest.approx(1 / 3)
    assert sum("A dog runs to ball 0" in body["messages"][0]["content"] for _, _, body in server.asked) == 2
    with pytest.raises(RecipeError, match="--judge: only mementos is judged"):
        list(run(str(llava_folder), ["nlvr2"], judge=judge))


def test_a_judges_model_wants_a_judge():
    assert judge_of(None, None) is None and judge_of("https://a/v1", None).model.startswith("gpt")
    with pytest.raises(RecipeError, match="--judge-model: m, and no judge\n  Add --judge"):
        judge_of(None, "m")
    with pytest.raises(RecipeError, match="--judge: "):
        judge_of("", None)
