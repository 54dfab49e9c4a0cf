"""What a language model's head says of the tokens with loss: their log-probabilities, a tile of logits at a time."""

from __future__ import annotations

from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor
from trl.kernels import chunked_logprob
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

GPU_TILE = 1_024
"""Tokens whose logits are there at a time, of 32,768 words."""

CPU_TILE = 128
"""The same where there is no Triton, of all words: few enough for a CPU's caches, enough for its products."""

SCORES = ("log_probs", "entropy", "is_top1")
"""What TRL's SFTTrainer asks its head for."""

Scores = tuple[Tensor, Tensor, None, None, Tensor]
"""Log-probability and entropy of each target (N,), two that nobody asks for, and whether no word is likelier (N,)."""


def score_supervised() -> None:
    """Have TRL's fused head score tokens with loss alone, wherever it runs, and a tile of them at a time.

    On a GPU it does the former by itself, and its tile of 4,096 tokens becomes a quarter of that. Elsewhere trl 1.16
    scores every token, and takes four times as long for one as transformers does with all logits at once;
    `ScoreFunction` takes less. It has no argument for any of this.
    """
    assert isinstance(chunked_logprob.TOKEN_CHUNK_SIZE, int)
    assert callable(trl.trainer.utils._use_triton) and hasattr(trl.trainer.utils, "_ChunkedLogProbFunction")
    chunked_logprob.TOKEN_CHUNK_SIZE = GPU_TILE
    trl.trainer.utils._use_triton = lambda device: True  # asked there whether to leave out what has no loss
    trl.trainer.utils._ChunkedLogProbFunction = Head


class Head:
    """Stands where TRL has its function: its own with Triton and where the head trains, `ScoreFunction` elsewhere."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> Any:
        """As TRL's: hidden states (N, H), weight (V, H), bias (V,) and targets (N,) -> what `outputs` names."""
        plain = bias is None and (temperature, softcap, logit_scale) == (1.0, None, 1.0) and set(outputs) == set(SCORES)
        if plain and not chunked_logprob._use_triton(hidden.device) and not weight.requires_grad:
            return ScoreFunction.apply(hidden, weight, targets)
        return ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
        )


class ScoreFunction(torch.autograd.Function):
    """Scores of targets (N,) by hidden states (N, H) and a frozen head (V, H), in float32 whatever they came in.

    A log-probability's gradient is known once its logits are, but for a factor: the target's row of the head less the
    mean of all rows by their probabilities. It is made on the way forward, so that no logits are made again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Scores:
        log_probs, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        top = hidden.new_empty(len(hidden), dtype=torch.bool)
        slopes = torch.empty_like(hidden, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            words = weight.float()
            for at in range(0, len(hidden), CPU_TILE):
                tile = slice(at, at + CPU_TILE)
                states = hidden[tile].float()
                logits = torch.mm(states, words.t())
                most, likeliest = logits.max(dim=-1)
                top[tile] = likeliest == targets[tile]
                of_targets = logits.gather(-1, targets[tile, None])[:, 0]
                shares = logits.sub_(most[:, None]).exp_()
                sums = shares.sum(dim=-1)
                total = most + sums.log()
                mean = torch.mm(shares, words) / sums[:, None]
                log_probs[tile] = of_targets - total
                entropy[tile] = total - torch.linalg.vecdot(states, mean)  # logits are linear: this is their mean
                slopes[tile] = words[targets[tile]] - mean
        ctx.save_for_backward(slopes)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropy, top)
        return log_probs, entropy, None, None, top

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(ctx.dtype), None, None
