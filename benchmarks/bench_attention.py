"""Varlen attention at NeoBERT's shape, 12 heads of 64, about 2,400 tokens, against PyTorch's SDPA.

`sdpa-one-by-one` calls it for each sequence, `sdpa-padded` once on a batch that is given to it
padded, with its mask. GFLOP/s counts what the live tokens need: 4 * 64 L² per head forward and 2.5
times that backward.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from neobert_kernels import varlen_attention_qkv

HEADS, HEAD_DIM, TOKENS = 12, 64, 2400
SHAPES = ["lognormal", "32", "128", "512", "2048"]


def lengths_of(shape: str) -> list[int]:
    if shape != "lognormal":
        return [int(shape)] * (TOKENS // int(shape))
    drawn = torch.exp(math.log(50) + 1.1 * torch.randn(200, generator=torch.manual_seed(1)))
    lengths = drawn.clamp(8, 512).int()
    return lengths[: int((lengths.cumsum(0) < TOKENS).sum()) + 1].tolist()


def make(
    method: str, lengths: list[int], dtype: torch.dtype
) -> tuple[Callable, list[torch.Tensor]]:
    """A function that attends, and the tensors it reads."""
    qkv = torch.randn(sum(lengths), HEADS, 3, HEAD_DIM).to(dtype)
    if method == "ours":
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return lambda: varlen_attention_qkv(qkv, cu_seqlens, max(lengths)), [qkv]
    sequences = [s.permute(2, 1, 0, 3).unsqueeze(1) for s in qkv.split(lengths)]  # 3, 1, heads, …
    if method == "sdpa-one-by-one":
        # A leaf per sequence: slicing one tensor would cost SDPA a full-size gradient for each.
        leaves = [s.detach() for s in sequences]
        return lambda: [F.scaled_dot_product_attention(*s) for s in leaves], leaves
    padded = qkv.new_zeros(3, len(lengths), HEADS, max(lengths), HEAD_DIM)
    keep = torch.zeros(len(lengths), 1, 1, max(lengths), dtype=torch.bool)
    for i, (length, s) in enumerate(zip(lengths, sequences, strict=True)):
        padded[:, i, :, :length], keep[i, ..., :length] = s[:, 0], True
    return lambda: F.scaled_dot_product_attention(*padded, attn_mask=keep), [padded]


METHODS = ["ours", "sdpa-one-by-one", "sdpa-padded"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_forward(measure, method, shape, dtype):
    lengths = lengths_of(shape)
    attend, _ = make(method, lengths, dtype)
    with torch.inference_mode():
        measure(attend, flop=4 * HEADS * HEAD_DIM * sum(n * n for n in lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_backward(measure, method, shape, dtype):
    lengths = lengths_of(shape)
    attend, leaves = make(method, lengths, dtype)
    for leaf in leaves:
        leaf.requires_grad_()
    out = attend()
    outs = out if isinstance(out, list) else [out]
    douts = [torch.randn_like(o) for o in outs]
    measure(
        lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True),
        flop=10 * HEADS * HEAD_DIM * sum(n * n for n in lengths),
    )
