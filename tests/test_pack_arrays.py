"""Packs in two flat arrays are what lists of lists would be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mantis_lite.data.dataset import pack_dataset
from mantis_lite.data.packs import BLANK, Packs

SAMPLES = 20
rows = st.lists(st.lists(st.integers(BLANK, SAMPLES - 1), max_size=5), max_size=12)
places = st.integers(-14, 14) | st.none()


@given(rows)
def test_they_are_read_as_lists(made):
    packs = Packs.of(made)
    assert list(packs) == made and len(packs) == len(made)
    assert [packs[at] for at in range(-len(made), len(made))] == made + made
    for beyond in (len(made), -len(made) - 1):
        with pytest.raises(IndexError):
            packs[beyond]


@given(rows, places, places, st.sampled_from([None, 1, 2, -1, -3]))
def test_slices_are_those_of_lists(made, start, stop, step):
    assert list(Packs.of(made)[start:stop:step]) == made[start:stop:step]


@given(rows, st.data())
def test_packs_are_taken_and_joined(made, data):
    packs = Packs.of(made)
    order = data.draw(st.lists(st.integers(0, len(made) - 1))) if made else []
    assert list(packs.take(np.array(order, dtype=np.int64))) == [made[at] for at in order]
    at = data.draw(st.integers(0, len(made)))
    assert Packs.join([packs[:at], packs[at:]]) == packs


@given(rows, st.integers(0, 9))
def test_sums_are_over_samples_and_blank_pictures_apart(made, blank):
    values = np.random.default_rng(0).integers(0, 1000, (SAMPLES, 2))
    packs = Packs.of(made)
    samples = [[index for index in row if index != BLANK] for row in made]
    wanted = [values[row].sum(0) + blank * row_.count(BLANK) for row, row_ in zip(samples, made, strict=True)]
    assert packs.sums(values, blank).tolist() == [each.tolist() for each in wanted]
    assert packs.sizes.tolist() == list(map(len, samples))
    assert packs.samples.tolist() == [index for row in samples for index in row]


@given(rows, rows)
def test_they_are_equal_as_lists_are(one, other):
    first, second = Packs.of(one), Packs.of(other)
    assert (first == second) == (first.digest() == second.digest()) == (one == other)
    assert first == Packs.of(one) and first.digest() == Packs.of(one).digest()
    assert first[1:] == Packs.of(one[1:]) and first != one


def test_where_a_pack_ends_is_part_of_what_they_are():
    assert Packs.of([[1], [2, 3]]) != Packs.of([[1, 2], [3]])
    assert Packs.of([[1], [2, 3]]).digest() != Packs.of([[1, 2], [3]]).digest()


def test_they_cannot_be_written():
    packs = Packs.of([[1, 2]])
    for array in (packs.members, packs.ends):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@given(rows)
def test_rows_of_the_dataset_are_the_packs(made):
    dataset = pack_dataset(Packs.of(made), [], None, lambda error: None)
    assert dataset.with_format(None)["pack"][:] == made
