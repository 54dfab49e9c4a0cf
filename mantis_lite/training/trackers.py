"""Trackers, which report a run elsewhere (train.report_to): they may fail, and the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from ..errors import RecipeError, one_line

log = logging.getLogger(__name__)

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]

PATIENCE = 3
"""Failures in a row after which a tracker is told nothing more."""


class Tracker(TrainerCallback):
    """Passes the trainer's events on to one tracker, and stands between its failures and the run.

    The first failure is a warning, and so, at the end, is how many events were `lost` to it.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        self.name, self.callback = type(callback).__name__.removesuffix("Callback"), callback
        self.failures = self.lost = 0
        for event in EVENTS:
            if getattr(type(callback), event) is not getattr(TrainerCallback, event):
                setattr(self, event, partial(self._pass_on, event))

    def _pass_on(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.failures < PATIENCE:
            try:
                getattr(self.callback, event)(args, state, control, **kwargs)
                self.failures = 0
            except Exception as error:  # of any kind: it is another program's, and a run of days must not end by it
                self._failed(event, error)
        else:
            self.lost += 1
        if event == "on_train_end" and self.lost:
            log.warning("%s missed %d events of this run or more; metrics.jsonl has all", self.name, self.lost)

    def _failed(self, event: str, error: Exception) -> None:
        self.failures += 1
        self.lost += 1
        if self.lost == 1:
            found = f"{type(error).__name__}: {one_line(error)}"
            log.warning(
                "%s failed in %s: %s; training goes on, and metrics.jsonl has what it misses", self.name, event, found
            )
        if self.failures == PATIENCE:
            log.warning("%s failed %d times in a row, and is told nothing more", self.name, PATIENCE)


def trackers(report_to: str | Sequence[str] | None) -> list[Tracker]:
    """The trackers that train.report_to names. Raises RecipeError for one that is unknown, or not installed."""
    # Two are not listed although they are there, the one always, the other beside MLflow.
    there = {*get_available_reporting_integrations(), "flyte", "azure_ml"}
    try:
        names = [report_to] if isinstance(report_to, str) else list(report_to or ())
        if names in (["all"], ["none"]):
            names = get_available_reporting_integrations() if names == ["all"] else []
        kinds = get_reporting_integration_callbacks(names)
        if missing := [name for name in names if name not in there]:
            raise ImportError(f"{missing[0]} is not installed")
        return [Tracker(kind()) for kind in kinds]
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:  # also of a broken package
        remedy = "Install it, or leave it out: metrics.jsonl has every value."
        raise RecipeError(f"train.report_to: {one_line(error)}\n  {remedy}") from None
