"""Metrics against their definitions, and what is not defined."""

import numpy as np
import pytest
from PIL import Image
from scipy.stats import rankdata

from mantis_lite.data.labels import Labels
from mantis_lite.metrics import draw_confusion, probabilities, score_metrics

RANDOM = np.random.default_rng(0)


def test_of_numbers():
    targets = RANDOM.normal(size=(50, 2)).astype(np.float32)
    scores = targets + RANDOM.normal(size=(50, 2)) * [0.1, 2]
    found = score_metrics(Labels("regression", ("a", "b")), scores, targets)
    error = scores - targets
    assert found["mse/a"] == pytest.approx((error[:, 0] ** 2).mean())
    assert found["mae/b"] == pytest.approx(abs(error[:, 1]).mean())
    assert found["mse"] == pytest.approx((error**2).mean())
    ranks = [np.corrcoef(rankdata(scores[:, at]), rankdata(targets[:, at]))[0, 1] for at in (0, 1)]
    assert [found["spearman/a"], found["spearman/b"]] == pytest.approx(ranks)
    assert found["spearman"] == pytest.approx(np.mean(ranks))
    assert found["pearson/a"] == pytest.approx(np.corrcoef(scores[:, 0], targets[:, 0])[0, 1])


def test_one_label_has_no_numbers_of_its_own():
    found = score_metrics(Labels("regression", ("a",)), np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]]))
    assert set(found) == {"mse", "mae", "spearman", "pearson"} and found["mse"] == 0.5


def test_a_correlation_with_what_never_changes_is_not_defined():
    scores, targets = RANDOM.normal(size=(9, 2)), np.stack([np.ones(9), np.arange(9)], axis=1)
    found = score_metrics(Labels("regression", ("a", "b")), scores, targets)
    assert found["spearman/a"] is None and found["pearson/a"] is None
    assert found["spearman"] == found["spearman/b"]
    one = score_metrics(Labels("regression", ("a",)), scores[:1, :1], targets[:1, :1])
    assert one["spearman"] is None and one["mse"] is not None


def test_of_classes():
    targets = np.array([0, 0, 1, 1, 2, 2])
    logits = np.eye(3)[[0, 1, 1, 1, 2, 0]] * 4.0
    found = score_metrics(Labels("single_label", ("x", "y", "z")), logits, targets)
    assert found["accuracy"] == pytest.approx(4 / 6)
    f1 = [2 * 1 / (2 + 1 + 1), 2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1)]
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    assert 0.5 < found["auroc"] < 1
    two = score_metrics(Labels("single_label", ("x", "y")), np.array([[0, 1], [1, 0], [0, 2]]), np.array([1, 0, 1]))
    assert two == {"accuracy": 1.0, "macro_f1": 1.0, "auroc": 1.0}
    missing = score_metrics(Labels("single_label", ("x", "y", "z")), logits[:4], targets[:4])
    assert missing["auroc"] is None and missing["accuracy"] == 0.75


def test_of_several_labels():
    targets = np.array([[1, 0], [1, 1], [0, 0]], dtype=np.float32)
    logits = np.array([[2.0, -1], [1, -1], [-1, -2]])
    found = score_metrics(Labels("multi_label", ("a", "b")), logits, targets)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["auroc/a"] == 1.0
    assert found["macro_f1"] == pytest.approx(0.5)
    constant = score_metrics(Labels("multi_label", ("a", "b")), logits[:2], targets[:2])
    assert constant["auroc/a"] is None and constant["auroc"] == constant["auroc/b"]


def test_a_stand_in_without_target_counts_nowhere():
    numbers = Labels("regression", ("a",))
    scores, targets = np.array([[1.0], [9.0], [2.0]]), np.array([[1.0], [np.nan], [3.0]])
    assert score_metrics(numbers, scores, targets) == score_metrics(numbers, scores[::2], targets[::2])
    classes = Labels("single_label", ("a", "b"))
    logits, which = np.array([[1.0, 0], [9, 0], [0, 1]]), np.array([0, -100, 1])
    assert score_metrics(classes, logits, which) == score_metrics(classes, logits[::2], which[::2])


def test_scores_that_are_not_finite_are_counted():
    for labels, targets in (
        (Labels("regression", ("a",)), np.ones((3, 1))),
        (Labels("single_label", ("a",)), np.zeros(3)),
    ):
        found = score_metrics(labels, np.array([[1.0], [np.nan], [np.inf]]), targets)
        assert found == {"samples_with_scores_that_are_not_finite": 2}


def test_probabilities():
    logits = RANDOM.normal(size=(4, 3))
    assert probabilities(Labels("single_label", ("a", "b", "c")), logits).sum(1) == pytest.approx(np.ones(4))
    assert probabilities(Labels("multi_label", ("a", "b", "c")), logits) == pytest.approx(1 / (1 + np.exp(-logits)))


@pytest.mark.parametrize(
    ("labels", "targets"),
    [
        (Labels("single_label", ("cat", "dog", "cow", "owl")), np.array([0, 1, 3])),
        (Labels("single_label", tuple(map(str, range(300)))), np.arange(300)),
        (
            Labels("multi_label", ("a", "b", "c", "d", "e")),
            np.array([[1, 0, 1, 0, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]),
        ),
    ],
    ids=["classes", "many", "several"],
)
def test_a_confusion_matrix_is_a_picture(tmp_path, labels, targets):
    logits = RANDOM.normal(size=(len(targets), len(labels.names)))
    draw_confusion(labels, logits, targets, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 24)) > 10
