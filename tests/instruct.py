"""A small Mantis-Instruct as the hub has it: a subset a folder, with Parquet for its splits and zips of pictures."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from mantis_lite.data.repository import INSTRUCT

ROOT = Path(__file__).parents[1]
TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [("id", pa.string()), ("images", pa.list_(IMAGE)), ("conversation", pa.list_(TURN)), ("source", pa.string())]
)


def jpeg(name: str) -> bytes:
    """A JPEG by its name: a picture of noise, so that a zip packs it no smaller."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (*random.integers(20, 60, 2), 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def row(subset: str, number: int, *images: str) -> dict:
    turns = [("user", f"{'<image>' * len(images)}What is {number}?"), ("assistant", f"{number} of {subset}.")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    found = [{"bytes": None, "path": path} for path in images] or None
    return {"id": f"{subset}_{number}", "images": found, "conversation": conversation, "source": subset}


ROWS = {
    "nlvr2": [row("nlvr2", i, f"{i}/left.jpg", f"{i}/right.jpg") for i in range(7)],
    "iconqa": [row("iconqa", i, *(f"pics/{j}.jpg" for j in range(i % 4))) for i in range(9)],
    "llava_665k_multi": [row("llava", i, *(f"coco/{i}_{j}.jpg" for j in range(1 + i % 3))) for i in range(6)],
}
"""By subset; iconqa has rows without a picture."""
VAL = [row("nlvr2", i, f"{i}/left.jpg") for i in (100, 101)]


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)


def zipped(path: Path, names: list[str], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as file:
        for name in names:
            file.writestr(name, jpeg(name))


def images_of(rows: list[dict]) -> list[str]:
    return sorted({image["path"] for row in rows for image in row["images"] or ()})


def publish(folder: Path, rows: dict[str, list[dict]] = ROWS) -> Path:
    """Write the repository for a FakeHub that serves `folder`: nlvr2 in two Parquet files and with val; the pictures of
    llava_665k_multi in three zips, one of which is listed last, and packed."""
    made = folder / "datasets" / INSTRUCT
    for subset, of in rows.items():
        half = len(of) // 2 if subset == "nlvr2" else len(of)
        parts = [of[:half], of[half:]] if half < len(of) else [of]
        for at, part in enumerate(parts):
            parquet(made / subset / f"train-{at:05}-of-{len(parts):05}.parquet", part)
        names = images_of(of)
        if subset == "llava_665k_multi":
            zips = [f"train_images_part{at}.zip" for at in range(3)]
            for at, name in enumerate(zips):
                zipped(made / subset / name, names[at::3], zipfile.ZIP_DEFLATED if at == 2 else zipfile.ZIP_STORED)
            (made / subset / "train_images_zips.txt").write_text("\n".join([zips[1], zips[0], zips[2]]) + "\n")
        else:
            zipped(made / subset / "train_images.zip", names)
    parquet(made / "nlvr2/val-00000-of-00001.parquet", VAL)
    zipped(made / "nlvr2/val_images.zip", images_of(VAL))
    (made / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return made


def environment(url: str, home: Path) -> dict[str, str]:
    """Of a process for which the fake hub is the only one, and whose files lie in `home`."""
    kept = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS") if key in os.environ}
    own = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HOME": str(home), "HF_HOME": str(home / "hf")}
    return kept | own | {"MANTIS_LITE_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}


COMMAND = [sys.executable, "-m", "mantis_lite", "data", "download"]
