"""Pictures from their files to what a model takes: a second of a core, and the bytes that leave a worker.

    python -m benchmarks.pictures [FOLDER]

JPEGs of a folder, without one the example rows' photographs, or where they are not here, drawn ones. Three ways, in
turn, of one core's own time: the published image processor (`stock`: Pillow, then numbers in float32), this package
with `media.backend=pil`, and with `fast`. What `pil` makes is asserted to be the processor's numbers, to the bit. Of
`fast` it is said how far its bytes are from these, and Tiny Mantis' loss. Bytes are those of a sample of four pictures,
in a batch of four: the stock ones with the padding and the masks that the processor adds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from mantis_lite.data import media
from mantis_lite.data.collate import collate
from mantis_lite.data.frames import Frames
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.data.vision import Pixels, Vision
from mantis_lite.memory.bases import find_base
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.levels import levels_of, look_up, look_up_patches
from mantis_lite.models.load import load_model
from mantis_lite.recipe import MediaRecipe
from mantis_lite.recipe_file import load_recipe

from . import results

EXAMPLES = results.SHARED / "mantis-examples/chat/train_images"
A_SAMPLE, A_BATCH = 4, 4
LARGE = (1600, 1200)


class Case(NamedTuple):
    """A model's setting, and of how many pictures its time is taken."""

    name: str
    base: str
    pictures: int
    splitting: bool | None = None
    large: bool = False


CASES = (
    Case("LLaVA, SigLIP, 384 px", "TIGER-Lab/Mantis-8B-siglip-llama3", 40),
    Case("LLaVA, CLIP, 336 px", "TIGER-Lab/Mantis-8B-clip-llama3", 40),
    Case("Idefics2, up to 980 px", "TIGER-Lab/Mantis-8B-Idefics2", 40),
    Case("Idefics2, split", "TIGER-Lab/Mantis-8B-Idefics2", 12, True),
    Case("Idefics3, tiles", "HuggingFaceM4/Idefics3-8B-Llama3", 4, True),
    Case("Qwen2-VL", "Qwen/Qwen2-VL-7B-Instruct", 24),
    Case("LLaVA, SigLIP, of 1,600 x 1,200", "TIGER-Lab/Mantis-8B-siglip-llama3", 10, large=True),
    Case("Idefics2, of 1,600 x 1,200", "TIGER-Lab/Mantis-8B-Idefics2", 10, large=True),
)


def draw(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Photographs of noise of several sizes, as clouds are."""
    random, files = np.random.default_rng(0), []
    for number in range(count):
        layers = [random.integers(0, 256, (6 * n, 8 * n, 3), dtype=np.uint8) for n in (1, 4, 20, 80)]
        scaled = [np.asarray(PIL.Image.fromarray(layer).resize(size), dtype=np.float32) for layer in layers]
        files.append(folder / f"{size[0]}-{number}.jpg")
        PIL.Image.fromarray(np.mean(scaled, 0).astype(np.uint8)).save(files[-1], quality=90)
    return files


def sample_of(files: Sequence[Path]) -> Sample:
    return Sample("rows:1", None, (Turn("user", tuple(map(Image, files))),))


def stock(processor: Any, splitting: bool | None, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the published processor makes of a batch of samples' pictures."""
    settings = {} if splitting is None else {"do_image_splitting": splitting}
    pictures = [[media.open_image(image, sample) for image in sample.images] for sample in samples]
    nested = "Idefics" in type(processor).__name__
    return dict(processor(pictures if nested else [*chain(*pictures)], return_tensors="np", **settings))


def ours(vision: Vision, recipe: MediaRecipe, samples: Sequence[Sample]) -> list[list[Pixels]]:
    frames = Frames(recipe)
    return [[vision.pixels(p) for p in frames.see(sample, None, vision.enough)] for sample in samples]


def sent(value: Any) -> int:
    """Bytes of a batch."""
    if isinstance(value, dict):
        return sum(map(sent, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(sent, value))
    return value.nbytes


def compare(case: Case, processor: Any, numbers: dict[str, Any], pil: list[Pixels], fast: list[Pixels]) -> np.ndarray:
    """Assert that `pil` is the processor's numbers; how far `fast` is, in levels."""
    levels = levels_of(processor)
    seen = look_up_patches if "Qwen" in case.base else look_up
    expected = numbers["pixel_values"]
    views = [view for picture in pil for view in picture.values() if view.dtype == np.uint8]
    near = [view for picture in fast for view in picture.values() if view.dtype == np.uint8]
    found = [seen(torch.from_numpy(view.copy()), levels, -2 if "Qwen" in case.base else -3).numpy() for view in views]
    if "Idefics2" in case.base:  # padded to the largest
        assert all(
            (theirs[:, : v.shape[1], : v.shape[2]] == v).all() for theirs, v in zip(expected[0], found, strict=True)
        )
    else:
        theirs = expected[0] if "Idefics3" in case.base else expected
        assert np.array_equal(theirs, np.concatenate(found)), case.name
    return np.concatenate([np.abs(a.astype(np.int16) - b).ravel() for a, b in zip(views, near, strict=True)])


def measure(case: Case, files: Sequence[Path]) -> dict[str, Any]:
    base, files = find_base(case.base), files[: case.pictures]
    processor = base.image_processor
    recipes = {backend: MediaRecipe(image_splitting=case.splitting, backend=backend) for backend in ("pil", "fast")}
    visions = {backend: base.vision(recipe) for backend, recipe in recipes.items()}
    alone = [sample_of([file]) for file in files]
    ways: dict[str, Callable[[], object]] = {
        "stock": lambda: [stock(processor, case.splitting, [sample]) for sample in alone]
    }
    ways |= {b: lambda b=b: ours(visions[b], recipes[b], alone) for b in recipes}  # type: ignore[misc]
    seconds = results.interleaved(ways, clock=time.process_time)
    again = [*files, *files]
    starts = (A_SAMPLE * at % len(files) for at in range(A_BATCH))
    batch = [sample_of(again[start : start + A_SAMPLE]) for start in starts]
    (pil, *others), (fast,) = (
        ours(visions[backend], recipes[backend], some) for backend, some in (("pil", batch), ("fast", batch[:1]))
    )
    off = compare(case, processor, stock(processor, case.splitting, batch[:1]), pil, fast)
    sizes = {
        "stock": sent(stock(processor, case.splitting, batch)),
        "ours": sent(visions["pil"].batch([*chain(pil, *others)])),
    }
    return {
        "pictures": len(files),
        "megapixels_mean": round(float(np.mean([np.prod(PIL.Image.open(file).size) for file in files])) / 1e6, 2),
        "per_second": {way: results.spread(len(files) / s for s in each) for way, each in seconds.items()},
        "times_stock": {
            way: results.spread(results.quotients(seconds["stock"], seconds[way])) for way in ("pil", "fast")
        },
        "bytes_of_a_sample": {way: size // A_BATCH for way, size in sizes.items()},
        "fast_off_by_levels": {
            "mean": round(float(off.mean()), 3),
            "max": int(off.max()),
            "share_over_2": round(float((off > 2).mean()), 5),
        },
    }


def losses(files: Sequence[Path]) -> dict[str, float]:
    """Tiny Mantis' loss on rows with pictures by either backend, and the largest difference of a row."""
    found: dict[str, list[float]] = {}
    for backend in ("pil", "fast"):
        recipe = load_recipe(
            "chat", ["model=tiny", "data=unused.json", f"media.backend={backend}", "memory.kernels=off"]
        )
        recipe = recipe.model_copy(update={"method": "full"})
        checkpoint = open_checkpoint(recipe.model)
        encoder, model = checkpoint.encoder(recipe), load_model(checkpoint, recipe, dtype=torch.float32).eval()
        found[backend] = []
        for at in range(0, len(files) - 1, 2):
            turns = (
                Turn("user", (*map(Image, files[at : at + 2]), "What is it?")),
                Turn("assistant", ("A red circle.",)),
            )
            with torch.no_grad():
                batch = collate([encoder.encode(Sample("rows:1", None, turns))], encoder.vision.batch)
                found[backend].append(float(model(**batch).loss))
    off = np.abs(np.subtract(found["pil"], found["fast"])) / np.array(found["pil"])
    means = {backend: round(float(np.mean(each)), 5) for backend, each in found.items()}
    return means | {"relative_difference_mean": round(float(off.mean()), 6), "largest": round(float(off.max()), 6)}


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """What docs/measured.md says of it."""
    yield "| pictures a second of a core | the processor | `pil` | `fast` | MB a sample: the processor's, ours |"
    yield "|---|---|---|---|---|"
    for name, case in figures["cases"].items():
        rates = {way: f"{each['median']:,.0f}" for way, each in case["per_second"].items()}
        times = {way: f"{rates[way]} ({case['times_stock'][way]['median']:.1f} x)" for way in ("pil", "fast")}
        size = {way: f"{count / 1e6:.1f}" for way, count in case["bytes_of_a_sample"].items()}
        yield f"| {name} | {rates['stock']} | {times['pil']} | {times['fast']} | {size['stock']}, {size['ours']} |"
    yield ""
    off, loss = [case["fast_off_by_levels"] for case in figures["cases"].values()], figures["loss"]
    mean, most, over = (max(case[what] for case in off) for what in ("mean", "max", "share_over_2"))
    rows, row = loss["relative_difference_mean"], loss["largest"]
    yield f"Of 256 levels `fast` is off by {mean:.1f} on average at most: in the large photographs, which it decodes"
    yield f"smaller, {over:.0%} of the bytes are off by more than 2; none anywhere by more than {most}."
    yield f"Tiny Mantis' loss on rows of two photographs is another by {rows:.1%} on average, by {row:.1%} at most."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=EXAMPLES)
    given = parser.parse_args().folder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(given.rglob("*.jpg"))
        order = np.random.default_rng(0).permutation(len(files)).tolist()
        files = [files[at] for at in order] or draw(Path(folder), 40, (640, 480))
        large = draw(Path(folder), 10, LARGE)
        cases = {case.name: measure(case, large if case.large else files) for case in CASES}
        figures = {"pictures": "examples" if order else "drawn", "cases": cases, "loss": losses(files[:40])}
    results.write("pictures", figures | {"load_average": [round(load, 1) for load in os.getloadavg()]})
    print(figures)
    print("\n".join(lines(figures)))


if __name__ == "__main__":
    main()
