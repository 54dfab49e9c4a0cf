"""A language model and a vision tower -> a LLaVA of Mantis' published layout, with a projector that knows nothing yet.

Mantis' first stage starts from one (Jiang et al. 2024, https://arxiv.org/abs/2405.01483), as LLaVA's does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from ..data.lengths import cache_dir
from ..errors import DiskError, one_line
from ..files import made_once
from ..recipe import ModelRecipe
from .checkpoint import Checkpoint, open_checkpoint
from .halves import Half, open_half, small_files, write_small_files

FORMAT = 1
"""Of what is put together: another is made anew."""


@dataclass(frozen=True)
class Assembled(Checkpoint):
    """A checkpoint that is put together; `with_weights` (`joining.py`) gives it a folder with more than small files."""

    llm: Half
    tower: Half

    @property
    def public_name(self) -> str:
        return f"{self.llm.public_name} + {self.tower.public_name}"

    @property
    def public_model(self) -> dict[str, str | None]:
        return {"name": "", "revision": None, "llm": self.llm.public, "vision": self.tower.public}


def open_model(model: ModelRecipe) -> Checkpoint:
    """Read a checkpoint's small files, or write those of one that is put together. Raises RecipeError."""
    if model.llm is None or model.vision is None:
        return open_checkpoint(model)
    llm, tower = open_half("llm", model.llm), open_half("vision", model.vision)
    contents = [(file.name, file.read_bytes()) for half in (llm, tower) for file in small_files(half)]
    key = sha256(repr((FORMAT, llm.public_name, contents)).encode()).hexdigest()[:32]
    folder = made(cache_dir() / "assembled" / key, partial(write_small_files, llm, tower))
    return Assembled(**vars(open_checkpoint(ModelRecipe(name=str(folder)))), llm=llm, tower=tower)


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made where it is not there: of several processes one does. Raises DiskError."""
    try:
        return made_once(folder, make)
    except OSError as error:
        raise DiskError(
            f"model: {folder} could not be written: {one_line(error)}\n"
            "  Make room there, or set MANTIS_LITE_CACHE to a folder on another disk."
        ) from error
