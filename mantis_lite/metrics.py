"""How right scores are: numbers for each kind of label, and a confusion matrix as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.special import expit, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    accuracy_score,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
    roc_auc_score,
)

from .data.encode import IGNORE
from .data.labels import Labels

MOST_NAMES, MOST_TABLES = 30, 40
"""Classes that a confusion matrix names and counts cell by cell, and labels that are drawn, one matrix each."""

Metrics = dict[str, float | None]
"""Numbers by name; None where one is not defined, as a correlation with what never changes."""


def score_metrics(labels: Labels, logits: np.ndarray, targets: np.ndarray) -> Metrics:
    """What of the scores (S, L) is right, by the targets (S, L), or (S,) for classes; unknown targets are left out.

    regression: mse, mae, spearman and pearson of each label, and their means. single_label: accuracy, macro_f1 and
    auroc, one class against the rest. multi_label: accuracy (all labels of a sample right), macro_f1, auroc and those
    of each label. Where scores are not finite, how many samples have such, and nothing else.
    """
    logits, targets = _known(logits, targets)
    if odd := int((~np.isfinite(logits)).any(1).sum()):
        return {"samples_with_scores_that_are_not_finite": odd}
    if labels.problem == "regression":
        return _regression(labels.names, logits, targets)
    if labels.problem == "single_label":
        return _single(logits, targets)
    return _multi(labels.names, logits, targets)


def probabilities(labels: Labels, logits: np.ndarray) -> np.ndarray:
    """Scores (S, L) as probabilities: of each class, or of each label by itself."""
    return softmax(logits, axis=1) if labels.problem == "single_label" else expit(logits)


def draw_confusion(labels: Labels, logits: np.ndarray, targets: np.ndarray, path: Path) -> None:
    """Draw which class was taken for which, or for each of several labels whether it held and was found, as a PNG."""
    logits, targets = _known(logits, targets)
    if labels.problem == "single_label":
        every = range(len(labels.names))
        tables = {"": confusion_matrix(targets, logits.argmax(1), labels=every)}
        names: tuple[str, ...] = labels.names
    else:
        tables = dict(zip(labels.names, multilabel_confusion_matrix(targets, logits > 0), strict=True))
        names = ("no", "yes")
    tables = dict(list(tables.items())[:MOST_TABLES])
    columns = min(4, len(tables))
    rows = -(-len(tables) // columns)
    side = min(15.0, max(3.0, 1.5 + 0.5 * len(names)))
    figure = Figure(figsize=(side * columns, side * rows), layout="constrained")
    for axes, (title, table) in zip(figure.subplots(rows, columns, squeeze=False).flat, tables.items(), strict=False):
        if len(names) > MOST_NAMES:
            axes.imshow(table, cmap="Blues")
            title = f"{len(names):,} classes, by number"
        else:
            display = ConfusionMatrixDisplay(table, display_labels=names)
            display.plot(ax=axes, colorbar=False, cmap="Blues", xticks_rotation="vertical" if len(names) > 3 else None)
        axes.set(title=title, xlabel="predicted", ylabel="labelled")
    figure.savefig(path, dpi=150)


def _known(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without the stand-in of a pack that lost all its samples."""
    known = targets != IGNORE if targets.ndim == 1 else ~np.isnan(targets).any(1)
    return logits[known].astype(np.float64), targets[known]


def _regression(names: tuple[str, ...], scores: np.ndarray, targets: np.ndarray) -> Metrics:
    of_label: dict[str, list[float | None]] = {
        "mse": list(((scores - targets) ** 2).mean(0)),
        "mae": list(np.abs(scores - targets).mean(0)),
        "spearman": [_correlation(spearmanr, *pair) for pair in zip(scores.T, targets.T, strict=True)],
        "pearson": [_correlation(pearsonr, *pair) for pair in zip(scores.T, targets.T, strict=True)],
    }
    return _with_means(of_label, names)


def _single(logits: np.ndarray, targets: np.ndarray) -> Metrics:
    predicted, every = logits.argmax(1), np.arange(logits.shape[1])
    auroc = None
    if np.array_equal(np.unique(targets), every):  # defined where each class occurs
        shares = softmax(logits, axis=1)
        auroc = roc_auc_score(targets, shares[:, 1] if len(every) == 2 else shares, multi_class="ovr")
    return {
        "accuracy": float(accuracy_score(targets, predicted)),
        "macro_f1": float(f1_score(targets, predicted, labels=every, average="macro", zero_division=0)),
        "auroc": None if auroc is None else float(auroc),
    }


def _multi(names: tuple[str, ...], logits: np.ndarray, targets: np.ndarray) -> Metrics:
    predicted = logits > 0
    of_label: dict[str, list[float | None]] = {
        "f1": list(f1_score(targets, predicted, average=None, zero_division=0)),
        "auroc": [
            roc_auc_score(target, logit) if len(np.unique(target)) == 2 else None
            for target, logit in zip(targets.T, logits.T, strict=True)
        ],
    }
    found = _with_means(of_label, names)
    return {"accuracy": float(accuracy_score(targets, predicted)), "macro_f1": found.pop("f1"), **found}


def _with_means(of_label: dict[str, list[float | None]], names: tuple[str, ...]) -> Metrics:
    """The mean of each number over the labels it is defined for, then the number of each label by name."""
    metrics: Metrics = {}
    for key, values in of_label.items():
        defined = [value for value in values if value is not None]
        metrics[key] = float(np.mean(defined)) if defined else None
    if len(names) > 1:
        for key, values in of_label.items():
            metrics |= {
                f"{key}/{name}": None if value is None else float(value)
                for name, value in zip(names, values, strict=True)
            }
    return metrics


def _correlation(of, one: np.ndarray, other: np.ndarray) -> float | None:
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(of(one, other).statistic)
