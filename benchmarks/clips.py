"""Single pictures of a clip, against decoding it from end to end.

    python -m benchmarks.clips [FOLDER]

Eight pictures spread evenly over each clip of a folder, without one the example clips, or where they are not here,
clips drawn from a seed. All decode with one thread: `Clips.at_times`, with its process and the pipe from there, after a
first call has started it; decoding every picture and turning every one into a Pillow image, as upstream does; and
decoding every picture, with only the eight turned. Ratios are medians over the clips.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from mantis_lite.data.clips import Clips

from . import results

EXAMPLES = Path(__file__).parents[2] / "shared/data/mantis-examples/chat_video/video"
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
PICTURES = 8
REPEATS = 5


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
            picture = frame.to_image() if every or at in wanted else None
            if at in wanted:
                found.append(picture)
    return found


def median(call: Callable, *args) -> tuple[float, list[Image.Image]]:
    """The median time of a call in ms, and what it returned."""
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        found = call(*args)
        seconds.append(time.perf_counter() - begun)
    return 1000 * statistics.median(seconds), found


def measure(clips: Clips, path: Path) -> dict[str, float]:
    found = clips.header(path, count=True)
    header, _ = median(clips.header, path)
    indices = [at * found.frames // PICTURES for at in range(PICTURES)]
    times = [(at + 0.5) * found.seconds / found.frames for at in indices]
    single, pictures = median(clips.at_times, path, times)
    images, expected = median(whole, path, indices, True)
    decoding, _ = median(whole, path, indices, False)
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected], path
    return {"frames": found.frames, "header": header, "single": single, "images": images, "decoding": decoding}


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

    def middle(key: str) -> float:
        return round(statistics.median(clip[key] for clip in measured), 2)

    against = {kind: [clip[kind] / clip["single"] for clip in measured] for kind in ("images", "decoding")}
    figures = {
        "clips": len(measured),
        "drawn": folder == Path(drawn),
        "pictures_per_clip": PICTURES,
        "frames_per_clip_median": middle("frames"),
        "header_ms_median": middle("header"),
        "single_pictures_ms_median": middle("single"),
        "whole_clip_all_to_images_ms_median": middle("images"),
        "whole_clip_decoding_ms_median": middle("decoding"),
        "times_faster_than_all_to_images_median": round(statistics.median(against["images"]), 2),
        "times_faster_than_all_to_images_min": round(min(against["images"]), 2),
        "times_faster_than_all_to_images_max": round(max(against["images"]), 2),
        "times_faster_than_decoding_median": round(statistics.median(against["decoding"]), 2),
        "times_faster_than_decoding_min": round(min(against["decoding"]), 2),
        "times_faster_than_decoding_max": round(max(against["decoding"]), 2),
    }
    for path, clip in zip(paths, measured, strict=True):
        print(path.name, {key: round(value, 1) for key, value in clip.items()})
    print(figures)
    results.write("clips", figures)


if __name__ == "__main__":
    main()
