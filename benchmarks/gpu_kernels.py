"""What a card does at best, and two things of a step by themselves: weights out of 4 bits, and the loss layer."""

from __future__ import annotations

from typing import Any

import torch

from . import card, loss
from .gpu_models import Place


def roof(place: Place) -> dict[str, Any]:
    """G0: a product of two 8192 x 8192 matrices in bfloat16, and a copy on the card."""
    size = place.either(8192, 128)
    left, right = (torch.randn(size, size, device=card.device(), dtype=torch.bfloat16) for _ in range(2))
    products = card.seconds(lambda at: left @ right)
    return {
        **card.spread("product_tflops", 2 * size**3 / products / 1e12, 1),
        **card.spread("copy_gb_per_second", copied(place), 1),
    }


def copied(place: Place) -> Any:
    """GB/s (R,) of a copy within the card's memory, bytes read and written."""
    source = torch.randn(place.either(1 << 30, 1 << 16), device=card.device(), dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / card.seconds(lambda at: target.copy_(source)) / 1e9


def out_of_4_bits(place: Place) -> dict[str, Any]:
    """G9: bitsandbytes' kernel on weights of the MLP's shape, several in turn so that no cache holds one."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    shape = place.either(14336, 128), place.either(4096, 64)
    made = []
    for seed in range(place.either(8, 2)):
        torch.manual_seed(seed)
        weight = torch.randn(shape, device=card.device(), dtype=torch.bfloat16)
        made.append(quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    times = card.seconds(lambda at: dequantize_4bit(*made[at % len(made)]), repeats=40)
    moved = (2 + 0.51587) * shape[0] * shape[1]  # 16 bits written; 4 read, with a scale in 8 bits for each 64 weights
    found, copies = moved / times / 1e9, copied(place)
    return {
        **card.spread("microseconds", 1e6 * times, 1),
        **card.spread("gb_per_second", found, 1),
        "share_of_copy": round(float(sorted(found)[len(found) // 2] / sorted(copies)[len(copies) // 2]), 3),
    }


def liger(model: Any, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross-entropy behind the same norm."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden = model.model(inputs_embeds=states).last_hidden_state[0, :-1]
    return LigerFusedLinearCrossEntropyLoss()(model.lm_head.weight, hidden, labels[0, 1:])


LOSSES = loss.WAYS | {"liger": liger}


def loss_layer(place: Place, name: str, supervised: float) -> dict[str, Any]:
    """G10: forward and backward of 8,192 tokens and 128,256 words, with a share of them supervised."""
    if name == "liger" and not card.there():
        return {"skipped": "Liger's kernels are for a GPU"}
    tokens, hidden, words = place.either(8192, 64), place.either(4096, 32), place.either(loss.VOCABULARY, 512)
    kind = card.device(), torch.bfloat16
    model, inputs = loss.head_alone(hidden, words, *kind), loss.inputs(tokens, hidden, words, supervised, *kind)
    found, gradient = loss.step(LOSSES[name], model, *inputs)
    figures = {"loss": round(float(found), 5), "gradient_norm": float(gradient.float().norm())}
    del gradient
    before = card.held()
    card.forget_peaks()
    times = card.seconds(lambda at: loss.step(LOSSES[name], model, *inputs), repeats=10)
    return {
        **card.spread("milliseconds", 1000 * times, 2),
        "peak_gib_above_inputs": round(card.peaks()[0] - before, 3),
        **figures,
    }
