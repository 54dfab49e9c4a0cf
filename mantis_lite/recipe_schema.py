"""A recipe's file as a JSON Schema, by which editors complete and check it; and the page of all its keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from .recipe import Recipe
from .train_keys import REFUSED, STEP_SIZES, train_keys

MODELINE = "# yaml-language-server: $schema=recipe.schema.json"
"""The first line of a recipe, for an editor to find the schema that was written beside it."""

TEXT = {"type": "string"}
KINDS = {"int": {"type": "integer"}, "float": {"type": "number"}, "bool": {"type": "boolean"}}
"""Of TrainingArguments' annotations; what has another is left to them."""

WORDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true`, `false`",
    "string": "text",
    "object": "a mapping",
}

INTRODUCTION = f"""# Recipes

A recipe is a YAML file, and holds every setting of a run. Only `model` and `data` have to be given; `data` may
come with the command instead, as may any key: `mantis-lite train my.yaml data=my.jsonl lora.r=64`.

```yaml
{MODELINE}
model: TIGER-Lab/Mantis-8B-siglip-llama3
data: my.jsonl              # or a list; or a mapping, with the keys of `data` below
eval: {{data: 0.05, every: 100}}
method: qlora
lora: {{r: 16, alpha: 32}}
packing: {{max_length: 8192}}
train: {{num_train_epochs: 1, learning_rate: 1.0e-4, samples_per_step: 32}}
```

`mantis-lite init` writes one for your data and card. `mantis-lite recipes list` names those that come with the package.
It is YAML 1.2: `true` and `false` alone are booleans, and `off` is a word. A key that does not exist is an error that
names the nearest one, as is any value that cannot be honoured.

**In an editor.** `mantis-lite schema > recipe.schema.json` writes the schema of recipes; with the first line above,
editors with a YAML language server (VS Code's YAML extension, Neovim, Emacs, Helix) complete keys, show what they do
and mark mistakes. It sees each key by itself; `mantis-lite check my.yaml` also sees what keys say against each other.

This page is made from that schema: `python -m mantis_lite.recipe_schema > docs/recipes.md`."""

OF_TRAINING = """## train

The names are those of transformers' `TrainingArguments`, `train.learning_rate` or `train.lr_scheduler_type`, with their
defaults. An optimizer step has a size by one of `train.samples_per_step`, `train.tokens_per_step` (a whole number each)
and `train.gradient_accumulation_steps` (packs). Some names are not set here:"""


def recipe_schema() -> dict[str, Any]:
    """The schema (JSON Schema, draft 2020-12) of a recipe's file, with the shorthands that `load_recipe` reads.

    What keys say against each other is left to `load_recipe`, and so is what is missing but for the model: the data
    and run_dir may come with the command.
    """
    schema = Recipe.model_json_schema()
    keys, sections = schema["properties"], schema["$defs"]
    for key in keys.values():
        if "$ref" in key:
            key.pop("default", None)  # each of its keys has its own
    source = {"anyOf": [TEXT, _section("Source")]}
    several = {"type": "array", "items": source, "minItems": 1}
    data = sections["DataRecipe"]
    data["properties"]["sources"] = _either(data["properties"]["sources"], TEXT, several)
    del data["required"]
    sections["EvalRecipe"]["properties"]["data"] = data["properties"]["eval"]
    keys["model"] = _either(keys["model"], TEXT, _section("Model"))
    keys["data"] = _either(keys["data"], TEXT, several, _section("Data"))
    keys["packing"] = _either(keys["packing"], {"enum": ["on", "off", True, False]}, _section("Packing"))
    keys["train"] |= {"properties": _train(), "additionalProperties": False}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return head | schema | {"title": "A recipe of mantis-lite", "required": ["model"]}


def _section(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}Recipe"}


def _either(key: Mapping[str, Any], *forms: Mapping[str, Any]) -> dict[str, Any]:
    """The key, in any of these forms in place of its own."""
    return {word: key[word] for word in ("title", "description") if word in key} | {"anyOf": list(forms)}


def _train() -> dict[str, Any]:
    sizes = {key: {"type": "integer", "exclusiveMinimum": 0} for key in STEP_SIZES}
    return {key: KINDS.get(kind, {}) for key, kind in train_keys().items() if key not in REFUSED} | sizes


def recipes_page() -> str:
    """docs/recipes.md: what a recipe is, and a table of each section's keys."""
    schema = Recipe.model_json_schema()
    keys, sections = schema["properties"], schema["$defs"]
    parts = [INTRODUCTION, _table("", {name: key for name, key in keys.items() if "$ref" not in key}, schema)]
    for name, key in keys.items():
        if "$ref" in key:
            section = _of(key, sections)
            parts += [f"## {name}", key["description"], _table(f"{name}.", dict(_flat(section, sections)), section)]
        if name == "data":
            source = sections["SourceRecipe"]
            parts += ["Of each source:", _table("", source["properties"], source)]
    refused = (f"| `train.{key}` | {why} |" for key, why in REFUSED.items())
    return "\n\n".join([*parts, OF_TRAINING, "\n".join(["| key | instead |", "|---|---|", *refused])]) + "\n"


def _of(key: Mapping[str, str], sections: Mapping[str, Any]) -> dict[str, Any]:
    """The section that a key is."""
    return sections[key["$ref"].rpartition("/")[2]]


def _flat(section: Mapping[str, Any], sections: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A section's keys, with those of the sections in it."""
    for name, key in section["properties"].items():
        within = _flat(_of(key, sections), sections) if "$ref" in key else [("", key)]
        yield from ((f"{name}.{inner}".rstrip("."), found) for inner, found in within)


def _table(prefix: str, keys: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    rows = ["| key | type | default | what it does |", "|---|---|---|---|"]
    for name, key in keys.items():
        default = key.get("default")
        if name in section.get("required", ()) and name != "run_dir":  # which a recipe's file has by its own name
            default = "none: it has to be given"
        elif default not in (None, "", {}):
            default = f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"
        rows.append(f"| `{prefix}{name}` | {' or '.join(_kinds(key))} | {default or ''} | {key['description']} |")
    return "\n".join(rows)


def _kinds(key: Mapping[str, Any]) -> Iterator[str]:
    """What a key's value may be, in words; no value at all is not said."""
    if "enum" in key:
        yield ", ".join(f"`{word}`" for word in key["enum"])
    elif "const" in key:
        yield f"`{key['const']}`"
    elif "anyOf" in key:
        for form in key["anyOf"]:
            yield from _kinds(form)
    elif key.get("type") == "array":
        yield f"a list: {' or '.join(_kinds(key['items']))}"
    elif "$ref" in key:
        yield "a mapping, as below"
    elif key["type"] != "null":
        yield WORDS[key["type"]] + _bounds(key)


def _bounds(key: Mapping[str, Any]) -> str:
    """The bounds of a number."""
    signs = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{sign} {key[word]}" for word, sign in signs.items() if word in key]
    return f", {' and '.join(said)}" if said else ""


if __name__ == "__main__":
    sys.stdout.write(recipes_page())
