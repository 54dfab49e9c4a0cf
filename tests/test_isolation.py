"""No sample of a pack sees another: packed equals separate, and the mistakes that would break it do break it."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from accelerate.utils import recursively_apply
from families import M_ROPE
from helpers import chat, recipe
from torch.nn.functional import cosine_similarity

from mantis_lite.data.collate import collate
from mantis_lite.data.encode import IGNORE
from mantis_lite.data.schema import parse
from mantis_lite.errors import RecipeError
from mantis_lite.models.attention import (
    BLOCK,
    KERNELS,
    block_mask,
    chosen_attention,
    require_attention,
    segment_attention,
    unavailable,
    use_attention,
)
from mantis_lite.models.load import load_model

ATTENTIONS = ["auto", "sdpa", "eager"]
ROWS = [
    chat("How do they differ?", "One is red, the other blue.", images=(1, 2)),
    chat("Only words here.", "None to be seen!", "Sure?", "Yes."),
    chat("<image> and <image>, then <image>", "A, b and c.", images=(3, 4, 5)),
    chat("Name it: <image>", "A dog", images=(6,)),
    chat("Which of them is red?", "The last.", images=tuple(range(10, 22))),
]
TEXTS = [chat("Only words here.", "None to be seen!"), chat("And here?", "None either, I think.")]
OTHER = chat("Something else <image> altogether <image>", "Two cats, perhaps three", images=(7, 8))


@pytest.fixture(scope="session")
def model_of(checkpoint_of):
    return cache(lambda name: load_model(checkpoint_of(name), recipe()).eval())


@pytest.fixture(scope="session")
def model(model_of, family):
    return model_of(family)


@pytest.fixture(scope="session")
def encoder(encoder_of, family):
    return encoder_of(family)


@pytest.fixture(scope="session")
def samples(encoder):
    return samples_of(encoder, ROWS)


def samples_of(encoder, rows):
    return [encoder.encode(parse(row, "rows:1", None)) for row in rows]


def batch_of(encoder, samples, dtype=torch.float32):
    """A pack, its pixels in the model's precision, however a family lays them out."""
    batch = collate(samples, encoder.vision.batch)
    return recursively_apply(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


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
def test_packed_is_separate(model, encoder, samples, attention, dtype):
    model = with_attention(model, attention, dtype)
    packed, gradient = loss_and_gradient(model, [batch_of(encoder, samples, dtype)])
    separate, summed = loss_and_gradient(model, [batch_of(encoder, [sample], dtype) for sample in samples])
    # transformers' eager attention takes its softmax in fp32 whatever the model is in.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if attention == "eager" else 1e-12
    assert packed == pytest.approx(separate, abs=tolerance)
    assert cosine_similarity(gradient, summed, dim=0) >= 0.99999
    assert gradient.norm() == pytest.approx(summed.norm().item(), rel=1e-4)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_pack_without_a_picture(model, encoder, attention):
    model, samples = with_attention(model, attention), samples_of(encoder, TEXTS)
    batch = batch_of(encoder, samples)
    assert not {"pixel_values", "image_patches", "image_grid_thw"} & batch.keys()
    packed, gradient = loss_and_gradient(model, [batch])
    separate, summed = loss_and_gradient(model, [batch_of(encoder, [sample]) for sample in samples])
    assert packed == pytest.approx(separate, abs=1e-5)
    torch.testing.assert_close(gradient, summed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_models_own_loss_is_the_mean_over_trained_tokens(model, encoder, samples, attention):
    model = with_attention(model, attention)
    with torch.no_grad():
        own = model(**batch_of(encoder, samples)).loss.item()
    assert own == pytest.approx(loss_and_gradient(model, [batch_of(encoder, [s]) for s in samples])[0], abs=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_another_neighbour_changes_nothing(model, encoder, attention):
    model = with_attention(model, attention)
    first, other, last = samples_of(encoder, [ROWS[0], OTHER, ROWS[2]])
    after_one, after_other = (logits_of(model, batch_of(encoder, [before, last])) for before in (first, other))
    torch.testing.assert_close(after_one[-len(last) :], after_other[-len(last) :], rtol=0, atol=2e-5)


def with_mask(batch):
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def without_use_cache(batch):
    return {key: value for key, value in batch.items() if key != "use_cache"}


def leak(model, encoder, spoil) -> float:
    """How much a sample's logits change with its neighbour, in batches with a mistake."""
    first, other, last = samples_of(encoder, [ROWS[0], OTHER, ROWS[2]])
    after_one, after_other = (logits_of(model, spoil(batch_of(encoder, [s, last]))) for s in (first, other))
    return (after_one[-len(last) :] - after_other[-len(last) :]).abs().max().item()


@pytest.mark.parametrize("spoil", [with_mask, without_use_cache])
def test_what_the_batch_leaves_out_would_leak(model, encoder, spoil):
    """The control: with either mistake the test above would fail."""
    assert leak(with_attention(model, "sdpa"), encoder, spoil) > 1e-2


@pytest.mark.parametrize("name", M_ROPE)
@pytest.mark.parametrize("rows", [[1, 2, 3], [0]], ids=["three rows", "one row"])
def test_other_than_four_rows_of_positions_would_leak_or_mislead(model_of, encoder_of, name, rows):
    """transformers finds the samples of a pack in the first of four rows, and nowhere else."""
    model, encoder = with_attention(model_of(name), "sdpa"), encoder_of(name)
    samples = samples_of(encoder, ROWS)
    right = batch_of(encoder, samples)
    assert right["position_ids"].shape[0] == 4
    positions = right["position_ids"][rows] if len(rows) == 3 else right["position_ids"][0]
    wrong = right | {"position_ids": positions}
    assert (logits_of(model, wrong) - logits_of(model, right)).abs().max() > 1e-2


@pytest.mark.parametrize("name", M_ROPE)
def test_m_rope_positions_are_the_models_own(model_of, encoder_of, name):
    model, encoder = model_of(name), encoder_of(name)
    for sample in samples_of(encoder, [*ROWS, *TEXTS]):
        batch = batch_of(encoder, [sample])
        ids = batch["input_ids"]
        placeholders = (ids == model.config.image_token_id).int()
        own, _ = model.model.get_rope_index(ids, placeholders, image_grid_thw=batch.get("image_grid_thw"))
        assert torch.equal(batch["position_ids"][1:], own)


def test_segment_attention_is_that_of_transformers(model, encoder, samples):
    batch = batch_of(encoder, samples)
    segment, sdpa = (logits_of(with_attention(model, name), batch) for name in ("segment", "sdpa"))
    torch.testing.assert_close(segment, sdpa, rtol=0, atol=2e-5)


@pytest.mark.parametrize("key", ["cu_seq_lens_q", "max_length_q"])
def test_segment_attention_asks_for_boundaries(model_of, encoder_of, key):
    encoder = encoder_of("llava")
    batch = batch_of(encoder, samples_of(encoder, TEXTS))
    del batch[key]
    with pytest.raises(AssertionError, match="without the boundaries"):
        logits_of(with_attention(model_of("llava"), "segment"), batch)


@pytest.mark.parametrize(
    ("name", "gpu", "installed", "words"),
    [
        ("auto", None, [], "one SDPA call a sample, as there is no GPU"),
        ("auto", (7, 5), ["flash_attn"], "one SDPA call a sample, as the GPU is older than Ampere"),
        (
            "auto",
            (8, 0),
            [],
            "PyTorch's variable-length kernel over all samples of a pack at once, as flash_attn is not installed",
        ),
        (
            "auto",
            (8, 0),
            ["flash_attn", "flash_attn_interface"],
            "FlashAttention 2 over all samples of a pack at once",
        ),
        ("auto", (9, 0), ["flash_attn", "flash_attn_interface"], "FlashAttention 3 over all samples of a pack at once"),
        ("flex", (8, 0), ["triton"], "FlexAttention with a mask of blocks, as the recipe says"),
        ("sdpa", (8, 0), [], "transformers' own sdpa, as the recipe says: with a T x T mask for packs"),
    ],
)
def test_what_attends_and_why_is_said(monkeypatch, name, gpu, installed, words):
    a_machine_with(monkeypatch, gpu, installed)
    assert chosen_attention(name) == words
    assert chosen_attention("auto", use_cpu=True) == "one SDPA call a sample, as train.use_cpu says"
    require_attention(name)


@pytest.mark.parametrize(
    ("name", "gpu", "fault"),
    [
        ("varlen", None, "there is no GPU"),
        ("flash2", (7, 5), "the GPU is older than Ampere"),
        ("flash2", (8, 0), "flash_attn is not installed"),
        ("flash3", (8, 0), "the GPU is no Hopper"),
        ("flash3", (9, 0), "flash_attn_interface is not installed"),
        ("flex", (8, 0), "triton is not installed"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused(monkeypatch, name, gpu, fault):
    a_machine_with(monkeypatch, gpu, [])
    with pytest.raises(RecipeError, match=rf"memory.attention: {name}, but {fault}\n  Set memory.attention=auto."):
        require_attention(name)


def a_machine_with(monkeypatch, gpu, installed):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: gpu)
    monkeypatch.setattr("mantis_lite.models.attention.find_spec", lambda name: name if name in installed else None)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [[300, 1, 127, 128, 5], [40], [128, 256], [700]])
def test_the_mask_of_blocks_is_the_packs(lengths, window):
    """What FlexAttention reads: each block that is looked at, and within it each pair; against the T x T mask."""
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    total = sum(lengths)
    blocks = block_mask(ends, total, window)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    q, k = torch.arange(total)[:, None], torch.arange(total)
    wanted = (sample[:, None] == sample) & (q >= k) & (q - k < (window or total))
    looked_at = blocks.to_dense()[0, 0].bool().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    seen = blocks.mask_mod(torch.tensor(0), torch.tensor(0), q, k) & looked_at[:total, :total]
    assert torch.equal(seen, wanted)
    assert block_mask(ends, total, window) is blocks


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 16])
def test_no_sample_sees_another_by_any_kernel_there_is(kernel, window):
    """Values and gradients of the others changed beyond measure, one sample's stay to the bit; and they are right."""
    if fault := unavailable(kernel):
        pytest.skip(f"{kernel}: {fault}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [5, 130, 1, 64]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    torch.manual_seed(0)
    shapes = [(1, 8, 200, 64), (1, 2, 200, 64), (1, 2, 200, 64)]
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    others = [x.clone() for x in tensors]
    for x in others:
        x[:, :, :5] *= -3
        x[:, :, 135:] += 7

    def attend(given, how):
        given = [x.detach().requires_grad_() for x in given]
        out, _ = segment_attention(None, *given, None, None, 0.0, ends, max(lengths), window, kernel=how)
        (out.float() ** 2)[:, 5:135].sum().backward()
        return [out[:, 5:135], *(x.grad[:, :, 5:135] for x in given)]

    found = attend(tensors, kernel)
    for a, b in zip(found, attend(others, kernel), strict=True):
        assert torch.equal(a, b)
    for a, exact in zip(found, attend([x.double() for x in tensors], "segment"), strict=True):
        assert (a.double() - exact).norm() < 0.02 * exact.norm()


def test_attention_is_computed_as_autocast_has_it():
    """Rotary positions in float32 make queries and keys so, beside values of 16 bits; a kernel takes one kind."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 30, 16).unbind()
    ends = torch.tensor([0, 10, 30], dtype=torch.int32)
    exact, _ = segment_attention(None, query, key, value, None, None, 0.0, ends, 20)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = segment_attention(None, query, key, value.bfloat16(), None, None, 0.0, ends, 20)
    assert out.dtype == torch.bfloat16 and (out.float() - exact).norm() < 0.02 * exact.norm()


def test_only_the_language_model_attends_by_segments(model):
    model = with_attention(model, "auto")
    attention = {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}
    by_segment = {name for name, found in attention.items() if found == "mantis_segment"}
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    assert decoder in by_segment and all(name.startswith(decoder) for name in by_segment)
