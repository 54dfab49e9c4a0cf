"""A first recipe: what is guessed of data, what is asked, and that what is written is a recipe that ships, for it."""

import json
import re

import pytest
from helpers import chat, write_rows

from mantis_lite.errors import RecipeError, SampleError
from mantis_lite.init import LOOKED_AT, START, answers, draft, guess_task, look, write
from mantis_lite.recipe_file import load_recipe

TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dog."}]
CLIP = [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}, TURNS[1]]


def rows_of(tmp_path, *rows) -> str:
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def scored(tmp_path, *labels) -> str:
    return rows_of(tmp_path, *({"prompt": "How good?", "labels": label} for label in labels))


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"messages": TURNS}, "chat"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "image": "no.png"},
            "chat",
        ),
        ({"messages": TURNS, "video": "not-there-yet.mp4"}, "video"),
        ({"messages": CLIP}, "video"),
        ({"prompt": "How good?", "labels": 1.5}, "classify"),
        ({"images": ["a.png"], "label": "cat"}, "classify"),
    ],
)
def test_the_task_is_guessed_by_the_keys_of_rows(tmp_path, row, task):
    assert guess_task(rows_of(tmp_path, row, row)) == task


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"messages": TURNS}, {"prompt": "a", "label": 1}, {"messages": TURNS}], "of 3 rows, 2 are as of chat, 1 are"),
        ([{"text": "a"}, 7], "of 2 rows, none has the keys of a task\n  Name it: --task."),
    ],
)
def test_a_task_that_cannot_be_guessed_is_asked_for(tmp_path, rows, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        guess_task(rows_of(tmp_path, *rows))


def test_what_is_given_is_not_asked_and_what_is_not_is_asked_with_a_guess(tmp_path, monkeypatch):
    data = rows_of(tmp_path, {"messages": TURNS})
    asked = []

    def ask(question, guess):
        asked.append((question.partition(":")[0], guess))
        return {"Data": data, "Task": guess, "Card": "12 GiB"}[asked[-1][0]]

    assert answers(None, None, None, ask) == (data, "chat", 12.0)
    assert asked[:2] == [("Data", None), ("Task", "chat")] and len(asked) == 3
    assert answers(data, "video", 24, ask) == (data, "video", 24) and len(asked) == 3
    assert answers(data, None, 8.5, None) == (data, "chat", 8.5)


@pytest.mark.parametrize(
    ("given", "typed", "said"),
    [
        ((None, None, None), None, "no data was given\n  Name it: mantis-lite init my.jsonl --yes"),
        (("my.jsonl", "clasify", 24), None, "task: expected one of .*, found clasify; did you mean classify?"),
        (("my.jsonl", "chat", None), None, "card: there is no GPU here .*\n  Say .*: --gpu 24"),
        (("my.jsonl", "chat", None), "large", "card: expected its memory in GiB, found large\n  Write a number"),
        (("my.jsonl", "chat", None), "0", "card: expected its memory in GiB, found 0\n"),
    ],
)
def test_what_can_neither_be_guessed_nor_understood_is_an_error(monkeypatch, given, typed, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RecipeError, match=said.replace("?", r"\?")):
        answers(*given, None if typed is None else lambda question, guess: typed)


def test_a_recipe_is_the_one_that_ships_with_the_data_in_it(tmp_path):
    """Read back, it is the recipe it was made from with two overrides; it says what was found, and what is wrong."""
    data = write_rows(tmp_path / "my: data #1.jsonl", [chat("a", "b", images=(1,)), chat("a", "b", images=(2, 3, 4))])
    with open(data, "a") as file:
        file.write(json.dumps({"messages": TURNS, "images": ["gone.png"]}) + "\n")
    made = draft(data, "chat", 24)
    write(made.text, tmp_path / "recipe.yaml")
    run = f"run_dir={tmp_path}"
    found = load_recipe(tmp_path / "recipe.yaml", [run])
    ships = load_recipe("chat-siglip-llama3-lora", ["memory.fit=auto", run], unstated=data)
    assert found == ships and found.data.sources[0].path == data
    assert "# Data: 3 rows; 2 of 3 that were looked at are sound. Pictures and clips in a row: 1 to 3.\n" in made.text
    assert "License of the weights: Meta Llama 3" in made.text and "upstream:" not in made.text
    memory, bad, few = made.notices
    assert f"# Note: {memory}.\n" in made.text
    assert re.fullmatch(r"its largest step takes 2\d\.\d GiB, by estimate, of 24", memory)
    assert "1 of the rows looked at cannot be trained on; the first:" in bad and "gone.png" in bad
    assert few.startswith("an epoch of 3 rows is 1 step of 32: lower")


def test_a_smaller_card_has_the_language_model_in_4_bits(tmp_path):
    data = rows_of(tmp_path, {"messages": TURNS})
    made = draft(data, "chat", 16)
    assert re.search("^method: qlora +# adapters on 4-bit weights", made.text, flags=re.M)
    assert made.notices[-1] == "no row that was looked at has a picture"


@pytest.mark.slow
def test_of_a_card_for_which_a_step_is_too_large_it_says_what_memory_fit_picks(tmp_path):
    data = rows_of(tmp_path, {"messages": TURNS})
    made = draft(data, "chat", 8)
    assert re.match(r"as it is, a step takes 1\d\.\d GiB; memory.fit makes it 7\.\d: memory.\S+", made.notices[0])


@pytest.mark.parametrize(
    ("labels", "problem", "unsure"),
    [
        ((1.5, 2), "regression", None),
        ((1, 3), "regression", "single_label if they are classes"),
        (("cat", "dog"), "single_label", None),
        ((True, False), "single_label", None),
        ((["cat"], []), "multi_label", None),
        (({"cat": 1, "dog": 0}, {"cat": 0, "dog": 1}), "single_label", "if they are scores"),
        (({"cat": 1, "dog": 1}, {"cat": 0, "dog": 1}), "multi_label", "if they are scores"),
        (({"quality": 3, "motion": 1}, {"quality": 2, "motion": 0}), "regression", None),
    ],
)
def test_what_labels_are_is_guessed_and_a_doubt_is_said(tmp_path, labels, problem, unsure):
    from mantis_lite.init import problem_of

    found, said = problem_of(look(scored(tmp_path, *labels), "classify").read)
    assert found == problem and (said is None if unsure is None else unsure in said)


@pytest.mark.parametrize("labels", [(1.5, "cat"), ("cat", ["cat"]), (1, None)])
def test_labels_of_several_kinds_are_an_error(tmp_path, labels):
    with pytest.raises(RecipeError, match=r"head.problem: cannot be guessed: there are rows without labels"):
        draft(scored(tmp_path, *labels), "classify", 24)


@pytest.mark.parametrize("task", START)
def test_every_recipe_to_start_from_takes_the_data_and_the_problem(tmp_path, task):
    """Its lines alone: what a step of it takes is estimated elsewhere."""
    from mantis_lite.init import _keys

    for name in START[task]:
        text = "\n".join(_keys(name, "[odd", "multi_label" if task == "classify" else None))
        write(text, tmp_path / f"{name}.yaml")
        overrides = ["memory.fit=auto", *(["head.problem=multi_label"] if task == "classify" else [])]
        assert load_recipe(tmp_path / f"{name}.yaml") == load_recipe(name, overrides, unstated="[odd")
        assert not re.search("^ *#", text, flags=re.M)


def test_rows_are_looked_at_from_the_first_to_the_last(tmp_path):
    data = rows_of(tmp_path, *({"messages": TURNS, "id": str(at)} for at in range(3 * LOOKED_AT)))
    looked = look(data, "chat")
    assert looked.rows == 3 * LOOKED_AT and len(looked.read) == LOOKED_AT
    assert (looked.read[0].id, looked.read[-1].id) == ("0", str(3 * LOOKED_AT - 1))
    assert looked.pictures == (0, 0)


def test_data_without_a_sound_row_says_what_is_wrong_with_the_first(tmp_path):
    data = rows_of(tmp_path, {"messages": TURNS, "images": ["gone.png"]}, {"messages": []})
    with pytest.raises(SampleError, match=r"my.jsonl:1: .*gone.png"):
        draft(data, "chat", 24)


def test_a_file_is_never_overwritten(tmp_path):
    file = tmp_path / "recipe.yaml"
    write("model: a\n", file)
    for name, said in [
        ("recipe.yaml", "there is such a file already\n  Name another"),
        ("recipe.txt", r"a recipe's file ends in .yaml\n  Name it so, as \S*recipe.yaml"),
        ("no/recipe.yaml", "cannot be written: No such file"),
    ]:
        with pytest.raises(RecipeError, match=said):
            write("model: b\n", tmp_path / name)
    assert file.read_text() == "model: a\n"
