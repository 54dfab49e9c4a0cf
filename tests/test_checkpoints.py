"""A checkpoint is whole or absent: whatever fails, whenever it is killed, and whichever byte of it flips."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers import chat, recipe, write_rows

from mantis_lite.errors import DiskError, ResumeError
from mantis_lite.training.checkpoints import fault, newest, require_space, rotate, saved, sweep, written
from mantis_lite.training.lock import Lock
from mantis_lite.training.start import start


def made(run_dir: Path, step: int) -> Path:
    """A checkpoint with a large file, a small one and one in a folder."""
    run_dir.mkdir(exist_ok=True)
    folder = run_dir / f"checkpoint-{step}"
    with written(folder, size=6000) as beside:
        (beside / "adapter_model.safetensors").write_bytes(random.Random(step).randbytes(5000))
        (beside / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        (beside / "inner").mkdir()
        (beside / "inner/optimizer.pt").write_bytes(random.Random(-step).randbytes(700))
    return folder


def test_two_hundred_flipped_bytes_are_all_found(tmp_path):
    older, newer = made(tmp_path, 9), made(tmp_path, 10)
    assert newest(tmp_path) == (newer, [])
    files = [file for file in newer.rglob("*") if file.is_file()]
    places = [(file, at) for file in files for at in range(file.stat().st_size)]
    small = [place for place in places if place[0].stat().st_size < 1000]  # the manifest and what is easily missed
    drawn = random.Random(0)
    for file, at in drawn.sample(places, 100) + drawn.sample(small, 100):
        sound = file.read_bytes()
        flipped = bytearray(sound)
        flipped[at] ^= 1 << drawn.randrange(8)
        file.write_bytes(flipped)
        found, skipped = newest(tmp_path)
        assert found == older and skipped[0].startswith("checkpoint-10 is skipped: "), (file, at)
        file.write_bytes(sound)
    assert newest(tmp_path) == (newer, [])


def test_what_is_missing_cut_or_added_is_named(tmp_path):
    folder = made(tmp_path, 3)
    state = folder / "trainer_state.json"
    text = state.read_text()
    for change, found in (
        (state.unlink, "trainer_state.json is missing"),
        (lambda: state.write_text(text[:-1]), "trainer_state.json is not as it was written"),
        (lambda: (folder / "training_args.bin").touch(), "training_args.bin was not there when it was saved"),
        (lambda: (folder / "manifest.json").write_text('{"files": 3}'), "manifest.json is damaged"),
        (lambda: (folder / "manifest.json").write_bytes(b"\xff"), "manifest.json is damaged"),
        ((folder / "manifest.json").unlink, "there is no manifest.json"),
    ):
        change()
        assert fault(folder) == found
        (folder / "training_args.bin").unlink(missing_ok=True)
        state.write_text(text)
        if found.endswith("damaged"):
            made(tmp_path, 3)
            assert fault(folder) is None
    with pytest.raises(
        ResumeError, match=r"no checkpoint that is whole; checkpoint-3 is skipped: there is no manifest"
    ):
        newest(tmp_path)


def test_the_newest_are_kept_once_the_newest_is_whole(tmp_path):
    for step in (8, 9, 10):  # by number, not by name or time
        made(tmp_path, step)
    rotate(tmp_path, None)
    assert len(saved(tmp_path)) == 3
    (tmp_path / "checkpoint-10/trainer_state.json").write_text("{")
    rotate(tmp_path, 1)
    assert len(saved(tmp_path)) == 3, "the only whole ones were removed"
    made(tmp_path, 10)
    rotate(tmp_path, 1, best=tmp_path / "checkpoint-8")
    assert [path.name for path in saved(tmp_path)] == ["checkpoint-10", "checkpoint-8"]


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    made(tmp_path, 1)
    for name in ("checkpoint-2.tmp-77/checkpoint-2", "checkpoint-1.tmp-old-77"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipe.yaml.tmp-77-5").write_text("mod")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_a_disk_too_small_is_refused_at_the_start(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, free // 100, 500, keep=3)
    found = (
        r"501 more checkpoints of about .* take .* MB on the disk of .*\n  Free some, set train.save_total_limit=1, or"
    )
    with pytest.raises(DiskError, match=found):
        require_space(tmp_path, free // 100, 500, keep=None)
    with pytest.raises(DiskError, match=r"2 more checkpoints of about .*\n  Free some, or set run_dir to another disk"):
        require_space(tmp_path, free // 2 + free // 100, 1, keep=None)


def test_two_runs_do_not_share_a_folder(tmp_path):
    hold = f"from mantis_lite.training.lock import Lock; from pathlib import Path; Lock(Path({str(tmp_path)!r})).take()"
    command = [sys.executable, "-c", f"{hold}; print('held', flush=True); input()"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ResumeError, match=rf"is in use by process {other.pid} on .*\n  Let it finish, stop it"):
        Lock(tmp_path).take()
    other.kill()
    other.communicate()
    lock = Lock(tmp_path)
    lock.take()  # what held it is dead
    lock.release()


def test_a_folder_that_cannot_be_locked_is_told_of(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(DiskError, match=r"\.lock cannot be written and locked: Is a directory\n  See that the folder"):
        Lock(tmp_path).take()


def test_room_is_asked_for_what_will_be_added(tmp_path):
    for step in (1, 2, 3):
        made(tmp_path, step)
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, int(free / 1.9), 50, keep=3)  # the three that are there make room, one at a time
    with pytest.raises(DiskError, match="4 more checkpoints"):
        require_space(tmp_path, int(free / 1.9), 3, keep=None)


@pytest.fixture
def run(llava_folder, tmp_path):
    """A run that has taken three steps and saved the first two."""
    rows = [chat(f"what is number {i}?", f"number {i} is red") for i in range(12)]
    train = {"max_steps": 3, "learning_rate": 0.01, "samples_per_step": 4, "save_steps": 1}
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = start(
        recipe(llava_folder, data=data, run_dir=str(tmp_path / "run"), train=train, packing={"max_length": 256})
    )
    run.walk()
    shutil.rmtree(tmp_path / "run/checkpoint-3")
    return run


def test_a_run_goes_on_where_its_folder_was_moved_to(run, tmp_path):
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    again = start(run.recipe.model_copy(update={"run_dir": moved}))
    assert again.resumed.checkpoint == moved / "checkpoint-2" and not again.resumed.changed


def faulty(calls: int, happens) -> list[int]:
    """Have the n-th call that changes a file or folder happen otherwise, in this process from now on.

    The list is empty until it has.
    """
    numbers = count()
    reached: list[int] = []

    def call() -> None:
        if next(numbers) == calls:
            reached.append(calls)
            happens()

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
            call()

    sys.addaudithook(hook)
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        call()
        fsync(descriptor)

    os.fsync = counted
    # What writes without Python's knowing: as before it, as half of it was written, and as behind it.
    import peft.peft_model

    for module, name in ((torch, "save"), (peft.peft_model, "safe_save_file")):
        setattr(module, name, halved(getattr(module, name), call))
    return reached


def halved(write, call):
    def writes(content, file, *args, **kwargs):
        call()
        write(content, file, *args, **kwargs)
        whole = Path(file).read_bytes()
        os.truncate(file, len(whole) // 2)
        call()
        Path(file).write_bytes(whole)

    return writes


def fails() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("happens", [fails, lambda: os._exit(9)], ids=["fails", "exits"])
def test_a_save_that_ends_at_any_call_leaves_one_that_is_whole(run, tmp_path, happens):
    """Each try is a process of its own, in which the n-th call fails, or ends the process."""
    folder, aside = tmp_path / "run", tmp_path / "aside"
    shutil.copytree(folder, aside)
    found = []
    for calls in count():
        child = os.fork()
        if child == 0:
            os._exit(saving(run, calls, happens))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        checkpoint, skipped = newest(folder)
        assert not skipped and checkpoint.name in ("checkpoint-2", "checkpoint-3"), f"call {calls}"
        assert checkpoint.name == "checkpoint-3" or code in (6, 9), f"call {calls}"
        found.append((code, checkpoint.name))
        assert code or not (folder / "checkpoint-1").exists(), "nothing was removed"
        sweep(folder)
        assert all(fault(path) is None for path in saved(folder)), f"call {calls}"
        shutil.rmtree(folder)
        shutil.copytree(aside, folder)
        if code == 0:
            break
    assert len(found) > 20 and found[-1] == (0, "checkpoint-3")
    # What fails is told of, or was of no consequence, as PEFT's look for a card is.
    assert {code for code, _ in found[:-1]} == ({6, 33} if happens is fails else {9})
    assert {name for _, name in found[:-1]} == {"checkpoint-2", "checkpoint-3"}


def saving(run, calls: int, happens) -> int:
    """Save with the n-th call at fault: the exit code, 0 where there are not so many, 33 where nothing came of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run.trainer.keep = 2  # so that the first is removed
    reached = faulty(calls, happens)
    try:
        run.trainer.save_now()
        return 33 if reached else 0
    except DiskError as error:
        return error.exit_code if "No space left on device" in str(error) else 1
    except BaseException:
        return 1


def test_a_full_disk_leaves_the_older_checkpoint(run, tmp_path):
    """A file system of a megabyte or two, filled to twenty levels, from no room at all to enough."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        shutil.copytree(tmp_path / "run", small / "run")
        run.trainer.args.output_dir = str(small / "run")
        codes = []
        for level in range(20):
            room = 40_000 * level
            (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - room))
            try:
                run.trainer.save_now()
                codes.append(0)
            except DiskError as error:
                assert "could not be written: " in str(error) and "it takes about" in str(error)
                assert "again. checkpoint-2 is as it was: the run goes on from there." in str(error)
                codes.append(error.exit_code)
            checkpoint, skipped = newest(small / "run")
            assert checkpoint.name == ("checkpoint-2" if codes[-1] else "checkpoint-3") and not skipped
            assert not list((small / "run").glob("*.tmp-*"))
            shutil.rmtree(small / "run/checkpoint-3", ignore_errors=True)
            (small / "filler").unlink()
        assert codes[0] == 6 and codes[-1] == 0 and codes == sorted(codes, reverse=True)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("short", [1, 50_000])
def test_a_file_whose_end_has_no_room_is_told_of(run, tmp_path, short):
    """No file may be larger than the optimizer's is, less a byte at its end or much of it."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = (tmp_path / "run/checkpoint-2/optimizer.pt").stat().st_size - short
    assert all(file.stat().st_size < most for file in (tmp_path / "run/checkpoint-2").glob("*.safetensors"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, kept[1]))
        with pytest.raises(
            DiskError, match=r"(?s)checkpoint-3 could not be written: .*  Free some room, .*checkpoint-2 is as it was"
        ):
            run.trainer.save_now()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert newest(tmp_path / "run")[0].name == "checkpoint-2"


def test_a_folder_that_cannot_be_written_says_so(run, tmp_path, monkeypatch):
    def refuses(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuses)
    with pytest.raises(
        DiskError,
        match=r"checkpoint-3 could not be written: Read-only file system; it takes about .*\n  See that the folder",
    ):
        run.trainer.save_now()


def test_checkpoints_hold_no_pickle_of_the_settings_and_no_tokenizer(run, tmp_path):
    names = {file.name for file in (tmp_path / "run/checkpoint-2").iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert names == weights | {"optimizer.pt", "scheduler.pt", "trainer_state.json", "manifest.json"}
