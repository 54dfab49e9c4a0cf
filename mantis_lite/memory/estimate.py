"""A recipe, a model's config and its largest pack -> bytes of a step's peak, by what they are for."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..models.adapters import HEAD, make_trainable, part_of
from ..models.family import LLAMA_LAYERS, Family
from ..models.head import classifier_of
from ..models.llava import LLAVA
from ..models.precision import in_float32
from ..recipe import Recipe
from .ledger import BLOCK
from .rehearsal import rehearse
from .shares import gathered, held, on_host, standing, stepping
from .standins import Packed
from .standins import pack as in_4_bits
from .step import Machine, Pack

GIB = 1 << 30

CONTEXT = 610 << 20
"""What a process takes of a card before its first tensor: an idle one beside the run on an H100 held so much
(benchmarks/results/gpu_step_idefics2.json)."""

SEGMENT = 20 << 20
"""The allocator asks the card for this much at a time for middling tensors (kLargeBuffer), and splits it."""

UNFILLED = 0.03
"""The share of what comes and goes that lies in gaps between tensors. An assumption: on an H200 with room to spare the
allocator held 0.1 to 0.6 GiB beyond tensors whatever came and went, and more with offloading
(benchmarks/results/gpu.json); what it needs on a card that is almost full was not measured."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of a GPU at the peak of a step, by term; `allocated` are the tensors', `total` those of the card."""

    terms: dict[str, int]
    gpu: bool
    host: int = 0
    """Bytes of the host's memory that hold, for this GPU, what was put off it."""

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated would say."""
        return sum(self.terms.values())

    @property
    def overhead(self) -> dict[str, int]:
        """What a GPU takes on top of tensors."""
        if not self.gpu:
            return {}
        passing = sum(size for term, size in self.terms.items() if not term.startswith(("weights", "optimizer")))
        return {"CUDA context": CONTEXT, "gaps between tensors": int(passing * UNFILLED) + SEGMENT}

    @property
    def total(self) -> int:
        return self.allocated + sum(self.overhead.values())


def estimate(
    config: PreTrainedConfig, recipe: Recipe, pack: Pack, machine: Machine, family: Family | None = None
) -> Estimate:
    """The peak of a training step, on one of its GPUs. A plain decoder's `config` comes without a `family`.

    A stack's layers are alike, so weights, and all that is alive in a phase of the step, grow by as much with each:
    shallow models tell of a deep one.
    """
    deep = {name: depth for name, depth in _stacks(config, machine).items() if depth > SHALLOW + 1}
    low = dict.fromkeys(deep, SHALLOW)
    walked = walk(with_depths(config, low), recipe, pack, machine, family)
    peaks = {phase: terms.copy() for phase, terms in walked.items()}
    for name, depth in deep.items():
        with_one_more = walk(with_depths(config, low | {name: SHALLOW + 1}), recipe, pack, machine, family)
        for phase, less in walked.items():
            more = with_one_more[phase]
            for term in more | less:
                peaks[phase][term] += (more[term] - less[term]) * (depth - SHALLOW)
    if not machine.sharded:
        return Estimate(dict(most(peaks)), machine.gpu)
    whole = build(config, recipe, machine, family)
    for terms in peaks.values():
        terms["whole weights for a while"] = gathered(whole, machine, family)
    peaks["optimizer"] = stood(whole, recipe, machine, family)
    peaks["optimizer"]["gradients, handed to the optimizer"] = stepping(whole, machine)
    return Estimate(dict(most(peaks)), machine.gpu, on_host(whole, machine))


SHALLOW = 2
"""Layers of a stack in the model that is walked through for a deep one, beside one with a layer more."""


def _stacks(config: PreTrainedConfig, machine: Machine) -> dict[str, int]:
    """Depths of the language model and of the tower, as far as fewer layers tell of them.

    They do not where only some are checkpointed, or feed the language model beside the last.
    """
    if machine.checkpointed:
        return {}
    found = {"text": config.get_text_config().num_hidden_layers}
    tower = getattr(config, "vision_config", None)
    if tower is not None and not getattr(tower, "deepstack_visual_indexes", None):
        found["tower"] = getattr(tower, _depth_key(tower))
    return found


def _depth_key(tower: PreTrainedConfig) -> str:
    return "depth" if hasattr(tower, "depth") else "num_hidden_layers"


def with_depths(config: PreTrainedConfig, depths: Mapping[str, int]) -> PreTrainedConfig:
    """The config with so many layers in its stacks, "text" and "tower"."""
    config = deepcopy(config)
    if "tower" in depths:
        setattr(config.vision_config, _depth_key(config.vision_config), depths["tower"])
    if "text" in depths:
        text = config.get_text_config()
        text.num_hidden_layers = depths["text"]
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: depths["text"]]
    return config


def walk(
    config: PreTrainedConfig, recipe: Recipe, pack: Pack, machine: Machine, family: Family | None = None
) -> dict[str, Counter[str]]:
    """Bytes by term at the peak of each phase of a step, the model being walked through as deep as `config` says."""
    model = build(config, recipe, machine, family)
    always = stood(model, recipe, machine, family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {phase: always + passing for phase, passing in rehearse(model, machine, pack).items()}


def stood(model: nn.Module, recipe: Recipe, machine: Machine, family: Family | None) -> Counter[str]:
    """Bytes by term that are there at all times."""
    found = Counter(dict(weights(model, family, machine))) + standing(model, machine, family)
    if not machine.sharded:
        found["optimizer"] = sum(optimizer_bytes(recipe.memory.optimizer, model, machine))
    return found


def most(peaks: dict[str, Counter[str]]) -> Counter[str]:
    """The phase in which most is alive."""
    return +max(peaks.values(), key=lambda terms: terms.total())


def build(config: PreTrainedConfig, recipe: Recipe, machine: Machine, family: Family | None) -> nn.Module:
    """The model as it trains, on the meta device: parts in 4 bits, frozen, adapted."""
    recipe = recipe.model_copy(
        update={
            "lora": recipe.lora.model_copy(update={"init": "default"}),  # the others go by the weights' numbers
            "model": recipe.model.model_copy(update={"adapter": None}),
        }
    )
    labels = max(1, len(recipe.head.labels or ())) if recipe.task == "classify" else None
    model = bare(config, torch.float32 if in_float32(recipe) else machine.dtype, family, labels)
    said = family or DECODER
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in ("lm_head", HEAD) and part_of(name, said) in recipe.quantized:
            in_4_bits(module, machine.dtype)
    model.is_loaded_in_4bit = bool(recipe.quantized)  # type: ignore[assignment]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_trainable(model, recipe, said)


def bare(
    config: PreTrainedConfig, dtype: torch.dtype, family: Family | None = None, labels: int | None = None
) -> PreTrainedModel:
    """A config's model on the meta device, without weights; with a head of so many scores where `labels` says so."""
    config = deepcopy(config)
    with torch.device("meta"), no_init_weights():
        if labels is not None:
            config.num_labels = labels
            model = classifier_of(config)._from_config(config, dtype=dtype)
        else:
            kind = AutoModelForImageTextToText if family else AutoModelForCausalLM
            model = kind.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


DECODER = replace(LLAVA, parts={"language_model": ("model",)}, targets={"language_model": LLAMA_LAYERS})
"""What is to be said of a decoder without pictures."""


def counts(model: nn.Module, family: Family) -> Counter[str]:
    """Parameters by part, tied ones once."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        found[part_of(name, family)] += parameter.numel()
    return found


def weights(model: nn.Module, family: Family | None, machine: Machine) -> Iterator[tuple[str, int]]:
    """Bytes of weights by part and precision; those of adapters apart."""
    sizes: Counter[str] = Counter()
    owners = {id(module.weight): module for module in model.modules() if isinstance(module, Packed)}
    block = BLOCK if machine.gpu else 1
    for name, parameter in model.named_parameters():
        if family and part_of(name, family) in machine.cached and not parameter.requires_grad:
            continue  # on the host
        part = (part_of(name, family) if family else "language_model").replace("_", " ")
        if ".lora_" in name or ".modules_to_save." in name or "trainable_tokens" in name:
            sizes["weights: adapters"] += _round(held(parameter.numel(), machine) * machine.trained.itemsize, block)
        elif id(parameter) in owners:
            sizes[f"weights: {part}, 4 bits"] += nf4_bytes(parameter.numel(), block)
        else:
            width = (machine.trained if parameter.requires_grad else parameter.dtype).itemsize
            kind = "float32" if width == 4 else "16 bits"
            sizes[f"weights: {part}, {kind}"] += _round(held(parameter.numel(), machine) * width, block)
    yield from sizes.items()


def nf4_bytes(count: int, block: int = 1) -> int:
    """Bytes of a weight of so many numbers as bitsandbytes stores it: nf4 in blocks of 64, doubly quantised.

    Half a byte a number; a byte a block for its scale; a float32 for each 256 of these, and tables.
    """
    blocks = -(-count // 64)
    tables = 4 * 256 + 4 * 16 + 4  # the scales' code, nf4's own, the scales' mean
    return _round(-(-count // 2), block) + _round(blocks, block) + _round(4 * -(-blocks // 256), block) + tables


def optimizer_bytes(name: str, model: nn.Module, machine: Machine) -> Iterator[int]:
    """Bytes on the card of each trained parameter's state, where a GPU holds all of it.

    AdamW has two float32. bitsandbytes' in 8 bits has two bytes and two float32 a block of 256, but two float32 where
    there are fewer than 4,096 numbers, and for embeddings (transformers' Trainer). Paged states lie on the host.
    """
    words = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    block = BLOCK if machine.gpu else 1
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        count = parameter.numel()
        small = "8bit" in name and count >= 4096 and id(parameter) not in words
        if name.startswith("paged") and count >= 100_000:
            yield 2 * _round(4 * -(-count // 256), block) if small else 0
        elif small:
            yield 2 * (_round(count, block) + _round(4 * -(-count // 256), block))
        elif name == "sgd":
            yield 0
        else:
            yield 2 * _round(machine.trained.itemsize * count, block)


def _round(size: int, block: int) -> int:
    return -(-size // block) * block
