"""Small copies of the six benchmarks, in the layouts they are published in: read as questions, and scored exactly."""

import json
from pathlib import Path

import benchmarks_made
import pyarrow.parquet as pq
import pytest

from mantis_lite.data.frames import Frames
from mantis_lite.data.sample import Frame, Image
from mantis_lite.errors import DataError, RecipeError, SampleError
from mantis_lite.evaluate import mementos, mvbench
from mantis_lite.evaluate.asking import Said, shown
from mantis_lite.evaluate.benchmarks import BENCHMARKS, find
from mantis_lite.evaluate.evaluation import result_of
from mantis_lite.evaluate.results import summarise
from mantis_lite.evaluate.run import run

MADE = {
    "mantis-eval": benchmarks_made.mantis_eval,
    "nlvr2": benchmarks_made.nlvr2,
    "qbench2": benchmarks_made.qbench2,
    "blink": benchmarks_made.blink,
    "mvbench": benchmarks_made.mvbench,
    "mementos": benchmarks_made.mementos,
}


def made(name: str, folder: Path, protocol: str = "own"):
    benchmark = find(name)
    return benchmark, benchmark.read(str(MADE[name](folder)), protocol)


def results(benchmark, questions, says, protocol: str = "own"):
    return [result_of(benchmark, q, Said(at, says(q), None), protocol) for at, q in enumerate(questions)]


@pytest.mark.parametrize("protocol", ["own", "upstream"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_scores_are_exact(tmp_path, name, protocol):
    """Right answers are worth all, wrong ones nothing, and every third one a third."""
    benchmark, questions = made(name, tmp_path, protocol)
    assert len({q.id for q in questions}) == len(questions) >= 6
    for found in results(benchmark, questions, lambda q: q.answer, protocol):
        assert found.correct == 1 and found.parsed is not None
    wrong = results(benchmark, questions, lambda q: next((x for x in q.letters if x != q.answer), "nothing"), protocol)
    assert not any(found.correct for found in wrong)
    thirds = results(benchmark, questions, lambda q: q.answer if questions.index(q) % 3 == 0 else "???", protocol)
    summary = summarise(thirds, "rows")
    assert summary["accuracy"] == -(-len(questions) // 3) / len(questions)
    assert benchmark.more(thirds) is not None and benchmark.differences


def test_mantis_evals_prompts(tmp_path):
    _, questions = made("mantis-eval", tmp_path)
    words, choice, *_ = questions
    assert shown(choice.sample) == (
        "<image> <image> Which is red?\n (A) Image 1\n (B) Image 2\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (choice.answer, choice.options, choice.kind) == ("B", ("Image 1", "Image 2"), "choice")
    assert shown(words.sample) == (
        "<image><image>Given the images, answer the following short answer vqa question:\nQ: Which is red?\n"
        'You can first give your analysis, and then give your final answer as "Final Answer:"'
    )
    assert (words.answer, words.kind, words.category) == ("Two", "short", "difference description")
    by_kind = results(find("mantis-eval"), questions, lambda q: q.answer if q.options else "Three")
    assert find("mantis-eval").more(by_kind) == {"multi-choice": 1, "short-answer": 0}


def test_nlvr2s_statements_are_counted_whole(tmp_path):
    benchmark, questions = made("nlvr2", tmp_path)
    assert [q.options for q in questions[:2]] == [("False", "True"), ("True", "False")]
    assert questions[0].sample.images[1].source == tmp_path / "pictures/0-1.png"
    assert {q.group for q in questions} == {f"test1-{a}-{b}" for a in (0, 1) for b in (0, 1)}
    found = results(
        benchmark, questions, lambda q: q.answer if q.group != "test1-0-0" or q.id.endswith("0-0-0") else "X"
    )
    assert benchmark.more(found) == {"consistency": 0.75}


def test_qbench2s_unused_options_are_none(tmp_path):
    _, questions = made("qbench2", tmp_path)
    assert [len(q.options) for q in questions] == [3, 4] * 3 and [q.category for q in questions][:3] == [
        "type 0",
        "type 1",
        "type 2",
    ]
    assert shown(questions[0].sample).startswith(
        "<image><image>Which picture is sharper?\n (A) The first\n (B) The second\n"
    )


def test_qbench2s_lines_are_the_same_questions(tmp_path):
    _, columns = made("qbench2", tmp_path / "columns")
    lines = find("qbench2").read(str(benchmarks_made.qbench2_lines(tmp_path / "lines")), "own")
    assert [(shown(q.sample), q.answer, q.options, q.category) for q in lines] == [
        (shown(q.sample), q.answer, q.options, q.category) for q in columns
    ]
    assert [image.source.name for image in lines[1].sample.images] == ["00001.jpg", "00002.jpg"]
    hidden = tmp_path / "lines/q-bench2-a1-test.jsonl"
    hidden.write_text(
        "".join(
            json.dumps({key: value for key, value in json.loads(line).items() if "correct" not in key}) + "\n"
            for line in (tmp_path / "lines/q-bench2-a1-dev.jsonl").read_text().splitlines()
        )
    )
    with pytest.raises(SampleError, match=r"the answer is 'hidden', of 3 options\n.* hidden cannot be scored"):
        find("qbench2").read(str(hidden), "own")


def test_blinks_prompts_are_its_own_and_tasks_count_alike(tmp_path):
    benchmark, questions = made("blink", tmp_path)
    assert [len(q.sample.images) for q in questions] == [3] * 4 + [1] * 2
    assert shown(questions[0].sample).startswith("<image><image><image>Disclaimer: ")
    assert shown(questions[-1].sample).startswith("<image>How many are there?")
    found = summarise(
        results(benchmark, questions, lambda q: q.answer if q.category == "Counting" else "C"), benchmark.overall
    )
    assert found["accuracy"] == 0.5 and found["categories"]["Counting"]["accuracy"] == 1


def test_mvbenchs_frames_are_those_of_its_rule(tmp_path, caplog):
    _, questions = made("mvbench", tmp_path)
    assert "left out, as their clips are not here: fine_grained_pose" in caplog.text
    by_task = {q.category: q for q in questions}
    assert list(by_task) == ["action_antonym", "action_localization", "episodic_reasoning", "object_existence"]
    for task, wanted in {
        "action_antonym": mvbench.frame_numbers(None, None, 25, 0, 49, 8),
        "action_localization": mvbench.frame_numbers(0.2, 0.8, 25, 0, 49, 8),
    }.items():
        frames = by_task[task].sample.images
        assert all(isinstance(frame, Frame) for frame in frames) and [frame.at for frame in frames] == wanted
        opened = Frames().open(by_task[task].sample)
        assert len(opened) == 8 and opened[0].size == frames[0].size
    pictures = by_task["episodic_reasoning"].sample.images
    assert [image.source.name for image in pictures] == [
        f"{at:05d}.jpg" for at in mvbench.frame_numbers(1, 4, 3, 1, 15, 8)
    ]
    assert shown(by_task["action_antonym"].sample) == (
        "<image>" * 8 + "Question: What happens in 2?\nA. up\nB. down\nC. not\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert by_task["action_antonym"].answer == "C"


def test_frame_numbers_by_hand():
    """From max(first, start fps) to min(end fps, last), a share of which each: its middle, by rounded steps."""
    assert mvbench.frame_numbers(None, None, 30, 0, 79, 4) == [9, 29, 49, 68]
    assert mvbench.frame_numbers(1.0, 2.0, 10, 0, 99, 2) == [12, 17]
    assert mvbench.frame_numbers(0.0, 99.0, 3, 1, 9, 8) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_mementos_sequences_and_words(tmp_path):
    benchmark, questions = made("mementos", tmp_path)
    assert [q.category for q in questions] == ["dl"] * 3 + ["robo"] * 3
    assert [len(q.sample.images) for q in questions[:2]] == [3, 15]
    assert [image.source.stem for image in questions[1].sample.images] == [str(at) for at in range(1, 16)]
    assert "caf\ufffd" in questions[2].answer
    _, upstream = made("mementos", tmp_path / "again", "upstream")
    first = upstream[1].sample.turns[0].content
    assert first[0] == mementos.ASKED and len(first) == 14 and all(isinstance(part, Image) for part in first[1:])
    (found,) = results(benchmark, questions[:1], lambda q: "Dogs were running, a cat slept")
    assert found.scores == {"precision": 0.5, "recall": 0.5, "f1": 0.5} and found.correct == 0.5


def rewrite(file: Path, **columns) -> str:
    """The rows of a Parquet file with other columns."""
    rows = [row | columns for row in pq.read_table(file).to_pylist()]
    return str(benchmarks_made.parquet(file, rows))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"question_type": "essay"}, "\"question_type\" is 'essay'\n  The types are multi-choice and short-answer."),
        ({"question": ""}, '"question" is empty\n  Give a text.'),
        ({"answer": None}, '"answer" is null\n  Give a text.'),
        ({"question_type": "multi-choice", "options": ["a", "b"], "answer": "C"}, "the answer is 'C', of 2 options\n"),
        ({"question": "<image>" * 5}, "5 <image> marks and 2 pictures\n  Give each mark a picture."),
    ],
)
def test_a_row_that_is_none(tmp_path, columns, said):
    source = rewrite(benchmarks_made.mantis_eval(tmp_path), **columns)
    with pytest.raises(SampleError) as raised:
        find("mantis-eval").read(source, "own")
    assert said in str(raised.value) and "test-00000-of-00001.parquet:1" in str(raised.value)


def test_a_copy_that_is_none(tmp_path):
    with pytest.raises(RecipeError, match="mantis_eval: no such benchmark; did you mean mantis-eval"):
        find("mantis_eval")
    with pytest.raises(SampleError, match="the answer is hidden\n  It is of the test split"):
        find("blink").read(str(benchmarks_made.blink(tmp_path / "blink", "hidden")), "own")
    (tmp_path / "empty").mkdir()
    for name, said in {
        "blink": "no task's folder is in it",
        "mvbench": "has no json/ with a task's rows",
        "mementos": "has no descriptions in it",
    }.items():
        with pytest.raises(DataError, match=said):
            find(name).read(str(tmp_path / "empty"), "own")
    folder = benchmarks_made.blink(tmp_path / "other")
    rewrite(folder / "Counting/val-00000-of-00001.parquet", prompt="")
    with pytest.raises(SampleError, match="\"prompt\" is ''\n  Give the benchmark's own column"):
        find("blink").read(str(folder), "own")


def test_a_clip_that_is_not_there_or_not_right(tmp_path):
    folder = benchmarks_made.mvbench(tmp_path)
    file = folder / "json/action_antonym.json"
    rows = json.loads(file.read_text())
    for change, said in (
        ({"video": "gone.mp4"}, "action_antonym.json:1 .*: no clip 'gone.mp4' in .*ssv2_video"),
        ({"answer": "left"}, "the answer 'left' is none of the candidates"),
        ({"video": "../ssv2_video/clip 0.mp4"}, "no clip"),
    ):
        file.write_text(json.dumps([rows[0] | change]))
        with pytest.raises(SampleError, match=said):
            find("mvbench").read(str(folder), "own")
    file.write_text(json.dumps([{"video": "clip 0.mp4"}]))
    with pytest.raises(SampleError, match="no 'candidates'\n  Give the benchmark's own columns"):
        find("mvbench").read(str(folder), "own")
    (folder / "video/ssv2_video/clip 0.mp4").write_bytes(b"none")
    file.write_text(json.dumps(rows))
    with pytest.raises(SampleError, match=r"clip 0.mp4 cannot be read: .*\n  Fetch it again"):
        find("mvbench").read(str(folder), "own")
    file.write_text("{}")
    with pytest.raises(DataError, match=r"action_antonym.json: not a JSON list of rows"):
        find("mvbench").read(str(folder), "own")


def test_a_sequence_that_is_not_there(tmp_path):
    folder = benchmarks_made.mementos(tmp_path)
    file = folder / "robo_description.csv"
    file.write_text("image,description\n9.png,A robot.\n")
    with pytest.raises(SampleError, match=r"robo_description.csv:2: no numbered pictures in .*single_image_robo/9\n"):
        find("mementos").read(str(folder), "own")
    file.write_text("image,description\n,A robot.\n")
    with pytest.raises(SampleError, match="no picture or no description\n"):
        find("mementos").read(str(folder), "own")


def test_the_command_asks_copies_of_all(tmp_path, llava_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"{name}={MADE[name](tmp_path / name)}" for name in MADE]
    found = list(run(str(llava_folder), words, max_new_tokens=2))
    assert [each.summary["benchmark"] for each in found] == list(MADE)
    for each in found:
        lines = (each.folder / "results.jsonl").read_text().splitlines()
        assert len(lines) == each.summary["count"] >= 6 and each.folder.parent.parent.name == "evaluations"
