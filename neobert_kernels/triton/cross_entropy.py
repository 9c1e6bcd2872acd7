"""The masked-language-model head and its loss on the GPU, on the labelled rows alone.

How many rows are labelled is known only to the GPU, and the host must not wait for it. So the
host launches for the case that all are, a chunk of rows at a time; every kernel reads the number
of labelled rows itself and its programs share out the tiles that exist. A launch for rows that do
not exist ends at once, no row can be dropped, and no capacity has to be guessed.

Per chunk, forward: gather the rows; logits, with each tile's part of the log-sum-exp taken from
its accumulators; the losses. For gradients: logits become their own gradient in place, times the
number of rows so that float16 can hold it; then two products, the first split along the
vocabulary since its output is small. Everything is summed in a fixed order, in float32.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import check_same_dtype
from .._library import impl
from ._device import architecture, check_served, on_device, processors

# Tiles of the three products. PROGRAMS to a multiprocessor, each of which stays on it: where the
# registers allow two, one can multiply while the other is busy with what follows its product.
_SQUARE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_stages": 3}
_BIG = _SQUARE | {"num_warps": 8, "PROGRAMS": 1}
PRODUCTS = {
    80: {
        "logits": _SQUARE | {"BLOCK_K": 32, "num_warps": 4, "PROGRAMS": 2},
        "dhidden": _SQUARE | {"BLOCK_K": 32, "num_warps": 8, "PROGRAMS": 2},
        "dweight": _SQUARE | {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "PROGRAMS": 2},
    },
    90: {
        "logits": _SQUARE | {"num_warps": 4, "PROGRAMS": 2},
        "dhidden": _BIG | {"BLOCK_N": 256},
        "dweight": _BIG,
    },
    100: {"logits": _BIG, "dhidden": _BIG | {"BLOCK_N": 256}, "dweight": _BIG},
}
_FLOAT32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
PRODUCTS_FLOAT32 = dict.fromkeys(("logits", "dhidden", "dweight"), _FLOAT32 | {"PROGRAMS": 3})
# Rows and columns of a tile, and warps.
LOSS = {"ROWS": 16, "num_warps": 4}
DLOGITS = {"ROWS": 128, "BLOCK": 64, "num_warps": 8}
SCATTER = {"ROWS": 4, "num_warps": 4}

PAD = 128  # rows of logits are padded to a multiple of this, so that each starts aligned
SPLITS = 4  # parts of the vocabulary in the product for dhidden
# A chunk is a quarter of the tokens: at the usual masking rates one holds all labelled rows. But
# not so few rows that adding to the weight gradient would dominate, nor more rows or logits than
# these (and so offsets within a chunk fit 32 bits).
MIN_CHUNK, MAX_CHUNK, MAX_LOGITS = 2048, 2**16, 2**28


@triton.jit
def _product(
    a_ptr,
    stride_am,
    stride_ak,
    b_ptr,
    stride_bk,
    stride_bn,
    m,
    n,
    first,
    last,
    M,
    N,
    A_DEPTH,
    B_DEPTH,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) of a (M, A_DEPTH) @ b (B_DEPTH, N) at rows m and columns n, in float32,
    over k from first to last. What lies outside a or b counts as zero."""
    k = first + tl.arange(0, BLOCK_K)
    m64, n64, k64 = m.to(tl.int64), n.to(tl.int64), k.to(tl.int64)
    a_ptrs = a_ptr + m64[:, None] * stride_am + k64[None, :] * stride_ak
    b_ptrs = b_ptr + k64[:, None] * stride_bk + n64[None, :] * stride_bn
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(first, last, BLOCK_K):
        a = tl.load(a_ptrs, mask=(m < M)[:, None] & (k < A_DEPTH)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(k < B_DEPTH)[:, None] & (n < N)[None, :], other=0.0)
        product = tl.dot(a, b, product, input_precision="ieee")
        k += BLOCK_K
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    return product


@triton.jit(do_not_specialize=["start", "size"])
def _logits(
    x_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    count_ptr,
    logits_ptr,
    maxima_ptr,
    sums_ptr,
    targets_ptr,
    start,
    size,
    VOCAB: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits = x @ weight.T + bias, rounded to x's dtype; of each row and tile of columns the
    maximum and the sum of exponentials below it; each row's target logit."""
    live = tl.minimum(tl.load(count_ptr) - start, size)
    tiles_m = tl.cdiv(live, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_m * tl.cdiv(VOCAB, BLOCK_N), tl.num_programs(0)):
        tile_n = tile // tiles_m
        row = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        logits = _product(
            x_ptr, DIM, 1, weight_ptr, 1, DIM, row, column, 0, DIM,
            live, VOCAB, DIM, DIM, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=column < VOCAB, other=0.0).to(tl.float32)
            logits += bias[None, :]
        # The sums are taken of the rounded logits, as the gradient will be: then the
        # probabilities sum to one.
        rounded = logits.to(x_ptr.dtype.element_ty)
        logits = tl.where((column < VOCAB)[None, :], rounded.to(tl.float32), float("-inf"))
        if STORE:
            ptrs = logits_ptr + row[:, None].to(tl.int64) * PADDED + column[None, :]
            mask = (row < live)[:, None] & (column < PADDED)[None, :]
            tl.store(ptrs, logits.to(logits_ptr.dtype.element_ty), mask=mask)
        maximum = tl.maximum(tl.max(logits, 1), -3.0e38)  # finite even if all of these are -inf
        part = tile_n * size + row
        tl.store(maxima_ptr + part, maximum, mask=row < live)
        exponentials = tl.exp(logits - maximum[:, None])
        tl.store(sums_ptr + part, tl.sum(exponentials, 1), mask=row < live)
        label = tl.load(labels_ptr + row, mask=row < live, other=-1)
        is_target = column[None, :] == label[:, None]
        target = tl.sum(tl.where(is_target, logits, 0.0), 1)
        here = (label >= tile_n * BLOCK_N) & (label < (tile_n + 1) * BLOCK_N) & (label < VOCAB)
        tl.store(targets_ptr + row, target, mask=(row < live) & here)


@triton.jit(do_not_specialize=["start", "size"])
def _losses(
    labels_ptr,
    count_ptr,
    maxima_ptr,
    sums_ptr,
    targets_ptr,
    losses_ptr,
    start,
    size,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each row's maximum and sum of exponentials from its tiles', in place of the first tile's,
    and its loss; NaN for a label that is no token. The maximum is kept apart from the logarithm of
    the sum: it may be large, and their sum would round away what tells probabilities apart."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tl.minimum(tl.load(count_ptr) - start, size)
    tile = tl.arange(0, BLOCK)
    mask = (tile < TILES)[:, None] & live[None, :]
    part = tile[:, None] * size + row[None, :]
    maxima = tl.load(maxima_ptr + part, mask=mask, other=float("-inf"))
    sums = tl.load(sums_ptr + part, mask=mask, other=0.0)
    maximum = tl.where(live, tl.max(maxima, 0), 0.0)
    total = tl.sum(sums * tl.exp(maxima - maximum[None, :]), 0)
    label = tl.load(labels_ptr + row, mask=live, other=0)
    is_token = (label >= 0) & (label < VOCAB)
    total = tl.where(is_token, total, float("nan"))
    target = tl.load(targets_ptr + row, mask=live & is_token, other=0.0)
    tl.store(maxima_ptr + row, maximum, mask=live)
    tl.store(sums_ptr + row, total, mask=live)
    tl.store(losses_ptr + start + row, tl.log(total) + (maximum - target), mask=live)


@triton.jit(do_not_specialize=["start", "size"])
def _dlogits(
    logits_ptr,
    maxima_ptr,
    sums_ptr,
    labels_ptr,
    count_ptr,
    dbias_ptr,
    start,
    size,
    VOCAB: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """softmax(logits) - onehot(labels) in place of the logits, and their sum over the rows. A
    program has some columns of all rows, so that it can sum over them."""
    count = tl.load(count_ptr)
    live = tl.minimum(count - start, size)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, live, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < live)[:, None] & (column < PADDED)
        ptrs = logits_ptr + row[:, None].to(tl.int64) * PADDED + column
        logits = tl.load(ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        maximum = tl.load(maxima_ptr + row, mask=row < live, other=0.0)
        exponentials = tl.load(sums_ptr + row, mask=row < live, other=1.0)
        label = tl.load(labels_ptr + row, mask=row < live, other=-1)
        gradient = tl.exp(logits - maximum[:, None]) / exponentials[:, None]
        gradient -= tl.where(column == label[:, None], 1.0, 0.0)
        gradient = tl.where(column < VOCAB, gradient, 0.0)
        tl.store(ptrs, gradient.to(logits_ptr.dtype.element_ty), mask=mask)
        total += gradient
    if HAS_BIAS:
        dbias = tl.sum(total, 0, keep_dims=True) / tl.maximum(count, 1).to(tl.float32)
        if not FIRST:
            dbias += tl.load(dbias_ptr + column, mask=column < VOCAB, other=0.0)
        tl.store(dbias_ptr + column, dbias, mask=column < VOCAB)


@triton.jit(do_not_specialize=["start", "size"])
def _dhidden(
    dlogits_ptr,
    weight_ptr,
    count_ptr,
    parts_ptr,
    start,
    size,
    VOCAB: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """parts[s] = dlogits @ weight over the s-th part of the vocabulary."""
    live = tl.minimum(tl.load(count_ptr) - start, size)
    TILES_N: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    DEPTH: tl.constexpr = (PADDED + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    tiles = tl.cdiv(live, BLOCK_M) * TILES_N * SPLITS
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        split = tile % SPLITS
        row = tile // (SPLITS * TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile // SPLITS % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
        first = split * DEPTH
        product = _product(
            dlogits_ptr, PADDED, 1, weight_ptr, DIM, 1, row, column,
            first, tl.minimum(first + DEPTH, PADDED),
            live, DIM, PADDED, VOCAB, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        ptrs = parts_ptr + (split * size + row)[:, None].to(tl.int64) * DIM + column[None, :]
        tl.store(ptrs, product, mask=(row < live)[:, None] & (column < DIM)[None, :])


@triton.jit(do_not_specialize=["start", "size"])
def _scatter(
    parts_ptr,
    rows_ptr,
    count_ptr,
    dhidden_ptr,
    start,
    size,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum of the parts, over the number of rows, to where the rows came from."""
    count = tl.load(count_ptr)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = row < tl.minimum(count - start, size)
    mask = live[:, None] & (column < DIM)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        ptrs = parts_ptr + (split * size + row[:, None]) * DIM + column
        total += tl.load(ptrs, mask=mask, other=0.0)
    token = tl.load(rows_ptr + start + row, mask=live, other=0)
    total /= tl.maximum(count, 1).to(tl.float32)
    ptrs = dhidden_ptr + token[:, None] * DIM + column
    tl.store(ptrs, total.to(dhidden_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["start", "size"])
def _dweight(
    dlogits_ptr,
    x_ptr,
    count_ptr,
    dweight_ptr,
    start,
    size,
    VOCAB: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dweight = dlogits.T @ x over the number of rows, added to what earlier chunks gave."""
    count = tl.load(count_ptr)
    live = tl.minimum(count - start, size)
    if not FIRST and live <= 0:
        return
    TILES_N: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(VOCAB, BLOCK_M) * TILES_N
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
        product = _product(
            dlogits_ptr, 1, PADDED, x_ptr, DIM, 1, row, column, 0, live,
            PADDED, DIM, live, live, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        product /= tl.maximum(count, 1).to(tl.float32)
        ptrs = dweight_ptr + row[:, None].to(tl.int64) * DIM + column[None, :]
        mask = (row < VOCAB)[:, None] & (column < DIM)[None, :]
        if not FIRST:
            product += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(ptrs, product.to(dweight_ptr.dtype.element_ty), mask=mask)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, dhidden, dweight and dbias; the last three are empty without `gradients`."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (tokens, dim), vocab, has_bias = hidden.shape, weight.shape[0], bias is not None
    padded = triton.cdiv(vocab, PAD) * PAD
    chunk = min(max(MIN_CHUNK, triton.cdiv(tokens, 4)), MAX_CHUNK, MAX_LOGITS // padded, tokens)
    float32 = partial(torch.empty, dtype=torch.float32, device=hidden.device)
    tiles = PRODUCTS_FLOAT32 if hidden.dtype == torch.float32 else PRODUCTS[architecture(hidden)]
    tiles_n = triton.cdiv(vocab, tiles["logits"]["BLOCK_N"])
    sizes = {"VOCAB": vocab, "PADDED": padded, "DIM": dim}

    labelled = labels != ignore_index
    count = labelled.sum(dtype=torch.int32)
    rows = torch.nonzero_static(labelled, size=tokens, fill_value=0).view(-1)
    losses = float32(tokens).zero_()
    maxima, sums = float32(2, tiles_n * chunk)
    targets = float32(chunk)
    logits = dhidden = dweight = dbias = float32(0)
    if gradients:
        logits = hidden.new_empty(chunk, padded)
        parts = float32(SPLITS, chunk, dim)
        dhidden = torch.zeros_like(hidden)
        # The first chunk writes these, the others add to them.
        dweight = float32(weight.shape) if chunk < tokens else torch.empty_like(weight)
        dbias = float32(vocab if has_bias else 0)

    for start in range(0, tokens, max(chunk, 1)):
        size = min(chunk, tokens - start)
        x = hidden.index_select(0, rows[start : start + size])
        y = labels.index_select(0, rows[start : start + size])
        grid, tile = _grid(tiles["logits"], hidden)
        _logits[grid](
            x, weight, bias, y, count, logits, maxima, sums, targets, start, size,
            HAS_BIAS=has_bias, STORE=gradients, **sizes, **tile,
        )  # fmt: skip
        _losses[(triton.cdiv(size, LOSS["ROWS"]),)](
            y, count, maxima, sums, targets, losses, start, size,
            VOCAB=vocab, TILES=tiles_n, BLOCK=triton.next_power_of_2(tiles_n), **LOSS,
        )  # fmt: skip
        if not gradients:
            continue
        _dlogits[(triton.cdiv(padded, DLOGITS["BLOCK"]),)](
            logits, maxima, sums, y, count, dbias, start, size,
            VOCAB=vocab, PADDED=padded, HAS_BIAS=has_bias, FIRST=start == 0, **DLOGITS,
        )  # fmt: skip
        grid, tile = _grid(tiles["dhidden"], hidden)
        _dhidden[grid](
            logits, weight, count, parts, start, size, SPLITS=SPLITS, **sizes, **tile
        )  # fmt: skip
        block = min(256, triton.next_power_of_2(dim))
        _scatter[(triton.cdiv(size, SCATTER["ROWS"]), triton.cdiv(dim, block))](
            parts, rows, count, dhidden, start, size,
            DIM=dim, SPLITS=SPLITS, BLOCK=block, **SCATTER,
        )  # fmt: skip
        grid, tile = _grid(tiles["dweight"], hidden)
        _dweight[grid](
            logits, x, count, dweight, start, size, FIRST=start == 0, **sizes, **tile
        )  # fmt: skip
    if tokens == 0:
        dweight, dbias = dweight.zero_(), dbias.zero_()
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return losses.sum() / count, dhidden, dweight.to(weight.dtype), dbias


def _grid(tile: dict, hidden: Tensor) -> tuple[tuple[int], dict]:
    tile = dict(tile)
    return (tile.pop("PROGRAMS") * processors(hidden),), tile


def _check(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    check_served(op, hidden=hidden, weight=weight, bias=bias, labels=labels)
    check_same_dtype(op, hidden=hidden, weight=weight)


@impl("linear_cross_entropy", "CUDA")
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> Tensor:
    _check("linear_cross_entropy", hidden, weight, bias, labels)
    with on_device(hidden):
        return _run(hidden, weight, bias, labels, ignore_index, gradients=False)[0]


@impl("linear_cross_entropy_grads", "CUDA")
def linear_cross_entropy_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("linear_cross_entropy_grads", hidden, weight, bias, labels)
    with on_device(hidden):
        return _run(hidden, weight, bias, labels, ignore_index, gradients=True)
