# Two commands on a fresh machine: make quickstart, make test. Each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all test-slow test-versions test-floor test-latest check bench bench-gpu bench-reliability peers bench-peers tiny clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: .venv/installed
	$(BIN)/mantis-lite quickstart --from-scratch

# Two files of tests at a time: each process has its own models, and some tests start processes of their own.
TESTS := $(BIN)/pytest --numprocesses 2 --dist loadfile

test: .venv/installed
	$(TESTS) -m "not slow"

# What only some users want, and their tests: many GPUs by DeepSpeed, which is built here, and Ray.
.venv/scale: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel 'ray[data]'
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation deepspeed
	touch $@

# lmms-eval, which asks our models its way, with what it imports: beside our own versions, some of which it rules out.
LMMS := chardet colorama dataproperty evaluate filelock==3.20.3 lmms-eval==0.7.3 loguru lxml \
	mbstrdecoder pathvalidate portalocker pytablewriter pytz sacrebleu tabledata tabulate tcolorpy tenacity typepy

.venv/lmms: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ $(LMMS)

test-slow: .venv/scale .venv/lmms
	$(TESTS) -m slow

test-all: test test-slow

# The oldest versions that pyproject.toml allows and the newest, each in an environment of its own, and the tests that
# the same numbers come out: packed and separate, original code and ours, stopped and not, saved and loaded again. Of
# torch there is one version on the index this is made on, so its floor is the one that is not tested.
VERSION_TESTS := isolation golden families resume rates adapters upstream quantized load train trackers secrets chat merge jinja
SHOWN := torch|transformers|trl|peft|datasets|accelerate|bitsandbytes|huggingface_hub|tokenizers|safetensors|numpy

test-versions: test-floor test-latest

test-floor test-latest: test-%: .venv-%/installed
	.venv-$*/bin/pip freeze --disable-pip-version-check | grep -E '^($(SHOWN))=='
	.venv-$*/bin/pytest -m "not slow" $(VERSION_TESTS:%=tests/test_%.py)

.venv-%/installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --constraint constraints-$*.txt \
		--editable . pytest pytest-timeout hypothesis tensorboard
	touch $@

# What a commit is held to: ruff, formatting, types (.pre-commit-config.yaml).
check: .venv/installed
	$(BIN)/pre-commit run --all-files

# Ways in turn on this machine, within 15 minutes on two idle cores; then benchmarks/README.md, which says how long.
bench: .venv/installed
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.preparation
	$(BIN)/python -m benchmarks.packed
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.clips
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.shards
	$(BIN)/python -m benchmarks.zips
	$(BIN)/python -m benchmarks.pictures
	$(BIN)/python -m benchmarks.likelihood
	$(BIN)/python -m benchmarks.table

# The same faults to runs here and to those of transformers, in 40 minutes; traces system calls and fills a disk where it may.
bench-reliability: .venv/installed
	$(BIN)/python -m benchmarks.reliability

# Other trainers on the same rows, each in an environment of its own, about 2 GB; see benchmarks/peers/README.md.
peers:
	PYTHON=$(PYTHON) benchmarks/peers/install.sh

bench-peers: .venv/installed
	$(BIN)/python -m benchmarks.peers

# On a machine with an NVIDIA GPU, in an environment that holds the package.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu

tiny: .venv/installed
	$(BIN)/python -m mantis_lite.tiny.build mantis_lite/tiny/checkpoint

clean:
	rm -rf .venv .venv-floor .venv-latest .venv-peers runs dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
