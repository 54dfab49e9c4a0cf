"""What the pages for readers say holds: their rows parse, their recipes load, their messages are the package's own."""

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import test_docs
from ruamel.yaml import YAML
from test_docs import gpu_table, results

from mantis_lite.data.labels import read_labels
from mantis_lite.data.mixture import sources_of
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.schema import parse
from mantis_lite.evaluate.benchmarks import BENCHMARKS
from mantis_lite.models.checkpoint import FAMILIES
from mantis_lite.recipe import SourceRecipe, load_recipe, make_recipe, recipes_dir

ROOT = Path(__file__).parents[1]
NAMES = ("coming-from-mantis", "coming-from-others", "data", "families", "memory", "troubleshooting")
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in NAMES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
INLINE = sorted({code for page in PAGES.values() for code in re.findall(r"`(mantis-lite [^`]+)`", page)})


def blocks(language: str) -> list[tuple[str, str, str]]:
    """Each block of a language: its page, the last heading above it, and its text."""
    found = []
    for name, page in PAGES.items():
        for block in BLOCK.finditer(page):
            if block[1] == language:
                headings = re.findall(r"^##+ (.*)$", page[: block.start()], re.M)
                found.append((name, headings[-1] if headings else "", block[2]))
    return found


@pytest.mark.parametrize(("page", "heading", "text"), blocks("json"))
def test_a_row_of_the_pages_is_read(page, heading, text, tmp_path):
    """A heading says the task and what is scored, as `task=video`, or `head.problem=regression`."""
    problem = re.search(r"head\.problem=(\w+)", heading)
    task = "classify" if problem else (re.search(r"task=(\w+)", heading) or ["", "chat"])[1]
    rows = json.loads(text)
    for row in rows if isinstance(rows, list) else [rows]:
        sample = parse(row, page, MediaFolder(tmp_path, urls=False), task)
        assert sample.images or sample.videos or heading.startswith("Text alone")
        if problem:
            read_labels(sample, problem[1])  # raises for labels of another kind


@pytest.mark.parametrize(("page", "heading", "text"), blocks("yaml"))
def test_yaml_of_the_pages_is_a_recipe_or_a_list_of_sources(page, heading, text, tmp_path):
    settings = YAML(typ="safe").load(text)
    if "model" in settings:
        recipe = make_recipe({"run_dir": "runs/mine", **settings})
        assert recipe.data.sources
    else:
        (file := tmp_path / "data_config.yaml").write_text(text)
        task = (re.search(r"task=(\w+)", heading) or ["", "chat"])[1]
        assert len(sources_of(SourceRecipe(path=str(file)), task)[0]) == len(settings["data"])


@pytest.mark.parametrize("command", INLINE)
def test_a_command_within_a_line_is_one(command, tmp_path, monkeypatch):
    test_docs.test_a_command_of_the_readme_is_one(shlex.split(command), tmp_path, monkeypatch)


def test_overrides_of_the_pages_are_settings():
    """`key=value` in the pages' text, by themselves: each key is a recipe's, and takes the value."""
    for name, page in PAGES.items():
        for word in re.findall(r"`([a-z_]+\.[a-z_]+=[^`… ]+)`", page):
            key, value = word.split("=", 1)
            recipe = load_recipe("chat", ["data=x"]).model_dump()
            section, leaf = key.split(".")
            assert section == "train" or leaf in recipe[section] or key == "eval.data", (name, word)
            assert value


def _literals(node: ast.AST) -> list[str]:
    """The texts of a module, with … where something is put in."""
    found = []
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in part.values))
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.append(part.value)
    return found


def test_messages_of_the_pages_are_the_packages_own():
    texts = [text for file in (ROOT / "mantis_lite").rglob("*.py") for text in _literals(ast.parse(file.read_text()))]
    said = re.findall(r"^\| `([^`]+)` \|", PAGES["troubleshooting"], re.M)
    assert len(said) > 60 and len(set(said)) == len(said)
    absent = [message for message in said if not any(message in text for text in texts)]
    assert not absent


def test_the_pages_know_every_family_benchmark_and_data_config():
    for kind in (kind for family in FAMILIES for kind in family.model_types):
        assert f"`{kind}`" in PAGES["families"], kind
    for name in BENCHMARKS:
        assert name in PAGES["coming-from-mantis"], name
    for file in (recipes_dir() / "data").glob("*.yaml"):
        assert file.name in PAGES["coming-from-mantis"], file.name


def test_the_table_of_memory_is_what_was_measured():
    figures = json.loads((results.FOLDER / "gpu.json").read_text())["figures"]
    measured = gpu_table.lines(figures)
    shown = re.findall(r"^\| (?:LLaVA|Idefics2|peaks).*$", PAGES["memory"], re.M)
    assert len(shown) > 5 and set(shown) <= set(measured)


def test_links_of_the_pages_lead_somewhere():
    for name, page in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page):
            assert (ROOT / "docs" / link).exists(), (name, link)


def test_recipes_that_the_pages_name_exist():
    known = {file.stem for file in recipes_dir().glob("*.yaml")}
    named = {
        word for page in PAGES.values() for word in re.findall(r"`((?:chat|video|classify|pretrain)-[\w-]+)`", page)
    }
    assert len(named) > 10 and named <= known, named - known


def test_install_files_name_what_there_is():
    """Both ask for extras that there are, and the image takes in all that the package is made of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = set(project["project"]["optional-dependencies"])
    for name in ("Dockerfile", "environment.yml"):
        asked = re.findall(r"\.\[([\w,-]+)\]", (ROOT / name).read_text())
        assert asked and {extra for each in asked for extra in each.split(",")} <= extras, name
    lines = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    copied = {word for line in lines for word in line.split()}
    assert all((ROOT / each).exists() for each in copied)
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    made_of = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == made_of | set(wheel["packages"]) | set(wheel["force-include"])
