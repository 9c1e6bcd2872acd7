"""The backward of attention, tile by tile: what its kernels do with one head of one sequence.

With P the weights, recomputed from the log-sum-exp, and delta the rowwise sum of out * dout:
dV = Pᵀ dO, dS = P * (dO Vᵀ - delta), dK = dSᵀ Q and dQ = dS K, the last two times the scale (Dao et
al. 2022, algorithm 4). Pointers are to the sequence's first token.
"""

import triton
import triton.language as tl

from ._varlen import again, load, pointers


@triton.jit
def store(ptr, first, length, gradient, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    row = tl.arange(0, gradient.shape[0])
    ptrs = pointers(ptr, first, row, STRIDE, HEAD_DIM)
    tl.store(ptrs, gradient.to(ptr.dtype.element_ty), mask=(first + row < length)[:, None])


@triton.jit
def delta_of(out_ptrs, dout, live):
    out = load(out_ptrs, live, True).to(tl.float32)
    return tl.sum(out * dout.to(tl.float32), 1)


@triton.jit
def keys_tile(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    sums_ptr,
    dqkv_ptr,
    stride_qt,
    stride_kt,
    stride_vt,
    first,
    length,
    scale,
    scale2,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ATOMIC: tl.constexpr,
    SHORT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """dk and dv of keys first to first + ROWS; with ATOMIC also what they add to every query's dq,
    to sums. In a SHORT sequence, whose keys these all are, that is dq; and there is no delta yet.

    Scores and what follows are transposed, keys by queries: so the weights are, as they come, the
    left operand of the product for dv, and their gradient of that for dk."""
    row, column = tl.arange(0, ROWS), tl.arange(0, STEP)
    live = first + row < length
    k_ptrs = pointers(k_ptr, first, row, stride_kt, HEAD_DIM)
    v_ptrs = pointers(v_ptr, first, row, stride_vt, HEAD_DIM)
    k, v = load(k_ptrs, live, True), load(v_ptrs, live, True)
    q_ptrs = pointers(q_ptr, 0, column, stride_qt, HEAD_DIM)
    dout_ptrs = pointers(dout_ptr, 0, column, STRIDE, HEAD_DIM)
    out_ptrs = pointers(out_ptr, 0, column, STRIDE, HEAD_DIM)
    sums_ptrs = pointers(sums_ptr, 0, column, STRIDE, HEAD_DIM)
    lse_ptrs, delta_ptrs = lse_ptr + column, delta_ptr + column
    dk = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    dv = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for at in range(0, length, STEP):
        there = at + column < length
        q, dout = load(q_ptrs, there, True), load(dout_ptrs, there, True)
        # Infinite for queries that are not there: their weights are zero.
        lse = tl.load(lse_ptrs, mask=there, other=float("inf"))
        if SHORT:
            delta = delta_of(out_ptrs, dout, there)
        else:
            delta = tl.load(delta_ptrs, mask=there, other=0.0)
        k_now = again(k, k_ptrs, live)
        scores = tl.dot(k_now, tl.trans(q), input_precision="ieee")
        weights = tl.exp2(scores * scale2 - (lse * 1.4426950408889634)[None, :])
        if SHORT or ATOMIC:
            # For keys that are not there it may be infinite, and would make their part of dq NaN.
            weights = tl.where(live[:, None], weights, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
        dweights = tl.dot(again(v, v_ptrs, live), tl.trans(dout), input_precision="ieee")
        dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
        dk = tl.dot(dscores, q, dk, input_precision="ieee")
        if SHORT or ATOMIC:
            dq = tl.dot(tl.trans(dscores), k_now, input_precision="ieee")
        if SHORT:
            store(dqkv_ptr, at, length, dq * scale, 3 * STRIDE, HEAD_DIM)
        if ATOMIC:
            tl.atomic_add(sums_ptrs, dq, mask=there[:, None], sem="relaxed")
            sums_ptrs += STEP * STRIDE
        q_ptrs += STEP * tl.cast(stride_qt, tl.int64)
        dout_ptrs += STEP * STRIDE
        out_ptrs += STEP * STRIDE
        lse_ptrs += STEP
        delta_ptrs += STEP
    store(dqkv_ptr + HEAD_DIM, first, length, dk * scale, 3 * STRIDE, HEAD_DIM)
    store(dqkv_ptr + 2 * HEAD_DIM, first, length, dv, 3 * STRIDE, HEAD_DIM)


@triton.jit
def queries_tile(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    stride_qt,
    stride_kt,
    stride_vt,
    first,
    length,
    scale,
    scale2,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """dq of queries first to first + ROWS, and their delta."""
    row, column = tl.arange(0, ROWS), tl.arange(0, STEP)
    live = first + row < length
    q_ptrs = pointers(q_ptr, first, row, stride_qt, HEAD_DIM)
    dout_ptrs = pointers(dout_ptr, first, row, STRIDE, HEAD_DIM)
    q, dout = load(q_ptrs, live, True), load(dout_ptrs, live, True)
    delta = delta_of(pointers(out_ptr, first, row, STRIDE, HEAD_DIM), dout, live)
    tl.store(delta_ptr + first + row, delta, mask=live)
    lse2 = tl.load(lse_ptr + first + row, mask=live, other=0.0) * 1.4426950408889634
    k_ptrs = pointers(k_ptr, 0, column, stride_kt, HEAD_DIM)
    v_ptrs = pointers(v_ptr, 0, column, stride_vt, HEAD_DIM)
    dq = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for at in range(0, length, STEP):
        there = at + column < length
        k, v = load(k_ptrs, there, True), load(v_ptrs, there, True)
        scores = tl.dot(again(q, q_ptrs, live), tl.trans(k), input_precision="ieee")
        weights = tl.exp2(scores * scale2 - lse2[:, None])
        weights = tl.where(there[None, :], weights, 0.0)  # as for the keys' tile
        dweights = tl.dot(again(dout, dout_ptrs, live), tl.trans(v), input_precision="ieee")
        dscores = (weights * (dweights - delta[:, None])).to(k.dtype)
        dq = tl.dot(dscores, k, dq, input_precision="ieee")
        k_ptrs += STEP * tl.cast(stride_kt, tl.int64)
        v_ptrs += STEP * tl.cast(stride_vt, tl.int64)
    store(dqkv_ptr, first, length, dq * scale, 3 * STRIDE, HEAD_DIM)
