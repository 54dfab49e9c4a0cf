"""The loss layer alone, forward and backward: all logits at once, as transformers has it, against what training uses.

    python -m benchmarks.loss [--tokens 8192] [--hidden 128] [--repeats 5]

A Llama of no layers: hidden states, the norm, the frozen head of Llama 3's 128,256 words. All tokens are supervised, so
that what is saved is saved by tiles alone. Memory is every byte alive beside the weights, as torch's profiler lists
them; ways run in turn on the same numbers, and must give the same loss and the same gradient of the hidden states.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from mantis_lite.models.lm_head import SCORES, score_supervised
from mantis_lite.report.probe import peak_on_cpu

from . import results

VOCABULARY = 128_256
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


def peak(way: Way, model: Any, states: torch.Tensor, labels: torch.Tensor) -> int:
    """Bytes alive at most, beside the weights, the hidden states and the labels."""
    states.grad = None
    return peak_on_cpu(torch.nn.Module(), lambda: way(model, states, labels).backward())


def memory(tokens: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """What each way holds at most; the same loss and gradient."""
    model, (states, labels) = head_alone(hidden, vocabulary), inputs(tokens, hidden, vocabulary)
    peaks = {name: peak(way, model, states, labels) for name, way in WAYS.items()}
    found = [step(way, model, states, labels) for way in WAYS.values()]
    same(found)
    figures: dict[str, Any] = {f"{name}, MiB": round(size / 2**20, 1) for name, size in peaks.items()}
    return {"tokens": tokens} | figures | {"times_less": round(peaks["full logits"] / peaks["as trained"], 2)}


def time_taken(tokens: int, hidden: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    """All ways in turn, so many times; the first of each is left out."""
    model, (states, labels) = head_alone(hidden, vocabulary), inputs(tokens, hidden, vocabulary)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(repeats + 1):
        found = []
        for name, way in WAYS.items():
            begun = time.perf_counter()
            found.append(step(way, model, states, labels))
            if repeat:
                times[name].append(time.perf_counter() - begun)
        same(found)
    figures: dict[str, Any] = {"tokens": tokens}
    for name in WAYS:
        figures |= spread(f"{name}, seconds", times[name])
    return figures


def same(found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    torch.testing.assert_close(*(loss for loss, _ in found))
    torch.testing.assert_close(*(gradient for _, gradient in found), rtol=1e-4, atol=1e-7)


def spread(name: str, values: list[float]) -> dict[str, float]:
    edges = {"median": float(np.median(values)), "min": min(values), "max": max(values)}
    return {f"{name}_{edge}": round(value, 3) for edge, value in edges.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    figures: dict[str, Any] = {"hidden": args.hidden, "vocabulary": VOCABULARY, "supervised": 1.0}
    figures["memory"] = memory(args.tokens, args.hidden, VOCABULARY)
    print(figures["memory"], flush=True)
    figures["time"] = time_taken(args.tokens // 8, args.hidden, VOCABULARY, args.repeats)
    print(figures["time"])
    results.write("loss", figures)


if __name__ == "__main__":
    main()
