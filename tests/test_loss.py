"""The loss layer: what it holds beside all logits at once, and that it computes the same."""

import sys
from pathlib import Path

import torch

from mantis_lite.models import activations

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import loss


def test_an_eighth_of_full_logits_by_tiles_alone(monkeypatch):
    """A sixteenth of `make bench`'s tokens, in tiles a sixteenth as long; all supervised, of 128,256 words."""
    monkeypatch.setattr(activations, "LOSS_TILE", activations.LOSS_TILE // 16)
    found = loss.memory(tokens=512, hidden=32, vocabulary=loss.VOCABULARY)
    assert found["times_less"] >= 8


def test_what_is_not_supervised_is_not_scored():
    """A tenth of the tokens: the loss and every gradient of full logits, and nothing for the others."""
    model = loss.head_alone(32, 1000)
    states, labels = loss.inputs(200, 32, 1000, supervised=0.1)
    found = [loss.step(way, model, states, labels) for way in loss.WAYS.values()]
    loss.same(found)
    assert torch.equal(found[1][1][0, :179].abs().sum(), torch.zeros(()))
