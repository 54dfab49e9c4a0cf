"""Reading, checking and measuring rows, against the tokenizer's own time on the same text.

    python -m benchmarks.preparation

Distinct rows of three pictures and some 600 tokens of seeded text; cold is a first start, warm a second one. Cold is
paired, run by run, with one call of the tokenizer on the same prompts.
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


def make_rows(folder: Path, rows: int) -> Path:
    """Write distinct rows: six turns of seeded words, three pictures of its own."""
    random = np.random.default_rng(0)
    for picture in range(3 * rows):
        Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).save(folder / f"{picture}.jpg")
    words = np.array(["".join(random.choice(list("abcdefghijklmnoprstuvw"), n)) for n in random.integers(2, 9, 5000)])
    lines = []
    for row in range(rows):
        turns = [{"role": role, "content": " ".join(random.choice(words, 35))} for role in ("user", "assistant") * 3]
        images = [f"{3 * row + picture}.jpg" for picture in range(3)]
        lines.append(json.dumps({"images": images, "messages": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def timed(call, *args):
    begun = time.perf_counter()
    result = call(*args)
    return time.perf_counter() - begun, result


def run(recipe: Recipe, encoder: Encoder) -> Prepared:
    return prepare(recipe.data, recipe.packing, encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--model", default="tiny")
    args = parser.parse_args()
    cold, warm, tokenizer = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = make_rows(Path(folder), args.rows)
        recipe = load_recipe("chat", [f"data={path}", f"model={args.model}"])
        encoder = open_checkpoint(recipe.model).encoder(recipe)
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
    figures = {
        "rows": args.rows,
        "tokens_per_row": round(float(samples.lengths[:, 0].mean()), 1),
        "tokenizer_seconds_median": round(statistics.median(tokenizer), 3),
        "cold_seconds_median": round(statistics.median(cold), 3),
        "cold_over_tokenizer_median": round(statistics.median(ratios), 3),
        "cold_over_tokenizer_min": round(min(ratios), 3),
        "cold_over_tokenizer_max": round(max(ratios), 3),
        "warm_rows_per_second_median": round(args.rows / statistics.median(warm)),
        "warm_rows_per_second_min": round(args.rows / max(warm)),
        "warm_rows_per_second_max": round(args.rows / min(warm)),
    }
    print(figures)
    results.write("preparation", figures)


if __name__ == "__main__":
    main()
