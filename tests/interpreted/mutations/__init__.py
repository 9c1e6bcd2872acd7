"""Kernels broken on purpose, a file an op. Each must be caught by the named test, or that test is
worth nothing.

`python -m tests.interpreted.mutations` (with TRITON_INTERPRET=1) breaks them one by one and prints,
as JSON, which were caught; tests/test_triton_interpreter.py runs it.
"""

from . import (
    attention,
    attention_bwd,
    batch_invariant_linear,
    cross_entropy,
    epilogue,
    pooling,
    rms_norm,
    rotary,
    swiglu,
)
from .mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS: list[Mutation] = [
    *rms_norm.MUTATIONS,
    *epilogue.MUTATIONS,
    *swiglu.MUTATIONS,
    *rotary.MUTATIONS,
    *pooling.MUTATIONS,
    *cross_entropy.MUTATIONS,
    *attention.MUTATIONS,
    *attention_bwd.MUTATIONS,
    *batch_invariant_linear.MUTATIONS,
]
