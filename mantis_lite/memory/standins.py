"""What stands in for a GPU's kernels when a step is walked through without one: the same tensors, nothing computed.

Each makes and keeps what the kernel does, as its source says; `rehearsal.py` puts them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn.functional import linear

from ..models.lm_head import GPU_TILE

ATTENTION = "mantis_rehearsed"
"""The name that `attend` goes by among transformers' attentions."""

WORDS = 32_768
"""Words of the tile of logits, of GPU_TILE tokens, that TRL's head makes at a time (trl 1.16: trainer/utils.py)."""


class _Flash(torch.autograd.Function):
    """A flash kernel, one segment or many: keeps its inputs, its output and a float32 a head and token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, tokens, width = query.shape
        out = query.new_empty(batch, tokens, heads, width)
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors  # alive until the kernel is done
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        passing = [query.new_empty(query.shape, dtype=torch.float32)]  # the query's gradient is summed in float32
        if query.shape[1] != key.shape[1]:  # those of keys and values are made for every head, then summed
            passing += [torch.empty_like(query), torch.empty_like(query)]
        del passing, kept
        return *found, None


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention in one kernel: query (B, H, T, D), key and value (B, K, T, D) -> (B, T, H, D).

    With a mask (.., T, T) it is SDPA's, which takes the mask as numbers, and as many heads of keys as of queries.
    """
    if attention_mask is None:
        return _Flash.apply(query, key, value, None), None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    return _Flash.apply(query, key, value, query.new_empty(attention_mask.shape)), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """No T x T mask is made."""
    return None


class _Unpack(torch.autograd.Function):
    """bitsandbytes' product with a weight in 4 bits: unpacked for the forward pass, and again for the backward one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return torch.matmul(grads[0], grads[0].new_empty(ctx.shape)), None, None


class Packed(Linear4bit):
    """A linear layer whose weight is in 4 bits; PEFT takes it for bitsandbytes' own."""

    compute_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        out = _Unpack.apply(x.to(self.compute_dtype), (self.out_features, self.in_features), bias)
        return out.to(x.dtype)


def pack(layer: nn.Linear, dtype: torch.dtype) -> None:
    """Turn a layer without numbers, in place, into one in 4 bits that computes in `dtype`."""
    layer.__class__ = Packed
    layer.compute_dtype, layer.compute_type_is_set = dtype, True  # type: ignore[assignment]
    for name, setting in (("compress_statistics", True), ("quant_type", "nf4"), ("quant_storage", dtype)):
        setattr(layer.weight, name, setting)


def unpacked(layer: nn.Module) -> Tensor:
    """A layer's weight in full, as DoRA asks for it."""
    if isinstance(layer, Packed):
        return layer.weight.new_empty(layer.out_features, layer.in_features, dtype=layer.compute_dtype)
    assert isinstance(layer.weight, Tensor)
    return layer.weight


class _Drop(torch.autograd.Function):
    """Dropout on a GPU: a byte a number for what stays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


class Dropout(nn.Dropout):
    """Dropout as a GPU lays it out; on a CPU the mask is as large as what it is for."""

    def forward(self, input: Tensor) -> Tensor:
        return _Drop.apply(input) if self.training and self.p else input


class FusedHead(torch.autograd.Function):
    """TRL's loss on a GPU: supervised positions alone, logits in tiles, gradients summed in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = dtype
        hidden.new_empty(min(len(hidden), GPU_TILE), WORDS, dtype=dtype)
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden, dtype=torch.float32)
        of_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        tile = hidden.new_empty(min(len(hidden), GPU_TILE), WORDS, dtype=ctx.dtype)
        del tile
        return of_hidden.to(hidden.dtype), None if of_weight is None else of_weight.to(weight.dtype), None


class _Norm(torch.autograd.Function):
    """Liger's RMSNorm: keeps its input and a float32 a row; the gradient is written over what came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = ctx.saved_tensors[1]
        return grads[0].view_as(grads[0]), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _SwiGLU(torch.autograd.Function):
    """Liger's silu(gate) * up: keeps both, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return gate.view_as(gate), up.view_as(up)


class _Rotate(torch.autograd.Function):
    """Liger's rotary positions: turned where they lie, by token, and so are their gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return _turned(query), _turned(key)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(grads[0]), _turned(grads[1]), None, None


def _turned(heads: Tensor) -> Tensor:
    """(B, H, T, D) in the storage it came in, where it lies by token there."""
    return heads.transpose(1, 2).contiguous().transpose(1, 2)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys turned by their positions in one kernel."""
    return _Rotate.apply(query, key, cos, sin)


class _LayerNorm(torch.autograd.Function):
    """Liger's LayerNorm: keeps its input and two float32 a row, and stays in its precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.new_empty(2, *x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        kept = ctx.saved_tensors  # alive until the kernel is done
        return torch.empty_like(grads[0]), torch.empty_like(kept[1]) if ctx.needs_input_grad[1] else None


class _Squared(torch.autograd.Function):
    """Liger's squared ReLU: keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return _Norm.apply(x, self.weight)


def _swiglu(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    return _LayerNorm.apply(x, self.weight)


def _relu_squared(self: Any, x: Tensor) -> Tensor:
    return _Squared.apply(x)


LAYERS: dict[str, Callable] = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "layer_norm": _layer_norm,
    "relu_squared": _relu_squared,
}
"""The forward pass of a layer that one kernel computes, by its name in `memory.kernels`."""
