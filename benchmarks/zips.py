"""Pictures read inside a .zip and from unpacked files: sizes and pixels a second, the time to begin, and the disk.

    python -m benchmarks.zips

Photographs of noise in 640 x 480 as JPEG, a hundred different ones under many names, in random order; what is read lies
in the system's memory of the disk. A second is one of a core's own time. The index alone also of about as many names as
llava_665k_multi has rows: 300,000. Ways take turns, and must find the same sizes and pixels.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import count as counting
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mantis_lite.data.archives import unpack
from mantis_lite.data.media import header, open_image
from mantis_lite.data.sample import Image, Sample
from mantis_lite.data.zips import open_zips

from . import results

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


def sizes(images: list[Image]) -> list[Any]:
    return [header(image, ROW)[0] for image in images]


def pixels(images: list[Image]) -> list[int]:
    """A checksum of each, which takes little beside decoding it."""
    return [zlib.crc32(open_image(image, ROW).tobytes()) for image in images]


def alike(found: list[list[Any]]) -> None:
    """The same of the pictures in either zip, and of unpacked ones."""
    assert found[0] and all(each == found[0] for each in found)


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
    rates: dict[str, dict[str, dict[str, float]]] = {way: {} for way in images}
    for what, work, some in (("sizes", sizes, count), ("pixels", pixels, decoded)):
        ways = {way: partial(work, of[:some]) for way, of in images.items()}
        for way, seconds in results.interleaved(ways, same=alike, clock=time.process_time).items():
            rates[way][what] = results.spread(min(count, some) / s for s in seconds)
    figures["per_second"] = rates
    return figures | index(folder)


def index(folder: Path) -> dict[str, object]:
    """The index of a zip of many names: made, each time in a cache of its own, opened again, and asked for names."""
    write_zip(folder / "names.zip", [b"x"], NAMES, zipfile.ZIP_STORED)
    names = [f"coco/train2017/{number:012}.jpg" for number in range(0, NAMES, 10)]
    caches = counting()

    def made() -> None:
        os.environ["MANTIS_LITE_CACHE"] = str(folder / f"cache-{next(caches)}")
        open_zips([folder / "names.zip"])

    def found() -> list[Any]:
        zips = open_zips([folder / "names.zip"])
        return [zips.find(name, "", "picture") for name in names]

    ways: dict[str, Any] = {"made": made, "again": lambda: open_zips([folder / "names.zip"]), "found": found}
    seconds = results.interleaved(ways, clock=time.process_time, warm=False)
    each = [(f - a) / len(names) * 1e6 for f, a in zip(seconds["found"], seconds["again"], strict=True)]
    return {
        "names": NAMES,
        "seconds_to_index": results.spread(seconds["made"]),
        "seconds_to_open_again": results.spread(seconds["again"]),
        "index_mb": round(max(file.stat().st_size for file in (folder / "cache-0/zips").iterdir()) / 1e6, 1),
        "microseconds_to_find": results.spread(each),
    }


def lines(figures: dict[str, Any]) -> Iterator[str]:
    """The table of docs/mantis-instruct.md."""
    yield "| pictures | sizes a second of a core | decoded a second of a core |"
    yield "|---|---|---|"
    for way, rates in figures["per_second"].items():
        yield f"| {way} | {rates['sizes']['median']:,.0f} | {rates['pixels']['median']:,.0f} |"
    yield ""
    names, made, size = figures["names"], figures["seconds_to_index"]["median"], figures["index_mb"]
    again, found = figures["seconds_to_open_again"]["median"] * 1000, figures["microseconds_to_find"]["median"]
    yield f"The index of a zip with {names:,} pictures is made in {made:.1f} s, once, and takes {size:g} MB; opened"
    yield f"again it is mapped in {again:.0f} ms, and a name is found in {found:.0f} µs."


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
