"""Packs against one sample a row and against padded batches of four: collating, training steps, and what is wasted.

    python -m benchmarks.packed

Collating: one pack of 8,192 tokens with the boundaries of its samples, against the same row with a T x T mask, as
upstream's packing data set makes it. Both must give the same tokens, and the boundaries the same mask.

Steps: forward and backward of `small_llava` with LoRA, in float32, as this package's trainer takes them (packs, and one
sample a row) and as transformers and PEFT do by themselves (four rows padded to the longest, with a mask and all
logits). One layer with an MLP 32 times as wide as its input: so its products take most of a step, as at 8B, where the
input is 4,096 wide; on a small model of the usual shape attention and the head would. All ways see the same samples and
must give the same loss and the same gradients. Seconds are those of one thread's own, which others that are busy on the
machine take little from, and freed memory is kept, as CUDA's allocator does: else the kernel hands out and clears the
large tensors of packs anew each time. The samples are real rows, and rows of drawn tokens whose text and
pictures are those of the mixture of lengths at even distances, from its shortest to its longest.

Waste is counted, not timed: padding in batches of four in random order, and what lies behind the 8,192nd token, where
rows are cut there once pictures have taken their tokens (TRL's `max_length`, LLaMA-Factory's `cutoff_len`). Rows of the
mixture are taken to have their pictures first and their answers last, as many of their text's tokens as real rows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

from mantis_lite.data.collate import Batch, collate
from mantis_lite.data.encode import IGNORE, Encoded, Encoder
from mantis_lite.data.packing import Length, plan
from mantis_lite.models.levels import levels_of, look_up
from mantis_lite.recipe_file import load_recipe
from mantis_lite.training.run import Run
from mantis_lite.training.start import start

from . import planning, results, small_llava
from .preparation import EXAMPLES

MAX_LENGTH, PADDED = 8192, 4
ROWS = {"real rows": 4, "mixture of lengths": 8}
"""Of a step."""
FIRST_WORD = 16
"""Of the vocabulary, behind the special tokens."""
TURNS = 7
"""Of each way of taking a step: packs and single rows are within a few hundredths of each other."""
COLLATED = 50
"""Packs that are collated each time, as one takes less than a millisecond."""

Found = tuple[float, dict[str, torch.Tensor]]
"""A step's loss, and the gradient of each parameter that trains."""


def keep_memory() -> None:
    """Have glibc neither map large blocks by themselves nor give freed ones back: mallopt's M_MMAP_MAX and trimming."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        assert libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1)


def texts(file: Path) -> list[str]:
    """What is said in the real rows: the small model's vocabulary is learned from it."""
    return [turn["content"] for row in json.loads(file.read_text()) for turn in row["conversation"]]


def begun(folder: Path, data: Path, words: Sequence[str]) -> Run:
    """A run of the small model, as `mantis-lite train` begins one; its adapters are drawn, as they would begin at 0."""
    (folder / "model").mkdir(parents=True)
    small_llava.make(folder / "model", words, width=64, mlp=2048)
    settings = [f"model={folder}/model", f"data={data}", f"run_dir={folder}/run", "train.max_steps=1"]
    run = start(load_recipe("chat-clip-llama3-lora", [*settings, "lora.r=8", "lora.dropout=0"]))
    for name, parameter in run.trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return run


def usual(run: Run) -> Any:
    """The same weights in transformers' own model, with PEFT's own LoRA."""
    model = AutoModelForImageTextToText.from_pretrained(run.checkpoint.folder, attn_implementation="sdpa")
    ours = run.trainer.model.peft_config["default"]
    lora = LoraConfig(r=ours.r, lora_alpha=ours.lora_alpha, target_modules=ours.target_modules)
    adapted = get_peft_model(model, lora)
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(run.trainer.model))
    return adapted.train()


def rows_of_mixture(encoder: Encoder, rows: int) -> list[Encoded]:
    """Rows of drawn tokens with text and pictures as in the mixture, at even distances by length, in random order."""
    random = np.random.default_rng(0)
    text, images, lengths = mixture()
    order = lengths.argsort(kind="stable")
    places = order[((np.arange(rows) + 0.5) / rows * len(order)).astype(int)]
    pixels = encoder.vision.pixels(Image.fromarray(random.integers(0, 256, (336, 336, 3), dtype=np.uint8)))
    placeholder = encoder.token_id(encoder.vision.placeholder)
    made = []
    for at in random.permutation(places).tolist():
        words = random.integers(FIRST_WORD, encoder.tokenizer.get_vocab_size(), text[at])
        ids = np.concatenate([np.full(images[at] * small_llava.TOKENS, placeholder), words])[:MAX_LENGTH]
        labels = np.where(np.arange(len(ids)) < len(ids) - text[at] // 2, IGNORE, ids)
        count = int((ids == placeholder).sum()) // small_llava.TOKENS
        assert count == images[at] and ids[0] != labels[0]
        made.append(Encoded(ids, labels, [pixels] * count))
    return made


def mixture() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of text, pictures and tokens in all of each sample of the mixture."""
    text, images = (of.astype(np.int64) for of in planning.read(planning.LENGTHS))
    return text, images, text + images * small_llava.TOKENS


def packs_of(samples: Sequence[Encoded]) -> list[list[Encoded]]:
    packs = plan([Length(len(sample), 0) for sample in samples], Length(MAX_LENGTH, 0), seed=0)
    return [[samples[at] for at in pack] for pack in packs]


def padded(samples: Sequence[Encoded], encoder: Encoder, levels: torch.Tensor) -> Batch:
    """Samples as the rows of a batch, filled up to the longest, as transformers' collators make it.

    Its pictures are numbers, of which there are `levels`.
    """
    ids, labels = ([torch.from_numpy(part) for part in parts] for parts in zip(*_parts(samples), strict=True))
    attended = [torch.ones(len(row), dtype=torch.long) for row in ids]
    pixels = [picture for sample in samples for picture in sample.pixels]
    return {
        "pixel_values": look_up(encoder.vision.batch(pixels)["pixel_values"], levels),
        "input_ids": pad_sequence(ids, batch_first=True).long(),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE).long(),
        "attention_mask": pad_sequence(attended, batch_first=True),
        "use_cache": False,
    }


def _parts(samples: Sequence[Encoded]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((sample.input_ids, sample.labels) for sample in samples)


def descended(model: Any, loss_of: Callable[[Batch, torch.Tensor], torch.Tensor], batches: Sequence[Batch]) -> Found:
    """Forward and backward of all batches of a step: its loss a supervised token, and the gradients."""
    model.zero_grad()
    count = sum((batch["labels"] != IGNORE).sum() for batch in batches)
    total = 0.0
    for batch in batches:
        loss = loss_of(batch, count)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(found: Sequence[Found]) -> None:
    """The same loss, and the same gradient of each parameter up to a ten-thousandth of its largest."""
    first, expected = found[0]
    for loss, gradients in found[1:]:
        assert abs(loss - first) < 1e-5 * abs(first), (first, loss)
        assert gradients.keys() == expected.keys() and expected
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * float(expected[name].abs().max()))


def steps(run: Run, stock: Any, samples: Sequence[Encoded]) -> dict[str, Any]:
    """A step of these samples in each way, in turn: tokens a second, and packs against the others."""
    model, encoder, tokens = run.trainer.model.train(), run.encoder, sum(map(len, samples))

    def as_trained(batch: Batch, count: torch.Tensor) -> torch.Tensor:
        return run.trainer.compute_loss(model, batch, num_items_in_batch=count)

    def as_usual(batch: Batch, count: torch.Tensor) -> torch.Tensor:
        return stock(**batch, num_items_in_batch=count).loss

    packs = [collate(pack, encoder.vision.batch) for pack in packs_of(samples)]
    single = [collate([sample], encoder.vision.batch) for sample in samples]
    levels = levels_of(run.checkpoint.image_processor)
    fours = [padded(samples[at : at + PADDED], encoder, levels) for at in range(0, len(samples), PADDED)]
    ways = {
        "packed": partial(descended, model, as_trained, packs),
        "one sample a row": partial(descended, model, as_trained, single),
        "padded batches of 4": partial(descended, stock, as_usual, fours),
    }
    seconds = results.interleaved(ways, TURNS, same, clock=time.process_time)
    waste = 1 - tokens / sum(batch["input_ids"].numel() for batch in fours)
    against = {name: results.quotients(seconds[name], seconds["packed"]) for name in ways}
    return {
        "samples": len(samples),
        "packs": len(packs),
        "tokens": tokens,
        "pictures": sum(len(sample.pixels) for sample in samples),
        "padding_of_batches_of_4": round(waste, 4),
        "tokens_per_second": {name: results.spread(tokens / s for s in of) for name, of in seconds.items()},
        "packed_over_one_sample_a_row": results.spread(against["one sample a row"]),
        "packed_over_padded": results.spread(against["padded batches of 4"]),
        "packed_over_padded_by_padding_alone": round(1 / (1 - waste), 4),
        "share_of_that": results.spread(ratio * (1 - waste) for ratio in against["padded batches of 4"]),
    }


def masked(samples: Sequence[Encoded]) -> Batch:
    """One row with a T x T mask of int32, as upstream makes it; causal, which upstream's is not."""
    batch = collate(samples)
    total = batch["input_ids"].shape[1]
    mask = torch.zeros(1, 1, total, total, dtype=torch.int32)
    for begin, end in pairwise(batch["cu_seq_lens_q"].tolist()):
        mask[0, 0, begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.int32).tril()
    return {key: batch[key] for key in ("input_ids", "labels", "position_ids")} | {"attention_mask": mask}


def seen(batch: Batch) -> torch.Tensor:
    """The mask (T, T) that a pack's boundaries stand for: each position sees its sample's up to itself."""
    at = torch.arange(batch["input_ids"].shape[1])
    sample = torch.bucketize(at, batch["cu_seq_lens_q"], right=True)
    return (sample[:, None] == sample) & (at[:, None] >= at)


def collating(samples: Sequence[Encoded]) -> dict[str, Any]:
    """The pack of these that is fullest: packs a second, and bytes of one."""
    pack = max(packs_of(samples), key=lambda pack: sum(map(len, pack)))
    ours, theirs = collate(pack), masked(pack)
    assert torch.equal(seen(ours), theirs["attention_mask"][0, 0].bool())
    assert all(torch.equal(ours[key], theirs[key]) for key in ("input_ids", "labels", "position_ids"))
    ways: dict[str, Callable[[], Any]] = {
        "boundaries": lambda: [collate(pack) for _ in range(COLLATED)],
        "a T x T mask": lambda: masked(pack),
    }
    seconds = results.interleaved(ways, clock=time.process_time)
    each = {"boundaries": [s / COLLATED for s in seconds["boundaries"]], "a T x T mask": seconds["a T x T mask"]}
    return {
        "tokens": ours["input_ids"].shape[1],
        "samples": len(pack),
        "packs_per_second": {name: results.spread(1 / s for s in of) for name, of in each.items()},
        "times_faster": results.spread(results.quotients(*reversed(each.values()))),
        "bytes": {"boundaries": size_of(ours), "a T x T mask": size_of(theirs)},
    }


def size_of(batch: Batch) -> int:
    return sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))


def wasted(lengths: np.ndarray, images: np.ndarray, supervised: np.ndarray) -> dict[str, Any]:
    """What padding and cutting take of rows (N,) with so many tokens, pictures and, at their ends, tokens with loss."""
    over = np.maximum(lengths - MAX_LENGTH, 0)
    kept = lengths - over
    shuffled = np.random.default_rng(0).permutation(kept)
    fours = shuffled[: len(shuffled) // PADDED * PADDED].reshape(-1, PADDED)
    packs = len(plan(np.stack([kept, 0 * kept], axis=1), Length(MAX_LENGTH, 0), seed=0))
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "padding_of_batches_of_4": round(float(1 - fours.sum() / (PADDED * fours.max(1).sum())), 4),
        "padding_of_packs": 0.0,
        "fill_of_packs": round(float(kept.sum() / (packs * MAX_LENGTH)), 4),
        "rows_that_are_cut": int((over > 0).sum()),
        "supervised_tokens": int(supervised.sum()),
        "supervised_tokens_cut": int(np.minimum(over, supervised).sum()),
        "pictures": int(images.sum()),
        "pictures_cut": int(np.maximum(images - MAX_LENGTH // small_llava.TOKENS, 0)[over > 0].sum()),
    }


def kept_in_packs(run: Run) -> dict[str, Any]:
    """Every real row, encoded and collated as for training: what of it reaches the model, beside what it has."""
    encoder = run.encoder
    samples = [encoder.encode(sample) for sample in run.prepared.train]
    batches = [collate(pack, encoder.vision.batch) for pack in packs_of(samples)]
    supervised = np.array([int((sample.labels != IGNORE).sum()) for sample in samples])
    lengths, images = (np.array(of) for of in zip(*((len(s), len(s.pixels)) for s in samples), strict=True))
    learned = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    shown = sum(len(batch["pixel_values"]) for batch in batches)
    assert learned == supervised.sum() and shown == images.sum()
    assert sum(batch["input_ids"].numel() for batch in batches) == lengths.sum()
    text = lengths - images * small_llava.TOKENS
    return wasted(lengths, images, supervised) | {
        "supervised_share_of_text": round(float(supervised.sum() / text.sum()), 4)
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not (EXAMPLES.is_file() and planning.LENGTHS.is_file()):
        raise SystemExit(f"{EXAMPLES} and {planning.LENGTHS} are not beside this checkout")
    torch.set_num_threads(1)
    keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        run = begun(Path(folder), EXAMPLES, texts(EXAMPLES))
        stock = usual(run)
        drawn = rows_of_mixture(run.encoder, ROWS["mixture of lengths"])
        figures: dict[str, Any] = {"collating": collating([Encoded(s.input_ids, s.labels) for s in drawn])}
        print(figures["collating"], flush=True)
        real = [run.encoder.encode(sample) for sample in list(run.prepared.train)[: ROWS["real rows"]]]
        figures["steps"] = {}
        for name, samples in (("real rows", real), ("mixture of lengths", drawn)):
            figures["steps"][name] = steps(run, stock, samples)
            print(name, figures["steps"][name], flush=True)
        found = kept_in_packs(run)
    text, images, lengths = mixture()
    answers = np.rint(text * found["supervised_share_of_text"]).astype(np.int64)
    figures["waste"] = {"real rows": found, "mixture of lengths": wasted(lengths, images, answers)}
    print(figures["waste"])
    results.write("packed", figures)


if __name__ == "__main__":
    main()
