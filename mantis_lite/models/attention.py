"""Attention a segment at a time: each sample of a pack attends within itself, and no T x T mask is ever made.

Registered through transformers' AttentionInterface and AttentionMaskInterface, and set on the language model alone.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

SEGMENT = "mantis_segment"

_GROUPS_ARE_ASKED_FOR = "enable_gqa" in signature(varlen_attn).parameters  # torch 2.11 took groups without asking


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of a pack's samples.

    query (1, H, T, D), key and value (1, K, T, D) with K dividing H; `cu_seq_lens_q` (S + 1,) holds the boundaries.
    With a `sliding_window` (Mistral's) a position attends to that many, itself the last.
    Returns (1, T, H, D). On a GPU in 16 bits it is one variable-length flash kernel, else one SDPA call a segment.
    """
    assert cu_seq_lens_q is not None and max_length_q is not None, "a batch without the boundaries of its samples"
    assert attention_mask is None and query.shape[0] == 1 and not dropout
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and _has_varlen():
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    parts = []
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        mask = _band(end - start, sliding_window, query.device)
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        gqa = key.shape[1] != query.shape[1]
        parts.append(scaled_dot_product_attention(q, k, v, mask, 0.0, mask is None, scale=scaling, enable_gqa=gqa))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which positions (L, L) a segment's attend to, where the window is shorter than the segment."""
    if window is None or window >= length:
        return None
    behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (behind >= 0) & (behind < window)


@cache
def _has_varlen() -> bool:
    """Whether this torch and GPU have the variable-length flash kernel (Ampere and newer)."""
    return torch.cuda.get_device_capability() >= (8, 0)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    groups = {"enable_gqa": True} if _GROUPS_ARE_ASKED_FOR and query.shape[1] != key.shape[1] else {}
    size = (-1 if window is None else window - 1, 0)
    out = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=size, **groups)
    return out[None]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def chosen_attention(name: str) -> str:
    """What the language model attends by under a recipe's `memory.attention`, and why, in words."""
    if name not in ("auto", "segment"):
        return f"transformers' own {name}, as the recipe says: with a T x T mask for packs"
    if not torch.cuda.is_available():
        return "one SDPA call a sample, as there is no GPU"
    if not _has_varlen():
        return "one SDPA call a sample, as the GPU is older than Ampere"
    return "PyTorch's variable-length kernel over all samples of a pack at once"


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention of the language model: "segment" (or "auto") for packs, else one of transformers' own."""
    AttentionInterface.register(SEGMENT, segment_attention)
    AttentionMaskInterface.register(SEGMENT, _no_mask)
    language_model = model.get_decoder()
    language_model.set_attn_implementation(SEGMENT if name in ("auto", "segment") else name)
