"""A training step without numbers: the model's own layers on tensors that have shapes alone, and what is alive.

So what LoRA, DoRA, checkpointing or a family's layers keep is not written down anywhere: it is what they keep. Only
what a GPU does otherwise than a CPU is stood in for (`standins.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..models.activations import checkpoint_layers, split_mlps, tile_mlps
from ..models.adapters import base_of
from ..models.attention import use_attention
from ..models.fused_lora import fuse_lora
from ..models.kernels import bind_layers, turn_by
from ..models.lm_head import SCORES, Head
from ..recipe import Kernel
from . import standins
from .ledger import BLOCK, Ledger
from .seeing import see, trained
from .shapes import Shapes
from .step import Machine, Pack

OFFLOADED = 1 << 20
"""Bytes from which a kept tensor goes to the host where activations are offloaded: smaller ones are in no account."""


def rehearse(model: nn.Module, machine: Machine, pack: Pack) -> dict[str, Counter[str]]:
    """Walk a step through: bytes alive besides weights and optimizer, by term, at the peak of each phase.

    `model` is on the meta device, as it trains; it is used up.
    """
    base = base_of(model)
    _prepare(base, machine)
    ledger = Ledger(BLOCK if machine.gpu else 1)
    with _as_on(machine):
        with Shapes():
            _fill(model, machine)
        model.train()
        _watch_gradients(model, machine, ledger)
        ledger.leave_out([*model.parameters(), *model.buffers()])
        with ledger:
            if machine.accumulates and not machine.sharded:
                with ledger.under("gradients"):
                    for parameter in trained(model):
                        parameter.grad = torch.empty_like(parameter)
            with _computing(machine):
                loss = _forward(base, machine, pack, ledger)
            ledger.phase = "backward"
            with ledger.under("in flight in the backward pass"):
                loss.backward()
    return ledger.peaks


def _prepare(base: Any, machine: Machine) -> None:
    """Attention, kernels, checkpointing and the tiles of the loss as the step has them."""
    AttentionInterface.register(standins.ATTENTION, standins.attend)
    AttentionMaskInterface.register(standins.ATTENTION, standins.no_mask)
    if machine.gpu:
        base.set_attn_implementation(standins.ATTENTION)
    decoder = _decoder(base)
    if machine.attention == "eager":
        decoder.set_attn_implementation("eager")
    elif not machine.gpu:
        use_attention(base, machine.attention)
    _fuse(base, machine.kernels)
    if machine.gpu:
        for module in base.modules():
            if type(module) is nn.Dropout:
                module.__class__ = standins.Dropout
    if machine.checkpointed != 0:
        checkpoint_layers(base, machine.checkpointed)
    if machine.mlp_tile:
        tile_mlps(base, machine.mlp_tile)
    elif not machine.gpu:
        split_mlps(base)


def _decoder(base: Any) -> PreTrainedModel:
    return base.get_decoder()


def _fuse(base: nn.Module, kernels: Collection[Kernel]) -> None:
    """What stands in for the kernels; LoRA's product is computed as it is."""
    bind: dict[str, Callable] = {name: partial(_stand_in, forward) for name, forward in standins.LAYERS.items()}
    bind |= {"lora": fuse_lora, "rope": partial(turn_by, standins.rotate)}
    bind_layers(base, {kernel: bind[kernel] for kernel in kernels})


def _stand_in(forward: Callable, module: Any) -> None:
    module.forward = MethodType(forward, module)


def _fill(model: nn.Module, machine: Machine) -> None:
    """Shapes without numbers in place of the meta device's; what trains is in float32, as the trainer holds it."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    dtype = machine.trained if parameter.requires_grad else parameter.dtype
                    if machine.strategy == "fsdp2":  # which gathers them in what is computed in
                        dtype = machine.dtype
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _watch_gradients(model: nn.Module, machine: Machine, ledger: Ledger) -> None:
    """Gradients stay; where each GPU has a share of them, one goes to the others while the next is computed."""
    on_its_way: list[Tensor] = []

    def settle(parameter: Tensor) -> None:
        assert parameter.grad is not None
        ledger.move(parameter.grad, "gradients")
        if machine.sharded:
            on_its_way[:] = [parameter.grad]
            parameter.grad = None

    for parameter in trained(model):
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
        stack.enter_context(patch("mantis_lite.models.fused_lora.unpacked", standins.unpacked))
        stack.enter_context(patch("transformers.masking_utils.is_tracing", lambda *_: True))  # or it looks for numbers
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


def _forward(base: Any, machine: Machine, pack: Pack, ledger: Ledger) -> Tensor:
    """Pictures, words, layers, loss."""
    features: Tensor | None = None
    deep: list[Tensor] = []
    if pack.grids:
        features, deep = see(base, machine, pack, ledger)
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


class _Ends(tuple[int, ...]):
    """Boundaries, for attention a segment at a time, which reads them out of a tensor."""

    def tolist(self) -> list[int]:
        return list(self)


def _offloading(machine: Machine) -> Any:
    """What layers keep goes to the host as it is kept, and comes back when it is needed.

    What came back is let go when the node that brings the next back is done (trl 1.16: activation_offloading.py).
    """
    if not machine.offload:
        return ExitStack()
    held: dict[int, Tensor] = {}

    def away(kept: Tensor) -> Any:
        large = kept.numel() * kept.element_size() >= OFFLOADED and not isinstance(kept, nn.Parameter)
        return (kept.shape, kept.dtype) if large else kept

    def back(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        before = list(held)

        def let_go(*_: Any) -> None:
            for key in before:
                held.pop(key, None)

        torch._C._current_autograd_node().register_hook(let_go)
        found = torch.empty(kept[0], dtype=kept[1])
        held[id(found)] = found
        return found

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
    scored = _Select.apply(hidden[:, :-1], pack.supervised)
    if machine.gpu:
        return standins.FusedHead.apply(scored, weight, machine.dtype).sum()
    targets = torch.empty(pack.supervised, dtype=torch.long)
    return -Head.apply(scored, weight, None, targets, 1.0, standins.WORDS, None, 1.0, SCORES)[0].sum()


class _Select(torch.autograd.Function):
    """The positions with loss, out of all."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, count: int) -> Tensor:
        ctx.shape = hidden.shape
        return hidden.new_empty(count, hidden.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_empty(ctx.shape), None
