"""The notebooks of the examples: their files are clean, what they name exists, and each runs whole on Tiny Mantis."""

import ast
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
import test_docs
from helpers import logs_of

import mantis_lite
from mantis_lite.memory.card import card_of
from mantis_lite.memory.overrides import taken
from mantis_lite.recipe_file import load_recipe
from mantis_lite.report.fit import work_of

NOTEBOOKS = {path.stem: path for path in sorted((test_docs.ROOT / "examples").glob("*.ipynb"))}
LINES = {
    line
    for path in NOTEBOOKS.values()
    for cell in json.loads(path.read_text())["cells"]
    for line in "".join(cell["source"]).splitlines()
    if cell["cell_type"] == "markdown" and line.startswith("mantis-lite")
}
COMMANDS = sorted(shlex.split(line, comments=True) for line in LINES)
T4 = 15
"""GiB of a T4, which is sold as one of 16."""


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code(name: str) -> dict[str, str]:
    """Cells of code by their ids, without the lines that are IPython's own."""
    cells = {cell.id: cell.source for cell in read(name).cells if cell.cell_type == "code"}
    return {id: re.sub(r"^%.*$", "", source, flags=re.M) for id, source in cells.items()}


def settled(name: str, tiny: bool) -> dict:
    """What a notebook's cell `recipe` makes of data that is not there yet."""
    found = {"tiny": tiny, "mantis_lite": mantis_lite, "Path": Path, "data": "my.json", "held_out": "more.json"}
    exec(code(name)["recipe"], found)
    return found


def seen(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """What a reader sees below each cell of code, as far as it is text."""
    return {
        cell.id: "".join(output.get("text") or output["data"].get("text/plain", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_clean_and_has_one_parameter(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5) and notebook.metadata.kernelspec.name == "python3"
    assert 10 <= len(notebook.cells) <= 20
    assert all(re.fullmatch("[a-z-]+", cell.id) for cell in notebook.cells)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count is not None for cell in ran)
    parameters, *others = sorted(ran, key=lambda cell: "parameters" not in cell.metadata.get("tags", ()))
    assert parameters is ran[0] and not any(cell.metadata for cell in others)
    (line,) = ast.parse(parameters.source).body
    assert ast.unparse(line) == "tiny = False"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_a_notebook_is_one(words, tmp_path, monkeypatch):
    test_docs.check_command(words, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_a_notebook_imports_is_there(name):
    trees = map(ast.parse, code(name).values())
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            assert all(import_module(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert all(hasattr(import_module(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_trains_mantis_and_tiny_mantis_where_it_is_asked_to(name):
    recipe, tiny = settled(name, tiny=False)["recipe"], settled(name, tiny=True)["recipe"]
    assert (
        re.fullmatch(r"TIGER-Lab/Mantis-8B-(siglip-llama3|Idefics2)", recipe.model.name) and tiny.model.name == "tiny"
    )
    assert (
        recipe.method == "qlora" and recipe.memory.fit == "auto" and recipe.run_dir == Path("runs") / tiny.run_dir.name
    )
    assert recipe.task == tiny.task and recipe.data == tiny.data


@pytest.mark.parametrize("name", ["chat", "video", "classify"])
def test_a_notebook_fits_a_t4_as_it_is(name):
    """So that `memory.fit=auto` has nothing to take away from it there, and but gives what room is left to speed."""
    found = settled(name, tiny=False)
    recipe = load_recipe(found["name"], [*found["settings"], "memory.fit=off"])
    assert taken(work_of(recipe), recipe)[0].estimate.total < 0.9 * card_of(T4).usable


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_whole_on_tiny_mantis(name, tmp_path, monkeypatch):
    """What is asserted is what a reader sees: `papermill` fails where a cell does."""
    import papermill

    for variable in ("HF_HOME", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = papermill.execute_notebook(
        NOTEBOOKS[name], tmp_path / "ran.ipynb", {"tiny": True}, kernel_name="python3", cwd=tmp_path, progress_bar=False
    )
    found = seen(ran)
    assert not any("Traceback" in text or "Error" in text for text in found.values())
    LOOKED_AT[name](found, tmp_path / "runs" / name)


def learned(run: Path) -> None:
    losses = [log["eval_loss"] for log in logs_of(run) if "eval_loss" in log]
    assert losses[-1] < losses[0] / 2 and (run / "adapter").is_dir()


def answered(found: dict[str, str], run: Path) -> None:
    learned(run)
    said = re.findall(r"It says (.+); right is (.+)\.", found["ask"])
    assert len(said) == 4 and any(answer == right for answer, right in said)


def predicted(found: dict[str, str], run: Path) -> None:
    learned(run)
    assert float(re.search(r"accuracy\W+([\d.]+)", found["predict"])[1]) > 0.75  # by chance: half


def merged(found: dict[str, str], run: Path) -> None:
    agreed = re.search(r"chooses as the adapter at ([\d.]+)% of", found["merge"])
    assert float(agreed[1]) > 99.5
    said = [re.search(rf"{name}: (.+)", found[cell])[1] for name, cell in (("adapter", "ask"), ("model", "ask-again"))]
    assert said[0] == said[1]


def compared(found: dict[str, str], run: Path) -> None:
    assert "B is better" in found["compare"] and "32" in found["before"] and "32" in found["after"]


LOOKED_AT = {
    "chat": answered,
    "video": answered,
    "classify": predicted,
    "merge_and_chat": merged,
    "evaluate": compared,
}
