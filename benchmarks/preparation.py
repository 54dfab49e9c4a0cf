"""Reading, checking and measuring rows, against the tokenizer's own time on the same text.

    python -m benchmarks.preparation

Distinct rows of seeded text, without pictures and with three of their own each; cold is a first start, warm a second
one. Cold is paired, run by run, with one call of the tokenizer on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mantis_lite.data.encode import Encoder
from mantis_lite.data.prepare import Prepared, prepare
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe import Recipe, load_recipe

from . import results

REPEATS = 5


def make_rows(folder: Path, rows: int, images: int) -> Path:
    """Write distinct rows: six turns of seeded words, and pictures of its own."""
    random = np.random.default_rng(0)
    for picture in range(images * rows):
        Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).save(folder / f"{picture}.jpg")
    words = np.array(["".join(random.choice(list("abcdefghijklmnoprstuvw"), n)) for n in random.integers(2, 9, 5000)])
    lines = []
    for row in range(rows):
        turns = [{"role": role, "content": " ".join(random.choice(words, 35))} for role in ("user", "assistant") * 3]
        names = [f"{images * row + picture}.jpg" for picture in range(images)]
        lines.append(json.dumps({"images": names, "messages": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def timed(call, *args):
    begun = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - begun, result


def run(recipe: Recipe, encoder: Encoder) -> Prepared:
    return prepare(recipe.data, recipe.packing, encoder)


def measure(rows: int, images: int, model: str) -> dict[str, float]:
    cold, warm, tokenizer = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = make_rows(Path(folder), rows, images)
        recipe = load_recipe("chat", [f"data={path}", f"model={model}"])
        encoder = open_checkpoint(recipe.model).encoder(recipe)
        os.environ["MANTIS_LITE_CACHE"] = f"{folder}/cache"
        samples = run(recipe, encoder).train
        texts = ["".join(p.content for p in encoder.render(sample) if type(p.content) is str) for sample in samples]
        for repeat in range(REPEATS):
            os.environ["MANTIS_LITE_CACHE"] = f"{folder}/cache-{repeat}"
            tokenizer.append(timed(encoder.tokenizer.encode_batch_fast, texts)[0])
            seconds, first = timed(run, recipe, encoder)
            cold.append(seconds)
            seconds, second = timed(run, recipe, encoder)
            warm.append(seconds)
            assert (first.train.lengths == second.train.lengths).all()
    ratios = [c / t for c, t in zip(cold, tokenizer, strict=True)]
    return {
        "rows": rows,
        "tokens_per_row": round(float(samples.lengths[:, 0].mean()), 1),
        "tokenizer_seconds_median": round(statistics.median(tokenizer), 3),
        "cold_seconds_median": round(statistics.median(cold), 3),
        "cold_over_tokenizer_median": round(statistics.median(ratios), 3),
        "cold_over_tokenizer_min": round(min(ratios), 3),
        "cold_over_tokenizer_max": round(max(ratios), 3),
        "warm_rows_per_second_median": round(rows / statistics.median(warm)),
        "warm_rows_per_second_min": round(rows / max(warm)),
        "warm_rows_per_second_max": round(rows / min(warm)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    cases = (("text alone", 0), ("three pictures a row", 3))
    figures = {name: measure(args.rows, images, args.model) for name, images in cases}
    print(figures)
    results.write("preparation", figures)


if __name__ == "__main__":
    main()
