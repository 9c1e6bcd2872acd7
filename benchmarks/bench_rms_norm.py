"""RMSNorm, alone and after a residual add, at 8,192 tokens of NeoBERT's width."""

import pytest
import torch

from neobert_kernels import rms_norm

TOKENS, DIM = 8192, 768


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(measure, dtype):
    x, weight = torch.randn(TOKENS, DIM, dtype=dtype), torch.ones(DIM, dtype=dtype)
    with torch.inference_mode():
        measure(lambda: rms_norm(x, weight), moved_bytes=2 * x.nbytes)
