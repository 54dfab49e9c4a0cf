"""Single pictures of a clip are those of decoding it from end to end, and a clip that cannot be read says why."""

import copy
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from bisect import bisect_right
from fractions import Fraction
from functools import cache
from itertools import islice
from pathlib import Path

import corpus
import numpy as np
import pytest
from clips_made import make, make_sound, number_of, sequential
from helpers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from mantis_lite.data import decoder
from mantis_lite.data.clips import SIGNALS, Child, ClipError, Clips
from mantis_lite.data.frames import Frames
from mantis_lite.data.sample import Sample, Turn, Video
from mantis_lite.errors import SampleError
from mantis_lite.recipe import MediaRecipe

MILLI = Fraction(1, 1000)
FRAMES = 60
EVEN = [40 * k for k in range(FRAMES)]
UNEVEN = [0, 40, 50, 400, 1000, 1010] + [2000 + 33 * k for k in range(FRAMES - 6)]
OPEN = ":open-gop=1"
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
CUT_IN = {"avoid_negative_ts": "disabled", "use_editlist": "1"}

KINDS = {
    "gop10.mp4": {},
    "one-gop.mp4": {"gop": 1000},
    "b-frames.mp4": {"b_frames": 2},
    "one-gop-b-frames.mp4": {"gop": 1000, "b_frames": 3},
    "all-keys.mp4": {"gop": 1},
    "open-gop.mp4": {"b_frames": 2, "extra": OPEN},
    "open-gop.mkv": {"b_frames": 2, "extra": OPEN},
    "open-gop.ts": {"b_frames": 2, "extra": OPEN},
    "edited.mp4": {"stamps": [k - 5 for k in range(FRAMES)], "muxer": CUT_IN},
    "fragments.mp4": {"b_frames": 2, "muxer": FRAGMENTS},
    "late.mp4": {"b_frames": 2, "time_base": MILLI, "stamps": [5000 + k for k in EVEN]},
    "late.mkv": {"b_frames": 2, "time_base": MILLI, "stamps": [5000 + k for k in EVEN]},
    "uneven.mp4": {"b_frames": 2, "time_base": MILLI, "stamps": UNEVEN},
    "uneven.mkv": {"time_base": MILLI, "stamps": UNEVEN},
    "x.mkv": {"b_frames": 2},
    "x.ts": {"b_frames": 2},
    "x.flv": {},
    "x.mpg": {"codec": "mpeg2video", "b_frames": 2},
    "x.mov": {"codec": "mpeg4"},
    "x.avi": {"codec": "mpeg4"},
    "x.h264": {"b_frames": 2},
    "x.gif": {"codec": "gif"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "hevc.mp4": {"codec": "libx265", "b_frames": 2, "options": {"x265-params": "log-level=none:pools=1"}},
    "sound.mp4": {"sound": 4.0},
    "sound.mkv": {"sound": 4.0},
}


@pytest.fixture(scope="module")
def clips():
    found = Clips(20)
    yield found
    found.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clip by its name in KINDS."""
    folder = tmp_path_factory.mktemp("clips")
    return cache(lambda name: make(folder / name, **({"frames": FRAMES} | KINDS[name])))


@pytest.fixture(scope="module")
def decoded(made):
    """When each picture of a clip is shown, and the pictures, by decoding from end to end."""
    return cache(lambda name: sequential(made(name)))


def arrays(pictures) -> list[np.ndarray]:
    return [np.asarray(picture) for picture in pictures]


def same(found, expected) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, arrays(found), expected))


@pytest.mark.parametrize("name", KINDS)
def test_a_time_shows_the_last_picture_until_then(name, clips, made, decoded):
    stamps, pictures = decoded(name)

    def check(times):
        expected = [bisect_right(stamps, seconds + 1e-6) - 1 for seconds in times]
        found = clips.at_times(made(name), times)
        assert [number_of(array) for array in arrays(found)] == [number_of(pictures[k]) for k in expected]
        assert same(found, [pictures[k] for k in expected])

    check(stamps)
    check([stamps[-1]])
    check([stamps[3], stamps[3], stamps[4] + 0.001, stamps[-2] + 0.001, stamps[-1] + 0.03])
    ascending = st.lists(st.floats(0, stamps[-1] + 0.03), min_size=1, max_size=9).map(sorted)
    settings(max_examples=6)(given(ascending)(check))()


@pytest.mark.parametrize("name", KINDS)
def test_an_index_counts_the_pictures_as_they_are_shown(name, clips, made, decoded):
    _, pictures = decoded(name)
    every = list(range(len(pictures)))
    for indices in (every, every[::7], [0], [len(pictures) - 1], [4, 4, 27]):
        assert same(clips.at_indices(made(name), indices), [pictures[k] for k in indices])


@pytest.mark.parametrize(
    ("name", "gop", "most"),
    [("one.mp4", 1000, 160), ("one.mkv", 1000, 160), ("short.mp4", 10, 110), ("short.mkv", 10, 110), ("x.ts", 10, 110)],
)
def test_nothing_is_decoded_twice_nor_needlessly(name, gop, most, monkeypatch, tmp_path):
    """Eight of 160 pictures: with one key picture each packet once, with many no more than from the last key."""
    path = make(tmp_path / name, frames=160, gop=gop, b_frames=2)
    decode, sent = decoder.Clip._decode, []

    def counted(self, packet):
        sent.append(packet)
        return decode(self, packet)

    monkeypatch.setattr(decoder.Clip, "_decode", counted)
    clip = decoder.Clip(str(path), 10_000)
    frames = clip.at_times([6.3 * k / 7 for k in range(8)])
    assert [number_of(clip.pixels(frame)) for frame in frames] == [int(6.3 * k / 7 * 25 + 1e-6) for k in range(8)]
    assert len([packet for packet in sent if packet is not None]) <= most
    clip.close()


@pytest.mark.parametrize("name", KINDS)
def test_the_header_agrees_with_the_pictures(name, clips, made, decoded):
    stamps, pictures = decoded(name)
    header, counted = clips.header(made(name)), clips.header(made(name), count=True)
    assert counted.frames == len(pictures)
    assert counted.size == header.size == clips.at_times(made(name), [0])[0].size == pictures[0].shape[1::-1]
    assert counted.seconds == header.seconds == pytest.approx(stamps[-1] + 0.04, abs=0.02)
    if not name.startswith("uneven"):
        assert header.frames == len(pictures)


def test_numbers_survive_the_codecs(decoded):
    assert [number_of(picture) for picture in decoded("b-frames.mp4")[1]] == list(range(FRAMES))
    assert [number_of(picture) for picture in decoded("edited.mp4")[1]] == list(range(5, FRAMES))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_pictures_are_turned_upright(rotation, flip, clips, made, decoded, tmp_path):
    path = make(tmp_path / "turned.mp4", frames=FRAMES, rotation=rotation, flip=flip)
    upright = [np.rot90(picture, rotation // 90) for picture in decoded("gop10.mp4")[1]]
    expected = [picture[:, ::-1] if flip else picture for picture in upright]
    assert clips.header(path).size == expected[0].shape[1::-1]
    assert same(clips.at_indices(path, range(0, FRAMES, 9)), expected[::9])


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(2), (192, 64)), (Fraction(1, 2), (48, 64))])
def test_pixels_are_as_wide_as_high(aspect, size, clips, decoded, tmp_path):
    path = make(tmp_path / "wide.mp4", aspect=aspect)
    found = clips.at_indices(path, range(30))
    assert clips.header(path).size == size
    assert {picture.size for picture in found} == {size}
    assert [number_of(array) for array in arrays(found)] == list(range(30))
    turned = make(tmp_path / "turned.mp4", aspect=aspect, rotation=90)
    assert clips.header(turned).size == clips.at_times(turned, [0.5])[0].size == size[::-1]


@pytest.mark.parametrize("name", ["x.png", "x_%d.png"])
def test_a_picture_is_no_clip_and_neither_is_a_pattern_of_their_names(clips, tmp_path, name):
    make(tmp_path / "x.png", "png", 1)
    (tmp_path / "x_1.png").write_bytes((tmp_path / "x.png").read_bytes())
    with pytest.raises((ClipError, FileNotFoundError), match=r"^is a picture, not a clip$|no such file"):
        clips.header(tmp_path / name)


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv", "gif"])
def test_the_shortest_clips(suffix, frames, clips, tmp_path):
    drawing = {"codec": "gif"} if suffix == "gif" else {"b_frames": 2}
    path = make(tmp_path / f"x.{suffix}", frames=frames, **drawing)
    stamps, pictures = sequential(path)
    assert clips.header(path).frames == clips.header(path, count=True).frames == frames
    assert same(clips.at_times(path, stamps), pictures)
    assert same(clips.at_times(path, [stamps[-1] + 0.01]), pictures[-1:])
    assert same(clips.at_indices(path, range(frames)), pictures)


def test_nothing_asked_is_nothing_read(clips, tmp_path):
    assert clips.at_times(tmp_path / "none.mp4", []) == clips.at_indices(tmp_path / "none.mp4", []) == []


@pytest.mark.parametrize("name", [kind for kind in KINDS if kind.endswith(".mp4") and "sound" not in kind])
def test_a_clip_that_was_cut_off_ends_early(name, clips, tmp_path):
    """The index comes first and promises pictures whose bytes are not there."""
    drawing = {"frames": FRAMES} | KINDS[name]
    movflags = drawing.get("muxer", {}).get("movflags", "faststart")
    path = make(tmp_path / name, **drawing | {"muxer": drawing.get("muxer", {}) | {"movflags": movflags}})
    stamps, _ = sequential(path)
    whole = clips.header(path).seconds
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    if clips.header(path).seconds < whole:
        return  # fragments say only how long each is
    early = clips.at_times(path, [0.0, 0.2])
    assert number_of(np.asarray(early[1])) - number_of(np.asarray(early[0])) == bisect_right(stamps, 0.2) - 1
    message = rf"^ends after \d\.\d s of {whole:.1f}$"
    with pytest.raises(ClipError, match=message):
        clips.at_times(path, [0.0, stamps[-1]])
    with pytest.raises(ClipError, match=message):
        clips.at_times(path, [stamps[-1]])
    with pytest.raises(ClipError, match=r"^has no frame \d+: it ends after \d+ frames$"):
        clips.at_indices(path, [len(stamps) - 1])


@pytest.mark.parametrize("name", ["x.mkv", "x.ts", "vp9.webm", "x.flv"])
def test_other_containers_that_were_cut_off(name, clips, tmp_path):
    path = make(tmp_path / name, frames=FRAMES * 2, **KINDS[name])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert number_of(np.asarray(clips.at_times(path, [0.4])[0])) == 10
    with pytest.raises(ClipError, match=r"^ends after 2\.\d s of"):
        clips.at_times(path, [4.7])


def test_the_last_picture_is_held_while_the_sound_goes_on(clips, tmp_path):
    """Where only the length of the whole clip is known, pictures that end before it are not missing."""
    path = make(tmp_path / "x.flv", sound=4.0)
    header = clips.header(path)
    assert header.seconds == pytest.approx(4, abs=0.1)
    assert [number_of(array) for array in arrays(clips.at_times(path, [0.5, 3.9]))] == [12, 29]


def test_a_picture_that_is_damaged(clips, tmp_path):
    path = make(tmp_path / "x.mp4", frames=FRAMES, gop=20)
    whole = path.read_bytes()
    at = whole.index(b"mdat") + 4
    begin = at + int((len(whole) - at) * 0.35)
    path.write_bytes(whole[:begin] + bytes([0xA5]) * 300 + whole[begin + 300 :])
    with pytest.raises(ClipError, match=r"^damaged at \d\.\d s"):
        clips.at_times(path, [2.3 * k / 20 for k in range(20)])


def wrong(name: str, folder: Path) -> Path:
    path = folder / name
    match name:
        case "text.mp4":
            path.write_text("no clip\n" * 99)
        case "no-index.mp4":
            whole = make(path).read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        case "nothing.mp4":
            path.write_bytes(b"")
        case "sound.m4a":
            make_sound(path)
        case "cover.mp4":
            make_sound(path, cover=True)
        case "no-frames.mp4" | "no-frames.mkv":
            make(path, frames=0)
        case "folder.mp4":
            path.mkdir()
        case "thin.mp4":
            make(path, aspect=Fraction(1, 20))
        case "askew.mp4":
            make(path, rotation=30)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.mp4", "not a video, or damaged: Invalid data found when processing input"),
        ("no-index.mp4", "not a video, or damaged: Invalid data found when processing input"),
        ("nothing.mp4", "not a video, or damaged: Invalid data found when processing input"),
        ("sound.m4a", "has no pictures, only sound"),
        ("cover.mp4", "has no pictures, only sound"),
        ("no-frames.mp4", "is empty (0 frames)"),
        ("no-frames.mkv", "is empty (0 frames)"),
        ("folder.mp4", "cannot be opened: Is a directory"),
        ("thin.mp4", "has pixels 0.05 times as wide as high"),
        ("askew.mp4", "is turned by 30 degrees"),
    ],
)
def test_what_is_wrong_with_a_clip(name, message, clips, tmp_path):
    path = wrong(name, tmp_path)
    for call in (clips.header, lambda path: clips.at_times(path, [0]), lambda path: clips.at_indices(path, [0])):
        with pytest.raises(ClipError) as error:
            call(path)
        assert str(error.value) == message


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, corpus.write_clips(folder)


def test_the_corpus_says_what_is_expected_of_it(written, clips):
    """Each bad clip is named with its row, by the header where that can tell; no other is."""
    folder, cases = written
    frames = Frames(MediaRecipe(num_frames=8), clips=clips)
    for case in cases:
        path = folder / case.row["video"]
        sample = Sample("train.json:7", case.name, (Turn("user", (Video(path),)), Turn("assistant", ("x",))))
        if case.expected is None or case.late:
            sample = frames.lay_out(sample)
        if case.expected is None:
            sizes = [image.size for image in sample.images]
            assert [picture.size for picture in frames.open(sample)] == sizes and len(sizes) == 8, case
            continue
        with pytest.raises(SampleError) as error:
            (frames.open if case.late else frames.lay_out)(sample)
        said = str(error.value)
        assert said.startswith(f'train.json:7 (id "{case.name}"): ') and "\n  " in said, case
        assert str(path) in said and case.expected in said, (case, said)


def test_pictures_that_are_too_large_are_not_decoded(clips, tmp_path, monkeypatch):
    """By the file's header, by what a player would show, and where a stream changes."""
    monkeypatch.setattr("mantis_lite.data.clips.MAX_PIXELS", 10_000)
    small, large = make(tmp_path / "small.h264"), make(tmp_path / "large.h264", size=(192, 128))
    assert len(clips.at_indices(small, [0, 29])) == 2
    for path in (large, make(tmp_path / "large.mkv", "mjpeg", size=(192, 128))):
        with pytest.raises(ClipError, match=r"^too large: its pictures have (192 x 128|more than 10,000) pixels, "):
            clips.header(path)
    with pytest.raises(ClipError, match=r"^too large: its pictures have 192 x 64 pixels, more than 10,000$"):
        clips.header(make(tmp_path / "wide.mp4", aspect=Fraction(2)))
    small.write_bytes(small.read_bytes() + large.read_bytes())
    assert len(clips.at_indices(small, [0, 20])) == 2
    with pytest.raises(ClipError, match=r"^damaged"):
        clips.at_indices(small, [0, 45])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(clips, tmp_path):
    path = make(tmp_path / "x.mp4")
    path.chmod(0)
    with pytest.raises(ClipError, match=r"^cannot be opened: Permission denied$"):
        clips.header(path)


def test_a_missing_file(clips, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.mp4"):
        clips.header(tmp_path / "none.mp4")


def test_any_name_is_a_file(clips, made, monkeypatch, tmp_path):
    """FFmpeg takes "concat:a" for a protocol, and a relative path is this process's."""
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "pipe:0", "-x ü\n.mp4", os.fsdecode(b"\xff.mp4")):
        Path(name).write_bytes(made("gop10.mp4").read_bytes())
        assert clips.header(Path(name)).frames == FRAMES


@pytest.mark.parametrize("name", ["list.m3u8", "list.txt"])
def test_a_list_of_other_files_is_no_clip(clips, made, tmp_path, name):
    """Which FFmpeg would follow to wherever it leads."""
    elsewhere = made("gop10.mp4")
    text = f"ffconcat version 1.0\nfile '{elsewhere}'\n"
    if name != "list.txt":
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{elsewhere}\n#EXT-X-ENDLIST\n"
    (tmp_path / name).write_text(text)
    with pytest.raises(ClipError, match="is of a kind that is not read as a clip, as a list of other files is not"):
        clips.header(tmp_path / name)


# The process that reads


def pid_of(clips: Clips) -> int:
    return clips._child.process.pid


def runs(pid: int) -> bool:
    """Is there such a process, and not only what is left of one?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def hanging(tmp_path):
    """A file that is opened and never read: nobody writes to it."""
    os.mkfifo(tmp_path / "hangs.mp4")
    return tmp_path / "hangs.mp4"


def test_a_clip_that_hangs_is_given_up(hanging, made):
    clips = Clips(0.5)
    begun = time.monotonic()
    with pytest.raises(ClipError, match=r"^took more than 0\.5 s to read$"):
        clips.header(hanging)
    assert time.monotonic() - begun < 10, "it would hang for ever"
    clips.limit = 20
    assert clips.header(made("gop10.mp4")).frames == FRAMES
    clips.close()


def test_a_clip_that_takes_the_process_down(hanging, made):
    clips = Clips(20)
    clips.header(made("gop10.mp4"))
    pid = pid_of(clips)
    threading.Timer(0.2, os.kill, (pid, signal.SIGSEGV)).start()
    with pytest.raises(ClipError, match=r"^ended the process that reads it \(SIGSEGV\)$"):
        clips.header(hanging)
    assert not Path(f"/proc/{pid}").exists()
    assert clips.header(made("gop10.mp4")).frames == FRAMES
    clips.close()


def test_a_process_killed_between_two_clips_is_no_clips_fault(made):
    clips = Clips(20)
    clips.header(made("gop10.mp4"))
    os.kill(pid_of(clips), signal.SIGKILL)
    assert until(lambda: not clips._child.alive())
    assert clips.header(made("gop10.mp4")).frames == FRAMES
    clips.close()


def test_an_interrupted_call_leaves_no_half_answer(hanging, made):
    clips = Clips(20)
    clips.header(made("gop10.mp4"))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    with pytest.raises(KeyboardInterrupt):
        clips.header(hanging)
    signal.signal(signal.SIGUSR1, before)
    assert clips.header(made("gop10.mp4")).frames == FRAMES
    clips.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_to_all_of_a_run_do_not_end_the_process_that_reads(number, hanging, made):
    """Sent as soon as it is there, while it reads, and while it waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    clips = Clips(60)
    clips._child = child = Child()
    clips._end = child.end
    os.kill(pid_of(clips), number)
    assert clips.header(made("gop10.mp4")).frames == FRAMES
    os.kill(pid_of(clips), number)
    threading.Timer(0.2, os.kill, (pid_of(clips), number)).start()
    clips.limit = 1
    with pytest.raises(ClipError, match="took more than 1 s"):
        clips.header(hanging)
    clips.limit = 60
    assert clips.header(made("gop10.mp4")).frames == FRAMES
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    clips.close()


def test_a_signal_to_the_group_leaves_the_step_its_clips(made):
    """As Ctrl-C in a terminal: the script's own handlers let it finish."""
    script = (
        "import signal, sys; from pathlib import Path; from mantis_lite.data.clips import Clips, SIGNALS\n"
        "seen = []; [signal.signal(number, lambda number, _: seen.append(number)) for number in SIGNALS]\n"
        "clips = Clips(20); clips.header(Path(sys.argv[1])); pid = clips._child.process.pid; print(pid, flush=True)\n"
        "sys.stdin.readline(); frames = clips.header(Path(sys.argv[1])).frames\n"
        "print(frames, clips._child.process.pid == pid, sorted(seen) == sorted(SIGNALS))"
    )
    command = [sys.executable, "-c", script, str(made("gop10.mp4"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as parent:
        pid = int(parent.stdout.readline())
        assert os.getpgid(pid) == parent.pid
        for number in SIGNALS:
            os.killpg(parent.pid, number)
        said, _ = parent.communicate("\n", timeout=20)
    assert said == f"{FRAMES} True True\n"
    assert until(lambda: not runs(pid))


def test_nothing_is_left_behind(made):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        clips = Clips()
        clips.header(made("gop10.mp4"))
        pid = pid_of(clips)
        clips.close()
        clips.close()
        assert not Path(f"/proc/{pid}").exists()
        clips.header(made("gop10.mp4"))
        pid = pid_of(clips)
        del clips
        gc.collect()
        assert not Path(f"/proc/{pid}").exists()
    assert not [warning for warning in seen if warning.category is ResourceWarning]


def test_copies_have_a_process_of_their_own(made):
    clips = Clips(7)
    clips.header(made("gop10.mp4"))
    for other in (copy.deepcopy(clips), pickle.loads(pickle.dumps(clips))):
        assert other.limit == 7
        assert other.header(made("gop10.mp4")) == clips.header(made("gop10.mp4"))
        assert pid_of(other) != pid_of(clips)
        other.close()
    clips.close()


def test_threads_take_turns(clips, made, decoded):
    found = {}

    def read(number):
        found[number] = clips.at_indices(made("gop10.mp4"), [number])

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[number], [decoded("gop10.mp4")[1][number]]) for number in range(8))


def forked(clips, path, answers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = [number_of(np.asarray(clips.at_indices(path, [k])[0])) for k in (3, 40)]
    answers.put((numbers, pid_of(clips)))
    clips.close()


def test_a_forked_process_starts_its_own(clips, made):
    path = made("gop10.mp4")
    clips.header(path)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=forked, args=(clips, path, answers), daemon=True) for _ in range(2)]
    own = pid_of(clips)
    for worker in workers:
        worker.start()
    assert clips.header(path).frames == FRAMES  # meanwhile
    found = [answers.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [numbers for numbers, _ in found] == [[3, 40]] * 2
    assert len({own} | {pid for _, pid in found}) == 3
    assert pid_of(clips) == own
    assert clips.header(path).frames == FRAMES


class Numbers:
    """A dataset of the numbers that a clip's pictures hold."""

    def __init__(self, clips: Clips, path: Path) -> None:
        self.clips, self.path = clips, path

    def __len__(self) -> int:
        return 12

    def __getitem__(self, at: int) -> int:
        return number_of(np.asarray(self.clips.at_times(self.path, [at * 0.04])[0]))


def test_workers_of_a_loader(clips, made):
    from torch.utils.data import DataLoader

    clips.header(made("b-frames.mp4"))
    loader = DataLoader(Numbers(clips, made("b-frames.mp4")), batch_size=None, num_workers=2)
    assert list(loader) == list(range(12))


class Readers(Numbers):
    """As Numbers, of the worker and the process that reads for it."""

    def __getitem__(self, at: int) -> tuple[int, int]:
        super().__getitem__(at)
        return os.getpid(), pid_of(self.clips)


def test_workers_of_a_loader_that_are_killed_leave_no_process(made):
    from torch.utils.data import DataLoader

    loader = DataLoader(Readers(Clips(20), made("b-frames.mp4")), batch_size=None, num_workers=2)
    items = iter(loader)
    first, second = found = dict(islice(items, 2))
    assert len(set(found.values())) == 2 and all(runs(pid) for pid in found.values())
    with pytest.raises(RuntimeError, match="is killed by signal: Killed"):
        os.kill(first, signal.SIGKILL)
        time.sleep(20)  # torch raises here, once
    os.kill(second, signal.SIGKILL)
    assert until(lambda: not any(runs(pid) for pid in found.values()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("state", ["idle", "hung"])
def test_the_process_ends_with_its_parent(state, number, hanging, made):
    script = (
        "import sys; from pathlib import Path; from mantis_lite.data.clips import Clips\n"
        "clips = Clips(60); clips.header(Path(sys.argv[1])); print(clips._child.process.pid, flush=True)\n"
        "clips.header(Path(sys.argv[2])) if sys.argv[3] == 'hung' else sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(made("gop10.mp4")), str(hanging), state]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        assert runs(pid)
        parent.send_signal(number)
    assert until(lambda: not runs(pid))


# As upstream


GOLDEN = SHARED / "golden/forward/video_idefics2.json"
EXAMPLES = SHARED / "data/mantis-examples/chat_video"


@pytest.mark.skipif(not (GOLDEN.is_file() and EXAMPLES.is_dir()), reason="the example clips are not here")
def test_pictures_are_those_that_upstream_saw(clips):
    for case in json.loads(GOLDEN.read_text())["cases"].values():
        path = EXAMPLES / case["sample"]["video"]
        found = clips.at_indices(path, case["frame_indices"])
        assert [hashlib.sha256(picture.tobytes()).hexdigest() for picture in found] == case["frame_rgb_sha256"]
        header = clips.header(path)
        assert (header.frames, list(header.size)) == (case["total_frames"], case["frame_size"])
        rate = float(Fraction(case["average_rate"]))
        times = [index / rate for index in case["frame_indices"]]
        assert [picture.tobytes() for picture in clips.at_times(path, times)] == [p.tobytes() for p in found]
