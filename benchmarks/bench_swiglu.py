"""SwiGLU at 8,192 tokens of NeoBERT's width."""

import pytest
import torch
import torch.nn.functional as F
from compare import DTYPES, IMPLEMENTATIONS, TOKENS, WIDTH, backward, choose

from neobert_kernels import swiglu


def plain(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_swiglu(measure, implementation, dtype):
    gate_up = torch.randn(TOKENS, 2 * WIDTH).to(dtype)
    fn = choose(implementation, swiglu, plain)
    with torch.inference_mode():
        measure(lambda: fn(gate_up), moved_bytes=gate_up.nbytes * 3 // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_swiglu_backward(measure, implementation, dtype):
    gate_up = torch.randn(TOKENS, 2 * WIDTH).to(dtype)
    fn = choose(implementation, swiglu, plain)
    measure(backward(fn, gate_up), moved_bytes=gate_up.nbytes * 5 // 2)
