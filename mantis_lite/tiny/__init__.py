"""Tiny Mantis: a small trained LLaVA model in Mantis' published layout, for first runs and tests."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
