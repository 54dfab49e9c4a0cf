"""Packs that are worked on at once cost about the same, whatever the number of GPUs; and steps do not depend on it."""

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from mantis_lite.data.balance import LIMIT, group
from mantis_lite.data.cost import Cost
from mantis_lite.data.packs import BLANK, Packs
from mantis_lite.data.prepare import Samples
from mantis_lite.data.schedule import Schedule, schedule
from mantis_lite.recipe import PackingRecipe

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import balance, planning

LENGTHS = SHARED / "data/lengths/lengths-720548.npz"
COST = Cost(per_token=1.0, per_token_squared=1 / 500, per_patch=0.5)
PACKING = PackingRecipe(max_length=4000)


def samples_of(count: int = 30_000) -> Samples:
    """Log-normal text with one to four pictures of 40 tokens and 60 patches."""
    random = np.random.default_rng(1)
    images = random.integers(1, 5, count)
    tokens = random.lognormal(4.5, 0.5, count).astype(np.int64) + 40 * images
    zeros = np.zeros(count, dtype=np.int64)
    return Samples([], [1.0], zeros, zeros, np.stack([tokens, 60 * images], axis=1), images, zeros)


SAMPLES = samples_of()


def above_mean(made: Schedule, samples: Samples = SAMPLES, of: int | None = None) -> np.ndarray:
    """By how much the costliest of each full group is above the mean; `of` so many packs, or the schedule's own."""
    size = of or made.balance
    costs = made.packs.sums(COST.of(samples.lengths))
    groups = costs[: len(costs) // size * size].reshape(-1, size)
    return groups.max(1) / groups.mean(1) - 1


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_packs_worked_on_at_once_cost_about_the_same(ranks, epochs):
    train = {"num_train_epochs": epochs, "gradient_accumulation_steps": 2}
    made = schedule(SAMPLES, PACKING, train, ranks, cost=COST)
    assert made.balance == ranks and made.per_step == 2 * ranks
    assert above_mean(made)[:-1].max() <= LIMIT  # the last have what was left over
    assert not made.notices
    planned = schedule(SAMPLES, PACKING, train)
    assert above_mean(planned, of=ranks).mean() > LIMIT  # those that nothing was done about
    assert (np.bincount(made.packs.samples) == epochs).all()
    assert made.packs.sums(SAMPLES.lengths[:, 0]).max() <= PACKING.max_length
    assert len(planned.packs) <= len(made.packs) <= 1.03 * len(planned.packs)
    assert sum(made.epoch_sizes) == len(made.packs) and made.epoch(made.steps) == epochs


def test_a_cost_that_is_another_makes_other_groups():
    by_tokens = Cost(per_token=1.0, per_token_squared=0.0, per_patch=0.0)
    made = schedule(SAMPLES, PACKING, {"num_train_epochs": 1}, 8, cost=by_tokens)
    assert above_mean(made).mean() > 0.05


def test_the_order_is_not_by_cost():
    made = schedule(SAMPLES, PACKING, {"num_train_epochs": 1}, 8, cost=COST)
    costs = made.packs.sums(COST.of(SAMPLES.lengths))
    groups = costs[: len(costs) // 8 * 8].reshape(-1, 8)
    assert abs(np.corrcoef(np.arange(len(groups) - 1), groups[:-1].mean(1))[0, 1]) < 0.2
    ranks = groups[:-1].argmax(1)  # which GPU has the costliest
    assert np.bincount(ranks, minlength=8).max() < len(ranks) / 3


def test_packs_are_beside_others_in_another_epoch():
    off = PackingRecipe(enabled=False)
    made = schedule(SAMPLES, off, {"num_train_epochs": 2}, 4, cost=COST)
    beside = made.packs.members[: len(made.packs) // 4 * 4].reshape(-1, 4).tolist()
    assert len(set(map(frozenset, beside))) > 0.95 * len(beside)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_steps_depend_on_the_recipe_and_not_on_the_gpus(ranks):
    packing = PACKING.model_copy(update={"balance": 8})
    train = {"num_train_epochs": 2, "samples_per_step": 100}
    assert schedule(SAMPLES, packing, train, ranks, cost=COST) == schedule(SAMPLES, packing, train, 5, cost=COST)


def test_max_steps_are_so_many_steps_of_groups():
    made = schedule(SAMPLES, PACKING, {"max_steps": 140, "gradient_accumulation_steps": 3}, 8, cost=COST)
    assert made.steps == 140 and len(made.packs) == 140 * 24
    assert above_mean(made).max() <= LIMIT
    longer = schedule(SAMPLES, PACKING, {"max_steps": 150, "gradient_accumulation_steps": 3}, 8, cost=COST)
    assert longer.packs[: len(made.packs)] == made.packs


def test_half_an_epoch_more():
    made, whole = (schedule(SAMPLES, PACKING, {"num_train_epochs": n}, 8, cost=COST) for n in (1.5, 2))
    assert made.packs == whole.packs[: len(made.packs)]
    assert len(made.packs) / len(whole.packs) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_costliest_groups_come_in_the_first_two_steps(accumulation):
    train = {"num_train_epochs": 1, "gradient_accumulation_steps": accumulation}
    made = schedule(SAMPLES, PACKING, train, 4, cost=COST)
    sums = made.packs.sums(SAMPLES.lengths)
    shares = (sums / sums.max(0)).sum(1)
    groups = shares[: len(shares) // 4 * 4].reshape(-1, 4).max(1)
    assert groups[accumulation] == groups.max() == shares.max()
    assert groups[0] == np.sort(groups)[-2]


def test_a_sample_that_costs_more_than_all_comes_early_and_is_told():
    """No pack is like its own: those beside it are done before it, once."""
    samples = samples_of()
    samples.lengths[7] = [4000, 9000]
    made = schedule(samples, PACKING, {"num_train_epochs": 1}, 8, cost=COST)
    assert [7] in list(made.packs[:16])
    over = np.flatnonzero(above_mean(made, samples)[:-1] > LIMIT)
    assert over.tolist() == [list(made.packs).index([7]) // 8]
    count = (len(made.packs) - 1) // 8
    assert made.notices == [
        f"1 of {count} times that 8 packs are worked on at once, one costs over 3% more than their mean: "
        "the other GPUs wait for it"
    ]


def test_few_packs_are_as_much_alike_as_they_can_be():
    """Eighty packs, of four samples at most, for eight GPUs."""
    samples, packing = samples_of(300), PackingRecipe(max_length=1000)
    made, planned = (schedule(samples, packing, {"num_train_epochs": 1}, ranks, cost=COST) for ranks in (8, 1))
    above = above_mean(made, samples)
    assert above[:-1].mean() < 0.05 < 0.08 < above_mean(planned, samples, of=8).mean()
    assert not made.notices and above[:-1].max() <= LIMIT


@pytest.mark.parametrize("packing", [PACKING, PackingRecipe(enabled=False)], ids=["on", "off"])
@pytest.mark.parametrize("count", [1, 5, 8, 9, 40])
def test_fewer_packs_than_gpus(count, packing):
    """All of them are trained on, alike or not."""
    made = schedule(samples_of(count), packing, {"num_train_epochs": 3}, 8, cost=COST)
    assert (np.bincount(made.packs.samples, minlength=count) == 3).all()
    assert made.epoch(made.steps) == 3


small = st.lists(st.integers(1, 100), min_size=1, max_size=80)


@given(small, st.integers(2, 9), st.booleans())
def test_every_pack_is_in_a_group_or_left_over(costs, size, packs_anew):
    values = np.array(costs, dtype=np.float64)
    packs = Packs.of([[at] for at in range(len(costs))])
    repack = (lambda samples, most: Packs.of([[at] for at in samples])) if packs_anew else None
    found = group(packs, size, lambda packs: packs.sums(values), repack, np.random.default_rng(0))
    assert sorted([*found.packs.members, *found.left.members]) == list(range(len(costs)))
    assert len(found.packs) % size == 0 and 1 <= len(found.left) <= size
    of_groups = values[found.packs.members].reshape(-1, size)
    assert found.unlike == sum(row.max() > (1 + LIMIT) * row.mean() for row in of_groups)
    assert len(costs) <= size or values[found.packs.members].max() == values.max()


@settings(max_examples=50)
@given(st.integers(1, 7), st.integers(1, 12), st.integers(1, 30), st.sampled_from([None, 3]))
def test_packs_laid_out_for_so_many_gpus(ranks, per_step, count, touch):
    """As a loop over steps, micro-steps and GPUs deals them out."""
    rows = [[at, at + 1] for at in range(count)]
    made = Schedule(Packs.of(rows), [count], per_step, touch=touch)
    nothing = [] if touch is None else [BLANK]
    wanted = []
    for begin in range(0, count, per_step):
        step = rows[begin : begin + per_step]
        for micro_step in range(0, len(step) if begin + per_step > count else per_step, ranks):
            dealt = step[micro_step : micro_step + ranks]
            wanted += dealt + [nothing] * (ranks - len(dealt))
    laid_out = made.laid_out(ranks)
    assert list(laid_out) == wanted
    each = made.accumulation(ranks)
    for step in range(count // per_step):
        mine = [laid_out[(step * each + k) * ranks + r] for k in range(each) for r in range(ranks)]
        assert [row for row in mine if row != nothing] == rows[step * per_step : (step + 1) * per_step]
    assert made.laid_out(1) is made.packs


@pytest.mark.parametrize(
    ("train", "ranks", "per_step", "said"),
    [
        ({"samples_per_step": 400}, 8, 40, None),
        (
            {"samples_per_step": 20},
            8,
            8,
            "a step has 8 packs of about 80 samples in all, and train.samples_per_step asks for 20: "
            "each of 8 GPUs takes one at least",
        ),
        (
            {"samples_per_step": 120},
            8,
            16,
            "a step has 16 packs of about 160 samples in all, and train.samples_per_step asks for 120: "
            "packs of a step are a multiple of 8",
        ),
        (
            {"tokens_per_step": 250},
            1,
            1,
            "a step has 1 packs of about 1,000 tokens in all, and train.tokens_per_step asks for 250: "
            "it takes one at least",
        ),
        (
            {"tokens_per_step": 2400},
            1,
            2,
            "a step has 2 packs of about 2,000 tokens in all, and train.tokens_per_step asks for 2,400: "
            "packs are not divided",
        ),
        ({"gradient_accumulation_steps": 4}, 8, 32, None),
        ({}, 8, 8, None),
    ],
    ids=str,
)
def test_a_step_that_is_not_as_asked_says_so(train, ranks, per_step, said):
    zeros = np.zeros(1000, dtype=np.int64)
    samples = Samples([], [1.0], zeros, zeros, np.stack([zeros + 100, zeros], axis=1), zeros, zeros)
    packing = PackingRecipe(max_length=1000)
    made = schedule(samples, packing, train | {"num_train_epochs": 1}, ranks, cost=COST)
    assert made.per_step == per_step
    assert made.notices == ([said] if said else [])


@pytest.mark.skipif(not LENGTHS.is_file(), reason="the shared data is not beside this checkout")
@pytest.mark.parametrize("ranks", balance.RANKS)
@pytest.mark.parametrize("kind", planning.KINDS)
def test_mantis_instructs_lengths_are_balanced(kind, ranks):
    """The bar: each micro-step and step of a run over 8, 64 and 512 GPUs, but for the last."""
    samples = planning.samples_of(LENGTHS, kind)
    made = schedule(samples, PackingRecipe(), {"num_train_epochs": 1, "gradient_accumulation_steps": 2}, ranks)
    costs = Cost().of(samples.lengths)
    assert balance.above_mean(made, costs, ranks).max() <= LIMIT
    assert balance.above_mean(made, costs, ranks, micro_steps=2).max() <= LIMIT
    assert (np.bincount(made.packs.samples) == 1).all()
