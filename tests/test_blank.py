"""A blank picture gives the vision tower something to do in a pack without one, and changes nothing else."""

import numpy as np
import pytest
import torch
from helpers import by_size, chat, numbers_of, recipe
from hypothesis import given
from hypothesis import strategies as st

from mantis_lite.data.collate import collate
from mantis_lite.data.dataset import pack_dataset
from mantis_lite.data.encode import IGNORE, Encoder, Score
from mantis_lite.data.packing import Length, needed, plan, spread
from mantis_lite.data.packs import BLANK, Packs
from mantis_lite.data.prepare import Samples
from mantis_lite.data.sample import Sample
from mantis_lite.data.schedule import pack_epoch, schedule
from mantis_lite.data.schema import parse
from mantis_lite.memory.packs import pack_of
from mantis_lite.models.adapters import make_trainable, part_of
from mantis_lite.models.load import load_model
from mantis_lite.recipe import PackingRecipe

TEXT = chat("Only words.", "No picture")
PICTURED = chat("What is <image>?", "small red circle", images=(1,))
TOUCH, BUDGET = 30, 100


def sample_of(row: dict) -> Sample:
    return parse(row, "rows:1", None)


def rows_of(encoder: Encoder, packs: list[list[int]], **more) -> list[list]:
    """What `pack_dataset` makes of packs of a sample of text, 0, and one with a picture, 1."""
    samples = [sample_of(TEXT), sample_of(PICTURED)]
    dataset = pack_dataset(Packs.of(packs), samples, encoder, lambda error: None, **more)
    return [dataset[at]["encoded"] for at in range(len(packs))]


def gradients(model, encoder: Encoder, pack: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a pack, and the gradients of what has one."""
    model.zero_grad(set_to_none=True)
    (encoded,) = rows_of(encoder, [pack])
    loss = model(**collate(encoded, encoder.vision.batch)).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("method", "trained"), [("lora", "adapter"), ("full", "full")])
def test_loss_and_gradients_are_those_without_it(checkpoint_of, family, method, trained):
    checkpoint = checkpoint_of(family)
    parts = [part for part in ("projector", "vision_tower") if part in checkpoint.family.parts]
    settings = recipe(method=method, trainable={"language_model": trained, **dict.fromkeys(parts, trained)})
    torch.manual_seed(0)
    model = make_trainable(load_model(checkpoint, settings), settings, checkpoint.family, False).eval()
    encoder = checkpoint.encoder(settings)
    loss, alone = gradients(model, encoder, [0])
    with_blank, touched = gradients(model, encoder, [0, BLANK])
    _, seen = gradients(model, encoder, [0, 1])
    assert with_blank == pytest.approx(loss, abs=1e-6)
    assert touched.keys() == seen.keys(), "what a picture's pack trains, this one touches"
    sees = {name for name in touched if part_of(name, checkpoint.family) != "language_model"}
    assert sees and not sees & alone.keys()
    for name, gradient in touched.items():
        if name in sees:
            assert (gradient == 0).all(), name
        else:
            torch.testing.assert_close(gradient, alone[name], atol=1e-6, rtol=0)
    assert any(gradient.any() for gradient in (seen[name] for name in sees))


def test_its_length_is_known(checkpoint_of, family):
    for settings in ({}, {"media": {"max_image_size": 30}} if family in ("llava", "idefics2", "fuyu") else {}):
        encoder = checkpoint_of(family).encoder(recipe(**settings))
        blank, length = encoder.blank(), encoder.blank_length()
        (measured,) = encoder.measure([sample_of(PICTURED)])
        assert length.tokens == len(blank) == len(blank.labels) and length.images == len(blank.pixels) == 1
        assert (blank.labels == IGNORE).all()
        assert blank.positions is None or blank.positions.shape[1] == len(blank)
        assert length.patches <= measured.patches and length.tokens <= measured.tokens
        for array in blank.pixels[0].values():
            if array.dtype == np.uint8:
                numbers = numbers_of(array, checkpoint_of(family).image_processor)
                assert (numbers != 0).all(), "a picture of zeros is dropped"


def test_a_narrow_picture_has_fewer_tiles(encoder_of):
    encoder = encoder_of("idefics3")
    assert encoder.blank_length().patches < encoder.vision.patches((28, 28))
    assert encoder_of("fuyu").blank_size == (28, 28)


def test_tokens_that_are_scored_are_in_it():
    tokens = [f"<|LABEL_{at}|>" for at in (1, 2)]
    encoder = by_size()
    encoder.tokenizer.add_special_tokens(tokens)
    scoring = by_size(score=Score(("a", "b")))
    scoring.tokenizer.add_special_tokens(tokens)
    assert len(scoring.blank()) == scoring.blank_length().tokens == encoder.blank_length().tokens + 2
    assert scoring.blank().input_ids[-2:].tolist() == [scoring.token_id(token) for token in tokens]


@pytest.mark.parametrize(
    "targets", [np.array([1, 2]), np.array([[0.5], [1.0]], dtype=np.float32)], ids=["classes", "numbers"]
)
def test_nothing_is_known_of_its_scores(targets):
    ((text, blank),) = rows_of(by_size(), [[0, BLANK]], targets=targets)
    assert np.array_equal(text.target, targets[0])
    unknown = np.full_like(targets[0], IGNORE if targets.ndim == 1 else np.nan)
    assert np.array_equal(blank.target, unknown, equal_nan=targets.ndim == 2)


def test_a_pack_of_nothing_else_and_one_that_lost_its_pictures():
    encoder = by_size()
    blank, nothing = len(encoder.blank()), len(encoder.nothing())
    assert [list(map(len, row)) for row in rows_of(encoder, [[BLANK], []])] == [[blank], [nothing]]
    assert [list(map(len, row)) for row in rows_of(encoder, [[BLANK], []], touch=True)] == [[blank], [blank]]
    damaged = chat("Hi", "Ho", images=(1,))
    damaged["images"][0]["bytes"] = damaged["images"][0]["bytes"][:200]  # its header is sound
    samples = [sample_of(TEXT), sample_of(damaged)]
    told = []
    for touch, wanted in ((False, []), (True, [blank])):
        dataset = pack_dataset(Packs.of([[0, 1]]), samples, encoder, told.append, touch=touch)
        assert list(map(len, dataset[0]["encoded"]))[1:] == wanted
    assert len(told) == 2


lengths = st.tuples(st.integers(1, BUDGET), st.sampled_from([0, 0, 5, 50])).map(
    lambda size: Length(size[0] if size[1] else min(size[0], BUDGET - TOUCH), size[1])
)


@given(st.lists(lengths, max_size=40), st.sampled_from([0, 100]), st.integers(0, 99))
def test_there_is_room_for_it_in_the_plan(sizes, patches, seed):
    table = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    assert (needed(table, TOUCH) <= BUDGET).all()
    costs = table.sum(1) + 0.5
    packed = [plan(table, Length(BUDGET, patches), seed, touch=TOUCH)]
    packed.append(spread(table, costs, 60.0, Length(BUDGET, patches), TOUCH))
    for packs in packed:
        assert sorted(packs.samples.tolist()) == list(range(len(sizes)))
        for pack, (tokens, seen) in zip(packs, packs.sums(table, [TOUCH, 0]).tolist(), strict=True):
            assert tokens <= BUDGET and (not patches or seen <= patches)
            assert pack.count(BLANK) == (seen == 0) and (BLANK not in pack or pack[-1] == BLANK)


def test_a_sample_without_room_for_it_never_gets_here():
    with pytest.raises(AssertionError, match="a sample larger than a pack"):
        plan([Length(BUDGET - TOUCH + 1, 0)], Length(BUDGET, 0), 0, touch=TOUCH)
    assert len(plan([Length(BUDGET - TOUCH + 1, 9)], Length(BUDGET, 0), 0, touch=TOUCH)) == 1


def half_text(count: int = 200) -> Samples:
    zeros = np.zeros(count, dtype=np.int64)
    images = np.arange(count) % 2
    tokens = 10 + np.random.default_rng(0).permutation(count) % 40
    return Samples([], [1.0], zeros, zeros, np.stack([tokens, 9 * images], axis=1), images, zeros)


@pytest.mark.parametrize("packing", [PackingRecipe(max_length=100), PackingRecipe(enabled=False)], ids=["on", "off"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_every_pack_of_a_run_has_a_picture(packing, ranks):
    samples = half_text()
    made = schedule(samples, packing, {"num_train_epochs": 2, "gradient_accumulation_steps": 3}, ranks, touch=TOUCH)
    for packs in (made.packs, made.laid_out(3), pack_epoch(samples, packing, touch=TOUCH)):
        assert (packs.sums(samples.images, 1) >= 1).all()
        assert all(pack.count(BLANK) <= 1 for pack in packs)
        assert packs.sums(samples.lengths[:, 0], TOUCH).max() <= 100
    assert (np.bincount(made.packs.samples) == 2).all()
    assert BLANK in made.packs.members


def test_a_blank_picture_is_in_the_memory_of_its_pack(encoder_of):
    encoder = encoder_of("idefics2")
    sample = sample_of(TEXT)
    (measured,) = encoder.measure([sample])
    zeros = np.zeros(1, dtype=np.int64)
    samples = Samples([], [1.0], zeros, zeros, np.array([[measured.tokens, 0]]), zeros, zeros)
    samples.rows = [type("Rows", (), {"sample": lambda self, at: sample})()]
    alone, beside = (pack_of(pack, samples, encoder) for pack in ([0], [0, BLANK]))
    assert beside.tokens == alone.tokens + encoder.blank_length().tokens
    assert beside.supervised == alone.supervised and not alone.grids
    assert sum(rows * columns for rows, columns in beside.grids) == encoder.blank_length().patches
