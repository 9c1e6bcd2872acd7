"""RMSNorm on the GPU, with and without the residual add, forward and backward.

A program holds a few whole rows in registers, one warp to a row, as a tuple of column chunks: 768
columns are three chunks of 256, where one power-of-two block would leave a quarter of the lanes
idle. Each row is read once and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import impl
from ._device import architecture, check_served, on_device, processors

# Rows per program at a width of up to 1,024 (fewer at more), and warps: a warp to a row. The
# backward's programs stay on their multiprocessor and walk over the rows, so that each sums its
# part of the weight gradient in registers; PROGRAMS of them share the multiprocessor's registers.
FORWARD = {
    80: {"ROWS": 4, "num_warps": 4},
    90: {"ROWS": 4, "num_warps": 4},
    100: {"ROWS": 4, "num_warps": 4},
}
BACKWARD = {
    80: {"ROWS": 4, "num_warps": 4, "PROGRAMS": 4},
    90: {"ROWS": 4, "num_warps": 4, "PROGRAMS": 4},
    100: {"ROWS": 4, "num_warps": 4, "PROGRAMS": 3},
}
MAX_DIM = 4096  # beyond it a row no longer fits the registers


@triton.jit
def _load(ptr, row, columns, mask, STRIDE: tl.constexpr):
    """One chunk of columns of some rows, upcast at once: Triton's interpreter computes bfloat16 on
    its bit patterns. A row vector is loaded for each row alike (STRIDE 0), in the rows' own layout:
    a (1, columns) load would be spread over all warps and exchanged through shared memory."""
    return tl.load(ptr + row[:, None] * STRIDE + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    rows,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    CHUNKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = first + row < rows
    chunks = ()
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = live[:, None] & (columns < DIM)
        x = _load(x_ptr + first * DIM, row, columns, mask, DIM)
        if ADD:
            x += _load(residual_ptr + first * DIM, row, columns, mask, DIM)
            # The norm is that of the sum as it is stored.
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + first * DIM + row[:, None] * DIM + columns, total, mask=mask)
            x = total.to(tl.float32)
        squares += x * x
        chunks = chunks + (x,)  # noqa: RUF005  (Triton cannot unpack into a tuple)
    rstd = tl.rsqrt(tl.sum(squares, 1) / DIM + eps)
    tl.store(rstd_ptr + first + row, rstd, mask=live)
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = live[:, None] & (columns < DIM)
        y = chunks[c] * rstd[:, None] * _load(weight_ptr, row, columns, mask, 0)
        y_ptrs = y_ptr + first * DIM + row[:, None] * DIM + columns
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    dweight_ptr,
    rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DTOTAL: tl.constexpr,
    HAS_DBRANCH: tl.constexpr,
):
    CHUNKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    row = tl.arange(0, ROWS)
    weights, dweights = (), ()
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)[None, :]
        weight = _load(weight_ptr, row, columns, (row[:, None] >= 0) & (columns < DIM), 0)
        weights = weights + (weight,)  # noqa: RUF005
        dweights = dweights + (tl.zeros([ROWS, BLOCK], tl.float32),)  # noqa: RUF005
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first = tile * ROWS
        live = first + row < rows
        rstd = tl.load(rstd_ptr + first + row, mask=live, other=0.0)[:, None]
        x_hats, gs, sums = (), (), ()
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for c in tl.static_range(CHUNKS):
            columns = c * BLOCK + tl.arange(0, BLOCK)[None, :]
            mask = live[:, None] & (columns < DIM)
            dy = _load(dy_ptr + first * DIM, row, columns, mask, DIM)
            x_hat = _load(x_ptr + first * DIM, row, columns, mask, DIM) * rstd
            g = dy * weights[c]
            products += g * x_hat
            x_hats = x_hats + (x_hat,)  # noqa: RUF005
            gs = gs + (g,)  # noqa: RUF005
            sums = sums + (dweights[c] + dy * x_hat,)  # noqa: RUF005
        dweights = sums
        mean = (tl.sum(products, 1) / DIM)[:, None]
        for c in tl.static_range(CHUNKS):
            columns = c * BLOCK + tl.arange(0, BLOCK)[None, :]
            mask = live[:, None] & (columns < DIM)
            dx = (gs[c] - x_hats[c] * mean) * rstd
            if HAS_DTOTAL:
                dx += _load(dtotal_ptr + first * DIM, row, columns, mask, DIM)
            at = first * DIM + row[:, None] * DIM + columns
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if HAS_DBRANCH:
                tl.store(dbranch_ptr + at, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK + tl.arange(0, BLOCK)
        partial_ptrs = dweight_ptr + tl.program_id(0) * DIM + columns
        tl.store(partial_ptrs, tl.sum(dweights[c], 0), mask=columns < DIM)


def row_tile(op: str, tile: dict, dim: int, *rows: Tensor | None) -> dict:
    """`tile` for rows of `dim` columns, with BLOCK, the columns of a chunk, and DIM.

    A chunk is what a warp reads in 16-byte pieces of the widest dtype among `rows`; from a width
    of 1,024 on, a quarter of the row, and fewer rows.
    """
    if dim > MAX_DIM:
        raise ValueError(f"{op}: the Triton kernel serves a dim of up to {MAX_DIM}, got {dim}")
    warp = 512 // max(tensor.element_size() for tensor in rows if tensor is not None)
    block = warp if dim <= 1024 else triton.next_power_of_2(dim) // 4
    return tile | {"DIM": dim, "BLOCK": block, "ROWS": max(1, tile["ROWS"] * warp // block)}


def _norm(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    check_served(op, x=x, residual=residual, weight=weight)
    x = x.contiguous()
    y = torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    total = None
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(residual)
    tile = row_tile(op, FORWARD[architecture(x)], x.shape[-1], x, residual)
    rows = rstd.numel()
    if y.numel():
        with on_device(x):
            _forward[(triton.cdiv(rows, tile["ROWS"]),)](
                x,
                residual,
                weight.contiguous(),
                y,
                total,
                rstd,
                rows,
                eps,
                ADD=residual is not None,
                **tile,
            )
    return y, total, rstd


def _norm_bwd(
    op: str,
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dbranch: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_served(op, dy=dy, dtotal=dtotal, x=x, weight=weight, rstd=rstd)
    x, dy = x.contiguous(), dy.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    dx = torch.empty_like(x)
    tile = row_tile(op, BACKWARD[architecture(x)], x.shape[-1], dy, x)
    rows = rstd.numel()
    programs = min(tile.pop("PROGRAMS") * processors(x), triton.cdiv(rows, tile["ROWS"]))
    partial = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    if dx.numel():
        with on_device(x):
            _backward[(programs,)](
                dy,
                dtotal,
                x,
                weight.contiguous(),
                rstd.contiguous(),
                dx,
                dbranch,
                partial,
                rows,
                HAS_DTOTAL=dtotal is not None,
                HAS_DBRANCH=dbranch is not None,
                **tile,
            )
    return dx, partial.sum(0).to(weight.dtype)


@impl("rms_norm", "CUDA")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _norm("rms_norm", x, None, weight, eps)
    return y, rstd


@impl("add_rms_norm", "CUDA")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    return _norm("add_rms_norm", x, residual, weight, eps)


@impl("rms_norm_bwd", "CUDA")
def rms_norm_bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return _norm_bwd("rms_norm_bwd", dy, dtotal, x, weight, rstd, None)


@impl("add_rms_norm_bwd", "CUDA")
def add_rms_norm_bwd(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dbranch = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    dx, dweight = _norm_bwd("add_rms_norm_bwd", dy, dtotal, total, weight, rstd, dbranch)
    return dbranch, dx, dweight
