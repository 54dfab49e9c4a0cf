"""A file within a .zip, read where it lies: nothing is unpacked."""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

HEADER = struct.Struct("<4s22x2H")
"""What stands before a file in a .zip: its mark, and the lengths of its name and of what else is said of it."""


@dataclass(frozen=True, slots=True)
class Zipped:
    """A file called `name` in an archive: `at`, where its header begins; `packed` and `size`, its bytes there and read.

    `crc` is the CRC-32 of its bytes; they are `deflated`, or as they are.
    """

    archive: Path
    name: str
    at: int
    packed: int
    size: int
    crc: int
    deflated: bool

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    @property
    def here(self) -> bytes:
        """What it is known by on this machine: its own bytes, and not where the archive lies."""
        return os.fsencode(f"{self.name}\0{self.size}\0{self.crc:08x}")

    @property
    def anywhere(self) -> bytes:
        """What it is known by wherever it lies, in an archive or unpacked."""
        return os.fsencode(f"{Path(self.name).name}\0{self.size}")

    def open(self) -> IO[bytes]:
        """Its bytes, unpacked as they are read. Raises OSError; reading also BadZipFile, zlib.error and EOFError."""
        file = self.archive.open("rb")
        try:
            file.seek(self.at)
            mark, *lengths = HEADER.unpack(file.read(HEADER.size))
            if mark != b"PK\3\4":
                raise OSError(f"{self.archive.name} has changed, and no file begins where {self.name} did")
            file.seek(sum(lengths), os.SEEK_CUR)
        except (OSError, struct.error) as error:
            file.close()
            raise error if isinstance(error, OSError) else OSError(f"{self.archive.name} is cut short") from None
        info = zipfile.ZipInfo(self.name)
        info.compress_type = zipfile.ZIP_DEFLATED if self.deflated else zipfile.ZIP_STORED
        info.compress_size, info.file_size, info.CRC = self.packed, self.size, self.crc
        return cast(IO[bytes], zipfile.ZipExtFile(file, "r", info, None, True))
