"""DataLoader workers may die: the same batches come all the same, or the run saves and says where they died."""

import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import chat, logs_of, losses, recipe, write_rows
from safetensors.torch import load_file
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mantis_lite.data.deaths import died
from mantis_lite.data.encode import Encoder
from mantis_lite.training import signals
from mantis_lite.training.checkpoints import newest
from mantis_lite.training.start import start
from mantis_lite.training.workers import WorkerError


def run_of(folder, tmp_path, name: str, workers: int, **more):
    rows = [chat(f"what is number {i}?", f"number {i} is red", id=f"n{i}") for i in range(24)]
    train = {"max_steps": 8, "learning_rate": 0.01, "save_steps": 100, "gradient_accumulation_steps": 2}
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"data": {"sources": data, "eval": 0.1 if more else None}, "run_dir": str(tmp_path / name)} | more
    return start(recipe(folder, packing="off", train=train | {"dataloader_num_workers": workers}, **settings))


@pytest.fixture
def killing(monkeypatch, tmp_path, deaths_seen_soon):
    """Has a worker kill itself when it is given a sample, as often as it is told to."""
    encode = Encoder.encode

    def kill(sample_id: str, times: int) -> None:
        def killed(self, sample):
            deaths = tmp_path / "deaths"
            if sample.id == sample_id and get_worker_info() and deaths.stat().st_size < times:
                with deaths.open("ab") as file:
                    file.write(b".")
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, sample)

        (tmp_path / "deaths").touch()
        monkeypatch.setattr(Encoder, "encode", killed)

    return kill


def sample_of(run, micro_step: int) -> tuple[str, str]:
    """The sample of a pack, in order: its id, and what it is called."""
    (index,) = run.schedule.packs[micro_step]
    return run.prepared.train[index].id, run.prepared.train.called(index)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_batches_come_in_the_same_order_when_a_worker_dies(llava_folder, tmp_path, killing, caplog):
    straight = run_of(llava_folder, tmp_path, "straight", 0).train()
    run = run_of(llava_folder, tmp_path, "run", 2)
    sample_id, called = sample_of(run, 5)  # within a step, the third
    killing(sample_id, 1)
    folder = run.train()
    assert f"a DataLoader worker died at {called}; it is begun anew" in caplog.text
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(folder).items())


@pytest.mark.slow
def test_an_evaluation_is_begun_anew_when_a_worker_dies(llava_folder, tmp_path, killing, caplog):
    settings = {"eval": {"every": 4}}
    straight = run_of(llava_folder, tmp_path, "straight", 0, **settings)
    straight.train()
    run = run_of(llava_folder, tmp_path, "run", 2, **settings)
    sample_id = run.prepared.held_out[1].id
    killing(sample_id, 1)
    run.train()
    assert f"a DataLoader worker died at {run.prepared.held_out.called(1)}; it is begun anew" in caplog.text
    found, wanted = (
        [(log["eval_loss"], log["eval_mean_token_accuracy"]) for log in logs_of(tmp_path / name) if "eval_loss" in log]
        for name in ("run", "straight")
    )
    assert found == wanted and len(found) == 3
    (tmp_path / "deaths").unlink()
    run = run_of(llava_folder, tmp_path, "other", 2, **settings)
    run.trainer.args.eval_on_start = False  # so that there is something to save
    killing(sample_id, 9)
    with pytest.raises(WorkerError, match="4 DataLoader workers died"):
        run.train()
    assert newest(tmp_path / "other")[0].name == "checkpoint-4"


@pytest.mark.slow
def test_a_sample_that_kills_every_worker_ends_the_run_with_a_checkpoint(llava_folder, tmp_path, killing, monkeypatch):
    run = run_of(llava_folder, tmp_path, "run", 2)
    sample_id, called = sample_of(run, 9)
    killing(sample_id, 3)
    run.train()  # three times are forgiven
    run = run_of(llava_folder, tmp_path, "other", 2)
    (tmp_path / "deaths").unlink()
    killing(sample_id, 4)
    others = set(torch.multiprocessing.active_children())
    with pytest.raises(WorkerError, match=r"data: 4 DataLoader workers died, at rows\.jsonl:") as raised:
        run.train()
    assert str(raised.value).count(called.split(" ")[0]) == 4 and "lower train.dataloader_num_workers" in str(
        raised.value
    )
    step = run.trainer.state.global_step
    assert newest(tmp_path / "other")[0].name == f"checkpoint-{step}" and step in (3, 4)
    assert raised.value.exit_code == 3
    assert set(torch.multiprocessing.active_children()) <= others  # even while the error is held


def test_a_batch_that_breaks_off_as_it_is_handed_over_is_a_death(llava_folder, tmp_path, monkeypatch, caplog):
    """Its worker is killed between the batch's arrival and that of its memory: the sample is known all the same."""
    straight = run_of(llava_folder, tmp_path, "straight", 0).train()
    handed = _MultiProcessingDataLoaderIter._try_get_data
    calls = iter(range(100))

    def broken_off(self, *args):
        found = handed(self, *args)
        if found[0] and next(calls) == 4:
            victim = self._workers[0]
            os.kill(victim.pid, signal.SIGKILL)
            raise ConnectionResetError(104, "Connection reset by peer")
        return found

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", broken_off)
    folder = run_of(llava_folder, tmp_path, "run", 2).train()
    assert "a DataLoader worker died at rows.jsonl:" in caplog.text and next(calls) > 5
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(folder).items())
    with pytest.raises(ConnectionError, match="Caught"):
        died(ConnectionError("Caught ConnectionError in DataLoader worker process 0."))


def test_workers_leave_signals_to_the_trainer_but_do_not_outlive_it(llava_folder, tmp_path, monkeypatch):
    """Ctrl-C reaches the whole group."""
    monkeypatch.setattr(signals, "GRACE", 2)
    run = run_of(llava_folder, tmp_path, "run", 1)
    for loader in (run.trainer.get_train_dataloader(), run.trainer.get_eval_dataloader(run.trainer.train_dataset)):
        others = set(torch.multiprocessing.active_children())
        iterator = iter(loader)
        next(iterator)
        (worker,) = set(torch.multiprocessing.active_children()) - others
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(worker.pid, number)
        assert sum(1 for _ in iterator) == len(loader) - 1
    iterator = iter(run.trainer.get_train_dataloader())
    next(iterator)
    (worker,) = set(torch.multiprocessing.active_children()) - others
    worker.terminate()  # as Python does of a process that ends by an error
    worker.join(30)
    assert not worker.is_alive()
    iterator.close()
