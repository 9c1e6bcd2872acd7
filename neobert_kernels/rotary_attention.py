"""Rotary embedding and attention of NeoBERT's packed projection, as one step for autograd.

The ops are those of `rotary` and `attention`. Together, the gradient that attention writes is
rotated back where it lies, since nobody else has it. Apart, it is copied for whoever else may hold
it; and since the rotation overwrites a view, autograd makes the gradient of what is viewed anew
around it: six more passes.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_dtype, check_same_device
from ._library import ops
from .attention import _check_common
from .rotary import _check as _check_rotary


def rotary_attention_(
    projection: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
) -> Tensor:
    """`varlen_attention_qkv` of `apply_rotary_qkv_` of the qkv projection's output.

    Args:
        projection: (tokens, 3 * dim) contiguous, [q, k, v] of head 0, of head 1 and so on.
            Overwritten, so it must not be a leaf that needs a gradient, nor a view under autograd.
        heads: of which there are `heads`, of head_dim dim / heads.
        cos, sin, positions: as for `apply_rotary`.
        cu_seqlens, max_seqlen, scale: as for `varlen_attention`.

    Returns:
        (tokens, heads, head_dim) in projection.dtype. Differentiable in projection.

    Raises:
        As `apply_rotary` and `varlen_attention`.
    """
    op = "rotary_attention_"
    check_dtype(op, projection=projection)
    check_same_device(op, projection=projection, cu_seqlens=cu_seqlens)
    if projection.dim() != 2 or heads < 1 or projection.shape[1] % (3 * heads):
        raise ValueError(
            f"{op}: projection must have shape (tokens, 3 * heads * head_dim) with heads {heads},"
            f" got {tuple(projection.shape)}"
        )
    if not projection.is_contiguous():
        raise ValueError(
            f"{op}: projection must be contiguous, got shape {tuple(projection.shape)}, strides"
            f" {projection.stride()}"
        )
    qkv = _by_head(projection, heads)
    _check_rotary(op, "projection", qkv, cos, sin, positions)
    scale = _check_common(op, cu_seqlens, max_seqlen, scale, qkv.shape[-1])
    return unchecked_rotary_attention_(
        projection, heads, cos, sin, positions, cu_seqlens, max_seqlen, scale
    )


def unchecked_rotary_attention_(
    projection: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """As `rotary_attention_`, for tensors that the caller has checked (`unchecked.py`)."""
    if torch.is_grad_enabled() and projection.requires_grad:
        return _RotaryAttention.apply(
            projection, heads, cos, sin, positions, cu_seqlens, max_seqlen, scale
        )[0]
    qkv = _by_head(projection, heads)
    ops.rotary_qkv_(qkv, cos, sin, positions, False)
    return ops.varlen_attention(*qkv.unbind(2), cu_seqlens, max_seqlen, scale)[0]


def _by_head(projection: Tensor, heads: int) -> Tensor:
    tokens, columns = projection.shape
    return projection.view(tokens, heads, 3, columns // (3 * heads))


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projection, heads, cos, sin, positions, cu_seqlens, max_seqlen, scale):
        qkv = _by_head(projection, heads)
        ops.rotary_qkv_(qkv, cos, sin, positions, False)
        out, lse = ops.varlen_attention(*qkv.unbind(2), cu_seqlens, max_seqlen, scale)
        ctx.mark_dirty(projection)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(projection, cos, sin, positions, out, lse, cu_seqlens)
        ctx.heads, ctx.max_seqlen, ctx.scale = heads, max_seqlen, scale
        return out, projection  # what is overwritten must also be returned

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, drotated):
        rotated, cos, sin, positions, out, lse, cu_seqlens = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dqkv = ops.varlen_attention_bwd(
            dout,
            *_by_head(rotated, ctx.heads).unbind(2),
            out,
            lse,
            cu_seqlens,
            ctx.max_seqlen,
            ctx.scale,
        )
        if drotated is not None:
            dqkv += drotated.view_as(dqkv)
        ops.rotary_qkv_(dqkv, cos, sin, positions, True)
        return dqkv.flatten(1), *[None] * 7
