"""The configs of the known bases, which come with the package: enough to know a model's size without its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..data.vision import Vision
from ..errors import RecipeError
from ..models.checkpoint import FAMILIES
from ..models.family import Family
from ..recipe import MediaRecipe

FOLDER = Path(__file__).parents[1] / "bases"


@dataclass(frozen=True)
class Base:
    """What is known of a published model beforehand; `tokens` are its own that pictures may be written with."""

    family: Family
    config: PreTrainedConfig
    image_processor: BaseImageProcessor
    tokens: frozenset[str]

    def vision(self, media: MediaRecipe) -> Vision:
        """How its pictures enter, under these settings."""
        return self.family.vision(self.config, self.image_processor, media, self.tokens)


def find_base(name: str) -> Base:
    """The base of a hub's name. Raises RecipeError where it does not come with the package."""
    facts = next((facts for facts in map(_read, sorted(FOLDER.glob("*.json"))) if name in facts["names"]), None)
    if facts is None:
        raise RecipeError(
            f"fit: the config of {name} does not come with the package\n  Connect, or name a folder with the model."
        )
    settings = facts["config"]
    family = next(family for family in FAMILIES if settings["model_type"] in family.model_types)
    return Base(
        family=family,
        config=AutoConfig.for_model(**settings),
        image_processor=_image_processor(facts["preprocessor"]),
        tokens=frozenset(facts.get("tokens", ())),
    )


def _read(file: Path) -> dict[str, Any]:
    """A base's facts, with the names it goes by: its own and of those with the same shapes."""
    facts = json.loads(file.read_text())
    return facts | {"names": [file.stem.replace("--", "/"), *facts.get("also", ())]}


def _image_processor(settings: dict[str, Any]) -> BaseImageProcessor:
    with TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
