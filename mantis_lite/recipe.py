"""A recipe: every setting of a run, and which values each may have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

Part = Literal["language_model", "projector", "vision_tower"]
Training = Literal["frozen", "adapter", "full"]
Task = Literal["chat", "video", "classify", "pretrain"]
Problem = Literal["regression", "single_label", "multi_label"]
Strategy = Literal["single", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2"]
PARTED = ("zero3", "zero3_offload", "fsdp2")
"""The strategies by which several GPUs have a part of the weights each."""
Kernel = Literal["lora", "rms_norm", "rope", "swiglu", "layer_norm", "relu_squared"]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}


def size_of(text: Any) -> Any:
    """Bytes, written as a number or as "512MB". Raises ValueError.

    >>> size_of("512MB"), size_of("2 GiB")
    (512000000, 2147483648)
    """
    if not isinstance(text, str):
        return text
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if not found or found[2] not in UNITS:
        raise ValueError("expected a size, as 512MB or 20GB")
    return int(float(found[1]) * UNITS[found[2]])


Size = Annotated[Positive, BeforeValidator(size_of, json_schema_input_type=Positive | str)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelRecipe(Section):
    """A model by name; or a language model and a vision tower, each `name` or `name@revision`, to put together."""

    name: str = ""
    """A hub id, a folder, or `tiny`; `model: x` is short for it."""
    revision: str | None = None
    """Of the name on the hub: a branch, tag or commit."""
    llm: str | None = None
    """In place of a name, with task=pretrain: the language model, `name` or `name@revision`."""
    vision: str | None = None
    """Beside `llm`: the vision tower it is put together with."""
    adapter: str | None = None
    """An adapter to go on with: a folder, or a name on the hub."""
    any_base: StrictBool = False
    """Take an adapter of a base that goes by another name."""

    @property
    def called(self) -> str:
        """What it goes by: its name, or those of what it is put together from."""
        halves = [half.partition("@")[0] for half in (self.llm, self.vision) if half]
        return self.name or " + ".join(halves)


class SourceRecipe(Section):
    path: str
    """A .json, .jsonl or .parquet file, a dataset's folder, a .yaml list of sources, or user/name on the hub."""
    name: str | None = None
    """The subset, of a dataset that has several."""
    split: str | None = None
    """The split, of a dataset that has several."""
    revision: str | None = None
    """Of a dataset on the hub: a branch, tag or commit."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often its rows come in an epoch: 2 is twice, 0.5 is half of them."""
    max_size: Positive | None = None
    """Keep so many rows, the first; of what `shuffle` made first."""
    shuffle: StrictBool = False
    """Shuffle before `max_size`, always the same."""
    max_num_images: Positive | None = None
    """Leave out, and count, rows with more pictures and clips."""
    media_dir: str | None = None
    """The folder of its pictures and clips, or a .zip or .tar of it; else the data's own."""
    vl_only: StrictBool = False
    """Leave out, and count, rows without a picture or clip."""


class DataRecipe(Section):
    sources: Annotated[list[SourceRecipe], Field(min_length=1)]
    """One or more; `data: x` and `data: [x, y]` are short for it."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`skip` leaves out rows that cannot be trained on, and counts them."""
    oversize: Literal["error", "drop"] = "error"
    """`drop` leaves out rows that no pack has room for, and counts them."""
    balance: Literal["none", "sqrt"] = "none"
    """`sqrt`: an epoch has each source by the square root of its rows."""
    eval: float | str | None = None
    """What is held out: a share of the rows, as 0.05, or a file. `eval.data` is the same."""
    outside: StrictBool = False
    """Let rows name files outside the data's folder."""
    urls: StrictBool = False
    """Fetch pictures that rows name by public links."""
    cache_size: Size = 20 * 10**9
    """What shards behind a URL may take of this disk: bytes, or as 20GB."""


class RatesRecipe(Section):
    language_model: Rate | None = None
    """Its learning rate; else train.learning_rate, whose schedule and warm-up are everyone's."""
    projector: Rate | None = None
    """Its learning rate; else the same."""
    vision_tower: Rate | None = None
    """Its learning rate; else the same."""
    head: Rate | None = None
    """With task=classify: the learning rate of what scores; else the same."""

    @property
    def given(self) -> dict[str, float]:
        """By part, those that are written out."""
        return self.model_dump(exclude_none=True)


class TrainableRecipe(Section):
    language_model: Training | None = None
    """How it trains; else by `method`: an adapter, or in full."""
    projector: Training | None = None
    """How it trains; else frozen, but in full with method=full and task=pretrain."""
    vision_tower: Training | None = None
    """How it trains; else frozen."""
    lr: Annotated[RatesRecipe, BeforeValidator(lambda given: given or {})] = RatesRecipe()
    """Learning rates of parts by their names."""


class LoraRecipe(Section):
    r: Positive = 16
    """The rank of the adapters."""
    alpha: Positive = 32
    """Their scale is alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of an adapter's input that is left out at random."""
    dora: StrictBool = False
    """Learn the weights' magnitudes apart from their directions (DoRA)."""
    rslora: StrictBool = False
    """Scale by alpha / sqrt(r)."""
    target_modules: list[str] | None = None
    """The layers that take an adapter, by name; else all linear layers of a part."""
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = "default"
    """The adapters' first values, by PEFT's names."""


class PromptRecipe(Section):
    template: Literal[
        "auto",
        "hub",
        "llama_3",
        "mllava_v1",
        "idefics_2",
        "idefics_3",
        "idefics_2_hub",
        "idefics_3_hub",
        "smolvlm",
        "mfuyu_v1",
        "qwen2_vl",
        "qwen3_vl",
        "plain",
    ] = "auto"
    """How turns are written; `auto` is the model's own as Mantis wrote it, `hub` as its base did."""
    system: str | None = None
    """What is said first; "" for nothing. Else the template's own words."""
    labels: Literal["answer", "upstream"] = "answer"
    """What is scored: answers, or the header before them as well (`upstream`)."""


class MediaRecipe(Section):
    image_splitting: StrictBool | None = None
    """Quarters or tiles beside the whole picture, where the family has them."""
    max_image_size: Positive | Literal["480p", "720p", "1080p"] | None = None
    """The longest side of a picture in pixels; names for Fuyu alone."""
    backend: Literal["pil", "fast"] = "pil"
    """What opens pictures: to the bit what the published processors do, or sooner and about that (`fast`)."""
    num_frames: Positive | None = None
    """Frames of a clip, spread over all of it."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames a second of a clip, in place of `num_frames`."""
    max_frames: Positive | None = None
    """The most frames of a clip; `fps` needs it."""
    start: Seconds | None = None
    """Where clips begin, in s; else at their start."""
    end: Seconds | None = None
    """Where clips end, in s; else at their end."""
    sampling: Literal["uniform", "upstream"] = "uniform"
    """Which frames: even, or the original's whole strides (`upstream`)."""
    frame_label: str | None = None
    """What is said of each frame, as "{time:.1f}s"."""


class PackingRecipe(Section):
    enabled: StrictBool = True
    """Rows share packs; `packing: off` has one row in each."""
    max_length: Positive = 8192
    """Tokens in a pack: the main dial of memory."""
    max_patches: Positive | None = None
    """Vision patches in a pack; else by its tokens alone."""
    balance: Literal["auto"] | Positive = "auto"
    """So many packs in a row cost about the same; `auto`: as many as there are GPUs."""
    seed: int = 42
    """Of the order of rows and packs."""


class HeadRecipe(Section):
    problem: Problem | None = None
    """What is scored: numbers, one class a row, or several."""
    labels: Annotated[list[str], Field(min_length=1)] | None = None
    """Which labels, in the order of the scores; else all that the rows name."""
    score: Literal["last_token", "special_tokens"] = "last_token"
    """A linear head on the last token, or one token a label, as upstream's Qwen2-VL (`special_tokens`)."""
    class_weights: Literal["balanced"] | list[Annotated[float, Field(gt=0)]] | None = None
    """What a class counts in the loss: `balanced`, or a number each."""


class MemoryRecipe(Section):
    quantize: list[Part] | None = None
    """With QLoRA, the parts in 4 bits; else the language model."""
    attention: Literal["auto", "flash3", "flash2", "varlen", "flex", "segment", "sdpa", "eager"] = "auto"
    """`auto`: the fastest that there is here, each sample of a pack by itself."""
    kernels: Literal["auto", "off"] | list[Kernel] = "auto"
    """Layers that run as one kernel; `auto`: all that can here."""
    checkpointing: Literal["auto", "full", "off"] | Positive = "auto"
    """Layers that are computed again in the backward pass: `auto` is all on a GPU, or so many."""
    mlp_tile: Positive | None = None
    """The widest layers see so many tokens at a time."""
    offload_activations: StrictBool = False
    """What is kept for the backward pass goes to the host."""
    vision_cache: Literal["off", "memory", "disk"] = "off"
    """Pictures go through a frozen tower once, and what it made is kept."""
    optimizer: str = "auto"
    """By transformers' names: `adamw_bnb_8bit`, `paged_adamw_8bit`; `auto` is AdamW."""
    fit: Literal["auto", "off"] = "off"
    """`auto` picks the mildest settings with which the largest step fits the card."""


class EvalRecipe(Section):
    every: Positive | None = None
    """Evaluate after so many steps, on `data.eval`."""
    generate: Annotated[int, Field(ge=0)] | None = None
    """So many held-out rows are answered each time; else 4, where the model can."""
    metric: str | None = None
    """Keep the checkpoint that is best by it: `loss`, or one of the score head's."""
    patience: Positive | None = None
    """Stop after so many evaluations without a better one."""


class LaunchRecipe(Section):
    strategy: Strategy | None = None
    """How several GPUs train; else `single`, `ddp`, or `zero3` where the language model trains in full."""
    gpus: Positive | None = None
    """GPUs of this machine; else all, with a strategy."""
    nodes: Positive = 1
    """Machines."""
    sequence: Positive = 1
    """So many GPUs share each row, where one has no room for it."""

    @property
    def size(self) -> int:
        """How many GPUs are asked for in all, one where that is left open."""
        return (self.gpus or 1) * self.nodes


class Recipe(Section):
    """Every setting of a run; one home each.

    `train` holds TrainingArguments' own names, plus `tokens_per_step` or `samples_per_step`.
    """

    model: ModelRecipe
    """What is fine-tuned."""
    data: DataRecipe
    """What it learns from."""
    task: Task = "chat"
    """Chat about pictures, or about clips; scores; or captions, to bring up a projector."""
    method: Literal["lora", "qlora", "full"] = "qlora"
    """Adapters on 16-bit weights, or on 4-bit ones (QLoRA), or the weights themselves."""
    run_dir: Path
    """The run's folder; else runs/ and the recipe's name."""
    trainable: TrainableRecipe = TrainableRecipe()
    """Which parts train, and how."""
    lora: LoraRecipe = LoraRecipe()
    """The adapters; the words are PEFT's."""
    prompt: PromptRecipe = PromptRecipe()
    """How rows are written out for the model."""
    media: MediaRecipe = MediaRecipe()
    """How pictures and clips are read."""
    packing: PackingRecipe = PackingRecipe()
    """How rows share a pack, which is the batch."""
    head: HeadRecipe = HeadRecipe()
    """With task=classify: what is scored."""
    memory: MemoryRecipe = MemoryRecipe()
    """What costs memory, and what saves it."""
    eval: EvalRecipe = EvalRecipe()
    """What is looked at while it trains."""
    launch: LaunchRecipe = LaunchRecipe()
    """Several GPUs."""
    train: dict[str, Any] = {}
    """transformers' TrainingArguments by their own names, and the size of a step."""

    def part(self, name: Part) -> Training:
        """How a part trains: what is written out, else the method's default; of captions, the projector learns."""
        written = getattr(self.trainable, name)
        if written is not None:
            return written
        if self.task == "pretrain":
            return "full" if name == "projector" else "frozen"
        if self.method == "full":
            return "frozen" if name == "vision_tower" else "full"
        return "adapter" if name == "language_model" else "frozen"

    @property
    def parts(self) -> dict[Part, Training]:
        return {name: self.part(name) for name in ("language_model", "projector", "vision_tower")}

    @property
    def strategy(self) -> Strategy:
        """How several GPUs train: what is written out, else by what there is to share among those asked for."""
        if self.launch.strategy is not None:
            return self.launch.strategy
        if self.launch.size == 1:
            return "single"
        return "zero3" if self.part("language_model") == "full" else "ddp"

    @property
    def sharded(self) -> bool:
        """Whether each GPU holds a part of what trains, and no more."""
        return self.strategy not in ("single", "ddp")

    @property
    def parts_weights(self) -> bool:
        """Whether it holds a part of the weights, too."""
        return self.strategy in PARTED

    @property
    def quantized(self) -> list[Part]:
        """The parts held in 4 bits."""
        if self.memory.quantize is not None:
            return self.memory.quantize
        return ["language_model"] if self.method == "qlora" else []

    @property
    def in_use(self) -> Recipe:
        """How what it trains is used: what captions brought up is asked in turns, in the model's own template."""
        if self.task != "pretrain":
            return self
        return self.model_copy(update={"task": "chat", "prompt": PromptRecipe()})
