"""Tensors that have a shape and no numbers, and pass for tensors on the CPU: autocast and autograd take them for such.

torch's own FakeTensor does the same for its compiler, which asks more of it, and takes several times as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Shape(Tensor):
    """Holds a tensor on the meta device, whose storage stands for its own."""

    on_meta: Tensor

    @staticmethod
    def __new__(cls, on_meta: Tensor) -> Shape:
        cpu = torch.device("cpu")
        made = Tensor._make_wrapper_subclass(
            cls, on_meta.shape, on_meta.stride(), on_meta.storage_offset(), dtype=on_meta.dtype, device=cpu
        )
        made.on_meta = on_meta
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class Shapes(TorchDispatchMode):
    """Has every tensor that is made within it be a Shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives, by shape; where it works in place, the very tensors that came in."""
    made = _made(func, _described(args), _described(kwargs.items()))
    if made is not None:
        return Shape(_empty(made))
    came: dict[int, Tensor] = {}
    inner = [_inner(arg, came) for arg in args]
    named = {name: _inner(arg, came) for name, arg in kwargs.items()}
    if not came or "device" in named:
        named["device"] = "meta"
    return _outer(func(*inner, **named), came)


def _inner(arg: Any, came: dict[int, Tensor]) -> Any:
    """An argument on the meta device; `came` remembers what stands for which tensor."""
    if isinstance(arg, Tensor):
        found = arg.on_meta if isinstance(arg, Shape) else arg.to("meta")
        came[id(found)] = arg
        return found
    if type(arg) in (list, tuple):
        return type(arg)(_inner(each, came) for each in arg)
    return arg


def _outer(out: Any, came: dict[int, Tensor]) -> Any:
    if isinstance(out, Tensor):
        return came[id(out)] if id(out) in came else Shape(out)
    if type(out) in (list, tuple):
        return type(out)(_outer(each, came) for each in out)
    return out


class _Like(NamedTuple):
    """What an operation goes by of a tensor without numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Value(NamedTuple):
    """Any other argument: 1, 1.0 and True are three."""

    kind: type
    value: Any


@cache
def _made(func: Any, args: tuple[Any, ...], kwargs: tuple[Any, ...]) -> _Like | None:
    """The tensor that an operation makes of others; None where it makes none, several, or one in a storage of theirs.

    A step does the same hundreds of times, and torch takes long to find out each time.
    """
    came: list[Tensor] = []
    inner, named = _stood_in(args, came), dict(_stood_in(kwargs, came))
    if not came or any(argument.alias_info is not None for argument in func._schema.arguments):
        return None
    if "device" in named:
        named["device"] = "meta"
    out = func(*inner, **named)
    if not isinstance(out, Tensor) or any(_storage(out)._cdata == _storage(tensor)._cdata for tensor in came):
        return None
    like = _Like(out.shape, out.stride(), out.dtype)
    return like if _storage(_empty(like)).nbytes() == _storage(out).nbytes() else None


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _empty(like: _Like) -> Tensor:
    return torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device="meta")


def _described(args: Any) -> tuple[Any, ...]:
    """Arguments by what tells them apart, lists as tuples."""
    return tuple(_describe(arg) for arg in args)


def _describe(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        tensor = arg.on_meta if isinstance(arg, Shape) else arg
        return _Like(tensor.shape, tensor.stride(), tensor.dtype)
    return _described(arg) if type(arg) in (list, tuple) else _Value(type(arg), arg)


def _stood_in(described: tuple[Any, ...], came: list[Tensor]) -> list[Any]:
    """Arguments again, with tensors to stand in for those that were described."""
    return [_stand_in(each, came) for each in described]


def _stand_in(described: Any, came: list[Tensor]) -> Any:
    if isinstance(described, _Like):
        came.append(_empty(described))
        return came[-1]
    return described.value if isinstance(described, _Value) else _stood_in(described, came)
