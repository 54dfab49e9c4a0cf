"""The pictures behind results, read again from where their questions came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL.Image import Image as Picture

from ..chat import FRAMES
from ..data.frames import Frames
from ..data.mixture import sources_of_all
from ..data.sample import Sample
from ..data.source import open_source
from ..recipe import DataRecipe, MediaRecipe
from .benchmarks import find
from .question import Result


def pictures_of(summary: Mapping[str, Any]) -> Callable[[Result], list[Picture]]:
    """What opens the pictures of a result, by the summary of the results it is of. Raises DataError, SampleError."""
    samples = _own(summary) if "data" in summary else _asked(summary)
    frames = Frames(MediaRecipe(num_frames=FRAMES))

    def opened(result: Result) -> list[Picture]:
        return frames.open(frames.lay_out(samples(result.id)))

    return opened


def _asked(summary: Mapping[str, Any]) -> Callable[[str], Sample]:
    questions = find(summary["benchmark"]).read(summary["rows"], summary["protocol"])
    samples = {question.id: question.sample for question in questions}
    return samples.__getitem__


def _own(summary: Mapping[str, Any]) -> Callable[[str], Sample]:
    data = DataRecipe.model_validate(summary["data"])
    sources = sources_of_all(data, summary["task"])
    opened = [open_source(source, summary["task"], data.outside, data.urls) for source in sources]
    places = {rows.where(at): (rows, at) for rows in opened for at in range(len(rows))}

    def sample(name: str) -> Sample:
        rows, at = places[name.partition("#")[0]]
        return rows.sample(at)

    return sample
