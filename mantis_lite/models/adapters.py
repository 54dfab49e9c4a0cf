"""What trains: LoRA on the parts that take an adapter, whole parts in full, everything else frozen."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..errors import RecipeError, one_line
from ..recipe import LoraRecipe, ModelRecipe, Part, Recipe, Training
from .adapter_config import read_settings
from .checkpoint import find_folder, public_name
from .family import Family
from .upstream import CONFIG, PICKLED, WEIGHTS, WHOLE, check_files, convert, is_upstream
from .weights import open_tensors

HEAD = "score"
"""The module of a score head, which always learns, whole and in float32."""


BESIDE = ("config.json", "tokenizer.json", "mantis_lite.json", "chat_template.jinja")
"""What may lie beside an adapter: the config and tokens of its score head, and its contract."""


class PartSize(NamedTuple):
    """Parameters of a part: in all, those that train, and those that are held in 4 bits."""

    part: str
    parameters: int
    trainable: int
    quantized: int


def make_trainable(
    model: PreTrainedModel, recipe: Recipe, family: Family, import_upstream: bool = False
) -> PreTrainedModel | PeftModel:
    """Freeze, lay on adapters and unfreeze, as the recipe says part by part.

    With `model.adapter` that adapter is what trains, by its own settings; `import_upstream` allows the pickles of the
    original code to be read. Raises RecipeError.
    """
    parts = {part: recipe.part(part) for part in family.parts}
    tower = [model.get_submodule(path) for path in _own(model, family, "vision_tower")]
    model.requires_grad_(False)
    if recipe.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_is_head(name) or parts[part_of(name, family)] == "full")
    elif recipe.model.adapter:
        model = load_adapter(model, recipe.model.adapter, import_upstream, recipe.model)
    else:
        model = get_peft_model(model, lora_config(model, family, parts, recipe.lora, recipe.model.revision))
    for module in tower:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            _without_autograd(module)
    return model


def base_of(model: nn.Module) -> Any:
    """The model within its adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def load_adapter(
    model: PreTrainedModel | PeftModel,
    name: str,
    import_upstream: bool = False,
    base: ModelRecipe | None = None,
    called: str = "default",
    first_values: bool = True,
) -> PeftModel:
    """An adapter of a folder or the hub on its base, every tensor in its place; the original code's names too.

    `base` is what the model is to the recipe, if it may be another than the adapter's; `called` tells it from others
    that are laid on the model. Without `first_values` those of PiSSA and OLoRA are not taken off the model's weights.
    Raises RecipeError where a tensor is left over or missing: PEFT would go on with an adapter that is not there.
    """
    source = find_adapter(name, import_upstream, base)
    plain = base_of(model)
    kind, remedy = plain.config.model_type, "Set model to the base it was trained from."
    with TemporaryDirectory() as folder:
        if is_upstream(source, plain):
            convert(source, Path(folder), plain, import_upstream)
            source = Path(folder)
        try:
            config = LoraConfig(**read_settings(source / CONFIG) | {"inference_mode": False})
            if not first_values:
                config.init_lora_weights = True
            if rows := resized(source, config.to_dict()):
                _resize(plain, rows)
            if hasattr(plain, HEAD) and HEAD not in (config.modules_to_save or ()):
                raise RecipeError(
                    f"model.adapter: {name} has no score head, so it is not one of task=classify\n"
                    "  Name one that is, or merge it into its base and start from that."
                )
            if isinstance(model, PeftModel):
                adapted = model
                adapted.add_adapter(called, config)
            else:
                adapted = get_peft_model(model, config, called)
            for weight in adapted.parameters():
                if weight.requires_grad:  # a stand-in's, which takes no room, cannot be written to
                    weight.data = weight.data.contiguous()
            found = adapted.load_adapter(source, called, is_trainable=True)
        except (torch.OutOfMemoryError, RecipeError):
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # PEFT's own are of all kinds
            fault = f"{name} does not fit this {kind}: {one_line(error)}"
            raise RecipeError(f"model.adapter: {fault}\n  {remedy}") from None
    for fault, keys in (("have no place in", found.unexpected_keys), ("are missing for", found.missing_keys)):
        if keys:
            first = f"first {keys[0]}"
            raise RecipeError(f"model.adapter: {len(keys)} tensors of {name} {fault} this {kind}, {first}\n  {remedy}")
    trained = [(key, weight) for key, weight in adapted.named_parameters() if weight.requires_grad]
    if odd := [key for key, weight in trained if not weight.isfinite().all()]:
        found_odd = f"{len(odd)} tensors of {name} are not finite, first {odd[0]}"
        raise RecipeError(f"model.adapter: {found_odd}\n  Its training diverged: take an earlier checkpoint.")
    return adapted


def find_adapter(name: str, import_upstream: bool = False, base: ModelRecipe | None = None) -> Path:
    """The folder of an adapter, here or from the hub, refused where its files tell that it cannot be loaded.

    Raises RecipeError, also where it was trained on another model than `base`; needs no model, so that a run can be
    refused before anything is touched.
    """
    folder = find_folder("model.adapter", name, None, [CONFIG, WEIGHTS, PICKLED, WHOLE, *BESIDE])
    check_files(folder, import_upstream)
    if base is not None and not base.any_base:
        _refuse_another_base(name, read_settings(folder / CONFIG), base)
    return folder


def resized(folder: Path, settings: Mapping[str, Any]) -> int:
    """The rows that an adapter brings of the embeddings, where it brings them whole; 0 where it does not."""
    modules = {module.rpartition(".")[2] for module in settings.get("modules_to_save") or ()}
    if not {"embed_tokens", "lm_head"} & modules:
        return 0
    with open_tensors(folder / WEIGHTS) as opened:
        whole = [key for key in opened.keys() if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
        return max((opened.get_slice(key).get_shape()[0] for key in whole), default=0)


def _resize(model: PreTrainedModel, rows: int) -> None:
    """Give the model as many words as the adapter was trained with; those of its own keep their numbers."""
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _refuse_another_base(name: str, settings: Mapping[str, Any], base: ModelRecipe) -> None:
    """An adapter says on what it was trained: a name on the hub, or a folder, of which the last name alone counts."""
    own = public_name(base.name)
    trained_on, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    on_hub = all(re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) for model in (own, trained_on))
    either = "or, if that is the same model, model.any_base=true."
    if trained_on and (trained_on != own if on_hub else Path(trained_on).name != Path(own).name):
        raise RecipeError(
            f"model.adapter: {name} was trained on {trained_on}, and model is {own}\n  Set model={trained_on}; {either}"
        )
    if revision and revision != (base.revision or "main"):
        found = (
            f"{name} was trained on revision {revision} of its base, and model.revision is {base.revision or 'main'}"
        )
        raise RecipeError(f"model.adapter: {found}\n  Set model.revision={revision}; {either}")


def lora_config(
    model: PreTrainedModel,
    family: Family,
    parts: Mapping[Part, Training],
    lora: LoraRecipe,
    revision: str | None = None,
) -> LoraConfig:
    """PEFT's settings; target_modules is one regular expression anchored on each part that takes an adapter.

    A list of names would be matched by suffix, and so land in the vision tower as well (PEFT's rule).
    """
    linear = _linear_layers(model, family)
    adapted = [part for part, training in parts.items() if training == "adapter"]
    wanted = {part: [n for n in lora.target_modules or family.targets[part] if n in linear[part]] for part in adapted}
    found = {name for part in adapted for name in linear[part]}
    if missing := [name for name in lora.target_modules or () if name not in found]:
        raise RecipeError(
            f"lora.target_modules: the {' and '.join(adapted)} has no linear layer {', '.join(missing)}\n"
            f"  It has {', '.join(sorted(found))}."
        )
    targets = [_target(model, family, part, path, wanted[part]) for part in adapted for path in family.parts[part]]
    scores = hasattr(model, HEAD)
    whole = [path for part, how in parts.items() if how == "full" for path in _own(model, family, part)]
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        target_modules="|".join(filter(None, targets)) or None,
        modules_to_save=[*whole, HEAD] if scores else whole or None,
        # The labels' own tokens are new to the model: of the embeddings, theirs alone learn.
        trainable_token_indices=getattr(model.config, "score_token_ids", None),
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        revision=revision,
    )


def part_of(name: str, family: Family) -> Part:
    """The part of a parameter or module, by its name in the model or under PEFT; lm_head is the language model's."""
    for part in ("projector", "vision_tower"):  # a projector may lie within the tower
        if any(f"{path}." in f"{name}." for path in family.parts.get(part, ())):
            return part
    return "language_model"


def in_4_bits(parameter: torch.Tensor) -> bool:
    """Whether bitsandbytes packs several weights into each of a parameter's numbers, whatever kind these are."""
    return hasattr(parameter, "quant_state")


def _is_head(name: str) -> bool:
    return HEAD in name.split(".")


def trained_parameters(model: nn.Module, family: Family) -> dict[str, list[nn.Parameter]]:
    """The parameters that train, by part."""
    found: defaultdict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[_part_or_head(name, family)].append(parameter)
    return dict(found)


def part_sizes(model: nn.Module, family: Family) -> list[PartSize]:
    """How many parameters each part has, and how many of them train."""
    sizes: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT keeps what it trains a copy of
            continue
        packed = in_4_bits(parameter)
        count = parameter.numel() * (2 * parameter.element_size() if packed else 1)  # two weights in a byte
        part = _part_or_head(name, family)
        sizes[part][0] += count
        sizes[part][1] += count if parameter.requires_grad else 0
        sizes[part][2] += count if packed else 0
    return [PartSize(part, *sizes[part]) for part in (*family.parts, "head") if part in sizes]


def _part_or_head(name: str, family: Family) -> str:
    return "head" if _is_head(name) else part_of(name, family)


def _own(model: PreTrainedModel, family: Family, part: Part) -> list[str]:
    """The modules that are the part's alone, as large as can be: a projector may lie within the tower."""
    modules = dict(model.named_modules())
    others = {path for other, paths in family.parts.items() if other != part for path in paths}

    def split(path: str) -> list[str]:
        module = modules.get(path)
        if module is None or path in others or next(module.parameters(), None) is None:
            return []
        # PEFT saves what has a forward of its own, which a list of modules has not.
        if isinstance(module, nn.ModuleList) or any(other.startswith(f"{path}.") for other in others):
            return [name for child, _ in module.named_children() for name in split(f"{path}.{child}")]
        return [path]

    return [name for path in family.parts.get(part, ()) for name in split(path)]


def _linear_layers(model: PreTrainedModel, family: Family) -> dict[Part, set[str]]:
    """The last names of each part's linear layers; lm_head and a score head are none of them."""
    layers: dict[Part, set[str]] = {part: set() for part in family.parts}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in ("lm_head", HEAD):
            layers[part_of(name, family)].add(name.rpartition(".")[2])
    return layers


def _target(model: PreTrainedModel, family: Family, part: Part, path: str, names: list[str]) -> str:
    module = dict(model.named_modules()).get(path)
    if not names or module is None:  # within a family, one model may lack what another has
        return ""
    if isinstance(module, nn.Linear):
        return re.escape(path)
    layers = family.tower_layers(model.config) if part == "vision_tower" else ""
    return rf"{re.escape(path)}\.{layers}(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def _without_autograd(module: nn.Module) -> None:
    """Run a frozen part of the tower without recording: checkpointing would make its inputs need gradients."""
    module.forward = torch.no_grad()(module.forward)
