"""Pooling of packed sequences on the GPU: a program sums some columns of one sequence.

Always in the same order whatever the batch, so a sequence pools to the same bits alone or beside
others. The backward walks over tokens instead, and finds each one's sequence by bisection.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import impl
from ._device import architecture, check_served, on_device

# Rows and columns of a tile, and warps.
FORWARD = {
    80: {"BLOCK_T": 64, "BLOCK": 64, "num_warps": 4},
    90: {"BLOCK_T": 64, "BLOCK": 64, "num_warps": 4},
    100: {"BLOCK_T": 64, "BLOCK": 64, "num_warps": 4},
}
BACKWARD = {
    80: {"BLOCK_T": 16, "BLOCK": 128, "num_warps": 4},
    90: {"BLOCK_T": 16, "BLOCK": 128, "num_warps": 4},
    100: {"BLOCK_T": 16, "BLOCK": 128, "num_warps": 4},
}


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    hidden_ptr,
    cu_seqlens_ptr,
    pooled_ptr,
    tokens,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    # Offsets are not checked (that would wait for the GPU), but nothing is read beyond hidden.
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), tokens)
    if not MEAN:
        end = tl.minimum(start + 1, end)  # the first token's vector is the mean of it alone
    row = tl.arange(0, BLOCK_T)[:, None]
    total = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for first in range(start, end, BLOCK_T):
        mask = (first + row < end) & (column < DIM)
        ptrs = hidden_ptr + first * DIM + row * DIM + column
        total += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    pooled = tl.sum(total, 0, keep_dims=True) / tl.maximum(end - start, 1).to(tl.float32)
    tl.store(pooled_ptr + sequence * DIM + column, pooled, mask=column < DIM)


@triton.jit(do_not_specialize=["tokens", "sequences", "steps"])
def _backward(
    dpooled_ptr,
    cu_seqlens_ptr,
    dhidden_ptr,
    tokens,
    sequences,
    steps,
    DIM: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    # The sequence of a token is the number of sequences that end at or before it.
    sequence, above = tl.zeros([BLOCK_T], tl.int32), tl.zeros([BLOCK_T], tl.int32) + sequences
    for _ in range(steps):
        middle = (sequence + above) // 2
        end = tl.load(cu_seqlens_ptr + middle + 1, mask=middle < sequences, other=2**31 - 1)
        sequence = tl.where(end <= token, middle + 1, sequence)
        above = tl.where(end <= token, above, middle)
    owned = (sequence < sequences) & (token < tokens)
    start = tl.load(cu_seqlens_ptr + sequence, mask=owned, other=0)
    if MEAN:
        length = tl.load(cu_seqlens_ptr + sequence + 1, mask=owned, other=1) - start
        given, divisor = owned, length.to(tl.float32)[:, None]
    else:
        given, divisor = owned & (token == start), 1.0
    mask = given[:, None] & (column < DIM)
    ptrs = dpooled_ptr + sequence[:, None].to(tl.int64) * DIM + column
    share = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) / divisor
    mask = (token < tokens)[:, None] & (column < DIM)
    ptrs = dhidden_ptr + token[:, None] * DIM + column
    tl.store(ptrs, share.to(dhidden_ptr.dtype.element_ty), mask=mask)


@impl("pool", "CUDA")
def pool(hidden: Tensor, cu_seqlens: Tensor, mean: bool) -> Tensor:
    check_served("pool", hidden=hidden, cu_seqlens=cu_seqlens)
    hidden, dim = hidden.contiguous(), hidden.shape[1]
    sequences = cu_seqlens.shape[0] - 1
    pooled = torch.empty(sequences, dim, dtype=torch.float32, device=hidden.device)
    if pooled.numel():
        tile = FORWARD[architecture(hidden)]
        with on_device(hidden):
            _forward[(sequences, triton.cdiv(dim, tile["BLOCK"]))](
                hidden,
                cu_seqlens.contiguous(),
                pooled,
                hidden.shape[0],
                DIM=dim,
                MEAN=mean,
                **tile,
            )
    return pooled


@impl("pool_bwd", "CUDA")
def pool_bwd(
    dpooled: Tensor, cu_seqlens: Tensor, tokens: int, mean: bool, dtype: torch.dtype
) -> Tensor:
    check_served("pool_bwd", dpooled=dpooled, cu_seqlens=cu_seqlens)
    sequences, dim = dpooled.shape
    dhidden = torch.empty(tokens, dim, dtype=dtype, device=dpooled.device)
    if dhidden.numel():
        tile = BACKWARD[architecture(dpooled)]
        with on_device(dpooled):
            _backward[(triton.cdiv(tokens, tile["BLOCK_T"]), triton.cdiv(dim, tile["BLOCK"]))](
                dpooled.contiguous(),
                cu_seqlens.contiguous(),
                dhidden,
                tokens,
                sequences,
                sequences.bit_length(),
                DIM=dim,
                MEAN=mean,
                **tile,
            )
    return dhidden
