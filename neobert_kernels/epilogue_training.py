"""The epilogue GEMMs of `epilogue` with gradients: a pre-norm block's training forward.

    (qkv, x)     = norm_linear_rotary(x, squares, qkv_weight, attention_gain, cos, sin, positions)
    (x, squares) = linear_add(attention(qkv), wo_weight, x)
    (gated, x)   = norm_linear_swiglu(x, squares, w12_weight, ffn_gain)
    (x, squares) = linear_add(gated, w3_weight, x)

The backward is that of the unfused block: its products, and the kernels of rms_norm, rotary and
swiglu. What is not there between the two passes is the norm's output: the backward makes it again
from the residual stream, for the gradient of the weight that multiplied it.

The residual stream goes *through* the functions that hold a norm: what they return as x is their
argument, a view of it for autograd. So the gradient that comes back along the stream reaches the
norm's backward, which adds it in the pass that it makes. Were x used twice instead, autograd would
add the two gradients in a pass over the stream of its own.

Weights are taken as they are stored, and autocast is honoured: what each call multiplies by is made
from them, gain, rows in turn and dtype in one pass, in the place of autocast's own cast. Neither
that nor a cast of it is saved.

Not public: the gradient of qkv is rotated where it lies, for attention's backward, which made it,
has no more use for it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import at_least_float32
from ._library import ops
from .epilogue import interleave_gate_up
from .linear import _dweight, autocast_dtype, product


def norm_linear_rotary(
    x: Tensor,
    squares: Tensor,
    weight: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The rotated projection of rms_norm(x), and x for the residual add.

    Args:
        x: (tokens, dim), the residual stream, float32 or in the dtype of the product: that of
            autocast where it is on, else of weight.
        squares: (tokens, ceil(dim / BLOCK)) float32, its `sum_of_squares`, which has no gradient:
            the norm's is in that of x.
        weight: (heads * 3 * head_dim, dim), gain: (dim,), as the modules hold them.
        cos, sin, positions, eps: as for `rms_linear_rotary`.

    Returns:
        (tokens, heads, 3, head_dim) in the dtype of the product, and x. Differentiable in x, weight
        and gain.

    Raises:
        TypeError: x in another dtype.
    """
    dtype = _product_dtype("norm_linear_rotary", x, weight)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, gain):
        return _NormLinearRotary.apply(x, squares, weight, gain, cos, sin, positions, eps, dtype)
    folded = _folded(weight, gain, dtype)
    return ops.rms_linear_rotary(x, squares, folded, cos, sin, positions, eps), x


def norm_linear_swiglu(
    x: Tensor, squares: Tensor, weight: Tensor, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """swiglu(rms_norm(x) @ weight.T), and x for the residual add.

    Args:
        x, squares, gain, eps: as for `norm_linear_rotary`.
        weight: (2 * width, dim), the gate's rows before the up's, as the module holds it.

    Returns:
        (tokens, width) in the dtype of the product, and x. Differentiable in x, weight and gain.

    Raises:
        As `norm_linear_rotary`.
    """
    dtype = _product_dtype("norm_linear_swiglu", x, weight)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, gain):
        return _NormLinearSwiGLU.apply(x, squares, weight, gain, eps, dtype)
    return ops.rms_linear_swiglu(x, squares, _folded_in_turn(weight, gain, dtype), eps), x


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """residual + x @ weight.T, and its sums of squares: `epilogue.linear_add`, differentiable in
    all three; the squares have no gradient. x and weight are cast where autocast is on."""
    dtype = autocast_dtype(x) or weight.dtype
    x = x.to(dtype)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, residual):
        return _LinearAdd.apply(x, weight, residual)
    return ops.linear_add(x, weight.to(dtype), residual)


class _NormLinearRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, squares, weight, gain, cos, sin, positions, eps, dtype):
        folded = _folded(weight, gain, dtype)
        qkv = ops.rms_linear_rotary(x, squares, folded, cos, sin, positions, eps)
        ctx.save_for_backward(x, squares, weight, gain, cos, sin, positions)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return qkv, x

    @staticmethod
    @once_differentiable
    def backward(ctx, dqkv, dx):
        *saved, cos, sin, positions = ctx.saved_tensors
        if dqkv is not None:
            dqkv = dqkv.contiguous()
            ops.rotary_qkv_(dqkv, cos, sin, positions, True)
            dqkv = dqkv.flatten(1)
        dx, dweight, dgain = _norm_linear_bwd(dqkv, dx, *saved, ctx.eps, ctx.needs_input_grad)
        return dx, None, dweight, dgain, *[None] * 5


class _NormLinearSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, squares, weight, gain, eps, dtype):
        folded = _folded_in_turn(weight, gain, dtype)
        gated, gate_up = ops.rms_linear_swiglu_keep(x, squares, folded, eps)
        ctx.save_for_backward(x, squares, weight, gain, gate_up)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return gated, x

    @staticmethod
    @once_differentiable
    def backward(ctx, dgated, dx):
        *saved, gate_up = ctx.saved_tensors
        dgate_up = None if dgated is None else ops.swiglu_bwd(dgated, gate_up)
        dx, dweight, dgain = _norm_linear_bwd(dgate_up, dx, *saved, ctx.eps, ctx.needs_input_grad)
        return dx, None, dweight, dgain, None, None


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual):
        total, squares = ops.linear_add(x, weight.to(x.dtype), residual)
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(squares)
        return total, squares

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, _):
        x, weight = ctx.saved_tensors
        dy, dx, dweight = dtotal.to(x.dtype), None, None
        if ctx.needs_input_grad[0]:
            dx = product(dy, weight.to(x.dtype).t())
        if ctx.needs_input_grad[1]:
            dweight = _dweight(dy, x).to(weight.dtype)
        return dx, dweight, dtotal


def _norm_linear_bwd(
    dy: Tensor | None,
    dstream: Tensor | None,
    x: Tensor,
    squares: Tensor,
    weight: Tensor,
    gain: Tensor,
    eps: float,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and gain, of linear(rms_norm(x, gain), weight) with gradient dy
    and of x as it went on, with gradient dstream."""
    if dy is None:
        return dstream, None, None
    dx = dweight = dgain = None
    if needed[0] or needed[3]:
        rstd = torch.rsqrt(squares.sum(1) / x.shape[1] + eps)
        dnormed = product(dy, weight.to(dy.dtype).t())
        dx, dgain = ops.rms_norm_bwd(dnormed, dstream, x, gain, rstd)
    if needed[2]:
        normed = ops.rms_norm(x, gain, eps)[0].to(dy.dtype)
        dweight = _dweight(dy, normed).to(weight.dtype)
    return dx, dweight, dgain


def _folded(weight: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """`fold_gain` in `dtype`, in one pass and rounded once."""
    folded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    # The product is made in the wider of the two dtypes, and a 16-bit one would be rounded twice.
    return torch.mul(weight.detach(), at_least_float32(gain.detach()), out=folded)


def _folded_in_turn(weight: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """`interleave_gate_up` of `_folded`, in the same pass."""
    if torch.compiler.is_compiling():  # a compiler makes one pass of it, and has no such `out`
        return interleave_gate_up(_folded(weight, gain, dtype))
    rows, columns = weight.shape
    folded = torch.empty(rows // 2, 2, columns, dtype=dtype, device=weight.device)
    halves = weight.detach().unflatten(0, (2, -1))
    torch.mul(halves, at_least_float32(gain.detach()), out=folded.transpose(0, 1))
    return folded.view(rows, columns)


def _product_dtype(op: str, x: Tensor, weight: Tensor) -> torch.dtype:
    dtype = autocast_dtype(x) or weight.dtype
    if x.dtype not in (dtype, torch.float32, torch.float64):
        raise TypeError(f"{op}: x must be float32 or {dtype}, as the product is, got {x.dtype}")
    return dtype


def _any_requires_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
