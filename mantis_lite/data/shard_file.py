"""Samples as the rows of one file, and back: a tar as WebDataset has it, or Parquet."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .sample import Image, Sample, Turn, Written

Layout = Literal["webdataset", "parquet"]
SUFFIX: dict[Layout, str] = {"webdataset": ".tar", "parquet": ".parquet"}

KINDS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp", b"II": "tif", b"MM": "tif"}
"""A picture's kind by its first two bytes, of those that `media.FORMATS` opens."""

GROUP = 2 << 20
"""Bytes of a group of rows of a Parquet file, the least that is read of it at once."""

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "json": pa.string(),
        "pictures": pa.list_(pa.binary()),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "spans": pa.list_(pa.int32()),
    }
)


class Spot(NamedTuple):
    """Where a row stands: in a tar its bytes, and their CRC-32; in Parquet its group, and which row of that it is."""

    start: int
    size: int
    crc: int


class Damaged(Exception):
    """A row whose bytes are not as they were written."""


def write_tar(file: Path, samples: Iterator[tuple[str, Sample]]) -> list[Spot]:
    """Write laid out samples, each by its key; the same samples make the same bytes.

    Of a row there are KEY.json with its turns, KEY.0.jpg and so on, its pictures' files, and KEY.npz with its
    `Written`. Pictures are bytes.
    """
    spots = []
    with file.open("wb") as opened:
        for key, sample in samples:
            content = b"".join(_members(key, sample))
            spots.append(Spot(opened.tell(), len(content), zlib.crc32(content)))
            opened.write(content)
        opened.write(bytes(2 * tarfile.BLOCKSIZE))
    return spots


def read_tar(file: BinaryIO, spot: Spot, by: str) -> Sample:
    """The row at a spot, as the encoder of this fingerprint wrote it out. Raises Damaged, OSError."""
    file.seek(spot.start)
    content = file.read(spot.size)
    if zlib.crc32(content) != spot.crc:
        raise Damaged
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        first, *pictures, last = (opened.read() for member in tar if (opened := tar.extractfile(member)))
    with np.load(io.BytesIO(last)) as arrays:
        written = Written(arrays["input_ids"], arrays["labels"], arrays["spans"], by)
    return _sample(first, pictures, written)


def write_parquet(file: Path, samples: Iterator[tuple[str, Sample]]) -> list[Spot]:
    """As `write_tar`, a row of SCHEMA each, in groups that are read at once."""
    spots: list[Spot] = []
    group: list[dict[str, Any]] = []
    with pq.ParquetWriter(file, SCHEMA, compression="none", write_page_checksum=True) as writer:
        groups = count()
        number, held = next(groups), 0
        for _, sample in samples:
            spots.append(Spot(number, len(group), 0))
            group.append(_row(sample))
            held += sum(map(len, group[-1]["pictures"])) + len(group[-1]["json"])
            if held >= GROUP:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=len(group))
                group, number, held = [], next(groups), 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=len(group))
    return spots


def read_parquet(file: BinaryIO, spot: Spot, by: str) -> Sample:
    """As `read_tar`."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            (row,) = opened.read_row_group(spot.start).slice(spot.size, 1).to_pylist()
    except (pa.ArrowException, OSError):  # a wrong checksum is an OSError here
        raise Damaged from None
    ids, labels, spans = (np.array(row[name], dtype=np.int32) for name in ("input_ids", "labels", "spans"))
    return _sample(row["json"], row["pictures"], Written(ids, labels, spans.reshape(-1, 2), by))


def _members(key: str, sample: Sample) -> Iterator[bytes]:
    assert sample.written is not None
    arrays = io.BytesIO()  # a zip in it says that it is of 1980
    written = sample.written
    np.savez(arrays, allow_pickle=False, input_ids=written.ids, labels=written.labels, spans=written.spans)
    yield _member(f"{key}.json", _json(sample).encode())
    for number, picture in enumerate(_pictures(sample)):
        yield _member(f"{key}.{number}.{KINDS.get(picture[:2], 'bin')}", picture)
    yield _member(f"{key}.npz", arrays.getvalue())


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # of nobody's, in 1970
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _row(sample: Sample) -> dict[str, Any]:
    assert sample.written is not None
    written = sample.written
    tokens = {"input_ids": written.ids, "labels": written.labels, "spans": written.spans.ravel()}
    return {"id": sample.id, "json": _json(sample), "pictures": _pictures(sample), **tokens}


def _pictures(sample: Sample) -> list[bytes]:
    return [image.source for image in sample.images if isinstance(image.source, bytes)]


def _json(sample: Sample) -> str:
    turns = [
        {
            "role": turn.role,
            "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in turn.content],
        }
        for turn in sample.turns
    ]
    return json.dumps({"id": sample.id, "where": sample.where, "messages": turns})


def _sample(text: str | bytes, pictures: Sequence[bytes], written: Written) -> Sample:
    row = json.loads(text)
    images = iter([Image(picture) for picture in pictures])
    turns = tuple(
        Turn(turn["role"], tuple(p["text"] if p["type"] == "text" else next(images) for p in turn["content"]))
        for turn in row["messages"]
    )
    return Sample(row["where"], row["id"], turns, written=written)
