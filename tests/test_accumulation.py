"""One pack, several packs a step and no packing at all are one and the same step of the real trainer."""

import json

import numpy as np
import pytest
from helpers import chat, recipe, write_rows

from mantis_lite.data.collate import collate
from mantis_lite.models.activations import decoder_layers
from mantis_lite.training.start import start

ROWS = [
    chat("How do they differ?", "One is red, the other blue.", images=(1, 2)),
    chat("Only words here, but many of them, so that it is long.", "None to be seen!", "Sure?", "Yes."),
    chat("Name it: <image>", "A dog", images=(6,)),
    chat("<image> and <image>, then <image>", "A, b and c.", images=(3, 4, 5)),
]
STEPS = 3  # each over all four samples, so that the weights a step leaves behind are compared too


def started(tmp_path, folder, packing, accumulation: int, **settings):
    data = write_rows(tmp_path / f"rows-{accumulation}.jsonl", ROWS)
    # Plain SGD: Adam would blow rounding up where a gradient is next to nothing.
    train = {"max_steps": STEPS, "gradient_accumulation_steps": accumulation, "learning_rate": 0.05}
    memory = {"optimizer": "sgd", "checkpointing": settings.pop("checkpointing", "off")}
    run_dir = tmp_path / f"run-{accumulation}"
    settings |= {"packing": packing, "train": train, "memory": memory, "run_dir": str(run_dir), "data": data}
    return start(recipe(folder, **settings))


def steps_of(run) -> list[tuple[float, float]]:
    """The loss and gradient norm of each step."""
    run.trainer.train()
    logs = map(json.loads, (run.recipe.run_dir / "metrics.jsonl").read_text().splitlines())
    return [(log["loss"], log["grad_norm"]) for log in logs if "grad_norm" in log]


@pytest.mark.parametrize(("method", "checkpointing"), [("lora", "off"), ("full", "full")])
def test_packs_and_accumulation_are_one_step(tmp_path, folder_of, family, method, checkpointing):
    settings = {"method": method, "checkpointing": checkpointing}
    one = started(tmp_path, folder_of(family), {"max_length": 2000}, 1, **settings)
    two_longest = int(np.sort(one.prepared.train.lengths[:, 0])[-2:].sum())
    two = started(tmp_path, folder_of(family), {"max_length": two_longest}, 2, **settings)
    four = started(tmp_path, folder_of(family), "off", 4, **settings)
    for run, each in ((one, 4), (two, 2), (four, 1)):
        assert [len(pack) for pack in run.schedule.packs] == [each] * (4 // each) * STEPS
    encoded = [one.encoder.encode(sample) for sample in one.prepared.train]
    together = collate(encoded, one.encoder.vision.batch)
    at_first = one.trainer.model.eval()(**together).loss.item()
    expected = steps_of(one)
    assert expected[0][0] == pytest.approx(at_first, abs=1e-5)
    assert len(expected) == STEPS and expected[-1][0] < expected[0][0]
    for run in (two, four):
        layers = decoder_layers(run.trainer.model)
        assert layers and {layer.gradient_checkpointing for layer in layers} == {checkpointing == "full"}
        for (loss, norm), (wanted_loss, wanted_norm) in zip(steps_of(run), expected, strict=True):
            assert loss == pytest.approx(wanted_loss, abs=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-5)
