"""The CUDA C++ kernels without a GPU: the same source, compiled for the host, against float64.

The emulation (tests/cuda_emulation) runs every CUDA thread, checks each access for alignment and
bounds, and fails on a divergent shuffle or barrier. What it cannot show is speed, and the errors of
the GPU's own exp and division.
"""

import shutil

import pytest
import torch
from torch import Tensor

from neobert_kernels import rms_norm as _  # noqa: F401  (the module is shadowed by the function)
from neobert_kernels._library import ops as reference_ops  # noqa: F401
from tests.accuracy import assert_accurate
from tests.cuda_emulation.build import COMPILER, ROOT, Emulated

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
