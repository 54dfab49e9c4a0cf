"""The pictures of rows within .zip files: an index of each archive, made once, and what lies there under a name."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..files import write_whole
from .archives import fingerprint, members, refuse_harmful, told
from .columns import Fault, short
from .lengths import cache_dir
from .media import SUFFIXES
from .paths import ODD, MediaFolder
from .zipped import Zipped


@dataclass(frozen=True)
class MediaZips(MediaFolder):
    """As MediaFolder, of rows whose paths lead to files within `archives`.

    A table (6, N) uint64 of each archive says where its files lie: by the hash of a name, sorted, the arguments of
    Zipped. It is mapped from the user's cache, so that many processes share it.
    """

    archives: tuple[Path, ...] = ()

    def find(self, name: str, place: str, kind: str) -> Path | Zipped:
        """The file of a picture; a link or a path of this machine, as MediaFolder finds it. Raises Fault."""
        if name.startswith("/") or ODD.search(name):
            return super().find(name, place, kind)
        among = ", ".join(archive.name for archive in self.archives)
        found = self._within(name)
        if found is None:
            near = next((other for other in _spellings(name) if self._within(other)), None)
            remedy = f"Did you mean {near}? " if near else ""
            raise Fault(f"{place} is not in {among} ({short(name)})", f"{remedy}Mend the row, or drop it.")
        if kind != "picture":
            raise Fault(
                f"{place} is a {kind} within {found.archive.name}", "Unpack it, and set media_dir to the folder."
            )
        return found

    def _within(self, name: str) -> Zipped | None:
        key = _hash(name)
        for archive, table in zip(self.archives, self._tables, strict=True):
            at = int(np.searchsorted(table[0], key))
            if at < table.shape[1] and table[0, at] == key:
                begin, packed, size, crc, deflated = table[1:, at].tolist()
                return Zipped(archive, name, begin, packed, size, crc, bool(deflated))
        return None

    @cached_property
    def _tables(self) -> list[np.ndarray]:
        return [_table(archive) for archive in self.archives]

    def refuse(self) -> None:
        """Raise DataError for an archive that may not be read, or files of one name that differ between two."""
        tables = np.concatenate(self._tables, axis=1)
        of = np.repeat(np.arange(len(self.archives)), [table.shape[1] for table in self._tables])
        order = tables[0].argsort(kind="stable")
        first, second = order[:-1], order[1:]
        same = tables[0, first] == tables[0, second]
        other = (tables[3:5, first] != tables[3:5, second]).any(0)  # their size or CRC
        for one, two in zip(first[same & other].tolist(), second[same & other].tolist(), strict=True):
            names = [self.archives[of[at]].name for at in (one, two)]
            raise DataError(
                f"{self.archives[of[one]]}: a file in it has the name of another file in {names[1]}\n"
                "  Rename one of the two, with the rows that name it."
            )


def open_zips(archives: Iterable[Path]) -> MediaZips:
    """The pictures within archives, once each was looked at. Raises DataError for what archives.unpack refuses."""
    found = MediaZips(archives=tuple(archives))
    found.refuse()
    return found


def _table(archive: Path) -> np.ndarray:
    """Where the files of an archive lie, from the cache where it was found out before. Raises DataError."""
    with told(archive):
        file = cache_dir() / "zips" / f"{fingerprint(archive)}.npy"
        try:
            return np.asarray(np.load(file, mmap_mode="r"))
        except (OSError, EOFError, ValueError):  # none yet, or cut short: it is made anew
            pass
        found = list(members(archive))
        refuse_harmful(archive, found)
        infos = [member.info for member in found if not member.folder]
        rows = [
            (_hash(i.filename), i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type) for i in infos
        ]
        table = np.array(rows, dtype=np.uint64).reshape(-1, 6)
        table[:, 5] = table[:, 5] == zipfile.ZIP_DEFLATED
        table = np.ascontiguousarray(table[table[:, 0].argsort()].T)
        content = io.BytesIO()
        np.save(content, table)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content.getvalue(), synced=False)
    return table


def _hash(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "little"))


def _spellings(name: str) -> list[str]:
    """The name with other suffixes, of which upstream took any."""
    stem = name.rpartition(".")[0] or name
    return [stem + suffix for suffix in SUFFIXES]
