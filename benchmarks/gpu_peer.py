"""The way that is usual without this package: transformers, PEFT and bitsandbytes, a row at a time, all logits."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig, LlamaForCausalLM

from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.schema import parse
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.recipe import ModelRecipe
from mantis_lite.recipe_file import load_recipe

from . import card
from .gpu_models import Place, drawn
from .gpu_training import WARM, fault

ROWS = 4
"""Rows in an optimizer step, each by itself."""
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measured(place: Place, method: str, rank: int, model: Path, data: Path, steps: int) -> dict[str, Any]:
    """Steps of ROWS rows by transformers' own model, attention and loss, with its layers checkpointed."""
    card.limit(None)
    card.clean()
    trained, weights = decoder(model, method, rank), card.held()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    rows = encoded(model, data)
    losses, norms, times, counts = [], [], [], []
    card.forget_peaks()
    for step in range(WARM + steps):
        chosen = [rows[(ROWS * step + at) % len(rows)] for at in range(ROWS)]
        begun = time.perf_counter()
        loss, norm = descended(trained, optimizer, parameters, chosen)
        card.wait()
        times.append(time.perf_counter() - begun)
        counts.append([sum(map(len, chosen)), sum(int((row.labels != -100).sum()) for row in chosen)])
        losses.append(loss)
        norms.append(norm)
    taken, done = np.array(times[WARM:]), np.array(counts[WARM:])
    tensors, reserved = card.peaks()
    return {
        "tokens_per_second": round(float(done[:, 0].sum() / taken.sum())),
        "tokens_per_second_min": round(float((done[:, 0] / taken).min())),
        "tokens_per_second_max": round(float((done[:, 0] / taken).max())),
        "supervised_per_second": round(float(done[:, 1].sum() / taken.sum())),
        **card.spread("step_seconds", taken),
        "steps": steps,
        "tokens_per_step": round(float(done[:, 0].mean())),
        "weights_gib": round(weights, 2),
        "peak_gib": round(tensors, 3),
        "reserved_gib": round(reserved, 3),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "grad_norm_min": round(min(norms), 5),
    } | fault(losses, min(norms))


def decoder(model: Path, method: str, rank: int) -> Any:
    """The language model alone, with adapters, as PEFT's and transformers' guides set it up."""
    config = AutoConfig.from_pretrained(model).text_config
    dtype = torch.bfloat16 if card.there() else torch.float32
    quantization = device_map = None
    if method == "qlora":
        double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        quantization = BitsAndBytesConfig(load_in_4bit=True, **double)
        device_map = {"": 0} if card.there() else None
    made = drawn(LlamaForCausalLM, config, dtype, quantization, device_map)
    card.clean()
    if method == "qlora":
        made = prepare_model_for_kbit_training(made, gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS, task_type="CAUSAL_LM")
    adapted = get_peft_model(made, lora)
    adapted.config.use_cache = False
    return adapted.train()


def encoded(model: Path, data: Path) -> list[Any]:
    """The same rows that packs are made of."""
    encoder = open_checkpoint(ModelRecipe(name=str(model))).encoder(
        load_recipe("chat", [f"model={model}", f"data={data}"])
    )
    folder = MediaFolder(data.parent)
    return [encoder.encode(parse(json.loads(line), "row", folder)) for line in data.read_text().splitlines()]


def descended(model: Any, optimizer: Any, parameters: Sequence[Any], rows: Sequence[Any]) -> tuple[float, float]:
    """One optimizer step over rows; returns the mean loss and the gradient's norm before it is clipped."""
    total = 0.0
    for row in rows:
        ids, labels = (torch.from_numpy(each).long()[None].to(card.device()) for each in (row.input_ids, row.labels))
        with torch.autocast(card.device(), torch.bfloat16, enabled=card.there()):
            loss = model(input_ids=ids, labels=labels).loss / len(rows)
        loss.backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    optimizer.step()
    optimizer.zero_grad()
    return total, norm
