"""What a user names once something is trained, a run, an adapter or a model, -> how it is opened and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from . import tiny
from .contract import NAME, Contract, read_contract
from .data.encode import Encoder
from .errors import RecipeError, one_line
from .models.adapter_config import read_settings
from .models.adapters import find_adapter, load_adapter, resized
from .models.checkpoint import Checkpoint, find_folder, has_head, open_checkpoint, read_config, read_tokenizer
from .models.head import with_head
from .models.head_config import labels_of
from .models.load import load_model
from .models.precision import working_dtype
from .models.small_files import read_small
from .models.upstream import CONFIG
from .plain_clients import stops
from .recipe import ModelRecipe, Recipe
from .recipe_file import load_recipe, make_recipe
from .yaml_text import load_yaml

RECIPE = "recipe.yaml"
ANY_BASE, REVISION = "model.any_base", "model.revision"
TAKEN = ("model", "data", "packing", "media", "memory", "prompt", "head.labels", "head.problem")
"""What of a recipe means anything once it has been trained by."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer, which come with an adapter that has words of its own."""
UNNAMED: dict[str, Any] = {"data": "none", "run_dir": "none", "method": "lora"}
"""What a recipe has to say, of a model of which nothing says how it was trained."""
SCORES: dict[str, Any] = {"task": "classify", "head": {"problem": "regression"}, "media": {"num_frames": 16}}
"""The same of one with a score head: as VideoScore, whose config does not say that its scores are numbers."""


@dataclass(frozen=True)
class Trained:
    """A model, or an adapter and its base, not loaded yet, and how prompts and pictures are written for it."""

    name: str
    """As the user named it."""
    recipe: Recipe
    checkpoint: Checkpoint
    adapter: Path | None
    contract: Contract | None
    head: PreTrainedConfig | None
    """The config that states a score head, where the task has one."""
    any_base: bool = False
    """Whether the base may have other weights than the contract says, being the same model saved another way."""

    @property
    def folder(self) -> Path:
        """Where what was trained lies."""
        return self.adapter or self.checkpoint.folder

    @cached_property
    def encoder(self) -> Encoder:
        return self.checkpoint.encoder(self.recipe)

    def require_base(self) -> None:
        """Raise RecipeError where an adapter is laid on other weights than it was trained on."""
        if self.adapter and self.contract and not self.any_base:
            self.contract.refuse_another_base(self.name, self.checkpoint)

    def load(
        self,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        lay: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    ) -> PreTrainedModel:
        """The model in evaluation mode, on the GPU where there is one; `lay` lays more on it than its own adapter.

        Raises RecipeError.
        """
        self.require_base()
        model = load_model(self.checkpoint, self.recipe, self.head, dtype or working_dtype())
        if self.head is None:
            model.generation_config = GenerationConfig(**stops(self.checkpoint, self.encoder))
        if self.adapter:
            model = lay(model) if lay else load_adapter(model, str(self.adapter))
        if not self.recipe.quantized:
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return model.eval()


def open_trained(name: str | Path, overrides: Sequence[str] = (), bits: int | None = None) -> Trained:
    """Open the small files of a run, of its checkpoint, of an adapter or of a model, here or on the hub.

    `overrides` change the recipe it was trained by, and model.any_base=true lets the base be saved another way; `bits`
    are those of its frozen weights, 4 or 16: else those it was trained on. Raises RecipeError, also where prompts or
    pictures would come to something else than in training.
    """
    if bits not in (None, 4, 16):
        raise RecipeError(f"bits: expected 4 or 16, found {bits}\n  Leave it out to take those of training.")
    given = {key: text for key, _, text in (word.partition("=") for word in overrides)}
    _refuse_ineffective(given)
    any_base = _says_any_base(given)
    folder, recipe = _found(str(name), [word for word in overrides if word.partition("=")[0] != ANY_BASE], given)
    contract = read_contract(folder)
    adapter = folder if (folder / CONFIG).is_file() else None
    if adapter is None:
        itself = recipe.model if contract is None and not is_run(name) else _itself(str(name), folder, given)
        recipe = recipe.model_copy(update={"model": itself})
        _refuse_a_base(str(name), given)
        bits = bits or 16
    quantized, recipe = recipe.quantized, _in_bits(recipe, bits)
    if adapter and "/" not in (base := recipe.model.name) and base != "tiny" and not Path(base).is_dir():
        raise RecipeError(
            f"{name}: was trained on a folder called {base or '(nothing)'}\n  Add model=FOLDER, where it is."
        )
    checkpoint = open_checkpoint(recipe.model)
    if adapter:
        source = adapter if Path(name).exists() else name  # of one on the hub, the weights are fetched here
        adapter = find_adapter(str(source), base=None if contract or any_base else recipe.model)
        if (adapter / TOKENIZER[0]).is_file() and resized(adapter, read_settings(adapter / CONFIG)):
            checkpoint = replace(checkpoint, tokenizer=read_tokenizer(adapter))
    head, recipe = _head(str(name), recipe, checkpoint, adapter)
    found = Trained(str(name), recipe, checkpoint, adapter, contract, head, any_base)
    if contract:
        contract.refuse_contradictions(str(name), adapter is not None, recipe, quantized)
        contract.refuse_others(str(name), checkpoint, found.encoder)
    return found


def is_run(name: str | Path) -> bool:
    """Whether it is a run's folder."""
    return (Path(name) / RECIPE).is_file()


def _refuse_ineffective(given: Mapping[str, str]) -> None:
    for key in given:
        if not any(key == taken or key.startswith(f"{taken}.") for taken in TAKEN):
            remedy = f"Set only {', '.join(TAKEN)}: the rest is as it was trained."
            raise RecipeError(f"{key}: has no effect on what is trained already\n  {remedy}")


def _refuse_a_base(name: str, given: Mapping[str, str]) -> None:
    """A model is its own base; of one on the hub, there may be several revisions."""
    for key in given:
        if key in ("model", "model.name") or (key == REVISION and Path(name).exists()):
            raise RecipeError(f"{key}: has no effect on {name}, a model with no adapter beside it\n  Leave it out.")


def _says_any_base(given: Mapping[str, str]) -> bool:
    said = load_yaml(given.get(ANY_BASE, "false"))
    if not isinstance(said, bool):
        raise RecipeError(f"{ANY_BASE}: expected true or false, found {said!r}")
    return said


def _found(name: str, overrides: Sequence[str], given: Mapping[str, str]) -> tuple[Path, Recipe]:
    """The folder of what was trained, and its recipe: a run's, its contract's, or what can be told without either."""
    path = Path(name)
    if is_run(path):
        done = next((path / kind for kind in ("adapter", "model") if (path / kind).is_dir()), None)
        if done is None:
            remedy = "Train it to its end, `mantis-lite train`, or name one of its checkpoints."
            raise RecipeError(f"{name}: the run is not finished\n  {remedy}")
        if not _of_captions(path):
            return done, load_recipe(path / RECIPE, overrides)
        name = str(done)
    elif is_run(path.parent) and path.is_dir():
        if not any((path / file).is_file() for file in (CONFIG, NAME)):
            raise RecipeError(f"{name}: a checkpoint of a full fine-tune\n  Train it to its end: mantis-lite train.")
        if not _of_captions(path.parent):
            return path, load_recipe(path.parent / RECIPE, overrides)
    folder = tiny.CHECKPOINT if name == "tiny" else _small_files(name, given)
    contract, settings = read_contract(folder), dict(UNNAMED)
    if contract:
        settings = contract.recipe | {"run_dir": "none"}
        try:
            make_recipe(settings)
        except RecipeError as error:
            found = one_line(error)
            remedy = "Take it as it was written, or a newer mantis_lite."
            raise RecipeError(f"{folder / NAME}: its recipe cannot be used: {found}\n  {remedy}") from None
        if contract.task == "pretrain":  # brought up on captions, it is asked in turns
            settings |= {"task": "chat", "prompt": {}, "model": contract.base.name}
    elif (folder / CONFIG).is_file():
        adapter = read_settings(folder / CONFIG)
        base = {"name": adapter.get("base_model_name_or_path") or "", "revision": adapter.get("revision")}
        settings |= {"model": base} | (SCORES if adapter.get("task_type") == "SEQ_CLS" else {})
    else:
        head = (folder / "config.json").is_file() and has_head(read_small(folder / "config.json"))
        settings |= {"model": name} | (SCORES if head else {})
    if {"model", "model.name"} & given.keys():
        settings |= {"model": {}}  # another base, with a revision of its own
    return folder, make_recipe(settings, overrides, name)


def _of_captions(run: Path) -> bool:
    """Whether a run is of task=pretrain: then it is the model's contract that says how it is used."""
    return load_recipe(run / RECIPE).task == "pretrain"


def _small_files(name: str, given: Mapping[str, str]) -> Path:
    """What tells an adapter from a model, here or on the hub; of a model, at the revision that is asked for."""
    wanted = [CONFIG, NAME, "config.json"]
    folder = find_folder("model", name, None, wanted)
    revision = given.get(REVISION)
    if revision and not Path(name).is_dir() and not (folder / CONFIG).is_file():
        folder = find_folder("model", name, revision, wanted)
    return folder


def _itself(name: str, folder: Path, given: Mapping[str, str]) -> ModelRecipe:
    """A model that was trained, as what is to be opened; its recipe names the base it came from."""
    if Path(name).exists():
        return ModelRecipe(name=str(folder))
    return ModelRecipe(name=name, revision=given.get(REVISION))


def _in_bits(recipe: Recipe, bits: int | None) -> Recipe:
    if bits is None or (bits == 4) == bool(recipe.quantized):
        return recipe
    memory = recipe.memory.model_copy(update={"quantize": None})
    return recipe.model_copy(update={"method": "qlora" if bits == 4 else "lora", "memory": memory})


def _head(
    name: str, recipe: Recipe, checkpoint: Checkpoint, adapter: Path | None
) -> tuple[PreTrainedConfig | None, Recipe]:
    """The config of a score head, where the task has one, and the recipe with the labels that it states."""
    if recipe.task != "classify":
        return None, recipe
    stated = read_config(adapter) if adapter else checkpoint.config
    labels, tokens = labels_of(stated, recipe.head, name), getattr(stated, "score_token_ids", None)
    head = {"labels": list(labels.names), "score": "special_tokens" if tokens else "last_token"}
    recipe = recipe.model_copy(update={"head": recipe.head.model_copy(update=head)})
    return with_head(checkpoint.config, labels, score_token_ids=tokens or ()), recipe
