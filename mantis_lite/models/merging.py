"""Adapters laid on stand-ins for a base's weights, and what they make of the real ones, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from math import isfinite
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ..errors import RecipeError, one_line
from ..recipe import Part
from .adapter_config import read_settings
from .adapters import HEAD, load_adapter, part_of
from .family import Family
from .head import classifier_of
from .upstream import CONFIG, renaming
from .weights import open_tensors

ALONE = "default"
"""What PEFT calls a model's only adapter."""
OF_THE_BASE = ("pissa", "olora")
"""First values that are taken from the base's weights, and taken off them."""


def stand_in(config: PreTrainedConfig, scores: bool) -> PreTrainedModel:
    """A model whose weights take no room: of the right shapes, in float32, and all 0."""
    config = deepcopy(config)  # which an adapter's words change
    with torch.device("meta"):
        model = classifier_of(config)(config) if scores else AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = nn.Parameter(torch.zeros(1).expand(weight.shape), requires_grad=False)
                module._parameters[name] = made.setdefault(id(weight), empty)
    return model


class Laid:
    """One adapter, or several that are combined by weight, on stand-ins for the weights of a base.

    Where `quantized` names parts, what is added to is what their weights are once they have been in 4 bits, from
    `dtype`. Raises RecipeError where adapters do not fit, or cannot be combined.
    """

    def __init__(
        self,
        plain: PreTrainedModel,
        family: Family,
        adapters: Sequence[tuple[str, float]],
        combine: str,
        quantized: Sequence[Part] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.family, self.quantized, self.dtype = family, quantized, dtype
        self.rename = renaming(plain)
        self.scores = hasattr(plain, HEAD)
        words, out = plain.get_input_embeddings(), plain.get_output_embeddings()
        self.tied = out is not None and out.weight is words.weight
        self.embeddings = next(name for name, module in plain.named_modules() if module is words)
        settings = read_settings(Path(adapters[0][0]) / CONFIG)
        self.first = settings.get("init_lora_weights")
        plain.name_or_path = settings.get("base_model_name_or_path")
        self.model, self.adapter = combined(plain, adapters, combine, first_values=False)
        self.modules = dict(self.model.get_base_model().named_modules())
        kinds = (LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper)
        self.left = {name for name, module in self.modules.items() if isinstance(module, kinds)}
        """The layers of the adapter that have met no weight yet."""
        self.untied = False
        """Whether the words that come out have become others than those that go in, which the base has once."""

    @property
    def rows(self) -> int:
        """How many words the model has, with those that an adapter brings."""
        return self.model.get_base_model().get_input_embeddings().weight.shape[0]

    def merged(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a file of the base's weights, by their published names, with the adapter in them."""
        with open_tensors(file) as opened:
            for key in opened.keys():
                name, own = self.rename(key), opened.get_tensor(key)
                if name == "lm_head.weight" and (self.scores or self.tied):
                    continue  # a head takes its place, or the embeddings are what counts
                found = self.weight(name, own)
                yield key, found
                if self.tied and name == f"{self.embeddings}.weight":
                    out = self.weight("lm_head.weight", own)
                    if not torch.equal(out, found):
                        self.untied = True
                        yield self._published("lm_head.weight"), out

    def new(self) -> Iterator[tuple[str, Tensor]]:
        """What the adapter brings that the base has not: its score head. Raises RecipeError for what is left then."""
        if HEAD in self.left:
            saved = self.modules[HEAD].modules_to_save[self.adapter].state_dict()
            self.left.discard(HEAD)
            yield from ((f"{HEAD}.{name}", tensor.clone()) for name, tensor in saved.items())
        if self.left:
            first = f"first {min(self.left)}"
            raise RecipeError(
                f"merge: {len(self.left)} layers of the adapter have no weight in its base, {first}\n"
                "  Set model to the base it was trained from."
            )

    def weight(self, name: str, own: Tensor) -> Tensor:
        """What becomes of a weight of the base, by its name in the loaded model; of the same kind of numbers."""
        owner, _, leaf = name.rpartition(".")
        if (saved := self._saved(name)) is not None:
            return saved.to(own.dtype).clone()
        value = self._unpacked(own) if leaf == "weight" and self._in_4_bits(owner) else own
        module = self.modules.get(owner)
        if leaf != "weight" or not isinstance(module, LoraLayer | TrainableTokensWrapper):
            return value.to(own.dtype)
        self.left.discard(owner)
        layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        found = self._added(layer, value.float()).to(own.dtype)
        if not found.isfinite().all():
            raise RecipeError(
                f"merge: {name} is not finite in the {own.dtype} of the base\n"
                "  The adapter's numbers are too large: its training diverged. Take an earlier checkpoint."
            )
        return found

    def _added(self, layer: Any, value: Tensor) -> Tensor:
        """A layer's weight with its adapter in it, as PEFT merges it: once, in float32."""
        inner = layer.base_layer
        empty = inner.weight
        inner.weight = nn.Parameter(value, requires_grad=False)
        try:
            if isinstance(layer, LoraLayer):
                self._take_first_values_off(layer)
            layer.merge(safe_merge=True, adapter_names=[self.adapter])
        except ValueError as error:
            raise RecipeError(
                f"merge: {one_line(error)}\n  Its training diverged: take an earlier checkpoint."
            ) from None
        layer.merged_adapters.clear()
        found, inner.weight = inner.weight.data, empty
        return found

    def _take_first_values_off(self, layer: LoraLayer) -> None:
        """PiSSA and OLoRA start from the largest parts of a weight, and train on what is left of it."""
        if self.first not in OF_THE_BASE:
            return
        halves = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
        trained = [half.data.clone() for half in halves]
        if self.first == "pissa":
            layer.pissa_init(self.adapter, self.first)
        else:
            layer.olora_init(self.adapter)
        layer.lora_A[self.adapter].weight.data, layer.lora_B[self.adapter].weight.data = trained

    def _saved(self, name: str) -> Tensor | None:
        """A weight that the adapter holds whole, trained in place of the base's own."""
        for at in range(name.count("."), 0, -1):
            path, rest = ".".join(name.split(".")[:at]), ".".join(name.split(".")[at:])
            if isinstance(module := self.modules.get(path), ModulesToSaveWrapper):
                self.left.discard(path)
                return module.modules_to_save[self.adapter].state_dict()[rest]
        return None

    def _in_4_bits(self, owner: str) -> bool:
        """Whether training had a layer in 4 bits; the same choice as when it is loaded."""
        module = self.modules.get(owner)
        inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
        linear = isinstance(inner, nn.Linear) and not isinstance(inner, NonDynamicallyQuantizableLinear)
        return linear and owner not in ("lm_head", HEAD) and part_of(owner, self.family) in self.quantized

    def _unpacked(self, own: Tensor) -> Tensor:
        """What a weight is once it has been in 4 bits."""
        packed, state = bnb.quantize_4bit(
            own.to(self.dtype), compress_statistics=True, quant_type="nf4", quant_storage=self.dtype
        )
        return bnb.dequantize_4bit(packed, state)

    def _published(self, name: str) -> str:
        """How a name of the loaded model is published in this family."""
        found = [key for key in (name, f"language_model.{name}") if self.rename(key) == name]
        assert found, name
        return found[0]


def combined(
    plain: PreTrainedModel, adapters: Sequence[tuple[str, float]], combine: str, first_values: bool = True
) -> tuple[PeftModel, str]:
    """A model with one adapter that several make by their weights, and its name; PEFT's `add_weighted_adapter`.

    `first_values` as in `load_adapter`. Raises RecipeError.
    """
    model: PreTrainedModel | PeftModel = plain
    names = [ALONE, *(f"other_{at}" for at in range(1, len(adapters)))]
    for name, (folder, _) in zip(names, adapters, strict=True):
        model = load_adapter(model, folder, called=name, first_values=first_values)
    assert isinstance(model, PeftModel)
    weights = [weight for _, weight in adapters]
    if weights == [1.0]:
        return model, ALONE
    for folder, weight in adapters:
        if what := _no_sum(read_settings(Path(folder) / CONFIG)):
            raise RecipeError(
                f"merge: {folder} {what}, which is no sum of adapters\n  Merge it alone, with a weight of 1."
            )
        if not isfinite(weight):
            raise RecipeError(f"merge: the weight of {folder} is {weight}\n  Give a number, as 0.5.")
    how: dict[str, Any] = {"combination_type": combine, "density": DENSITY.get(combine)}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # some methods drop numbers at random: the same ones whenever it is done
            model.add_weighted_adapter(names, weights, "combined", **how)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise RecipeError(
            f"merge: cannot be combined by {combine}: {one_line(error)}\n  Try another --combine."
        ) from None
    model.set_adapter("combined")
    return model, "combined"


def _no_sum(settings: Mapping[str, Any]) -> str | None:
    """What of an adapter cannot be added to another's, of which PEFT would make nothing or something else."""
    if settings.get("use_dora"):
        return "is of DoRA"
    if settings.get("init_lora_weights") in OF_THE_BASE:
        return f"is of lora.init={settings['init_lora_weights']}"
    for key in ("modules_to_save", "trainable_token_indices"):
        if settings.get(key):
            return f"has trained more than LoRA ({key})"
    return None


DENSITY = dict.fromkeys(("ties", "dare_ties", "dare_linear", "magnitude_prune"), 0.5)
"""The share of an adapter's numbers that the methods keep which drop some."""
