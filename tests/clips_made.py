"""Clips drawn with PyAV for tests: every picture says its own number in blocks of black and white."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, BITS = 96, 64, 8
RATE = 25


def drawn(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture whose upper half holds `number`, a bit a block, and whose lower half moves with it."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    side = width // BITS
    for bit in range(BITS):
        pixels[: height // 2, bit * side : (bit + 1) * side] = 220 if number >> bit & 1 else 30
    at = number * 7 % (width - 10)
    pixels[height // 2 + 4 : height - 4, at : at + 10] = (200, 60, 40)
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number that a decoded picture holds."""
    height, width = pixels.shape[:2]
    side = width // BITS
    middles = [
        pixels[height // 8 : height * 3 // 8, bit * side + side // 4 : (bit + 1) * side - side // 4]
        for bit in range(BITS)
    ]
    return sum(1 << bit for bit, block in enumerate(middles) if block.mean() > 128)


def make(
    path: Path,
    codec: str = "libx264",
    frames: int = 30,
    *,
    stamps: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, RATE),
    gop: int = 10,
    b_frames: int = 0,
    rotation: int = 0,
    flip: bool = False,
    aspect: Fraction | None = None,
    sound: float = 0.0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    extra: str = "",
) -> Path:
    """Write a clip; picture k is shown from `stamps[k]` (or k) in `time_base`, for `sound` seconds beside a hum."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=RATE, options=_options(codec, b_frames, extra) | (options or {}))
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "png": "rgb24", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.gop_size, stream.max_b_frames = gop, b_frames
        stream.time_base = stream.codec_context.time_base = time_base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation or flip:
            stream.set_display_rotation(rotation, hflip=flip)
        hum = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        container.start_encoding()
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(drawn(number, *size), format="rgb24")
            frame.pts = stamps[number] if stamps else number
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if hum:
            _hum(container, hum, sound)
    return path


def make_sound(path: Path, seconds: float = 1.0, cover: bool = False) -> Path:
    """A clip without pictures, or with only the picture of its cover."""
    with av.open(str(path), "w") as container:
        hum = container.add_stream("aac", rate=16000, layout="mono")
        if cover:
            stream = container.add_stream("mjpeg", rate=1, width=WIDTH, height=HEIGHT, pix_fmt="yuvj420p")
            stream.disposition = av.stream.Disposition.attached_pic
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(drawn(0), format="rgb24").reformat(format="yuvj420p"))
            )
            container.mux(stream.encode(None))
        _hum(container, hum, seconds)
    return path


def sequential(path: Path) -> tuple[list[float], list[np.ndarray]]:
    """All pictures of a clip, decoded one after the other, and when each is shown in seconds from the first."""
    with av.open(str(path)) as container:
        stream = next(s for s in container.streams.video)
        stamps, pictures = [], []
        for frame in container.decode(stream):
            stamps.append(Fraction(len(stamps), RATE) if frame.pts is None else frame.pts * stream.time_base)
            pictures.append(frame.to_ndarray(format="rgb24"))
    return [float(stamp - stamps[0]) for stamp in stamps], pictures


def _options(codec: str, b_frames: int, extra: str) -> dict[str, str]:
    if codec == "libx264":
        return {"preset": "veryfast", "x264-params": f"scenecut=0:b-adapt=0:bframes={b_frames}:threads=1{extra}"}
    if codec == "libvpx-vp9" or codec == "libvpx":
        return {"deadline": "realtime", "cpu-used": "8"}
    return {}


def _hum(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    samples = np.sin(np.arange(int(16000 * seconds)) / 20).astype(np.float32)[None] * 0.1
    for begin in range(0, samples.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, begin : begin + 1024]), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, begin, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
