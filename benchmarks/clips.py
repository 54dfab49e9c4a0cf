"""Single pictures of a clip, against decoding it from end to end.

    python -m benchmarks.clips [FOLDER]

Eight pictures spread evenly over each clip of a folder, without one the example clips, or where they are not here,
clips drawn from a seed. All decode with one thread: `Clips.at_times`, with its process and the pipe from there, after a
first call has started it; decoding every picture and turning every one into a Pillow image, as upstream does; and
decoding every picture, with only the eight turned. For each clip they take turns and must give the same pictures; what
is reported is over the clips, of each clip's medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from mantis_lite.data.clips import Clips

from . import results

EXAMPLES = results.SHARED / "mantis-examples/chat_video/video"
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
PICTURES = 8


def draw(folder: Path) -> None:
    """Write clips of moving noise: two with a key picture every 12 frames, one with one every 250."""
    random = np.random.default_rng(0)
    noise = np.kron(random.integers(0, 256, (60, 100, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))
    for name, gop in (("a", 12), ("b", 12), ("c", 250)):
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, width=596, height=336, pix_fmt="yuv420p")
            stream.gop_size = gop
            for at in range(300):
                shown = np.roll(noise, (at, 2 * at), (0, 1))[:336, :596]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24")))
            container.mux(stream.encode(None))


def whole(path: Path, indices: list[int], every: bool) -> list[Image.Image]:
    """Decode all pictures, and turn every one or only the wanted into images."""
    wanted = set(indices)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        found = []
        for at, frame in enumerate(container.decode(stream)):
            if every or at in wanted:
                picture = frame.to_image()
                if at in wanted:
                    found.append(picture)
    return found


def measure(clips: Clips, path: Path) -> dict[str, float]:
    """Milliseconds of each way, and how many times as long the others take as single pictures."""
    found = clips.header(path, count=True)
    indices = [at * found.frames // PICTURES for at in range(PICTURES)]
    times = [(at + 0.5) * found.seconds / found.frames for at in indices]
    ways: dict[str, Callable[[], Any]] = {
        "header": lambda: clips.header(path),
        "single": lambda: clips.at_times(path, times),
        "images": lambda: whole(path, indices, True),
        "decoding": lambda: whole(path, indices, False),
    }

    def same(returned: list[Any]) -> None:
        single, *others = ([picture.tobytes() for picture in pictures] for pictures in returned[1:])
        assert len(single) == PICTURES and all(other == single for other in others), path

    seconds = results.interleaved(ways, same=same)
    milliseconds = {name: 1000 * statistics.median(of) for name, of in seconds.items()}
    against = {
        f"{name} over single": statistics.median(results.quotients(seconds[name], seconds["single"]))
        for name in ("images", "decoding")
    }
    return {"frames": found.frames} | milliseconds | against


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=EXAMPLES)
    folder = parser.parse_args().folder
    clips = Clips()
    with tempfile.TemporaryDirectory() as drawn:
        if not folder.is_dir():
            folder = Path(drawn)
            draw(folder)
        paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
        measured = [measure(clips, path) for path in paths]
    clips.close()

    def over(key: str) -> dict[str, float]:
        return results.spread(clip[key] for clip in measured)

    figures = {
        "clips": len(measured),
        "drawn": folder == Path(drawn),
        "pictures_per_clip": PICTURES,
        "repeats": results.REPEATS,
        "frames_per_clip": over("frames"),
        "header_ms": over("header"),
        "single_pictures_ms": over("single"),
        "whole_clip_all_to_images_ms": over("images"),
        "whole_clip_decoding_ms": over("decoding"),
        "times_faster_than_all_to_images": over("images over single"),
        "times_faster_than_decoding": over("decoding over single"),
    }
    for path, clip in zip(paths, measured, strict=True):
        print(path.name, {key: round(value, 1) for key, value in clip.items()})
    print(figures)
    results.write("clips", figures)


if __name__ == "__main__":
    main()
