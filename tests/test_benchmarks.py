"""The GPU's benchmarks run in small shapes without one, so that a lent card is not spent on mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["G0,G9,G10", "G3,G11"])
def test_groups_run_in_small_shapes(groups):
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--only", groups]
    before = (ROOT / "benchmarks/results").stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "at fault: none" in done.stdout
    assert (ROOT / "benchmarks/results").stat().st_mtime_ns == before
