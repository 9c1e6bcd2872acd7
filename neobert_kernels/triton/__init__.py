"""Triton kernels, one file per op: kernel, launcher, registration for CUDA tensors.

Each file holds a small table of tiles per architecture; nothing is tuned at import or at the first
call. `python -m neobert_kernels tune` measures other tiles on the GPU at hand.
"""

from . import (  # noqa: F401
    attention,
    attention_bwd,
    batch_invariant_linear,
    cross_entropy,
    pooling,
    rms_norm,
    rotary,
    swiglu,
)
