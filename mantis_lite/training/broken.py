"""Rows whose header was sound and whose pictures or clips are not, as a run comes to decode them."""

from __future__ import annotations

import fcntl
import json

from ..data.prepare import Prepared, may_be_skipped, write_rejects
from ..errors import SampleError
from ..recipe import Recipe

REJECTS = "rejects.jsonl"
"""The rows that a run leaves out."""


class Broken:
    """Told of a picture that breaks when decoded: an error, or counted in rejects.jsonl up to 1% of the rows or one."""

    def __init__(self, recipe: Recipe, prepared: Prepared) -> None:
        self.skip = recipe.data.on_bad_row == "skip"
        self.path = recipe.run_dir / REJECTS
        self.allowed = may_be_skipped(prepared.rows_read)

    def __call__(self, error: SampleError) -> None:
        if not self.skip:
            raise error
        with self.path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # workers are told of rows side by side, and of the same one
            file.seek(0)
            known = {json.loads(line)["where"] for line in file}
            if error.where in known:
                return
            write_rejects([error], self.path)
        if len(known) + 1 > self.allowed:
            # Not a DataError: in a DataLoader worker only an error of one row keeps its words.
            found = f"one of more than {self.allowed} rows that cannot be trained on, see {self.path}"
            raise SampleError(error.where, found, f"The last: {error.found}. {error.remedy}", error.sample_id)
