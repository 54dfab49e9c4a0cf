"""What every test stands on: no network, a cache of its own, and one tiny checkpoint for the session."""

import os
from functools import cache

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


def pytest_generate_tests(metafunc):
    """A test that asks for `family` runs on each of them."""
    if "family" in metafunc.fixturenames:
        from families import FAMILIES

        metafunc.parametrize("family", FAMILIES, scope="session")


# torch and transformers take seconds, so what needs them is imported when it is asked for.


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a family's tiny checkpoint, by name, as it is published."""
    from families import save

    return cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def checkpoint_of(folder_of):
    from mantis_lite.models.checkpoint import open_checkpoint
    from mantis_lite.recipe import ModelRecipe

    return cache(lambda name: open_checkpoint(ModelRecipe(name=str(folder_of(name)))))


@pytest.fixture(scope="session")
def encoder_of(checkpoint_of):
    from helpers import recipe

    return cache(lambda name: checkpoint_of(name).encoder(recipe()))


@pytest.fixture(scope="session")
def llava_folder(folder_of):
    return folder_of("llava")


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of):
    return checkpoint_of("llava")


@pytest.fixture(scope="session")
def encoder(encoder_of):
    return encoder_of("llava")


@pytest.fixture
def deaths_seen_soon(monkeypatch):
    """Torch looks whether a DataLoader's workers live every half second, for five."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))


@pytest.fixture(scope="session")
def forks():
    """Runs of several processes, forked from one that has imported DeepSpeed as well, where it is installed."""
    from importlib.util import find_spec

    from benchmarks.forks import Forks

    os.environ["DS_ACCELERATOR"] = "cpu"
    with Forks(*(["deepspeed"] if find_spec("deepspeed") else [])) as forks:
        yield forks
