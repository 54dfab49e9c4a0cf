"""An MLP a stretch of tokens at a time: for caches, or computed again in the backward pass, tiled MLP for long rows.

MLPs are the widest layers: of a long row they hold more than everything else of a layer together (Arctic long sequence
training, Bekman et al. 2025, https://arxiv.org/abs/2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def split_mlp(mlp: Any, tokens: int) -> None:
    """Let an MLP see `tokens` at a time of hidden states (1, T, H), and keep what it keeps."""
    _replace_forward(mlp, tokens, _split)


def tile_mlp(mlp: Any, tokens: int) -> None:
    """As `split_mlp`, and keep nothing: each stretch is computed again in the backward pass."""
    _replace_forward(mlp, tokens, _tiled)


def _replace_forward(mlp: Any, tokens: int, forward: Callable[[Any, Tensor], Tensor]) -> None:
    mlp.whole, mlp.at_a_time = mlp.forward, tokens
    mlp.forward = MethodType(forward, mlp)  # and no closure: a copy of the model computes with its own weights


def _split(self: Any, hidden: Tensor) -> Tensor:
    if hidden.shape[1] <= self.at_a_time:
        return self.whole(hidden)
    return _in_stretches(self.whole, hidden, self.at_a_time)


def _tiled(self: Any, hidden: Tensor) -> Tensor:
    trained = [weight for weight in self.parameters() if weight.requires_grad]
    if hidden.shape[1] <= self.at_a_time or not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        return _split(self, hidden)
    kept = _Keep.apply(hidden if hidden.requires_grad else hidden.detach().requires_grad_())
    return _Tiles.apply(kept, self.whole, self.at_a_time, trained, *trained)


def _in_stretches(whole: Callable[[Tensor], Tensor], hidden: Tensor, tokens: int) -> Tensor:
    return torch.cat([whole(stretch) for stretch in hidden.split(tokens, dim=1)], dim=1)


class _Keep(torch.autograd.Function):
    """Keeps its input for `_Tiles`, which is not to: where the layer is checkpointed, computing it again ends with the
    last tensor that was kept, and so before the MLP, whose output nothing asks for. Else an MLP would run three times.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Tiles(torch.autograd.Function):
    """The stretches one after the other, of which nothing is kept; their weights' gradients are summed."""

    @staticmethod
    def forward(
        ctx: Any,
        kept: Tensor,
        whole: Callable[[Tensor], Tensor],
        tokens: int,
        trained: Sequence[nn.Parameter],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.node, ctx.whole, ctx.tokens, ctx.trained = kept.grad_fn, whole, tokens, trained
        ctx.again = _surroundings(kept.device)
        return _in_stretches(whole, kept, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.node.saved_tensors
        of_hidden: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        with ctx.again(), torch.enable_grad():
            for stretch, grad in zip(hidden.detach().split(ctx.tokens, 1), grads[0].split(ctx.tokens, 1), strict=True):
                stretch = stretch.detach().requires_grad_()
                found = torch.autograd.grad(ctx.whole(stretch), [stretch, *ctx.trained], grad)
                of_hidden.append(found[0])
                sums = [new if old is None else old.add_(new) for old, new in zip(sums, found[1:], strict=True)]
        return torch.cat(of_hidden, dim=1), None, None, None, *sums


def _surroundings(device: torch.device) -> Callable[[], Any]:
    """Random numbers and autocast as they are now, to be had again: dropout must leave out the same."""
    numbers = torch.get_rng_state()
    of_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    kind, cast = device.type, torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(kind)

    @contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng([device] if of_gpu is not None else []), torch.autocast(kind, dtype, enabled=cast):
            torch.set_rng_state(numbers)
            if of_gpu is not None:
                torch.cuda.set_rng_state(of_gpu, device)
            yield

    return again
