"""How several GPUs train one model: what transformers is told of it, and what must be there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..conflicts import conflicts
from ..errors import RecipeError
from ..models.adapters import base_of
from ..recipe import Recipe
from ..recipe_file import deepspeed_config
from .ranks import Ranks, is_launched, join, world


def settled_launch(recipe: Recipe) -> Recipe:
    """The recipe with the strategy and the processes it is trained by here. Raises RecipeError where they cannot be.

    Where another launcher has started the processes, they are what counts.
    """
    _, size, _ = world()
    asked = recipe.launch.size
    if not is_launched() and (asked > 1 or recipe.sharded):
        what = f"launch.gpus: {asked} GPUs are asked for" if asked > 1 else f"launch.strategy: {recipe.strategy}"
        raise RecipeError(
            f"{what}, and this process was started by no launcher\n"
            "  Start it by `mantis-lite train`, torchrun or srun, or set launch.strategy=single."
        )
    counted = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"gpus": size, "nodes": 1})})
    strategy = counted.strategy
    if strategy == "single" and size > 1:
        raise RecipeError(
            f"launch.strategy: single, and {size} processes were started\n  Set launch.strategy=ddp, zero2 or zero3."
        )
    require_strategy(counted)
    launch = recipe.launch if size == 1 or size == asked else counted.launch
    launch = launch.model_copy(update={"strategy": strategy})
    settled = recipe.model_copy(update={"launch": launch})
    if problems := list(conflicts(settled)):
        raise RecipeError("\n".join(problems))
    return settled


def require_strategy(recipe: Recipe) -> None:
    """Raise RecipeError where a strategy cannot work here."""
    strategy = recipe.strategy
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        raise RecipeError(
            f"launch.strategy: {strategy} needs DeepSpeed, which is not installed\n"
            "  pip install 'mantis-lite[deepspeed]', or set launch.strategy=ddp."
        )
    gpus, sequence = recipe.launch.size, recipe.launch.sequence
    if recipe.launch.gpus and gpus % sequence:  # else there will be as many as can be seen
        raise RecipeError(
            f"launch.sequence: {sequence} GPUs are to share each row, and there are {gpus}\n"
            "  Set it to a number that divides them."
        )
    if strategy == "fsdp2" and (recipe.train.get("use_cpu") or not torch.cuda.is_available()):
        raise RecipeError(
            "launch.strategy: fsdp2 would be plain DDP without a GPU, as accelerate has it\n"
            "  Set launch.strategy=ddp, zero2 or zero3."
        )


def join_processes(recipe: Recipe) -> Ranks:
    """Join the other processes of a run, by a strategy that works here."""
    ranks = join()
    if recipe.strategy.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return replace(ranks, sequence=recipe.launch.sequence)


def process_arguments(ranks: Ranks) -> dict[str, Any]:
    """TrainingArguments of a run of several processes that a recipe may have otherwise."""
    if ranks.group is None:
        return {}
    settings: dict[str, Any] = {"ddp_find_unused_parameters": False}  # each process has a use for all that trains
    return settings if torch.cuda.is_available() else settings | {"ddp_backend": "gloo"}


def strategy_arguments(recipe: Recipe) -> dict[str, Any]:
    """TrainingArguments of a recipe's strategy."""
    if recipe.strategy in ("single", "ddp"):
        return {}
    if recipe.strategy == "fsdp2":
        wrapped = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
        return {"fsdp": True, "fsdp_config": wrapped}
    return {"deepspeed": deepspeed_config(recipe.strategy)}


def wrap_layers(model: nn.Module, plugin: Any) -> None:
    """Have FSDP2 part the language model's layers one by one, and all else as a whole.

    By itself it would part a tower's layers as well, which processes call unlike often: see `gather_at_once`.
    """
    plugin.transformer_cls_names_to_wrap = [layer_class(model).__name__]


def layer_class(model: nn.Module) -> type[nn.Module]:
    """The class of a language model's layers."""
    base = base_of(model)
    return type(base.model.get_decoder().layers[0])


def gather_at_once(model: nn.Module, parts: Iterable[str]) -> None:
    """Have ZeRO-3 gather these parts of a model as a whole, where the module that they lie in begins.

    By itself it gathers each layer when that is called. A pack's pictures go through the tower some at a time, so
    that the processes call it unlike often, and would wait for each other for ever.
    """
    from deepspeed import zero

    base = base_of(model)
    there = dict(base.named_modules())
    for path in parts:  # in one order, as processes gather together
        if path not in there:  # within a family, one model may lack what another has
            continue
        around = there[path.rpartition(".")[0]]
        for module in there[path].modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            for parameter in module.parameters(recurse=False):
                zero.register_external_parameter(around, parameter)
