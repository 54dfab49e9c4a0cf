# Two commands on a fresh machine: make quickstart, make test. Each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all test-slow check bench bench-gpu tiny clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: .venv/installed
	$(BIN)/mantis-lite quickstart --from-scratch

test: .venv/installed
	$(BIN)/pytest -m "not slow"

test-slow: .venv/installed
	$(BIN)/pytest -m slow

test-all: test test-slow

# What a commit is held to: ruff, formatting, types (.pre-commit-config.yaml).
check: .venv/installed
	$(BIN)/pre-commit run --all-files

bench: .venv/installed
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.preparation
	$(BIN)/python -m benchmarks.clips
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.loss

# On a machine with an NVIDIA GPU, in an environment that holds the package.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu

tiny: .venv/installed
	$(BIN)/python -m mantis_lite.tiny.build mantis_lite/tiny/checkpoint

clean:
	rm -rf .venv runs dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
