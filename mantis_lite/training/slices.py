"""What each process holds of what trains: slices of tensors by name, with which any number of processes goes on.

DeepSpeed's own checkpoints are pickles that the same number of processes can read. Here each process writes its
slices to one file of safetensors, and reads those it needs of all files, without a word to the others.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..models.weights import open_tensors, write_tensors
from .ranks import Ranks

VALUE = "value"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each number beside the number itself, by torch's names."""


@dataclass(frozen=True)
class Slice:
    """The numbers `start` and on of a tensor, laid flat: where this process holds them and, if any, their moments."""

    name: str
    start: int
    kept: dict[str, Tensor]


def save_slices(folder: Path, slices: list[Slice], ranks: Ranks) -> None:
    """Write this process's slices. Raises OSError."""
    room = sum(len(_key(each, what)) + 120 for each in slices for what in each.kept)
    found = ((_key(each, what), kept.detach().cpu()) for each in slices for what, kept in each.kept.items())
    write_tensors(folder / f"slices-{ranks.rank:05d}.safetensors", found, room)


def load_slices(folder: Path, slices: list[Slice]) -> None:
    """Fill this process's slices from all files of a checkpoint, however many processes have written them."""
    with ExitStack() as stack:
        written = _Written(folder, stack)
        for each in slices:
            for what, kept in each.kept.items():
                kept.data.copy_(written.read(each.name, what, each.start, kept.numel()))


def load_computed(folder: Path, model: nn.Module, ranks: Ranks) -> None:
    """Fill what ZeRO computes with, beside the float32 that it keeps, from a checkpoint's slices."""
    with ExitStack() as stack:
        written = _Written(folder, stack)
        for name, parameter in trained(model):
            if not hasattr(parameter, "ds_tensor"):
                parameter.data.copy_(written.read(name, VALUE, 0, parameter.numel()).view_as(parameter))
                continue
            held = parameter.ds_tensor
            start = held.numel() * ranks.rank
            real = max(0, min(held.numel(), parameter.ds_numel - start))
            held.data.view(-1)[:real].copy_(written.read(name, VALUE, start, real))


def _key(each: Slice, what: str) -> str:
    return f"{what}:{each.start}:{each.name}"


class _Written:
    """All slices of a checkpoint: of each tensor the pieces, where they begin and the files they are in."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.pieces: defaultdict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
        for file in sorted(folder.glob("slices-*.safetensors")):
            opened = stack.enter_context(open_tensors(file))
            for key in opened.keys():
                what, start, name = key.split(":", 2)
                self.pieces[name, what].append((int(start), opened, key))
        for found in self.pieces.values():
            found.sort(key=lambda piece: piece[0])

    def read(self, name: str, what: str, start: int, size: int) -> Tensor:
        """So many numbers of a tensor from one of them on."""
        parts, at = [], start
        for begin, opened, key in self.pieces[name, what]:
            piece = opened.get_slice(key)
            end = begin + piece.get_shape()[0]
            if begin <= at < min(end, start + size):
                parts.append(piece[at - begin : min(end, start + size) - begin])
                at = min(end, start + size)
        assert at == start + size, f"{what} of {name} is not whole in the checkpoint"
        return torch.cat(parts) if parts else torch.empty(0)


def slices_of(model: nn.Module, optimizer: Any) -> list[Slice]:
    """The slices that this process holds of what trains, under DeepSpeed's ZeRO or FSDP2, by their optimizer."""
    return _of_zero(model, optimizer) if hasattr(optimizer, "optimizer") else _of_dtensors(model, optimizer)


def begin_moments(model: nn.Module, optimizer: Any, step: int) -> None:
    """Make room for Adam's moments, as after so many steps, before the first is taken here."""
    inner = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's has torch's within
    group = inner.param_groups[0]
    held = [parameter for _, parameter in trained(model)] if inner is optimizer else _flats(optimizer)
    for tensor in held:
        device = tensor.device if group.get("fused") or group.get("capturable") else "cpu"
        moments = {key: torch.zeros_like(tensor.detach()) for key in MOMENTS}
        inner.state[tensor] = {"step": torch.tensor(float(step), device=device), **moments}


def _of_zero(model: nn.Module, optimizer: Any) -> list[Slice]:
    """Under ZeRO, stage 2 or 3, what is kept in float32."""
    found = []
    flats = _flats(optimizer)
    for name, parameter in trained(model):
        if hasattr(parameter, "ds_tensor"):
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            size = min(size, parameter.ds_numel - start)  # the last one's is filled up
        elif (held := parameter._hp_mapping) is not None:
            group, start = held.param_group_index, held.lp_fragment_address.start
            size, offset = held.hp_fragment_address.numel, held.hp_fragment_address.start
        else:
            continue
        if size > 0:
            state = optimizer.optimizer.state.get(flats[group], {})
            kept = {VALUE: flats[group].data, **{key: state[key] for key in MOMENTS if key in state}}
            found.append(Slice(name, start, {what: flat.narrow(0, offset, size) for what, flat in kept.items()}))
    return found


def _of_dtensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Slice]:
    """Under FSDP2, which parts tensors by their first dimension."""
    found = []
    for name, parameter in trained(model):
        assert isinstance(parameter, DTensor), f"{name} is not in parts"
        state = optimizer.state.get(parameter, {})
        kept = {VALUE: parameter.data, **{key: state[key] for key in MOMENTS if key in state}}
        _, offset = compute_local_shape_and_global_offset(
            parameter.shape,
            parameter.device_mesh,
            parameter.placements,
        )
        start = offset[0] * parameter.shape[1:].numel() if parameter.dim() else 0
        flat = {what: tensor.to_local().view(-1) for what, tensor in kept.items()}
        found.append(Slice(name, start, flat))
    return [each for each in found if each.kept[VALUE].numel()]


def _flats(optimizer: Any) -> list[Tensor]:
    """What a process holds of each group of parameters under ZeRO, laid flat."""
    stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    return optimizer.fp32_partitioned_groups_flat if stage_3 else optimizer.single_partition_of_fp32_groups


def steps_taken(states: Any) -> int:
    """How many steps an Adam has taken, by its state: one less for each that was skipped."""
    return max((int(state["step"]) for state in states.values() if "step" in state), default=0)


def whole_weights(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The weights of a model whose parts lie with several processes, whole, in the first; all must ask for them.

    What trains comes in the float32 that it is kept in. Of an adapter's model, these are the weights that train.
    """
    found: dict[str, Tensor] = {}
    only = trained(model) if isinstance(model, PeftModel) else list(model.named_parameters())
    for name, parameter in only:
        whole = _whole(parameter)
        if ranks.is_first:
            found[name] = whole.cpu()
    return found


def _whole(parameter: Any) -> Tensor:
    if isinstance(parameter.data, DTensor):
        return parameter.data.full_tensor()
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter)
        with zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return parameter.detach().float()


def trained(model: nn.Module) -> list[tuple[str, Any]]:
    """The parameters that train, by name; with what DeepSpeed or FSDP has put at them."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
