"""A training step without numbers: the model's own layers on tensors that have shapes alone, and what is alive.

So what LoRA, DoRA, checkpointing or a family's layers keep is not written down anywhere: it is what they keep. Only
what a GPU does otherwise than a CPU is stood in for (`standins.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from ..models.activations import checkpoint_layers, tile_mlps
from ..models.attention import use_attention
from ..models.idefics2 import TOWER_PATCHES
from . import standins
from .ledger import BLOCK, Ledger

OFFLOADED = 1 << 20
"""Bytes from which a kept tensor goes to the host where activations are offloaded: smaller ones are in no account."""


@dataclass(frozen=True)
class Pack:
    """The largest row of a run: tokens, of which `supervised` have loss, in samples of at most `longest`; and pictures.

    `grids` are the (rows, columns) of the vision tower's positions for each picture, or each view of one. `waiting` is
    how many times its pictures are on the card beside them: transformers' Trainer fetches all rows of an optimizer step
    at once (`get_batch_samples`).
    """

    tokens: int
    longest: int
    supervised: int
    grids: tuple[tuple[int, int], ...] = ()
    waiting: float = 0.0

    @property
    def crowd(self) -> int:
        """Positions of the most pictures of a shape that go through Idefics2's tower and connector at a time."""
        crowds = (min(TOWER_PATCHES, r * c * count) for (r, c), count in Counter(self.grids).items())
        return max(crowds, default=0)

    @property
    def patches(self) -> int:
        """Positions of the vision tower in all."""
        return sum(rows * columns for rows, columns in self.grids)


@dataclass(frozen=True)
class Machine:
    """Where and how a step runs, as far as memory goes.

    `gpu` is whether its kernels are a GPU's; `dtype` the precision computed in. `checkpointed` is how many layers are
    computed again (None: all), `mlp_tile` how many tokens an MLP sees at a time (None: all). `attention` is segment,
    sdpa or eager; `fused` whether RMSNorm and SwiGLU are single kernels; `head` is fused (TRL's), full (all logits at
    once, in float32), "full, 16 bits" or none. `offload` sends what layers keep to the host; `accumulates` is whether
    gradients of a row before are there already. What trains is held in `trained`.
    """

    gpu: bool = True
    dtype: torch.dtype = torch.bfloat16
    checkpointed: int | None = None
    mlp_tile: int | None = None
    attention: str = "segment"
    fused: bool = False
    head: str = "fused"
    offload: bool = False
    accumulates: bool = True
    trained: torch.dtype = torch.float32


def rehearse(model: nn.Module, machine: Machine, pack: Pack) -> dict[str, Counter[str]]:
    """Walk a step through: bytes alive besides weights and optimizer, by term, at the peak of each phase.

    `model` is on the meta device, as it trains; it is used up.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    _prepare(base, machine)
    ledger = Ledger(BLOCK if machine.gpu else 1)
    with FakeTensorMode(allow_non_fake_inputs=True), _as_on(machine):
        _fill(model, machine)
        model.train()
        _watch_gradients(model, ledger)
        ledger.leave_out([*model.parameters(), *model.buffers()])
        with ledger:
            if machine.accumulates:
                with ledger.under("gradients"):
                    for parameter in _trained(model):
                        parameter.grad = torch.empty_like(parameter)
            with _computing(machine):
                loss = _forward(base, machine, pack, ledger)
            ledger.phase = "backward"
            with ledger.under("in flight in the backward pass"):
                loss.backward()
    return ledger.peaks


def _trained(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters() if parameter.requires_grad)


def _prepare(base: Any, machine: Machine) -> None:
    """Attention, kernels and checkpointing as the step has them."""
    AttentionInterface.register(standins.ATTENTION, standins.attend)
    AttentionMaskInterface.register(standins.ATTENTION, standins.no_mask)
    if machine.gpu:
        base.set_attn_implementation(standins.ATTENTION)
    decoder = _decoder(base)
    if machine.attention == "eager":
        decoder.set_attn_implementation("eager")
    elif not machine.gpu:
        use_attention(base, machine.attention)
    if machine.fused:
        _fuse(decoder)
    if machine.gpu:
        for module in base.modules():
            if type(module) is nn.Dropout:
                module.__class__ = standins.Dropout
    if machine.checkpointed != 0:
        checkpoint_layers(base, machine.checkpointed)
    if machine.mlp_tile:
        tile_mlps(base, machine.mlp_tile)


def _decoder(base: Any) -> PreTrainedModel:
    return base.get_decoder()


def _fuse(decoder: nn.Module) -> None:
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(standins.norm, module)
        elif {"gate_proj", "up_proj", "down_proj"} <= dict(module.named_children()).keys():
            module.forward = MethodType(standins.swiglu, module)


def _fill(model: nn.Module, machine: Machine) -> None:
    """Shapes without numbers in place of the meta device's; what trains is in float32, as the trainer holds it."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    dtype = machine.trained if parameter.requires_grad else parameter.dtype
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _watch_gradients(model: nn.Module, ledger: Ledger) -> None:
    def settle(parameter: Tensor) -> None:
        assert parameter.grad is not None
        ledger.move(parameter.grad, "gradients")

    for parameter in _trained(model):
        parameter.register_post_accumulate_grad_hook(settle)


def _float_norm(input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Autocast on a GPU computes a layer norm in float32, and hands float32 on; on a CPU it does not."""
    weight, bias = (None if given is None else given.float() for given in (weight, bias))
    return _layer_norm(input.float(), shape, weight, bias, eps)


_layer_norm = nn.functional.layer_norm


@contextmanager
def _as_on(machine: Machine) -> Iterator[None]:
    """Let PEFT believe in the GPU's autocast, backward passes included, and DoRA see weights in full."""
    with ExitStack() as stack:
        stack.enter_context(patch("peft.tuners.lora.dora.dequantize_module_weight", standins.unpacked))
        if machine.gpu and machine.dtype != torch.float32:
            torch.set_autocast_enabled("cuda", True)
            stack.callback(torch.set_autocast_enabled, "cuda", False)
            stack.enter_context(patch("torch.nn.functional.layer_norm", _float_norm))
        yield


@contextmanager
def _computing(machine: Machine) -> Iterator[None]:
    if machine.gpu and machine.dtype != torch.float32:
        with torch.autocast("cpu", machine.dtype):
            yield
    else:
        yield


class _Bounds(list[int]):
    """Boundaries of samples, or lengths of pictures: numbers where there are none in tensors."""

    def tolist(self) -> list[int]:
        return list(self)

    def __getitem__(self, at: Any) -> Any:
        return self

    def __sub__(self, other: Any) -> _Bounds:
        return self


def _forward(base: Any, machine: Machine, pack: Pack, ledger: Ledger) -> Tensor:
    """Pictures, words, layers, loss."""
    features: Tensor | None = None
    deep: list[Tensor] = []
    if pack.grids:
        features, deep = _see(base, machine, pack, ledger)
    ledger.phase = "language model"
    decoder: Any = _decoder(base)
    with ledger.under("language model: kept for the backward pass"), _offloading(machine):
        ids = torch.empty(1, pack.tokens, dtype=torch.long)
        words = base.get_input_embeddings()(ids)
        if features is not None:
            words = words.masked_scatter(torch.empty(1, pack.tokens, 1, dtype=torch.bool), features.to(words.dtype))
        hidden = decoder(inputs_embeds=words, use_cache=False, **_where(base, machine, pack)).last_hidden_state
    if words.requires_grad:
        words.register_hook(lambda _: setattr(ledger, "phase", "backward, pictures"))
    del words, features, deep
    ledger.phase = "loss"
    with ledger.under("loss"):
        return _loss(base, machine, pack, hidden)


def _where(base: Any, machine: Machine, pack: Pack) -> dict[str, Any]:
    """Positions and boundaries, or the mask, of a pack."""
    lengths = [pack.longest] * (pack.tokens // pack.longest)
    if rest := pack.tokens - sum(lengths):
        lengths.append(rest)
    rows = (3,) if "mrope_section" in str(_decoder(base).config.to_dict()) else ()
    at: dict[str, Any] = {"position_ids": torch.empty(*rows, 1, pack.tokens, dtype=torch.long)}
    if machine.attention == "segment" and not machine.gpu:
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + length)
        return at | {"cu_seq_lens_q": _Ends(ends), "max_length_q": pack.longest}
    if machine.attention != "segment":
        dtype = machine.dtype if machine.attention == "eager" else torch.bool
        at["attention_mask"] = torch.empty(1, 1, pack.tokens, pack.tokens, dtype=dtype)
    return at


class _Ends(list[int]):
    def tolist(self) -> list[int]:
        return list(self)


def _offloading(machine: Machine) -> Any:
    """What layers keep goes to the host as it is kept, and comes back when it is needed."""
    if not machine.offload:
        return ExitStack()

    def away(kept: Tensor) -> Any:
        large = kept.numel() * kept.element_size() >= OFFLOADED and not isinstance(kept, nn.Parameter)
        return (kept.shape, kept.dtype) if large else kept

    def back(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])

    return torch.autograd.graph.saved_tensors_hooks(away, back)


def _loss(base: Any, machine: Machine, pack: Pack, hidden: Tensor) -> Tensor:
    if machine.head == "none":
        return base.score(hidden[:, :1].float()).sum() if hasattr(base, "score") else hidden[:, :1].float().sum()
    weight = base.get_output_embeddings().weight
    if machine.head.startswith("full"):
        logits = nn.functional.linear(hidden, weight)[:, :-1].flatten(0, 1)
        labels = torch.empty(pack.tokens - 1, dtype=torch.long)
        with torch.autocast("cpu", enabled=False):
            return nn.functional.cross_entropy(logits if "16" in machine.head else logits.float(), labels)
    hidden = hidden[:, :-1]
    if machine.gpu:
        scored = _Select.apply(hidden, pack.supervised)
        return standins.FusedHead.apply(scored, weight, machine.dtype).sum()
    targets = torch.empty(pack.tokens - 1, dtype=torch.long)
    rows = hidden.reshape(-1, hidden.shape[-1])
    found = ChunkedLogProbFunction.apply(
        rows, weight, None, targets, 1.0, standins.WORDS, None, 1.0, ("log_probs", "entropy", "is_top1")
    )
    return -found[0].sum()


class _Select(torch.autograd.Function):
    """The positions with loss, out of all."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, count: int) -> Tensor:
        ctx.shape = hidden.shape
        return hidden.new_empty(count, hidden.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_empty(ctx.shape), None


def _see(base: Any, machine: Machine, pack: Pack, ledger: Ledger) -> tuple[Tensor, list[Tensor]]:
    """Pictures through the tower and the projector, as the family does it: features (N, H), and what goes deeper."""
    see = SEEING[base.config.model_type]
    with ledger.under("vision tower and projector"):
        return see(base.model, machine, pack, ledger)


def _grad(module: nn.Module) -> Any:
    """A part that is frozen runs without recording."""
    return torch.set_grad_enabled(any(True for _ in _trained(module)))


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
        most = max(1, TOWER_PATCHES // (rows * columns))
        members = (min(most, count - at) for at in range(0, count, most))
        groups += [_pixels(ledger, machine, pack, each, 3, rows * patch_size, columns * patch_size) for each in members]
    found: list[Tensor] = []
    alike: Counter[torch.Size] = Counter()
    trains, hidden = any(True for _ in _trained(model.connector)), torch.empty(0)
    for pixels in groups:
        pixels = pixels.to(model.dtype)
        alike[pixels.shape] += 1
        if alike[pixels.shape] > 2 and machine.checkpointed != 0 and not any(True for _ in _trained(tower)):
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
    blocks_train = any(True for _ in _trained(tower.blocks))
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


def grid(patches: int, size: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """Rows and columns of so many patches in a picture of about this shape, (width, height)."""
    rows = max(1, round(math.sqrt(patches * size[1] / size[0])))
    return rows, max(1, round(patches / rows))


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
