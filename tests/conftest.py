"""What every test stands on: no network, a cache of its own, and one tiny checkpoint for the session."""

import os

import pytest
from hypothesis import settings

# The same examples every time: a test that fails on one machine in ten helps nobody.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")

# Threads on tensors this small only wait for each other: 50 times slower with two on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def at_home(tmp_path_factory, monkeypatch):
    """The length cache in a folder of the test's own, and the hub out of reach."""
    monkeypatch.setenv("MANTIS_LITE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    """A `tiny_llava` as a checkpoint is published: weights, config, tokenizer and image processor."""
    from helpers import save_llava  # torch and transformers take seconds, so they are imported when asked for

    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def checkpoint(llava_folder):
    from mantis_lite.models.checkpoint import open_checkpoint
    from mantis_lite.recipe import ModelRecipe

    return open_checkpoint(ModelRecipe(name=str(llava_folder)))


@pytest.fixture(scope="session")
def encoder(checkpoint):
    from helpers import recipe

    return checkpoint.encoder(recipe())
