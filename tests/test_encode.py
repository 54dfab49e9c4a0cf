"""A sample's length is known without its tensors, and its labels are the answer, the whole answer and nothing else."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import SHARED, TEMPLATES, by_size, chat, picture, recipe, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from mantis_lite.data.encode import IGNORE, Encoder, Score
from mantis_lite.data.frames import Frames
from mantis_lite.data.lengths import Measured
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.data.schema import parse
from mantis_lite.data.template import MLLAVA_V1
from mantis_lite.errors import SampleError
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe import MediaRecipe, ModelRecipe

GOLDEN = SHARED / "golden/checkpoints"
EXAMPLES = SHARED / "data/mantis-examples/chat/train.json"
PICTURES = [Image(picture(seed, *size)) for seed, size in enumerate([(20, 30), (9, 40), (90, 20), (64, 64)])]

ENCODERS = {name: by_size(name) for name in TEMPLATES}
BY_SIZE = ENCODERS["llama_3"].vision

each_template = pytest.mark.parametrize("name", TEMPLATES)

words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x04"), max_size=20),
    st.sampled_from(["<|eot_id|>", "</s>", "<image>", " dog", "\n\n", "<|pad|>", "ASSISTANT:", "red  circle"]),
)
contents = st.lists(st.one_of(words, st.sampled_from(PICTURES)), max_size=4).map(tuple)


@st.composite
def samples(draw) -> Sample:
    turns = [Turn("system", (draw(words),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(contents)), Turn("assistant", draw(contents))]
    return Sample("made:1", None, tuple(turns))


def trained_runs(encoder: Encoder, encoded) -> list[str]:
    """The stretches that carry loss, decoded."""
    on = np.concatenate([[0], encoded.labels != IGNORE, [0]])
    edges = np.flatnonzero(np.diff(on)).reshape(-1, 2)
    return [encoder.tokenizer.decode(encoded.input_ids[a:b].tolist(), skip_special_tokens=False) for a, b in edges]


def answers(sample: Sample) -> list[str]:
    return ["".join(turn.content) for turn in sample.turns if turn.role == "assistant"]


def sizes_of(encoded) -> list[list[int]]:
    return [picture["sizes"][0].tolist() for picture in encoded.pixels]


@each_template
@given(
    sample=samples(),
    system=st.sampled_from([None, "", "Be brief."]),
    max_size=st.sampled_from([None, 25, 50]),
)
def test_measure_is_the_length_of_encode(name, sample, system, max_size):
    encoder = replace(ENCODERS[name], system=system, max_image_size=max_size)
    encoded = encoder.encode(sample)
    sizes = sizes_of(encoded)
    patches = sum(BY_SIZE.patches(tuple(size)) for size in sizes)
    assert encoder.measure([sample]) == [Measured(len(encoded), patches, len(sample.images))]
    assert len(encoded.labels) == len(encoded.input_ids) and len(sizes) == len(sample.images)
    on = encoded.labels != IGNORE
    assert (encoded.labels[on] == encoded.input_ids[on]).all()
    assert not on[encoded.input_ids == encoder.token_id("<image>")].any()


@each_template
@given(sample=samples().filter(lambda sample: not any(sample.turns[at].content == () for at in (0, -1))))
def test_every_sort_of_label_trains_the_answer(name, sample):
    """Upstream's labels are the answer's and the header's before it: never fewer, and never a picture."""
    answer, upstream = (replace(ENCODERS[name], labels=rule).encode(sample).labels for rule in ("answer", "upstream"))
    assert ((answer == IGNORE) | (answer == upstream)).all()
    assert (upstream != IGNORE).sum() > (answer != IGNORE).sum()


@each_template
@given(texts=st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_trained_tokens_are_the_answers_words_and_end_token(name, texts):
    encoder = ENCODERS[name]
    roles = ("user", "assistant")
    sample = Sample("made:1", None, tuple(Turn(roles[at % 2], (text,)) for at, text in enumerate(texts)))
    runs = trained_runs(encoder, encoder.encode(sample))
    assert len(runs) == len(answers(sample))
    for run, answer in zip(runs, answers(sample), strict=True):
        assert run.endswith(answer + encoder.template.end)
        # A token may hold the blank before the answer and its first letters: it is trained.
        assert run.removesuffix(answer + encoder.template.end) in ("", " ", "\n", "\n\n")


@each_template
def test_trained_tokens_to_the_letter(name):
    encoder = ENCODERS[name]
    sample = parse(chat("Hi <image>", "small dog.", "Sure?", "Yes!\nQuite", images=(1,)), "a:1", None)
    *_, header = encoder.template.headers["assistant"]
    blank = " " if header.endswith(" ") else ""  # "ASSISTANT: small": the tokenizer has a token " small"
    end = encoder.template.end
    assert trained_runs(encoder, encoder.encode(sample)) == [f"{blank}small dog.{end}", f"Yes!\nQuite{end}"]


@pytest.mark.skipif(not GOLDEN.is_dir() or not EXAMPLES.is_file(), reason="the shared data is not beside this checkout")
@pytest.mark.parametrize("name", ["mllava_siglip_llama3", "mllava_clip_vicuna"])
def test_real_rows(name):
    """Length and labels of real rows under the published tokenizers' kind; sentencepiece's too."""
    checkpoint = open_checkpoint(ModelRecipe(name=str(GOLDEN / name)))
    encoder = checkpoint.encoder(recipe())
    size = checkpoint.config.vision_config.image_size
    # The pictures are opened and their sizes read; only the resizing, which is slow, is left out.
    quick = replace(encoder.vision, pixels=lambda picture: {"pixel_values": np.zeros((1, 3, size, size))})
    encoder = replace(encoder, vision=quick)
    folder = MediaFolder(EXAMPLES.parent)
    rows = [parse(row, f"train.json:{at}", folder) for at, row in enumerate(json.loads(EXAMPLES.read_text()))]
    assert len(rows) == 70
    lengths = encoder.measure(rows)
    for sample, length in zip(rows, lengths, strict=True):
        encoded = encoder.encode(sample)
        positions = (size // 14) ** 2 + ("clip" in name)
        assert length == Measured(len(encoded), positions * len(sample.images), len(sample.images))
        trained = [run.strip() for run in trained_runs(encoder, encoded)]
        assert trained == [answer.strip() + encoder.template.end for answer in answers(sample)]


@each_template
@pytest.mark.parametrize("text", ["<|eot_id|>", "</s>", "<s>", "<image>", "<|pad|>", "<|start_header_id|>"])
def test_text_that_looks_like_a_token_stays_text(name, text):
    encoder = ENCODERS[name]
    part = [{"type": "text", "text": f"say {text}"}]
    row = {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": part}]}
    ids = encoder.encode(parse(row, "a:1", None)).input_ids.tolist()
    plain = encoder.encode(parse(chat("say", "say"), "a:1", None)).input_ids.tolist()
    special = {encoder.token_id(token) for token in (*encoder.template.tokens, "<image>", "<|pad|>")}
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert encoder.tokenizer.decode(ids, skip_special_tokens=False).count(f"say {text}") == 2


@each_template
def test_a_prompt_is_the_sample_up_to_its_answer(name):
    encoder = ENCODERS[name]
    whole = parse(chat("Hi <image>", "A cat.", "And?", "small dog.", images=(1,)), "a:1", None)
    asked = encoder.encode_prompt(replace(whole, turns=whole.turns[:-1]))
    encoded = encoder.encode(whole)
    assert encoded.input_ids[: len(asked)].tolist() == asked.input_ids.tolist()
    gap = len(encoder.tokenizer.encode(encoder.template.gap, add_special_tokens=False))
    assert (asked.labels == IGNORE).all()
    assert (
        (encoded.labels != IGNORE)[len(asked) :] == ([True] * (len(encoded) - len(asked) - gap) + [False] * gap)
    ).all()
    assert sizes_of(asked) == sizes_of(encoded)


def test_a_broken_picture_is_named_and_the_others_are_measured():
    encoder = ENCODERS["llama_3"]
    good, bad = (parse(chat("x", "y", images=(1,)), f"a:{at}", None) for at in (1, 2))
    bad = replace(bad, turns=(Turn("user", (Image(b"no picture"),)), bad.turns[1]))
    first, error, last = encoder.measure([good, bad, good])
    assert first == last == Measured(len(encoder.encode(good)), first.patches, 1)
    assert isinstance(error, SampleError) and error.where == "a:2"
    with pytest.raises(SampleError, match="a:2"):
        encoder.encode(bad)


def test_a_fingerprint_changes_with_all_that_a_length_depends_on():
    encoder = ENCODERS["llama_3"]
    others = [
        replace(encoder, system=""),
        replace(encoder, max_image_size=100),
        replace(encoder, template=MLLAVA_V1),
        replace(encoder, tokenizer=tokenizer("mllava_v1")),
        replace(encoder, vision=replace(BY_SIZE, facts="otherwise")),
        replace(encoder, frames=Frames(MediaRecipe(num_frames=4))),
        replace(encoder, frames=Frames(gap=" ")),
        replace(encoder, score=Score()),
        replace(encoder, score=Score(("a",))),
    ]
    found = {made.fingerprint for made in (encoder, *others)}
    assert len(found) == len(others) + 1
    assert replace(encoder, tokenizer=tokenizer("llama_3")).fingerprint == encoder.fingerprint
