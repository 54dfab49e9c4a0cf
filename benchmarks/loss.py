"""The loss layer alone, forward and backward: all logits at once, as transformers has it, against what training uses.

    python -m benchmarks.loss [--tokens 8192] [--hidden 128] [--repeats 5]

A Llama of no layers: hidden states, the norm, the frozen head of Llama 3's 128,256 words. All tokens are supervised, so
that what is saved is saved by tiles alone, or the last 18%, as in Mantis' chat rows. Memory is every byte alive beside
the weights, as torch's profiler lists them; ways run in turn on the same numbers, and must give the same loss and the
same gradient of the hidden states. All logits of 8,192 tokens take 12 GB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from mantis_lite.models.lm_head import SCORES, score_supervised
from mantis_lite.report.probe import peak_on_cpu

from . import results

VOCABULARY = 128_256
TIMED = 1024
"""Tokens of the loss that is timed: its ways take time in proportion to them."""
Way = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def head_alone(hidden: int, vocabulary: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of no layers with a frozen head, which can also do as TRL's trainer has it do."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "vocab_size": vocabulary, "num_hidden_layers": 0, "intermediate_size": hidden}
    with torch.device(device):
        config = LlamaConfig(**shape, num_attention_heads=1, tie_word_embeddings=True)
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.requires_grad_(False)
    add_fused_lm_head(model, outputs=SCORES)  # as SFTTrainer does
    return model


def inputs(
    tokens: int, hidden: int, vocabulary: int, supervised: float = 1.0, device: str = "cpu", dtype: Any = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (1, T, H) and labels (1, T), the last `supervised` share of them with loss."""
    torch.manual_seed(1)
    states = torch.randn(1, tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens), device=device)
    labels[:, : tokens - round(tokens * supervised)] = -100
    return states, labels


def full_logits(model: Any, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """transformers' own: all logits, in float32, then the cross-entropy."""
    return model(inputs_embeds=states, labels=labels).loss


def trained(model: Any, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What training uses: TRL's head as this package has it, a tile of logits at a time."""
    score_supervised()
    return model(inputs_embeds=states, labels=labels, fused_lm_head=True).loss


WAYS: dict[str, Way] = {"full logits": full_logits, "as trained": trained}


def step(way: Way, model: Any, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the gradient of the hidden states."""
    states.grad = None
    loss = way(model, states, labels)
    loss.backward()
    assert states.grad is not None
    return loss.detach(), states.grad


def peak(
    way: Way, model: Any, states: torch.Tensor, labels: torch.Tensor
) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
    """Bytes alive at most, beside the weights, the hidden states and the labels; and what `step` found meanwhile."""
    found = []
    held = peak_on_cpu(torch.nn.Module(), lambda: found.append(step(way, model, states, labels)))
    return held, found[0]


def memory(tokens: int, hidden: int, vocabulary: int, supervised: float = 1.0) -> dict[str, Any]:
    """What each way holds at most; the same loss and gradient."""
    model, (states, labels) = head_alone(hidden, vocabulary), inputs(tokens, hidden, vocabulary, supervised)
    taken = {name: peak(way, model, states, labels) for name, way in WAYS.items()}
    same([found for _, found in taken.values()])
    peaks = {name: held for name, (held, _) in taken.items()}
    figures: dict[str, Any] = {f"{name}, MiB": round(size / 2**20, 1) for name, size in peaks.items()}
    less = round(peaks["full logits"] / peaks["as trained"], 2)
    return {"tokens": tokens, "supervised": supervised} | figures | {"times_less": less}


def time_taken(tokens: int, hidden: int, vocabulary: int, repeats: int, supervised: float = 1.0) -> dict[str, Any]:
    """All ways in turn, so many times; the first of each is left out."""
    model, (states, labels) = head_alone(hidden, vocabulary), inputs(tokens, hidden, vocabulary, supervised)
    ways = {name: partial(step, way, model, states, labels) for name, way in WAYS.items()}
    seconds = results.interleaved(ways, repeats, same)
    shorter = results.spread(results.quotients(seconds["full logits"], seconds["as trained"]))
    figures: dict[str, Any] = {"tokens": tokens, "supervised": supervised, "times_faster": shorter}
    return figures | {f"{name}, seconds": results.spread(of) for name, of in seconds.items()}


def same(found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    torch.testing.assert_close(*(loss for loss, _ in found))
    torch.testing.assert_close(*(gradient for _, gradient in found), rtol=1e-4, atol=1e-7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=results.REPEATS)
    args = parser.parse_args()
    figures: dict[str, Any] = {"hidden": args.hidden, "vocabulary": VOCABULARY}
    for name, supervised in (("all supervised", 1.0), ("18% supervised", 0.18)):
        held = memory(args.tokens, args.hidden, VOCABULARY, supervised)
        took = time_taken(min(TIMED, args.tokens), args.hidden, VOCABULARY, args.repeats, supervised)
        figures[name] = {"memory": held, "time": took}
        print(name, figures[name], flush=True)
    results.write("loss", figures)


if __name__ == "__main__":
    main()
