"""What the README and the examples say holds: commands parse, models fit the cards, tables are what was measured."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mantis_lite.cli import app
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.schema import parse
from mantis_lite.errors import (
    CheckError,
    DataError,
    DiskError,
    DivergedError,
    MantisError,
    OutOfMemory,
    RecipeError,
    ResumeError,
    Stopped,
)
from mantis_lite.evaluate.benchmarks import find as find_benchmark
from mantis_lite.memory.card import card_of
from mantis_lite.memory.choose import choose
from mantis_lite.memory.estimate import GIB
from mantis_lite.memory.overrides import taken
from mantis_lite.recipe_file import load_recipe, recipes_dir
from mantis_lite.report.fit import CARDS, read, work_of
from mantis_lite.scoring import refuse_others

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_table, likelihood, pictures, reliability_table, results, zips

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
DOCS = README + "".join(PAGES.values())
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
CODE = [line for language, block in BLOCK.findall(DOCS) if not language for line in block.splitlines()]
COMMANDS = sorted({" ".join(line.partition(" #")[0].split()) for line in CODE if line.startswith("mantis-lite")})

SCREEN = "\n".join(README.splitlines()[:45])
"""Of 120 columns: what is seen without scrolling."""

CARD = re.compile(r"^\| (\d+) GB \| (.+?) \| (.+?) \| ([\d.]+) GiB \| (?:([\d.]+) GiB )?\|$", re.M)
"""A row of the README's table of cards: the card, recipes, what trains, a step as estimated and as measured."""

MEASURED = {
    "chat": ("G5", "qlora, packs of 8192"),
    "chat-idefics2-qlora": ("G6", "qlora, packs of 8192"),
    "chat-siglip-llama3-lora": ("G5", "lora bf16, packs of 8192"),
}
"""Where benchmarks/results/gpu.json has a recipe of the table of cards."""


def recipes_of(cell: str) -> list[list[str]]:
    """The recipes of a cell, each with its overrides."""
    return [shlex.split(code) for code in re.findall("`([^`]+)`", cell)]


def test_the_first_screen_says_what_it_is_what_it_fits_on_how_it_is_run_and_what_a_row_is(tmp_path):
    assert re.match(r"# mantis_lite\n\nFine-tune Mantis multi-image vision-language models on ", SCREEN)
    cards = CARD.findall(SCREEN)
    assert {card for card, *_ in cards} == {"8", "12", "16", "24"} and cards == CARD.findall(README)
    for command in ("make quickstart", "mantis-lite check chat data=my.json", "mantis-lite train chat data=my.json"):
        assert re.search(rf"^{command}  ", SCREEN, re.M), command
    ((row,),) = (json.loads(block) for language, block in BLOCK.findall(SCREEN) if language == "json")
    assert len(parse(row, "README", MediaFolder(tmp_path, urls=False), "chat").images) == 2
    assert len(README.splitlines()) < 220


@pytest.mark.parametrize(
    ("gib", "words", "trains", "estimated"),
    [
        (int(gib), words, trains, said)
        for gib, cell, trains, said, _ in CARD.findall(README)
        for words in recipes_of(cell)
    ],
)
def test_a_recipe_fits_the_card_that_the_readme_gives_it_and_no_smaller_one(gib, words, trains, estimated):
    name, *overrides = words
    recipe, card = read(name, overrides), card_of(gib)
    work = work_of(recipe)
    if recipe.memory.fit == "auto":
        choice = choose(work, recipe, card)
        total = choice.total
        assert f"packs of {choice.recipe.packing.max_length:,} tokens" in trains
        assert choice.recipe.method == recipe.method
    else:
        total = taken(work, recipe)[0].estimate.total
        assert not any(total <= card_of(smaller).usable for smaller in CARDS if smaller < gib)
        assert recipe.packing.max_length == 8192
    assert total <= card.usable and f"{total / GIB:.1f}" == estimated
    assert {"qlora": "QLoRA", "lora": "LoRA"}[recipe.method] in re.findall(r"\w+", trains)
    assert recipe.model.called.split("/")[-1].removesuffix("-Instruct") in trains


def test_what_the_table_of_cards_says_was_measured():
    figures = json.loads((results.FOLDER / "gpu.json").read_text())["figures"]
    said = {recipes_of(cell)[0][0]: peak for _, cell, _, _, peak in CARD.findall(README) if peak}
    measured = {name: f"{figures[group][case]['peak_gib']:.1f}" for name, (group, case) in MEASURED.items()}
    assert said == measured


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_is_one(command, tmp_path, monkeypatch):
    check_command(shlex.split(command), tmp_path, monkeypatch)


def check_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as it would be, and load its recipe; what needs neither a run, a model nor data is run."""
    _, command, *rest = words
    monkeypatch.chdir(tmp_path)
    for name in {"recipe.yaml", "my.yaml"} & set(rest):  # a recipe that a reader has written
        Path(name).write_text("{model: tiny, data: my.json}")
    if not rest and command not in ("doctor", "schema"):  # named, and not given
        assert command in get_command(app).commands
    elif command in ("train", "check"):
        context = get_command(app).commands[command].make_context(command, rest)
        load_recipe(context.params["recipe"], context.params["overrides"])
    elif command == "fit":
        load_recipe(rest[0], ["data=x", *(word for word in rest[1:] if "=" in word)])
    elif command == "predict":  # of a run that a reader has made
        refuse_others(rest[0], [word for word in rest[1:] if not word.startswith("--")])
    elif command in (
        "chat",
        "merge",
        "push",
        "serve",
        "export",
        "compare",
        "init",
        "watch",
    ):  # of a run or a model that is not here
        get_command(app).commands[command].make_context(command, rest)
    elif command == "evaluate":
        context = get_command(app).commands[command].make_context(command, rest)
        assert all(
            word.startswith("data=") or find_benchmark(word.partition("=")[0]) for word in context.params["what"]
        )
    elif command == "data":  # words in any order, a recipe and its keys first among those that are no options
        context = get_command(app).commands["data"].commands[rest[0]].make_context(rest[0], rest[1:])
        if rest[0] == "prepare":  # else from a hub that is not here
            load_recipe(context.params["recipe"], context.params["overrides"])
    else:
        assert CliRunner().invoke(app, [command, *rest]).exit_code == 0


def test_make_targets_of_the_docs_exist():
    rules = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.M)
    named = set(re.findall(r"`make ([a-z-]+)", DOCS)) | {line.split()[1] for line in CODE if line.startswith("make ")}
    assert {"quickstart", "test"} <= named <= {target for rule in rules for target in rule.split()}


def test_the_main_keys_exist():
    table = re.findall(r"^\| (`[^|]*`) \|", PAGES["training"], re.M)
    keys = [key for cell in table for key in re.findall(r"`([a-z_]+\.[a-z_]+)`", cell)]
    assert len(keys) > 10
    for key in keys:
        section, name = key.split(".")
        recipe = load_recipe("chat", ["data=x"])
        known = section == "train" or name in type(getattr(recipe, section)).model_fields
        assert known, key


@pytest.mark.parametrize("path", sorted(recipes_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is(path):
    assert path.read_text().startswith("# ")
    load_recipe(path, ["data=x"])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_example_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)


def test_the_table_of_peaks_and_speeds_is_what_was_measured():
    figures = json.loads((results.FOLDER / "gpu.json").read_text())["figures"]
    assert "\n".join(gpu_table.lines(figures)) in PAGES["measured"]


def test_the_table_of_faults_is_what_was_measured():
    figures = json.loads((results.FOLDER / "reliability.json").read_text())["figures"]
    assert "\n".join(reliability_table.lines(figures)) in PAGES["reliability"]
    ours = figures["killed"]["mantis_lite"]
    assert ours["kills"] == 500 and ours["cannot_resume"] == ours["runs_that_ended_otherwise"] == 0


def test_the_table_of_pictures_is_what_was_measured():
    figures = json.loads((results.FOLDER / "pictures.json").read_text())["figures"]
    assert "\n".join(pictures.lines(figures)) in DOCS


def test_the_table_of_zips_is_what_was_measured():
    figures = json.loads((results.FOLDER / "zips.json").read_text())["figures"]
    assert "\n".join(zips.lines(figures)) in DOCS


def test_the_table_of_likelihoods_is_what_was_measured():
    figures = json.loads((results.FOLDER / "likelihood.json").read_text())["figures"]
    assert "\n".join(likelihood.lines(figures)) in DOCS


def test_exit_codes_of_the_docs_are_those_of_the_errors():
    kinds = [MantisError, RecipeError, DataError, OutOfMemory, DivergedError, DiskError, ResumeError, CheckError]
    said = dict(re.findall(r"^\| (\d) \| ([^|]*) \|", PAGES["troubleshooting"], re.M))
    words = ["unexpected", "usage or recipe", "data", "out of memory", "diverged", "disk", "resume or lock refused"]
    words.append("a check failed")
    assert [said[str(kind.exit_code)] for kind in kinds] == words and said["0"] == "done"
    assert "| 128 + n | stopped by signal n, with a checkpoint |" in PAGES["troubleshooting"]
    assert Stopped(15, None).exit_code == 143
