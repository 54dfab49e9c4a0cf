"""The process that reads clips for `clips.py`: a request a line on stdin, an answer a line and pixels on stdout.

A process of its own, since a damaged clip can hang FFmpeg or take its process down. It is run as a script and imports
nothing of the package, so as to start fast.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, groupby
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

MOMENT = 1e-6  # s: a time this little before a picture is that picture's, for the rounding of floats
SLACK = 0.5  # s: by so much pictures may end before a length that is stated of the whole clip
SPARE = (0, 1, 10)  # s: how far before a key picture to seek, as some seeks land behind it
# FFmpeg's names of the containers that are read. Those that name other files, as hls, concat, dash and imf do, are not.
CONTAINERS = (
    *("mov", "mp4", "m4v", "3gp", "matroska", "webm", "avi", "flv", "asf", "mpegts", "mpeg", "mpegvideo", "ogg", "gif"),
    *("apng", "ivf", "nut", "rm", "mxf", "dv", "wtv", "mjpeg", "h264", "hevc", "obu", "av1", "vc1"),
)
# What is opened to say what it is: a picture, or sound alone.
NO_CLIPS = ("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "mp3", "wav", "aac", "flac", "image2")
WIDEST = 16  # how many times as wide as high a pixel may be, or as high as wide


class Unreadable(ValueError):
    """What is wrong with a clip."""


@dataclass(frozen=True, slots=True)
class Key:
    """A picture that decoding can start at: when it is shown, or where an index says only that, when it is decoded."""

    stamp: int
    shown: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """What all packets say without being decoded: stamps in the order shown, keys, and ends in seconds."""

    stamps: list[int]
    keys: list[Key]
    end: float
    end_with_sound: float


class Search:
    """The last picture no later than each target, of pictures that come in the order shown; targets ascend."""

    def __init__(self, targets: Sequence[int]) -> None:
        self.targets = targets
        self.found: list[tuple[int, VideoFrame]] = []
        self.last: tuple[int, VideoFrame] | None = None
        self.missing = set(targets)  # stamps that no packet had yet
        self.latest: int | None = None  # the last stamp up to the next target that a packet had

    def passed_over(self, stamp: int | None) -> bool:
        """Is a picture known that is shown later than this and still by the target?"""
        return stamp is not None and self.latest is not None and stamp < self.latest

    def send(self, stamp: int | None) -> None:
        if stamp is None:
            return
        self.missing.discard(stamp)
        if stamp <= self.targets[len(self.found)] and (self.latest is None or stamp > self.latest):
            self.latest = stamp

    def see(self, stamp: int, frame: VideoFrame) -> bool:
        """Take the next picture; True once all targets have theirs, or the first comes behind a target."""
        while len(self.found) < len(self.targets) and self.targets[len(self.found)] < stamp:
            if self.last is None:
                return True
            self.found.append(self.last)
        self.last = stamp, frame
        return len(self.found) == len(self.targets)

    def finish(self) -> bool:
        """No more pictures come: the last one stays on the screen. False where there is none."""
        if self.last is None:
            return False
        self.found += [self.last] * (len(self.targets) - len(self.found))
        return True


class Clip:
    """An open clip; as long as it is `fresh`, it stands behind its first picture.

    Its pictures may have `most` pixels each: larger ones are not decoded.
    """

    def __init__(self, path: str, most: int) -> None:
        self.path, self.most = path, most
        self.reformatter = VideoReformatter()
        self._scan: Scan | None = None
        self.timed = False
        self._begin()
        first = self.ready[0]
        # Raw streams hold no times, AVI only those of decoding: there pictures are counted.
        reordered = self.container.format.name == "avi" and bool(self.context.has_b_frames)
        self.timed = first.pts is not None and not reordered
        self.rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        self.tick = self.stream.time_base if self.timed and self.stream.time_base else 1 / self.rate
        self.first = first.pts if self.timed and first.pts is not None else 0
        self.turns, self.mirrored = _turns(first)
        aspect = self.stream.sample_aspect_ratio or Fraction(1)
        if not Fraction(1, WIDEST) <= aspect <= WIDEST:
            raise Unreadable(f"has pixels {float(aspect):.3g} times as wide as high")
        self.width, self.height = max(1, round(first.width * aspect)), first.height
        self._refuse_large(self.width, self.height)

    def close(self) -> None:
        self.container.close()

    @property
    def size(self) -> tuple[int, int]:
        return (self.height, self.width) if self.turns % 2 else (self.width, self.height)

    @property
    def indexed(self) -> bool:
        """Does the index name every packet? In MP4 without fragments; elsewhere it holds what was read so far."""
        return self.timed and self.container.format.name.startswith("mov") and bool(self.stream.frames)

    def header(self, count: bool) -> dict[str, Any]:
        stated = self._stated()
        frames = len(self.scan().stamps) if count or not stated else self._indexed_frames()
        seconds = stated[0] if stated else self.scan().end
        return {"size": self.size, "seconds": seconds, "frames": frames or max(1, round(seconds * self.rate))}

    def _indexed_frames(self) -> int:
        """The number of pictures by the header, less those that an edit list cuts off; 0 where it says nothing."""
        entries = self.stream.index_entries
        if self.indexed and (entries[0].is_discard or entries[-1].is_discard):
            return sum(not entry.is_discard for entry in entries)
        return self.stream.frames

    def at_times(self, times: Sequence[float]) -> list[VideoFrame]:
        targets = [self.first + max(0, math.floor((seconds + MOMENT) / self.tick)) for seconds in times]
        if not self.indexed:
            self._check_end(targets[-1], self.scan().end)
            targets = _until(targets, self.scan().stamps)
        return [frame for _, frame in self._shown(targets)]

    def at_indices(self, indices: Sequence[int]) -> list[VideoFrame]:
        stamps = self.scan().stamps
        if indices[-1] >= len(stamps):
            raise Unreadable(f"has no frame {indices[-1]}: it ends after {len(stamps)} frames")
        found = self._shown([stamps[index] for index in indices])
        for index, (stamp, _) in zip(indices, found, strict=True):
            if stamp != stamps[index]:  # its packet is there, and no picture comes of it
                raise self._damaged(stamps[index])
        return [frame for _, frame in found]

    def pixels(self, frame: VideoFrame) -> np.ndarray:
        """A picture as it is to be seen: upright, with pixels as wide as high."""
        # Where nothing is scaled, this is `frame.to_ndarray(format="rgb24")`.
        made = self.reformatter.reformat(frame, self.width, self.height, "rgb24", threads=1).to_ndarray()
        turned = np.rot90(made, self.turns)
        return np.ascontiguousarray(turned[:, ::-1] if self.mirrored else turned)

    def scan(self) -> Scan:
        """Read every packet, of the sound too; nothing is decoded."""
        if self._scan is None:
            container = _opened(self.path, self.most)
            try:
                self._scan = self._scanned(container)
            finally:
                container.close()
            if not self._scan.stamps:
                raise Unreadable("is empty (0 frames)")
        return self._scan

    def _scanned(self, container: InputContainer) -> Scan:
        stamps: list[int] = []
        keys = []
        end = end_with_sound = 0.0
        for packet in _demuxed(container, None):
            if not packet.size or packet.is_corrupt:
                continue
            if packet.pts is not None and self.timed:
                until = (packet.pts + (packet.duration or 0)) * packet.time_base - self.first * self.tick
                end_with_sound = max(end_with_sound, float(until))
            if packet.stream_index != self.stream.index:
                continue
            if packet.is_keyframe and packet.pts is not None:
                keys.append(Key(packet.pts, True))
            stamp = packet.pts if self.timed else len(stamps)
            # What stands before the first picture cannot be decoded, or an edit list cuts it off.
            if stamp is None or stamp < self.first or packet.is_discard:
                continue
            stamps.append(stamp)
            end = max(end, self._end(packet) if self.timed else float(len(stamps) / self.rate))
        return Scan(sorted(stamps), sorted(keys, key=lambda key: key.stamp), end, end_with_sound)

    def _stated(self) -> tuple[float, bool] | None:
        """How long pictures are shown by the header, and whether it speaks of them and not of the sound too."""
        # MPEG streams state nothing, and FFmpeg's guess by their last time stamps can be a second short.
        if not self.timed or self.container.format.name in ("mpeg", "mpegts"):
            return None
        if self.stream.duration:
            return float(self.stream.duration * self.tick), True
        if not self.container.duration:
            return None
        # Matroska states when the clip ends, and mostly when each stream does: as long as it is only from 0 on.
        ends = [self.container.duration / av.time_base, _clock(self.stream.metadata.get("DURATION", ""))]
        seconds = min(end for end in ends if end) - max(0.0, float(self.first * self.tick))
        return max(seconds, float(1 / self.rate)), len(self.container.streams) == 1

    def _check_end(self, target: int, end: float) -> None:
        """Raise where pictures are missing: a target lies behind the last, and the sound does not go on."""
        seconds, certain = self._stated() or (end, True)
        late = float((target - self.first) * self.tick) - end
        if late <= max(2 / self.rate, 0 if certain else SLACK):
            return
        if certain or self.scan().end_with_sound + SLACK < seconds:
            raise Unreadable(f"ends after {end:.1f} s of {seconds:.1f}")

    def _begin(self) -> None:
        """Open the file and decode up to its first picture."""
        self.container = _opened(self.path, self.most)
        self.stream = _pictures(self.container)
        self.context = self.stream.codec_context
        if not self.context.width:  # FFmpeg forgets a size that it refuses
            raise Unreadable(f"too large: its pictures have more than {self.most:,} pixels, or no size")
        self._refuse_large(self.context.width, self.context.height)
        self.context.options = {"max_pixels": str(self.most)}  # where pictures become larger on the way
        self.context.thread_count = 1  # processes that load share the cores
        self.packets = _demuxed(self.container, self.stream)
        self.ready: list[VideoFrame] = []
        self.sent: list[Packet] = []
        self.fresh = True
        while not self.ready and (packet := next(self.packets, None)):
            self.sent.append(packet)
            self.ready = [] if packet.is_corrupt else self._decode(packet)
        if not self.ready:
            there = any(packet.size for packet in self.sent)
            raise Unreadable("damaged: no picture can be decoded" if there else "is empty (0 frames)")

    def _refuse_large(self, width: int, height: int) -> None:
        if width * height > self.most:
            raise Unreadable(f"too large: its pictures have {width:,} x {height:,} pixels, more than {self.most:,}")

    def _shown(self, targets: Sequence[int]) -> list[tuple[int, VideoFrame]]:
        """The last picture no later than each target; targets ascend. Each stretch from a key on is decoded once."""
        keys = self._keys()
        # First what the first key leads to, as long as the clip stands there.
        near = bisect_left(targets, keys[1].stamp) if len(keys) > 1 else len(targets)
        found = self._from(keys, 0, targets[:near])
        stamps: dict[int, int | None] = {}
        places = [self._place(keys, target, stamps) for target in targets[near:]]
        for place, group in groupby(zip(places, targets[near:], strict=True), lambda pair: pair[0]):
            found += self._from(keys, place, [target for _, target in group])
        return found

    def _from(self, keys: list[Key], place: int, targets: Sequence[int]) -> list[tuple[int, VideoFrame]]:
        """The pictures for targets that a key leads to."""
        if not targets:
            return []
        # A seek may land too late, or the decoder need a while: then from one key before.
        searches = (self._searched(keys, before, targets) for before in range(place, -2, -1))
        search = next((search for search in searches if search), None)
        if search is None:
            raise self._damaged(targets[0])
        return search.found

    def _keys(self) -> list[Key]:
        if not self.timed:
            return []
        if self.indexed:
            return [Key(entry.timestamp, False) for entry in self.stream.index_entries if entry.is_keyframe]
        return self.scan().keys

    def _place(self, keys: list[Key], target: int, stamps: dict[int, int | None]) -> int:
        """The last key that is shown by the target, or else the first; `stamps` remembers when each is shown."""
        place = bisect_right(keys, target, key=lambda key: key.stamp) - 1
        while place > 0:
            if place not in stamps:
                stamps[place] = keys[place].stamp if keys[place].shown else self._shown_from(keys[place])
            stamp = stamps[place]
            if stamp is not None and stamp <= target:
                break
            place -= 1
        return place

    def _shown_from(self, key: Key) -> int | None:
        """When a key picture is shown; None where its packet is missing."""
        packets = self._seek(key)
        return next(packets).pts if packets else None

    def _seek(self, key: Key) -> Iterator[Packet] | None:
        """The packets from a key picture on; None where no seek leads there."""
        self.fresh = False
        stamps = [key.stamp - round(spare / self.tick) for spare in SPARE]
        if not key.shown:  # MP4 is sought by when pictures are shown: mostly as much later as the first
            stamps.insert(0, key.stamp + max(0, self.first - self.stream.index_entries[0].timestamp))
        for stamp in stamps:
            try:
                self.container.seek(stamp, stream=self.stream)
            except av.error.FFmpegError:
                continue  # some formats refuse some stamps
            packets = _demuxed(self.container, self.stream)
            for packet in packets:
                here = packet.pts if key.shown else packet.dts
                if not packet.is_keyframe or here is None:
                    continue
                if here == key.stamp:
                    return chain([packet], packets)
                if here > key.stamp:
                    break
        return None

    def _searched(self, keys: list[Key], place: int, targets: Sequence[int]) -> Search | None:
        """Decode from a key on until all targets have their pictures; None where that begins too late."""
        begin, ready, sent = self.first, list[VideoFrame](), list[Packet]()
        packets: Iterable[Packet]
        if place > 0 or (place == 0 and not self.fresh):
            found = self._seek(keys[place])
            if found is None:
                return None
            key = next(found)
            packets = chain([key], found)
            if key.pts is not None:  # pictures shown before the key may need others that are not decoded
                begin = max(begin, key.pts)
        else:
            if not self.fresh:
                self.close()
                self._begin()
            self.fresh, packets, ready, sent = False, self.packets, self.ready, self.sent
        if self.indexed:
            packets = stretch = self._stretch(packets, targets[-1])
            shown = [packet for packet in sent + stretch if self._is_shown(packet, begin)]
            stamps = sorted(packet.pts for packet in shown if packet.pts is not None)
            if not stamps or stamps[0] > targets[0]:
                return None
            if not (sent + stretch)[-1].size:
                self._check_end(targets[-1], max(map(self._end, shown)))
            targets = _until(targets, stamps)
        search = Search(targets)
        for packet in sent:
            search.send(self._stamp(packet))
        for count, frame in enumerate(chain(ready, self._decoded(packets, search))):
            stamp = frame.pts if self.timed else count
            if stamp is None or stamp < begin:
                continue
            if frame.is_corrupt:
                raise self._damaged(stamp)
            if search.see(stamp, frame):
                break
        return search if search.finish() else None

    def _stamp(self, packet: Packet) -> int | None:
        return packet.pts if self.timed else None

    def _is_shown(self, packet: Packet, begin: int) -> bool:
        """Does a picture from `begin` on come of it? Not where an edit list cuts it off, or the file ends within it."""
        there = packet.size and not packet.is_corrupt and not packet.is_discard
        return bool(there) and packet.pts is not None and packet.pts >= begin

    def _end(self, packet: Packet) -> float:
        """When a picture leaves the screen, in seconds from the first, as far as its packet says."""
        assert packet.pts is not None
        return float((packet.pts - self.first) * self.tick + ((packet.duration or 0) * self.tick or 1 / self.rate))

    def _stretch(self, packets: Iterable[Packet], target: int) -> list[Packet]:
        """All packets that can be shown by the target, and the next: none is shown before it is decoded."""
        found = []
        for packet in packets:
            found.append(packet)
            if not packet.size or (packet.dts is not None and packet.dts > target):
                break
        return found

    def _decoded(self, packets: Iterable[Packet], search: Search) -> Iterator[VideoFrame]:
        """Pictures up to what the search needs, in the order shown."""
        broken: Packet | None = None
        for packet in packets:
            if not packet.size or (self.timed and not search.missing):
                yield from self._decode(None)
                return
            if broken is not None:
                raise self._damaged(broken.pts)
            if packet.is_corrupt:  # where a file is cut off, the last packet is only a part
                broken = packet
                continue
            stamp = self._stamp(packet)
            # Not decoded is only what no target shows and no other picture needs: the rest keeps its pixels.
            self.context.skip_frame = "NONREF" if search.passed_over(stamp) else "DEFAULT"
            search.send(stamp)
            yield from self._decode(packet)

    def _decode(self, packet: Packet | None) -> list[VideoFrame]:
        """The pictures that a packet completes; all that are held back for None."""
        try:
            return self.stream.decode(packet)
        except av.error.FFmpegError as error:
            raise self._damaged(packet.pts if packet else None, error) from None

    def _damaged(self, stamp: int | None, error: av.error.FFmpegError | None = None) -> Unreadable:
        where = "damaged"
        if stamp is not None and self.timed:
            where += f" at {max(0.0, float((stamp - self.first) * self.tick)):.1f} s"
        return Unreadable(f"{where}: {error.strerror}" if error else where)


def _opened(path: str, most: int) -> InputContainer:
    """Open a file as a plain local one, whatever its name or content looks like: no playlist that names others."""
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join((*CONTAINERS, *NO_CLIPS)),
        "max_pixels": str(most),  # to open is to decode a little
    }
    try:
        return av.open(f"file:{path}", metadata_errors="replace", options=options)
    except av.ArgumentError:
        raise Unreadable("is of a kind that is not read as a clip, as a list of other files is not") from None


def _pictures(container: InputContainer) -> VideoStream:
    """The first stream of pictures that is not the cover of a record."""
    covers = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not container.streams:
        raise Unreadable("is empty (0 frames)")
    if not streams:
        raise Unreadable("has no pictures, only sound" if container.streams.audio else "has no pictures")
    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        raise Unreadable("is a picture, not a clip")
    if streams[0].codec_context is None:
        raise Unreadable("is in a format that this FFmpeg cannot decode")
    return streams[0]


def _demuxed(container: InputContainer, stream: VideoStream | None) -> Iterator[Packet]:
    """The packets of a stream, or of all, and at the end an empty one."""
    try:
        yield from container.demux(stream) if stream else container.demux()
    except av.error.FFmpegError as error:
        raise Unreadable(f"damaged: {error.strerror}") from None
    except IndexError:  # PyAV's own, at a packet of a stream that it did not know of on opening
        raise Unreadable("damaged: streams begin in the middle of it") from None


def _clock(text: str) -> float:
    """Seconds of "00:01:02.500000000"; 0 where it is something else."""
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text)
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else 0.0


def _until(targets: Sequence[int], stamps: Sequence[int]) -> list[int]:
    """The last stamp no later than each target; both ascend, and the first stamp comes before all targets."""
    return [stamps[max(0, bisect_right(stamps, target) - 1)] for target in targets]


def _turns(frame: VideoFrame) -> tuple[int, bool]:
    """By how many quarters to turn a picture counterclockwise, and whether to mirror it then, left to right."""
    sides: Any = frame.side_data
    if Type.DISPLAYMATRIX not in sides:
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(sides[Type.DISPLAYMATRIX]), np.int32)[:5].astype(float)
    mirrored = a * d - b * c < 0
    degrees = -math.degrees(math.atan2(b, -a if mirrored else a))
    if abs(degrees - 90 * round(degrees / 90)) > 1:
        raise Unreadable(f"is turned by {degrees:.0f} degrees")
    return round(degrees / 90) % 4, mirrored


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What a request asks for: a header, or which picture each of its times or indices shows, and the pictures."""
    try:
        clip = Clip(request["path"], request["max_pixels"])
        try:
            if "count" in request:
                return clip.header(request["count"]), []
            frames = clip.at_times(request["times"]) if "times" in request else clip.at_indices(request["indices"])
            order: list[int] = []
            pictures: list[np.ndarray] = []
            for before, frame in zip([None, *frames], frames, strict=False):
                if frame is not before:
                    pictures.append(clip.pixels(frame))
                order.append(len(pictures) - 1)
            return {"size": clip.size, "order": order, "pictures": len(pictures)}, pictures
        finally:
            clip.close()
    except Unreadable as error:
        return {"error": str(error)}, []
    except av.error.FileNotFoundError:
        return {"missing": True}, []
    except av.error.EOFError:
        return {"error": "is empty (0 frames)"}, []
    except (av.error.PermissionError, av.error.IsADirectoryError) as error:
        return {"error": f"cannot be opened: {error.strerror}"}, []
    except av.error.FFmpegError as error:
        return {"error": f"not a video, or damaged: {error.strerror}"}, []


def serve(requests: Iterable[bytes], answers: BinaryIO) -> None:
    for line in requests:
        header, pictures = answer(json.loads(line))
        answers.write(json.dumps(header).encode() + b"\n")
        for picture in pictures:
            answers.write(picture.data)
        answers.flush()


def watch(parent: int) -> None:
    """End with the parent, even where a file that hangs keeps this process from seeing the end of stdin."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    av.logging.set_level(None)
    threading.Thread(target=watch, args=(int(sys.argv[1]),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library might print is no answer
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
