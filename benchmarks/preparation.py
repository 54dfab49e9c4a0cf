"""Reading, checking and measuring rows, against the tokenizer's own time on the same text; and a whole Mantis-Instruct.

    python -m benchmarks.preparation [LENGTHS.npz]

Distinct rows of seeded text, without pictures and with three of their own each; cold is a first start, warm a second
one. Cold is paired, run by run, with one call of the tokenizer on the same prompts.

Then rows with as much text, at four characters a token, and as many pictures as the file's samples have: 20,000 with
pictures of their own, and all of them with pictures that they share. Each start is a process of its own: the first one
and the next; and of the 20,000 one that is killed when half of the rows are measured, and the one that goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mantis_lite.data.chunks import workers_for
from mantis_lite.data.encode import Encoder
from mantis_lite.data.lengths import RECORD
from mantis_lite.data.prepare import Prepared, prepare
from mantis_lite.data.prepared_files import open_prepared, save_prepared
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe import Recipe, load_recipe

from . import planning, results

REPEATS = 5
SHARED_PICTURES = 2000
OWN_PICTURES = 20_000
"""Rows that have pictures of their own."""


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


def make_whole(folder: Path, tokens: np.ndarray, images: np.ndarray, shared: bool) -> Path:
    """Write rows of four turns with this much text and so many pictures (N,), of 64 x 48 pixels."""
    random = np.random.default_rng(0)
    words = np.array(["".join(random.choice(list("abcdefghijklmnoprstuvw"), n)) for n in random.integers(2, 9, 5000)])
    text = " ".join(random.choice(words, 1_000_000))
    ends = np.cumsum(images)
    for picture in range(SHARED_PICTURES if shared else int(ends[-1])):
        pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{picture}.jpg")
    with (folder / "rows.jsonl").open("w") as file:
        for row, (length, end, count) in enumerate(zip(tokens.tolist(), ends.tolist(), images.tolist(), strict=True)):
            starts = random.integers(0, len(text) - length, 4).tolist()
            turns = [
                {"role": ("user", "assistant")[at % 2], "content": text[start : start + length]}
                for at, start in enumerate(starts)
            ]
            pictures = [picture % SHARED_PICTURES if shared else picture for picture in range(end - count, end)]
            images_of = [f"{picture}.jpg" for picture in pictures]
            file.write(json.dumps({"id": str(row), "images": images_of, "messages": turns}) + "\n")
    return folder / "rows.jsonl"


def held(who: int) -> int:
    """MiB of memory at the most."""
    return resource.getrusage(who).ru_maxrss >> 10


def prepare_once(path: str, model: str) -> None:
    """Prepare in this process, save it and open it again, and print what that took."""
    recipe = load_recipe("chat", [f"data={path}", f"model={model}", "data.oversize=drop"])
    encoder = open_checkpoint(recipe.model).encoder(recipe)
    libraries = held(resource.RUSAGE_SELF)
    seconds, prepared = timed(run, recipe, encoder)
    peak, workers = held(resource.RUSAGE_SELF), held(resource.RUSAGE_CHILDREN)
    folder = Path(path).with_name("prepared")
    saving = timed(save_prepared, prepared, folder)[0]
    opening = timed(open_prepared, folder, recipe.data, recipe.packing, encoder)[0]
    figures = {
        "rows": prepared.rows_read,
        "seconds": round(seconds, 1),
        "peak_mib": peak,
        "of_which_libraries_mib": libraries,
        "largest_worker_peak_mib": workers,
        "tokens_per_row": round(float(prepared.train.lengths[:, 0].mean()), 1),
        "saving_seconds": round(saving, 2),
        "opening_seconds": round(opening, 2),
        "saved_mb": round(sum(file.stat().st_size for file in folder.rglob("*.*")) / 1e6, 1),
    }
    print(json.dumps(figures))


def measure_whole(tokens: np.ndarray, images: np.ndarray, shared: bool, model: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = make_whole(Path(folder), tokens, images, shared)
        command = [sys.executable, "-m", "benchmarks.preparation", "--prepare", str(path), "--model", model]

        def start(cache: str) -> subprocess.Popen[str]:
            env = os.environ | {"MANTIS_LITE_CACHE": f"{folder}/{cache}"}
            return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

        def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
            said, _ = process.communicate()
            assert process.returncode == 0
            return json.loads(said.splitlines()[-1])

        first, again = finished(start("cache")), finished(start("cache"))
        assert first["tokens_per_row"] == again["tokens_per_row"]
        (index,) = Path(folder, "cache").glob("lengths-*/index")
        figures = first | {
            "workers": workers_for(first["rows"]),
            "pictures": SHARED_PICTURES if shared else int(images.sum()),
            "file_gb": round(path.stat().st_size / 1e9, 2),
            "rows_per_second": round(first["rows"] / first["seconds"]),
            "again_seconds": again["seconds"],
            "again_rows_per_second": round(again["rows"] / again["seconds"]),
            "again_peak_mib": again["peak_mib"],
            "index_mb": round(index.stat().st_size / 1e6, 1),
        }
        if shared:
            return figures

        def measured() -> int:
            pieces = Path(folder).glob("killed/*/*.piece")
            return sum(piece.stat().st_size for piece in pieces) // RECORD.itemsize

        half = start("killed")
        while measured() < len(tokens) // 2:
            time.sleep(0.01)
        half.kill()
        half.wait()
        left, rest = measured(), finished(start("killed"))
        assert first["tokens_per_row"] == rest["tokens_per_row"]
        return figures | {"rows_measured_before_a_kill": left, "rest_seconds": rest["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lengths", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--whole", type=int, help="only so many of the file's samples")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prepare", help="only prepare these rows, and print what it took")
    args = parser.parse_args()
    if args.prepare:
        prepare_once(args.prepare, args.model)
        return
    cases = (("text alone", 0), ("three pictures a row", 3))
    figures: dict[str, Any] = {name: measure(args.rows, images, args.model) for name, images in cases}
    tokens, images = (of[: args.whole] for of in planning.read(args.lengths))
    own = slice(0, None, max(1, len(tokens) // OWN_PICTURES))  # from all subsets
    figures["pictures of their own"] = measure_whole(tokens[own], images[own], False, args.model)
    figures["a whole Mantis-Instruct"] = measure_whole(tokens, images, True, args.model)
    print(json.dumps(figures, indent=2))
    results.write("preparation", figures)


if __name__ == "__main__":
    main()
