"""Whether cost grows with what there is to do, and no faster: samples, a pack's length, pictures a row, workers.

    python -m benchmarks.scaling

Samples: planning 70 to 720,548 of the mixture's lengths, and a first start on 70 to 7,000 short rows. Length: a
training step of `small_llava` with LoRA on a pack of 2k to 64k tokens, which is one sample of 512 tokens again and
again, by its boundaries, and up to 8k with transformers' T x T mask; all must have the loss of the sample. Pictures: a
first start on rows of 1 to 32 pictures of 640 x 480, and one such row made tensors. Workers: packs of such rows through
a DataLoader, from its start; all must give the same batches.

Sizes take turns. Seconds are those of one process's own, on one thread where torch computes; workers' are of the clock.
The exponent of a curve is its slope between its largest size and a quarter of that, both axes logarithmic: 1 is linear,
2 quadratic.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mantis_lite.data.collate import collate
from mantis_lite.data.dataset import collate_packs, pack_dataset
from mantis_lite.data.encode import Encoded
from mantis_lite.data.packing import Length, plan
from mantis_lite.data.packs import Packs
from mantis_lite.data.prepare import prepare
from mantis_lite.models.attention import use_attention
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe_file import load_recipe
from mantis_lite.training.start import start

from . import planning, results, small_llava
from .packed import keep_memory
from .preparation import Starts, make_rows
from .shards import draw_pictures

LINEAR = 1.15
"""The largest exponent that passes for linear."""
LENGTHS = [1 << n for n in range(11, 17)]
MASKED = LENGTHS[:3]
SAMPLE = 512
ROWS = [70, 220, 700, 2_200, 7_000]
PICTURES = [1, 2, 4, 8, 16, 32]
WORKERS = [0, 1, 2]
PACKS = 20
"""What workers make, of two rows of four pictures each."""


def curve(sizes: Sequence[int], seconds: dict[str, list[float]], unit: str) -> dict[str, Any]:
    """A curve's points, by size, and its exponent; `seconds` by a size's name."""
    points = {size: results.spread(seconds[str(size)]) for size in sizes}
    least = min(sizes, key=lambda size: abs(math.log(4 * size / sizes[-1])))
    grown = math.log(points[sizes[-1]]["median"] / points[least]["median"])
    exponent = round(grown / math.log(sizes[-1] / least), 3)
    return {"of": unit, "seconds": points, "exponent": exponent, "linear": exponent <= LINEAR}


def turns(sizes: Sequence[int], way: Callable[[int], Any], same: Any = None, **settings: Any) -> dict[str, list[float]]:
    """Sizes in turn, on the process's own time unless another clock is given."""
    settings = {"clock": time.process_time} | settings
    return results.interleaved({str(size): partial(way, size) for size in sizes}, same=same, **settings)


def planned() -> dict[str, Any]:
    lengths = planning.samples_of(planning.LENGTHS, "576").lengths
    sizes = [70, 700, 7_000, 70_000, len(lengths)]
    parts = {size: lengths[np.linspace(0, len(lengths) - 1, size).astype(int)] for size in sizes}

    def same(found: list[Packs]) -> None:
        for size, packs in zip(sizes, found, strict=True):
            assert (np.bincount(packs.members, minlength=size) == 1).all()

    seconds = turns(sizes, lambda size: plan(parts[size], Length(planning.MAX_LENGTH, 0), seed=0), same)
    return curve(sizes, seconds, "samples planned")


def prepared(
    folder: Path, sizes: Sequence[int], rows: Sequence[int], pictures: Sequence[int], unit: str
) -> dict[str, Any]:
    """First starts on so many rows of so many pictures, of which there are drawn ones in the folder `pictures`.

    This process alone reads them: it is its time that is told.
    """
    starts = {}
    for size, count, images in zip(sizes, rows, pictures, strict=True):
        path = folder / f"rows-{count}-{images}.jsonl"
        write_rows(path, count, images)
        recipe = load_recipe("chat", [f"data={path}", "model=tiny", "data.oversize=drop"])
        encoder = open_checkpoint(recipe.model).encoder(recipe)
        starts[size] = Starts(recipe, encoder, folder / f"caches-{path.stem}", workers=0)

    def same(found: list[Any]) -> None:
        assert [each.rows_read for each in found] == list(rows)

    return curve(sizes, turns(sizes, lambda size: starts[size].first(), same), unit)


def write_rows(path: Path, count: int, images: int) -> None:
    """Two turns of 30 drawn words, and of the pictures that are there the next so many."""
    random = np.random.default_rng(0)
    words = np.array(["".join(random.choice(list("abcdefghijklmnoprstuvw"), n)) for n in random.integers(2, 9, 5000)])
    with path.open("w") as file:
        for row in range(count):
            turns = [{"role": role, "content": " ".join(random.choice(words, 30))} for role in ("user", "assistant")]
            names = [f"pictures/{(row * images + at) % max(PICTURES)}.jpg" for at in range(images)]
            file.write(json.dumps({"images": names, "messages": turns}) + "\n")


def stepped(folder: Path) -> dict[str, Any]:
    """A step on packs of LENGTHS tokens, and with a mask on those of MASKED."""
    write_rows(folder / "one.jsonl", 4, 0)
    (folder / "model").mkdir()
    small_llava.make(folder / "model", width=64, mlp=512)
    settings = [f"model={folder}/model", f"data={folder}/one.jsonl", f"run_dir={folder}/run", "train.max_steps=1"]
    run = start(load_recipe("chat-clip-llama3-lora", [*settings, "lora.r=8", "lora.dropout=0"]))
    trainer, model = run.trainer, run.trainer.model.train()
    ids = np.random.default_rng(0).integers(16, run.encoder.tokenizer.get_vocab_size(), SAMPLE)
    sample = Encoded(ids, ids)
    batches = {size: collate([sample] * (size // SAMPLE)) for size in LENGTHS}

    def step(size: int) -> float:
        model.zero_grad()
        loss = trainer.compute_loss(model, batches[size])
        loss.backward()
        return loss.item()

    def same(found: list[float]) -> None:
        np.testing.assert_allclose(found, found[0], rtol=1e-4)

    figures = {"boundaries": curve(LENGTHS, turns(LENGTHS, step, same, warm=False), "tokens of a pack, a step")}
    use_attention(trainer.accelerator.unwrap_model(model).get_base_model(), "sdpa")
    seconds = turns(MASKED, step, same, warm=False)
    return figures | {"T x T mask": curve(MASKED, seconds, "tokens of a pack, a step with a T x T mask")}


def seen(folder: Path) -> dict[str, Any]:
    """A row of so many pictures, made tensors."""
    recipe = load_recipe("chat", [f"data={folder}/rows-40-1.jsonl", f"model={folder}/model"])
    encoder = open_checkpoint(recipe.model).encoder(recipe)
    samples = {}
    for images in PICTURES:
        path = folder / f"rows-40-{images}.jsonl"
        own = load_recipe("chat", [f"data={path}", f"model={folder}/model", "packing.max_length=32768"])
        samples[images] = prepare(own.data, own.packing, encoder).train[0]

    def same(found: list[Encoded]) -> None:
        assert [len(encoded.pixels) for encoded in found] == PICTURES

    return curve(PICTURES, turns(PICTURES, lambda images: encoder.encode(samples[images]), same), "pictures of a row")


def loaded(folder: Path) -> dict[str, Any]:
    """Packs a second through a DataLoader of so many workers, with their start."""
    settings = [f"data={folder}/rows-40-4.jsonl", f"model={folder}/model"]
    recipe = load_recipe("chat", settings)
    encoder = open_checkpoint(recipe.model).encoder(recipe)
    samples = prepare(recipe.data, recipe.packing, encoder).train
    packs = Packs.of([2 * at, 2 * at + 1] for at in range(PACKS))
    rows = pack_dataset(packs, samples, encoder, _refuse)

    def walk(workers: int) -> list[float]:
        loader = DataLoader(rows, 1, collate_fn=partial(collate_packs, vision=encoder.vision), num_workers=workers)
        return [float(batch["pixel_values"].double().sum()) for batch in loader]

    def same(found: list[list[float]]) -> None:
        assert all(each == found[0] and len(each) == len(packs) for each in found)

    seconds = turns(WORKERS, walk, same, clock=time.perf_counter, warm=False)
    return {
        "of": "workers",
        "cpus": os.cpu_count(),
        "packs_per_second": {w: results.spread(len(packs) / s for s in seconds[str(w)]) for w in WORKERS},
        "times_as_fast_as_none": {w: results.spread(results.quotients(seconds["0"], seconds[str(w)])) for w in WORKERS},
    }


def _refuse(error: Exception) -> None:
    raise error


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    keep_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MANTIS_LITE_CACHE"] = f"{name}/cache"
        (folder / "pictures").mkdir()
        make_rows(folder / "pictures", 1, max(PICTURES))
        draw_pictures(folder / "pictures", max(PICTURES))
        figures: dict[str, Any] = {"samples planned": planned()}
        figures["rows prepared"] = prepared(folder, ROWS, ROWS, [0] * len(ROWS), "rows prepared")
        per_row = prepared(folder, PICTURES, [40] * len(PICTURES), PICTURES, "pictures of each of 40 rows prepared")
        figures["pictures prepared"] = per_row
        figures |= {f"a step by {name}": found for name, found in stepped(folder).items()}
        figures["pictures seen"] = seen(folder)
        figures["workers"] = loaded(folder)
    print(json.dumps(figures, indent=1))
    results.write("scaling", figures)


if __name__ == "__main__":
    main()
