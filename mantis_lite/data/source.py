"""Where rows come from: JSON and Parquet files, dataset folders, what was downloaded of the Hub, and the Hub."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, SampleError
from ..recipe import SourceRecipe, Task
from .archives import SUFFIXES as ARCHIVES
from .archives import unpack
from .columns import Fault
from .counting import list_counts, plain_count
from .lines import Lines
from .paths import MediaFolder
from .sample import Sample
from .schema import parse
from .subsets import Subset, archives_of, config_and_split, refuse_absent, subset_of
from .zips import open_zips

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SPLITS = {"train", "val", "validation", "valid", "dev", "test", "eval"}
SHUFFLE_SEED = 42  # upstream's


class Rows:
    """The kept rows of one source, read one at a time.

    `selected` (N,) holds their positions in the source, whose rows' `numbers` are told to users; `dropped` counts the
    rows each setting left out; `task` is how they are read, and `spec` what they were opened by.
    """

    task: Task = "chat"
    spec: SourceRecipe

    def __init__(
        self,
        name: str,
        root: Path | None,
        records: Any,
        decode: Any = None,
        numbers: Any = None,
        counts: Callable[[], np.ndarray] | None = None,
    ) -> None:
        if not len(records):
            raise _fault(name, "there are no rows in it", "Give a source with rows.")
        self.name, self.media = name, MediaFolder(root)
        self.selected = np.arange(len(records))
        self.dropped: dict[str, int] = {}
        self._records, self._decode, self._counts = records, decode, counts
        self.numbers = self.selected + 1 if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.selected)

    @property
    def lines(self) -> Lines | None:
        """The file's lines, where it has any."""
        return self._records if isinstance(self._records, Lines) else None

    def where(self, i: int) -> str:
        """The row's place in the source, as "train.jsonl:12": a line of JSON Lines, else a row, from 1."""
        return f"{self.name}:{self.numbers[self.selected[i]]}"

    def row(self, i: int) -> dict[str, Any]:
        """The row as it was written; raises SampleError for one that is not a JSON object."""
        try:
            row = self._records[int(self.selected[i])]
        except Fault as fault:
            raise SampleError(self.where(i), fault.found, fault.remedy) from None
        row = row if self._decode is None else self._decode(row)
        if not isinstance(row, dict):
            found = f"the row is a {type(row).__name__}, not an object"
            raise SampleError(self.where(i), found, 'Give {"images": [...], "messages": [...]}.')
        return row

    def sample(self, i: int) -> Sample:
        """The row, read. Raises SampleError."""
        return parse(self.row(i), self.where(i), self.media, self.task)

    def select(self, spec: SourceRecipe) -> Rows:
        """Keep the rows that the settings ask for, in order; raises DataError when none is left."""
        if spec.shuffle:
            self.selected = np.random.default_rng(SHUFFLE_SEED).permutation(len(self))
        if spec.max_num_images is not None or spec.vl_only:
            pictures = self._pictures()
            crowded = pictures > (spec.max_num_images or np.inf)
            self._drop({"max_num_images": crowded, "vl_only": (pictures == 0) & spec.vl_only})
        if spec.max_size is not None:
            self._drop({"max_size": np.arange(len(self)) >= spec.max_size})
        if not len(self):
            left_out = ", ".join(f"{count:,} by {setting}" for setting, count in self.dropped.items())
            raise _fault(self.name, "no row is left", f"Left out were {left_out}: change that.")
        return self

    def _pictures(self) -> np.ndarray:
        """How many pictures and clips each row has; -1 of a bad one, which is kept, so that who reads it says why."""
        if self.task == "chat" and self._counts is not None:
            return self._counts()[self.selected]
        return np.array([self._pictures_of(i) for i in range(len(self))])

    def _pictures_of(self, i: int) -> int:
        try:
            if self.task == "chat" and (count := plain_count(self.row(i))) is not None:
                return count
            sample = self.sample(i)
            return len(sample.images) + len(sample.videos)
        except SampleError:
            return -1

    def _drop(self, rows: dict[str, np.ndarray]) -> None:
        self.selected = self.selected[~np.any(list(rows.values()), axis=0)]
        self.dropped |= {setting: int(dropped.sum()) for setting, dropped in rows.items() if dropped.any()}


def open_source(spec: SourceRecipe, task: Task = "chat", outside: bool = False, urls: bool = False) -> Rows:
    """Open what `spec.path` names for a task and keep the rows its settings ask for; raises DataError.

    A file (.json or .jsonl, with .gz or without; .parquet), a folder of Parquet, a folder of
    `Dataset.save_to_disk`, a subset of a dataset that was downloaded, or user/name[:config][:split] on the Hub. What
    rows name lies in its folder, its .zip files or `media_dir`, but for `outside` and `urls` of the recipe's data.
    """
    return open_whole(spec, task, outside, urls).select(spec)


def open_whole(spec: SourceRecipe, task: Task, outside: bool, urls: bool, lines: Lines | None = None) -> Rows:
    """As `open_source`, with all rows; `lines` are a file's that were found before."""
    path = Path(spec.path)
    if lines is not None:
        rows = Rows(path.name, path.parent, lines, numbers=lines.numbers)
    elif (subset := subset_of(spec)) is not None:
        rows = _open_subset(subset, spec)
    elif path.is_dir():
        rows = _open_folder(path, spec)
    else:
        rows = _open_file(path, spec) if path.is_file() else _open_hub(spec)
    rows.task, rows.spec = task, spec
    if spec.media_dir is not None:
        rows.media = MediaFolder(_media_dir(Path(spec.media_dir)))
    rows.media = replace(rows.media, outside=outside, urls=urls)
    return rows


def _media_dir(path: Path) -> Path:
    """A folder, or that of an archive, unpacked."""
    if path.is_dir():
        return path
    if path.is_file() and path.name.endswith(ARCHIVES):
        return unpack(path)
    found = "no such folder" if not path.exists() else "neither a folder nor an archive"
    raise _fault(path, f"media_dir is {found}", f"Name the folder of the files, or a {' or '.join(ARCHIVES)} of it.")


def _refuse(spec: SourceRecipe, *settings: str) -> None:
    for setting in settings:
        if (value := getattr(spec, setting)) is not None:
            raise _fault(spec.path, f"{setting}={value} has no effect on it", f"Remove {setting}.")


def _open_file(path: Path, spec: SourceRecipe) -> Rows:
    _refuse(spec, "name", "split", "revision")
    if path.name.endswith(".parquet"):
        return _arrow(path.name, path.parent, _read_parquet([path]))
    if path.name.endswith(SUFFIXES):
        return _open_lines(path)
    raise _fault(path, "not a kind of file that holds rows", f"Those are: {', '.join(SUFFIXES)}.")


def _open_lines(path: Path) -> Rows:
    try:
        lines = Lines(path)
    except Fault as fault:
        raise _fault(path, fault.found, fault.remedy) from None
    return Rows(path.name, path.parent, lines, numbers=lines.numbers)


def _open_folder(path: Path, spec: SourceRecipe) -> Rows:
    _refuse(spec, "name", "revision")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _open_saved(path, spec)
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise _fault(path, "a folder without .parquet files or a saved dataset", "Name the file or folder.")
    names = [re.split(r"[-._]", file.name)[0] for file in files]
    if spec.split or SPLITS & set(names):
        splits = {name: [file for file, of in zip(files, names, strict=True) if of == name] for name in names}
        files = _split(spec, splits)
    return _arrow(path.name, path, _read_parquet(files))


def _open_subset(subset: Subset, spec: SourceRecipe) -> Rows:
    refuse_absent([spec])
    held = subset.held
    assert held is not None
    if spec.revision not in (None, "main", held.revision):
        found = f"revision={spec.revision} is not {held.revision}, of which the subsets in {held.folder} are"
        raise _fault(spec.path, found, "Remove revision, or download that revision to another folder.")
    if subset.name is None:
        raise _fault(spec.path, "a dataset of subsets", f"Set name to one of: {', '.join(held.splits)}.")
    files = [held.folder / name for name in held.files_of(subset.name, subset.split)]
    rows = _arrow(
        f"{held.repo}:{subset.name}:{subset.split}",
        held.folder / subset.name,
        _read_parquet([file for file in files if file.suffix == ".parquet"]),
    )
    if archives := archives_of(held, subset.name, subset.split):
        rows.media = open_zips(archives)
    return rows


def _open_saved(path: Path, spec: SourceRecipe) -> Rows:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise _fault(path, f"cannot be read: {_line(error)}", "Save it again.") from None
    if isinstance(found, DatasetDict):
        return _arrow(f"{path.name}:{spec.split or 'train'}", path, _split(spec, found))
    _refuse(spec, "split")
    return _arrow(path.name, path, found)


def _split(spec: SourceRecipe, splits: dict[str, Any]) -> Any:
    split = spec.split or "train"
    if split not in splits:
        raise _fault(spec.path, f"no split {split}", f"Set split to one of: {', '.join(sorted(splits))}.")
    return splits[split]


def _read_parquet(files: list[Path]) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset("parquet", data_files=[glob.escape(str(file)) for file in files], split="train")
    except (DatasetGenerationError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise _fault(files[0], f"not Parquet of one layout: {_line(error)}", "Write it again.") from None


def _arrow(name: str, root: Path | None, dataset: Any) -> Rows:
    from datasets import ClassLabel

    classes = {column: kind for column, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
    # Arrow's own view of a row: the table stays memory-mapped, and pictures stay the bytes of their files.
    rows = dataset.with_format("arrow")
    return Rows(name, root, rows, partial(_first, classes), counts=list_counts(rows))


def _first(classes: Mapping[str, Any], table: Any) -> dict[str, Any]:
    """The only row of a table, its classes by name."""
    row = table.to_pylist()[0]
    return row | {column: kind.int2str(row[column]) for column, kind in classes.items() if row[column] is not None}


def _open_hub(spec: SourceRecipe) -> Rows:
    repo, config, split = _hub_name(spec)
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = load_dataset(repo, config, split=split, revision=spec.revision)
    except FileNotFoundError as error:
        raise _fault(spec.path, f"no such file or dataset: {_line(error)}", "Check its name and revision.") from None
    except (ConnectionError, HfHubHTTPError) as error:
        raise _fault(spec.path, f"no answer from the Hub: {_line(error)}", "Try again later.") from None
    except (DatasetGenerationError, ValueError) as error:  # its words list the configs or splits there are
        raise _fault(spec.path, _line(error), "Name both as user/name:config:split.") from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        remedy = "datasets>=4 runs none: name a revision with Parquet files, often refs/convert/parquet."
        raise _fault(spec.path, "the dataset is a script", remedy) from None
    return _arrow(f"{repo}:{dataset.info.config_name}:{split}", None, dataset)


def _hub_name(spec: SourceRecipe) -> tuple[str, str | None, str]:
    """user/name[:config][:split], completed by the settings; a path that cannot be one is a missing file."""
    near = _nearest(Path(spec.path))
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::([^:/]+))?(?::([^:/]+))?", spec.path)
    if hub is None or near or spec.path.endswith(SUFFIXES):
        remedy = f"Did you mean {near}?" if near else "A dataset on the Hub is user/name[:config][:split]."
        raise _fault(spec.path, "no such file or folder", remedy)
    repo, config, split = hub.groups()
    return repo, *config_and_split(spec, config, split)


def _nearest(path: Path) -> Path | None:
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*")], 1, 0.75)
    return path.with_name(near[0]) if near else None


def _fault(source: str | Path, found: str, remedy: str) -> DataError:
    return DataError(f"{source}: {found}\n  {remedy}")


def _line(error: BaseException) -> str:
    return " ".join(f"{error} {error.__cause__ or ''}".split())
