"""The packs of a whole run: epochs, steps, and rows that are encoded when they are asked for."""

from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from helpers import by_size, chat
from torch.utils.data import DataLoader

from mantis_lite.data.collate import collate
from mantis_lite.data.dataset import collate_packs, pack_dataset
from mantis_lite.data.packs import Packs
from mantis_lite.data.prepare import Samples
from mantis_lite.data.schedule import Schedule, pack_epoch, schedule
from mantis_lite.data.schema import parse
from mantis_lite.errors import SampleError
from mantis_lite.recipe import PackingRecipe

PACKING = PackingRecipe(max_length=100)
lay_out = partial(collate_packs, vision=by_size().vision)


def samples_of(count: int = 40) -> Samples:
    """Lengths alone: from 10 to 49 tokens, in no order."""
    zeros = np.zeros(count, dtype=np.int64)
    lengths = np.stack([10 + np.random.default_rng(0).permutation(count) % 40, zeros], axis=1)
    return Samples(
        rows=[], weights=[1.0], source=zeros, row=np.arange(count), lengths=lengths, images=zeros, digest=zeros
    )


SAMPLES = samples_of()
PACKS = len(pack_epoch(SAMPLES, PACKING))


def epochs_of(made: Schedule) -> list[Packs]:
    ends = list(accumulate(made.epoch_sizes))
    return [made.packs[end - size : end] for end, size in zip(ends, made.epoch_sizes, strict=True)]


def indices(packs) -> list[int]:
    return sorted(i for pack in packs for i in pack)


@pytest.mark.parametrize("packing", [PACKING, PackingRecipe(enabled=False)], ids=["on", "off"])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_an_epoch_has_every_sample_once(packing, epochs):
    made = schedule(SAMPLES, packing, {"num_train_epochs": epochs})
    assert [indices(epoch) for epoch in epochs_of(made)] == [list(range(40))] * epochs
    assert sum(made.epoch_sizes) == len(made.packs) == made.steps
    assert len(set(map(str, epochs_of(made)))) == epochs  # each in another order
    for number, epoch in enumerate(epochs_of(made)):
        planned = pack_epoch(SAMPLES, packing, number)
        early = epoch[:2] if number == 0 else []  # see below
        assert list(epoch[len(early) :]) == [pack for pack in planned if pack not in early]


@pytest.mark.parametrize("accumulation", [1, 3, PACKS])
def test_the_costliest_packs_come_in_the_first_two_steps(accumulation):
    """So that a run that does not fit fails at once; in the second step the optimiser's moments are there as well."""
    made = schedule(SAMPLES, PACKING, {"num_train_epochs": 1, "gradient_accumulation_steps": accumulation})
    planned = pack_epoch(SAMPLES, PACKING)
    if accumulation == PACKS:
        assert made.packs == planned
        return
    sums = np.array([SAMPLES.lengths[pack].sum(0) for pack in planned])
    costs = {str(pack): (total / np.maximum(sums.max(0), 1)).sum() for pack, total in zip(planned, sums, strict=True)}
    assert costs[str(made.packs[accumulation])] == max(costs.values())
    assert costs[str(made.packs[0])] == sorted(costs.values())[-2]


def test_packing_off_is_one_sample_a_pack():
    made = schedule(SAMPLES, PackingRecipe(enabled=False), {"num_train_epochs": 1})
    assert [len(pack) for pack in made.packs] == [1] * 40
    assert list(made.packs) != sorted(made.packs)


def test_three_epochs_where_nothing_is_said():
    assert len(schedule(SAMPLES, PACKING, {}).epoch_sizes) == 3  # TrainingArguments' own default


def test_half_an_epoch_more():
    made = schedule(SAMPLES, PACKING, {"num_train_epochs": 1.5})
    assert made.packs == schedule(SAMPLES, PACKING, {"num_train_epochs": 2}).packs[: PACKS + -(-PACKS // 2)]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_max_steps(steps, accumulation):
    train = {"max_steps": steps, "gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
    made = schedule(SAMPLES, PACKING, train)
    assert made.steps == steps and len(made.packs) == steps * accumulation
    longer = {"num_train_epochs": len(made.epoch_sizes), "gradient_accumulation_steps": accumulation}
    whole = schedule(SAMPLES, PACKING, longer).packs
    assert made.packs == whole[: len(made.packs)]
    assert len(made.epoch_sizes) == -(-len(made.packs) // PACKS)


@pytest.mark.parametrize(
    ("train", "accumulation"),
    [
        ({}, 1),
        ({"gradient_accumulation_steps": 4}, 4),
        ({"samples_per_step": 10}, round(10 * PACKS / 40)),
        ({"samples_per_step": 1}, 1),
        ({"tokens_per_step": 500}, round(500 * PACKS / int(SAMPLES.lengths[:, 0].sum()))),
        ({"tokens_per_step": 1}, 1),
    ],
    ids=str,
)
def test_packs_in_a_step(train, accumulation):
    made = schedule(SAMPLES, PACKING, train | {"num_train_epochs": 1})
    assert made.per_step == accumulation
    assert made.steps == -(-PACKS // accumulation)


def test_samples_per_step_without_packing_is_accumulation():
    assert schedule(SAMPLES, PackingRecipe(enabled=False), {"samples_per_step": 8}).per_step == 8


@pytest.mark.parametrize(
    "train",
    [{"num_train_epochs": 2}, {"num_train_epochs": 2, "samples_per_step": 9}, {"num_train_epochs": 1}],
    ids=str,
)
def test_epochs_done_grow_to_their_number(train):
    made = schedule(SAMPLES, PACKING, train)
    done = [made.epoch(step) for step in range(made.steps + 1)]
    assert done[0] == 0 and done[-1] == train["num_train_epochs"]
    assert all(a < b for a, b in pairwise(done))
    if made.per_step == 1:
        assert made.epoch(made.epoch_sizes[0]) == 1 and made.epoch(1) == 1 / made.epoch_sizes[0]


def test_the_share_of_an_epoch_begun():
    made = schedule(SAMPLES, PACKING, {"num_train_epochs": 1.5})
    assert made.epoch(made.steps) == pytest.approx(1.5, abs=1 / PACKS)


ENCODER = by_size()
ROWS = [chat(f"Hi {at}", "Ho" * (at + 1), images=tuple(range(at))) for at in range(4)]
BROKEN = chat("Hi", "Ho", images=(1,))
BROKEN["images"][0]["bytes"] = BROKEN["images"][0]["bytes"][:200]  # its header is sound


def parsed(*rows) -> list:
    return [parse(row, f"rows:{at}", None) for at, row in enumerate(rows, 1)]


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=0)


def refuse(error: SampleError) -> None:
    raise error


def test_a_row_is_a_pack_encoded_when_asked_for():
    samples = parsed(*ROWS, BROKEN)  # the broken one is in no pack, and so never opened
    dataset = pack_dataset(Packs.of([[3, 0], [1]]), samples, ENCODER, refuse)
    assert len(dataset) == 2
    for row, pack in zip(range(2), ([3, 0], [1]), strict=True):
        same(lay_out([dataset[row]]), collate([ENCODER.encode(samples[i]) for i in pack]))


def test_workers_give_the_same_batches():
    dataset = pack_dataset(Packs.of([[3, 0], [1, 2]]), parsed(*ROWS), ENCODER, refuse)
    here, there = (list(DataLoader(dataset, 1, num_workers=n, collate_fn=lay_out)) for n in (0, 1))
    for one, other in zip(here, there, strict=True):
        same(one, other)


def test_a_picture_that_breaks_when_decoded():
    samples = parsed(ROWS[0], BROKEN)
    told: list[SampleError] = []
    dataset = pack_dataset(Packs.of([[0, 1], [1]]), samples, ENCODER, told.append)
    assert len(dataset[0]["encoded"]) == 1
    assert [error.where for error in told] == ["rows:2"]
    (nothing,) = dataset[1]["encoded"]  # no sample is left of this pack: two tokens without loss stand in
    assert len(nothing) == 2 and (nothing.labels == -100).all() and not nothing.pixels
    with pytest.raises(SampleError, match="rows:2"):
        pack_dataset(Packs.of([[0, 1]]), samples, ENCODER, refuse)[0]


def test_a_worker_tells_which_row_broke():
    dataset = pack_dataset(Packs.of([[1]]), parsed(ROWS[0], BROKEN), ENCODER, refuse)
    with pytest.raises(SampleError, match=r"^rows:2"):
        list(DataLoader(dataset, 1, num_workers=1, collate_fn=lay_out))


def test_a_hundred_samples_that_break_in_a_row_are_an_error():
    """The disk with the pictures is gone then; those that break here and there are counted elsewhere."""
    told: list[SampleError] = []
    dataset = pack_dataset(Packs.of([[1], [0, 1]]), parsed(ROWS[0], BROKEN), ENCODER, told.append)
    for _ in range(150):
        assert len(dataset[1]["encoded"]) == 1
    for _ in range(99):
        assert len(dataset[0]["encoded"]) == 1
    with pytest.raises(SampleError, match=r"^rows:2: the last of 101 rows in a row that cannot be read: .*\n  Replace"):
        dataset[0]
    assert len(told) == 150 + 100


def test_the_order_is_by_seed():
    plans = [pack_epoch(SAMPLES, PackingRecipe(max_length=100, seed=seed)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
