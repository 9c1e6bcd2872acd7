"""Mean pooling of 8,192 tokens in sequences of ragged length."""

import pytest
import torch
from variants import backward_of, choose, each_dtype

from neobert_kernels import pool

LENGTHS = [1024, 17, 500, 33, 2048, 9, 400, 65, 3000, 96, 800, 200]
TOKENS, DIM = sum(LENGTHS), 768


def plain(hidden):
    """Of what the library offers, the way that needs no padding."""
    return torch.stack([part.float().mean(0) for part in hidden.split(LENGTHS)])


def ours():
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return lambda hidden: pool(hidden, cu_seqlens)


@pytest.mark.parametrize("variant", ["ours", "plain"])
@each_dtype
def test_pool(measure, variant, dtype):
    hidden, fn = torch.randn(TOKENS, DIM, dtype=dtype), choose(variant, ours(), plain)
    with torch.inference_mode():
        measure(lambda: fn(hidden), moved_bytes=hidden.nbytes)


@pytest.mark.parametrize("variant", ["ours", "plain"])
@each_dtype
def test_pool_backward(measure, variant, dtype):
    hidden, fn = torch.randn(TOKENS, DIM, dtype=dtype), choose(variant, ours(), plain)
    measure(backward_of(fn, [hidden]), moved_bytes=hidden.nbytes)
