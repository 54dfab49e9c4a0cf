"""What lies in a run's folder, by name."""

from __future__ import annotations

METRICS = "metrics.jsonl"
"""Everything that was logged."""
GENERATIONS = "generations.jsonl"
"""What was said to held-out rows at each evaluation."""
SKIPPED = "skipped.jsonl"
"""The steps that were not taken, with their samples."""
CURVE = "loss.png"
PAGE = "report.html"
FACTS = "report.json"
"""What the page says that is not in the files above: what was known as the run began, and how it ended."""
