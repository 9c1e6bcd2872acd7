"""GEMMs of the block with what surrounds them in their epilogues, on the GPU, forward.

All have one main loop, x @ weight.T in float32, over tiles of a persistent grid. What follows is
done on the accumulators: the row's rstd and a rotation or SwiGLU, or the residual add and the sums
of squares that the next GEMM makes its rstd of.

The tile depends on the architecture and the op, never on the number of tokens, and every sum is in
a fixed order: a row's bits depend on nothing but that row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._library import impl
from ..epilogue import BLOCK
from ._device import architecture, check_served, on_device, processors

# Tiles, warps and stages; PROGRAMS to a multiprocessor: where two fit, one can multiply while the
# other is busy with its epilogue. FLATTEN makes one loop of tiles and steps, so that a tile's first
# loads are under way during the epilogue of the one before; DESCRIPTORS has the copy engine of
# Hopper and Blackwell load the operands. The residual add's tile is as wide as a sum of squares;
# "add_float32" is that of a float32 stream.
_WIDE = {
    "BLOCK_M": 128,
    "BLOCK_N": 256,
    "BLOCK_K": 64,
    "num_warps": 8,
    "num_stages": 3,
    "PROGRAMS": 1,
    "DESCRIPTORS": True,
    "FLATTEN": True,
}
_SQUARE = _WIDE | {"BLOCK_N": BLOCK}
_PAIR = _SQUARE | {"num_warps": 4, "PROGRAMS": 2}
_HOPPER = {
    "swiglu": _WIDE,
    "swiglu_keep": _WIDE,
    "rotary": _WIDE,
    "add": _PAIR,
    "add_float32": _SQUARE,
}
_POINTERS = {"BLOCK_K": 32, "DESCRIPTORS": False, "FLATTEN": False}
_AMPERE = _PAIR | _POINTERS | {"num_stages": 4}
# With registers for an epilogue that has more to store or to load.
_AMPERE_ALONE = _AMPERE | {"num_warps": 8, "PROGRAMS": 1}
TILES = {
    80: {
        "swiglu": _AMPERE,
        "swiglu_keep": _AMPERE_ALONE,
        "rotary": _AMPERE,
        "add": _AMPERE,
        "add_float32": _AMPERE_ALONE,
    },
    90: _HOPPER,
    100: _HOPPER,
}
_FLOAT32 = _SQUARE | _POINTERS | {"BLOCK_M": 32, "num_stages": 2}
TILES_FLOAT32 = dict.fromkeys(_HOPPER, _FLOAT32)
# Rows of a program of sum_of_squares, and warps.
SQUARES = {"ROWS": 16, "num_warps": 4}


@triton.jit
def _product(
    x,
    weight,
    m,
    n,
    tokens,
    N: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) of x @ weight.T at row m and column n, in float32; x is rounded to the
    dtype of weight. What lies outside x or weight counts as zero: so descriptors read it."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIPTORS:
        for k in range(0, DEPTH, BLOCK_K):
            b = weight.load([n, k])
            product = tl.dot(x.load([m, k]).to(b.dtype), b.T, product, input_precision="ieee")
    else:
        row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        lane = tl.arange(0, BLOCK_K)
        a_ptrs = x + row.to(tl.int64)[:, None] * DEPTH + lane[None, :]
        b_ptrs = weight + column[None, :] * DEPTH + lane[:, None]
        for k in range(0, DEPTH, BLOCK_K):
            inside = k + lane < DEPTH
            b = tl.load(b_ptrs, mask=inside[:, None] & (column < N)[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=inside[None, :] & (row < tokens)[:, None], other=0.0)
            product = tl.dot(a.to(b.dtype), b, product, input_precision="ieee")
            a_ptrs += BLOCK_K
            b_ptrs += BLOCK_K
    return product


@triton.jit
def _rstd(squares_ptr, row, live, eps, DIM: tl.constexpr, BLOCKS: tl.constexpr):
    """1 / rms of some rows, from their sums of squares, added up in their order."""
    total = tl.load(squares_ptr + row * BLOCKS, mask=live, other=0.0)
    for block in tl.static_range(1, BLOCKS):
        total += tl.load(squares_ptr + row * BLOCKS + block, mask=live, other=0.0)
    return tl.rsqrt(total / DIM + eps)


@triton.jit(do_not_specialize=["tokens"])
def _swiglu(
    x,
    weight,
    squares_ptr,
    y_ptr,
    gate_up_ptr,
    tokens,
    eps,
    N: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """silu(gate) * up of a tile; gate and up are neighbouring columns, and so in one thread. With
    KEEP they are stored too, the gate's columns before the up's, as swiglu_bwd reads them."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = N // 2
    tiles = tl.cdiv(tokens, BLOCK_M) * TILES_N
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile // TILES_N * BLOCK_M, tile % TILES_N * BLOCK_N
        product = _product(
            x, weight, m, n, tokens, N, DEPTH, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS
        )
        row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        live = row < tokens
        product *= _rstd(squares_ptr, row, live, eps, DEPTH, BLOCKS)[:, None]
        gate, up = tl.split(tl.reshape(product, [BLOCK_M, BLOCK_N // 2, 2]))
        column = n // 2 + tl.arange(0, BLOCK_N // 2)
        mask = live[:, None] & (column < WIDTH)[None, :]
        if KEEP:
            gate_ptrs = gate_up_ptr + row[:, None] * N + column[None, :]
            tl.store(gate_ptrs, gate.to(gate_up_ptr.dtype.element_ty), mask=mask)
            tl.store(gate_ptrs + WIDTH, up.to(gate_up_ptr.dtype.element_ty), mask=mask)
        y = gate * tl.sigmoid(gate) * up
        ptrs = y_ptr + row[:, None] * WIDTH + column[None, :]
        tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _rotary(
    x,
    weight,
    squares_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    y_ptr,
    tokens,
    eps,
    N: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """A tile of the packed projection, q and k rotated. A tile holds whole vectors, of q, k and v
    in turn; the pairs of a rotation are neighbouring columns, and so in one thread."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    HALF: tl.constexpr = HEAD_DIM // 2
    VECTORS: tl.constexpr = BLOCK_N // HEAD_DIM
    tiles = tl.cdiv(tokens, BLOCK_M) * TILES_N
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile // TILES_N * BLOCK_M, tile % TILES_N * BLOCK_N
        product = _product(
            x, weight, m, n, tokens, N, DEPTH, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS
        )
        row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        live = row < tokens
        product *= _rstd(squares_ptr, row, live, eps, DEPTH, BLOCKS)[:, None]
        position = tl.load(positions_ptr + row, mask=live, other=0).to(tl.int64)
        angle = position[:, None] * HALF + tl.arange(0, HALF)[None, :]
        cos = tl.load(cos_ptr + angle, mask=live[:, None], other=0.0)[:, None, :]
        sin = tl.load(sin_ptr + angle, mask=live[:, None], other=0.0)[:, None, :]
        even, odd = tl.split(tl.reshape(product, [BLOCK_M, VECTORS, HALF, 2]))
        vector = n // HEAD_DIM + tl.arange(0, VECTORS)
        rotated = (vector % 3 < 2)[None, :, None]
        first = tl.where(rotated, even * cos - odd * sin, even)
        second = tl.where(rotated, even * sin + odd * cos, odd)
        y = tl.reshape(tl.join(first, second), [BLOCK_M, BLOCK_N])
        column = n + tl.arange(0, BLOCK_N)
        ptrs = y_ptr + row[:, None] * N + column[None, :]
        mask = live[:, None] & (column < N)[None, :]
        tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_columns(product, residual_ptr, total_ptr, row, live, n, N: tl.constexpr):
    """Adds some columns of a tile to the residual stream; the squares of what is stored."""
    column = n + tl.arange(0, product.shape[1])
    at, mask = row[:, None] * N + column[None, :], live[:, None] & (column < N)[None, :]
    residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = (product + residual).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, total, mask=mask)
    return tl.sum(total.to(tl.float32) * total.to(tl.float32), 1)


@triton.jit(do_not_specialize=["tokens"])
def _add(
    x,
    weight,
    residual_ptr,
    total_ptr,
    squares_ptr,
    tokens,
    N: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """A tile of the residual stream after a branch, and its rows' sums of squares. In two halves:
    the residual of a whole tile would not fit the registers beside its accumulators."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    HALF: tl.constexpr = BLOCK_N // 2
    tiles = tl.cdiv(tokens, BLOCK_M) * TILES_N
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile // TILES_N * BLOCK_M, tile % TILES_N * BLOCK_N
        product = _product(
            x, weight, m, n, tokens, N, DEPTH, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS
        )
        row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        live = row < tokens
        halves = tl.permute(tl.reshape(product, [BLOCK_M, 2, HALF]), (0, 2, 1))
        left, right = tl.split(halves)
        squares = _add_columns(left, residual_ptr, total_ptr, row, live, n, N)
        squares += _add_columns(right, residual_ptr, total_ptr, row, live, n + HALF, N)
        tl.store(squares_ptr + row * TILES_N + n // BLOCK_N, squares, mask=live)


@triton.jit(do_not_specialize=["tokens"])
def _squares(
    x_ptr,
    squares_ptr,
    tokens,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = row < tokens
    mask = live[:, None] & (column < DIM)
    x = tl.load(x_ptr + row[:, None] * DIM + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(squares_ptr + row * BLOCKS + tl.program_id(1), tl.sum(x * x, 1), mask=live)


def _main_loop(
    op: str, tiles: str, x: Tensor, weight: Tensor, **others: Tensor
) -> tuple[tuple[int], tuple, dict]:
    """The grid, the operands and the constants that the kernels share."""
    check_served(op, x=x, weight=weight, **others)
    table = TILES_FLOAT32 if weight.dtype == torch.float32 else TILES[architecture(x)]
    constants = dict(table[tiles])
    x, weight = x.contiguous(), weight.contiguous()
    (tokens, depth), columns = x.shape, weight.shape[0]
    count = triton.cdiv(tokens, constants["BLOCK_M"]) * triton.cdiv(columns, constants["BLOCK_N"])
    grid = (min(count, constants.pop("PROGRAMS") * processors(x)),)
    operands = (x, weight)
    if constants["DESCRIPTORS"]:
        operands = (
            _descriptor(op, "x", x, constants["BLOCK_M"], constants["BLOCK_K"]),
            _descriptor(op, "weight", weight, constants["BLOCK_N"], constants["BLOCK_K"]),
        )
    return grid, operands, {"N": columns, "DEPTH": depth} | constants


def _descriptor(op: str, name: str, tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    if tensor.data_ptr() % 16 or tensor.shape[1] * tensor.element_size() % 16:
        raise ValueError(
            f"{op}: {name} must begin at a multiple of 16 bytes and have rows of such a length, got"
            f" shape {tuple(tensor.shape)} of {tensor.dtype} at address {tensor.data_ptr():#x}"
        )
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


@impl("sum_of_squares", "CUDA")
def sum_of_squares(x: Tensor) -> Tensor:
    check_served("sum_of_squares", x=x)
    tokens, dim = x.shape
    squares = torch.empty(tokens, triton.cdiv(dim, BLOCK), dtype=torch.float32, device=x.device)
    if squares.numel():
        with on_device(x):
            _squares[(triton.cdiv(tokens, SQUARES["ROWS"]), squares.shape[1])](
                x.contiguous(), squares, tokens, DIM=dim, BLOCK=BLOCK, **SQUARES
            )
    return squares


@impl("linear_add", "CUDA")
def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    squares = torch.empty(
        x.shape[0], triton.cdiv(weight.shape[0], BLOCK), dtype=torch.float32, device=x.device
    )
    if not total.numel():
        return total, squares
    tiles = "add_float32" if residual.dtype == torch.float32 else "add"
    grid, operands, constants = _main_loop("linear_add", tiles, x, weight, residual=residual)
    with on_device(x):
        _add[grid](*operands, residual.contiguous(), total, squares, x.shape[0], **constants)
    return total, squares


def _gated(
    op: str, tiles: str, x: Tensor, squares: Tensor, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    tokens, columns = x.shape[0], weight.shape[0]
    y = torch.empty(tokens, columns // 2, dtype=weight.dtype, device=x.device)
    gate_up = torch.empty(tokens, columns, dtype=y.dtype, device=x.device) if keep else None
    if y.numel():
        grid, operands, constants = _main_loop(op, tiles, x, weight, squares=squares)
        with on_device(x):
            _swiglu[grid](
                *operands, squares.contiguous(), y, gate_up, tokens, eps,
                BLOCKS=squares.shape[1], KEEP=keep, **constants,
            )  # fmt: skip
    return y, gate_up


@impl("rms_linear_swiglu", "CUDA")
def rms_linear_swiglu(x: Tensor, squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _gated("rms_linear_swiglu", "swiglu", x, squares, weight, eps, keep=False)[0]


@impl("rms_linear_swiglu_keep", "CUDA")
def rms_linear_swiglu_keep(
    x: Tensor, squares: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    return _gated("rms_linear_swiglu_keep", "swiglu_keep", x, squares, weight, eps, keep=True)


@impl("rms_linear_rotary", "CUDA")
def rms_linear_rotary(
    x: Tensor,
    squares: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    eps: float,
) -> Tensor:
    op, head_dim = "rms_linear_rotary", 2 * cos.shape[1]
    if head_dim not in (64, 128):
        raise ValueError(f"{op}: the Triton kernel serves a head_dim of 64 or 128, got {head_dim}")
    heads = weight.shape[0] // (3 * head_dim)
    qkv = torch.empty(x.shape[0], heads, 3, head_dim, dtype=weight.dtype, device=x.device)
    if not qkv.numel():
        return qkv
    grid, operands, constants = _main_loop(
        op, "rotary", x, weight, squares=squares, cos=cos, sin=sin, positions=positions
    )
    with on_device(x):
        _rotary[grid](
            *operands, squares.contiguous(), cos.contiguous(), sin.contiguous(),
            positions.contiguous(), qkv, x.shape[0], eps,
            BLOCKS=squares.shape[1], HEAD_DIM=head_dim, **constants,
        )  # fmt: skip
    return qkv
