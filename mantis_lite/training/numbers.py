"""What a run's numbers must be: finite, and moving."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from ..errors import DivergedError
from .jsonlines import JsonLines
from .ranks import ALONE, Ranks
from .run_files import SKIPPED

MOST_SKIPPED = 0.01
"""The share of a run's steps that may be skipped; three always may."""

OVERFLOWS = 20
"""Steps in a row that float16's loss scaling may skip by itself: it halves its scale each time."""

SETTLED = 10
"""Steps with a learning rate after which everything that trains must have moved."""

SPIKE = 3.0
"""A loss so many times its running mean is warned of, as axolotl's watchdog is set by its users."""

log = logging.getLogger("mantis_lite")


class Numbers(TrainerCallback):
    """Skips a step whose loss or gradient is not finite, and ends a run that cannot learn.

    `parts` are the parameters that should train, by part; `used(step)` names the parts that the data has had a use for
    after so many steps; `named(step)` the samples of a step, by pack. The `ranks` of a run decide together, and the
    first writes.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        parts: dict[str, list[nn.Parameter]],
        used: Callable[[int], set[str]],
        named: Callable[[int], list[list[str]]],
        ranks: Ranks = ALONE,
    ) -> None:
        self.skipped = JsonLines(run_dir / SKIPPED)
        self.allowed = max(3, int(steps * MOST_SKIPPED))
        self.parts, self.used, self.named, self.ranks = parts, used, named, ranks
        self.losses: list[Tensor] = []
        self.overflows = self.moving = 0
        self.spoiled = False
        self.begun = 0
        self.without_gradient = set(parts)
        self.mean: float | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameters in self.parts.values() for parameter in parameters]

    def counted(self, loss: Tensor) -> Tensor:
        """A pack's loss, noted; zero in the sum that is logged where it is no number, which would stay in it."""
        self.losses.append(loss)
        return torch.where(loss.isfinite(), loss, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = state.global_step
        if self.ranks.is_first:
            self.skipped.rewind(state.global_step)
        self.skipped.count = self.ranks.told(self.skipped.count)
        self.before = {part: _sums(parameters) for part, parameters in self.parts.items()}
        for line in state.log_history:
            self._follow(line)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses, self.losses = self.losses, []
        optimizer = kwargs["optimizer"]
        sound = self._sound(optimizer)
        finite = self.ranks.all(bool(torch.stack([loss.isfinite() for loss in losses]).all()) if losses else True)
        self.overflows = 0 if sound else self.overflows + 1
        if sound and finite:
            parts = sorted(self.without_gradient)  # a set's order is another in each process, which ask each other
            self.without_gradient -= {part for part in parts if self._has_gradient(part, optimizer)}
            self.moving += any(group["lr"] > 0 for group in optimizer.param_groups)
        elif not (_scales(optimizer) and finite and self.overflows <= OVERFLOWS):
            self._skip(state.global_step + 1, [loss.item() for loss in losses])

    def _sound(self, optimizer: Any) -> bool:
        """Whether a step's gradients are finite, the same for all processes."""
        if has_stepped(optimizer):
            return not optimizer.optimizer.overflow
        gradients = [held(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        return self.ranks.all(bool(get_total_norm(gradients).isfinite()) if gradients else True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.moving == SETTLED:
            self.require_moved(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run that went on may have had steps left in which nothing was to be learned.
        if state.global_step >= state.max_steps and self.moving and not self.begun:
            self.require_moved(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        if self.spoiled:  # the sum has no more than some of its packs
            logs["loss"] = math.nan
            state.log_history[-1:] = [{**line, "loss": math.nan} for line in state.log_history[-1:]]
            self.spoiled = False
        if self._follow(logs):
            logs["spike"] = True
            log.warning("step %d: the loss %.4g is a spike, %g times its mean", state.global_step, logs["loss"], SPIKE)

    def require_finite(self, tensors: Iterable[Tensor], step: int) -> None:
        """Raise DivergedError where a tensor that is about to be saved holds what is not a number."""
        if not self.ranks.all(_finite(map(held, tensors))):
            raise DivergedError(
                f"step {step}: weights or the optimiser's state are not finite, and are not saved\n"
                "  Lower train.learning_rate; what was saved before is as it was."
            )

    def require_moved(self, step: int) -> None:
        """Raise DivergedError where a part that should train has had no gradient, or is as it was."""
        used = self.used(step)
        for part, parameters in self.parts.items():
            if part in used and part in self.without_gradient:
                raise DivergedError(
                    f"{part}: should train, and has had no gradient in {self.moving} steps\n"
                    "  Look whether the rows have anything that is scored."
                )
            moved = not torch.equal(_sums(parameters), self.before[part])
            if part in used and not self.ranks.highest(moved):
                raise DivergedError(
                    f"{part}: should train, and has not moved in {self.moving} steps, which are too small\n"
                    "  Raise train.learning_rate, or its own in trainable.lr."
                )

    def _has_gradient(self, part: str, optimizer: Any) -> bool:
        if has_stepped(optimizer):  # and let go of the gradients: whether the part moves, says as much
            return True
        return bool(self.ranks.highest(any(p.grad is not None and bool(held(p.grad).any()) for p in self.parts[part])))

    def _skip(self, step: int, losses: list[float]) -> None:
        """Take no step: the optimizer passes over what has no gradient."""
        self.spoiled = True
        each = self.ranks.gathered(losses)  # a step's packs went round the processes
        losses_by_pack = enumerate(chain(*zip(*each, strict=True)))
        shared = self.ranks.sequence
        broken = sorted({at // shared for at, loss in losses_by_pack if not math.isfinite(loss)})
        packs = self.named(step)
        broken = [at for at in broken if at < len(packs)]
        samples = [name for at in broken or range(len(packs)) for name in packs[at]]
        found = "the loss is not finite" if broken else "the gradient is not finite"
        self.skipped.append({"step": step, "found": found, "samples": samples}, self.ranks.is_first)
        some = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        count = len(self.skipped)
        dead = not self.ranks.all(_finite(map(held, self.parameters)))
        if dead or count > self.allowed:
            why = "weights are no longer finite" if dead else f"{count} steps were skipped, the most are {self.allowed}"
            raise DivergedError(
                f"step {step}: {found} in the pack of {some}; {why}\n"
                f"  Look at these rows and at {self.skipped.file}, or lower train.learning_rate. "
                "What was saved before is as it was."
            )
        log.warning("step %d is skipped: %s in the pack of %s", step, found, some)
        for parameter in self.parameters:
            parameter.grad = None

    def _follow(self, logs: dict[str, Any]) -> bool:
        """Keep a running mean of the loss; returns whether this one is far above it."""
        loss = logs.get("loss")
        if loss is None or not math.isfinite(loss):
            return False
        spike = self.mean is not None and loss > SPIKE * self.mean
        self.mean = loss if self.mean is None else 0.9 * self.mean + 0.1 * loss
        return spike


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that several may have parts of."""
    if hasattr(tensor, "ds_tensor"):  # DeepSpeed's ZeRO, stage 3
        return tensor.ds_tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def numel(tensor: Tensor) -> int:
    """How many numbers a tensor has, wherever they are."""
    return getattr(tensor, "ds_numel", None) or tensor.numel()


def has_stepped(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's, which steps within the last backward pass, and skips what is not finite."""
    return hasattr(optimizer.optimizer, "overflow")


def _scales(optimizer: Any) -> bool:
    """Whether losses are scaled for float16, whose overflows are no fault of the data."""
    if has_stepped(optimizer):
        return bool(getattr(optimizer.optimizer, "dynamic_loss_scale", False))
    return optimizer.scaler is not None


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all that tensors hold are numbers; they may lie on several devices."""
    largest = [tensor.detach().abs().max() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return all(math.isfinite(value) for value in largest)


def _sums(parameters: list[nn.Parameter]) -> Tensor:
    """Two sums of each tensor (P, 2), which change with it."""
    tensors = [held(p).detach().double() for p in parameters]
    sums = [torch.stack([each.sum(), each.square().sum()]) for each in tensors]
    return torch.stack([each.cpu() for each in sums])
