"""What was trained -> GGUF, by the user's own llama.cpp, where that reads the architecture."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

from .agreement import Agreement
from .data.template import Token
from .errors import CheckError, RecipeError
from .merge import LEAST, merge
from .models.checkpoint import Checkpoint
from .models.small_files import read_small
from .models.weights import weight_files
from .plain_clients import TEMPLATE
from .trained import Trained, open_trained
from .training.checkpoints import written

CONVERTER = "convert_hf_to_gguf.py"
SHOWN = 6
"""The last lines of what a converter said that are shown where it failed."""

Outtype = Literal["f32", "f16", "bf16", "q8_0"]
BYTES = {"f32": 2.0, "f16": 1.0, "bf16": 1.0, "q8_0": 17 / 32}
"""Of each, by those of weights in 16 bits."""

TEXT_ALONE = "its language model alone is no working Mantis"
UNREAD = {
    "llava": f"llama.cpp's converter reads a LLaVA with a Pixtral tower and no other; {TEXT_ALONE}",
    "idefics2": "llama.cpp has no Idefics2, whose perceiver makes the tokens of a picture",
    "fuyu": "llama.cpp has no Fuyu, whose patches are its tokens",
}
"""The families that llama.cpp does not read, and why."""
TILED, SCALED = ("idefics3", "smolvlm"), ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Those that it reads: it cuts each picture of the first into tiles, and scales those of the second."""


@dataclass(frozen=True)
class Exported:
    """Two GGUF files, which llama.cpp takes together: the language model, and the tower with its projector.

    `agreement` is that of the merged model with its adapter, where one was merged; `notices` say what llama.cpp does
    otherwise than training did, unless it is told.
    """

    folder: Path
    model: Path
    projector: Path
    agreement: Agreement | None
    notices: tuple[str, ...]


def export(
    source: str | Path,
    to: str | Path | None,
    llama_cpp: str | Path,
    outtype: Outtype = "f16",
    overrides: Sequence[str] = (),
    python: str | Path | None = None,
    least: float | None = LEAST,
) -> Exported:
    """Write a run, an adapter or a model as GGUF into the folder `to`, or into one named after it that lies beside it.

    `llama_cpp` is a checkout of llama.cpp and `python` one that has its requirements, else this one. An adapter is
    merged first, for which `least` is as in `merge`. Raises RecipeError, for what llama.cpp does not read as well,
    DiskError, and CheckError where the merged model or a file is not what it was made from; nothing is left then.
    """
    if outtype not in get_args(Outtype):
        raise RecipeError(f"--outtype: expected one of {', '.join(get_args(Outtype))}, found {outtype}\n  Name one.")
    converter, runs = _converter(Path(llama_cpp)), shutil.which(python or sys.executable)
    if runs is None:
        raise RecipeError(f"--python: {python} is no program\n  Name the python of an environment, as env/bin/python.")
    trained = open_trained(source, overrides)
    _refuse_unread(trained)
    folder = Path(to) if to else _beside(trained)
    if folder.exists():
        raise RecipeError(f"--to: {folder} exists already\n  Name another folder, or remove it.")
    size = int(BYTES[outtype] * sum(file.stat().st_size for file in weight_files(trained.checkpoint)))
    with written(folder, size) as made, TemporaryDirectory(dir=made.parent) as aside:
        whole, agreement = trained, None
        if trained.adapter is not None:
            merged = merge(source, Path(aside) / "merged", overrides=overrides, least=least)
            whole, agreement = open_trained(merged.folder), merged.agreement
        model = _laid_out(whole.checkpoint, Path(aside) / "laid-out" / folder.name)
        names = f"model-{outtype}.gguf", f"mmproj-{outtype}.gguf"
        command = [runs, str(converter), str(model), "--outtype", outtype]
        _convert(command, made / names[0])
        _require_template(made / names[0], model / TEMPLATE)
        _convert([*command, "--mmproj"], made / names[1])
    return Exported(folder, folder / names[0], folder / names[1], agreement, tuple(_notices(trained)))


def _converter(llama_cpp: Path) -> Path:
    found = llama_cpp / CONVERTER
    if not found.is_file():
        raise RecipeError(
            f"--llama-cpp: {llama_cpp} has no {CONVERTER}\n"
            "  Name a checkout: git clone ggml-org/llama.cpp from GitHub, and pip install -r "
            "requirements/requirements-convert_hf_to_gguf.txt in an environment of its own, whose python is --python."
        )
    return found


def _refuse_unread(trained: Trained) -> None:
    name, kind = trained.name, trained.checkpoint.config.model_type
    if trained.head is not None:
        raise RecipeError(
            f"{name}: has a score head, and llama.cpp has none for these models\n"
            f"  mantis-lite predict {name} data=new.json"
        )
    if kind not in (*TILED, *SCALED):
        raise RecipeError(
            f"{name}: is of {kind}, which is not supported there: {UNREAD[kind]}\n"
            f"  mantis-lite serve {name} serves every family; as GGUF there are {', '.join((*TILED, *SCALED))}."
        )
    if kind in TILED and Token("<row_1_col_1>") not in dict(trained.encoder.vision.tokens((4096, 4096))):
        raise RecipeError(
            f"{name}: was trained on pictures that are not cut, and llama.cpp cuts each picture of {kind} into tiles\n"
            f"  mantis-lite serve {name}, or train with media.image_splitting=true and a larger media.max_image_size."
        )


def _beside(trained: Trained) -> Path:
    """A folder named after what was trained, beside it; here for what is on the hub."""
    there = trained.folder.resolve() if Path(trained.name).exists() else Path(Path(trained.name).name)
    return there.with_name(f"{there.name}-gguf")


def _laid_out(checkpoint: Checkpoint, folder: Path) -> Path:
    """The model in a folder of its own: links to its weights, and its small files as the converter has to see them."""
    folder.mkdir(parents=True)
    checkpoint.copy_small_files(folder)
    for file in weight_files(checkpoint):
        (folder / file.name).symlink_to(file.resolve())
    settings = folder / "tokenizer_config.json"
    if (folder / TEMPLATE).is_file() and settings.is_file():  # it prefers a template in there; transformers does not
        kept = {key: value for key, value in read_small(settings).items() if key != "chat_template"}
        settings.write_text(json.dumps(kept, indent=2) + "\n")
    if checkpoint.config.model_type in TILED:  # it goes by the class of the text model, which published configs name
        config = read_small(folder / "config.json")
        text = config["text_config"]
        text["architectures"] = text.get("architectures") or ["VLlama3ForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _convert(command: Sequence[str], file: Path) -> None:
    """Run the converter, offline. It lets a tokenizer bring code, which `refuse_hostile` has let none do."""
    words = [*command, "--outfile", str(file)]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    )
    lines = [f"    {line[:200]}" for line in done.stdout.splitlines() if line.strip()][-SHOWN:]
    if os.strerror(errno.ENOSPC) in done.stdout:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if done.returncode or not _is_gguf(file):
        said = "\n".join([f"ended with {done.returncode}, and wrote no {file.name}:", *lines])
        raise RecipeError(
            f"--llama-cpp: {command[1]} {said}\n"
            "  See that --python has its requirements, and that the checkout is not older than the model."
        )


def _is_gguf(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def _require_template(file: Path, template: Path) -> None:
    """Raise CheckError where the template of training is not what is in the file."""
    if not template.is_file():  # a published model that has one elsewhere, or none
        return
    text = template.read_bytes()
    key, string = b"tokenizer.chat_template", 8
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(key + struct.pack("<IQ", string, len(text)) + text) < 0:
            raise CheckError(
                f"export: {file.name} has another chat template than {template.name} beside the model\n"
                "  Take another version of llama.cpp, or serve the model with mantis-lite serve."
            )


def _notices(trained: Trained) -> Iterator[str]:
    """What llama.cpp does otherwise than training did, and what mends it."""
    encoder, processor = trained.encoder, trained.checkpoint.image_processor
    if trained.checkpoint.config.model_type in SCALED:
        window = (processor.patch_size * processor.merge_size) ** 2
        least, most = (processor.size[edge] // window for edge in ("shortest_edge", "longest_edge"))
        yield (
            "llama.cpp shows a picture in 8 to 4,096 tokens; as in training: "
            f"--image-min-tokens {max(1, least)} --image-max-tokens {most}"
        )
    if encoder.max_image_size:
        yield f"llama.cpp does not scale pictures to {encoder.max_image_size} px, as training did: give it such"
    if not encoder.template.blank_before_picture:
        yield "llama.cpp writes a blank before a picture that begins a turn, and training did not: begin with text"
