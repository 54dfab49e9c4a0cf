"""How each kind of model sees its pictures, on tensors that have shapes and no numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.tower import at_a_time
from .ledger import Ledger
from .step import Machine, Pack


def trained(module: nn.Module) -> Iterator[nn.Parameter]:
    """What of a module is trained."""
    return (parameter for parameter in module.parameters() if parameter.requires_grad)


class _Bounds(list[int]):
    """Boundaries of samples, or lengths of pictures: numbers where there are none in tensors."""

    def tolist(self) -> list[int]:
        return list(self)

    def __getitem__(self, at: Any) -> Any:
        return self

    def __sub__(self, other: Any) -> _Bounds:
        return self


def see(base: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    """Pictures through the tower and the projector, as the family does it: features (N, H), and what goes deeper."""
    with ledger.under("vision tower and projector"):
        return SEEING[base.config.model_type](base.model, machine, pack, ledger)


def _grad(module: nn.Module) -> Any:
    """A part that is frozen runs without recording."""
    return torch.set_grad_enabled(any(True for _ in trained(module)))


def _pixels(ledger: Ledger, machine: Machine, pack: Pack, *shape: int) -> Tensor:
    """Pixels in float32, as they come; on a card for the whole step, on a CPU in numpy's memory."""
    with ledger.under("pixels"):
        pixels = torch.empty(*shape)
        if machine.gpu:
            ledger.hold(pixels, torch.empty(int(pixels.numel() * pack.waiting)))
        else:
            ledger.leave_out([pixels])
    return pixels


def _llava(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    tower, config = model.vision_tower, model.config
    side = config.vision_config.image_size
    pixels = _pixels(ledger, machine, pack, len(pack.grids), 3, side, side)
    with _grad(tower):
        hidden = tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":
        hidden = hidden[:, 1:]
    return model.multi_modal_projector(hidden), []


def _encode(tower: Any, pixels: Tensor) -> Tensor:
    """Idefics' towers from their pixels on, where positions go by numbers that are not there."""
    embeddings = tower.embeddings
    hidden = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    hidden = hidden + embeddings.position_embedding(torch.empty(hidden.shape[:2], dtype=torch.long))
    return tower.post_layernorm(tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state)


def _idefics2(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    tower, patch_size = model.vision_model, model.config.vision_config.patch_size
    groups = []
    for (rows, columns), count in Counter(pack.grids).items():
        most = at_a_time(rows * columns)
        members = (min(most, count - at) for at in range(0, count, most))
        groups += [_pixels(ledger, machine, pack, each, 3, rows * patch_size, columns * patch_size) for each in members]
    found: list[Tensor] = []
    alike: Counter[torch.Size] = Counter()
    trains, hidden = any(True for _ in trained(model.connector)), torch.empty(0)
    for pixels in groups:
        pixels = pixels.to(model.dtype)
        alike[pixels.shape] += 1
        if alike[pixels.shape] > 2 and machine.checkpointed != 0 and not any(True for _ in trained(tower)):
            # What is left of such a group is what was left of the one before, and it takes no more on its way.
            found.append(torch.empty_like(found[-1]))
            if trains:
                ledger.hold(torch.empty_like(hidden))
            continue
        with _grad(tower):
            hidden = _encode(tower, pixels)
        mask = torch.empty(hidden.shape[:2], dtype=torch.bool)
        if machine.checkpointed != 0:
            found.append(checkpoint(model.connector, hidden, mask, use_reentrant=False))
        else:
            found.append(model.connector(hidden, attention_mask=mask))
    return torch.cat(found)[torch.empty(len(pack.grids), dtype=torch.long)], []


def _idefics3(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    vision = model.config.vision_config
    tiles = max(1, pack.patches // (vision.image_size // vision.patch_size) ** 2)
    pixels = _pixels(ledger, machine, pack, tiles, 3, vision.image_size, vision.image_size).to(machine.dtype)
    with _grad(model.vision_model):
        hidden = _encode(model.vision_model, pixels)
    return model.connector(hidden), []


def _fuyu(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    pixels = _pixels(ledger, machine, pack, 1, pack.patches, model.vision_embed_tokens.in_features)
    return model.vision_embed_tokens(pixels.to(machine.dtype)), []


def _qwen(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    tower = model.visual
    config = tower.config
    width = 3 * config.temporal_patch_size * config.patch_size**2
    patches = pack.patches - pack.patches % config.spatial_merge_size**2
    pixels = _pixels(ledger, machine, pack, patches, width).to(machine.dtype)
    ends = _Bounds([patches])
    deep = []
    blocks_train = any(True for _ in trained(tower.blocks))
    with torch.set_grad_enabled(blocks_train):
        hidden = tower.patch_embed(pixels).reshape(patches, -1)
    dims = hidden.shape[-1] // config.num_heads
    turned = (hidden.new_empty(patches, dims), hidden.new_empty(patches, dims))
    marks = list(getattr(config, "deepstack_visual_indexes", ()))
    for number, block in enumerate(tower.blocks):
        with torch.set_grad_enabled(blocks_train):
            hidden = block(hidden, cu_seqlens=ends, position_embeddings=turned)
        if number in marks:
            deep.append(tower.deepstack_merger_list[marks.index(number)](hidden))
    return tower.merger(hidden), deep


SEEING: dict[str, Callable[[Any, Machine, Pack, Ledger], tuple[Tensor, list[Tensor]]]] = {
    "llava": _llava,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "fuyu": _fuyu,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
}
"""How each kind of model sees: its `get_image_features`, without what goes by numbers in a tensor."""
