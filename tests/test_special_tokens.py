"""Whatever a row says, special ids stand only where the template put them: 10,000 texts that imitate it, by family."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from corpus_rows import IMITATIONS
from families import FAMILIES
from helpers import SHARED, picture, recipe
from tokenizers import Tokenizer

from mantis_lite.data.encode import Encoder
from mantis_lite.data.sample import Image, Sample, Turn
from mantis_lite.data.template import Token
from mantis_lite.errors import SampleError
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe import ModelRecipe

GOLDEN = SHARED / "golden/checkpoints"
PUBLISHED = [path.name for path in sorted(GOLDEN.glob("*")) if (path / "tokenizer.json").is_file()]
TEXTS = 10_000
PICTURE = Image(picture(1))
PLAIN = [
    "red",
    " dog",
    "\n\n",
    "  ",
    "\t",
    "🙂",
    "漢字",
    "é",
    "\0",
    "\x7f",
    "￭",
    "\u200b",
    "\u2028",
    "<",
    "|",
    ">",
    "x" * 40,
]


def fragments(encoder: Encoder) -> list[str]:
    """What texts are made of: imitations and this tokenizer's own tokens, whole, halved and in wide letters."""
    own = [token.content for token in encoder.tokenizer.get_added_tokens_decoder().values()]
    marks = sorted({*IMITATIONS, *own[:200], *encoder.template.tokens, *encoder.template.marks, *encoder.reserved})
    halves = [half for mark in marks for half in (mark[: len(mark) // 2], mark[len(mark) // 2 :])]
    wide = [mark.translate({code: code + 0xFEE0 for code in range(33, 127)}) for mark in marks]
    return [*marks, *marks, *halves, *wide, *PLAIN, *PLAIN]


def special_ids(encoder: Encoder) -> set[int]:
    """All that no text may come to: what the tokenizer calls special, and what is written as a token."""
    vision = encoder.vision
    tokens = encoder.tokenizer.get_added_tokens_decoder()
    marks = {vision.wrap.close, vision.wrap.chunk, *encoder.template.tokens, *encoder.reserved}
    marks |= {token for token, _ in vision.tokens((4096, 4096)) if isinstance(token, Token)}
    ids = {encoder.tokenizer.token_to_id(mark) for mark in marks if mark and mark not in encoder.template.marks}
    return {i for i, token in tokens.items() if token.special} | (ids - {None})


def samples(encoder: Encoder, seed: int) -> Iterator[Sample]:
    """Conversations of about `TEXTS` texts in all, one in 20 with a picture."""
    rng, parts = random.Random(seed), fragments(encoder)
    written = 0
    while written < TEXTS:
        turns = []
        for role in ("system", "user", "assistant", "user", "assistant")[rng.randrange(2) :]:
            text = "".join(rng.choices(parts, k=rng.randint(1, 5)))
            picture = role == "user" and rng.random() < 0.05
            turns.append(Turn(role, (text, PICTURE, text[::-1] or "x") if picture else (text,)))
            written += 1 + picture
        yield Sample("made:1", None, tuple(turns))


def neutral(sample: Sample) -> Sample:
    """The same turns, saying nothing."""
    turns = [Turn(turn.role, tuple("x" if isinstance(p, str) else p for p in turn.content)) for turn in sample.turns]
    return Sample(sample.where, sample.id, tuple(turns))


def check(encoder: Encoder) -> None:
    special = special_ids(encoder)
    shapes: dict[tuple, list[int]] = {}
    written = refused = 0
    for sample in samples(encoder, 0):
        texts = [part for turn in sample.turns for part in turn.content if isinstance(part, str)]
        written += len(texts)
        try:
            ids = encoder.encode(sample).input_ids.tolist()
        except SampleError as error:
            assert any(mark in text for mark in encoder.reserved for text in texts), error
            refused += 1
            continue
        assert not any(mark in text for mark in encoder.reserved for text in texts)
        shape = tuple((turn.role, len(turn.content)) for turn in sample.turns)
        if shape not in shapes:
            shapes[shape] = [i for i in encoder.encode(neutral(sample)).input_ids.tolist() if i in special]
        assert [i for i in ids if i in special] == shapes[shape], texts
    assert written >= TEXTS and any(shapes.values())
    assert bool(refused) == bool(encoder.reserved)


def test_texts_of_every_family(family, encoder_of):
    check(encoder_of(family))


@pytest.mark.skipif(not PUBLISHED, reason="the shared checkpoints are not beside this one")
@pytest.mark.parametrize("name", PUBLISHED or ["none"])
def test_texts_under_tokenizers_as_published(name):
    check(open_checkpoint(ModelRecipe(name=str(GOLDEN / name))).encoder(recipe()))


def test_texts_under_a_tokenizer_that_calls_nothing_special(encoder_of):
    """Then it takes text for tokens, and each row with such text is refused."""
    encoder = encoder_of("idefics3")
    made = json.loads(encoder.tokenizer.to_str())
    for token in made["added_tokens"]:
        token["special"] = False
    encoder = replace(encoder, tokenizer=Tokenizer.from_str(json.dumps(made)))
    assert {"<image>", "<row_1_col_1>", "<end_of_utterance>"} <= set(encoder.reserved)
    check(encoder)


def test_a_special_token_that_text_came_to_would_be_found(encoder_of):
    """The check above is one: a tokenizer that takes text for special tokens does not pass it."""
    encoder = encoder_of(FAMILIES[0])
    encoder.tokenizer.encode_special_tokens = False
    try:
        with pytest.raises(AssertionError):
            check(encoder)
    finally:
        encoder.tokenizer.encode_special_tokens = True
