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


@triton.jit
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
