"""The loss layer: what it holds beside all logits at once, and that it computes the same."""

import sys
from pathlib import Path

import pytest
import torch
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from mantis_lite.models import lm_head

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import loss


def test_an_eighth_of_full_logits_by_tiles_alone(monkeypatch):
    """A sixteenth of `make bench`'s tokens, in tiles a sixteenth as long; all supervised, of 128,256 words."""
    monkeypatch.setattr(lm_head, "CPU_TILE", lm_head.CPU_TILE // 16)
    found = loss.memory(tokens=512, hidden=32, vocabulary=loss.VOCABULARY)
    assert found["times_less"] >= 20


def test_what_is_not_supervised_is_not_scored():
    """A tenth of the tokens: the loss and every gradient of full logits, and nothing for the others."""
    model = loss.head_alone(32, 1000)
    states, labels = loss.inputs(200, 32, 1000, supervised=0.1)
    found = [loss.step(way, model, states, labels) for way in loss.WAYS.values()]
    loss.same(found)
    assert torch.equal(found[1][1][0, :179].abs().sum(), torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_scores_are_those_of_trls_own_function(dtype, count):
    """Log-probabilities and their gradient, entropy, whether a target is the likeliest; of 16 bits, as in float32."""
    torch.manual_seed(0)
    weight = torch.randn(1000, 64)
    targets = torch.randint(1000, (count,))
    targets[::2] = (torch.randn(count, 64) @ weight.T).argmax(-1)[::2]  # of other states: right by chance alone
    states = torch.randn(count, 64)
    targets[1::3] = (states @ weight.T).argmax(-1)[1::3]
    factors = torch.rand(count)
    found = []
    for function, taken in ((ChunkedLogProbFunction, states.to(dtype).float()), (lm_head.Head, states.to(dtype))):
        hidden = taken.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=function is lm_head.Head and dtype == torch.bfloat16):
            scores = function.apply(hidden, weight, None, targets, 1.0, 512, None, 1.0, lm_head.SCORES)
        (scores[0] * factors).sum().backward()
        found.append((scores[0], scores[1], hidden.grad.to(dtype), scores[4]))
    for trls, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, trls, rtol=1e-4 if trls.dtype == torch.float32 else 1e-2, atol=1e-4)
    assert count < 2 or 0 < int(found[1][3].sum()) < count


def test_a_head_that_trains_is_scored_by_trls_function():
    weight, hidden = torch.randn(50, 8, requires_grad=True), torch.randn(3, 8)
    scores = lm_head.Head.apply(hidden, weight, None, torch.tensor([1, 2, 3]), 1.0, 16, None, 1.0, lm_head.SCORES)
    scores[0].sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
