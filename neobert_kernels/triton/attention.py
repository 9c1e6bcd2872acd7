"""Attention over packed sequences on the GPU, forward.

Of a sequence of up to SHORT tokens all keys fit one tile, and each query's softmax is a single
pass. In a longer one each tile of queries walks over the keys with a running maximum and sum
(Milakov and Gimelshein 2018; Dao 2023). `_varlen` says how sequences find their programs.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import impl
from ._device import architecture, on_device
from ._varlen import FILLERS, again, check, fill, list_tiles, load, plan, pointers, span

# Of long sequences, by head_dim: queries of a tile, keys at a time, warps, stages.
_HALF = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
LONG = {
    80: {64: _HALF, 128: _HALF | {"num_warps": 8}},
    90: {64: _HALF, 128: _HALF | {"num_warps": 8}},
    100: {64: _HALF, 128: _HALF | {"num_warps": 8}},
}
_FLOAT32 = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
LONG_FLOAT32 = {64: _FLOAT32, 128: _FLOAT32 | {"BLOCK_M": 16, "num_stages": 1}}
# Of short sequences.
_SHORT = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}
SHORT_TILES = {80: _SHORT, 90: _SHORT, 100: _SHORT}


@triton.jit
def _store(
    out_ptr,
    lse_ptr,
    STRIDE_OT: tl.constexpr,
    first,
    length,
    output,
    total,
    maximum,
    HEAD_DIM: tl.constexpr,
):
    """The output of a tile of queries, and the natural logarithm of their sum of exponentials."""
    row = tl.arange(0, output.shape[0])
    ptrs = pointers(out_ptr, first, row, STRIDE_OT, HEAD_DIM)
    output = (output / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(ptrs, output, mask=(first + row < length)[:, None])
    lse = (maximum + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + first + row, lse, mask=first + row < length)


@triton.jit
def _attend(
    q,
    k_ptrs,
    v_ptrs,
    live,
    output,
    total,
    maximum,
    scale,
    NEGATIVE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes one tile of keys into a tile of queries: the sum of values weighted by
    2^(scale * score - maximum), that of the weights, and the maximum."""
    k = load(k_ptrs, live, MASKED)
    v = load(v_ptrs, live, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if NEGATIVE:
        scores = -scores
    if MASKED:
        scores = tl.where(live[None, :], scores, float("-inf"))
    raised = tl.maximum(maximum, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - raised[:, None])
    rescale = tl.exp2(maximum - raised)
    total = total * rescale + tl.sum(weights, 1)
    output = tl.dot(weights.to(v.dtype), v, output * rescale[:, None], input_precision="ieee")
    return output, total, raised


@triton.jit
def _attend_tile(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_qt,
    stride_kt,
    stride_vt,
    STRIDE_OT: tl.constexpr,
    first,
    length,
    scale,
    HEAD_DIM: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Queries first to first + BLOCK_M of one head of a sequence of any length; the pointers are to
    the sequence's first token."""
    row, key = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    live = first + row < length
    q_ptrs = pointers(q_ptr, first, row, stride_qt, HEAD_DIM)
    q = load(q_ptrs, live, True)
    k_ptrs = pointers(k_ptr, 0, key, stride_kt, HEAD_DIM)
    v_ptrs = pointers(v_ptr, 0, key, stride_vt, HEAD_DIM)
    output = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for _ in range(0, whole, BLOCK_N):
        output, total, maximum = _attend(
            again(q, q_ptrs, live), k_ptrs, v_ptrs, key >= 0,
            output, total, maximum, scale, NEGATIVE, False,
        )  # fmt: skip
        k_ptrs += BLOCK_N * tl.cast(stride_kt, tl.int64)
        v_ptrs += BLOCK_N * tl.cast(stride_vt, tl.int64)
    if whole < length:
        output, total, maximum = _attend(
            again(q, q_ptrs, live), k_ptrs, v_ptrs, whole + key < length,
            output, total, maximum, scale, NEGATIVE, True,
        )  # fmt: skip
    _store(out_ptr, lse_ptr, STRIDE_OT, first, length, output, total, maximum, HEAD_DIM)


@triton.jit
def _attend_short(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_qt,
    stride_kt,
    stride_vt,
    STRIDE_OT: tl.constexpr,
    length,
    scale,
    HEAD_DIM: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One head of a sequence of at most BLOCK_N tokens; the pointers are to its first."""
    key = tl.arange(0, BLOCK_N)
    live = key < length
    k = load(pointers(k_ptr, 0, key, stride_kt, HEAD_DIM), live, True)
    v = load(pointers(v_ptr, 0, key, stride_vt, HEAD_DIM), live, True)
    for first in range(0, length, BLOCK_M):
        row = tl.arange(0, BLOCK_M)
        q = load(pointers(q_ptr, first, row, stride_qt, HEAD_DIM), first + row < length, True)
        scores = tl.dot(q, tl.trans(k))
        if NEGATIVE:
            scores = -scores
        scores = tl.where(live[None, :], scores, float("-inf"))
        maximum = tl.max(scores, 1) * scale
        weights = tl.exp2(scores * scale - maximum[:, None])
        output = tl.dot(weights.to(v.dtype), v)
        total = tl.sum(weights, 1)
        _store(out_ptr, lse_ptr, STRIDE_OT, first, length, output, total, maximum, HEAD_DIM)


@triton.jit(do_not_specialize=["tokens", "sequences", "max_seqlen", "capacity", "fillers"])
def _short(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_ptr,
    out_ptr,
    lse_ptr,
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
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEGATIVE: tl.constexpr,
    LONGEST: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A head of a sequence of up to LONGEST tokens, or, with LIST, the list of a longer one's
    tiles; zeros for the tokens of no sequence, NaN for a sequence longer than max_seqlen."""
    STRIDE_OT: tl.constexpr = HEADS * HEAD_DIM
    sequence, head = tl.program_id(0) // HEADS, (tl.program_id(0) % HEADS).to(tl.int64)
    start, length = span(cu_seqlens_ptr, sequence, sequences, tokens)
    if LIST:
        if ((length > LONGEST) & (length <= max_seqlen) | (sequence == sequences)) & (head == 0):
            list_tiles(
                cu_seqlens_ptr, tiles_ptr, start, length, sequence,
                tokens, sequences, max_seqlen, capacity, LONGEST, LIST,
            )  # fmt: skip
    start = start.to(tl.int64)
    q_ptr += start * stride_qt + head * stride_qh
    k_ptr += start * stride_kt + head * stride_kh
    v_ptr += start * stride_vt + head * stride_vh
    out_ptr += start * STRIDE_OT + head * HEAD_DIM
    lse_ptr += head * tokens + start
    if sequence >= sequences:
        owned = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequences), 0), tokens)
        first, step = owned + (sequence - sequences) * BLOCK_M, fillers * BLOCK_M
        fill(out_ptr, STRIDE_OT, first, tokens, step, 0.0, HEAD_DIM, BLOCK_M)
        fill(lse_ptr, 1, first, tokens, step, 0.0, 1, BLOCK_M)
    elif length > max_seqlen:
        fill(out_ptr, STRIDE_OT, 0, length, BLOCK_M, float("nan"), HEAD_DIM, BLOCK_M)
        fill(lse_ptr, 1, 0, length, BLOCK_M, float("nan"), 1, BLOCK_M)
    elif LONGEST:
        if (length > 0) & (length <= 64):
            _attend_short(
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qt, stride_kt, stride_vt, STRIDE_OT,
                length, scale, HEAD_DIM, NEGATIVE, BLOCK_M, 64,
            )  # fmt: skip
        if LONGEST > 64:
            if (length > 64) & (length <= LONGEST):
                _attend_short(
                    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
                    stride_qt, stride_kt, stride_vt, STRIDE_OT,
                    length, scale, HEAD_DIM, NEGATIVE, BLOCK_M, LONGEST,
                )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "capacity"])
def _long(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    tokens,
    capacity,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the list for one head."""
    STRIDE_OT: tl.constexpr = HEADS * HEAD_DIM
    tile, head = tl.program_id(0) // HEADS, (tl.program_id(0) % HEADS).to(tl.int64)
    if tile < tl.load(tiles_ptr + 3 * capacity):
        start = tl.load(tiles_ptr + tile).to(tl.int64)
        length = tl.load(tiles_ptr + capacity + tile)
        first = tl.load(tiles_ptr + 2 * capacity + tile)
        q_ptr += start * stride_qt + head * stride_qh
        k_ptr += start * stride_kt + head * stride_kh
        v_ptr += start * stride_vt + head * stride_vh
        out_ptr += start * STRIDE_OT + head * HEAD_DIM
        lse_ptr += head * tokens + start
        _attend_tile(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qt, stride_kt, stride_vt, STRIDE_OT,
            first, length, scale, HEAD_DIM, NEGATIVE, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@impl("varlen_attention", "CUDA")
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    check("varlen_attention", cu_seqlens, q, k=k, v=v)
    tokens, heads, head_dim = q.shape
    sequences = cu_seqlens.shape[0] - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    half = q.dtype != torch.float32
    tile = (LONG[architecture(q)] if half else LONG_FLOAT32)[head_dim]
    capacity, regime = plan(q, sequences, max_seqlen, tile["BLOCK_M"])
    tiles = torch.empty(3 * capacity + 1, dtype=torch.int32, device=q.device)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    # In base 2, the sign apart. Zero would make NaN of the keys beyond a sequence's end.
    scale2 = max(abs(scale) * math.log2(math.e), 2.0**-126)
    constants = {"HEADS": heads, "HEAD_DIM": head_dim, "NEGATIVE": scale < 0}
    fillers = min(FILLERS, triton.cdiv(tokens, 64))
    with on_device(q):
        _short[((sequences + fillers) * heads,)](
            q, k, v, cu_seqlens.contiguous(), out, lse, tiles, *strides,
            tokens, sequences, max_seqlen, capacity, fillers, scale2,
            **constants, **regime, **SHORT_TILES[architecture(q)],
        )  # fmt: skip
        if capacity:
            _long[(capacity * heads,)](
                q, k, v, out, lse, tiles, *strides, tokens, capacity, scale2, **constants, **tile
            )  # fmt: skip
    return out, lse
