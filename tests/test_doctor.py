"""The doctor: a machine that is well, what it says of one that is not, and what it tells others."""

import re
from pathlib import Path

import pytest
import torch

from mantis_lite import doctor as module
from mantis_lite import self_test
from mantis_lite.contract import PACKAGES
from mantis_lite.data.collate import collate
from mantis_lite.doctor import Diagnosis, doctor, lines, public
from mantis_lite.errors import CheckError
from mantis_lite.self_test import Check
from mantis_lite.training.start import start

ROOT = Path(__file__).parents[1]
SELF_TEST = ["train", "resume", "merge", "packed == separate"]


def found(diagnosis: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in diagnosis.checks}


def test_a_machine_that_is_well_and_what_it_tells_others():
    diagnosis = doctor()
    said = lines(diagnosis)
    assert list(found(diagnosis))[-4:] == SELF_TEST and not diagnosis.failed, said
    assert said[-1].split() == ["verdict", "all", str(len(diagnosis.checks)), "checks", "are", "ok"]
    assert diagnosis.facts["torch"].startswith(torch.__version__)
    assert not [line for line in said if str(Path.home()) in line or re.search(r"(^|\s)/\w", line)]


def one_segment(samples, pictures):
    """What `collate` would come to if it lost the boundaries of a pack's samples."""
    batch = collate(samples, pictures)
    length = batch["input_ids"].shape[1]
    ends = torch.tensor([0, length], dtype=torch.int32)
    return batch | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}


def test_what_is_broken_is_named(monkeypatch):
    monkeypatch.setattr(self_test, "collate", one_segment)
    monkeypatch.setattr(self_test, "start", lambda recipe, callbacks=(): start(recipe, callbacks, from_scratch=True))
    diagnosis = doctor()
    checks = found(diagnosis)
    assert [check.name for check in diagnosis.failed] == ["resume", "packed == separate"]
    assert checks["resume"].found == "a run that is stopped after step 2 goes on from step 0"
    apart = re.match(r"logits of a row in a pack are apart by ([\d.e+-]+) from", checks["packed == separate"].found)
    assert apart and float(apart[1]) > 2 * max(self_test.LOGITS_APART.values())  # so that 16 bits would tell as well
    assert lines(diagnosis)[-1].endswith("failed: resume, packed == separate")


def test_what_stands_on_a_run_that_failed_is_not_tried(monkeypatch):
    def fails(recipe):
        raise OSError(28, "No space left on device", str(Path.home() / "a b" / "secret.bin"))

    monkeypatch.setattr(self_test, "start", fails)
    diagnosis = doctor()
    train, *others = [found(diagnosis)[name] for name in SELF_TEST]
    assert re.match(r"OSError at test_doctor.py:\d+: \[Errno 28\] No space left on device", train.found)
    assert not train.passed and {(o.passed, o.found) for o in others} == {(False, "not tried, as training failed")}
    (said,) = [line for line in lines(diagnosis) if line.startswith("train ")]
    assert "FAILED: OSError" in said and str(Path.home()) not in said


def test_a_run_that_learns_nothing_or_goes_on_otherwise(monkeypatch, tmp_path):
    losses = {"whole": [1.0, 0.9, 0.8, 0.7], "stopped": [1.0, 0.9, 0.8, 0.9], "flat": [1.0, 0.9, 0.9, 1.0]}
    monkeypatch.setattr(self_test, "_losses", lambda run_dir: losses[run_dir.name])
    self_test._draw(data := tmp_path / "train.jsonl")
    with pytest.raises(CheckError, match=r"does not fall in 4 steps on 8 rows: 1.0000 0.9000 0.9000 1.0000"):
        self_test._train(self_test.tiny_recipe(data, tmp_path / "flat"))
    with pytest.raises(CheckError, match=r"after step 2 the losses are .* 0.9000, else .* 0.7000"):
        self_test._resume(self_test.tiny_recipe(data, tmp_path / "stopped"), tmp_path / "whole")


def test_packages_that_are_missing_or_old(monkeypatch):
    needed = ["torch>=99", "numpy>=2", "not-there>=1", "other; extra == 'gpu'"]
    monkeypatch.setattr(module, "requires", lambda name: needed)
    diagnosis = doctor(test=False)
    (failed,) = diagnosis.failed
    assert failed.name == "packages" and failed.found == (
        f"torch {module.version('torch')}, where >=99 is needed; not-there is not here. "
        "Run pip install --upgrade mantis-lite."
    )
    assert diagnosis.facts["extra gpu"] == "not installed: other is not here"


def test_shared_memory_that_is_short(monkeypatch):
    monkeypatch.setattr(module, "loader_workers", lambda: 4)
    assert "GiB are free" in found(doctor(test=False))["shared memory"].found
    monkeypatch.setattr(module, "SHM", 1 << 60)
    (failed,) = doctor(test=False).failed
    assert (
        failed.name == "shared memory" and "and 4 workers need 1. Start the container with --shm-size" in failed.found
    )


def test_a_gpu_that_torch_does_not_see(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86.15\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (failed,) = doctor(test=False).failed
    assert failed.name == "GPU" and failed.found.startswith("there is a driver, 570.86.15, but torch, built for ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not doctor(test=False).failed
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    assert not doctor(test=False).failed


@pytest.mark.parametrize(
    ("capability", "says"),
    [((7, 5), "float16: bfloat16 is only emulated below capability 8.0"), ((8, 6), "bfloat16, which the GPU has")],
)
def test_bfloat16_is_what_the_card_has_not_what_torch_says(monkeypatch, capability, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert module._precision() == says


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no file /srv/a/b.json: it", "no file .../b.json: it"),
        (f"{Path.home()}/x.json", ".../x.json"),
        ("'/tmp/mantis-lite-x/whole' is", "'.../whole' is"),
        (f"{Path.cwd()}/a/x.json, {Path.home()}: {Path.home()}/a b/x", ".../x.json, ~: .../a b/x"),
        ("see https://pytorch.org/get-started/locally", "see https://pytorch.org/get-started/locally"),
        ("key hf_" + "a" * 30, "(a line that may hold a token is left out)"),
        ("12 tokens/s", "12 tokens/s"),
    ],
)
def test_what_is_private_is_not_told(text, told):
    assert public(text) == told


@pytest.mark.skipif(not (ROOT / "constraints.txt").is_file(), reason="runs in a checkout")
def test_what_was_tested_on_is_what_the_suite_runs_on():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert module.TESTED == {name: pins[name] for name in PACKAGES if name != "mantis_lite"}
