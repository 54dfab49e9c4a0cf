"""One small run on either side: as this package trains it, and as transformers' Trainer does the usual way.

The same texts, Tiny Mantis, LoRA on the same layers, dropout, order drawn from a seed, and four rows a step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from . import stock
from .forks import Forks

STEPS = 6
ROWS_A_STEP = 4
TRAIN = {"learning_rate": 0.02, "save_steps": 1, "save_total_limit": 2, "seed": 3, "num_train_epochs": 1}


def write_rows(file: Path, count: int) -> Path:
    """Rows of text."""
    turns = [(f"What is number {at}?", f"Number {at} is {'red' if at % 3 else 'blue'}.") for at in range(count)]
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


def recipe(rows: Path, run_dir: Path, train: dict[str, Any]) -> dict[str, Any]:
    """The run as this package has it."""
    lora = {"r": stock.RANK, "alpha": stock.ALPHA, "dropout": stock.DROPOUT, "target_modules": list(stock.LAYERS)}
    return {
        "model": "tiny",
        "data": str(rows),
        "run_dir": str(run_dir),
        "method": "lora",
        "lora": lora,
        "memory": {"kernels": "off"},
        "packing": {"max_length": 256},
        "train": TRAIN | {"samples_per_step": ROWS_A_STEP, "dataloader_num_workers": 0} | train,
    }


def usual(rows: Path, run_dir: Path, train: dict[str, Any], augment: bool = False) -> dict[str, Any]:
    """The run as `benchmarks.stock` has it."""
    own = {"per_device_train_batch_size": ROWS_A_STEP, "logging_steps": 1}
    return {"rows": str(rows), "run_dir": str(run_dir), "train": TRAIN | own | train, "augment": augment}


@dataclass(frozen=True)
class Side:
    """Runs of one side, by name, in a folder."""

    forks: Forks
    folder: Path
    stock: bool

    def __call__(
        self, name: str, rows: int = STEPS * ROWS_A_STEP, train: dict | None = None, augment: bool = False, **job: Any
    ) -> dict[str, Any]:
        """Train, as `Forks` does."""
        file = write_rows(self.folder / f"rows-{rows}.jsonl", rows)
        if self.stock:
            return self.forks(usual(file, self.run_dir(name), train or {}, augment), stock=True, **job)
        return self.forks(recipe(file, self.run_dir(name), train or {}), **job)

    def straight(self, name: str, **settings: Any) -> dict[str, Any]:
        """A run that nothing happens to, which must end well."""
        done = self(name, **settings)
        assert done["status"] == 0, done["said"]
        return done

    def run_dir(self, name: str) -> Path:
        return self.folder / name

    def losses(self, name: str) -> list[tuple[int, float]]:
        """What a run logged, by step."""
        if self.stock:
            file = self.run_dir(name) / "trainer_state.json"
            logs = json.loads(file.read_text())["log_history"] if file.exists() else []
        else:
            logs = [json.loads(line) for line in (self.run_dir(name) / "metrics.jsonl").read_text().splitlines()]
        return [(log["step"], log["loss"]) for log in logs if "loss" in log]

    def weights(self, name: str) -> str:
        return sha256((self.run_dir(name) / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()

    def same(self, name: str, other: str) -> bool:
        """Whether two runs logged and saved the same, to the bit."""
        return self.losses(name) == self.losses(other) and self.weights(name) == self.weights(other)
