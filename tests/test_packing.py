"""Packs hold every sample once, stay within both budgets, and are as few as best-fit decreasing makes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mantis_lite.data.packing import PATCH_UNITS, Length, fill, plan

TOKENS = 100
PATCHES = 10 * PATCH_UNITS  # a multiple: then rounding a sample's share up to a unit changes nothing

tokens = st.integers(1, TOKENS) | st.integers(1, 3) | st.integers(TOKENS - 3, TOKENS)
patches = st.integers(0, PATCH_UNITS).map(lambda units: 10 * units)
samples = st.lists(st.builds(Length, tokens, patches), max_size=60)
seeds = st.integers(0, 2**32 - 1)
budgets = st.sampled_from([Length(TOKENS, 0), Length(TOKENS, PATCHES)])


def total(lengths: list[Length], pack: list[int]) -> Length:
    return Length(sum(lengths[i].tokens for i in pack), sum(lengths[i].patches for i in pack))


def holds(budget: Length, found: Length) -> bool:
    return found.tokens <= budget.tokens and (not budget.patches or found.patches <= budget.patches)


def best_fit_decreasing(lengths: list[Length], budget: Length) -> list[Length]:
    """The textbook's, the longest sample first and each into the fullest pack: what each pack holds."""
    packs: list[Length] = []
    for size in sorted(lengths, reverse=True):
        joined = [Length(held.tokens + size.tokens, held.patches + size.patches) for held in packs]
        fitting = [at for at, held in enumerate(joined) if holds(budget, held)]
        if fitting:
            best = max(fitting, key=joined.__getitem__)
            packs[best] = joined[best]
        else:
            packs.append(size)
    return packs


def next_fit(lengths: list[Length]) -> int:
    packs, held = 0, TOKENS
    for length in lengths:
        held = held + length.tokens if held + length.tokens <= TOKENS else length.tokens
        packs += held == length.tokens
    return packs


@given(samples, budgets, seeds, st.integers(0, 5))
def test_every_sample_once_within_both_budgets(lengths, budget, seed, epoch):
    packs = plan(lengths, budget, seed, epoch)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(pack and holds(budget, total(lengths, pack)) for pack in packs)


@given(st.lists(st.builds(Length, tokens, st.integers(0, 777)), max_size=60), seeds)
def test_the_patch_budget_holds_where_shares_are_rounded(lengths, seed):
    budget = Length(TOKENS, 777)
    assert all(holds(budget, total(lengths, pack)) for pack in plan(lengths, budget, seed))


@given(samples, budgets, seeds)
def test_no_two_packs_could_be_one(lengths, budget, seed):
    held = [total(lengths, pack) for pack in plan(lengths, budget, seed)]
    pairs = [(a, b) for at, a in enumerate(held) for b in held[:at]]
    assert not any(holds(budget, Length(a.tokens + b.tokens, a.patches + b.patches)) for a, b in pairs)


@given(samples, budgets, seeds)
def test_packs_are_those_of_best_fit_decreasing(lengths, budget, seed):
    if not budget.patches:
        lengths = [Length(length.tokens, 0) for length in lengths]
    packs = plan(lengths, budget, seed)
    assert sorted(total(lengths, pack) for pack in packs) == sorted(best_fit_decreasing(lengths, budget))


@given(samples, budgets, seeds, st.integers(0, 5))
def test_same_seed_and_epoch_same_plan(lengths, budget, seed, epoch):
    array = np.array(lengths, dtype=np.int32).reshape(-1, 2)
    assert plan(lengths, budget, seed, epoch) == plan(array, budget, seed, epoch)


def lognormal(count: int) -> list[Length]:
    random = np.random.default_rng(0)
    return [Length(int(n), 0) for n in np.clip(random.lognormal(3, 0.7, count), 1, TOKENS)]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)], ids=["epoch", "seed"])
def test_another_seed_or_epoch_is_another_order_of_other_packs(seed, epoch):
    lengths = lognormal(300)
    first, other = (plan(lengths, Length(TOKENS, 0), *key) for key in ((0, 0), (seed, epoch)))
    assert len(first) == len(other)
    assert first != other
    assert set(map(frozenset, first)) != set(map(frozenset, other))  # equal lengths change places


def test_fewer_packs_than_next_fit():
    lengths = lognormal(1000)
    packs = plan(lengths, Length(TOKENS, 0), seed=0)
    assert len(packs) < next_fit(lengths)
    assert fill(lengths, len(packs), TOKENS) > 0.97 > fill(lengths, next_fit(lengths), TOKENS)


def test_packs_are_not_ordered_by_length():
    lengths = lognormal(1000)
    longest = [max(lengths[i].tokens for i in pack) for pack in plan(lengths, Length(TOKENS, 0), seed=0)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_the_patch_budget_alone_can_part_samples():
    lengths = [Length(1, 60), Length(1, 60)]
    assert len(plan(lengths, Length(TOKENS, 100), 0)) == 2
    assert len(plan(lengths, Length(TOKENS, 0), 0)) == 1


def test_nothing_to_pack():
    assert not len(plan([], Length(TOKENS, PATCHES), 0))
    assert fill([], 0, TOKENS) == 0


@pytest.mark.parametrize("length", [Length(TOKENS + 1, 0), Length(1, PATCHES + 1)], ids=["tokens", "patches"])
def test_a_sample_larger_than_a_pack_never_gets_here(length):
    with pytest.raises(AssertionError, match="than a pack"):
        plan([length], Length(TOKENS, PATCHES), 0)


def test_fill_is_the_share_of_positions_with_a_token():
    assert fill([Length(30, 9), Length(45, 9)], 1, TOKENS) == 0.75
