"""A step with nothing to learn, as its rows broke when they were decoded, has a loss and gradients of 0, not of NaN."""

import math

import numpy as np
import pytest
import torch
from helpers import chat, logs_of, recipe, write_rows

from mantis_lite.data.collate import collate
from mantis_lite.data.encode import IGNORE
from mantis_lite.training.start import start

ROWS = [chat("What? <image>", f"A thing, number {at}.", images=(at + 4,)) for at in range(4)]
BROKEN = 2


@pytest.fixture
def started(tmp_path, folder_of):
    """A run of four rows, a step each, one of whose pictures is cut short behind its header."""

    def make(family: str):
        data = write_rows(tmp_path / "rows.jsonl", ROWS)
        file = tmp_path / f"rows-{BROKEN}-0.png"
        file.write_bytes(file.read_bytes()[:-600])
        settings = {"data": {"sources": data, "on_bad_row": "skip"}, "packing": "off", "run_dir": str(tmp_path / "run")}
        train = {"num_train_epochs": 1, "gradient_accumulation_steps": 1, "save_strategy": "no", "learning_rate": 0.05}
        return start(recipe(folder_of(family), train=train, **settings))

    return make


def test_a_whole_step_without_a_token_to_learn(started, family, tmp_path):
    run = started(family)
    at = list(run.schedule.packs).index([BROKEN])
    run.trainer.train()
    logs = [log for log in logs_of(tmp_path / "run") if "loss" in log]
    steps = [(log["loss"], log["grad_norm"]) for log in logs]
    assert len(steps) == 4 and steps.pop(at) == (0, 0)
    assert all(0 < figure < math.inf for step in steps for figure in step)
    assert all(parameter.isfinite().all() for parameter in run.trainer.model.parameters())


@pytest.mark.parametrize("count", [None, 0])
def test_masked_rows_beside_none_and_beside_others(started, count):
    """Alone a masked row's gradients are 0; beside others it changes nothing of theirs."""
    run = started("llava")
    model, trainer, encoder = run.trainer.model.train(), run.trainer, run.encoder
    sound = encoder.encode(run.prepared.train[0])
    masked = encoder.encode(run.prepared.train[1])
    masked = type(masked)(**{**vars(masked), "labels": np.full_like(masked.labels, IGNORE)})

    def gradients(samples, items) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss = trainer.compute_loss(model, collate(samples, encoder.vision.batch), num_items_in_batch=items)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    loss, zeros = gradients([masked, encoder.nothing()], count if count is None else torch.tensor(count))
    assert loss == 0 and all(not gradient.any() for gradient in zeros)
    alone, beside = gradients([sound], None), gradients([sound, masked], None)
    assert beside[0] == pytest.approx(alone[0], abs=1e-6) and alone[0] > 0
    for one, other in zip(alone[1], beside[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
