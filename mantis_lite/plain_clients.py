"""What lies beside a model so that clients that know nothing of this package prompt it as it was trained, and stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .data.encode import Encoder
from .data.jinja import chat_template
from .models.checkpoint import Checkpoint
from .models.small_files import read_small
from .recipe import Recipe

TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer_config.json"
PROCESSOR, IMAGES, GENERATION = "processor_config.json", "preprocessor_config.json", "generation_config.json"


def write_template(folder: Path, encoder: Encoder) -> None:
    """The template of training as Jinja, in place of any that the base has."""
    if encoder.score is None:
        (folder / "chat_template.json").unlink(missing_ok=True)
        if "chat_template" in (kept := _settings(folder / TOKENIZER)):
            del kept["chat_template"]
            _write(folder / TOKENIZER, kept)
        (folder / TEMPLATE).write_text(chat_template(encoder.template, encoder.vision, encoder.system))


def write_settings(folder: Path, checkpoint: Checkpoint, encoder: Encoder, recipe: Recipe) -> None:
    """The settings of the processor of transformers by which it makes the same of pictures, and where answers end."""
    processor, images = checkpoint.family.processor(checkpoint.config, recipe.media)
    settings = _settings(folder / PROCESSOR) | processor
    if "image_processor" in settings:
        settings["image_processor"] |= images
    _write(folder / PROCESSOR, settings)
    if (folder / IMAGES).is_file():
        _write(folder / IMAGES, _settings(folder / IMAGES) | images)
    if encoder.score is None:
        ends = stops(checkpoint, encoder)
        published = _settings(folder / GENERATION)
        own = {"pad_token_id": ends["pad_token_id"]} | published | {"eos_token_id": ends["eos_token_id"]}
        _write(folder / GENERATION, own)


def stops(checkpoint: Checkpoint, encoder: Encoder) -> dict[str, Any]:
    """The settings of generating: greedily, up to a token that ends an answer in its template or as published.

    Llama-3's published settings name <|end_of_text|> alone, and its answers end in <|eot_id|>.
    """
    published = checkpoint.published
    end = encoder.token_id(encoder.template.end)
    ids = {end}
    for settings in (_settings(checkpoint.folder / GENERATION), published, published.get("text_config") or {}):
        found = settings.get("eos_token_id")
        ids |= set(found if isinstance(found, list) else [] if found is None else [found])
    known = encoder.tokenizer.get_vocab_size()
    return {"eos_token_id": sorted(i for i in ids if i < known), "pad_token_id": end, "do_sample": False}


def _settings(file: Path) -> dict[str, Any]:
    return read_small(file) if file.is_file() else {}


def _write(file: Path, settings: dict[str, Any]) -> None:
    if settings != _settings(file):
        file.write_text(json.dumps(settings, indent=2) + "\n")
