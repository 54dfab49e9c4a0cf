"""What the pages for readers say holds: rows parse, recipes load, messages are the package's own, links lead there."""

import ast
import json
import re
import shlex
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML
from test_docs import BLOCK, COMMANDS, DOCS, PAGES, README, ROOT, check_command

from mantis_lite.data.labels import read_labels
from mantis_lite.data.mixture import sources_of
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.schema import parse
from mantis_lite.evaluate.benchmarks import BENCHMARKS
from mantis_lite.models.checkpoint import FAMILIES
from mantis_lite.recipe import SourceRecipe
from mantis_lite.recipe_file import load_recipe, make_recipe, recipes_dir

FILES = {ROOT / "README.md": README, **{ROOT / "docs" / f"{name}.md": page for name, page in PAGES.items()}}
INLINE = sorted(set(re.findall(r"`(mantis-lite [^`]+)`", DOCS)) - set(COMMANDS))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


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
    check_command(shlex.split(command.partition(" > ")[0]), tmp_path, monkeypatch)


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


def anchors(page: str) -> set[str]:
    """What headings are called in links, by GitHub's rule: lower case, blanks as hyphens, other marks left out."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_links_lead_somewhere(file):
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", BLOCK.sub("", FILES[file])):
        target = (file.parent / link).resolve() if link else file
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target.read_text()), f"{link}#{anchor}"


def test_the_readme_leads_to_every_page():
    assert set(re.findall(r"\]\(docs/([\w-]+)\.md", README)) == set(PAGES)


def test_recipes_that_the_pages_name_exist():
    known = {file.stem for file in recipes_dir().glob("*.yaml")}
    named = {
        word for page in PAGES.values() for word in re.findall(r"`((?:chat|video|classify|pretrain)-[\w-]+)`", page)
    }
    assert len(named) > 10 and named <= known, named - known


def asked(text: str) -> set[str]:
    """The extras that are asked for, as in '.[gpu,serve]'."""
    return {extra for each in re.findall(r"(?:\.|mantis-lite)\[([\w,-]+)\]", text) for extra in each.split(",")}


def test_the_page_on_installation_knows_each_extra():
    said = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| [^|]+ \|$", PAGES["install"], re.M)
    assert sorted(said) == sorted(EXTRAS)
    assert {"gpu", "serve", "ray"} <= asked(DOCS) <= set(EXTRAS)


def test_the_image_takes_in_all_that_the_package_is_made_of():
    text = (ROOT / "Dockerfile").read_text()
    assert asked(text) == {"gpu", "serve"} <= set(EXTRAS)
    copies = [line.split() for line in re.findall(r"^COPY (.*)$", text, re.M)]
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    made_of = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    copied = [name for *names, _ in copies for name in names]
    assert sorted(copied) == sorted(made_of | set(wheel["packages"]) | set(wheel["force-include"]))
    assert all((ROOT / name).exists() for name in copied)
    # A folder's files go into what is named last; a file goes below it.
    assert all(to == "/src/" if (ROOT / names[0]).is_file() else to == f"/src/{names[0]}" for *names, to in copies)
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.M)[0])[0] in PROJECT["project"]["scripts"]


def test_the_environment_of_conda_is_one_that_the_package_runs_in():
    settings = YAML(typ="safe").load(ROOT / "environment.yml")
    python, pip, by_pip = settings["dependencies"]
    assert python.startswith("python=") and pip == "pip" and list(by_pip) == ["pip"]
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["project"]["requires-python"])
    (wanted,) = by_pip["pip"]
    requirement = Requirement(wanted.replace(".[", f"{PROJECT['project']['name']}["))
    assert wanted.startswith(".[") and requirement.extras == {"gpu", "serve"} <= set(EXTRAS)
    assert f"conda activate {settings['name']}" in PAGES["install"]
