"""A checkpoint without its weights: config, tokenizer and image processor, from a folder or the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from .. import tiny
from ..data.encode import Encoder
from ..data.template import choose_template
from ..errors import RecipeError
from ..recipe import ModelRecipe, Recipe
from . import llava

SMALL_FILES = ["*.json", "*.model", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's weights are, and everything of it that is small; `folder` holds its small files."""

    name: str
    revision: str | None
    folder: Path
    config: PreTrainedConfig
    tokenizer: Tokenizer
    image_processor: BaseImageProcessor

    def small_files(self) -> list[Path]:
        """Everything of a checkpoint but its weights and their index."""
        files = [file for pattern in SMALL_FILES for file in self.folder.glob(pattern)]
        return [file for file in files if not file.name.endswith(".index.json")]

    def encoder(self, recipe: Recipe) -> Encoder:
        """The Encoder of this model under a recipe's prompt and media settings."""
        template = choose_template(recipe.prompt.template, self.tokenizer.get_vocab())
        vision = llava.vision(self.config, self.image_processor)
        return Encoder(
            tokenizer=self.tokenizer,
            template=template,
            vision=vision,
            system=recipe.prompt.system,
            labels=recipe.prompt.labels,
            max_image_size=recipe.media.max_image_size,
        )


def open_checkpoint(model: ModelRecipe) -> Checkpoint:
    """Read a checkpoint's small files; "tiny" is the model that comes with the package. Raises RecipeError."""
    folder = _folder(model)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise RecipeError(
            f"model: {model.name} has no config.json\n  Name a model on the hub, or a folder with one saved."
        )
    found = json.loads(config_file.read_text()).get("model_type")
    if found != llava.MODEL_TYPE:
        raise RecipeError(
            f"model: {model.name} is of type {found}; trained here: {llava.MODEL_TYPE}\n"
            "  Take a Mantis checkpoint of the LLaVA architecture, such as TIGER-Lab/Mantis-8B-siglip-llama3."
        )
    return Checkpoint(
        name=str(folder) if Path(model.name).is_dir() or model.name == "tiny" else model.name,
        revision=model.revision,
        folder=folder,
        config=AutoConfig.from_pretrained(folder),
        tokenizer=_tokenizer(folder),
        # The PIL processors everywhere, so that a machine with torchvision sees the same pixels as one without.
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )


def _folder(model: ModelRecipe) -> Path:
    if model.name == "tiny":
        return tiny.CHECKPOINT
    if Path(model.name).is_dir():
        return Path(model.name)
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=SMALL_FILES))
    except GatedRepoError:
        raise RecipeError(
            f"model: {model.name} is gated on the hub\n  Accept its terms on its page, then `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise RecipeError(
            f"model.revision: {model.name} has no revision {model.revision}\n"
            "  Take one of its branches, tags or commits."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise RecipeError(
            f"model: {model.name} is neither a folder here nor a model on the hub\n"
            "  Check the spelling; a private model needs `hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise RecipeError(
            f"model: {model.name} is not in the cache, and the hub cannot be reached\n"
            "  Connect, or set model to a folder with the checkpoint."
        ) from None


def _tokenizer(folder: Path) -> Tokenizer:
    """The published tokenizer.json as it is: transformers would rebuild it by the class its config happens to name."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return Tokenizer.from_file(str(file))
    return AutoTokenizer.from_pretrained(folder).backend_tokenizer
