"""LoRA on a frozen linear layer with nothing in between: two products that add to the layer's own, no copies.

PEFT computes the layer, copies its output, scales LoRA's and adds it, each a pass over tensors as wide as the layer;
and in 16 bits its adapters in float32 have the input cast up and down again. The products are Hu et al.'s
(2021, https://arxiv.org/abs/2106.09685, eq. 3) as they are, in the precision of the layer.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear


class _LoraLinear(torch.autograd.Function):
    """x W' + b + s z A' B': x and z (N, in), A (r, in), B (out, r), in the precision of x; z is None where it is x.

    W is frozen and asked for when it is needed, so that one in 4 bits is unpacked for the while of a product only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, a: Tensor, b: Tensor, base: nn.Linear, scale: float) -> Tensor:
        ctx.base, ctx.scale, ctx.apart, ctx.dtype = base, scale, z is not None, a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)  # here, not outside: nothing to be recorded
        low = (x if z is None else z) @ a.t()
        ctx.save_for_backward(x if z is None else z, a, b, low)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return linear(x, unpacked(base).to(x.dtype), bias).addmm_(low, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, a, b, low = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_low = (grad @ b).mul_(ctx.scale)
        of_x = of_z = of_a = of_b = None
        if ctx.needs_input_grad[2]:
            of_a = (of_low.t() @ z).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            of_b = (grad.t() @ low).to(ctx.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            of_x = grad @ unpacked(ctx.base).to(grad.dtype)
            if not ctx.apart:
                of_x.addmm_(of_low, a)
        if ctx.apart and ctx.needs_input_grad[1]:
            of_z = of_low @ a
        return of_x, of_z, of_a, of_b, None, None


def unpacked(layer: nn.Linear) -> Tensor:
    """A linear layer's weight (out, in), unpacked where it is in 4 bits."""
    weight: Any = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state) if isinstance(layer, Linear4bit) else weight


def hindrance(layer: nn.Module) -> str | None:
    """Why a layer with LoRA on it computes as PEFT has it; None where it need not, or has no LoRA."""
    if not isinstance(layer, LoraLayer):
        return None
    base = layer.get_base_layer()
    if type(base) is not nn.Linear and not isinstance(base, Linear4bit):
        return f"on a {type(base).__name__}"
    if any(weight.requires_grad for weight in base.parameters()):  # a bias too, as PEFT's bias="lora_only" has it
        return "on weights that train"
    if layer.lora_variant:
        return "DoRA" if any(layer.use_dora.values()) else "a variant of LoRA"
    if len(layer.lora_A) != 1:
        return "several adapters"
    if any(module.bias is not None for module in layer.lora_B.values()):
        return "with a bias"
    return None


def fuse_lora(layer: nn.Module) -> None:
    """Let one LoRA layer compute so from now on; what it is, trains and saves stays as it was."""
    assert hindrance(layer) is None
    layer.forward = MethodType(_forward, layer)


def _by_row(x: Tensor) -> Tensor:
    """(.., D) -> (N, D)."""
    return x.reshape(-1, x.shape[-1])


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's forward pass of one active adapter; where it is switched off or merged, PEFT's own."""
    if self.disable_adapters or self.merged or args or kwargs or len(self.active_adapters) != 1:
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = self.active_adapters
    if name not in self.lora_A:
        return type(self).forward(self, x)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    dropout = self.lora_dropout[name]
    x = x.to(dtype)
    dropped = _by_row(dropout(x)) if self.training and not isinstance(dropout, nn.Identity) else None
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    out = _LoraLinear.apply(_by_row(x), dropped, a, b, self.get_base_layer(), self.scaling[name])
    return out.view(*x.shape[:-1], out.shape[-1])
