"""A trained score head and rows -> predictions, in packs; and how right they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .data.collate import Batch, collate
from .data.encode import Encoder
from .data.labels import Labels
from .data.prepare import Prepared, Samples, read_rows, refuse_too_many, write_rejects
from .data.schedule import pack_epoch
from .errors import DataError, RecipeError, SampleError
from .metrics import Metrics, draw_confusion, probabilities, score_metrics
from .models.head_config import labels_of
from .models.load import loader_workers, placed
from .models.upstream import CONFIG
from .recipe import Recipe
from .trained import is_run, open_trained


@dataclass(frozen=True)
class Scorer:
    """A model with a score head, and how rows are written for it."""

    recipe: Recipe
    encoder: Encoder
    labels: Labels
    model: PreTrainedModel


@dataclass(frozen=True)
class Predictions:
    """Scores (S, L) of samples in the rows' order, what became of the rows, and metrics where they have labels."""

    recipe: Recipe
    prepared: Prepared
    labels: Labels
    samples: list[int]
    logits: np.ndarray
    metrics: Metrics | None
    file: Path


def predict(
    source: str | Path, overrides: Sequence[str] = (), metrics: bool = False, output: Path | None = None
) -> Predictions:
    """Score the rows of `data=` with a run, or with a model that has a head, and write a JSON line for each row.

    Lines go to `output`, else to predictions.jsonl in the run or here; with `metrics`, which every row must have labels
    for, a .metrics.json and, for classes, a .confusion.png lie beside it. Raises RecipeError, DataError, SampleError
    and FitError.
    """
    refuse_others(source, overrides)
    trained = open_trained(source, overrides)
    recipe = trained.recipe
    if trained.head is None:
        raise RecipeError(f"{source}: has no score head\n  Name a run of task=classify, or a model that has one.")
    file = output or (Path(source) if is_run(source) else Path()) / "predictions.jsonl"
    if not file.parent.is_dir():
        raise RecipeError(f"--output: there is no folder {file.parent}\n  Make it, or name another.")
    if any(Path(of.path).resolve() == file.resolve() for of in recipe.data.sources):
        raise RecipeError(f"--output: {file} holds the rows to score\n  Name another file.")
    labels = labels_of(trained.head, recipe.head, str(source))
    scorer = Scorer(recipe, trained.encoder, labels, trained.load())
    prepared = read_rows(recipe.data, recipe.packing, scorer.encoder, "classify", labels if metrics else None)
    samples, logits = _score(scorer, prepared)
    rejects = file.with_suffix(".rejects.jsonl")
    rejects.unlink(missing_ok=True)
    if prepared.rejects:
        write_rejects(prepared.rejects, rejects)
    with file.open("w") as lines:
        for line in _lines(prepared.train, labels, samples, logits):
            lines.write(json.dumps(line) + "\n")
    found = _measure(labels, logits, prepared.train, samples, file) if metrics else None
    return Predictions(recipe, prepared, labels, samples, logits, found, file)


def _measure(labels: Labels, logits: np.ndarray, rows: Samples, samples: list[int], file: Path) -> Metrics:
    """Metrics of the scored samples, written beside the predictions, and for classes their confusion matrix."""
    assert rows.targets is not None
    targets = rows.targets[samples]
    found = score_metrics(labels, logits, targets)
    file.with_suffix(".metrics.json").write_text(json.dumps(found, indent=2) + "\n")
    if labels.problem != "regression":
        draw_confusion(labels, logits, targets, file.with_suffix(".confusion.png"))
    return found


def refuse_others(source: str | Path, overrides: Sequence[str]) -> None:
    """Raise RecipeError for overrides that scores do not go by, or without rows."""
    allowed = ["data", "packing", "media", "memory"]
    if not is_run(source):
        itself = (Path(source) / "config.json").is_file() and not (Path(source) / CONFIG).is_file()
        allowed += ["head.labels", "head.problem", "model.revision" if itself else "model"]
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        if not any(key == name or key.startswith(f"{name}.") for name in allowed):
            remedy = f"Set only {', '.join(allowed)}: the rest is as the model was trained."
            raise RecipeError(f"{key}: has no effect on predictions\n  {remedy}")
    if not {"data", "data.sources"} & set(keys):
        raise RecipeError("data: no rows to score were given\n  Add data=new.json.")


@torch.no_grad()
def _score(scorer: Scorer, prepared: Prepared) -> tuple[list[int], np.ndarray]:
    """Which samples could be scored, in order, and their scores (S, L)."""
    samples = prepared.train
    samples.weights = [1.0] * len(samples.weights)  # each row once
    skips = scorer.recipe.data.on_bad_row == "skip"
    packs: DataLoader = DataLoader(
        pack_epoch(samples, scorer.recipe.packing),  # type: ignore[arg-type]
        collate_fn=_Packs(samples, scorer.encoder, skips),
        num_workers=loader_workers(),
    )
    scored: dict[int, np.ndarray] = {}
    for members, batch, errors in packs:
        prepared.rejects += errors
        if batch:
            logits = scorer.model(**placed(batch, scorer.model)).logits
            scored |= dict(zip(members, logits.float().cpu().numpy(), strict=True))
    refuse_too_many(prepared)
    if not scored:
        raise DataError(f"no row could be scored; the first is\n  {prepared.rejects[0]}")
    order = sorted(scored)
    logits = np.stack([scored[at] for at in order])
    if not np.isfinite(logits).all():
        first = samples[order[int((~np.isfinite(logits)).any(1).argmax())]]
        found = f"{first.where} has scores that are not finite"
        raise RecipeError(f"model: {found}\n  Its training diverged: take an earlier checkpoint.")
    return order, logits


@dataclass(frozen=True)
class _Packs:
    """A pack's samples -> those that can be read, their batch without labels, and what is wrong with the others."""

    samples: Samples
    encoder: Encoder
    skips: bool

    def __call__(self, packs: list[list[int]]) -> tuple[list[int], Batch, list[SampleError]]:
        kept, encoded, errors = [], [], []
        for at in packs[0]:
            try:
                encoded.append(self.encoder.encode(self.samples[at]))
                kept.append(at)
            except SampleError as error:
                if not self.skips:
                    raise
                errors.append(error)
        batch = collate(encoded, self.encoder.vision.batch) if encoded else {}
        batch.pop("labels", None)
        return kept, batch, errors


def _lines(samples: Samples, labels: Labels, order: list[int], logits: np.ndarray) -> Iterator[dict[str, Any]]:
    """What is written of each row: where it stands, its id, the scores by name, and what they come to."""
    shares = None if labels.problem == "regression" else probabilities(labels, logits)
    for number, at in enumerate(order):
        sample = samples[at]
        line: dict[str, Any] = {"where": sample.where, "id": sample.id}
        if labels.problem == "single_label":
            line["label"] = labels.names[int(logits[number].argmax())]
        elif labels.problem == "multi_label":
            line["labels"] = [name for name, logit in zip(labels.names, logits[number], strict=True) if logit > 0]
        values = logits[number] if shares is None else shares[number]
        named = dict(zip(labels.names, (round(float(value), 6) for value in values), strict=True))
        yield line | {"scores" if shares is None else "probabilities": named}
