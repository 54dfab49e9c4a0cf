"""Prompts read in one pack, without padding; and what follows each: the likeliest, or how likely given tokens are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from .data.collate import collate
from .data.encode import Encoded, Encoder
from .models.attention import use_attention
from .models.load import placed

NONE = -1
"""In the place of a token that is not there."""


@dataclass
class Read:
    """A batch of prompts that a model has read, and what it has said behind each; all of them end together.

    cache, keys and values (B, H, L, D) of each layer; mask (B, L), 1 where something is; positions (B,), of the next
    token, the same on all of the family's own `axes`; logits (B, V) of the next token, float32.
    """

    cache: DynamicCache
    mask: Tensor
    positions: Tensor
    axes: int | None
    logits: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def take(self, rows: Sequence[int]) -> Read:
        """A copy of some rows of the batch, any of them more than once."""
        at = torch.tensor(rows, device=self.mask.device)
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            assert layer.keys is not None and layer.values is not None
            cache.update(layer.keys[at], layer.values[at], number)
        return Read(cache, self.mask[at], self.positions[at], self.axes, self.logits[at])

    def go_on(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
        """Add ids (B, N) behind each prompt, where the mask (B, N) says so; returns their logits (B, N, V), float32."""
        at = self.positions[:, None] + torch.arange(ids.shape[1], device=ids.device)
        self.mask = torch.cat([self.mask, mask.to(self.mask.dtype)], 1)
        out = model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=at if self.axes is None else at.expand(self.axes, -1, -1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + mask.sum(1)
        return out.logits.float()


@torch.no_grad()
def read(model: PreTrainedModel, encoder: Encoder, prompts: Sequence[Encoded]) -> Read:
    """Read prompts as a pack, in which none sees another."""
    batch = collate(prompts, encoder.vision.batch)
    del batch["labels"]
    ends = batch["cu_seq_lens_q"].long()
    axes = None if prompts[0].positions is None else len(prompts[0].positions)
    # On axes of its own a picture may reach further than what stands behind it.
    reach = batch["position_ids"][1:, 0] if axes else batch["position_ids"]
    following = [int(reach[:, start:end].max()) + 1 for start, end in pairwise(ends.tolist())]
    pack = DynamicCache()
    with _attending(model, "auto"):
        out = model(
            **placed(batch, model) | {"use_cache": True},
            past_key_values=pack,
            logits_to_keep=ends[1:].to(model.device) - 1,
        )
    mask, at = (x.to(model.device) for x in _side_by_side(ends))
    cache = DynamicCache()
    for number, layer in enumerate(pack.layers):
        assert layer.keys is not None and layer.values is not None
        # (1, H, T, D) -> (B, H, L, D). Without a window of its own: what is further back is masked, and not cut.
        cache.update(*(x[0][:, at].transpose(0, 1) for x in (layer.keys, layer.values)), number)
    return Read(cache, mask, torch.tensor(following, device=model.device), axes, out.logits[0].float())


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts: Read, ends: Sequence[int], most: int) -> list[list[int]]:
    """The likeliest tokens behind each prompt, up to and without what ends them, `most` of them at most."""
    said: list[list[int]] = [[] for _ in range(len(prompts))]
    going, left = list(range(len(prompts))), prompts.take(range(len(prompts)))
    with _attending(model, "sdpa"):
        for number in range(most):
            chosen = left.logits.argmax(-1).tolist()
            kept = [at for at, token in enumerate(chosen) if token not in ends]
            going, chosen = [going[at] for at in kept], [chosen[at] for at in kept]
            for row, token in zip(going, chosen, strict=True):
                said[row].append(token)
            if not kept or number + 1 == most:
                break
            if len(kept) < len(left):
                left = left.take(kept)
            ids = torch.tensor(chosen, device=left.mask.device)[:, None]
            left.logits = left.go_on(model, ids, torch.ones_like(ids))[:, -1]
    return said


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, prompts: Read, options: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """How likely each prompt is to go on with each of its options' ids: the sum of their log-probabilities, in nats.

    A prompt is read once, and what is kept of it serves all of its options; those of one token need no more.
    """
    ids = [torch.tensor(option, device=prompts.mask.device) for several in options for option in several]
    rows = [row for row, several in enumerate(options) for _ in several]
    if not rows:
        return [[] for _ in options]
    found = prompts.logits.log_softmax(-1)[rows, [int(option[0]) for option in ids]]
    if longer := [number for number, option in enumerate(ids) if len(option) > 1]:
        copies = prompts.take([rows[number] for number in longer])
        padded = pad_sequence([ids[number] for number in longer], batch_first=True, padding_value=NONE)
        asked, wanted = padded[:, :-1], padded[:, 1:]
        with _attending(model, "sdpa"):
            logits = copies.go_on(model, asked.clamp(min=0), wanted != NONE)
        each = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        found[longer] += each.where(wanted != NONE, 0).sum(-1)
    scores = iter(found.tolist())
    return [[next(scores) for _ in several] for several in options]


def _side_by_side(ends: Tensor) -> tuple[Tensor, Tensor]:
    """For each of a pack's samples, aligned at their ends: a mask (B, L), and where in the pack (B, L) they stand."""
    lengths = ends.diff()
    behind = torch.arange(int(lengths.max()) - 1, -1, -1)
    mask = behind < lengths[:, None]
    return mask.long(), (ends[1:, None] - 1 - behind).where(mask, 0)


@contextmanager
def _attending(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The language model attends by one of our kernels, for a pack, or by transformers' own, which knows caches."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    use_attention(model, name)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
