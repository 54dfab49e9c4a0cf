"""Rows a second into shards, by processes and by Ray, and back out of them, from this disk and over HTTP.

    python -m benchmarks.shards

Distinct rows of seeded text with two JPEGs of 640 x 480 each, for the tiny model. Preparing is timed with the lengths
remembered from before, each engine in a folder of its own, from its start to its end, with what its processes import;
all must write the same files. Reading is what packs cost before the model has them: the rows of an epoch, in its order,
to tensors, in one process, which must be the same; over HTTP from a server on loopback with an empty cache. Engines
take turns, and then places.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import threading
import time
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mantis_lite.data.prepare import prepare
from mantis_lite.data.schedule import pack_epoch
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe_file import load_recipe
from mantis_lite.sharding import shard

from . import results
from .preparation import make_rows, timed

SHARD = 10**6


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def draw_pictures(folder: Path, count: int) -> None:
    """Pictures in the place of the tiny ones that `make_rows` leaves: smooth shapes and a little noise."""
    random = np.random.default_rng(1)
    for number in range(count):
        shapes = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((640, 480))
        noise = random.normal(0, 4, (480, 640, 3))
        pixels = np.clip(np.asarray(shapes) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=85)


def prepared(data: str, to: Path, engine: str, workers: int, layout: str) -> float:
    """Seconds of `mantis-lite data prepare`'s work, the import of this process aside."""
    recipe = load_recipe("chat", ["model=tiny", f"data={data}"])
    return timed(shard, recipe, str(to), engine, layout, SHARD, workers)[0]


def read(data: str) -> tuple[float, list[int]]:
    """Rows a second that are made tensors, and what they are, in any order."""
    recipe = load_recipe("chat", ["model=tiny", f"data={data}", "data.cache_size=1GB"])
    encoder = open_checkpoint(recipe.model).encoder(recipe)
    samples = prepare(recipe.data, recipe.packing, encoder).train
    order = [index for pack in pack_epoch(samples, recipe.packing) for index in pack]
    begun = time.perf_counter()
    encoded = [encoder.encode(samples[index]) for index in order]
    seconds = time.perf_counter() - begun
    arrays = [[each.input_ids, each.labels, *(picture["pixel_values"] for picture in each.pixels)] for each in encoded]
    return len(order) / seconds, sorted(zlib.crc32(b"".join(array.tobytes() for array in of)) for of in arrays)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    """The shards of a set: what they hold, by name."""
    return {file.name: file.read_bytes() for file in folder.rglob("*.tar")}


def measure(rows: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"rows": rows, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MANTIS_LITE_CACHE"] = f"{name}/cache"
        (folder / "rows").mkdir()
        data = str(make_rows(folder / "rows", rows, images=2))
        draw_pictures(folder / "rows", 2 * rows)
        figures["bytes_of_rows"] = size_of(folder / "rows")
        read(data)  # so that lengths are known, and everything is imported
        cases = [("plain, 1 process", "plain", 1), ("plain, 2 processes", "plain", 2)]
        if importlib.util.find_spec("ray"):
            cases.append(("ray, 2 cores", "ray", 2))
        speeds: dict[str, list[float]] = {case: [] for case, *_ in cases}
        for repeat in range(results.REPEATS):
            for case, engine, workers in cases:
                to = folder / case / str(repeat)
                speeds[case].append(rows / prepared(data, to, engine, workers, "webdataset"))
                assert contents(to) == contents(folder / cases[0][0] / "0")
        for case, found in speeds.items():
            figures[f"prepared, {case}, rows_per_second"] = results.spread(found)
        webdataset = folder / cases[0][0] / "0"
        prepared(data, folder / "parquet", "plain", 1, "parquet")
        figures["bytes_of_webdataset"] = size_of(webdataset)
        figures["bytes_of_parquet"] = size_of(folder / "parquet")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(webdataset)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        places = {
            "rows themselves": data,
            "webdataset on disk": str(webdataset),
            "parquet on disk": str(folder / "parquet"),
            "webdataset over http": f"http://127.0.0.1:{server.server_port}",
        }
        if importlib.util.find_spec("aiohttp") is None:
            del places["webdataset over http"]
        speeds = {place: [] for place in places}
        for repeat in range(results.REPEATS):
            os.environ["MANTIS_LITE_CACHE"] = f"{name}/cache-{repeat}"
            sums = []
            for place, path in places.items():
                speed, checksums = read(path)
                speeds[place].append(speed)
                sums.append(checksums)
            assert all(each == sums[0] for each in sums)
        for place, found in speeds.items():
            figures[f"read, {place}, rows_per_second"] = results.spread(found)
        server.shutdown()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=80)
    args = parser.parse_args()
    figures = measure(args.rows)
    print(figures)
    results.write("shards", figures)


if __name__ == "__main__":
    main()
