"""Build Tiny Mantis from nothing but a seed: `python -m mantis_lite.tiny.build OUT_DIR`.

It is brought up as Mantis was. The vision tower learns to see on its own; then everything learns to name each of
several pictures, in order; then to answer questions about them. Questions from the start would never leave chance: what
pictures there are has to be known before they can be compared.
"""

from __future__ import annotations

import io
import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PIL_Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoImageProcessor, LlavaConfig, LlavaForConditionalGeneration

from ..data.collate import collate
from ..data.encode import Encoder
from ..data.schema import Image, Sample, Turn
from ..data.template import LLAMA_3, Token, render
from ..generate import answer
from ..models import llava
from ..models.attention import use_attention
from . import tasks
from .pictures import COLOURS, SHAPES, SIDE, THINGS, Thing, draw

log = logging.getLogger(__name__)

SEED = 0
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<|pad|>",
)
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
VOCABULARY = 420  # at most: the texts run out of pairs to merge before that
POOL = 600  # pictures of each thing
LESSONS: tuple[tuple[tuple[tasks.Task, ...], int], ...] = (
    ((tasks.describe_each,), 350),
    (tasks.QUESTIONS, 1500),
)


@dataclass(frozen=True)
class Album:
    """Pictures drawn ahead: PNG files of every thing, in memory."""

    files: dict[Thing, list[bytes]]

    @classmethod
    def drawn(cls, each: int, rng: random.Random) -> Album:
        return cls({thing: [_png(draw(thing, rng)) for _ in range(each)] for thing in THINGS})

    def sample(self, exercise: tasks.Exercise, rng: random.Random) -> Sample:
        """The exercise with pictures of what it names."""
        pictures = [Image(rng.choice(self.files[thing])) for thing in exercise.things]
        turns = Turn("user", (*pictures, exercise.question)), Turn("assistant", (exercise.answer,))
        return Sample(where="tiny", id=None, turns=turns)


def build(out: Path) -> None:
    """Write the checkpoint to a folder; deterministic on one machine."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(rng)
    save_small_files(out, tokenizer)
    config = LlavaConfig.from_pretrained(out)
    vision = llava.vision(config, AutoImageProcessor.from_pretrained(out, backend="pil"))
    encoder = Encoder(tokenizer, LLAMA_3, vision, system="")
    model = LlavaForConditionalGeneration(config).float()
    use_attention(model, "segment")
    log.info("%.2f million parameters, %d tokens", model.num_parameters() / 1e6, tokenizer.get_vocab_size())

    album = Album.drawn(POOL, rng)
    learn_to_see(model, album, encoder, rng)
    learn_to_answer(model, album, encoder, rng)
    model.half().save_pretrained(out)
    save_small_files(out, tokenizer)  # config.json again, as published rather than as transformers 5 writes it
    report(out, encoder)


def train_tokenizer(rng: random.Random) -> Tokenizer:
    """Byte-level BPE with Llama 3's rules for words, over the texts of the exercises."""
    blank = Album({thing: [b""] for thing in THINGS})
    texts = []
    for task in tasks.QUESTIONS * 300:
        pieces = render(blank.sample(task(rng), rng), LLAMA_3, "", "answer", lambda j: WRAP(j))
        texts += [piece.content for piece in pieces if type(piece.content) is str]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
