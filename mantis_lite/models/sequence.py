"""Rows that several processes share: each computes a stretch of the tokens, and attention some heads of all tokens.

Sequence parallelism by all-to-all: DeepSpeed Ulysses (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509). A row
comes whole, as its pictures are laid where its tokens say; it is cut where the language model begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_to_all_single
from transformers import PreTrainedConfig

from ..errors import DataError, RecipeError
from .adapters import base_of


@dataclass(frozen=True)
class Stretches:
    """How a row is cut among the processes of a group: one stretch each, of `sizes` tokens, in the order of ranks."""

    group: distributed.ProcessGroup
    sizes: list[int]

    @property
    def here(self) -> int:
        """Which stretch is this process's."""
        return self.group.rank()

    def mine(self, row: Tensor, dim: int = -1) -> Tensor:
        """This process's stretch of a tensor of the whole row."""
        return row.split(self.sizes, dim)[self.here]

    def by_heads(self, stretch: Tensor) -> Tensor:
        """All heads of this stretch (1, H, t, D) -> some heads of the whole row (1, H / N, T, D)."""
        sent = stretch[0].unflatten(0, (len(self.sizes), -1)).transpose(1, 2).flatten(0, 1)
        return self._exchanged(sent, [stretch.shape[2]] * len(self.sizes), self.sizes).transpose(0, 1)[None]

    def by_tokens(self, heads: Tensor) -> Tensor:
        """Some heads of the whole row (1, T, H / N, D) -> all heads of this stretch (1, t, H, D)."""
        mine = self.sizes[self.here]
        got = self._exchanged(heads[0], self.sizes, [mine] * len(self.sizes))
        return got.unflatten(0, (-1, mine)).transpose(0, 1).flatten(1, 2)[None]

    def _exchanged(self, sent: Tensor, sizes: list[int], got: list[int]) -> Tensor:
        """Send each process its share of (n, H / N, D), so many tokens as `sizes` say; as many as `got` come back."""
        room = sent.new_empty(sum(got), *sent.shape[1:])
        return all_to_all_single(room, sent.contiguous(), got, sizes, self.group)


def share_rows(model: nn.Module, group: distributed.ProcessGroup) -> None:
    """Have the language model compute this process's stretch of each row that it is given whole."""
    base_of(model).get_decoder().register_forward_pre_hook(partial(_cut, group=group), with_kwargs=True)


def require_sharing(config: PreTrainedConfig, sequence: int) -> None:
    """Raise RecipeError where so many processes cannot share a row of a model."""
    if sequence == 1:
        return
    text = config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    if heads % sequence or groups % sequence:
        raise RecipeError(
            f"launch.sequence: {sequence} GPUs cannot share {heads} heads and {groups} of keys and values\n"
            "  Set it to a number that divides both."
        )
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise RecipeError(
            f"launch.sequence: {sequence}, but the model's {rope} positions depend on how long the whole row is\n"
            "  Set launch.sequence=1."
        )


def _cut(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], group: distributed.ProcessGroup
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pre-hook: what a language model is given of a row -> the same of this process's stretch."""
    embeds = kwargs["inputs_embeds"]
    stretches = Stretches(group, _sizes(embeds, group))
    cut = {
        "inputs_embeds": stretches.mine(embeds, 1),
        "position_ids": stretches.mine(kwargs["position_ids"]),
        "stretches": stretches,
    }
    if kwargs.get("visual_pos_masks") is not None:  # Qwen3-VL's, whose features are added in its first layers as well
        mask = stretches.mine(kwargs["visual_pos_masks"])
        counts = [int(part.sum()) for part in kwargs["visual_pos_masks"].split(stretches.sizes, -1)]
        deep = [feature.split(counts)[stretches.here] for feature in kwargs["deepstack_visual_embeds"]]
        cut |= {"visual_pos_masks": mask, "deepstack_visual_embeds": deep}
    return args, kwargs | cut


def _sizes(embeds: Tensor, group: distributed.ProcessGroup) -> list[int]:
    """The sizes of the stretches of a row (1, T, H), as `torch.tensor_split` has them.

    Raises DataError where a process has read another row: each would wait for what the others do not send.
    """
    length, count = embeds.shape[1], group.size()
    lengths = torch.full((count,), length, device=embeds.device)
    found = torch.empty_like(lengths)
    distributed.all_to_all_single(found, lengths, group=group)
    if not torch.equal(found, lengths):
        raise DataError(
            f"data: GPUs that share a row have read {', '.join(map(str, found.tolist()))} tokens of it\n"
            "  A picture could be read by some of them only: see rejects.jsonl, and start the run again."
        )
    return [length // count + (at < length % count) for at in range(count)]
