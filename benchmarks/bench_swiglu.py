"""SwiGLU at NeoBERT's width."""

import pytest
import torch
import torch.nn.functional as F
from compare import DTYPES, WIDTH, WITH_LIGER, backward, choose

from neobert_kernels import swiglu


def plain(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def liger():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", WITH_LIGER)
def test_swiglu(measure, implementation, dtype, tokens):
    gate_up = torch.randn(tokens, 2 * WIDTH).to(dtype)
    fn = choose(implementation, swiglu, plain, liger=liger)
    with torch.inference_mode():
        measure(lambda: fn(gate_up), moved_bytes=gate_up.nbytes * 3 // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", WITH_LIGER)
def test_swiglu_backward(measure, implementation, dtype, tokens):
    gate_up = torch.randn(tokens, 2 * WIDTH).to(dtype)
    fn = choose(implementation, swiglu, plain, liger=liger)
    measure(backward(fn, gate_up), moved_bytes=gate_up.nbytes * 5 // 2)
