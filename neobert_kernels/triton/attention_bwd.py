"""Attention's backward over packed sequences on the GPU: dq, dk and dv as one packed gradient.

As in the forward, a sequence's own length decides what serves it, and its probabilities are
recomputed from the log-sum-exp. Up to SHORT tokens a program per head holds everything and writes
all three. A longer one is cut into tiles: a program for a tile of keys walks over the queries and
sums dk and dv. What each pair of tiles adds to dq is either added on the spot, by float32 atomics,
whose order and so whose last bits change from run to run; or a second kernel, for tiles of queries,
computes the scores again, seven products instead of five, and always sums in one order. PyTorch's
switch `torch.use_deterministic_algorithms` chooses the second.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import check_same_device, check_shape
from .._library import impl
from ._device import architecture, on_device
from ._gradients import delta_of, keys_tile, queries_tile, store
from ._varlen import FILLERS, check, fill, list_tiles, load, plan, pointers, span

# By head_dim. ROWS, of a long sequence's tile of keys or queries; STEP, queries or keys at a time;
# for the kernel of either, warps and stages.
_FOUR, _EIGHT = ({"num_warps": warps, "num_stages": 2} for warps in (4, 8))
_WIDE = {"ROWS": 128, "keys": {"STEP": 64} | _EIGHT, "queries": {"STEP": 64} | _EIGHT}
_THIN = _WIDE | {"keys": {"STEP": 32} | _EIGHT}
LONG: dict[int, dict[int, dict]] = {
    80: {
        64: {"ROWS": 64, "keys": {"STEP": 32} | _FOUR, "queries": {"STEP": 64} | _FOUR},
        128: _WIDE | {"ROWS": 64},
    },
    90: {64: _WIDE, 128: _THIN},
    100: {64: _THIN, 128: _THIN},
}
_FLOAT32 = {"STEP": 16} | _EIGHT
LONG_FLOAT32: dict[int, dict] = {
    64: {"ROWS": 16, "keys": _FLOAT32, "queries": _FLOAT32},
    128: {"ROWS": 16, "keys": _FLOAT32 | {"num_stages": 1}, "queries": _FLOAT32},
}
# Of short sequences: STEP, queries at a time.
_SHORT = {"STEP": 32, "num_warps": 8, "num_stages": 1}
SHORT_TILES = {
    80: {64: _SHORT | {"num_warps": 4}, 128: _SHORT},
    90: {64: _SHORT | {"num_warps": 4}, 128: _SHORT},
    100: {64: _SHORT, 128: _SHORT},
}
# Of what goes over the queries of long ones once.
DELTA, ROUND = {"num_warps": 4}, {"num_warps": 8}


@triton.jit(do_not_specialize=["tokens", "sequences", "max_seqlen", "capacity", "fillers"])
def _short(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    dqkv_ptr,
    tiles_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    tokens,
    sequences,
    max_seqlen,
    capacity,
    fillers,
    scale,
    scale2,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LONGEST: tl.constexpr,
    LIST: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr = 64,
):
    """A head of a sequence of up to LONGEST tokens, or, with LIST, the list of a longer one's
    tiles; zeros for the tokens of no sequence, NaN for a sequence longer than max_seqlen."""
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    sequence, head = tl.program_id(0) // HEADS, (tl.program_id(0) % HEADS).to(tl.int64)
    start, length = span(cu_seqlens_ptr, sequence, sequences, tokens)
    if LIST:
        if ((length > LONGEST) & (length <= max_seqlen) | (sequence == sequences)) & (head == 0):
            list_tiles(
                cu_seqlens_ptr, tiles_ptr, start, length, sequence,
                tokens, sequences, max_seqlen, capacity, LONGEST, LIST,
            )  # fmt: skip
    start = start.to(tl.int64)
    dqkv_ptr += start * 3 * STRIDE + head * 3 * HEAD_DIM
    if sequence >= sequences:
        owned = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequences), 0), tokens)
        first, step = owned + (sequence - sequences) * ROWS, fillers * ROWS
        for i in tl.static_range(3):
            into = dqkv_ptr + i * HEAD_DIM
            fill(into, 3 * STRIDE, first, tokens, step, 0.0, HEAD_DIM, ROWS)
    elif length > max_seqlen:
        for i in tl.static_range(3):
            into = dqkv_ptr + i * HEAD_DIM
            fill(into, 3 * STRIDE, 0, length, ROWS, float("nan"), HEAD_DIM, ROWS)
    elif LONGEST:
        q_ptr += start * stride_qt + head * stride_qh
        k_ptr += start * stride_kt + head * stride_kh
        v_ptr += start * stride_vt + head * stride_vh
        dout_ptr += start * STRIDE + head * HEAD_DIM
        out_ptr += start * STRIDE + head * HEAD_DIM
        lse_ptr += head * tokens + start
        if (length > 0) & (length <= 64):
            keys_tile(
                dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lse_ptr, lse_ptr, dqkv_ptr,
                stride_qt, stride_kt, stride_vt, 0, length, scale, scale2,
                STRIDE, HEAD_DIM, False, True, 64, STEP,
            )  # fmt: skip
        if LONGEST > 64:
            if (length > 64) & (length <= LONGEST):
                keys_tile(
                    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lse_ptr, lse_ptr, dqkv_ptr,
                    stride_qt, stride_kt, stride_vt, 0, length, scale, scale2,
                    STRIDE, HEAD_DIM, False, True, LONGEST, STEP,
                )  # fmt: skip


@triton.jit
def _tile(tiles_ptr, capacity, HEADS: tl.constexpr):
    """Whether this program has a tile of the list, and its head, first token of the sequence, the
    sequence's length and the first row of the tile."""
    tile, head = tl.program_id(0) // HEADS, (tl.program_id(0) % HEADS).to(tl.int64)
    mine = tile < tl.load(tiles_ptr + 3 * capacity)
    start = tl.load(tiles_ptr + tile, mask=mine, other=0).to(tl.int64)
    length = tl.load(tiles_ptr + capacity + tile, mask=mine, other=0)
    first = tl.load(tiles_ptr + 2 * capacity + tile, mask=mine, other=0)
    return mine, head, start, length, first


@triton.jit(do_not_specialize=["tokens", "capacity"])
def _delta(
    dout_ptr,
    out_ptr,
    tiles_ptr,
    delta_ptr,
    sums_ptr,
    tokens,
    capacity,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """For the queries of a tile: delta, the sum of out * dout, and zeros to add dq to."""
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    mine, head, start, length, first = _tile(tiles_ptr, capacity, HEADS)
    if mine:
        row = tl.arange(0, 16)
        at = start * STRIDE + head * HEAD_DIM
        delta_ptr += head * tokens + start
        zeros = tl.zeros([16, HEAD_DIM], tl.float32)
        for query in range(first, tl.minimum(first + ROWS, length), 16):
            live = query + row < length
            dout = load(pointers(dout_ptr + at, query, row, STRIDE, HEAD_DIM), live, True)
            delta = delta_of(pointers(out_ptr + at, query, row, STRIDE, HEAD_DIM), dout, live)
            tl.store(delta_ptr + query + row, delta, mask=live)
            sums_ptrs = pointers(sums_ptr + at, query, row, STRIDE, HEAD_DIM)
            tl.store(sums_ptrs, zeros, mask=live[:, None])


@triton.jit(do_not_specialize=["tokens", "capacity"])
def _keys(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    tiles_ptr,
    delta_ptr,
    sums_ptr,
    dqkv_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    tokens,
    capacity,
    scale,
    scale2,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ATOMIC: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of the list for one head, as keys."""
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    mine, head, start, length, first = _tile(tiles_ptr, capacity, HEADS)
    if mine:
        at = start * STRIDE + head * HEAD_DIM
        keys_tile(
            dout_ptr + at,
            q_ptr + start * stride_qt + head * stride_qh,
            k_ptr + start * stride_kt + head * stride_kh,
            v_ptr + start * stride_vt + head * stride_vh,
            dout_ptr,  # in the place of out: delta is given
            lse_ptr + head * tokens + start,
            delta_ptr + head * tokens + start,
            sums_ptr + at,
            dqkv_ptr + 3 * at,
            stride_qt, stride_kt, stride_vt, first, length, scale, scale2,
            STRIDE, HEAD_DIM, ATOMIC, False, ROWS, STEP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "capacity"])
def _queries(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    delta_ptr,
    dqkv_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    tokens,
    capacity,
    scale,
    scale2,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of the list for one head, as queries; also keeps their delta for the keys' kernel."""
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    mine, head, start, length, first = _tile(tiles_ptr, capacity, HEADS)
    if mine:
        at = start * STRIDE + head * HEAD_DIM
        queries_tile(
            dout_ptr + at,
            q_ptr + start * stride_qt + head * stride_qh,
            k_ptr + start * stride_kt + head * stride_kh,
            v_ptr + start * stride_vt + head * stride_vh,
            out_ptr + at,
            lse_ptr + head * tokens + start,
            delta_ptr + head * tokens + start,
            dqkv_ptr + 3 * at,
            stride_qt, stride_kt, stride_vt, first, length, scale, scale2,
            STRIDE, HEAD_DIM, ROWS, STEP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["capacity"])
def _round(
    tiles_ptr,
    sums_ptr,
    dqkv_ptr,
    capacity,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dq of a tile of queries from the float32 sums."""
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    mine, head, start, length, first = _tile(tiles_ptr, capacity, HEADS)
    if mine:
        row = tl.arange(0, ROWS)
        at = start * STRIDE + head * HEAD_DIM
        sums_ptrs = pointers(sums_ptr + at, first, row, STRIDE, HEAD_DIM)
        dq = load(sums_ptrs, first + row < length, True)
        store(dqkv_ptr + 3 * at, first, length, dq * scale, 3 * STRIDE, HEAD_DIM)


@impl("varlen_attention_bwd", "CUDA")
def varlen_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    op = "varlen_attention_bwd"
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    check(op, cu_seqlens, q, k=k, v=v, out=out, dout=dout)
    check_same_device(op, q=q, lse=lse)
    check_shape(op, "lse", lse, (q.shape[1], q.shape[0]), "q")
    if lse.dtype != torch.float32:
        raise TypeError(f"{op}: lse must be float32, got {lse.dtype}")
    tokens, heads, head_dim = q.shape
    sequences = cu_seqlens.shape[0] - 1
    dqkv = torch.empty(tokens, heads, 3, head_dim, dtype=q.dtype, device=q.device)
    if not dqkv.numel():
        return dqkv
    half = q.dtype != torch.float32
    tile = (LONG[architecture(q)] if half else LONG_FLOAT32)[head_dim]
    capacity, regime = plan(q, sequences, max_seqlen, tile["ROWS"])
    tiles = torch.empty(3 * capacity + 1, dtype=torch.int32, device=q.device)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    scales = scale, scale * math.log2(math.e)
    sizes = {"HEADS": heads, "HEAD_DIM": head_dim}
    fillers = min(FILLERS, triton.cdiv(tokens, 64))
    with on_device(q):
        _short[((sequences + fillers) * heads,)](
            dout, q, k, v, out, lse, cu_seqlens.contiguous(), dqkv, tiles, *strides,
            tokens, sequences, max_seqlen, capacity, fillers, *scales,
            **sizes, **regime, **SHORT_TILES[architecture(q)][head_dim],
        )  # fmt: skip
        if not capacity:
            return dqkv
        grid, sizes["ROWS"] = (capacity * heads,), tile["ROWS"]
        delta = torch.empty_like(lse)
        atomic = not torch.are_deterministic_algorithms_enabled()
        sums = torch.empty(q.shape if atomic else 0, dtype=torch.float32, device=q.device)
        if atomic:
            _delta[grid](dout, out, tiles, delta, sums, tokens, capacity, **sizes, **DELTA)
        else:
            _queries[grid](
                dout, q, k, v, out, lse, tiles, delta, dqkv, *strides,
                tokens, capacity, *scales, **sizes, **tile["queries"],
            )  # fmt: skip
        _keys[grid](
            dout, q, k, v, lse, tiles, delta, sums, dqkv, *strides,
            tokens, capacity, *scales, ATOMIC=atomic, **sizes, **tile["keys"],
        )  # fmt: skip
        if atomic:
            _round[grid](tiles, sums, dqkv, capacity, scale, **sizes, **ROUND)
    return dqkv
