"""What one GPU of several holds of a run: its share of what is parted, and what is whole for a while.

By DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py), accelerate 1.15
(fsdp2_prepare_model) and torch's DDP. What stands was counted under DeepSpeed in two processes on CPUs
(tests/test_shares.py). What comes and goes is reckoned: none of it was measured on several cards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from ..models.adapters import base_of, part_of
from ..models.family import Family
from ..recipe_file import deepspeed_config
from .seeing import trained
from .step import Machine

SUB_GROUP = 1_000_000_000
"""Numbers that ZeRO-3 has the optimizer take at a time (DeepSpeed's sub_group_size, which no recipe sets)."""

FLOAT32 = 4
"""Bytes of a float32, in which Adam's moments are, and weights while they are changed."""


def share(count: int, machine: Machine) -> int:
    """Numbers that a GPU has of so many that are parted among all."""
    return -(-count // machine.gpus)


def held(count: int, machine: Machine) -> int:
    """Numbers of a weight that lie on a GPU all the time."""
    if machine.offloads_weights:
        return 0
    return share(count, machine) if machine.parts_weights else count


def standing(model: nn.Module, machine: Machine, family: Family | None) -> Counter[str]:
    """Bytes that a GPU holds all the time of what several train, beside weights: by term."""
    found: Counter[str] = Counter()
    if machine.strategy == "ddp":
        found["gradients: DDP's buckets"] = sum(FLOAT32 * parameter.numel() for parameter in trained(model))
    if not machine.sharded:
        return found
    found["gradients: buckets"] = _buckets(model, machine, family)
    if machine.offloads_weights:
        return found
    own = sum(share(parameter.numel(), machine) for parameter in trained(model))
    found["optimizer"] = 2 * FLOAT32 * own
    if machine.keeps_float32:
        found["optimizer: weights in float32"] = FLOAT32 * own
    # ZeRO-2 keeps those of the rows before apart from this one's, and adds them up at its end. That a weight at the
    # border of two shares has its gradient whole with both is left out.
    times = 2 if machine.strategy == "zero2" and machine.accumulates else 1
    found["gradients"] = times * machine.trained.itemsize * own
    return found


def gathered(model: nn.Module, machine: Machine, family: Family | None) -> int:
    """Bytes of weights that are whole on a GPU for a while, at most; `model` has all its layers."""
    if not machine.parts_weights:
        return 0
    seeing = dict(_seeing(model, family))  # whole in each forward and backward pass
    rest = [parameter for name, parameter in model.named_parameters() if name not in seeing]
    if machine.strategy == "fsdp2":  # a layer, the next, and what that is copied from; embeddings and head
        layers = base_of(model).get_decoder().layers
        most = _numel(rest) - _numel(layers[0].parameters()) * max(0, len(layers) - 3)
    else:
        # Weights stay as long as they are used again within `stage3_max_reuse_distance`; fetching ahead stops at
        # `stage3_max_live_parameters`, beyond which is the weight that is needed.
        settings = deepspeed_config(machine.strategy)["zero_optimization"]
        most = max(settings["stage3_max_live_parameters"], settings["stage3_max_reuse_distance"])
        most = min(_numel(rest), most + max(parameter.numel() for parameter in rest))
    return machine.dtype.itemsize * (_numel(seeing.values()) + most)


def stepping(model: nn.Module, machine: Machine) -> int:
    """Bytes of the copies of gradients that ZeRO hands to the optimizer: laid flat, and in float32."""
    if machine.strategy not in ("zero2", "zero3"):
        return 0
    owns = [share(parameter.numel(), machine) for parameter in trained(model)]
    at_once = sum(owns)
    if machine.strategy == "zero3":
        at_once = min(at_once, SUB_GROUP + max(owns))
    size = machine.trained.itemsize
    return at_once * (size + (FLOAT32 if size != FLOAT32 else 0))


def on_host(model: nn.Module, machine: Machine) -> int:
    """Bytes of the host's memory that each GPU's process has filled with weights, gradients and moments."""
    if not machine.offloads_weights:
        return 0
    size = 0
    for parameter in model.parameters():
        own = share(parameter.numel(), machine)
        size += own * machine.dtype.itemsize
        if parameter.requires_grad:  # the float32, its moments and its gradient; and the gradient before that
            size += own * (4 * FLOAT32 + machine.trained.itemsize)
    return size


def _buckets(model: nn.Module, machine: Machine, family: Family | None) -> int:
    """Bytes that gradients are exchanged by: of ZeRO two buckets (of ZeRO-3 one, and what is sent of it)."""
    size, base = machine.dtype.itemsize, base_of(model)
    if machine.strategy == "fsdp2":  # the gradients of a unit, and what is sent of the one before
        sees = [parameter for name, parameter in _seeing(model, family) if parameter.requires_grad]
        units = [list(trained(base.get_decoder().layers[0])), list(trained(base.get_input_embeddings())), sees]
        return 2 * size * max(map(_numel, units))
    hidden = base.config.get_text_config().hidden_size
    return 2 * size * hidden * hidden  # as transformers fills reduce_bucket_size in


def _seeing(model: nn.Module, family: Family | None) -> list[tuple[str, nn.Parameter]]:
    """The parameters that pictures go through, by name."""
    if family is None:
        return []
    sees = ("vision_tower", "projector")
    return [(name, parameter) for name, parameter in model.named_parameters() if part_of(name, family) in sees]


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
