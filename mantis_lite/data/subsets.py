"""Subsets of a dataset laid out as Mantis-Instruct: those that sources name, and those yet to be downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import DataError
from ..recipe import SourceRecipe
from .repository import NAME, RENAMED, SHORT, Repository, place_of, read_repository


@dataclass(frozen=True)
class Subset:
    """One split of a subset `name` of the dataset `repo`, or of all its subsets; it is or would be in `folder`."""

    repo: str
    folder: Path
    name: str | None
    split: str

    @cached_property
    def held(self) -> Repository | None:
        """What its folder holds, if anything. Raises DataError."""
        return read_repository(self.folder)

    @property
    def absent(self) -> bool:
        """Whether it has not, or not all, been downloaded. Raises DataError where the dataset has no such subset."""
        held = self.held
        return held is None or not (held.has(self.name, self.split) if self.name else self.whole)

    @property
    def whole(self) -> list[str]:
        """The subsets of which this split is here."""
        held = self.held
        return [name for name in held.subsets_with(self.split) if held.has(name, self.split)] if held else []


@dataclass
class Absent:
    """What is to be downloaded of a dataset, each of `subsets` or, without any, all."""

    repo: str
    folder: Path
    subsets: list[str]
    splits: list[str]

    @property
    def command(self) -> str:
        words = ["mantis-lite data download", {full: short for short, full in SHORT.items()}.get(self.repo, self.repo)]
        words += [f"--subsets {','.join(self.subsets)}"] if self.subsets else []
        words += [f"--split {','.join(self.splits)}"] if self.splits != ["train"] else []
        place = place_of(self.repo)
        words += [f"--to {self.folder}"] if self.folder not in (place, place.resolve()) else []
        return " ".join(words)


def subset_of(source: SourceRecipe) -> Subset | None:
    """What a source names of a dataset that is known here or was downloaded; None where it names something else.

    Raises DataError.
    """
    path = Path(source.path)
    if path.exists():
        held = read_repository(path)
        return Subset(held.repo, path, source.name, source.split or "train") if held else None
    repo, *more = source.path.split(":")
    repo = SHORT.get(repo, repo)
    folder = place_of(repo)
    if len(more) > 2 or (repo not in RENAMED and not (folder / NAME).is_file()):
        return None
    return Subset(repo, folder, *config_and_split(source, *more))


def config_and_split(
    source: SourceRecipe, config: str | None = None, split: str | None = None
) -> tuple[str | None, str]:
    """What is behind the colons of user/name[:config][:split], completed by the source's keys. Raises DataError."""
    if (config and source.name not in (None, config)) or (split and source.split not in (None, split)):
        found = f"name={source.name}, split={source.split} differ from it"
        raise DataError(f"{source.path}: {found}\n  Write each once.")
    return config or source.name, split or source.split or "train"


def absent_of(sources: Iterable[SourceRecipe]) -> list[Absent]:
    """What of the sources has yet to be downloaded, a dataset each. Raises DataError."""
    found: dict[Path, Absent] = {}
    for source in sources:
        subset = subset_of(source)
        if subset is None or not subset.absent:
            continue
        of = found.setdefault(subset.folder, Absent(subset.repo, subset.folder, [], []))
        of.subsets += [subset.name] if subset.name and subset.name not in of.subsets else []
        of.splits += [subset.split] if subset.split not in of.splits else []
    return list(found.values())


def refuse_absent(sources: Iterable[SourceRecipe]) -> None:
    """Raise DataError, with the command that downloads it, for what is not here."""
    for absent in absent_of(sources):
        what = ", ".join(absent.subsets) or "all of it"
        held = read_repository(absent.folder)
        where = f"not all of it is in {absent.folder}" if held else f"it is not in {absent.folder}"
        raise DataError(f"{absent.repo}: {where}: {what}\n  Download it: {absent.command}")


def archives_of(held: Repository, name: str, split: str) -> list[Path]:
    """The .zip files with the pictures of a split. Raises DataError where one that is listed is not there."""
    folder = held.folder / name
    names = [of.rpartition("/")[2] for of in held.files_of(name, split)]
    zips = [of for of in names if of.endswith(".zip")]
    for listing in (of for of in names if of.endswith(".txt")):
        listed = (folder / listing).read_text(errors="replace").split()
        if missing := [of for of in listed if of not in zips]:
            raise DataError(
                f"{folder / listing}: names {missing[0]}, which is not in the repository at {held.revision[:12]}\n"
                "  Download another --revision to another folder, or ask the dataset's owner."
            )
    return [folder / of for of in zips]
