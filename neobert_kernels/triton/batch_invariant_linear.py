"""x @ weight.T (+ residual) on the GPU in tiles of one shape, each summed in one order.

A library's GEMM goes by the number of rows: it picks other tiles, splits the sum among programs or
continues one tile's sum in another's program, and with them a row's bits change. Here every tile is
one program's, of the same shape and with the same steps along k, however many rows there are; rows
beyond the last are zeros. Within a tile the rows of a product are computed alike, so that a row's
bits do not depend on its place either.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import check_same_dtype
from .._library import impl
from ._device import architecture, check_served, on_device
from ._varlen import MAX_STRIDE

# Rows and columns of a tile, elements of k in a step, row tiles that share their weights in the L2
# cache, warps, stages. One entry serves every shape: that is the point.
_HALF = {
    "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3,
}  # fmt: skip
TILES = {80: _HALF, 90: _HALF, 100: _HALF}
TILES_FLOAT32 = {
    "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP": 8, "num_warps": 8, "num_stages": 2,
}  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    rows,
    stride_xm,
    stride_rm,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    of_group = tl.program_id(0) // (GROUP * tiles_n)
    first_m = of_group * GROUP
    group = tl.minimum(tl.cdiv(rows, BLOCK_M) - first_m, GROUP)
    place = tl.program_id(0) % (GROUP * tiles_n)
    first_row = (first_m + place % group).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)[:, None]
    column = place // group * BLOCK_N + tl.arange(0, BLOCK_N)
    live = first_row + row < rows
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + first_row * stride_xm + row * stride_xm + k[None, :]
    weight_ptrs = weight_ptr + column[:, None] * DEPTH + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        live_x, live_weight = live, (column < COLUMNS)[:, None]
        if DEPTH % BLOCK_K:
            inside = first + k[None, :] < DEPTH
            live_x, live_weight = live_x & inside, live_weight & inside
        x = tl.load(x_ptrs + first, mask=live_x, other=0.0)
        weight = tl.load(weight_ptrs + first, mask=live_weight, other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    mask = live & (column < COLUMNS)[None, :]
    if ADD:
        residual_ptrs = residual_ptr + first_row * stride_rm + row * stride_rm + column[None, :]
        total += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + first_row * COLUMNS + row * COLUMNS + column[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mask)


def _by_rows(t: Tensor) -> Tensor:
    """With contiguous rows, near enough that a tile of them lies within the reach of 32 bits."""
    return t if t.stride(1) == 1 and t.stride(0) <= MAX_STRIDE else t.contiguous()


@impl("batch_invariant_linear", "CUDA")
def batch_invariant_linear(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    check_served("batch_invariant_linear", x=x, weight=weight, residual=residual)
    check_same_dtype("batch_invariant_linear", x=x, weight=weight)
    x, weight = _by_rows(x), weight.contiguous()
    residual = None if residual is None else _by_rows(residual)
    rows, columns = x.shape[0], weight.shape[0]
    dtype = x.dtype if residual is None else residual.dtype
    y = torch.empty(rows, columns, dtype=dtype, device=x.device)
    if y.numel():
        tile = TILES_FLOAT32 if x.dtype == torch.float32 else TILES[architecture(x)]
        grid = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"])
        with on_device(x):
            _forward[(grid,)](
                x,
                weight,
                residual,
                y,
                rows,
                x.stride(0),
                0 if residual is None else residual.stride(0),
                COLUMNS=columns,
                DEPTH=x.shape[1],
                ADD=residual is not None,
                **tile,
            )
    return y
