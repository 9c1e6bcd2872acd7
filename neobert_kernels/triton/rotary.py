"""Rotary embedding of adjacent pairs on the GPU. The backward is the same kernel with the angle
negated, and one launch serves a plain (tokens, heads, head_dim) tensor and, in place, the q and k
of a packed (tokens, heads, 3, head_dim) projection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import impl
from ._device import architecture, check_served, on_device

# Elements per program, and warps.
TILES = {
    80: {"TILE": 2048, "num_warps": 4},
    90: {"TILE": 2048, "num_warps": 4},
    100: {"TILE": 2048, "num_warps": 4},
}


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    tokens,
    stride_xt,
    stride_xh,
    stride_xs,
    stride_yt,
    stride_yh,
    stride_ys,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Slot s of a token is vector s % GROUP of head s // GROUP: q and k are a group of two."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    slot = (tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :, None]
    column = tl.arange(0, HEAD_DIM)[None, None, :]
    mask = live[:, None, None] & (slot < SLOTS)
    x_ptrs = x_ptr + token[:, None, None] * stride_xt + column
    x_ptrs += slot // GROUP * stride_xh + slot % GROUP * stride_xs
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)

    HALF: tl.constexpr = HEAD_DIM // 2
    position = tl.load(positions_ptr + token, mask=live, other=0).to(tl.int64)
    angle = position[:, None] * HALF + tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + angle, mask=live[:, None], other=0.0)[:, None, :]
    sin = tl.load(sin_ptr + angle, mask=live[:, None], other=0.0)[:, None, :]
    if INVERSE:
        sin = -sin
    even, odd = tl.split(tl.reshape(x, [BLOCK_T, BLOCK_S, HALF, 2]))
    y = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    y = tl.reshape(y, [BLOCK_T, BLOCK_S, HEAD_DIM])
    y_ptrs = y_ptr + token[:, None, None] * stride_yt + column
    y_ptrs += slot // GROUP * stride_yh + slot % GROUP * stride_ys
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(
    op: str,
    x: Tensor,
    y: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    inverse: bool,
    group: int,
) -> None:
    """x and y: (tokens, heads, group or more, head_dim); the first `group` are rotated."""
    check_served(op, x=x, cos=cos, sin=sin, positions=positions)
    tokens, heads, _, head_dim = x.shape
    if head_dim < 8 or head_dim & (head_dim - 1):
        raise ValueError(
            f"{op}: the Triton kernel serves a head_dim that is a power of two from 8 on,"
            f" got {head_dim}"
        )
    if not y.numel():
        return
    tile = dict(TILES[architecture(x)])
    slots = heads * group
    block_s = min(slots & -slots, 8)
    block_t = max(1, tile.pop("TILE") // (block_s * head_dim))
    with on_device(x):
        _rotate[(triton.cdiv(tokens, block_t), slots // block_s)](
            x,
            y,
            cos.contiguous(),
            sin.contiguous(),
            positions.contiguous(),
            tokens,
            *x.stride()[:3],
            *y.stride()[:3],
            SLOTS=slots,
            GROUP=group,
            HEAD_DIM=head_dim,
            INVERSE=inverse,
            BLOCK_T=block_t,
            BLOCK_S=block_s,
            **tile,
        )


@impl("rotary", "CUDA")
def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    if x.stride(-1) != 1:
        raise ValueError(f"rotary: x must have a contiguous last axis, got strides {x.stride()}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch("rotary", x.unsqueeze(2), y.unsqueeze(2), cos, sin, positions, inverse, 1)
    return y


@impl("rotary_qkv_", "CUDA")
def rotary_qkv_(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> None:
    if qkv.stride(-1) != 1:
        raise ValueError(
            f"rotary_qkv_: qkv must have a contiguous last axis, got strides {qkv.stride()}"
        )
    _launch("rotary_qkv_", qkv, qkv, cos, sin, positions, inverse, 2)
