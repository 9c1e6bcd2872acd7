"""Mean pooling of packed tokens in sequences of 3 to 512."""

import pytest
import torch
from compare import DIM, DTYPES, backward

from neobert_kernels import pool


def boundaries(tokens: int) -> torch.Tensor:
    lengths = torch.arange(3, 512, 7).repeat(1 + tokens // 18000)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    cu_seqlens = cu_seqlens[cu_seqlens < tokens]
    return torch.cat([cu_seqlens, torch.tensor([tokens])]).int()


def plain(hidden, cu_seqlens):
    return torch.stack([rows.float().mean(0) for rows in hidden.split(cu_seqlens.diff().tolist())])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", [pool, plain], ids=["ours", "plain"])
def test_pool(measure, implementation, dtype, tokens):
    hidden, cu_seqlens = torch.randn(tokens, DIM).to(dtype), boundaries(tokens)
    with torch.inference_mode():
        measure(lambda: implementation(hidden, cu_seqlens), moved_bytes=hidden.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", [pool, plain], ids=["ours", "plain"])
def test_pool_backward(measure, implementation, dtype, tokens):
    hidden, cu_seqlens = torch.randn(tokens, DIM).to(dtype), boundaries(tokens)
    call = backward(lambda x: implementation(x, cu_seqlens), hidden)
    measure(call, moved_bytes=hidden.nbytes)
