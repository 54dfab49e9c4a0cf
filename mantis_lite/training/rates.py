"""Learning rates of parts: each group of the optimizer's is of one part, and so may have a rate of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import RecipeError

PART = "part"
"""What a group of an optimizer's calls its part."""


def require_trained(rates: Mapping[str, float], parts: Iterable[str]) -> None:
    """Raise RecipeError for a rate of a part that does not train: an adapter that is gone on with says what does."""
    for part in rates:
        if part not in parts:
            raise RecipeError(f"trainable.lr.{part}: model.adapter trains {', '.join(parts)}\n  Leave it out.")


def group_by_part(
    optimizer: Optimizer, parts: Mapping[str, Iterable[nn.Parameter]], rates: Mapping[str, float]
) -> None:
    """Split an optimizer's groups, before its first step, by the `parts` of their parameters, each at its rate.

    Parts that `rates` does not name keep the optimizer's.
    """
    part_of = {parameter: part for part, parameters in parts.items() for parameter in parameters}
    groups = []
    for group in optimizer.param_groups:
        found: dict[str, list[nn.Parameter]] = {part: [] for part in sorted(parts)}  # as at any later start
        for parameter in group["params"]:
            if parameter in part_of:
                found[part_of[parameter]].append(parameter)
        own = {part: like(rates.get(part, float(group["lr"])), group["lr"]) for part in found}
        split = [{**group, "params": held, "lr": own[part], PART: part} for part, held in found.items() if held]
        groups.extend(split or [group])
    assert rates.keys() <= {group.get(PART) for group in groups}, "an optimizer without groups"
    optimizer.param_groups = groups


def like(rate: float, other: Any) -> Any:
    """A rate as an optimizer holds its own: some want a tensor, one for each group."""
    return torch.full_like(other, rate) if torch.is_tensor(other) else rate


def rates_now(optimizer: Optimizer, own: Iterable[str]) -> dict[str, float]:
    """The rates to log: that of the parts without their `own`, or else of the first part, and each own."""
    rates = {group[PART]: float(group["lr"]) for group in optimizer.param_groups if PART in group}
    common = [rate for part, rate in rates.items() if part not in own] or list(rates.values())
    found = {f"learning_rate_{part}": rate for part, rate in rates.items() if part in own}
    return {"learning_rate": common[0]} | found
