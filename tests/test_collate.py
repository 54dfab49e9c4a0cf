"""The batch, tensor by tensor: what it holds, and what it must never hold."""

import numpy as np
import pytest
import torch
from helpers import by_size

from mantis_lite.data.collate import collate
from mantis_lite.data.dataset import collate_packs
from mantis_lite.data.encode import Encoded


def encoded(ids: list[int], labels: list[int], pictures: int = 0, value: float = 0.0) -> Encoded:
    picture = {"pixel_values": np.full((1, 3, 2, 2), value, dtype=np.float32)}
    return Encoded(np.array(ids), np.array(labels), [picture] * pictures)


A = encoded([5, 6, 7], [-100, 6, 7], pictures=2, value=1.0)
B = encoded([8], [8])
C = encoded([9, 10], [9, 10], pictures=1, value=3.0)


def test_a_pack_of_three():
    batch = collate([A, B, C])
    pixels = batch.pop("pixel_values")
    expected = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]]),
        "labels": torch.tensor([[-100, 6, 7, -100, -100, 10]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 4, 6], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 3, 4, 6], dtype=torch.int32),
        "max_length_q": 3,
        "max_length_k": 3,
        "use_cache": False,
    }
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=0)  # dtype too
    assert pixels.shape == (3, 3, 2, 2) and pixels.dtype == torch.float32
    assert pixels[:, 0, 0, 0].tolist() == [1, 1, 3]


@pytest.mark.parametrize("samples", [[A], [B], [A, B, C], [C, A]], ids=["one", "text", "three", "two"])
def test_nothing_that_lets_samples_see_each_other(samples):
    batch = collate(samples)
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False
    starts = batch["cu_seq_lens_q"][:-1].long()
    assert (batch["labels"][0, starts] == -100).all()
    assert (batch["position_ids"][0, starts] == 0).all()


def test_without_pictures_there_are_no_pixels():
    assert "pixel_values" not in collate([B])


def test_the_samples_are_left_as_they_were():
    collate([A, C])
    assert C.labels.tolist() == [9, 10]


def test_packs_side_by_side_are_one_row():
    rows = [{"encoded": [A]}, {"encoded": [B, C]}]
    parts, whole = collate_packs(rows, by_size().vision), collate([A, B, C])
    assert parts.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=0)
