"""Mean pooling of 8,192 packed tokens in sequences of 3 to 512."""

import pytest
import torch
from compare import DIM, DTYPES, TOKENS, backward

from neobert_kernels import pool


def boundaries() -> torch.Tensor:
    lengths = torch.arange(3, 512, 7)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    cu_seqlens = cu_seqlens[cu_seqlens < TOKENS]
    return torch.cat([cu_seqlens, torch.tensor([TOKENS])]).int()


def plain(hidden, cu_seqlens):
    return torch.stack([rows.float().mean(0) for rows in hidden.split(cu_seqlens.diff().tolist())])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", [pool, plain], ids=["ours", "plain"])
def test_pool(measure, implementation, dtype):
    hidden, cu_seqlens = torch.randn(TOKENS, DIM).to(dtype), boundaries()
    with torch.inference_mode():
        measure(lambda: implementation(hidden, cu_seqlens), moved_bytes=hidden.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", [pool, plain], ids=["ours", "plain"])
def test_pool_backward(measure, implementation, dtype):
    hidden, cu_seqlens = torch.randn(TOKENS, DIM).to(dtype), boundaries()
    call = backward(lambda x: implementation(x, cu_seqlens), hidden)
    measure(call, moved_bytes=hidden.nbytes)
