"""How each kind of model sees its pictures, on tensors that have shapes and no numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.levels import LEVELS, look_up, look_up_patches
from ..models.tower import at_a_time, projected_at_a_time
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
    if "projector" in machine.cached:
        width = base.config.get_text_config().hidden_size
        deep = [_kept(ledger, machine, pack, pack.shown, width) for _ in _deeper(base.config)]
        return _kept(ledger, machine, pack, pack.shown, width), deep
    with ledger.under("vision tower and projector"):
        return SEEING[base.config.model_type](base.model, machine, pack, ledger)


def _grad(module: nn.Module) -> Any:
    """A part that is frozen runs without recording."""
    return torch.set_grad_enabled(any(True for _ in trained(module)))


def _pixels(ledger: Ledger, machine: Machine, pack: Pack, *shape: int) -> Tensor:
    """Pixels in bytes, as they come; on a card for the whole step, on a CPU in numpy's memory."""
    return _come("pixels", torch.uint8, ledger, machine, pack, *shape)


def _levels() -> Tensor:
    """What a processor makes of each level (`models/levels.py`)."""
    return torch.empty(3, LEVELS)


def _kept(ledger: Ledger, machine: Machine, pack: Pack, *shape: int) -> Tensor:
    """What memory.vision_cache keeps of pictures, in the precision of the weights."""
    return _come("kept features of pictures", machine.dtype, ledger, machine, pack, *shape)


def _come(term: str, dtype: torch.dtype, ledger: Ledger, machine: Machine, pack: Pack, *shape: int) -> Tensor:
    with ledger.under(term):
        come = torch.empty(*shape, dtype=dtype)
        if machine.gpu:
            ledger.hold(come, torch.empty(int(come.numel() * pack.waiting), dtype=dtype))
        else:
            ledger.leave_out([come])
    return come


def _deeper(config: Any) -> Sequence[int]:
    """Layers of the tower that feed the language model beside the last (Qwen3-VL)."""
    return getattr(config.vision_config, "deepstack_visual_indexes", None) or ()


def _project(module: nn.Module, hidden: Tensor, machine: Machine) -> Tensor:
    """A projector behind models/tower.py: computed again where layers are."""
    return module(hidden) if machine.checkpointed == 0 else checkpoint(module, hidden, use_reentrant=False)


def _llava(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    tower, config = model.vision_tower, model.config
    vision, drops = config.vision_config, config.vision_feature_select_strategy == "default"
    positions = (vision.image_size // vision.patch_size) ** 2
    found = []
    if machine.cached:
        hidden = _kept(ledger, machine, pack, len(pack.grids), pack.shown // len(pack.grids), vision.hidden_size)
        return _project(model.multi_modal_projector, hidden, machine), []
    pixels = _pixels(ledger, machine, pack, len(pack.grids), 3, vision.image_size, vision.image_size)
    for part in pixels.split(at_a_time(positions)):
        numbers = look_up(part, _levels())
        with _grad(tower):
            hidden = tower(numbers, output_hidden_states=True).hidden_states[config.vision_feature_layer]
        found.append(_project(model.multi_modal_projector, hidden[:, 1:] if drops else hidden, machine))
    return torch.cat(found), []


def _encode(tower: Any, pixels: Tensor) -> Tensor:
    """Idefics' towers from their pixels on, where positions go by numbers that are not there."""
    embeddings = tower.embeddings
    hidden = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    hidden = hidden + embeddings.position_embedding(torch.empty(hidden.shape[:2], dtype=torch.long))
    return tower.post_layernorm(tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state)


def _connect(connector: Any, hidden: Tensor, machine: Machine) -> Tensor:
    """Idefics2's connector, a few pictures at a time; where it is computed again, two of a kind tell of all."""
    found: list[Tensor] = []
    for few in hidden.split(projected_at_a_time(hidden.shape[1])):
        mask = torch.empty(few.shape[:2], dtype=torch.bool)
        if machine.checkpointed != 0 and len(found) > 1 and len(few) == len(found[-1]):
            found.append(torch.empty_like(found[-1]))
        elif machine.checkpointed != 0:
            found.append(checkpoint(connector, few, mask, use_reentrant=False))
        else:
            found.append(connector(few, attention_mask=mask))
    return torch.cat(found)


def _idefics2(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    tower, patch_size = model.vision_model, model.config.vision_config.patch_size
    groups = []
    for (rows, columns), count in Counter(pack.grids).items():
        most = at_a_time(rows * columns)
        for each in (min(most, count - at) for at in range(0, count, most)):
            if machine.cached:
                groups.append(_kept(ledger, machine, pack, each, rows * columns, tower.config.hidden_size))
            else:
                groups.append(_pixels(ledger, machine, pack, each, 3, rows * patch_size, columns * patch_size))
    found: list[Tensor] = []
    alike: Counter[torch.Size] = Counter()
    trains, hidden = any(True for _ in trained(model.connector)), torch.empty(0)
    for group in groups:
        pixels = look_up(group, _levels()).to(model.dtype)
        alike[pixels.shape] += 1
        if alike[pixels.shape] > 2 and machine.checkpointed != 0 and not any(True for _ in trained(tower)):
            # What is left of such a group is what was left of the one before, and it takes no more on its way.
            found.append(torch.empty_like(found[-1]))
            if trains:
                ledger.hold(torch.empty_like(hidden))
            continue
        with _grad(tower):
            hidden = pixels if machine.cached else _encode(tower, pixels)
        found.append(_connect(model.connector, hidden, machine))
    return torch.cat(found)[torch.empty(len(pack.grids), dtype=torch.long)], []


def _idefics3(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    vision, found = model.config.vision_config, []
    positions = (vision.image_size // vision.patch_size) ** 2
    tiles = max(1, pack.patches // positions)
    if machine.cached:
        hidden = _kept(ledger, machine, pack, tiles, positions, vision.hidden_size)
        return _project(model.connector, hidden, machine), []
    pixels = _pixels(ledger, machine, pack, tiles, 3, vision.image_size, vision.image_size)
    for part in pixels.split(at_a_time(positions)):
        with _grad(model.vision_model):
            hidden = _encode(model.vision_model, look_up(part, _levels()).to(machine.dtype))
        found.append(_project(model.connector, hidden, machine))
    return torch.cat(found), []


def _fuyu(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    pixels = _pixels(ledger, machine, pack, 1, pack.patches, model.vision_embed_tokens.in_features)
    return model.vision_embed_tokens(look_up_patches(pixels, _levels(), -1).to(machine.dtype)), []


def _qwen(model: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    tower = model.visual
    config = tower.config
    width = 3 * config.temporal_patch_size * config.patch_size**2
    patches = pack.patches - pack.patches % config.spatial_merge_size**2
    pixels = look_up_patches(_pixels(ledger, machine, pack, patches, width), _levels(), -2).to(machine.dtype)
    ends = _Bounds([patches])
    deep = []
    blocks_train = any(True for _ in trained(tower.blocks))
    with torch.set_grad_enabled(blocks_train):
        hidden = tower.patch_embed(pixels).reshape(patches, -1)
    dims = hidden.shape[-1] // config.num_heads
    turned = (hidden.new_empty(patches, dims), hidden.new_empty(patches, dims))
    marks = list(_deeper(model.config))
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
