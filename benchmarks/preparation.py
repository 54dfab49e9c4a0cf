"""Reading, checking and measuring rows, against the tokenizer's own time on the same text, and against others' way.

    python -m benchmarks.preparation
    python -m benchmarks.preparation --whole [LENGTHS.npz]

Distinct rows of seeded text, without pictures and with three of their own each: a call of the tokenizer on all prompts
for how many tokens they have, a first start (cold) and a second one (warm) take turns, and both starts must find the
same lengths. Tiny Mantis' tokenizer makes a token of nearly each letter; one that has learned the words, of each word.

Others open each picture and run the model's processor on it and on the text, to know how many tokens a row has: as
transformers', TRL's and LLaMA-Factory's do. Real rows, for a LLaVA of 576 tokens a picture; theirs is given the rows as
they are, ours COPIES of each that differ in a word and have the same pictures. Both must find the same lengths.

Whole are rows with as much text, at four characters a token, and as many pictures as the file's samples have: 20,000
with pictures of their own, and all of them with pictures that they share. Each start is a process of its own: the first
one and the next; and of the 20,000 one that is killed when half of the rows are measured, and the one that goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

from mantis_lite.data.chunks import workers_for
from mantis_lite.data.encode import Encoder
from mantis_lite.data.lengths import RECORD
from mantis_lite.data.media import open_image
from mantis_lite.data.prepare import Prepared, prepare
from mantis_lite.data.prepared_files import open_prepared, save_prepared
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe import Recipe
from mantis_lite.recipe_file import load_recipe

from . import planning, results, small_llava

EXAMPLES = results.SHARED / "mantis-examples/chat/train.json"
WORDS = 16_384
"""Of a tokenizer that learns them, at most."""
COPIES = 20
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


def run(recipe: Recipe, encoder: Encoder, workers: int | None = None) -> Prepared:
    return prepare(recipe.data, recipe.packing, encoder, workers=workers)


class Starts:
    """First and second starts: each first one with an empty cache of its own, in a folder; by so many processes."""

    def __init__(self, recipe: Recipe, encoder: Encoder, folder: Path, workers: int | None = None) -> None:
        self.recipe, self.encoder, self.folder, self.workers = recipe, encoder, folder, workers
        self.caches = count()

    def first(self) -> Prepared:
        os.environ["MANTIS_LITE_CACHE"] = str(self.folder / f"cache-{next(self.caches)}")
        return run(self.recipe, self.encoder, self.workers)

    def second(self) -> Prepared:
        return run(self.recipe, self.encoder, self.workers)


def text_of(encoder: Encoder, sample: Any) -> str:
    return "".join(piece.content for piece in encoder.render(sample) if type(piece.content) is str)


def learned(data: Path) -> Path:
    """A small model, beside the rows, whose tokenizer has their words."""
    texts = [turn["content"] for line in data.open() for turn in json.loads(line)["messages"]]
    folder = data.with_name("model")
    folder.mkdir()
    return small_llava.make(folder, texts[: len(texts) // 10], words=WORDS)


def by_tokenizer(rows: int, images: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a tokenizer of letters comes to, and one of words."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_rows(Path(folder), rows, images)
        yield "", measure(path, "tiny")
        yield ", a token a word", measure(path, str(learned(path)))


def measure(path: Path, model: str) -> dict[str, Any]:
    """Rows a second by the tokenizer alone, and of first and second starts."""
    recipe = load_recipe("chat", [f"data={path}", f"model={model}"])
    encoder = open_checkpoint(recipe.model).encoder(recipe)
    starts = Starts(recipe, encoder, path.parent)  # an encoder finds no other's lengths in a cache
    samples = starts.first().train
    rows = len(samples)
    texts = [text_of(encoder, sample) for sample in samples]
    ways: dict[str, Callable[[], Any]] = {
        "tokenizer": lambda: [*map(len, encoder.tokenizer.encode_batch_fast(texts))],
        "cold": starts.first,
        "warm": starts.second,
    }

    def same(found: list[Any]) -> None:
        tokens, *prepared = found
        assert len(tokens) == rows and all((each.train.lengths == samples.lengths).all() for each in prepared)

    seconds = results.interleaved(ways, same=same, warm=False)
    return {
        "rows": rows,
        "tokens_per_row": round(float(samples.lengths[:, 0].mean()), 1),
        "rows_per_second": {name: results.spread(rows / s for s in of) for name, of in seconds.items()},
        "cold_over_tokenizer": results.spread(results.quotients(seconds["cold"], seconds["tokenizer"])),
        "warm_seconds_of_10,000_rows": results.spread(10_000 * s / rows for s in seconds["warm"]),
    }


def copies(folder: Path) -> Path:
    """The real rows so many times, each with a word of its own in its first turn; pictures as they are."""
    rows = json.loads(EXAMPLES.read_text())
    with (folder / "rows.jsonl").open("w") as file:
        for copy in range(COPIES):
            for row in rows:
                first, *others = row["conversation"]
                said = first | {"content": f"{first['content']} ({copy:03})"}
                file.write(json.dumps(row | {"id": f"{row['id']}-{copy}", "conversation": [said, *others]}) + "\n")
    return folder / "rows.jsonl"


def opened(encoder: Encoder, processor: Any, samples: Sequence[Any]) -> list[int]:
    """Tokens of each row as others count them: with its pictures opened, and made what the model is given."""
    lengths = []
    for sample in samples:
        pictures = [open_image(image, sample) for image in sample.images]
        parts = (piece.content for piece in encoder.render(sample))
        text = "".join(part if isinstance(part, str) else encoder.vision.placeholder for part in parts)
        made = processor(text=text, images=pictures or None, add_special_tokens=False)
        lengths.append(len(made["input_ids"][0]))
    return lengths


def processor_of(model: Path) -> Any:
    """transformers' own for the small model."""
    image_processor = AutoImageProcessor.from_pretrained(model)
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    tokenizer = AutoTokenizer.from_pretrained(model)
    return LlavaProcessor(image_processor, tokenizer, patch_size=small_llava.PATCH, **strategy)


def against_others() -> dict[str, Any]:
    """Rows a second of a first start, and of the way that opens pictures, on the real rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        small_llava.make(folder / "model")
        source = f"{{path: {copies(folder)}, media_dir: {EXAMPLES.parent}}}"
        settings = [f"data=[{source}]", f"model={folder}/model", "packing.max_length=32768"]
        recipe = load_recipe("chat", settings)
        encoder = open_checkpoint(recipe.model).encoder(recipe)
        processor = processor_of(folder / "model")
        starts = Starts(recipe, encoder, folder)
        samples = starts.first().train
        rows = len(samples) // COPIES
        few = [samples[at] for at in range(rows)]
        ways: dict[str, Callable[[], Any]] = {
            "first start": starts.first,
            "opened": lambda: opened(encoder, processor, few),
        }

        def same(found: list[Any]) -> None:
            prepared, lengths = found
            assert len(prepared.train) == COPIES * rows
            assert prepared.train.lengths[:rows, 0].tolist() == lengths

        seconds = results.interleaved(ways, same=same, warm=False)
    each = {"first start": [s / (COPIES * rows) for s in seconds["first start"]]}
    each["opened"] = [s / rows for s in seconds["opened"]]
    return {
        "rows": {"first start": COPIES * rows, "opened": rows},
        "rows_per_second": {name: results.spread(1 / s for s in of) for name, of in each.items()},
        "times_faster": results.spread(results.quotients(each["opened"], each["first start"])),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path, nargs="?", default=planning.LENGTHS)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--whole", type=int, nargs="?", const=planning.ALL, help="rows of a whole data set, or fewer")
    parser.add_argument("--model", default="tiny", help="of --whole and --prepare")
    parser.add_argument("--prepare", help="only prepare these rows, and print what it took")
    args = parser.parse_args()
    if args.prepare:
        prepare_once(args.prepare, args.model)
        return
    figures: dict[str, Any] = {}
    if args.whole:
        tokens, images = (of[: args.whole] for of in planning.read(args.lengths))
        own = slice(0, None, max(1, len(tokens) // OWN_PICTURES))  # from all subsets
        figures["pictures of their own"] = measure_whole(tokens[own], images[own], False, args.model)
        figures["a whole Mantis-Instruct"] = measure_whole(tokens, images, True, args.model)
    else:
        for name, images_a_row in (("text alone", 0), ("three pictures a row", 3)):
            for words, found in by_tokenizer(args.rows, images_a_row):
                figures[name + words] = found
                print(name + words, found, flush=True)
        if EXAMPLES.is_file():
            figures["against others"] = against_others()
    print(json.dumps(figures, indent=2))
    results.write("preparation_whole" if args.whole else "preparation", figures)


if __name__ == "__main__":
    main()
