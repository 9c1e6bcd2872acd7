"""Fused ops for packed encoders: functional, differentiable, for CPU and CUDA tensors.

    from neobert_kernels import rms_norm, swiglu, apply_rotary, varlen_attention

Each op is one schema in the torch.library namespace `neobert`, with a plain PyTorch reference and
a kernel per device; PyTorch's dispatcher chooses. `python -m neobert_kernels` prints which serves.
"""

from . import _compiled, _gpu  # noqa: F401  (C++ kernels before any Python kernel for their key)
from .attention import varlen_attention, varlen_attention_qkv
from .cross_entropy import linear_cross_entropy
from .linear import linear, linear_swiglu
from .pooling import pool
from .rms_norm import add_rms_norm, rms_norm
from .rotary import apply_rotary, apply_rotary_qkv_
from .rotary_attention import rotary_attention_
from .swiglu import swiglu

if _gpu.why_not() is None:
    from . import triton  # noqa: F401

__all__ = [
    "add_rms_norm",
    "apply_rotary",
    "apply_rotary_qkv_",
    "linear",
    "linear_cross_entropy",
    "linear_swiglu",
    "pool",
    "rms_norm",
    "rotary_attention_",
    "swiglu",
    "varlen_attention",
    "varlen_attention_qkv",
]
