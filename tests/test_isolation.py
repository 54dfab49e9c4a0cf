"""No sample of a pack sees another: packed equals separate, and the mistakes that would break it do break it."""

from copy import deepcopy

import pytest
import torch
from helpers import chat, tiny_llava
from torch.nn.functional import cosine_similarity

from mantis_lite.data.collate import collate
from mantis_lite.data.encode import IGNORE
from mantis_lite.data.schema import parse
from mantis_lite.models.attention import use_attention

ATTENTIONS = ["segment", "sdpa", "eager"]
ROWS = [
    chat("How do they differ?", "One is red, the other blue.", images=(1, 2)),
    chat("Only words here.", "None to be seen!", "Sure?", "Yes."),
    chat("<image> and <image>, then <image>", "A, b and c.", images=(3, 4, 5)),
    chat("Name it: <image>", "A dog", images=(6,)),
]
OTHER = chat("Something else <image> altogether <image>", "Two cats, perhaps three", images=(7, 8))


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def samples_of(encoder, rows=ROWS):
    return [encoder.encode(parse(row, "rows:1", None)) for row in rows]


def batch_of(samples, dtype=torch.float32):
    batch = collate(samples)
    return batch | ({"pixel_values": batch["pixel_values"].to(dtype)} if "pixel_values" in batch else {})


def with_attention(model, name: str, dtype=torch.float32):
    made = deepcopy(model).to(dtype)
    use_attention(made, name)
    return made


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits[0]


def summed_loss(model, batch) -> torch.Tensor:
    labels = batch["labels"][0, 1:]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def loss_and_gradient(model, batches) -> tuple[float, torch.Tensor]:
    """Mean loss over the trained tokens of all batches, and its gradient in every parameter, laid end to end."""
    model.zero_grad()
    trained = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    loss = sum(summed_loss(model, batch) for batch in batches) / trained
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_packed_is_separate(model, encoder, attention, dtype):
    model, samples = with_attention(model, attention, dtype), samples_of(encoder)
    packed, gradient = loss_and_gradient(model, [batch_of(samples, dtype)])
    separate, summed = loss_and_gradient(model, [batch_of([sample], dtype) for sample in samples])
    # transformers' eager attention takes its softmax in fp32 whatever the model is in.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if attention == "eager" else 1e-12
    assert packed == pytest.approx(separate, abs=tolerance)
    assert cosine_similarity(gradient, summed, dim=0) >= 0.99999
    assert gradient.norm() == pytest.approx(summed.norm().item(), rel=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_models_own_loss_is_the_mean_over_trained_tokens(model, encoder, attention):
    model, samples = with_attention(model, attention), samples_of(encoder)
    with torch.no_grad():
        own = model(**batch_of(samples)).loss.item()
    assert own == pytest.approx(loss_and_gradient(model, [batch_of([s]) for s in samples])[0], abs=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_another_neighbour_changes_nothing(model, encoder, attention):
    model = with_attention(model, attention)
    first, other, last = samples_of(encoder, [ROWS[0], OTHER, ROWS[2]])
    after_one, after_other = (
        logits_of(model, batch_of([first, last])),
        logits_of(model, batch_of([other, last])),
    )
    torch.testing.assert_close(after_one[-len(last) :], after_other[-len(last) :], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batch: batch | {"attention_mask": torch.ones_like(batch["input_ids"])},
        lambda batch: {key: value for key, value in batch.items() if key != "use_cache"},
    ],
    ids=["attention_mask", "use_cache"],
)
def test_what_the_batch_leaves_out_would_leak(model, encoder, spoil):
    """The control: with either mistake the test above would fail."""
    model = with_attention(model, "sdpa")
    first, other, last = samples_of(encoder, [ROWS[0], OTHER, ROWS[2]])
    after_one, after_other = (logits_of(model, spoil(batch_of([s, last]))) for s in (first, other))
    assert (after_one[-len(last) :] - after_other[-len(last) :]).abs().max() > 1e-2


def test_segment_attention_is_that_of_transformers(model, encoder):
    batch = batch_of(samples_of(encoder))
    segment, sdpa = (logits_of(with_attention(model, name), batch) for name in ("segment", "sdpa"))
    torch.testing.assert_close(segment, sdpa, rtol=0, atol=1e-5)


@pytest.mark.parametrize("key", ["cu_seq_lens_q", "max_length_q"])
def test_segment_attention_asks_for_boundaries(model, encoder, key):
    batch = batch_of(samples_of(encoder))
    del batch[key]
    with pytest.raises(AssertionError, match="without the boundaries"):
        logits_of(with_attention(model, "segment"), batch)


def test_only_the_language_model_attends_by_segments(model):
    model = with_attention(model, "segment")
    assert model.get_decoder().config._attn_implementation == "mantis_segment"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
