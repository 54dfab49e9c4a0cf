"""Build Tiny Mantis from nothing but a seed: `python -m mantis_lite.tiny.build OUT_DIR`.

It is brought up as Mantis was: the vision tower learns to see on its own; then all of it learns to name each of several
pictures, in order; then to answer questions about them. Questions from the start never leave chance.
"""

from __future__ import annotations

import io
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import PIL.Image
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor, LlavaConfig, LlavaForConditionalGeneration

from ..data.collate import Batch, collate
from ..data.encode import Encoder
from ..data.sample import Image, Sample, Turn
from ..data.template import LLAMA_3, Wrap, render
from ..generate import answer
from ..models.attention import use_attention
from ..models.levels import levels_of, look_up
from ..models.llava import LLAVA
from ..models.llava import vision as llava_vision
from ..process import cores
from ..recipe import MediaRecipe
from . import layout, tasks
from .pictures import COLOURS, SHAPES, THINGS, Thing, draw

SEED = 0
PICTURES_OF_A_THING = 600  # with a tenth of them, it learns them by heart
SEEING_STEPS, PICTURES_A_STEP = 1200, 128
EXERCISES_A_STEP = 32
LESSONS = (((tasks.describe_each,), 400), (tasks.QUESTIONS, 2800))
"""The tasks of a lesson, and its steps."""
EXAMINED = 100
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

Album = dict[Thing, list[bytes]]
"""PNG files of every thing, in memory."""

log = logging.getLogger(__name__)


def build(out: Path) -> None:
    """Write the checkpoint to a folder; the same each time on one machine."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    layout.write(out)
    config = LlavaConfig.from_pretrained(out)
    processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    vision = llava_vision(config, processor, MediaRecipe(), ())
    tokenizer = train_tokenizer(vision.wrap, rng)
    tokenizer.save(str(out / "tokenizer.json"))
    encoder = Encoder(tokenizer, LLAMA_3, vision, system="")
    model = LlavaForConditionalGeneration(config).float().to("cuda" if torch.cuda.is_available() else "cpu")
    LLAVA.adapt(model, processor)
    use_attention(model, "segment")

    album = draw_album(PICTURES_OF_A_THING, rng)
    learn_to_see(model, Seeing(album, encoder), levels_of(processor))
    learn_to_answer(model, Exercises(album, encoder))
    model.cpu().half().save_pretrained(out)
    layout.write(out)  # once more: transformers writes its own version of these files beside the weights
    (out / "README.md").write_text(report(examine(model.float(), encoder)))


def train_tokenizer(wrap: Wrap, rng: random.Random) -> Tokenizer:
    """Byte-level BPE with Llama 3's rules for words, over the texts of the exercises; special tokens last."""
    samples = [to_sample(task(rng), {thing: [b""] for thing in THINGS}, rng) for task in tasks.QUESTIONS * 300]
    pieces = chain.from_iterable(render(sample, LLAMA_3, "", "answer", wrap) for sample in samples)
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=layout.TEXT_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator((p.content for p in pieces if type(p.content) is str), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in layout.SPECIAL])
    start = layout.SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, layout.token_id(start))]
    )
    assert tokenizer.get_vocab_size() == layout.TOKENS
    return tokenizer


def draw_album(each: int, rng: random.Random) -> Album:
    return {thing: [_png(draw(thing, rng)) for _ in range(each)] for thing in THINGS}


def to_sample(exercise: tasks.Exercise, album: Album, rng: random.Random) -> Sample:
    """The exercise with pictures of what it names."""
    pictures = [Image(rng.choice(album[thing])) for thing in exercise.things]
    turns = Turn("user", (*pictures, exercise.question)), Turn("assistant", (exercise.answer,))
    return Sample(where="Tiny Mantis", id=None, turns=turns)


class Seeing(Dataset):
    """Pictures (N, 3, 56, 56), their colours (N,) and shapes (N,): one item a step, drawn from the step's own seed."""

    def __init__(self, album: Album, encoder: Encoder) -> None:
        self.album, self.encoder = album, encoder

    def __len__(self) -> int:
        return SEEING_STEPS

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{SEED} seeing {step}")
        things = rng.choices(THINGS, k=PICTURES_A_STEP)
        drawn = (io.BytesIO(rng.choice(self.album[thing])) for thing in things)
        pictures = [PIL.Image.open(file, formats=["PNG"]).convert("RGB") for file in drawn]
        return {
            "pixels": self.encoder.vision.batch(list(map(self.encoder.vision.pixels, pictures)))["pixel_values"],
            "colours": torch.tensor([list(COLOURS).index(thing.colour) for thing in things]),
            "shapes": torch.tensor([SHAPES.index(thing.shape) for thing in things]),
        }


class Exercises(Dataset):
    """A packed batch of exercises: one item a step of the lessons, drawn from the step's own seed."""

    def __init__(self, album: Album, encoder: Encoder) -> None:
        self.album, self.encoder = album, encoder
        self.subjects = [subjects for subjects, steps in LESSONS for _ in range(steps)]

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{SEED} answering {step}")
        exercises = [rng.choice(self.subjects[step])(rng) for _ in range(EXERCISES_A_STEP)]
        return collate([self.encoder.encode(to_sample(exercise, self.album, rng)) for exercise in exercises])


def learn_to_see(model: LlavaForConditionalGeneration, steps: Seeing, levels: torch.Tensor) -> None:
    """Train the tower alone: colour and shape, read off the mean of the positions that the projector will read."""
    tower = model.model.vision_tower
    probe = torch.nn.Linear(model.config.vision_config.hidden_size, len(COLOURS) + len(SHAPES)).to(model.device)

    def loss(batch: Batch) -> torch.Tensor:
        layers = tower(look_up(batch["pixels"], levels), output_hidden_states=True).hidden_states
        seen = probe(layers[model.config.vision_feature_layer].mean(dim=1))
        colour, shape = seen.split([len(COLOURS), len(SHAPES)], dim=1)
        return cross_entropy(colour, batch["colours"]) + cross_entropy(shape, batch["shapes"])

    descend("seeing", [*tower.parameters(), *probe.parameters()], loss, steps, model.device, rate=2e-3)


def learn_to_answer(model: LlavaForConditionalGeneration, steps: Exercises) -> None:
    """Train everything: a lesson after the other, under one schedule."""
    descend("answering", model.parameters(), lambda batch: model(**batch).loss, steps, model.device, rate=1e-3)


def descend(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Callable[[Batch], torch.Tensor],
    steps: Seeing | Exercises,
    device: torch.device,
    rate: float,
) -> None:
    """AdamW over the steps' batches, with a warm-up of 50 steps and a cosine down to a twentieth of the rate."""
    parameters, total = list(parameters), len(steps)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    wave = LambdaLR(optimizer, lambda n: min(1, (n + 1) / 50) * max(0.05, (1 + math.cos(math.pi * n / total)) / 2))
    # On a CPU, workers would only take the cores that train.
    workers = cores() if device.type == "cuda" else 0
    for step, batch in enumerate(DataLoader(steps, batch_size=None, num_workers=workers), 1):
        loss = loss_of({k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        wave.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            log.info("%s: step %d of %d, loss %.3f, %.0f s", name, step, total, loss.item(), time.monotonic())


def examine(model: LlavaForConditionalGeneration, encoder: Encoder) -> dict[str, float]:
    """The share of exact answers to each task, on pictures never seen."""
    rng = random.Random(SEED + 1)
    album = draw_album(8, rng)
    scores = {}
    for task in (*tasks.QUESTIONS, tasks.odd_one_out):
        exercises = [task(rng) for _ in range(EXAMINED)]
        samples = [to_sample(exercise, album, rng) for exercise in exercises]
        asked = [replace(sample, turns=sample.turns[:1]) for sample in samples]
        answers = [answer(model, encoder, sample, max_new_tokens=32) for sample in asked]
        scores[task.__name__] = sum(a == e.answer for a, e in zip(answers, exercises, strict=True)) / EXAMINED
        log.info("%s: %.0f%% exact", task.__name__, 100 * scores[task.__name__])
    return scores


def report(scores: dict[str, float]) -> str:
    """The checkpoint's README.md."""
    rows = "".join(f"| {name} | {score:.0%} |\n" for name, score in scores.items())
    return (
        "# Tiny Mantis\n\n"
        "A LLaVA model (SigLIP tower, projector, Llama) in the layout of Mantis-8B-siglip-llama3, trained from\n"
        "nothing by `python -m mantis_lite.tiny.build` on pictures of coloured shapes that the same code draws.\n\n"
        f"Exact answers to {EXAMINED} questions of each kind (`tasks.py`) about pictures it was not trained on:\n\n"
        f"| task | exact |\n|---|---|\n{rows}\n"
        "It was never asked for the odd one out: that is left for the quickstart to teach.\n"
    )


def _png(picture: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(Path(sys.argv[1]))
