"""Where rows come from: JSON and Parquet files, dataset folders, the Hub; and Mantis' data_config.yaml."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml.error import YAMLError

from ..errors import DataError, SampleError
from ..recipe import SourceRecipe, Task
from ..secrets import refuse_secrets
from ..yaml_text import load_yaml, read_text
from .archives import SUFFIXES as ARCHIVES
from .archives import unpack
from .columns import Fault
from .lines import Lines
from .paths import MediaFolder
from .sample import Sample
from .schema import parse

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
SPLITS = {"train", "val", "validation", "valid", "dev", "test", "eval"}
SHUFFLE_SEED = 42  # upstream's

# The keys of a data_config.yaml: those a source has too, those read here, and those that are set elsewhere.
SAME = ("path", "name", "split", "revision", "weight", "max_size", "shuffle", "max_num_images", "media_dir", "vl_only")
READ = (*SAME, "format", "type", "video_dir")
ELSEWHERE = {
    "max_seq_len": "set packing.max_length",
    "max_image_size": "set media.max_image_size",
    "sample_ratio": "set weight",
    "packing_same_mm_media": "remove it: packs are planned by length",
    "offline_sha": "remove it: datasets finds its cache without",
    **dict.fromkeys(("max_num_frames", "num_frames"), "set media.num_frames, and remove it"),
    "fps": "set media.fps and media.max_frames, and remove it",
    "sampling": "set media.sampling, and remove it",
}
TASKS = {"chat": "chat", "chat_video": "video", "classification": "classify", "qwen2_video_classification": "classify"}


class Rows:
    """The kept rows of one source, read one at a time.

    `selected` (N,) holds their positions in the source; `dropped` counts the rows each setting left out; `task` is how
    they are read.
    """

    task: Task = "chat"
    spec: SourceRecipe

    def __init__(self, name: str, root: Path | None, records: Any, decode: Any = None, numbers: Any = None) -> None:
        if not len(records):
            raise _fault(name, "there are no rows in it", "Give a source with rows.")
        self.name, self.media = name, MediaFolder(root)
        self.selected = np.arange(len(records))
        self.dropped: dict[str, int] = {}
        self._records, self._decode = records, decode
        self._numbers = self.selected + 1 if numbers is None else np.array(numbers)

    def __len__(self) -> int:
        return len(self.selected)

    def where(self, i: int) -> str:
        """The row's place in the source, as "train.jsonl:12": a line of JSON Lines, else a row, from 1."""
        return f"{self.name}:{self._numbers[self.selected[i]]}"

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
            pictures = np.array([self._pictures(i) for i in range(len(self))])
            crowded = pictures > (spec.max_num_images or np.inf)
            self._drop({"max_num_images": crowded, "vl_only": (pictures == 0) & spec.vl_only})
        if spec.max_size is not None:
            self._drop({"max_size": np.arange(len(self)) >= spec.max_size})
        if not len(self):
            left_out = ", ".join(f"{count:,} by {setting}" for setting, count in self.dropped.items())
            raise _fault(self.name, "no row is left", f"Left out were {left_out}: change that.")
        return self

    def _pictures(self, i: int) -> int:
        try:
            sample = self.sample(i)
            return len(sample.images) + len(sample.videos)
        except SampleError:
            return -1  # a bad row is kept, so that whoever reads it hears what is wrong

    def _drop(self, rows: dict[str, np.ndarray]) -> None:
        self.selected = self.selected[~np.any(list(rows.values()), axis=0)]
        self.dropped |= {setting: int(dropped.sum()) for setting, dropped in rows.items() if dropped.any()}


def open_source(spec: SourceRecipe, task: Task = "chat", outside: bool = False, urls: bool = False) -> Rows:
    """Open what `spec.path` names for a task and keep the rows its settings ask for; raises DataError.

    A file (.json or .jsonl, with .gz or without; .parquet), a folder of Parquet, a folder of
    `Dataset.save_to_disk`, or user/name[:config][:split] on the Hub. What rows name lies in its folder or `media_dir`,
    but for `outside` and `urls` of the recipe's data.
    """
    path = Path(spec.path)
    if path.is_dir():
        rows = _open_folder(path, spec)
    else:
        rows = _open_file(path, spec) if path.is_file() else _open_hub(spec)
    rows.task, rows.spec = task, spec
    folder = rows.media.folder if spec.media_dir is None else _media_dir(Path(spec.media_dir))
    rows.media = MediaFolder(folder, outside, urls)
    return rows.select(spec)


def _media_dir(path: Path) -> Path:
    """A folder, or that of an archive, unpacked."""
    if path.is_dir():
        return path
    if path.is_file() and path.name.endswith(ARCHIVES):
        return unpack(path)
    found = "no such folder" if not path.exists() else "neither a folder nor an archive"
    raise _fault(path, f"media_dir is {found}", f"Name the folder of the files, or a {' or '.join(ARCHIVES)} of it.")


def expand(path: str, task: Task = "chat") -> list[dict[str, Any]]:
    """The sources that a Mantis data_config.yaml lists for a task, as SourceRecipe's fields.

    Raises DataError, and RecipeError for a token in it.
    """
    try:
        text = read_text(Path(path))
        refuse_secrets(text, path)
        config = load_yaml(text)
    except (OSError, YAMLError) as error:
        raise _fault(path, f"cannot be read: {_line(error)}", "Give a data_config.yaml.") from None
    refuse_secrets(config, path)
    entries = config.get("data") if isinstance(config, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise _fault(path, "no list of sources", "Write them under `data:`, each with a path and format.")
    problems = [f"data[{at}].{problem}" for at, entry in enumerate(entries) for problem in _problems(entry, task)]
    if problems:
        raise DataError("\n".join(f"{path}: {problem}" for problem in problems))
    return [_settings(entry, Path(path).parent) for entry in entries]


def _problems(entry: dict[str, Any], task: Task) -> Iterator[str]:
    form, kind, split = entry.get("format"), entry.get("type", "huggingface"), entry.get("split")
    if TASKS.get(str(form)) != task:
        here = ", ".join(name for name, of in TASKS.items() if of == task)
        yield f"format: {form} belongs to task={TASKS.get(str(form), 'none')}; here is read {here}"
    if kind not in ("huggingface", "json", "jsonl"):
        yield f"type: {kind} is not known; write huggingface, json or jsonl"
    if split not in (None, "train"):
        yield f"split: {split} is not trained on; name it in data.eval"
    if not isinstance(entry.get("path"), str):
        yield "path: missing; write the file or the dataset on the Hub"
    if entry.get("revision") == "script":
        yield "revision: script is not read here, as datasets runs no scripts any more; remove it"
    for key, value in entry.items():
        if key in ELSEWHERE and value is not None and value is not False:
            yield f"{key}: {value} is not read here; {ELSEWHERE[key]}"
        elif key not in ELSEWHERE and key not in READ:
            near = difflib.get_close_matches(str(key), READ, 1)
            yield f"{key}: no such key; " + (f"did you mean {near[0]}?" if near else "remove it")


def _settings(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = {key: entry[key] for key in SAME if entry.get(key) is not None}
    if entry.get("video_dir") is not None:
        settings["media_dir"] = str(folder / entry["video_dir"])
    if entry.get("type", "huggingface") == "huggingface":
        return settings
    beside = folder / entry["path"]  # or else in the working directory, as upstream
    path = str(beside) if beside.exists() else entry["path"]
    return settings | {"path": path, "name": None, "split": None}  # both are only labels of a file


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
    return Rows(name, root, dataset.with_format("arrow"), partial(_first, classes))


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
    if (config and spec.name not in (None, config)) or (split and spec.split not in (None, split)):
        raise _fault(spec.path, f"name={spec.name}, split={spec.split} differ from it", "Write each once.")
    return repo, config or spec.name, split or spec.split or "train"


def _nearest(path: Path) -> Path | None:
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*")], 1, 0.75)
    return path.with_name(near[0]) if near else None


def _fault(source: str | Path, found: str, remedy: str) -> DataError:
    return DataError(f"{source}: {found}\n  {remedy}")


def _line(error: BaseException) -> str:
    return " ".join(f"{error} {error.__cause__ or ''}".split())
