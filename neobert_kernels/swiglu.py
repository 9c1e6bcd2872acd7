"""SwiGLU, the gated activation of the feed-forward block (Shazeer 2020, eq. 6)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import at_least_float32, check_dtype
from ._library import define, ops


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of the last axis, in that order.

    Args:
        gate_up: (..., 2 * width) float32, bfloat16 or float16, CPU or CUDA.

    Returns:
        (..., width) in gate_up.dtype, computed in float32 and rounded once. Differentiable.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: an odd last axis.
    """
    check_dtype("swiglu", gate_up=gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu: gate_up must have shape (..., 2 * width), got {tuple(gate_up.shape)}"
        )
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwiGLU.apply(gate_up)
    return ops.swiglu(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return ops.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ops.swiglu_bwd(dy, *ctx.saved_tensors)


def reference(gate_up: Tensor) -> Tensor:
    gate, up = at_least_float32(gate_up).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def reference_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = at_least_float32(gate_up).chunk(2, -1)
    dy32, sigmoid = at_least_float32(dy), torch.sigmoid(gate)
    dgate = dy32 * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([dgate, dy32 * gate * sigmoid], -1).to(gate_up.dtype)


define("swiglu(Tensor gate_up) -> Tensor", reference)
define("swiglu_bwd(Tensor dy, Tensor gate_up) -> Tensor", reference_bwd)
