"""Pictures read inside a .zip and from unpacked files: sizes and pixels a second, the time to begin, and the disk.

    python -m benchmarks.zips

Photographs of noise in 640 x 480 as JPEG, a hundred different ones under many names, in random order; what is read lies
in the system's memory of the disk. A second is one of a core's own time. The index alone also of about as many names as
llava_665k_multi has rows: 300,000. Each is the best of eight, in turn.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mantis_lite.data.archives import unpack
from mantis_lite.data.media import header, open_image
from mantis_lite.data.sample import Image, Sample
from mantis_lite.data.zips import open_zips

from . import results

ROUNDS = 8
NAMES = 300_000
ROW = Sample("rows.jsonl:1", None, ())


def photographs(count: int = 100) -> list[bytes]:
    """JPEGs of about 100 KB: noise of several sizes, as clouds are."""
    random, made = np.random.default_rng(0), []
    for _ in range(count):
        layers = [random.integers(0, 256, (6 * n, 8 * n, 3), dtype=np.uint8) for n in (1, 4, 20, 80)]
        scaled = [np.asarray(PIL.Image.fromarray(layer).resize((640, 480)), dtype=np.float32) for layer in layers]
        PIL.Image.fromarray(np.mean(scaled, 0).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=95)
        made.append(file.getvalue())
    return made


def write_zip(path: Path, contents: list[bytes], count: int, kind: int) -> list[str]:
    names = [f"coco/train2017/{number:012}.jpg" for number in range(count)]
    with zipfile.ZipFile(path, "w", kind) as file:
        for number, name in enumerate(names):
            file.writestr(name, contents[number % len(contents)])
    return names


def sizes(images: list[Image]) -> None:
    for image in images:
        header(image, ROW)


def pixels(images: list[Image]) -> None:
    for image in images:
        open_image(image, ROW)


def rate(work: Callable[[list[Image]], None], images: list[Image]) -> float:
    """Pictures a second of a core's own time, which others that are busy on the machine take little from."""
    begun = time.process_time()
    work(images)
    return len(images) / (time.process_time() - begun)


def timed(work: Callable[[], object]) -> float:
    """Seconds of a core's own time."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measure(folder: Path, count: int, decoded: int) -> dict[str, object]:
    os.environ["MANTIS_LITE_CACHE"] = str(folder / "cache")
    contents, order = photographs(), np.random.default_rng(1).permutation(count)
    images: dict[str, list[Image]] = {}
    figures: dict[str, object] = {"pictures": count, "bytes_of_one": int(np.mean([len(c) for c in contents]))}
    for kind, name in ((zipfile.ZIP_STORED, "stored"), (zipfile.ZIP_DEFLATED, "deflated")):
        names = write_zip(folder / f"{name}.zip", contents, count, kind)
        found = open_zips([folder / f"{name}.zip"])
        images[f"in a zip, {name}"] = [Image(found.find(names[at], "", "picture")) for at in order.tolist()]
    unpacked = unpack(folder / "stored.zip")
    images["unpacked"] = [Image(unpacked / names[at]) for at in order.tolist()]
    rates: dict[str, dict[str, int]] = {way: {} for way in images}
    for _ in range(ROUNDS):
        for way, of in images.items():
            for what, work, some in (("sizes", sizes, of), ("pixels", pixels, of[:decoded])):
                rates[way][what] = max(rates[way].get(what, 0), round(rate(work, some)))
    figures["per_second"] = rates
    write_zip(folder / "names.zip", [b"x"], NAMES, zipfile.ZIP_STORED)
    figures["names"] = NAMES
    figures["seconds_to_index"] = round(timed(lambda: open_zips([folder / "names.zip"])), 2)
    figures["seconds_to_open_again"] = round(timed(lambda: open_zips([folder / "names.zip"])), 3)
    figures["index_mb"] = round(max(file.stat().st_size for file in (folder / "cache/zips").iterdir()) / 1e6, 1)
    found = open_zips([folder / "names.zip"])
    names = [f"coco/train2017/{number:012}.jpg" for number in range(0, NAMES, 10)]
    seconds = timed(lambda: [found.find(name, "", "picture") for name in names])
    figures["microseconds_to_find"] = round(seconds / len(names) * 1e6, 1)
    return figures


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """The table of docs/mantis-instruct.md."""
    yield "| pictures | sizes a second of a core | decoded a second of a core |"
    yield "|---|---|---|"
    for way, rates in figures["per_second"].items():
        yield f"| {way} | {rates['sizes']:,} | {rates['pixels']:,} |"
    yield ""
    names, made, size = figures["names"], figures["seconds_to_index"], figures["index_mb"]
    again, found = figures["seconds_to_open_again"] * 1000, figures["microseconds_to_find"]
    yield f"The index of a zip with {names:,} pictures is made in {made:g} s, once, and takes {size:g} MB; opened again"
    yield f"it is mapped in {again:.0f} ms, and a name is found in {found:g} µs."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2_000)
    parser.add_argument("--decoded", type=int, default=200)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), chosen.pictures, chosen.decoded)
    results.write("zips", figures)
    print(figures)


if __name__ == "__main__":
    main()
