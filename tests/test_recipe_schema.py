"""The schema that editors check recipes by, against what reads them; and the page that is made from it."""

import re
from pathlib import Path

import jsonschema
import pytest

from mantis_lite.errors import RecipeError
from mantis_lite.recipe import Recipe
from mantis_lite.recipe_file import load_recipe, make_recipe, recipes_dir, save_recipe
from mantis_lite.recipe_schema import MODELINE, recipe_schema, recipes_page
from mantis_lite.train_keys import REFUSED
from mantis_lite.yaml_text import load_yaml

PAGE = Path(__file__).parents[1] / "docs/recipes.md"
RECIPES = sorted(recipes_dir().glob("*.yaml"))
BARE = {"model": "a/b", "data": "my.json", "run_dir": "runs/x", "method": "lora"}


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_as_it_ships_and_as_it_is_saved(validator, tmp_path, path):
    validator.validate(load_yaml(path.read_text()))
    save_recipe(load_recipe(path, ["data=my.json"]), tmp_path / "saved.yaml")
    validator.validate(load_yaml((tmp_path / "saved.yaml").read_text()))


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"name": "a/b", "revision": "main"}},
        {"data": ["a.json", {"path": "b.json", "weight": 0.5}]},
        {"data": {"sources": "a.json", "balance": "sqrt", "cache_size": "20GB"}},
        {"data": {"sources": [{"path": "b.json"}, "a.json"], "cache_size": 10**9}},
        {"packing": "off"},
        {"packing": "on"},
        {"packing": False},
        {"packing": {"max_length": 4096, "balance": "auto"}},
        {"eval": {"data": 0.1, "every": 10}},
        {"eval": {"data": "held_out.json"}},
        {"memory": {"kernels": ["lora"], "checkpointing": 4}},
        {"train": {"learning_rate": 1e-4, "samples_per_step": 32, "save_strategy": "no", "bf16": True}},
    ],
)
def test_what_is_read_is_valid(validator, settings):
    make_recipe(BARE | settings)
    validator.validate(BARE | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"metod": "lora"},
        {"model": {"nam": "a/b"}},
        {"data": {"sources": ["a.json"], "balanse": "sqrt"}},
        {"data": [{"path": "b.json", "wieght": 0.5}]},
        {"data": [{"weight": 0.5}]},
        {"data": []},
        {"lora": {"rank": 8}},
        {"lora": {"r": 0}},
        {"method": "dora"},
        {"packing": "of"},
        {"eval": {"dta": 0.1}},
        {"train": {"learning_rat": 1e-4}},
        {"train": {"learning_rate": "high"}},
        {"train": {"samples_per_step": 0}},
        *({"train": {key: 1}} for key in ("optim", "output_dir")),
    ],
    ids=str,
)
def test_what_is_refused_is_not_valid(validator, settings):
    with pytest.raises(RecipeError):
        make_recipe(BARE | settings)
    assert not validator.is_valid(BARE | settings)


def test_a_recipe_names_its_model_and_the_rest_may_come_with_the_command(validator):
    assert validator.is_valid({"model": "a/b"}) and not validator.is_valid({"data": "my.json"})
    assert validator.is_valid({"model": "a/b", "data": {"eval": 0.1}})


def test_every_key_is_described(validator):
    schema = validator.schema
    sections = [schema, *schema["$defs"].values()]
    bare = [key for section in sections for key, found in section["properties"].items() if "description" not in found]
    assert len(sections) > 12 and not bare


def test_the_page_is_the_one_that_is_made():
    """`python -m mantis_lite.recipe_schema > docs/recipes.md` makes it."""
    assert PAGE.read_text() == recipes_page()
    assert all(f"`train.{key}`" in recipes_page() for key in REFUSED)
    for name, field in Recipe.model_fields.items():
        assert f"\n## {name}\n" in recipes_page() or f"| `{name}` |" in recipes_page(), field


def test_the_recipe_on_the_page_is_one(validator, tmp_path):
    text = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.S)[1]
    assert text.startswith(MODELINE)
    (tmp_path / "my.yaml").write_text(text)
    assert load_recipe(tmp_path / "my.yaml").data.eval == 0.05
    validator.validate(load_yaml(text))
