"""Fixtures for every test: a seed, and freshly allocated memory filled with NaN."""

import pytest
import torch

# Run by test_triton_interpreter.py, in processes in which Triton interprets.
collect_ignore = ["interpreted"]


@pytest.fixture(autouse=True)
def _seed_and_poison(request):
    """Seeds torch, and fills torch.empty with NaN so that an unwritten output element shows.

    The fill needs deterministic mode, in which a few ops refuse to run; tests that train opt out
    with the marker `no_poison`.
    """
    torch.manual_seed(0)
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """For a module of tiny tensors, on which more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
