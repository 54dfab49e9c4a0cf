"""Which frames of a clip the model sees, and what it is told of each: a Sample with clips -> one with pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

import numpy as np
from PIL.Image import Image as Picture

from ..errors import SampleError
from ..recipe import MediaRecipe
from . import media as pictures
from .clips import ClipError, Clips, Header
from .lengths import Measured
from .sample import Frame, Image, Sample, Turn, Video
from .turbo import Turbo, open_turbo
from .vision import Seen, Size


@dataclass(frozen=True)
class Frames:
    """Lays clips out as pictures by a recipe's media settings, from their headers alone, and decodes those pictures.

    `gap` stands between frames.
    """

    media: MediaRecipe = field(default_factory=MediaRecipe)
    gap: str = ""
    clips: Clips = field(default_factory=Clips)

    @property
    def facts(self) -> str:
        """Names everything that a sample's layout depends on, for the cache of lengths."""
        media = self.media.model_copy(update={"backend": "pil"})  # which makes no difference to lengths
        return repr((media, self.gap, pictures.RULES))

    def lay_out(self, sample: Sample) -> Sample:
        """The sample with each clip's frames in its place; as it is where it has no clip. Raises SampleError."""
        if not sample.videos:
            return sample
        turns = []
        for turn in sample.turns:
            content: list[str | Image | Video] = []
            for part in turn.content:
                content += self._frames(part, sample) if isinstance(part, Video) else [part]
            turns.append(Turn(turn.role, tuple(content)))
        return replace(sample, turns=tuple(turns))

    def notices(self, sample: Sample, length: Measured) -> Iterator[str]:
        """What is not taken of a sample's pictures and clips, and what of the recipe could not be had."""
        if length.cut:
            yield "a picture has more behind it, as an animation has: only the first was taken"
        if not sample.videos:
            return
        asked = self.media.num_frames or 0
        if self.media.sampling == "uniform" and length.images < len(sample.images) + len(sample.videos) * asked:
            yield "a clip has fewer frames than media.num_frames: all were taken"
        if self.media.fps and any(_are_pictures(video) for video in sample.videos):
            yield "frames that are pictures have no times: media.max_frames of them were taken, whatever media.fps is"
        if (self.media.start or self.media.end) and any(_are_pictures(video) for video in sample.videos):
            yield "frames that are pictures have no times: all were taken, whatever media.start and media.end are"

    def see(
        self,
        sample: Sample,
        max_size: int | None,
        enough: Callable[[Size], Size],
        images: Sequence[Image] | None = None,
    ) -> list[Seen]:
        """As `open`, by media.backend: of a picture there may be fewer pixels, but `enough` for one of its size."""
        if self.media.backend == "pil":
            return list(self.open(sample, max_size, images))
        images = sample.images if images is None else images
        frames = iter(self.open(sample, max_size, [image for image in images if isinstance(image, Frame)]))
        found: list[Seen] = []
        for image in images:
            if isinstance(image, Frame):
                frame = next(frames)
                found.append(Turbo(np.array(frame), frame.size))
            else:
                found.append(open_turbo(image, sample, max_size, enough))
        return found

    def open(self, sample: Sample, max_size: int | None = None, images: Sequence[Image] | None = None) -> list[Picture]:
        """The pixels of a laid out sample's pictures, in order: all, or its `images` that are asked for.

        A clip is decoded once. Raises SampleError.
        """
        images = sample.images if images is None else images
        wanted: defaultdict[Path, set[Frame]] = defaultdict(set)
        for image in images:
            if isinstance(image, Frame):
                assert isinstance(image.source, Path)
                wanted[image.source].add(image)
        decoded: dict[Image, Picture] = {}
        for path, frames in wanted.items():
            decoded |= self._decoded(path, sorted(frames, key=lambda frame: frame.at), sample)
        return [
            pictures.fit(decoded[image], max_size)
            if isinstance(image, Frame)
            else pictures.open_image(image, sample, max_size)
            for image in images
        ]

    def _frames(self, video: Video, sample: Sample) -> Iterator[str | Image]:
        """A clip's frames, each behind its label."""
        found: Sequence[tuple[Image, float | None]]
        if _are_pictures(video):
            found = [(image, None) for image in self._of_pictures(video, sample)]
        else:
            found = self._of_file(video, sample)
        for number, (frame, time) in enumerate(found, 1):
            if self.gap and number > 1:
                yield self.gap
            if self.media.frame_label:
                yield self._label(number, time, sample)
            yield frame

    def _label(self, number: int, time: float | None, sample: Sample) -> str:
        assert self.media.frame_label is not None
        try:
            return self.media.frame_label.format(number=number, **({} if time is None else {"time": time}))
        except KeyError:
            found = "media.frame_label tells times, and frames that are pictures have none"
            remedy = 'Set media.frame_label to "{number}", or leave it out.'
            raise SampleError(sample.where, found, remedy, sample.id) from None

    def _of_file(self, video: Video, sample: Sample) -> list[tuple[Image, float | None]]:
        """The frames of a clip's file, and their times in s."""
        assert isinstance(video.source, Path)
        if self._most is None:
            found = f"{video.source.name} is a clip, and the recipe does not say how many of its frames to take"
            raise SampleError(sample.where, found, "Set media.num_frames, or media.fps.", sample.id)
        upstream = self.media.sampling == "upstream"
        with _told(video.source, sample):
            header = self.clips.header(video.source, count=upstream)
            if odd := pictures.unfit(header.size):
                raise ClipError(odd)
        if upstream:
            if video.start is not None or video.end is not None:
                found = "a clip has a start or end, and media.sampling=upstream takes whole clips"
                raise SampleError(sample.where, found, "Set media.sampling=uniform.", sample.id)
            rate = header.frames / header.seconds
            indices = upstream_indices(header.frames, self._most, self.media.fps, rate)
            return [(Frame(video.source, at, header.size), at / rate) for at in indices]
        times = self._times(video, header, sample)
        return [(Frame(video.source, time, header.size), time) for time in times]

    @property
    def _most(self) -> int | None:
        return self.media.num_frames or self.media.max_frames

    def _times(self, video: Video, header: Header, sample: Sample) -> list[float]:
        """The middles of equal shares of the clip, or of its part between start and end."""
        start = self.media.start or 0.0 if video.start is None else video.start
        if start >= header.seconds:
            found = f"{video.source} lasts {header.seconds:.1f} s, and is to start at {start:g}"
            raise SampleError(sample.where, found, "Mend the start.", sample.id)
        if video.end is not None and video.end > header.seconds + 1:  # less is how a list of clips was rounded
            found = f"{video.source} lasts {header.seconds:.1f} s, and is to end at {video.end:g}"
            raise SampleError(sample.where, found, "Mend the end.", sample.id)
        end = min(header.seconds, (self.media.end or header.seconds) if video.end is None else video.end)
        if end <= start:
            found = f"a clip is to start at {start:g} s and to end at {end:g}"
            raise SampleError(sample.where, found, "Mend the start or the end, in the row or the recipe.", sample.id)
        span = end - start
        assert self._most is not None
        wanted = min(self._most, max(1, round(span * self.media.fps))) if self.media.fps else self._most
        count = min(wanted, max(1, round(header.frames * span / header.seconds)))
        return [start + (at + 0.5) * span / count for at in range(count)]

    def _of_pictures(self, video: Video, sample: Sample) -> list[Image]:
        """Those of a clip's own pictures that are taken: all, or as many as the recipe says, spread over all."""
        if video.start is not None or video.end is not None:
            found = f"{video.source} is a folder of frames, which have no times to start or end at"
            raise SampleError(sample.where, found, "Leave out the start and end.", sample.id)
        frames = video.source if isinstance(video.source, tuple) else _folder(video.source, sample)
        total, most = len(frames), self._most
        if most is None or total <= most:
            return list(frames)
        if self.media.sampling == "upstream":
            return [frames[int(at * total / most)] for at in range(most)]
        return [frames[int((at + 0.5) * total / most)] for at in range(most)]

    def _decoded(self, path: Path, frames: list[Frame], sample: Sample) -> dict[Image, Picture]:
        with _told(path, sample):
            if isinstance(frames[0].at, int):
                found = self.clips.at_indices(path, [int(frame.at) for frame in frames])
            else:
                found = self.clips.at_times(path, [frame.at for frame in frames])
        return dict(zip(frames, found, strict=True))


def _are_pictures(video: Video) -> bool:
    try:
        return isinstance(video.source, tuple) or video.source.is_dir()
    except OSError:  # a path that cannot be one: what is wrong with it is told when it is opened
        return False


def upstream_indices(total: int, most: int, fps: float | None, rate: float) -> list[int]:
    """The frames that the original Mantis takes of a clip's file: a whole stride, so fewer than `most` as a rule.

    With `fps` it takes the first `most` of those and so only the clip's beginning (TIGER-AI-Lab/Mantis, data.py).

    >>> len(upstream_indices(33, 32, None, 25)), upstream_indices(125, 4, 1, 25)
    (17, [0, 25, 50, 75])
    """
    if total <= most:
        return list(range(total))
    stride = ceil(round(rate / fps, 3)) if fps else ceil(total / most)
    return list(range(0, total, stride))[:most]


def _folder(folder: Path, sample: Sample) -> list[Image]:
    """The pictures of a folder, in the order of the number that ends each name, as upstream has them."""
    try:
        files = [file for file in folder.iterdir() if not file.name.startswith(".")]
        numbered = {int(file.stem.split("_")[-1]): file for file in files}
    except OSError as error:
        found = f"{folder} cannot be read: {error.strerror}"
        raise SampleError(sample.where, found, "Mend the folder, or drop the row.", sample.id) from None
    except ValueError as error:
        found = f"the files in {folder} are not numbered frames: {error}"
        raise SampleError(sample.where, found, "Name them 1.jpg or x_1.jpg, and so on.", sample.id) from None
    if not numbered:
        raise SampleError(sample.where, f"{folder} has no frames in it", "Add them, or drop the row.", sample.id)
    if len(numbered) < len(files):
        found = f"{folder} has {len(files)} files with {len(numbered)} numbers"
        raise SampleError(sample.where, found, "Give each frame a number of its own.", sample.id)
    return [Image(numbered[number]) for number in sorted(numbered)]


@contextmanager
def _told(path: Path, sample: Sample) -> Iterator[None]:
    """What is wrong with a clip, as the error of a row."""
    try:
        yield
    except FileNotFoundError:
        raise pictures.missing(path, sample) from None
    except ClipError as error:
        found = f"{path} cannot be read: {error}"
        raise SampleError(sample.where, found, "Replace it, or drop the row.", sample.id) from None
