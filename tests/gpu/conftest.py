"""Tests that need a CUDA GPU; skipped, and said so, where there is none. `make gpu` runs them."""

from pathlib import Path

import pytest
import torch

from neobert_kernels import _compiled
from neobert_kernels._library import python_kernels_serve


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(params=["serving", "triton"] if _compiled.CUDA_LOADED else ["serving"])
def kernels(request):
    """What the dispatcher chooses, and then the Triton kernels where it chose CUDA C++."""
    if request.param == "serving":
        yield
        return
    with python_kernels_serve("CUDA"):
        yield
