"""Rotary position embedding (Su et al. 2021, eq. 34) on adjacent pairs, as NeoBERT rotates them."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import at_least_float32, check_dtype, check_same_device
from ._library import define, ops


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotates each adjacent pair (x[2i], x[2i+1]) by the angle whose cos and sin are in column i.

    Args:
        x: (tokens, heads, head_dim) float32, bfloat16 or float16; any strides with a contiguous
            last axis, so a view of a packed projection serves as it is.
        cos, sin: (max_position, head_dim / 2) float32.
        positions: (tokens,) int64 or int32, the row of cos and sin for each token. A position
            outside the table raises IndexError on the CPU; on a GPU it is the caller's duty.

    Returns:
        (tokens, heads, head_dim) contiguous, in x.dtype. Differentiable in x.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes or devices that do not fit.
        IndexError: a position outside the table (CPU).
    """
    _check("apply_rotary", "x", x, cos, sin, positions)
    if x.dim() != 3:
        raise ValueError(
            f"apply_rotary: x must have shape (tokens, heads, head_dim), got {tuple(x.shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin, positions)
    return ops.rotary(x, cos, sin, positions, False)


def apply_rotary_qkv_(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotates q and k where they lie in NeoBERT's packed projection; v is not touched.

    Args:
        qkv: (tokens, heads, 3, head_dim) contiguous, [q, k, v] along the third axis: the output of
            the qkv projection, viewed. Overwritten, so it must not be a leaf that needs a gradient.
        cos, sin, positions: as for `apply_rotary`.

    Returns:
        qkv itself. Differentiable in qkv.

    Raises:
        As `apply_rotary`.
    """
    _check("apply_rotary_qkv_", "qkv", qkv, cos, sin, positions)
    if qkv.dim() != 4 or qkv.shape[2] != 3 or not qkv.is_contiguous():
        raise ValueError(
            "apply_rotary_qkv_: qkv must be contiguous with shape (tokens, heads, 3, head_dim),"
            f" got shape {tuple(qkv.shape)}, strides {qkv.stride()}"
        )
    return unchecked_apply_rotary_qkv_(qkv, cos, sin, positions)


def unchecked_apply_rotary_qkv_(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """As `apply_rotary_qkv_`, for tensors that the caller has checked (`unchecked.py`)."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _RotaryQKV.apply(qkv, cos, sin, positions)
    ops.rotary_qkv_(qkv, cos, sin, positions, False)
    return qkv


def _check(op: str, name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    check_dtype(op, **{name: x})
    if x.dim() == 0 or x.shape[-1] % 2 or x.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} must end in an even, contiguous head_dim,"
            f" got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    check_table(op, name, x, cos, sin, positions, x.shape[-1])


def check_table(
    op: str, name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, head_dim: int
) -> None:
    """Raises unless the table is one of head_dim, with a position for each row of x."""
    check_same_device(op, **{name: x}, cos=cos, sin=sin, positions=positions)
    for table_name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{op}: {table_name} must be float32, got {table.dtype}")
        if table.dim() != 2 or table.shape[1] != head_dim // 2 or table.shape != cos.shape:
            raise ValueError(
                f"{op}: {table_name} must have shape (max_position, {head_dim // 2}) to match"
                f" {name} {tuple(x.shape)} and cos {tuple(cos.shape)}, got {tuple(table.shape)}"
            )
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: positions must be int64 or int32, got {positions.dtype}")
    if tuple(positions.shape) != tuple(x.shape[:1]):
        raise ValueError(
            f"{op}: positions must have shape ({x.shape[0]},) to match {name} {tuple(x.shape)},"
            f" got {tuple(positions.shape)}"
        )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions):
        ctx.save_for_backward(cos, sin, positions)
        return ops.rotary(x, cos, sin, positions, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # The inverse of a rotation is the rotation by the negated angle, and so is its transpose.
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        return ops.rotary(dy, *ctx.saved_tensors, True), None, None, None


class _RotaryQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, positions):
        ctx.save_for_backward(cos, sin, positions)
        ctx.mark_dirty(qkv)
        ops.rotary_qkv_(qkv, cos, sin, positions, False)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx, dqkv):
        # Not in place: the gradient may be somebody else's too.
        dqkv = dqkv.clone(memory_format=torch.contiguous_format)
        ops.rotary_qkv_(dqkv, *ctx.saved_tensors, True)
        return dqkv, None, None, None


def reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    _check_positions("apply_rotary", positions, cos.shape[0])
    cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
    sin = -sin if inverse else sin
    even, odd = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.flatten(-2).to(x.dtype)


def reference_qkv_(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> None:
    _check_positions("apply_rotary_qkv_", positions, cos.shape[0])
    q, k = (reference(qkv[:, :, i], cos, sin, positions, inverse) for i in (0, 1))
    qkv[:, :, 0], qkv[:, :, 1] = q, k


def _check_positions(op: str, positions: Tensor, max_position: int) -> None:
    if positions.device.type != "cpu" or positions.numel() == 0:
        return
    least, most = positions.aminmax()
    if least < 0 or most >= max_position:
        raise IndexError(
            f"{op}: positions must lie in [0, {max_position}), the rows of cos and sin, got"
            f" values from {int(least)} to {int(most)}"
        )


def _fake(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_qkv_(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> None:
    return None


define(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool inverse) -> Tensor",
    reference,
    _fake,
)
define(
    "rotary_qkv_(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor positions, bool inverse) -> ()",
    reference_qkv_,
    _fake_qkv_,
)
