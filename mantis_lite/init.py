"""A first recipe for a user's data and card: the data is looked at, and what was found and chosen is written down."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data.frames import Frames
from .data.labels import read_labels
from .data.media import size
from .data.sample import Sample
from .data.schema import TURNS
from .data.source import Rows, open_source
from .errors import RecipeError, SampleError, did_you_mean
from .memory.card import card_at_hand, card_of
from .memory.choose import choose
from .memory.estimate import GIB
from .memory.overrides import taken
from .recipe import MediaRecipe, Problem, Recipe, SourceRecipe, Task
from .recipe_file import find_recipe
from .report.fit import read, work_of
from .yaml_text import dump_yaml

Ask = Callable[[str, str | None], str]
"""Puts a question, with the answer that is taken where nothing is typed, and returns what was."""

LOOKED_AT = 200
"""Rows that are read, spread evenly; `check` reads all."""

START: dict[Task, tuple[str, ...]] = {
    "chat": ("chat-siglip-llama3-lora", "chat-siglip-llama3-qlora"),
    "video": ("video-idefics2-lora", "video-idefics2-qlora"),
    "classify": ("classify-idefics2-lora", "classify-idefics2-qlora"),
    "pretrain": ("pretrain-siglip-llama3",),
}
"""What a task's recipe starts from: the first that fits the card, else the last with what memory.fit picks."""

PROBLEMS: dict[Problem, str] = {
    "single_label": "one class a row",
    "multi_label": "several classes a row, or none",
    "regression": "numbers",
}
"""What may be scored, the narrowest first, in words."""

METHODS = {
    "lora": "adapters on 16-bit weights, as there is room for them",
    "qlora": "adapters on 4-bit weights: the card has no room for them in 16",
    "full": "all weights of the parts that train",
}
"""Why a method was taken, in words."""

FEW_STEPS = 20
"""An epoch of fewer teaches little: the warm-up and what an optimizer has to settle take as many."""


@dataclass(frozen=True)
class Looked:
    """What was seen of a source: of how many `rows`, those that were `read` as a task's, and what is wrong with others.

    `pictures` is the least and the most of pictures and clips in a row.
    """

    rows: int
    read: list[Sample]
    faults: list[SampleError]

    @property
    def pictures(self) -> tuple[int, int]:
        counts = [len(sample.images) + len(sample.videos) for sample in self.read]
        return min(counts), max(counts)


@dataclass(frozen=True)
class Draft:
    """A recipe's text, and what its user should know of it."""

    text: str
    notices: list[str]


def guess_task(data: str) -> Task:
    """The task that the rows are written for: "classify" without turns, "video" with clips, else "chat".

    Captions for "pretrain" look as chat does, so that is never guessed. Raises RecipeError where rows differ, and
    DataError.
    """
    rows = open_source(SourceRecipe(path=data))
    places = _spread(len(rows))
    found = Counter(task for at in places if (task := _task_of(rows, at)))
    if len(found) != 1:
        told = ", ".join(f"{count:,} are as of {task}" for task, count in found.most_common())
        raise RecipeError(
            f"task: cannot be guessed from {data}: of {len(places):,} rows, {told or 'none has the keys of a task'}\n"
            '  Name it: --task. Rows of chat and video have "messages", and those of classify "prompt" and "labels".'
        )
    return next(iter(found))


def answers(data: str | None, task: str | None, card: float | None, ask: Ask | None) -> tuple[str, Task, float]:
    """The data, the task and the card's GiB: as given, else as `ask`ed, with what was guessed; without that, guessed.

    Raises RecipeError for what can neither be guessed nor understood, and errors of the data.
    """
    data = data or (ask and ask("Data: a file or folder of rows, or user/name on the hub", None))
    if not data:
        raise RecipeError("init: no data was given\n  Name it: mantis-lite init my.jsonl --yes")
    if task is None:
        guessed = guess_task(data)
        task = ask(f"Task: {', '.join(START)}", guessed) if ask else guessed
    if task not in START:
        raise RecipeError(f"task: expected one of {', '.join(START)}, found {task}{did_you_mean(task, START)}")
    if card is None:
        here = card_at_hand()
        said = ask("Card: its memory in GiB, as 12 or 24", f"{here.gib:g}" if here else None) if ask else None
        card = _gib(said) if said else here.gib if here else None
    if card is None:
        raise RecipeError("card: there is no GPU here to look at\n  Say what the one to train on has: --gpu 24")
    return data, task, card


def _gib(said: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB)?", said.strip())
    if not found or float(found[1]) < 1:
        raise RecipeError(f"card: expected its memory in GiB, found {said}\n  Write a number, as 24.")
    return float(found[1])


def draft(data: str, task: Task, card: float) -> Draft:
    """A recipe for a data source, a task and a card of so many GiB, with comments that say why.

    Its settings are those of a recipe that comes with the package. Raises DataError for a source that cannot be read,
    SampleError where no row that was looked at can be trained on, and RecipeError where nothing fits the card.
    """
    looked = look(data, task)
    problem, unsure = problem_of(looked.read) if task == "classify" else (None, None)
    name, memory = _fitting(task, card)
    doubts = [unsure] if unsure else []
    text = "\n".join([*_header(looked, name, [memory, *doubts]), *_keys(name, data, problem)]) + "\n"
    return Draft(text, [memory, *doubts, *_notices(looked, read(name, ()))])


def look(data: str, task: Task) -> Looked:
    """Read some rows, spread over the source, as a task's, and the headers of their pictures and clips.

    Raises DataError, and SampleError where no row can be read.
    """
    rows = open_source(SourceRecipe(path=data), task)
    frames = Frames(MediaRecipe(num_frames=1))
    read, faults = [], []
    for at in _spread(len(rows)):
        try:
            sample = rows.sample(at)
            for image in frames.lay_out(sample).images:
                size(image, sample)
            read.append(sample)
        except SampleError as error:
            faults.append(error)
    frames.clips.close()
    if not read:
        raise faults[0]
    return Looked(len(rows), read, faults)


def problem_of(samples: list[Sample]) -> tuple[Problem, str | None]:
    """What rows of "classify" are labelled with, and what is to be said where their labels may mean something else.

    Raises RecipeError where their labels are of several kinds, or there are none.
    """
    fitting = [problem for problem in PROBLEMS if all(_reads(sample, problem) for sample in samples)]
    if not fitting:
        raise RecipeError(
            "head.problem: cannot be guessed: there are rows without labels, or with labels of another kind\n"
            '  Give all of them one kind: a number, a class ("cat"), or a list of the labels that hold.'
        )
    if "regression" not in fitting or len(fitting) == 1:
        return fitting[0], None
    if all(isinstance(sample.labels, Mapping) for sample in samples):
        return fitting[0], f"labels are 0 or 1 by name, read as {fitting[0]}: set head.problem if they are scores"
    return "regression", "labels are whole numbers, read as scores: set head.problem=single_label if they are classes"


def require_new(file: Path) -> None:
    """Raise RecipeError where a recipe cannot be written: there is such a file, or it is not called .yaml."""
    if file.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{file}: a recipe's file ends in .yaml\n  Name it so, as {file.with_suffix('.yaml')}.")
    if file.exists():
        raise RecipeError(f"{file}: there is such a file already\n  Name another, or move it away.")


def write(text: str, file: Path) -> None:
    """Write a recipe to a new file. Raises RecipeError."""
    require_new(file)
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except OSError as error:
        raise RecipeError(f"{file}: cannot be written: {error.strerror}\n  Name another place.") from None


def _spread(rows: int) -> list[int]:
    """Positions of rows to look at, the first and the last among them."""
    return np.unique(np.linspace(0, rows - 1, LOOKED_AT).round().astype(int)).tolist()


def _task_of(rows: Rows, at: int) -> Task | None:
    """By the keys of a row alone: its pictures and clips may be missing yet."""
    try:
        row = rows.row(at)
    except SampleError:
        return None
    turns = next((row[key] for key in TURNS if row.get(key) is not None), None)
    if turns is None:
        return "classify" if any(row.get(key) is not None for key in ("prompt", "label", "labels")) else None
    clips = row.get("video") or row.get("videos") or any(_is_clip(part) for part in _parts(turns))
    return "video" if clips else "chat"


def _parts(turns: Any) -> Iterator[Any]:
    """The typed parts of turns that have any."""
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, Mapping) else None
        yield from content if isinstance(content, list) else ()


def _is_clip(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "video"


def _reads(sample: Sample, problem: Problem) -> bool:
    try:
        read_labels(sample, problem)
    except SampleError:
        return False
    return True


def _fitting(task: Task, card: float) -> tuple[str, str]:
    """The recipe to start from, and what is to be said of the memory its largest step takes."""
    at_hand = card_of(card)
    for name in START[task]:
        recipe = read(name, ())
        total = taken(work_of(recipe), recipe)[0].estimate.total
        if total <= at_hand.usable:
            return name, f"its largest step takes {total / GIB:.1f} GiB, by estimate, of {card:g}"
    choice = choose(work_of(recipe), recipe, at_hand)
    picked = " ".join(each.words for each in choice.picked)
    return name, f"as it is, a step takes {total / GIB:.1f} GiB; memory.fit makes it {choice.total / GIB:.1f}: {picked}"


def _header(looked: Looked, name: str, notes: list[str]) -> Iterator[str]:
    """What the recipe is, what its weights permit, and what was found, as comments."""
    said = [line for line in _lines(name) if line.startswith("#")]
    least, most = looked.pictures
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    seen = f"{len(looked.read):,} of {len(looked.read) + len(looked.faults):,} that were looked at are sound"
    yield said[0]
    yield f"# Made by `mantis-lite init`; its settings are those of {name}."
    yield f"# Data: {looked.rows:,} rows; {seen}. Pictures and clips in a row: {each}."
    yield from (f"# Note: {note}." for note in notes)
    yield from (line for line in said if line.startswith("# License"))


def _keys(name: str, data: str, problem: Problem | None) -> Iterator[str]:
    """The lines of a recipe without those that are comments alone, with the data and what else was found."""
    for line in _lines(name):
        if line.lstrip().startswith("#"):
            continue
        if line.startswith("task: "):
            yield dump_yaml({"data": data}).rstrip("\n")
        if problem is not None and line.startswith("  problem: "):
            line = f"  problem: {problem:<17}# {PROBLEMS[problem]}"
        if line.startswith("method: "):
            method = line.removeprefix("method: ")
            yield f"{line:<28}# {METHODS[method]}"
            yield "memory:"
            yield "  fit: auto                 # picks less costly settings where a step does not fit"
        else:
            yield line


def _lines(name: str) -> list[str]:
    return find_recipe(name).read_text(encoding="utf-8").splitlines()


def _notices(looked: Looked, recipe: Recipe) -> Iterator[str]:
    """What may have to be mended before a run."""
    if looked.faults:
        first = str(looked.faults[0]).replace("\n", "\n  ")
        yield f"{len(looked.faults):,} of the rows looked at cannot be trained on; the first:\n  {first}"
    per_step = recipe.train["samples_per_step"]
    if (steps := -(-looked.rows // per_step)) < FEW_STEPS:
        yield (
            f"an epoch of {looked.rows:,} rows is {steps} step{'s' if steps > 1 else ''} of {per_step}: "
            "lower train.samples_per_step, or raise train.num_train_epochs"
        )
    if recipe.task == "chat" and not looked.pictures[1]:
        yield "no row that was looked at has a picture"
