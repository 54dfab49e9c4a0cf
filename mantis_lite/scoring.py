"""A trained score head and rows -> predictions, in packs; and how right they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, PreTrainedModel

from .data.collate import Batch, collate
from .data.dataset import pack_epoch
from .data.encode import Encoder
from .data.labels import Labels
from .data.prepare import Prepared, Samples, read_rows
from .errors import DataError, RecipeError, SampleError
from .metrics import Metrics, draw_confusion, probabilities, score_metrics
from .models.adapters import load_adapter
from .models.checkpoint import open_checkpoint
from .models.head import labels_of, with_head
from .models.load import load_model, placed, working_dtype
from .recipe import ModelRecipe, Recipe, load_recipe, make_recipe


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
    recipe = recipe_of(source, overrides)
    file = output or (Path(source) if _is_run(source) else Path()) / "predictions.jsonl"
    if not file.parent.is_dir():
        raise RecipeError(f"--output: there is no folder {file.parent}\n  Make it, or name another.")
    scorer = open_scorer(source, recipe)
    labels = scorer.labels
    prepared = read_rows(recipe.data, recipe.packing, scorer.encoder, "classify", labels if metrics else None)
    samples, logits = _score(scorer, prepared)
    found = None
    with file.open("w") as lines:
        for line in _lines(prepared.train, labels, samples, logits):
            lines.write(json.dumps(line) + "\n")
    if metrics:
        assert prepared.train.targets is not None
        targets = prepared.train.targets[samples]
        found = score_metrics(labels, logits, targets)
        file.with_suffix(".metrics.json").write_text(json.dumps(found, indent=2) + "\n")
        if labels.problem != "regression":
            draw_confusion(labels, logits, targets, file.with_suffix(".confusion.png"))
    return Predictions(prepared, labels, samples, logits, found, file)


def recipe_of(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run, or what a model with a head needs of one. Raises RecipeError."""
    if not _is_run(source):
        own = {"model": str(source), "task": "classify", "method": "lora", "run_dir": "runs/predict"}
        # As VideoScore, whose config does not say that its scores are numbers, was trained.
        return make_recipe(own | {"head": {"problem": "regression"}, "media": {"num_frames": 16}}, overrides)
    recipe = load_recipe(Path(source) / "recipe.yaml", overrides)
    if recipe.task != "classify":
        raise RecipeError(f"{source}: a run of task={recipe.task}, which has no scores\n  Name one of task=classify.")
    if not any((Path(source) / done).is_dir() for done in ("adapter", "model")):
        raise RecipeError(f"{source}: the run is not finished\n  Train it to its end: mantis-lite train.")
    return recipe


def open_scorer(source: str | Path, recipe: Recipe) -> Scorer:
    """Load a run's model, its adapter on it, or any model with a score head. Raises RecipeError."""
    adapter, model = Path(source) / "adapter", Path(source) / "model"
    trained = recipe.model if adapter.is_dir() else ModelRecipe(name=str(model if model.is_dir() else source))
    checkpoint = open_checkpoint(trained)
    if not (adapter.is_dir() or checkpoint.has_head):
        raise RecipeError(f"{source}: a model without a score head\n  Name a run of task=classify, or another model.")
    stated = AutoConfig.from_pretrained(adapter) if adapter.is_dir() else checkpoint.config
    labels = labels_of(stated, recipe.head, str(source))
    head = with_head(checkpoint.config, labels, score_token_ids=getattr(stated, "score_token_ids", None) or ())
    loaded = load_model(checkpoint, recipe, head, working_dtype())
    if adapter.is_dir():
        loaded = load_adapter(loaded, str(adapter))
    if torch.cuda.is_available() and not recipe.quantized:
        loaded = loaded.to("cuda")
    return Scorer(recipe, checkpoint.encoder(recipe), labels, loaded.eval())


def _is_run(source: str | Path) -> bool:
    return (Path(source) / "recipe.yaml").is_file()


@torch.no_grad()
def _score(scorer: Scorer, prepared: Prepared) -> tuple[list[int], np.ndarray]:
    """Which samples could be scored, in order, and their scores (S, L)."""
    samples = prepared.train
    samples.weights = [1.0] * len(samples.weights)  # each row once
    skips = scorer.recipe.data.on_bad_row == "skip"
    packs: DataLoader = DataLoader(
        pack_epoch(samples, scorer.recipe.packing),  # type: ignore[arg-type]
        collate_fn=_Packs(samples, scorer.encoder, skips),
        num_workers=min(4, os.cpu_count() or 1) if torch.cuda.is_available() else 0,
    )
    scored: dict[int, np.ndarray] = {}
    for members, batch, errors in packs:
        prepared.rejects += errors
        if batch:
            logits = scorer.model(**placed(batch, scorer.model)).logits
            scored |= dict(zip(members, logits.float().cpu().numpy(), strict=True))
    if not scored:
        first = prepared.rejects[0]
        raise DataError(f"{scorer.recipe.data.sources[0].path}: no row could be scored; the first is\n  {first}")
    order = sorted(scored)
    return order, np.stack([scored[at] for at in order])


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
