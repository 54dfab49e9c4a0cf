"""Conversations: what the original generated, several turns, streams, batches, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from clips_made import make
from helpers import SHARED, golden_pictures, picture
from typer.testing import CliRunner

from mantis_lite.chat import MantisChat
from mantis_lite.cli import app
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.sample import Image, Sample, Turn, Video
from mantis_lite.data.schema import parse, user_turn
from mantis_lite.errors import RecipeError, SampleError
from mantis_lite.generate import _padded, generate
from mantis_lite.repl import Repl

GOLDEN = SHARED / "golden"


@pytest.fixture(scope="module")
def pictures():
    return golden_pictures()


def golden() -> list:
    """The recorded conversations by checkpoint, but for those that upstream's own prompts are wrong in.

    Of pictures without a mark its processors make a prompt that was never trained on: they stand before the system's
    words, or before the blank behind "USER:". And its Idefics2 reads patches that a picture covers in part.
    """
    found = []
    for file in sorted((GOLDEN / "generation").glob("*.json")):
        for name, records in json.loads(file.read_text()).items():
            for record in records:
                if record.get("cls") != "mantis" and "no_placeholder" not in record["name"]:
                    found.append(pytest.param(name, record, id=f"{name}-{record['name']}"))
    return found


def turns_of(record: dict, pictures: dict[str, bytes]) -> list[Turn]:
    """The turns of a record, with its pictures at their marks, or in front of the first."""
    images = iter([Image(pictures[Path(path).name]) for path in record["images"] or ()])
    if "messages" in record:
        return [
            Turn(m["role"], tuple(next(images) if p["type"] == "image" else p["text"] for p in m["content"]))
            for m in record["messages"]
        ]
    said = [*(record.get("history_in") or ()), {"role": "user", "text": record["text"]}]
    turns = []
    for turn in said:
        parts = [part for piece in turn["text"].split("<image>") for part in (piece, None)][:-1]
        content = [next(images) if part is None else part for part in parts if part != ""]
        turns.append(Turn(turn["role"].lower(), tuple(content)))
    rest = tuple(images)
    return [Turn("user", rest + turns[0].content), *turns[1:]] if rest else turns


@pytest.fixture(scope="module")
def chat_of():
    opened: dict = {}

    def get(name):
        if name not in opened:
            hub = "hub" if name == "idefics2" else None
            opened[name] = MantisChat(GOLDEN / "checkpoints" / name, template=hub)
        return opened[name]

    return get


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden fixtures are not beside this checkout")
@pytest.mark.parametrize(("name", "record"), golden())
def test_what_the_original_generated(chat_of, pictures, name, record):
    chat = chat_of(name)
    turns = turns_of(record, pictures)
    encoded = chat.encoder.encode_prompt(Sample("golden", None, tuple(turns)))
    if name.startswith("mllava"):
        each, image = chat.encoder.vision.tokens((56, 56))[0][1], chat.encoder.token_id("<image>")
        ids, kept, at = encoded.input_ids.tolist(), [], 0
        while at < len(ids):
            kept.append(ids[at])
            at += each if ids[at] == image else 1
        assert kept == record["input_ids"]
    else:
        assert encoded.input_ids.tolist() == record["input_ids"]
    (found,) = generate(chat.model, chat.encoder, [encoded], 16)
    assert found == record["new_ids"]


# Conversations.


@pytest.fixture(scope="module")
def pngs(tmp_path_factory):
    """Paths of pictures by their seeds."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{seed}.png" for seed in range(4)]
    for seed, path in enumerate(paths):
        path.write_bytes(picture(seed))
    return paths


@pytest.fixture(scope="module")
def chat(llava_folder):
    return MantisChat(llava_folder)


@pytest.fixture(autouse=True)
def from_the_start(request):
    if "chat" in request.fixturenames:
        request.getfixturevalue("chat").reset()


def test_turns_with_pictures_in_each_and_their_history(chat, pngs):
    first = chat("What is <image>?", images=[pngs[0]], max_new_tokens=8)
    second = chat("And these?", images=[str(pngs[1]), pngs[2].read_bytes()], max_new_tokens=8)
    assert chat.history == [
        {"role": "user", "text": "What is <image>?"},
        {"role": "assistant", "text": first},
        {"role": "user", "text": "<image><image>And these?"},
        {"role": "assistant", "text": second},
    ]
    numbered = chat.encoder.tokenizer.encode("(image 3: <Image>", add_special_tokens=False).ids
    prompt = chat.encoder.encode_prompt(Sample("t", None, tuple(chat.turns[:3]))).input_ids.tolist()
    assert any(prompt[at : at + len(numbered)] == numbered for at in range(len(prompt)))
    assert chat.undo() and len(chat.turns) == 2
    assert chat("And these?", images=[pngs[1], pngs[2]], max_new_tokens=8) == second
    chat.reset()
    assert chat.history == [] and not chat.undo()
    assert chat("What is <image>?", images=[pngs[0]], max_new_tokens=8) == first


def test_a_mark_of_nothing_is_text(chat):
    chat("What is <image>, or <video>?", max_new_tokens=1)
    assert chat.turns[0].content == ("What is <image>, or <video>?",)


def test_a_stream_is_the_answer_in_pieces(chat, pngs):
    whole = chat("What is it?", images=[pngs[0]], max_new_tokens=24)
    chat.reset()
    pieces = list(chat.stream("What is it?", images=[pngs[0]], max_new_tokens=24))
    assert "".join(pieces) == whole == chat.history[-1]["text"] and len(pieces) > 3
    assert not [piece for piece in pieces if piece.endswith("\N{REPLACEMENT CHARACTER}")][:-1]


def test_a_stream_that_is_let_go_of_stops_the_model(chat):
    pieces = chat.stream("Tell me", max_new_tokens=1500)
    begun = next(pieces)
    pieces.close()
    assert chat.history[-1]["text"].startswith(begun) and len(chat.history[-1]["text"]) < 200
    assert chat.model.training is False


def test_draws_go_by_their_seed(chat):
    asked = {"max_new_tokens": 12, "temperature": 1.5}
    answers = [(chat("Tell me", seed=seed, **asked), chat.reset())[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    greedy = [(chat("Tell me", **more, max_new_tokens=12), chat.reset())[0] for more in ({}, {"temperature": 0})]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"temprature": 0.5}, r"temprature: no such setting; did you mean temperature\?\n  Leave it out"),
        ({"num_beams": 3}, r"num_beams: no such setting\n  Leave it out; the settings are max_new_tokens, temperature"),
        ({"num_return_sequences": 2}, "num_return_sequences: no such setting"),
        ({"temperature": 1e-45}, r"temperature: cannot be 1e-45\n  Give 0, or a number from 0.01 to 2"),
        ({"temperature": float("nan")}, "temperature: cannot be nan"),
        ({"temperature": True}, "temperature: cannot be True"),
        ({"temperature": "1"}, "temperature: cannot be '1'"),
        ({"top_p": 0}, "top_p: cannot be 0"),
        ({"top_k": 1.5}, "top_k: cannot be 1.5"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty: cannot be 1e-45"),
        ({"seed": 1 << 70}, r"seed: cannot be 1180591620717411303424\n  Give a whole number of 64 bits"),
        ({"max_new_tokens": 0}, r"max_new_tokens: cannot be 0\n  Give a whole number of 1 or more"),
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused(chat, settings, found):
    with pytest.raises(RecipeError, match=found):
        chat("Hello?", **settings)
    with pytest.raises(RecipeError, match=found):
        chat.generate([{"text": "Hello?"}], **settings)
    assert chat.history == []


def test_settings_are_numbers_of_any_kind(chat):
    greedy, *others = [
        (chat("Tell me", max_new_tokens=12, **more), chat.reset())[0]
        for more in ({}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1, "top_k": 1}, {"temperature": 0, "top_p": 1})
    ]
    assert others == [greedy] * 4


def test_a_penalty_alone_draws_nothing(chat):
    prompts = [{"text": "Tell me"}, {"text": "Tell me of something that takes many more words to ask for"}]
    settings = {"max_new_tokens": 16, "repetition_penalty": 3.0}
    together = chat.generate(prompts, **settings)
    assert together == [chat.generate([prompt], temperature=0, **settings)[0] for prompt in prompts]
    assert together != chat.generate(prompts, max_new_tokens=16)


def test_text_that_is_no_utf8_is_refused(chat):
    with pytest.raises(SampleError, match=r"turn 1: a turn of the user has half a character, '\\udcff'\n  Write its"):
        chat("caf\udcff?")
    assert chat.history == []


# What is kept of a conversation.


def said(chat, *turns) -> None:
    """Turns as if they had been asked and answered, in words that the tiny model does not have."""
    chat.reset()
    for asked, answer in turns:
        chat._keep(asked, [answer])


@pytest.mark.parametrize(
    ("texts", "marks"),
    [
        (("What is <image>?", "Sure?"), 1),
        (("<image> and <image>", "a literal <image>, and <video>"), 2),
        (("a literal <image> without one", ""), 0),
        (("<image>", "\n <image> "), 1),
    ],
)
def test_a_conversation_is_saved_as_a_row_that_trains(chat, pngs, tmp_path, texts, marks):
    first, second = user_turn(texts[0], [*map(Image, pngs[:marks])]), user_turn(texts[1], [Image(pngs[3])])
    said(chat, (first, "An <image>, <video> and caf\u00e9."), (second, ""))
    row = json.loads(chat.save(tmp_path / "row.json").read_text())
    sample = parse(row, "row", MediaFolder(tmp_path, outside=True))
    assert sample.turns == tuple(chat.turns)


def test_a_conversation_about_clips_is_saved_as_a_row_of_video(chat, pngs, tmp_path):
    clip = make(tmp_path / "clip.mp4", frames=8)
    said(chat, (user_turn("<video> beside <image>", [Image(pngs[0])], [Video(clip)]), "It moves: <image>."))
    given = Turn("user", ("And ", Video(clip, 1.0, 2.5), Video((Image(pngs[1]), Image(pngs[2])))))
    chat.turns += [given, Turn("assistant", ("No.",))]
    row = json.loads(chat.save(tmp_path / "row.json").read_text())
    assert parse(row, "row", MediaFolder(tmp_path, outside=True), "video").turns == tuple(chat.turns)
    said(chat, (user_turn("What moves?", (), [Video(clip)]), "A <video>."))
    with pytest.raises(SampleError, match=r'save: a text has "<video>" in it, .*\n  Ask in other words, after /undo'):
        chat.save(tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def test_the_first_words_are_saved_with_what_they_began(llava_folder, tmp_path):
    chat, plain = MantisChat(llava_folder, system="Be brief."), MantisChat(llava_folder)
    chat("What?", max_new_tokens=2)
    sample = parse(json.loads(chat.save(tmp_path / "row.json").read_text()), "row", None)
    assert sample.turns == (Turn("system", ("Be brief.",)), *chat.turns)
    asked = Sample("t", None, tuple(chat.turns[:1]))
    again = plain.encoder.encode_prompt(Sample("t", None, sample.turns[:2]))
    assert again.input_ids.tolist() == chat.encoder.encode_prompt(asked).input_ids.tolist()


def test_a_picture_whose_name_is_no_utf8(chat, pngs, tmp_path):
    odd = tmp_path / "\udcff.png"
    odd.write_bytes(pngs[0].read_bytes())
    (found,) = map(json.loads, lines(chat, f"/image {odd}", "What?", f"/save {tmp_path / 'row.json'}", as_json=True))
    assert found["images"] == [str(odd)]
    row = json.loads((tmp_path / "row.json").read_text())
    assert parse(row, "row", MediaFolder(tmp_path, outside=True)).turns == tuple(chat.turns)


def test_what_cannot_be_saved(chat, pngs, tmp_path, monkeypatch):
    with pytest.raises(SampleError, match=r'save: "messages" is empty'):
        chat.save(tmp_path / "none.json")
    monkeypatch.chdir(pngs[0].parent)
    chat("What is <image>?", images=[pngs[0].name], max_new_tokens=1)
    kept = chat.save(tmp_path / "row.json").read_text()
    assert json.loads(kept)["messages"][0]["content"][1] == {"type": "image", "image": str(pngs[0])}
    with pytest.raises(SampleError, match=r"row.json: exists already\n  Name another file"):
        chat.save(tmp_path / "row.json")
    assert (tmp_path / "row.json").read_text() == kept
    chat("And this?", images=[pngs[1].read_bytes()], max_new_tokens=1)
    with pytest.raises(SampleError, match=r"save: a picture was given as bytes, and has no path"):
        chat.save(tmp_path / "other.json")
    chat.reset()
    (tmp_path / "a\\b.png").write_bytes(pngs[0].read_bytes())
    chat("And this?", images=[tmp_path / "a\\b.png"], max_new_tokens=1)
    with pytest.raises(SampleError, match=r"save: part 1 of turn 1 is a path of Windows"):
        chat.save(tmp_path / "other.json")


def test_what_cannot_be_asked(chat, pngs, tmp_path):
    with pytest.raises(SampleError, match=r"turn 1: no such file: .*none.png"):
        chat("What?", images=[tmp_path / "none.png"])
    with pytest.raises(SampleError, match=r"turn 1: 1 image but 2 <image> marks"):
        chat("<image> or <image>?", images=[pngs[0]])
    with pytest.raises(SampleError, match=r"where the model has 2,048 positions\n  Ask about fewer pictures"):
        chat("What?", max_new_tokens=4000)
    assert chat.history == []
    with pytest.raises(RecipeError, match=r"bits: expected 4 or 16, found 8"):
        MantisChat(chat.trained.name, bits=8)


def test_a_batch_says_what_each_would_alone(family, folder_of, pngs):
    chat = MantisChat(folder_of(family), overrides=["memory.kernels=off"])
    prompts = [
        {"text": "What is it, in a few words that are long?"},
        {"text": "What is <image> beside <image>?", "images": pngs[:2]},
        {"text": "And?", "images": pngs[2:3]},
    ]
    together = chat.generate(prompts, max_new_tokens=6)
    alone = [chat.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
    called = [(chat(**prompt, max_new_tokens=6), chat.reset())[0] for prompt in prompts]
    assert together == alone == called
    # A repetition penalty counts all ids of a row, its padding too.
    encoded = [chat.encoder.encode_prompt(Sample("t", None, (user_turn(words),))) for words in ("What?", "And " * 9)]
    rows = _padded(chat.encoder, encoded)["input_ids"].tolist()
    assert [set(row) for row in rows] == [set(prompt.input_ids.tolist()) for prompt in encoded]


def test_4_bits_answer(llava_folder):
    chat = MantisChat(llava_folder, bits=4)
    assert chat.trained.recipe.quantized == ["language_model"]
    assert any(hasattr(weight, "quant_state") for weight in chat.model.parameters())
    assert isinstance(chat("Tell me", max_new_tokens=4), str)


def test_a_clip_is_a_few_of_its_frames(chat, tmp_path):
    clip = make(tmp_path / "clip.mp4", frames=50)
    chat("What happens in <video>?", videos=[clip], max_new_tokens=2)
    prompt = chat.encoder.frames.lay_out(Sample("t", None, tuple(chat.turns[:1])))
    assert len(prompt.images) == 8


def test_the_first_words_may_be_others(llava_folder):
    pirate, other = MantisChat(llava_folder), MantisChat(llava_folder, system="Be brief.")
    sample = Sample("t", None, (Turn("user", ("What?",)),))
    prompts = [c.encoder.tokenizer.decode(c.encoder.encode_prompt(sample).input_ids.tolist()) for c in (pirate, other)]
    assert "pirate" in prompts[0] and "pirate" not in prompts[1] and "Be brief." in prompts[1]
    with pytest.raises(RecipeError, match=r"hub needs one template whose tokens the checkpoint has, found none"):
        MantisChat(llava_folder, template="hub")


# At a terminal.


def lines(chat, *typed: str, **settings) -> list[str]:
    shown: list[str] = []
    Repl(chat, shown.append, {"max_new_tokens": 6}, **settings).read(typed)
    return "".join(shown).splitlines()


def test_a_conversation_at_a_terminal(chat, pngs, tmp_path):
    one, two = pngs[:2]
    shown = lines(
        chat,
        f"/image {one} {two}",
        "What are they?",
        "/undo",
        "/undo",
        "/video none.mp4",
        "x",
        "/help",
        "/quit",
        "not read",
    )
    assert "nothing was said yet" in shown and "turn 1: no such file: none.mp4" in shown
    assert any(line.startswith("/image FILE...") for line in shown) and chat.history == []
    typed = ["/undo", "Hello", f"/save {tmp_path / 'row.json'}", '/image "', f"/image {one}", "/undo", "", "/reset"]
    shown = lines(chat, *typed)
    assert f"saved {tmp_path / 'row.json'}" in shown and any("No closing quotation" in line for line in shown)
    assert json.loads((tmp_path / "row.json").read_text())["messages"][0]["content"][0]["text"] == "Hello"
    assert chat.history == []


def test_answers_as_json(chat, pngs):
    (found,) = map(json.loads, lines(chat, f"/image {pngs[0]}", "What?", "/undo", as_json=True))
    chat.reset()
    assert found == {"prompt": "What?", "images": [str(pngs[0])], "videos": [], "answer": found["answer"]}
    assert found["answer"] == chat("What?", images=[pngs[0]], max_new_tokens=6)
    (found,) = map(json.loads, lines(chat, "/image none.png", "What?", as_json=True))
    assert "no such file: none.png" in found["error"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/imgae x.png", "/imgae: no such command; did you mean /image?\n  /help lists what can be typed."),
        ("/nothing", "/nothing: no such command\n  /help lists what can be typed."),
        ("/save a b", "/save: cannot be given 2 names\n  /help lists what can be typed."),
        ("/image", "/image: cannot be given 0 names\n  /help lists what can be typed."),
        ("/image 'x", "/image 'x: No closing quotation\n  Put names with quotes in them in quotes."),
    ],
)
def test_a_command_that_is_none(chat, line, found):
    assert [json.loads(shown) for shown in lines(chat, line, as_json=True)] == [{"error": found}]
    assert lines(chat, line) == found.splitlines()
    with pytest.raises(RecipeError):
        Repl(chat, print).take(line)


def test_what_was_added_stays_until_it_is_answered(chat, pngs):
    shown: list[str] = []
    repl = Repl(chat, shown.append, {"max_new_tokens": 2}, as_json=True)
    code = repl.read([f"/image {pngs[0]} none.png", "What?", "And?"])
    assert code == 3 and all("no such file: none.png" in json.loads(line)["error"] for line in shown)
    assert len(shown) == 2 and repl.images == [str(pngs[0]), "none.png"] and chat.history == []
    assert repl.read(["/undo", f"/image {pngs[0]}", "What?"]) == 0
    assert json.loads(shown[-1])["images"] == [str(pngs[0])] and repl.images == []
    assert repl.read(["/imgae", "/image none.png", "x", "/undo", "x"]) == 2
    assert repl.read([f"/save {pngs[0].parent}/nowhere/x.json"]) == 1


def test_an_answer_that_is_stopped_takes_what_was_added(chat, pngs, monkeypatch):
    repl = Repl(chat, print, images=[str(pngs[0])])

    def stopped(*asked, **settings):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(chat, "stream", stopped)
    assert repl.read(["What?"]) == 0 and repl.images == []


def test_what_is_added_is_in_the_prompt(chat):
    repl = Repl(chat, print, images=["a"], videos=["b", "c"])
    assert repl.prompt == "[1 picture, 2 clips] > "
    repl.take("/undo")
    assert repl.prompt == "> "


def test_the_command(pngs, llava_folder):
    words = ["chat", str(llava_folder), "--image", str(pngs[0]), "--max-new-tokens", "5"]
    once = CliRunner().invoke(app, [*words, "--prompt", "What is <image>?", "--json"])
    assert once.exit_code == 0, once.output
    found = json.loads(once.output)
    typed = CliRunner().invoke(app, words, input="What is <image>?\n/undo\n/quit\n")
    assert typed.exit_code == 0 and typed.output.strip() == found["answer"].strip()


def test_the_command_ends_with_the_code_of_the_first_error(llava_folder):
    words = ["chat", str(llava_folder), "--max-new-tokens", "2", "--json"]
    for typed, code in [(b"/imgae x.png\nhi\n", 2), (b"/image none.png\nhi\n/imgae\n", 3), (b"caf\xff\nhi\n", 3)]:
        done = CliRunner().invoke(app, words, input=typed)
        assert done.exit_code == code, done.output
        first, *rest = map(json.loads, done.output.splitlines())
        assert first.keys() == {"error"} and len(rest) == 1


@pytest.mark.parametrize(
    "words", [["--temperature", "1e-45"], ["--temperature=nan"], ["--top-p", "0"], ["--max-new-tokens", "0"]]
)
def test_settings_of_the_command_are_those_of_the_chat(words):
    found = CliRunner().invoke(app, ["chat", "no such model", *words])
    assert isinstance(found.exception, RecipeError) and f"{words[0][2:5]}" in str(found.exception)
    assert "cannot be" in str(found.exception)


@pytest.mark.slow
def test_bytes_that_are_no_utf8_are_told_at_any_locale(llava_folder):
    """Python is strict of what is typed in most locales, and lets it through as halves of characters in others."""
    words = [sys.executable, "-m", "mantis_lite", "chat", str(llava_folder), "--json", "--max-new-tokens", "1"]
    done = subprocess.run(words, input=b"caf\xff\n", capture_output=True, env={"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 3 and "half a character" in json.loads(done.stdout)["error"], done.stderr


EXAMPLES = {"llava": "llava", "idefics2": "idefics2", "fuyu": "fuyu", "smolvlm": "smolvlm", "qwen_vl": "qwen2_5_vl"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_family(folder_of, monkeypatch, capsys, name):
    """As it stands, but for the model, which is a tiny one of its family."""
    code = (Path(__file__).parents[1] / f"examples/chat_{name}.py").read_text()
    monkeypatch.setattr("sys.argv", [name, str(folder_of(EXAMPLES[name]))])
    monkeypatch.setattr("mantis_lite.chat.generate", lambda *asked: generate(*asked[:3], 4, *asked[4:]))
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert len(capsys.readouterr().out.splitlines()) >= 2
