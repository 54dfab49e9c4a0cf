"""Prompts read in one pack go on as each does alone: as transformers generates, and as without a cache."""

import numpy as np
import pytest
import torch
from helpers import picture, recipe

from mantis_lite.data.collate import collate
from mantis_lite.data.encode import Encoded
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.generate import ends_of, generate
from mantis_lite.models.load import load_model, placed
from mantis_lite.prefill import greedy, log_likelihoods, read

TEXTS = ["What is it?", "Say more of the second picture, the red one, and of the first.", "Text alone.", "And?"]
IMAGES = [(0,), (1, 2), (), (3, 4, 5)]


@pytest.fixture(scope="session")
def asked(checkpoint_of, encoder_of):
    """A family's model, its encoder and prompts of unlike length, some without a picture."""

    def opened(name: str):
        encoder, model = encoder_of(name), load_model(checkpoint_of(name), recipe(), dtype=torch.float32).eval()
        turns = [
            Turn("user", (*(Image(picture(seed)) for seed in seeds), text))
            for text, seeds in zip(TEXTS, IMAGES, strict=True)
        ]
        samples = [Sample(f"row {at}", None, (turn,)) for at, turn in enumerate(turns)]
        return model, encoder, [encoder.encode_prompt(sample) for sample in samples]

    return opened


def joined(prompt: Encoded, ids: list[int]) -> Encoded:
    """A prompt with tokens behind it, whose positions go on from the furthest."""
    more = np.array(ids, dtype=np.int64)
    positions = prompt.positions
    if positions is not None:
        behind = positions.max() + 1 + np.arange(len(ids))
        positions = np.concatenate([positions, np.broadcast_to(behind, (len(positions), len(ids)))], 1)
    both = np.concatenate([prompt.input_ids, more])
    return Encoded(both, both, prompt.pixels, positions, prompt.spans)


@torch.no_grad()
def alone(model, encoder, prompt: Encoded, ids: list[int]) -> torch.Tensor:
    """Logits (N + 1, V) behind a prompt and at each of the ids, in one forward without a cache."""
    batch = collate([joined(prompt, ids)], encoder.vision.batch)
    del batch["labels"]
    return model(**placed(batch, model)).logits[0, len(prompt) - 1 :].float()


def test_packed_prompts_go_on_as_each_alone(family, asked):
    model, encoder, prompts = asked(family)
    together = read(model, encoder, prompts)
    said = greedy(model, together, [-1], 6)
    for at, prompt in enumerate(prompts):
        logits = alone(model, encoder, prompt, said[at])
        torch.testing.assert_close(together.logits[at], logits[0], atol=1e-4, rtol=1e-4)
        assert logits[:-1].argmax(-1).tolist() == said[at]
        by_itself = read(model, encoder, [prompt])
        torch.testing.assert_close(by_itself.logits[0], logits[0], atol=1e-4, rtol=1e-4)
        assert greedy(model, by_itself, [-1], 6) == [said[at]]
    assert greedy(model, together, [-1], 6) == said  # what was read can be asked again


def test_answers_end_each_in_its_time_as_transformers_own(family, asked):
    model, encoder, prompts = asked(family)
    free = greedy(model, read(model, encoder, prompts), [-1], 6)
    ends = [*ends_of(model, encoder), free[1][2]]
    ended = [row[: next((at for at, token in enumerate(row) if token in ends), 6)] for row in free]
    assert greedy(model, read(model, encoder, prompts), ends, 6) == ended != free
    assert greedy(model, read(model, encoder, prompts), ends[:-1], 6) == generate(model, encoder, prompts, 6)


def test_options_are_as_likely_as_each_alone(family, asked):
    model, encoder, prompts = asked(family)
    options = [[[5, 6, 7], [8], [9, 10]], [[11]], [[12, 13]], [[5], [6, 9, 9, 9, 9]]]
    found = log_likelihoods(model, read(model, encoder, prompts), options)
    for prompt, several, scores in zip(prompts, options, found, strict=True):
        for ids, score in zip(several, scores, strict=True):
            each = alone(model, encoder, prompt, ids)[:-1].log_softmax(-1)
            assert score == pytest.approx(each[range(len(ids)), ids].sum().item(), abs=1e-4)
