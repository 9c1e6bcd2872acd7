"""Root-mean-square layer norm (Zhang & Sennrich 2019, eq. 4), alone and after a residual add."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import at_least_float32, check_dtype, check_same_device, check_shape
from ._library import define, ops


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y = x * rsqrt(mean(x^2) + eps) * weight, computed in float32 and rounded once.

    Args:
        x: (..., dim) float32, bfloat16 or float16, CPU or CUDA.
        weight: (dim,), any of these dtypes, need not be that of x.
        eps: added to the mean square.

    Returns:
        (..., dim) in x.dtype. Differentiable in x and weight.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes or devices that do not fit.
    """
    _check("rms_norm", x, weight)
    return unchecked_rms_norm(x, weight, eps)


def unchecked_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm`, for tensors that the caller has checked (`unchecked.py`)."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return ops.rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The pre-norm block's residual add and the norm after it, in one pass over memory.

    The sum is rounded to residual.dtype first; the norm is that of the rounded sum, so that it is
    what a later reader of the sum would compute.

    Args:
        x: (..., dim) a branch's output, float32, bfloat16 or float16.
        residual: like x in shape; its dtype may differ (a float32 stream with bfloat16 branches).
        weight: (dim,).
        eps: added to the mean square.

    Returns:
        (rms_norm(residual + x) in x.dtype, residual + x in residual.dtype), both (..., dim).
        Differentiable in x, residual and weight.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes or devices that do not fit.
    """
    _check("add_rms_norm", x, weight)
    check_dtype("add_rms_norm", residual=residual)
    check_same_device("add_rms_norm", x=x, residual=residual)
    check_shape("add_rms_norm", "residual", residual, x.shape, "x")
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or weight.requires_grad
    ):
        return _AddRMSNorm.apply(x, residual, weight, eps)
    return ops.add_rms_norm(x, residual, weight, eps)[:2]


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    check_dtype(op, x=x, weight=weight)
    check_same_device(op, x=x, weight=weight)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape (..., dim), got a scalar")
    check_shape(op, "weight", weight, x.shape[-1:], f"the last axis of x {tuple(x.shape)}")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = ops.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = ops.rms_norm_bwd(dy, None, x, weight, rstd)
        return dx, dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, total, rstd = ops.add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.x_dtype = x.dtype
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal):
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return None if dtotal is None else dtotal.to(ctx.x_dtype), dtotal, None, None
        if ctx.x_dtype == total.dtype:
            dx, dweight = ops.rms_norm_bwd(dy, dtotal, total, weight, rstd)
            return dx, dx, dweight, None
        dx, dresidual, dweight = ops.add_rms_norm_bwd(dy, dtotal, total, weight, rstd)
        return dx, dresidual, dweight, None


def reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = at_least_float32(x)
    rstd = torch.rsqrt(x32.square().mean(-1) + eps)
    return (x32 * rstd.unsqueeze(-1) * at_least_float32(weight)).to(x.dtype), rstd


def reference_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = (at_least_float32(residual) + at_least_float32(x)).to(residual.dtype)
    y, rstd = reference(total.to(torch.promote_types(total.dtype, torch.float32)), weight, eps)
    return y.to(x.dtype), total, rstd


def reference_bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """With x̂ = x * rstd and g = dy * weight: dx = rstd * (g - x̂ * mean(g * x̂)) [+ dtotal]."""
    dy32, x_hat = at_least_float32(dy), at_least_float32(x) * rstd.unsqueeze(-1)
    g = dy32 * at_least_float32(weight)
    dx = (g - x_hat * (g * x_hat).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    if dtotal is not None:
        dx = dx + at_least_float32(dtotal)
    dweight = (dy32 * x_hat).flatten(0, -2).sum(0) if x.dim() > 1 else dy32 * x_hat
    return dx.to(x.dtype), dweight.to(weight.dtype)


def reference_add_bwd(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference_bwd`; the gradient of the sum also in dy.dtype, for the branch added to it."""
    wide = torch.promote_types(total.dtype, torch.float32)
    dtotal = None if dtotal is None else dtotal.to(wide)
    dsum, dweight = reference_bwd(dy, dtotal, total.to(wide), weight, rstd)
    # Copies: where the dtypes are equal, two outputs of an op must not be one tensor.
    return dsum.to(dy.dtype, copy=True), dsum.to(total.dtype, copy=True), dweight


define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)", reference)
define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps)"
    " -> (Tensor y, Tensor total, Tensor rstd)",
    reference_add,
)
define(
    "rms_norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor rstd)"
    " -> (Tensor dx, Tensor dweight)",
    reference_bwd,
)
define(
    "add_rms_norm_bwd(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor rstd)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight)",
    reference_add_bwd,
)
