"""Score heads: packed is separate, what is read where, the losses, and files that go from class to class."""

import io
import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from accelerate.utils import recursively_apply
from helpers import SHARED, chat, recipe
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, LlamaConfig

from mantis_lite.data.collate import collate
from mantis_lite.data.encode import IGNORE
from mantis_lite.data.schema import parse
from mantis_lite.models import head
from mantis_lite.models.attention import use_attention
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.head import classifier_of, score_loss

ROWS = [
    chat("How do they differ?", "One is red, the other blue.", images=(1, 2)),
    chat("Only words here.", "None to be seen!", "Sure?", "Yes."),
    chat("Name it: <image>", "A dog", images=(6,)),
]
TEXTS = [chat("Only words here.", "None to be seen!"), chat("And here?", "None either, I think."), chat("So?", "No.")]
LABELS = 3
NAN = float("nan")

# Of three samples: in part unknown, known, a stand-in of which nothing is known.
TARGETS = {
    "regression": torch.tensor([[0.5, NAN, -1.0], [2.0, 0.1, 0.3], [NAN] * 3], dtype=torch.float64),
    "multi_label_classification": torch.tensor([[1.0, 0.0, NAN], [0.0, 1.0, 1.0], [NAN] * 3]),
    "single_label_classification": torch.tensor([2, 0, IGNORE]),
}
KNOWN = {"regression": 5, "multi_label_classification": 5, "single_label_classification": 2}
CASES = [
    ("segment", "regression", torch.float32),
    ("segment", "single_label_classification", torch.float64),
    ("sdpa", "multi_label_classification", torch.float32),
    ("sdpa", "regression", torch.float64),
    ("eager", "single_label_classification", torch.float32),
    ("eager", "multi_label_classification", torch.float64),
]
MISSING = {"score.weight", "score.bias"}


def config_of(checkpoint, **settings):
    config = deepcopy(checkpoint.config)
    config.num_labels = LABELS
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def load(folder, checkpoint, seed=0, **settings):
    """A classifier in its evaluating form and what transformers said of its loading."""
    torch.manual_seed(seed)
    settings = {"config": config_of(checkpoint), "dtype": torch.float32} | settings
    classifier = classifier_of(checkpoint.config)
    model, info = classifier.from_pretrained(folder, output_loading_info=True, **settings)
    checkpoint.family.adapt(model, checkpoint.image_processor)
    return model.eval(), info


@pytest.fixture(scope="session")
def loaded_of(checkpoint_of):
    return cache(lambda name: load(checkpoint_of(name).name, checkpoint_of(name)))


@pytest.fixture(scope="session")
def model_of(loaded_of):
    return lambda name: loaded_of(name)[0]


@pytest.fixture(scope="session")
def saved_of(model_of, tmp_path_factory):
    """The folder that a family's classifier was saved to."""

    @cache
    def save(name):
        folder = tmp_path_factory.mktemp(f"{name}-scores")
        model_of(name).save_pretrained(folder)
        return folder

    return save


def samples_of(encoder, rows):
    return [encoder.encode(parse(row, "rows:1", None)) for row in rows]


def batch_of(encoder, samples, dtype=torch.float32, labels=None):
    """A pack, its pixels in the model's precision, with targets in place of the labels of its tokens."""
    batch = collate(samples, encoder.vision.batch)
    del batch["labels"]
    batch = recursively_apply(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
    return batch if labels is None else batch | {"labels": labels}


def with_attention(model, name, dtype=torch.float32, **settings):
    made = deepcopy(model).to(dtype)
    use_attention(made, name)
    for key, value in settings.items():
        setattr(made.config, key, value)
    return made


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def loss_and_gradient(model, batches, count=None) -> tuple[float, torch.Tensor]:
    """The losses of all batches added up, and their gradient in every parameter, laid end to end."""
    model.zero_grad()
    loss = sum(model(**batch, num_items_in_batch=count).loss for batch in batches)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("attention", "problem", "dtype"), CASES, ids=str)
def test_packed_is_separate(model_of, encoder_of, family, attention, problem, dtype):
    """The mean of one pack is what packs of one add up to by the number of a whole step's targets."""
    model = with_attention(model_of(family), attention, dtype, problem_type=problem)
    encoder, targets = encoder_of(family), TARGETS[problem]
    samples = samples_of(encoder, ROWS)
    each = [batch_of(encoder, [s], dtype, labels=t[None]) for s, t in zip(samples, targets, strict=True)]
    packed = batch_of(encoder, samples, dtype, labels=targets)
    # transformers' eager attention takes its softmax in fp32 whatever the model is in.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if attention == "eager" else 1e-12
    separate = torch.cat([logits_of(model, batch) for batch in each])
    torch.testing.assert_close(logits_of(model, packed), separate, rtol=0, atol=tolerance)
    loss, gradient = loss_and_gradient(model, [packed])
    summed, gradients = loss_and_gradient(model, each, KNOWN[problem])
    assert loss == pytest.approx(summed, abs=tolerance) and loss > 0
    assert gradient.isfinite().all()
    assert (gradient - gradients).norm() <= tolerance * gradients.norm()


def padded(samples, side, pad=0):
    """The plain batch of transformers: rows of one length and a mask."""
    longest = max(map(len, samples))
    rows, masks = [], []
    for sample in samples:
        gap = [longest - len(sample), 0] if side == "left" else [0, longest - len(sample)]
        rows.append(np.pad(sample.input_ids, gap, constant_values=pad))
        masks.append(np.pad(np.ones(len(sample), dtype=np.int64), gap))
    return {"input_ids": torch.tensor(np.stack(rows)), "attention_mask": torch.tensor(np.stack(masks))}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "idefics2"])
def test_a_padded_batch_is_a_pack(model_of, encoder_of, name, side):
    encoder, model = encoder_of(name), with_attention(model_of(name), "sdpa")
    samples = samples_of(encoder, TEXTS)
    assert len({len(sample) for sample in samples}) > 1
    packed = logits_of(model, batch_of(encoder, samples))
    batch = padded(samples, side)
    torch.testing.assert_close(logits_of(model, batch), packed, rtol=0, atol=1e-5)
    alone = {"input_ids": torch.tensor(samples[0].input_ids)[None]}
    torch.testing.assert_close(logits_of(model, alone), packed[:1], rtol=0, atol=1e-5)
    model.config.score_token_ids, marked = with_marks(samples)
    packed = logits_of(model, batch_of(encoder, marked))
    torch.testing.assert_close(logits_of(model, padded(marked, side)), packed, rtol=0, atol=1e-5)


def with_marks(samples):
    """LABELS tokens that no sample has, and the samples with each of them near the end, in another order each."""
    used = {int(token) for sample in samples for token in sample.input_ids}
    spare = [token for token in range(50, 200) if token not in used][:LABELS]
    marked = []
    for number, sample in enumerate(samples):
        ids = sample.input_ids.copy()
        ids[-2 * LABELS : -LABELS] = np.roll(spare, number)
        marked.append(replace(sample, input_ids=ids))
    return spare, marked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_labels_read_at_tokens_of_their_own(model_of, encoder_of, dtype):
    encoder = encoder_of("qwen2_vl")
    spare, samples = with_marks(samples_of(encoder, ROWS))
    settings = {"problem_type": "regression", "score_token_ids": spare}
    model = with_attention(model_of("qwen2_vl"), "sdpa", dtype, **settings)
    packed, each = batch_of(encoder, samples, dtype), [batch_of(encoder, [sample], dtype) for sample in samples]
    logits, tolerance = logits_of(model, packed), 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(logits, torch.cat([logits_of(model, b) for b in each]), rtol=0, atol=tolerance)
    with torch.no_grad():
        hidden = model.model(**packed).last_hidden_state[0]
    for row, (start, end) in enumerate(pairwise(packed["cu_seq_lens_q"].tolist())):
        for label, token in enumerate(spare):
            at = start + packed["input_ids"][0, start:end].tolist().index(token)
            score = hidden[at] @ model.score.weight[label] + model.score.bias[label]
            torch.testing.assert_close(logits[row, label], score.detach(), rtol=0, atol=1e-6)
    targets = TARGETS["regression"]
    _, gradient = loss_and_gradient(model, [packed | {"labels": targets}])
    summed = [batch | {"labels": target[None]} for batch, target in zip(each, targets, strict=True)]
    _, gradients = loss_and_gradient(model, summed, KNOWN["regression"])
    assert (gradient - gradients).norm() <= tolerance * gradients.norm()


def test_a_token_to_read_at_is_once_in_each_sample(model_of, encoder_of):
    encoder = encoder_of("llava")
    spare, samples = with_marks(samples_of(encoder, TEXTS))
    model = with_attention(model_of("llava"), "sdpa", score_token_ids=spare)
    none, twice = (sample.input_ids.copy() for sample in samples[:2])
    none[none == spare[1]] = spare[0] + 1000
    twice[1] = spare[1]
    none, twice = replace(samples[0], input_ids=none % 300), replace(samples[1], input_ids=twice)
    for wrong in ([none, samples[1]], [samples[0], twice], [none, twice]):
        with pytest.raises(AssertionError, match=f"token {spare[1]} is not once in each sample"):
            logits_of(model, batch_of(encoder, wrong))
    model.config.score_token_ids = spare[:2]
    with pytest.raises(AssertionError, match="a token for each label"):
        logits_of(model, batch_of(encoder, samples))


SCORES = torch.randn(4, LABELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLASSES, WEIGHTS = torch.tensor([0, 2, 2, 1]), [0.5, 2.0, 3.0]
REALS = torch.randn(4, LABELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
YES_OR_NO = (REALS > 0).double()


def test_losses_are_torchs():
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)

    def same(loss, expected):
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)

    same(score_loss(SCORES, REALS, "regression"), nn.MSELoss()(SCORES, REALS))
    same(score_loss(SCORES[:, :1], REALS[:, 0], "regression"), nn.MSELoss()(SCORES[:, 0], REALS[:, 0]))
    same(score_loss(SCORES, CLASSES, "single_label_classification"), nn.CrossEntropyLoss()(SCORES, CLASSES))
    same(score_loss(SCORES, YES_OR_NO, "multi_label_classification"), nn.BCEWithLogitsLoss()(SCORES, YES_OR_NO))
    whole = YES_OR_NO.long()
    same(score_loss(SCORES, whole, "multi_label_classification"), nn.BCEWithLogitsLoss()(SCORES, YES_OR_NO))
    weighted = nn.BCEWithLogitsLoss(pos_weight=weight)(SCORES, YES_OR_NO)
    same(score_loss(SCORES, YES_OR_NO, "multi_label_classification", WEIGHTS), weighted)
    # torch's mean divides by the weights of the samples; ours by their number, which adds up over batches.
    weighted = nn.CrossEntropyLoss(weight, reduction="sum")(SCORES, CLASSES) / 4
    same(score_loss(SCORES, CLASSES, "single_label_classification", WEIGHTS), weighted)
    assert (weighted - nn.CrossEntropyLoss(weight)(SCORES, CLASSES)).abs() > 0.1
    assert score_loss(SCORES.bfloat16(), CLASSES, "single_label_classification").dtype == torch.float32


@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)], ids=["mean", "of a step", "of a step, a tensor"])
@pytest.mark.parametrize("problem", TARGETS)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "weights"])
def test_an_unknown_target_adds_nothing(problem, weights, count):
    scores, targets = SCORES[:3].clone().requires_grad_(), TARGETS[problem]
    loss = score_loss(scores, targets, problem, weights, count)
    (gradient,) = torch.autograd.grad(loss, scores)
    known = torch.zeros_like(scores, dtype=torch.bool)
    known |= (targets != IGNORE)[:, None] if problem.startswith("single") else ~targets.isnan()
    assert torch.equal(gradient != 0, known) and gradient.isfinite().all()
    # The same from the known alone, one at a time.
    alone = [
        score_loss(SCORES[s : s + 1, where], t, problem, None if weights is None else np.array(weights)[where], 1)
        for s, where, t in each_known(problem)
    ]
    torch.testing.assert_close(loss, sum(alone) / (7 if count is not None else len(alone)), rtol=0, atol=1e-14)
    assert len(alone) == KNOWN[problem]


def each_known(problem):
    """Sample, columns and target of each target that is known."""
    for sample, target in enumerate(TARGETS[problem]):
        if problem.startswith("single"):
            if target != IGNORE:
                yield sample, slice(None), target[None]
        else:
            yield from (
                (sample, slice(i, i + 1), t[None, None]) for i, t in enumerate(target.double()) if not t.isnan()
            )


@pytest.mark.parametrize("problem", TARGETS)
def test_without_a_known_target_the_loss_is_0(problem):
    scores = SCORES[2:3].clone().requires_grad_()
    for count in (None, 0, torch.tensor(0), 3):
        loss = score_loss(scores, TARGETS[problem][2:], problem, WEIGHTS, count)
        (gradient,) = torch.autograd.grad(loss, scores)
        assert loss.item() == 0 and torch.equal(gradient, torch.zeros_like(scores))


def test_what_a_loss_cannot_be_made_of():
    with pytest.raises(ValueError, match="problem_type is None: state regression"):
        score_loss(SCORES, REALS, None)
    for wrong in (REALS.T, REALS[:, 0], REALS[:, :2]):
        with pytest.raises(AssertionError, match="for scores \\(4, 3\\)"):
            score_loss(SCORES, wrong, "regression")


def test_class_weights_and_count_come_from_the_config_and_the_trainer(model_of, encoder_of):
    encoder, problem = encoder_of("llava"), "single_label_classification"
    model = with_attention(model_of("llava"), "segment", problem_type=problem, class_weights=WEIGHTS)
    batch = batch_of(encoder, samples_of(encoder, TEXTS), labels=TARGETS[problem])
    with torch.no_grad():
        out = model(**batch, num_items_in_batch=5)
        assert torch.equal(out.loss, score_loss(out.logits, batch["labels"], problem, WEIGHTS, 5))
        assert torch.equal(model(**batch).loss, score_loss(out.logits, batch["labels"], problem, WEIGHTS, 2))
    assert model.accepts_loss_kwargs


def test_a_pack_has_no_mask_and_needs_no_word_on_a_cache(model_of, encoder_of):
    encoder, model = encoder_of("llava"), with_attention(model_of("llava"), "sdpa")
    batch = batch_of(encoder, samples_of(encoder, TEXTS))
    silent = {key: value for key, value in batch.items() if key != "use_cache"}
    assert torch.equal(logits_of(model, silent), logits_of(model, batch))
    with pytest.raises(AssertionError, match="a pack with an attention_mask"):
        logits_of(model, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})


def test_it_is_used_as_the_generative_model(model_of, encoder_of, checkpoint_of, family):
    model, encoder = with_attention(model_of(family), "segment", problem_type="regression"), encoder_of(family)
    (decoder,) = checkpoint_of(family).family.parts["language_model"]
    assert model.get_decoder() is model.get_submodule(decoder)
    assert model.get_input_embeddings() is model.get_decoder().get_input_embeddings()
    batch = batch_of(encoder, samples_of(encoder, ROWS), labels=TARGETS["regression"])
    plain = loss_and_gradient(model.train(), [batch])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert model.get_decoder().gradient_checkpointing or model.is_gradient_checkpointing
    again = loss_and_gradient(model, [batch])
    assert again[0] == plain[0]
    torch.testing.assert_close(again[1], plain[1], rtol=1e-4, atol=1e-6)


def test_the_published_layout_loads_and_is_kept(loaded_of, folder_of, saved_of, checkpoint_of, family):
    model, info = loaded_of(family)
    assert info["missing_keys"] == MISSING and not info["unexpected_keys"] and not info["mismatched_keys"]
    published, saved = (load_file(folder / "model.safetensors") for folder in (folder_of(family), saved_of(family)))
    generative = {key: weight for key, weight in published.items() if not key.endswith("lm_head.weight")}
    assert saved.keys() == generative.keys() | MISSING
    assert all(torch.equal(saved[key], weight) for key, weight in generative.items())
    again, info = load(saved_of(family), checkpoint_of(family), seed=1)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(again, model)
    assert json.loads((saved_of(family) / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_what_a_head_reads_and_learns_by_is_in_its_config(model_of, checkpoint_of, tmp_path):
    settings = {"problem_type": "single_label_classification", "score_token_ids": [7, 5, 6], "class_weights": WEIGHTS}
    with_attention(model_of("llava"), "sdpa", **settings).save_pretrained(tmp_path)
    config = load(tmp_path, checkpoint_of("llava"), config=None)[0].config
    assert {name: getattr(config, name) for name in settings} == settings and config.num_labels == LABELS


def assert_same(one, other) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_todays_names_load_as_well_as_the_published(model_of, checkpoint_of, family, tmp_path):
    model = model_of(family)
    model.config.save_pretrained(tmp_path)
    todays = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_file(todays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = load(tmp_path, checkpoint_of(family), seed=1)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(again, model)


def test_what_does_not_fit_is_told(folder_of, checkpoint_of, tmp_path):
    weights = load_file(folder_of("llava") / "model.safetensors")
    weights["stray.weight"] = weights.pop("multi_modal_projector.linear_1.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = load(tmp_path, checkpoint_of("llava"))
    assert info["missing_keys"] == MISSING | {"model.multi_modal_projector.linear_1.weight"}
    assert info["unexpected_keys"] == {"stray.weight"}


NATIVE = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers before 5.23 takes no class for a config of its own, and does not say so",
)


@NATIVE
def test_transformers_finds_the_class(saved_of, model_of, family):
    head._register()  # as if the module were imported again
    loaded = AutoModelForSequenceClassification.from_pretrained(saved_of(family))
    assert type(loaded) is classifier_of(loaded.config) is type(model_of(family))
    assert_same(loaded, model_of(family))


def test_no_other_kind_of_model_has_a_class():
    with pytest.raises(KeyError, match="llama"):
        classifier_of(LlamaConfig())


def test_a_fresh_head_is_made_as_the_familys_layers(folder_of, checkpoint_of, family):
    checkpoint = checkpoint_of(family)
    settings = {"config": config_of(checkpoint, num_labels=200)}
    first, again, other = (load(folder_of(family), checkpoint, seed, **settings)[0].score for seed in (3, 3, 4))
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    assert not first.bias.any()
    assert first.weight.std().item() == pytest.approx(0.2, rel=0.05)  # SPREAD's
    assert first.weight.mean().item() == pytest.approx(0, abs=0.02)


def test_a_head_is_in_32_bits_in_a_16_bit_model(folder_of, saved_of, checkpoint_of, model_of, encoder_of, family):
    checkpoint, encoder = checkpoint_of(family), encoder_of(family)
    fresh, _ = load(folder_of(family), checkpoint, dtype=torch.bfloat16)
    model, _ = load(saved_of(family), checkpoint, dtype=torch.bfloat16)
    for made in (fresh, model):
        assert made.get_decoder().dtype == torch.bfloat16
        assert {p.dtype for p in made.score.parameters()} == {torch.float32}
    assert torch.equal(model.score.weight, model_of(family).score.weight)
    use_attention(model, "segment")
    batch = batch_of(encoder, samples_of(encoder, TEXTS), torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(**batch).last_hidden_state[0, batch["cu_seq_lens_q"][1:].long() - 1]
        logits = model(**batch).logits
    assert logits.dtype == torch.float32 and hidden.dtype == torch.bfloat16
    torch.testing.assert_close(logits, nn.functional.linear(hidden.float(), model.score.weight, model.score.bias))


@pytest.mark.parametrize("skipped", [["score"], ["lm_head"]], ids=["named", "not named"])
def test_a_head_is_in_32_bits_in_a_4_bit_model(folder_of, saved_of, checkpoint_of, model_of, encoder_of, skipped):
    from bitsandbytes.nn import Linear4bit

    checkpoint, encoder = checkpoint_of("qwen2_vl"), encoder_of("qwen2_vl")
    skipped = [*skipped, "model.visual"]
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skipped)
    settings = {"dtype": torch.bfloat16, "quantization_config": bits}
    fresh, info = load(folder_of("qwen2_vl"), checkpoint, **settings)
    assert info["missing_keys"] == MISSING and fresh.score.weight.std().item() == pytest.approx(0.2, rel=0.3)
    assert not fresh.score.bias.any()
    model, _ = load(saved_of("qwen2_vl"), checkpoint, **settings)
    assert torch.equal(model.score.weight, model_of("qwen2_vl").score.weight)
    for made in (fresh, model):
        linear = {name: type(m) for name, m in made.named_modules() if isinstance(m, nn.Linear)}
        quantized = {name for name, kind in linear.items() if kind is Linear4bit}
        assert quantized == {name for name in linear if name.startswith("model.language_model")}
        assert made.score.weight.dtype == torch.float32
    use_attention(model.train(), "segment")  # evaluating, bitsandbytes takes a CPU's kernel that is too wide for these
    batch = batch_of(encoder, samples_of(encoder, ROWS), torch.bfloat16)
    logits = logits_of(model, batch)
    whole = logits_of(with_attention(model_of("qwen2_vl"), "segment"), batch_of(encoder, samples_of(encoder, ROWS)))
    assert logits.dtype == torch.float32 and 0 < (logits - whole).abs().max() < whole.abs().max()


def test_an_adapter_takes_the_head_along(folder_of, checkpoint_of, encoder_of, family, tmp_path):
    """Plain PEFT: trained, saved, and laid on a base whose head is another."""
    checkpoint, encoder = checkpoint_of(family), encoder_of(family)
    (decoder,) = checkpoint.family.parts["language_model"]
    layers = "|".join(checkpoint.family.targets["language_model"])
    target = rf"{decoder}\..*(?:{layers})"
    base = config_of(checkpoint, problem_type="regression")
    model, _ = load(folder_of(family), checkpoint, config=base)
    use_attention(model, "segment")
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=target, modules_to_save=["score"], r=4)
    model = get_peft_model(model, lora)
    batch = batch_of(encoder, samples_of(encoder, ROWS), labels=TARGETS["regression"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):  # a LoRA's A moves once its B is no longer 0
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    heads = {key for key in saved if "lora" not in key}
    assert heads == {"base_model.model.score.weight", "base_model.model.score.bias"} and len(saved) > 2
    other, _ = load(folder_of(family), checkpoint, seed=1)
    use_attention(other, "segment")
    trained, asked = model.eval(), {key: value for key, value in batch.items() if key != "labels"}
    assert (logits_of(other, asked) - logits_of(trained, asked)).abs().max() > 1e-2
    loaded = PeftModel.from_pretrained(other, tmp_path).eval()
    assert torch.equal(logits_of(loaded, asked), logits_of(trained, asked))


GOLDEN = SHARED / "golden"
RECORDED = GOLDEN / "checkpoints/idefics2_seqcls"
golden = pytest.mark.skipif(not RECORDED.is_dir(), reason="the golden fixtures are not beside this checkout")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Upstream's classifier in our class, what its loading said, and the encoder of its backbone's checkpoint."""
    settings = recipe(GOLDEN / "checkpoints/idefics2", method="full")
    checkpoint = open_checkpoint(settings.model)
    classifier = classifier_of(checkpoint.config)
    model, info = classifier.from_pretrained(RECORDED, output_loading_info=True, dtype=torch.float32)
    checkpoint.family.adapt(model, checkpoint.image_processor)
    return model.eval(), info, checkpoint.encoder(settings)


@golden
def test_upstreams_classifier_loads_and_is_saved_key_by_key(recorded, tmp_path):
    model, info, _ = recorded
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (RECORDED, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Idefics2ForSequenceClassification"]


@golden
@pytest.mark.parametrize("case", [f"cls{number}" for number in range(6)])
@pytest.mark.parametrize("attention", ["segment", "sdpa"])
def test_upstreams_scores_and_loss(recorded, case, attention):
    model, _, encoder = recorded
    use_attention(model, attention)
    record = json.loads((GOLDEN / "forward/idefics2_seqcls.json").read_text())["cases"][case]
    with np.load(GOLDEN / "images.npz") as files:
        names = {Path(name).name: name for name in files}
        found = [files[names[Path(name).name]].tobytes() for name in record["sample"]["images"]]
    pictures = [PIL.Image.open(io.BytesIO(data)).convert("RGB") for data in found]
    batch = encoder.vision.batch([encoder.vision.pixels(picture) for picture in pictures])
    with np.load(GOLDEN / "forward/idefics2_seqcls.npz") as arrays:
        ids = torch.from_numpy(arrays[f"{case}/input_ids"]).long()[None]
        logits, labels = (torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("logits", "labels"))
    ends = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": len(ids[0]), "max_length_k": len(ids[0])}
    batch |= bounds if attention == "segment" else {}
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels, **batch)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-4)
    assert out.loss.item() == pytest.approx(record["loss"], abs=1e-5)
