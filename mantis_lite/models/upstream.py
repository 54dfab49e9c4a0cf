"""Adapters trained with the original code, in the names of today's transformers.

TIGER-AI-Lab/Mantis names tensors as its models of transformers 4.45 do: language_model.model.layers, and so on. What
each is called today transformers itself knows, since published checkpoints have the old names too. How PEFT spells
LoRA and DoRA has not changed. It would load these as well, but says nothing of a tensor that finds no place.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..errors import RecipeError
from .adapter_config import PREFIX, check_tensors, read_settings
from .weights import open_tensors

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

WHOLE = "non_lora_trainables.bin"
"""Parameters of the base model that were trained beside the adapter; the original writes the file empty as well."""

NEVER_SET = ("modules_to_save", "rank_pattern", "alpha_pattern")
"""Settings that the original code leaves alone; the names in them would have to be translated too."""

AGAIN = "Copy it again from where it was trained."
MERGE = "Merge it into its base with the versions it was trained with, and start from that."

Shapes = Mapping[str, tuple[Any, ...]]


def is_upstream(folder: Path, model: PreTrainedModel) -> bool:
    """Whether an adapter is named as the original code names it, not as the loaded model. Raises RecipeError.

    A pickle is taken for the original's without a look inside: nothing here writes one.
    """
    file = _weights(folder)
    if file.name == PICKLED or (folder / WHOLE).exists():
        return True
    rename = renaming(model)
    return any(rename(key) != key.removeprefix(PREFIX) for key in open_tensors(file).keys())


def check_files(folder: Path, import_pickle: bool = False) -> None:
    """Refuse an adapter that its files show cannot be loaded, of the original code or not. Raises RecipeError."""
    settings = read_settings(folder / CONFIG)
    for file in (_weights(folder), folder / WHOLE):
        if file.name == WEIGHTS:
            check_tensors(file, settings)
        elif file.exists() and not import_pickle:
            raise _unasked(file)


def convert(source: Path, target: Path, model: PreTrainedModel, import_pickle: bool = False) -> None:
    """Write an adapter of the original code so that PEFT loads every tensor of it on `model`, a loaded base model.

    Parameters trained beside the adapter become modules_to_save, filled up from the model. Pickles are read only with
    `import_pickle`, and never run. Raises RecipeError where a tensor has no place, or is not what belongs there.
    """
    config, file, whole = _config(source / CONFIG), _weights(source), source / WHOLE
    base = f"Set model to the one it was trained from, {config.get('base_model_name_or_path')}."
    shapes = _adapter_shapes(model, config)
    adapter = _placed(file, _read(file, import_pickle), model, shapes, base)
    layers = sorted({name.partition(".lora_")[0] for name in adapter})
    wanted = [name for name in shapes if name.partition(".lora_")[0] in layers]
    _refuse(file, [name for name in wanted if name not in adapter], len(wanted), "tensors are missing", AGAIN)
    modules, full = _whole(whole, _read(whole, import_pickle), model, layers, base) if whole.exists() else ([], {})
    # Every adapted layer by its full name, so what narrows the choice is needed no more.
    config |= dict.fromkeys({"layers_to_transform", "layers_pattern", "exclude_modules"} & config.keys())
    config |= {"target_modules": "|".join(map(re.escape, layers)), "modules_to_save": modules or None}
    saved = {PREFIX + name: value.detach().cpu().contiguous() for name, value in (full | adapter).items()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(saved, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _config(file: Path) -> dict[str, Any]:
    """The settings of an adapter of the original code, without those that are no longer known."""
    config = read_settings(file)
    if found := [key for key in NEVER_SET if config.get(key)]:
        raise RecipeError(f"{file}: {found[0]} is {config[found[0]]}; the original code never sets it\n  {MERGE}")
    return config


def _weights(folder: Path) -> Path:
    """The file of an adapter's tensors; as in PEFT, safetensors go before a pickle."""
    for file in (folder / WEIGHTS, folder / PICKLED):
        if file.is_file():
            return file
    raise RecipeError(f"{folder}: has no {WEIGHTS}\n  Name a folder with an adapter, as PEFT saves it.")


def _read(file: Path, import_pickle: bool) -> dict[str, Tensor]:
    if file.name == WEIGHTS:
        opened = open_tensors(file)
        return {key: opened.get_tensor(key) for key in opened.keys()}
    if not import_pickle:
        raise _unasked(file)
    try:
        tensors = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError) as error:
        raise RecipeError(
            f"{file}: is damaged, or holds more than tensors ({type(error).__name__}); nothing in it was run\n  {AGAIN}"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise RecipeError(f"{file}: is no dict of tensors\n  {AGAIN}")
    return {key: value.clone() for key, value in tensors.items()}  # safetensors refuse tensors that share memory


def _unasked(file: Path) -> RecipeError:
    return RecipeError(
        f"{file}: is a pickle, as the original code writes them\n  Pass --import-upstream to read its tensors."
    )


def renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """What a published tensor is called in the loaded model, without PEFT's prefix; today's names stay."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return lambda key: rename_source_key(key.removeprefix(PREFIX), renamings, [])[0]


def _adapter_shapes(model: PreTrainedModel, config: Mapping[str, Any]) -> Shapes:
    """All tensors an adapter with these settings might have on this model, 4-bit layers included."""
    shapes: dict[str, tuple[Any, ...]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            shapes[f"{name}.lora_A.weight"] = (config.get("r"), layer.in_features)
            shapes[f"{name}.lora_B.weight"] = (layer.out_features, config.get("r"))
            if config.get("use_dora"):
                shapes[f"{name}.lora_magnitude_vector"] = (layer.out_features,)
    return shapes


def _placed(
    file: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel, shapes: Shapes, base: str
) -> dict[str, Tensor]:
    """Tensors by today's names: each known, named once, of its shape and in numbers. Only WHOLE may be empty."""
    if not tensors and file.name != WHOLE:
        raise RecipeError(f"{file}: holds no tensors\n  {AGAIN}")
    rename, of = renaming(model), len(tensors)
    names = {key: rename(key) for key in tensors}
    often = Counter(names.values())
    lost = [key for key, name in names.items() if name not in shapes]
    _refuse(file, lost, of, f"tensors have no place in this {model.config.model_type} model", base)
    twice = [key for key, name in names.items() if often[name] > 1]
    _refuse(file, twice, of, "tensors are there by old and by new name", AGAIN)
    pairs = {key: (list(value.shape), list(shapes[names[key]])) for key, value in tensors.items()}
    wrong = [f"{key} {found} for {wanted}" for key, (found, wanted) in pairs.items() if found != wanted]
    _refuse(file, wrong, of, "tensors have the wrong shape", base)
    odd = [key for key, value in tensors.items() if not (value.is_floating_point() and value.isfinite().all())]
    _refuse(file, odd, of, "tensors are not finite", "Its training diverged: take an earlier checkpoint.")
    return {name: tensors[key] for key, name in names.items()}


def _whole(
    file: Path, tensors: Mapping[str, Tensor], model: PreTrainedModel, layers: Collection[str], base: str
) -> tuple[list[str], dict[str, Tensor]]:
    """The modules that were trained in full, and all their tensors: PEFT replaces a whole module."""
    known, rename = dict(model.named_parameters(remove_duplicate=False)), renaming(model)
    packed = [name for name, weight in known.items() if hasattr(weight, "quant_state")]
    owned = {key: f"{rename(key).rpartition('.')[0]}." for key in tensors}
    held = [key for key, owner in owned.items() if any(name.startswith(owner) for name in packed)]
    _refuse(file, held, len(tensors), "tensors belong to modules loaded in 4 bits", "Load the model unquantized.")
    given = _placed(file, tensors, model, {name: tuple(weight.shape) for name, weight in known.items()}, base)
    owners = {name.rpartition(".")[0] for name in given}
    modules = [name for name in sorted(owners) if not any(name.startswith(f"{other}.") for other in owners)]
    often = Counter(map(id, known.values()))
    tied = [name for name in given if often[id(known[name])] > 1]
    _refuse(file, tied, len(given), "tensors are tied to another module's, where PEFT replaces one", MERGE)
    both = [layer for layer in layers if any(f"{layer}.".startswith(f"{module}.") for module in modules)]
    _refuse(file, both, len(layers), f"layers adapted in {WEIGHTS} lie in modules trained whole", MERGE)
    filled = {f"{name}.{key}": v for name in modules for key, v in model.get_submodule(name).state_dict().items()}
    return modules, filled | given


def _refuse(file: Path, keys: Collection[str], of: int, found: str, remedy: str) -> None:
    if keys:
        raise RecipeError(f"{file}: {len(keys)} of {of} {found}, first {next(iter(keys))}\n  {remedy}")
