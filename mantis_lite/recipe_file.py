"""A recipe's file and `key=value` words -> the Recipe, checked before anything heavy is imported; and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml.error import YAMLError

from .conflicts import conflicts
from .errors import RecipeError, did_you_mean, one_line
from .files import write_whole
from .recipe import Recipe, SourceRecipe, Strategy
from .secrets import refuse_secrets
from .train_keys import STEP_SIZES, train_keys, train_problems
from .yaml_text import dump_yaml, load_yaml, read_text

DEFAULTS = {
    "chat": "chat-siglip-llama3-qlora",
    "video": "video-idefics2-qlora",
    "classify": "classify-idefics2-lora",
}


def load_recipe(name: str | Path, overrides: Iterable[str] = (), unstated: str | None = None) -> Recipe:
    """Read a recipe by name or file and apply `key=value` overrides, dots for nesting.

    Values are YAML 1.2: `true` and `false` alone are booleans, `1e-4` is a number. Raises RecipeError, one line a
    mistake. `unstated` stands for the data where neither names any.
    """
    path = find_recipe(str(name))
    return make_recipe({"run_dir": f"runs/{path.stem}", "data": unstated} | _read_yaml(path), overrides, str(path))


def make_recipe(settings: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "recipe") -> Recipe:
    """Check a nested mapping of settings, with `key=value` overrides, and return the Recipe; raises RecipeError."""
    refuse_secrets(settings, where)
    settings = _expand(dict(settings), where)
    for override in overrides:
        key, _, text = override.partition("=")
        refuse_secrets({key: text}, "an override")  # before it is read, and what is wrong with it said
        parsed = _parse_override(override)
        refuse_secrets(parsed, "an override")
        top = _expand(parsed, override)
        if isinstance(top.get("train"), dict) and set(STEP_SIZES) & set(top["train"]):
            settings = _merge(settings, {"train": dict.fromkeys(STEP_SIZES)})  # one size of a step replaces another
        if isinstance(top.get("model"), dict):
            settings = _merge({"model": {}} | settings, {"model": _replaced(top["model"])})
        settings = _merge(settings, top)
    if not settings.get("data"):
        raise RecipeError("data: no data was given\n  Add data=my.json, or a `data:` key to the recipe.")
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError("\n".join(dict.fromkeys(map(_explain, error.errors())))) from None
    problems = [*train_problems(recipe.train), *conflicts(recipe)]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every setting of the recipe, defaults included, as YAML that `load_recipe` reads back."""
    write_whole(path, dump_yaml(recipe.model_dump(mode="json")).encode())


def recipes_dir() -> Path:
    """The folder of recipes: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def deepspeed_config(strategy: Strategy) -> dict[str, Any]:
    """The DeepSpeed configuration of a strategy, "auto" where TrainingArguments say."""
    return json.loads((recipes_dir() / "deepspeed" / f"{strategy}.json").read_text())


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path to a YAML file, a name in `recipes_dir()`, or a task's default recipe."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise RecipeError(
                f"{name}: no such file\n  `mantis-lite recipes list` shows the recipes that come with it."
            )
        return path
    path = recipes_dir() / f"{DEFAULTS.get(name, name)}.yaml"
    if path.is_file():
        return path
    known = [*DEFAULTS, *(file.stem for file in recipes_dir().glob("*.yaml"))]
    raise RecipeError(f"{name}: no such recipe{did_you_mean(name, known)}\n  There are: {', '.join(sorted(known))}.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
        refuse_secrets(text, str(path))
        settings = load_yaml(text)
    except (OSError, YAMLError) as error:
        raise RecipeError(f"{path}: not YAML: {one_line(error)}\n  Mend the recipe there.") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, found {type(settings).__name__}")
    return settings


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override}: not an override\n  Write key=value, for example packing.max_length=4096.")
    if not text.strip() or re.search(r"\s#", text):
        return _nested(key, text)  # no text at all, or a sentence with what YAML would take for a comment
    try:
        value = load_yaml(text)
    except YAMLError:
        value = text  # a path or sentence with YAML's own characters in it
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        value = text  # "Note: be brief" is a sentence; a mapping is written in braces
    return _nested(key, value)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _expand(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Write shorthands out: `model: x`, `data: x | [x, ...]`, `eval.data: x`, `packing: off`."""
    settings = dict(settings)
    if isinstance(settings.get("model"), str):
        settings["model"] = {"name": settings["model"]}
    data = settings.get("data")
    if isinstance(data, str | list):
        settings["data"] = {"sources": data}
    if isinstance(settings.get("eval"), dict) and "data" in settings["eval"]:
        settings |= _with_held_out(settings, where)
    if isinstance(settings.get("data"), dict) and "sources" in settings["data"]:
        sources = settings["data"]["sources"]
        sources = sources if isinstance(sources, list) else [sources]
        settings["data"] = settings["data"] | {
            "sources": [{"path": s} if isinstance(s, str) else s for s in sources],
        }
    if (packing := settings.get("packing")) is not None and not isinstance(packing, dict):
        if packing not in ("on", "off", True, False):
            raise RecipeError(f"packing: expected on, off or its keys, found {packing!r} in {where}")
        settings["packing"] = {"enabled": packing in ("on", True)}
    return settings


def _with_held_out(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """`eval.data: x` as `data.eval: x`. Raises RecipeError where both are said, and differ."""
    rest = {key: value for key, value in settings["eval"].items() if key != "data"}
    data, held_out = settings.get("data") or {}, settings["eval"]["data"]
    if not isinstance(data, dict):
        return {"eval": rest}  # no data, as it is said to be once it is checked
    if data.get("eval", held_out) != held_out:
        raise RecipeError(f"eval.data: {held_out}, and data.eval: {data['eval']} in {where}\n  Keep one of them.")
    return {"eval": rest, "data": data | {"eval": held_out}}


def _replaced(model: dict[str, Any]) -> dict[str, None]:
    """What of a model another says in place of: a name of one to put together, and the other way round."""
    halves = dict.fromkeys(("llm", "vision"))
    own = dict.fromkeys(("name", "revision"))
    return (halves if "name" in model else {}) | (own if halves.keys() & model.keys() else {})


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if value is None:
            merged.pop(key, None)  # `lora=null` takes a key back to its default
            continue
        below = merged.get(key)
        merged[key] = _merge(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return merged


def _known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")


def _explain(detail: Any) -> str:
    """One pydantic error in this project's words."""
    key = ".".join(str(part) for part in detail["loc"] if part not in ("float", "str"))  # a union's own
    if detail["type"] == "extra_forbidden":
        known = [*_known_keys(), *(f"train.{name}" for name in train_keys()), *_source_keys(key)]
        return f"{key}: no such key{did_you_mean(key, known)}"
    if detail["type"] == "missing":
        return f"{key}: missing\n  Add {key}=..., or the key to the recipe."
    if detail["type"] == "model_type":
        return f"{key}: expected its own keys, as {key}.KEY=..., found {detail['input']!r}"
    if detail["type"] == "bool_type":
        return f"{key}: expected true or false, found {detail['input']!r}"
    said = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"].lower()
    return f"{key}: {said}, found {detail['input']!r}"


def _source_keys(key: str) -> list[str]:
    prefix = key.rpartition(".")[0]
    return [f"{prefix}.{name}" for name in SourceRecipe.model_fields] if key.startswith("data.sources") else []
