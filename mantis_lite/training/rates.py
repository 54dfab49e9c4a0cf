"""Learning rates of parts: each group of the optimizer's is of one part, and so may have a rate of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from ..errors import RecipeError

PART = "part"
"""What a group of an optimizer's calls its part."""


def require_trained(rates: Mapping[str, float], parts: Iterable[str]) -> None:
    """Raise RecipeError for a rate of a part that does not train, as an adapter that is gone on with may have it."""
    for part in rates:
        if part not in parts:
            raise RecipeError(f"trainable.lr.{part}: what trains is {', '.join(parts)}\n  Leave it out.")


def group_by_part(
    optimizer: Optimizer, parts: Mapping[str, Iterable[nn.Parameter]], rates: Mapping[str, float]
) -> None:
    """Split an optimizer's groups, before its first step, by the `parts` of their parameters, each at its rate.

    Parts that `rates` does not name keep the optimizer's. Raises RecipeError where it has no groups to split.
    """
    part_of = {parameter: part for part, parameters in parts.items() for parameter in parameters}
    groups = []
    for group in optimizer.param_groups:
        found: dict[str, list[nn.Parameter]] = {part: [] for part in sorted(parts)}  # as at any later start
        for parameter in group["params"]:
            if parameter in part_of:
                found[part_of[parameter]].append(parameter)
        split = [{**group, "params": held, PART: part} for part, held in found.items() if held]
        groups.extend(split or [group])
    missing = rates.keys() - {group.get(PART) for group in groups}
    if missing:
        why = f"{type(optimizer).__name__} has no groups of parameters, whose rates could differ"
        raise RecipeError(f"trainable.lr.{min(missing)}: {why}\n  Set another memory.optimizer, or leave it out.")
    for group in groups:
        group["lr"] = rates.get(group.get(PART, ""), group["lr"])
    optimizer.param_groups = groups


def rates_now(optimizer: Optimizer, own: Iterable[str]) -> dict[str, float]:
    """What a log says of rates: that of parts without their `own`, or where there are none of a first, and each own."""
    rates = {group[PART]: float(group["lr"]) for group in optimizer.param_groups if PART in group}
    common = [rate for part, rate in rates.items() if part not in own] or list(rates.values())
    found = {f"learning_rate_{part}": rate for part, rate in rates.items() if part in own}
    return {"learning_rate": common[0]} | found
