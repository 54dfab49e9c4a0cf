"""Asking a model a benchmark's questions: exact, gone on with, shared, and the same however they are batched."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_classify
import torch
from clips_made import make
from helpers import chat, picture, write_rows

from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.errors import DataError, DiskError, RecipeError
from mantis_lite.evaluate.asking import Asking, as_upstream, ask, batches, continuation
from mantis_lite.evaluate.benchmark import Benchmark
from mantis_lite.evaluate.compare import compare
from mantis_lite.evaluate.evaluation import evaluate, open_model
from mantis_lite.evaluate.pictures import pictures_of
from mantis_lite.evaluate.question import Question
from mantis_lite.evaluate.results import read_results
from mantis_lite.evaluate.run import compared, run
from mantis_lite.recipe_file import make_recipe
from mantis_lite.scoring import predict
from mantis_lite.training.start import start

COUNT = 23


def questions(protocol: str = "own") -> list[Question]:
    """Choices among two to four, and one question in words in five, of no picture to three."""
    made = []
    for at in range(COUNT):
        images = tuple(Image(picture(seed)) for seed in range(at % 4))
        content = (*images, f"Question {'really ' * (at % 7)}number {at}?")
        options = ("red", "green", "blue", "a dog")[: 2 + at % 3] if at % 5 else ()
        answer = "ABCD"[at % len(options)] if options else "red"
        sample = Sample(f"made:{at + 1}", None, (Turn("user", content),))
        made.append(Question(f"q{at}", sample, "choice" if options else "short", answer, options, f"kind {at % 3}"))
    return made


def made(asked: list[Question] | None = None) -> Benchmark:
    """A letter is read from an answer's length, so that all of them occur whatever a random model writes."""

    def parse(raw, question, protocol):
        return question.letters[len(raw) % len(question.options)] if question.options else raw

    return Benchmark(
        name="made",
        source="nowhere",
        read=lambda source, protocol: questions() if asked is None else asked,
        parse=parse,
        right=lambda parsed, question, protocol: float(parsed == question.answer),
        max_new_tokens=5,
    )


@pytest.fixture(scope="module")
def opened(llava_folder):
    return open_model(str(llava_folder), "own", None)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_row_has_its_line_and_the_summary_adds_up(opened, tmp_path):
    found = evaluate(opened, made(), scoring="both", to=tmp_path / "out")
    rows = lines(tmp_path / "out")
    assert [row["id"] for row in rows] == [question.id for question in questions()]
    for row, question in zip(rows, questions(), strict=True):
        assert row["answer"] == question.answer and row["prompt"].count("<image>") == len(row["images"])
        assert (row["logprobs"] is None) == (not question.options)
        assert row["correct"] == float(row["parsed"] == question.answer)
        if question.options:
            assert list(row["logprobs"]) == list(question.letters) and max(row["logprobs"].values()) < 0
    assert found.summary["rows"] == "nowhere" and found.summary["accuracy"] == pytest.approx(
        sum(row["correct"] for row in rows) / COUNT
    )
    again = evaluate(opened, made(), scoring="both", to=tmp_path / "out")
    assert again.found == COUNT and again.summary == found.summary
    assert not list((tmp_path / "out").glob("part-*"))


def test_batched_is_one_by_one(family, folder_of, tmp_path):
    """The same answers and likelihoods within 1e-4, whatever is read together."""
    opened = open_model(str(folder_of(family)), "own", None)
    asked = questions()
    found = []
    for tokens in (4096, 1):
        planned = batches(opened.encoder, asked, tokens)
        assert sorted(number for batch in planned for number in batch) == list(range(COUNT))
        assert (max(map(len, planned)) == 1) == (tokens == 1)
        found.append(sorted(ask(opened.model, opened.encoder, asked, planned, Asking("both", 5, tokens))))
    for one, other in zip(*found, strict=True):
        assert one[:2] == other[:2]
        assert one.logprobs == (other.logprobs and pytest.approx(other.logprobs, abs=1e-4))


def test_likelihood_alone_writes_no_choice(opened, tmp_path):
    found = evaluate(opened, made(), scoring="likelihood", to=tmp_path / "out")
    both = evaluate(opened, made(), scoring="both", to=tmp_path / "both")
    for row, other in zip(lines(tmp_path / "out"), lines(tmp_path / "both"), strict=True):
        assert row["logprobs"] == other["logprobs"]
        if row["logprobs"]:
            assert row["raw"] is None and row["parsed"] == max(row["logprobs"], key=row["logprobs"].get)
        else:
            assert row["raw"] == other["raw"]
    assert found.summary["likelihood"]["accuracy"] == both.summary["likelihood"]["accuracy"]


def test_an_options_ids_are_those_of_an_answer(encoder_of, family):
    """What a letter is behind a prompt is what it is in a row that is trained on."""
    encoder = encoder_of(family)
    asked = Sample("row", None, (Turn("user", (Image(picture(1)), "Which?")),))
    answered = encoder.encode(replace(asked, turns=(*asked.turns, Turn("assistant", ("B",)))))
    ids = [*encoder.encode_prompt(asked).input_ids.tolist(), *continuation(encoder, "B")]
    assert answered.input_ids[: len(ids)].tolist() == ids


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_evaluation import made
from mantis_lite.evaluate.evaluation import evaluate, open_model

def watch(said, total):
    for number, each in enumerate(said):
        if number == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield each

evaluate(open_model(sys.argv[2], "own", None), made(), scoring="both", to=Path(sys.argv[3]), tokens=200, watch=watch)
"""


def begin(folder: Path, to: Path, at: int, **environ: str) -> subprocess.Popen:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder), str(to), str(at)]
    return subprocess.Popen(command, env=os.environ | environ, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow  # torch is loaded four times
def test_killed_and_gone_on_is_the_same_file_and_two_processes_are_as_one(opened, llava_folder, tmp_path):
    straight = evaluate(opened, made(), scoring="both", to=tmp_path / "straight", tokens=200).folder
    killed = begin(llava_folder, tmp_path / "killed", 9)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    parts = list((tmp_path / "killed").glob("part-*.jsonl"))
    assert len(parts) == 1 and 0 < len(parts[0].read_text().splitlines()) < COUNT
    with parts[0].open("a") as file:
        file.write('{"id": "q1", "cut')
    with begin(llava_folder, tmp_path / "killed", 99) as again:
        assert again.wait() == 0, again.stderr.read()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "LOCAL_WORLD_SIZE": "2"}
    both = [begin(llava_folder, tmp_path / "two", 99, RANK=str(at), LOCAL_RANK=str(at), **shared) for at in range(2)]
    for process in both:
        assert process.wait() == 0, process.stderr.read()
    wanted = (straight / "results.jsonl").read_bytes()
    for name in ("killed", "two"):
        assert (tmp_path / name / "results.jsonl").read_bytes() == wanted
        assert json.loads((tmp_path / name / "summary.json").read_text()) == json.loads(
            (straight / "summary.json").read_text()
        )
        assert not list((tmp_path / name).glob("part-*"))


def test_a_folder_is_of_one_thing(opened, tmp_path):
    evaluate(opened, made(), to=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"--to: .*out has answers that were asked for otherwise: max_new_tokens\n"):
        evaluate(opened, made(), to=tmp_path / "out", max_new_tokens=3)
    assert evaluate(opened, made(), to=tmp_path / "out", max_new_tokens=3, from_scratch=True).found == 0
    other = [replace(each, answer="A" if each.options else each.answer) for each in questions()]
    with pytest.raises(RecipeError, match="asked for otherwise: questions, max_new_tokens\n"):
        evaluate(opened, made(other), to=tmp_path / "out")
    (tmp_path / "out/asked.json").write_text("{")
    with pytest.raises(DataError, match=r"asked.json: is damaged\n  Add --from-scratch"):
        evaluate(opened, made(), to=tmp_path / "out")
    words = [each for each in questions() if not each.options]
    with pytest.raises(RecipeError, match="--scoring: likelihood, but no row of made has options\n"):
        evaluate(opened, made(words), scoring="likelihood", to=tmp_path / "words")
    asked = [replace(each, id="one") for each in questions()]
    with pytest.raises(DataError, match="made: made:2 has the id one of a row before\n"):
        evaluate(opened, made(asked), to=tmp_path / "alike")


def test_as_the_originals_wrappers():
    sample = Sample("row", None, (Turn("user", ("One ", Image(b"1"), " two ", Image(b"2"), " \n")),))
    assert as_upstream(sample, "llava").turns[0].content == ("One ", Image(b"1"), " ", " two ", Image(b"2"), " ")
    assert as_upstream(sample, "idefics2").turns[0].content == (Image(b"1"), Image(b"2"), "One \n two ")
    assert as_upstream(sample, "fuyu") == sample


def test_rows_of_ones_own(llava_folder, tmp_path):
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i % 3,)) for i in range(5)]
    rows.append(chat("One?", "a circle", "Two?", "no"))
    data = write_rows(tmp_path / "held_out.jsonl", rows)
    (found,) = run(str(llava_folder), [f"data={data}"], to=tmp_path / "out", max_new_tokens=4)
    answers = lines(tmp_path / "out")
    assert [row["id"] for row in answers] == [
        *(f"held_out.jsonl:{at}" for at in range(1, 6)),
        *(f"held_out.jsonl:6#{at}" for at in (1, 2)),
    ]
    assert answers[-1]["prompt"] == "One?\na circle\nTwo?" and answers[-1]["answer"] == "no"
    assert {"loss", "rouge_l", "anls"} <= found.summary["more"].keys()
    model, encoder = (part := open_model(str(llava_folder), "own", None)).model, part.encoder
    assert found.summary["more"]["loss"] == pytest.approx(loss_of(model, encoder, data), rel=1e-5)


def loss_of(model, encoder, data: str) -> float:
    """Row by row, with transformers' own loss."""
    from mantis_lite.data.collate import collate
    from mantis_lite.data.source import open_source
    from mantis_lite.models.load import placed
    from mantis_lite.recipe import SourceRecipe

    rows = open_source(SourceRecipe(path=data))
    total = count = 0
    for at in range(len(rows)):
        batch = collate([encoder.encode(rows.sample(at))], encoder.vision.batch)
        known = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            total += model(**placed(batch, model)).loss.item() * known
        count += known
    return total / count


def test_rows_whose_answers_are_letters_are_choices(llava_folder, tmp_path):
    rows = [chat(f"Which? (A) {i} (B) {i + 1} (C) {i + 2}", f"({'ABC'[i % 3]})", images=(i % 3,)) for i in range(6)]
    data = write_rows(tmp_path / "letters.jsonl", rows)
    (found,) = run(str(llava_folder), [f"data={data}"], scoring="both", to=tmp_path / "out")
    assert [row["answer"] for row in lines(tmp_path / "out")] == list("ABCABC")
    assert all(len(row["logprobs"]) == 3 for row in lines(tmp_path / "out"))
    plain = write_rows(tmp_path / "plain.jsonl", [chat("A or B?", "A", images=(at,)) for at in range(2)])
    list(run(str(llava_folder), [f"data={plain}"], scoring="likelihood", to=tmp_path / "plain"))
    assert all(len(row["logprobs"]) == 2 for row in lines(tmp_path / "plain")), "of one letter, any answer is right"
    assert found.summary["more"].keys() == {"loss"} and "likelihood" in found.summary


def test_rows_that_are_left_out_are_told_of(llava_folder, tmp_path):
    rows = [chat(f"what is number {i}?", "red", images=(i % 3,)) for i in range(5)]
    rows += [chat("only asked"), chat("long " * 3000, "red")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = [f"data={data}", "data.on_bad_row=skip", "data.oversize=drop", "packing.max_length=2048"]
    (found,) = run(str(llava_folder), words, to=tmp_path / "out", max_new_tokens=3)
    assert found.summary["count"] == 5 and found.summary["oversize"] == 1
    (reject,) = found.summary["rejects"]
    assert reject.startswith("rows.jsonl:6: no assistant turn")


def test_rows_with_clips_are_asked_of_any_model(llava_folder, tmp_path):
    """Of a model that was not trained here, the rows say that they have clips; a page has their frames."""
    make(tmp_path / "a.mp4")
    rows = [{"video": "a.mp4", "messages": chat(f"{at} <video>?", "It moves.")["messages"]} for at in range(3)]
    (tmp_path / "clips.json").write_text(json.dumps(rows))
    data = [f"data={tmp_path / 'clips.json'}"]
    (found,) = run(str(llava_folder), data, to=tmp_path / "out", max_new_tokens=3)
    assert [row["prompt"] for row in lines(tmp_path / "out")] == [f"{at} <video>?" for at in range(3)]
    results, summary = read_results(tmp_path / "out")
    assert found.summary["task"] == "video" and len(pictures_of(summary)(results[0])) == 8


@pytest.mark.parametrize("problem", ["regression", "single_label", "multi_label"])
def test_rows_with_labels_are_scored(llava_folder, tmp_path, problem):
    data = test_classify.write(tmp_path / "rows.json", test_classify.LABELS[problem])
    trained = start(make_recipe(test_classify.settings_of(llava_folder, data, tmp_path / "run", problem)))
    trained.train()
    (found,) = run(str(tmp_path / "run"), [f"data={data}"])
    assert found.folder == tmp_path / "run/evaluate/labels"
    expected = predict(tmp_path / "run", [f"data={data}"], metrics=True)
    assert found.summary["more"] == expected.metrics
    rows = lines(found.folder)
    assert len(rows) == 12 and all((row["parsed"] == row["answer"]) == row["correct"] for row in rows)
    if problem != "regression":
        assert found.summary["accuracy"] == pytest.approx(expected.metrics["accuracy"])
    assert compare(found.folder, found.folder).accuracy.gain == 0
    with pytest.raises(RecipeError, match="has a score head, whose scores no benchmark, --scoring, --bits"):
        list(run(str(tmp_path / "run"), [f"data={data}", "nlvr2"]))
    with pytest.raises(RecipeError, match="labels has results already\n  Add --from-scratch"):
        list(run(str(tmp_path / "run"), [f"data={data}"]))
    assert next(run(str(tmp_path / "run"), [f"data={data}"], from_scratch=True)).summary == found.summary
    (page,) = compared(str(found.folder), str(found.folder), html=tmp_path / "page.html")
    assert page.accuracy.gain == 0 and (tmp_path / "page.html").is_file()
    results, summary = read_results(found.folder)
    assert len(pictures_of(summary)(results[0])) == len(results[0].images) > 0
    with pytest.raises(RecipeError, match="scores, and does not answer\n"):
        open_model(str(tmp_path / "run"), "own", None)


def test_weights_in_4_bits_are_another_model(llava_folder, tmp_path):
    opened = open_model(str(llava_folder), "own", 4)
    found = evaluate(opened, made(), to=tmp_path / "out")
    assert found.summary["in_4_bits"] == ["language_model"]
    with pytest.raises(RecipeError, match="asked for otherwise: in_4_bits\n"):
        evaluate(open_model(str(llava_folder), "own", 16), made(), to=tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (["nlvr2=gone"], {}, "nlvr2=gone: there is no such file or folder\n  Name the copy"),
        (["data=x.json", "data=y.json"], {}, "data: given 2 times\n  Write data="),
        ([], {}, "evaluate: nothing to evaluate by\n  Name a benchmark, of mantis-eval"),
        (["nlvr3"], {}, "did you mean nlvr2"),
        (["nlvr2", "blink"], {"to": Path("x")}, "--to: one folder for several evaluations"),
        (["data=x.json"], {"protocol": "upstream"}, "--protocol: upstream has none for rows of one's own"),
    ],
)
def test_what_cannot_be_asked_for(llava_folder, tmp_path, words, options, said):
    write_rows(tmp_path / "x.json", [])
    with pytest.raises(RecipeError, match=said):
        list(run(str(llava_folder), words, **options))


def test_one_page_is_of_one_comparison(llava_folder, tmp_path):
    with pytest.raises(RecipeError, match="--html: one page for several comparisons"):
        list(compared(str(llava_folder), str(llava_folder), ["data=x.json", "blink"], tmp_path / "page.html"))


def test_a_folder_that_cannot_be_made(opened, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"--to: .*file cannot be made: File exists\n  Name another folder"):
        evaluate(opened, made(), to=tmp_path / "file")
