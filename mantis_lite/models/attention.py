"""Attention within each sample of a pack, never between two, and never with a T x T mask.

`segment_attention` stands behind transformers' attention interface. The batch carries the boundaries of its samples
once; no layer has to look for them. Which kernel computes is the recipe's `memory.attention`, or the best there is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..errors import RecipeError
from .sequence import Stretches

# By what each goes among transformers' attentions, some of whose models look for words like "flash" in a name.
SEGMENT = {
    "auto": "mantis_segment",
    "flash3": "mantis_fa3",
    "flash2": "mantis_fa2",
    "varlen": "mantis_varlen",
    "flex": "mantis_blocks",
    "segment": "mantis_calls",
}

KERNELS = {
    "flash3": "FlashAttention 3 over all samples of a pack at once",
    "flash2": "FlashAttention 2 over all samples of a pack at once",
    "varlen": "PyTorch's variable-length kernel over all samples of a pack at once",
    "flex": "FlexAttention with a mask of blocks",
    "segment": "one SDPA call a sample",
}
"""What computes it, the fastest first."""

BLOCK = 128
"""Positions of a block of FlexAttention's mask, its own default."""

_GROUPS_ARE_ASKED_FOR = "enable_gqa" in signature(varlen_attn).parameters  # torch 2.11 took groups without asking


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    kernel: str = "auto",
    stretches: Stretches | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of a pack's samples.

    query (1, H, T, D), key and value (1, K, T, D) with K dividing H; `cu_seq_lens_q` (S + 1,) holds the boundaries.
    With a `sliding_window` (Mistral's) a position attends to that many, itself the last. `kernel` is one of KERNELS,
    or "auto" for the first that takes these tensors. Returns (1, T, H, D). Of a row that processes share, `stretches`
    says how, and all but the boundaries is of this process's.
    """
    assert cu_seq_lens_q is not None and max_length_q is not None, "a batch without the boundaries of its samples"
    assert attention_mask is None and query.shape[0] == 1 and not dropout
    query, key, value = _as_computed(query, key, value)
    if stretches is not None:
        query, key, value = (stretches.by_heads(x) for x in (query, key, value))
    if kernel == "auto":
        kernel = _best(query)
    computes = {"segment": _calls, "flex": _flex, "varlen": _varlen, "flash2": _flash2, "flash3": _flash3}
    asked = _Asked(cu_seq_lens_q, max_length_q, scaling, sliding_window)
    out = computes[kernel](query, key, value, asked)
    return out if stretches is None else stretches.by_tokens(out), None


def _as_computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the precision of autocast, where it is on: rotary positions of weights in float32 come in float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def unavailable(kernel: str) -> str | None:
    """Why this machine cannot compute attention by one of KERNELS, or None where it can."""
    if kernel == "segment":
        return None
    if not torch.cuda.is_available():
        return "there is no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return "the GPU is older than Ampere"
    if kernel == "flash3" and capability[0] != 9:
        return "the GPU is no Hopper"
    needed = {"flash3": "flash_attn_interface", "flash2": "flash_attn", "flex": "triton"}.get(kernel)
    return f"{needed} is not installed" if needed and find_spec(needed) is None else None


def require_attention(name: str) -> None:
    """Refuse a recipe's `memory.attention` that cannot run here, before a weight is loaded. Raises RecipeError."""
    if name in KERNELS and (fault := unavailable(name)):
        raise RecipeError(f"memory.attention: {name}, but {fault}\n  Set memory.attention=auto.")


def chosen_attention(name: str, use_cpu: bool = False) -> str:
    """What the language model attends by under a recipe's `memory.attention`, and why, in words."""
    if name == "auto" and use_cpu:
        return f"{KERNELS['segment']}, as train.use_cpu says"
    if name == "auto":
        best = next(kernel for kernel in KERNELS if not unavailable(kernel))
        why = unavailable("flash2")
        return f"{KERNELS[best]}, as {why}" if why else KERNELS[best]
    if name in KERNELS:
        return f"{KERNELS[name]}, as the recipe says"
    return f"transformers' own {name}, as the recipe says: with a T x T mask for packs"


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention of the language model: "auto" or one of KERNELS for packs, else one of transformers' own."""
    for kernel, known_as in SEGMENT.items():
        AttentionInterface.register(known_as, partial(segment_attention, kernel=kernel))
        AttentionMaskInterface.register(known_as, _no_mask)
    model.get_decoder().set_attn_implementation(SEGMENT.get(name, name))


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _best(query: Tensor) -> str:
    """The first kernel that takes a query: flash kernels want 16 bits and heads of up to 256, FlexAttention 16 bits."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return "segment"
    kernels = _available()
    width = query.shape[-1]
    return next(k for k in kernels if k in ("flex", "segment") or (width <= 256 and width % 8 == 0))


@cache
def _available() -> tuple[str, ...]:
    return tuple(kernel for kernel in KERNELS if not unavailable(kernel))


class _Asked(NamedTuple):
    ends: Tensor
    longest: int
    scaling: float | None
    window: int | None


def _calls(query: Tensor, key: Tensor, value: Tensor, asked: _Asked) -> Tensor:
    gqa = key.shape[1] != query.shape[1]
    parts = []
    # Split once, and not a slice at a time: the gradient of each slice would be as long as the pack.
    for q, k, v in zip(*(x.split(_lengths(asked.ends), dim=2) for x in (query, key, value)), strict=True):
        mask = _band(q.shape[2], asked.window, query.device)
        parts.append(
            scaled_dot_product_attention(q, k, v, mask, 0.0, mask is None, scale=asked.scaling, enable_gqa=gqa)
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


@lru_cache(maxsize=2)  # a pack's, for all layers: each time a GPU is asked for them, it must first have done all else
def _lengths(ends: Tensor) -> list[int]:
    return [end - start for start, end in pairwise(ends.tolist())]


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which positions (L, L) a segment's attend to, where the window is shorter than the segment."""
    if window is None or window >= length:
        return None
    behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (behind >= 0) & (behind < window)


def _flex(query: Tensor, key: Tensor, value: Tensor, asked: _Asked) -> Tensor:
    blocks = block_mask(asked.ends, query.shape[2], asked.window)
    gqa = key.shape[1] != query.shape[1]
    out = _compiled_flex()(query, key, value, block_mask=blocks, scale=asked.scaling, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous()


@cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention)


@lru_cache(maxsize=2)  # a pack's is made once for all layers, and found again by the tensor of its boundaries
def block_mask(ends: Tensor, length: int, window: int | None) -> BlockMask:
    """FlexAttention's mask of a pack: for each block of positions those it may look at, from its first sample's start.

    Dong et al. 2024, https://arxiv.org/abs/2412.05496. Made from the boundaries (S + 1,), not from a T x T mask.
    """
    at = torch.arange(length, device=ends.device)
    sample = torch.searchsorted(ends, at, right=True)

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = (sample[q] == sample[k]) & (q >= k)
        return allowed if window is None else allowed & (q - k < window)

    firsts = at[::BLOCK]
    start = ends[sample[firsts] - 1].long()
    if window is not None:
        start = start.maximum(firsts - window + 1)
    begin = start // BLOCK
    count = (torch.arange(len(firsts), device=ends.device) - begin + 1).int()
    index = (begin[:, None] + torch.arange(len(firsts), device=ends.device)).clamp(max=len(firsts) - 1).int()
    return BlockMask.from_kv_blocks(
        count[None, None], index[None, None], BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length)
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, asked: _Asked) -> Tensor:
    groups = {"enable_gqa": True} if _GROUPS_ARE_ASKED_FOR and query.shape[1] != key.shape[1] else {}
    settings = {"scale": asked.scaling, "window_size": _window(asked.window), **groups}
    return varlen_attn(*_by_token(query, key, value), *_bounds(asked), **settings)[None]


def _flash2(query: Tensor, key: Tensor, value: Tensor, asked: _Asked) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # an extra

    return flash_attn_varlen_func(*_by_token(query, key, value), *_bounds(asked), **_flash_settings(asked))[None]


def _flash3(query: Tensor, key: Tensor, value: Tensor, asked: _Asked) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func  # built from flash-attn's folder `hopper`

    out = flash_attn_varlen_func(*_by_token(query, key, value), *_bounds(asked), **_flash_settings(asked))
    return (out[0] if isinstance(out, tuple) else out)[None]  # its first releases gave the sums beside it


def _by_token(*heads: Tensor) -> list[Tensor]:
    """(1, H, T, D) -> (T, H, D)."""
    return [x[0].transpose(0, 1) for x in heads]


def _bounds(asked: _Asked) -> tuple[Tensor, Tensor, int, int]:
    """The boundaries and the longest sample, of queries and of keys."""
    return asked.ends, asked.ends, asked.longest, asked.longest


def _flash_settings(asked: _Asked) -> dict[str, Any]:
    return {"softmax_scale": asked.scaling, "causal": True, "window_size": _window(asked.window)}


def _window(window: int | None) -> tuple[int, int]:
    """How many positions before and after its own one attends to, in the words of flash kernels."""
    return (-1 if window is None else window - 1, 0)
