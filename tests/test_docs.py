"""What the README and the examples say holds: commands parse, keys exist, recipes load."""

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
from mantis_lite.recipe import load_recipe, recipes_dir
from mantis_lite.scoring import refuse_others

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_table, likelihood, reliability_table, results, zips

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", DOCS, re.S | re.M)
CODE = [line for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in CODE if line.startswith("mantis-lite")]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_is_one(words, tmp_path, monkeypatch):
    _, command, *rest = words
    if command in ("train", "check"):
        context = get_command(app).commands[command].make_context(command, rest)
        load_recipe(context.params["recipe"], context.params["overrides"])
    elif command == "fit":
        load_recipe(rest[0], ["data=x", *(word for word in rest[1:] if "=" in word)])
    elif command == "predict":  # of a run that a reader has made
        refuse_others(rest[0], [word for word in rest[1:] if not word.startswith("--")])
    elif command in ("chat", "merge", "push", "serve", "export", "compare"):  # of a run or a model that is not here
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
        monkeypatch.chdir(tmp_path)
        assert CliRunner().invoke(app, [command, *rest]).exit_code == 0


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for pair in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, re.M) for word in pair if word}
    assert {"quickstart", "test"} <= named <= targets


def test_keys_of_the_readme_exist():
    table = re.findall(r"^\| (`[^|]*`) \|", README, re.M)
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


def test_the_table_of_the_readme_is_what_was_measured():
    figures = json.loads((results.FOLDER / "gpu.json").read_text())["figures"]
    assert "\n".join(gpu_table.lines(figures)) in README


def test_the_table_of_faults_is_what_was_measured():
    figures = json.loads((results.FOLDER / "reliability.json").read_text())["figures"]
    assert "\n".join(reliability_table.lines(figures)) in README
    ours = figures["killed"]["mantis_lite"]
    assert ours["kills"] == 500 and ours["cannot_resume"] == ours["runs_that_ended_otherwise"] == 0


def test_the_table_of_zips_is_what_was_measured():
    figures = json.loads((results.FOLDER / "zips.json").read_text())["figures"]
    assert "\n".join(zips.lines(figures)) in DOCS


def test_the_table_of_likelihoods_is_what_was_measured():
    figures = json.loads((results.FOLDER / "likelihood.json").read_text())["figures"]
    assert "\n".join(likelihood.lines(figures)) in DOCS


def test_exit_codes_of_the_readme_are_those_of_the_errors():
    kinds = [MantisError, RecipeError, DataError, OutOfMemory, DivergedError, DiskError, ResumeError, CheckError]
    said = dict(re.findall(r"^\| (\d) \| (.*) \|$", README, re.M))
    words = ["unexpected", "usage or recipe", "data", "out of memory", "diverged", "disk", "resume or lock refused"]
    words.append("a check failed")
    assert [said[str(kind.exit_code)] for kind in kinds] == words and said["0"] == "done"
    assert "| 128 + n | stopped by signal n, with a checkpoint |" in README and Stopped(15, None).exit_code == 143
