"""What a signal sets off in the process that trains, and in none of its own."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from mantis_lite.data.clips import SIGNALS
from mantis_lite.errors import Stopped
from mantis_lite.training.signals import Signals, agreed


def handlers() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


def test_handlers_are_as_they_were_behind_it_and_ignored_signals_stay_so():
    first = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    before = handlers()
    try:
        with Signals(lambda: None) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.caught is None
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.caught == signal.SIGUSR1, "the first says why"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert handlers() == before
    finally:
        signal.signal(signal.SIGHUP, first)


def test_a_thread_trains_without_handlers():
    before, within = handlers(), []

    def train():
        with Signals(lambda: None):
            within.extend(handlers())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert within == before


def test_a_signal_at_the_last_step_lets_the_run_end():
    signals = Signals(lambda: None)
    signals.caught = signal.SIGTERM
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=True)
    args = SimpleNamespace(device=torch.device("cpu"))
    signals.on_step_end(args, SimpleNamespace(global_step=5, max_steps=5), control)
    assert control.should_evaluate and not control.should_training_stop
    signals.on_step_end(args, SimpleNamespace(global_step=4, max_steps=5), control)
    assert control.should_save and control.should_training_stop and not control.should_evaluate


def test_ranks_agree_on_a_signal_that_one_has_caught(tmp_path):
    """Two processes that gather by gloo: both stop at the same step, or neither."""
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=rank, world_size=2)
            cpu = torch.device("cpu")
            nobody, one = agreed(None, cpu), agreed(signal.SIGUSR1 if rank else None, cpu)
            os._exit(0 if (nobody, one) == (None, signal.SIGUSR1) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_what_a_stopped_run_says_and_ends_with(tmp_path, number, code):
    stopped = Stopped(number, tmp_path / "checkpoint-4")
    assert stopped.exit_code == code
    assert str(stopped) == f"stopped by {number.name}: saved {tmp_path}/checkpoint-4; run the same command to go on"
    assert str(Stopped(number, None)) == f"stopped by {number.name}: before the first step"
