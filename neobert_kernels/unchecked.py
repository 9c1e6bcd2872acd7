"""Functions of this package without their argument checks, for a caller that has checked at its
own door: inside a model, where shapes and dtypes follow from the weights, asking again at every op
costs the host as much as the op. Arguments, results and autograd are those of the public functions.

Kernels still refuse a dtype that they do not serve. A shape that does not fit is not looked for.
"""

from ._library import ops
from .attention import unchecked_varlen_attention_qkv as varlen_attention_qkv
from .linear import unchecked_linear as linear
from .linear import unchecked_linear_swiglu as linear_swiglu
from .rms_norm import unchecked_rms_norm as rms_norm
from .rotary import unchecked_apply_rotary_qkv_ as apply_rotary_qkv_
from .rotary_attention import unchecked_rotary_attention_ as rotary_attention_

# Of these the op itself, which has no autograd.
linear_add = ops.linear_add
rms_linear_rotary = ops.rms_linear_rotary
rms_linear_swiglu = ops.rms_linear_swiglu
sum_of_squares = ops.sum_of_squares

__all__ = [
    "apply_rotary_qkv_",
    "linear",
    "linear_add",
    "linear_swiglu",
    "rms_linear_rotary",
    "rms_linear_swiglu",
    "rms_norm",
    "rotary_attention_",
    "sum_of_squares",
    "varlen_attention_qkv",
]
