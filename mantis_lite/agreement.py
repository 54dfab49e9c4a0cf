"""Whether two models say the same: an adapter on its base, and what the two were merged into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from .data.collate import Batch, collate
from .data.encode import IGNORE, Encoder
from .data.sample import Sample
from .errors import CheckError
from .models.load import placed

POSITIONS = 1024
"""Most of an answer's tokens that are compared: of a vocabulary of 128,256 words their logits are 0.5 GB."""

CLOSE = 0.01
"""How near the probabilities of a score head's classes have to be."""


@dataclass(frozen=True)
class Agreement:
    """At how many of `positions` two models' first choices are the same, and how far their logits are apart.

    Positions are an answer's tokens, or a head's scores of rows; `rows` says of which rows.
    """

    positions: int
    share: float
    kl: float
    """Of the first model's probabilities from the second's, the mean in nats."""
    largest: float
    """The largest difference of two logits."""
    rows: str


def at_answers(model: PreTrainedModel | PeftModel, batch: Batch, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits (P, V), float32, at a pack's tokens with loss and nowhere else, and these tokens (P,)."""
    labels = batch["labels"][0, 1:]
    at = (labels != IGNORE).nonzero()[:most, 0]
    asked = {key: value for key, value in batch.items() if key != "labels"} | {"logits_to_keep": at}
    return model(**placed(asked, model)).logits[0].float(), labels[at]


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, encoder: Encoder, samples: Sequence[Sample]) -> Tensor:
    """Logits (P, V) at the tokens of the samples' answers, float32 on the CPU; of a score head (S, L)."""
    found: list[Tensor] = []
    left = POSITIONS
    for number, sample in enumerate(samples):
        batch = collate([encoder.encode(sample)], encoder.vision.batch)
        if encoder.score is None:
            logits, _ = at_answers(model, batch, -(-left // (len(samples) - number)))
            left -= len(logits)
        else:
            del batch["labels"]
            logits = model(**placed(batch, model)).logits.flatten(0, -2).float()
        found.append(logits.cpu())
    return torch.cat(found)


def compared(one: Tensor, other: Tensor, problem: str | None, rows: str) -> Agreement:
    """How the logits (P, V) of two models agree; with the problem of a score head, its scores.

    A number agrees where it is within 1% of the other, at least within 0.01; a class where its probability is besides.
    Raises CheckError for what is no number.
    """
    for logits, which in ((one, "adapter"), (other, "merged model")):
        if not logits.isfinite().all():
            remedy = "Its training diverged: take an earlier checkpoint."
            raise CheckError(f"merge: the {which} says what is no number on {rows}\n  {remedy}")
    apart = (one - other).abs()
    if problem == "regression":
        same, kl = (apart <= 0.01 * one.abs().clamp(min=1)).all(1), one.new_zeros(1)
    elif problem == "multi_label":
        same = ((one > 0) == (other > 0)).all(1) & ((one.sigmoid() - other.sigmoid()).abs() < CLOSE).all(1)
        kl = _kl(_two_sided(one), _two_sided(other))
    else:
        same, kl = one.argmax(1) == other.argmax(1), _kl(one, other)
        if problem:
            same &= ((one.softmax(1) - other.softmax(1)).abs() < CLOSE).all(1)
    return Agreement(len(one), same.float().mean().item(), kl.mean().item(), apart.max().item(), rows)


def _two_sided(scores: Tensor) -> Tensor:
    """Each label by itself, as a choice between yes and no."""
    return torch.stack([scores, torch.zeros_like(scores)], -1)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of each position's probabilities, in nats."""
    return kl_div(other.log_softmax(-1), one.log_softmax(-1), reduction="none", log_target=True).sum(-1).clamp(min=0)
