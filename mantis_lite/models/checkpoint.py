"""A checkpoint without its weights: config, tokenizer and image processor, from a folder or the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from .. import tiny
from ..data.encode import Encoder, Score
from ..data.frames import Frames
from ..data.template import Token, captions, choose_template
from ..data.turbo import require_turbo
from ..errors import RecipeError
from ..recipe import MediaRecipe, ModelRecipe, Recipe
from .family import Family
from .fuyu import FUYU
from .idefics2 import IDEFICS2
from .idefics3 import IDEFICS3
from .llava import LLAVA
from .qwen_vl import QWEN2, QWEN3
from .small_files import read_small, refuse_hostile, refuse_settings, unreadable

FAMILIES = (LLAVA, IDEFICS2, FUYU, IDEFICS3, QWEN2, QWEN3)

NEAREST = {
    "llava_next": "chat-siglip-llama3-qlora",
    "llava_onevision": "chat-siglip-llama3-qlora",
    "video_llava": "chat-idefics2-qlora",
    "internvl": "chat-qwen25vl-qlora",
    "internvl_chat": "chat-qwen25vl-qlora",
    "idefics": "chat-idefics2-qlora",
    "qwen2_5_omni": "chat-qwen25vl-qlora",
}
"""The recipe to take in place of a kind of model that is not trained here."""

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's weights are, and everything of it that is small; `folder` holds its small files."""

    name: str
    revision: str | None
    folder: Path
    family: Family
    published: dict[str, Any]
    """config.json as it stands in the folder, or mended; `notice` says how."""
    notice: str | None
    config: PreTrainedConfig
    tokenizer: Tokenizer
    image_processor: BaseImageProcessor

    @property
    def public_name(self) -> str:
        """What to call it elsewhere: its name on the hub, and of a folder here its last name: no path is public."""
        return "tiny" if self.folder == tiny.CHECKPOINT else public_name(self.name)

    @property
    def public_model(self) -> dict[str, str | None]:
        """What a recipe that others may read says of it."""
        return {"name": self.public_name, "revision": self.commit}

    @property
    def commit(self) -> str | None:
        """The commit of the hub's that its files are of; the revision asked for, where it is a folder here."""
        return commit_of(self.folder, self.revision)

    @property
    def has_head(self) -> bool:
        """Whether it is of a class with a score head, as VideoScore's is."""
        return has_head(self.published)

    def copy_small_files(self, folder: Path) -> None:
        """Copy everything but the weights and their index, to the letter; a mended config.json as mended."""
        for file in (file for pattern in SMALL_FILES for file in self.folder.glob(pattern)):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, folder)
        if self.notice:
            (folder / "config.json").write_text(json.dumps(self.published, indent=2) + "\n")

    def encoder(self, recipe: Recipe) -> Encoder:
        """The Encoder of this model under a recipe's prompt and media settings. Raises RecipeError."""
        self._refuse_what_it_lacks(recipe)
        family, media = self.family, recipe.media
        if media.backend == "fast":
            require_turbo()
        vocabulary = self.tokenizer.get_vocab()
        vision = family.vision(self.config, self.image_processor, media, vocabulary)
        large = [token for token, _ in vision.tokens((4096, 4096)) if isinstance(token, Token)]
        if missing := [token for token in large if token not in vocabulary]:
            raise RecipeError(
                f"media.max_image_size: a large picture needs {missing[0]}, and the tokenizer has no such token\n"
                "  Set it lower, or take another checkpoint."
            )
        templates = family.hub if recipe.prompt.template == "hub" else family.templates
        captioned = recipe.task == "pretrain"
        template = choose_template("auto" if captioned else recipe.prompt.template, templates, vocabulary)
        _refuse_another_start(self.tokenizer, template.end)
        score = self._score(recipe)
        return Encoder(
            tokenizer=self._with_tokens(score) if score and score.names else self.tokenizer,
            template=captions(template) if captioned else template,
            vision=vision,
            system=recipe.prompt.system,
            labels=recipe.prompt.labels,
            max_image_size=None if family.scales or isinstance(cap := media.max_image_size, str) else cap,
            frames=Frames(media, gap="" if score is None else " "),
            score=score,
        )

    def _score(self, recipe: Recipe) -> Score | None:
        if recipe.task != "classify":
            return None
        return Score(tuple(recipe.head.labels or ()) if recipe.head.score == "special_tokens" else ())

    def _with_tokens(self, score: Score) -> Tokenizer:
        """The tokenizer with the labels' tokens, whose embeddings a checkpoint must have to spare, as Qwen's have."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in score.tokens])
        rows = self.config.get_text_config().vocab_size
        if tokenizer.get_vocab_size() > rows:
            raise RecipeError(
                f"head.score: special_tokens needs {len(score.tokens)} tokens more than the tokenizer has, "
                f"and the model has {rows:,} embeddings, all in use\n  Set head.score=last_token."
            )
        return tokenizer

    def _refuse_what_it_lacks(self, recipe: Recipe) -> None:
        family, media, kind = self.family, recipe.media, self.config.model_type
        if recipe.task == "pretrain" and family is not LLAVA:
            found = f"brings up the projector of a LLaVA, and this is {kind}"
            raise RecipeError(f"task: pretrain {found}\n  Train all of it: task=chat, method=full.")
        for part in recipe.parts:
            if part not in family.parts and getattr(recipe.trainable, part):
                raise RecipeError(f"trainable.{part}: {kind} has none\n  Leave it out.")
        if media.image_splitting is not None and not family.splits:
            raise RecipeError(f"media.image_splitting: {kind} does not split pictures\n  Leave it out.")
        if isinstance(media.max_image_size, str) and media.max_image_size not in family.caps:
            raise RecipeError(
                f"media.max_image_size: {media.max_image_size} is a size of Fuyu's, and this is {kind}\n"
                "  Give the longest side in pixels."
            )


def commit_of(folder: Path, revision: str | None) -> str | None:
    """The commit that the hub's cache calls a folder by; the revision asked for, where it is another folder."""
    return folder.name if folder.parent.name == "snapshots" else revision


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether a published config is of a class with a score head."""
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def public_name(name: str) -> str:
    """What to call a file or folder elsewhere: by its last name; a name on the hub is public as it is."""
    return Path(name).resolve().name if Path(name).exists() or Path(name).is_absolute() else name


def open_checkpoint(model: ModelRecipe) -> Checkpoint:
    """Read a checkpoint's small files; "tiny" is the model that comes with the package. Raises RecipeError."""
    folder = tiny.CHECKPOINT if model.name == "tiny" else find_folder("model", model.name, model.revision, SMALL_FILES)
    refuse_hostile(folder)
    published, family = _published(folder, model.name)
    notice = family.mend(published)
    config, tokenizer = AutoConfig.for_model(**published), read_tokenizer(folder)
    image_processor = _image_processor(folder)
    # The model looks for the placeholder the encoder writes; a Fuyu with a vocabulary of its own does not name it.
    placeholder = family.vision(config, image_processor, MediaRecipe(), ()).placeholder
    if placeholder not in tokenizer.get_vocab():
        found = f"the tokenizer of {model.name} lacks {placeholder}, which stands for a picture"
        raise RecipeError(f"model: {found}\n  Take the checkpoint as it was published.")
    config.image_token_id = tokenizer.token_to_id(placeholder)
    return Checkpoint(
        name=str(folder) if Path(model.name).is_dir() or model.name == "tiny" else model.name,
        revision=model.revision,
        folder=folder,
        family=family,
        published=published,
        notice=notice,
        config=config,
        tokenizer=tokenizer,
        image_processor=image_processor,
    )


def _published(folder: Path, name: str) -> tuple[dict[str, Any], Family]:
    config_file = folder / "config.json"
    supported = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    if not config_file.is_file():
        raise RecipeError(
            f"model: {name} has no config.json; trained here: {supported}\n"
            "  Name a model on the hub, or a folder with one saved."
        )
    config = read_small(config_file)
    found = config.get("model_type")
    family = next((family for family in FAMILIES if found in family.model_types), None)
    if family is None:
        nearest = NEAREST.get(str(found), "chat")
        raise RecipeError(
            f"model: {name} is of type {found}; trained here: {supported}\n"
            f"  The nearest recipe is {nearest}; `mantis-lite recipes list` shows all."
        )
    return config, family


def _image_processor(folder: Path) -> BaseImageProcessor:
    """The PIL processors everywhere, so that a machine with torchvision sees the same pixels as one without."""
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        raise unreadable(folder / "preprocessor_config.json", error) from None


def _refuse_another_start(tokenizer: Tokenizer, end: Token) -> None:
    """Stretches between special tokens are tokenised one by one: all must be written as the first is.

    One saved with transformers' `legacy=False` puts its leading blank before the first alone.
    """
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, False
    behind, first = (tokenizer.encode(text, add_special_tokens=False).ids for text in (f"{end}a", "a"))
    tokenizer.encode_special_tokens = before  # other encoders may share it
    if behind[1:] != first:
        raise RecipeError(
            "model: its tokenizer writes text at the start of a prompt otherwise than further on\n"
            "  Take the tokenizer of the checkpoint as it was published."
        )


def find_folder(key: str, name: str, revision: str | None, patterns: list[str]) -> Path:
    """A folder here, or the files of these patterns of one on the hub; `key` is the recipe's. Raises RecipeError."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise RecipeError(
            f"{key}: {name} is gated on the hub\n  Accept its terms on its page, then `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        at = "model.revision" if key == "model" else key
        raise RecipeError(
            f"{at}: {name} has no revision {revision}\n  Take one of its branches, tags or commits."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise RecipeError(
            f"{key}: {name} is neither a folder here nor a model on the hub\n"
            "  Check the spelling; a private model needs `hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise RecipeError(
            f"{key}: {name} is not in the cache, and the hub cannot be reached\n"
            f"  Connect, or set {key} to a folder with the checkpoint."
        ) from None


def read_tokenizer(folder: Path) -> Tokenizer:
    """The published tokenizer.json as it is: transformers would rebuild it by the class its config happens to name."""
    file = folder / "tokenizer.json"
    try:
        return (
            Tokenizer.from_file(str(file))
            if file.is_file()
            else AutoTokenizer.from_pretrained(folder).backend_tokenizer
        )
    except Exception as error:  # tokenizers raises nothing narrower
        raise unreadable(file, error) from None


def read_config(folder: Path) -> PreTrainedConfig:
    """The config in a folder: of a model, or beside an adapter, where it states the score head. Raises RecipeError."""
    file = folder / "config.json"
    settings = read_small(file)
    refuse_settings(file, settings)
    try:
        return AutoConfig.for_model(**settings)
    except (TypeError, ValueError) as error:  # of no model, or of none that is known
        raise unreadable(file, error) from None
