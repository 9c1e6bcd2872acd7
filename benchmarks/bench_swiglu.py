"""SwiGLU of 8,192 tokens at NeoBERT's width: (8192, 4096) -> (8192, 2048)."""

import torch
import torch.nn.functional as F
from variants import backward_of, choose, each_dtype, each_variant

from neobert_kernels import swiglu

TOKENS, WIDTH = 8192, 2048


def plain(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@each_variant
@each_dtype
def test_swiglu(measure, variant, dtype):
    gate_up = torch.randn(TOKENS, 2 * WIDTH, dtype=dtype)
    fn = choose(variant, swiglu, plain)
    with torch.inference_mode():
        measure(lambda: fn(gate_up), moved_bytes=gate_up.nbytes * 3 // 2)


@each_variant
@each_dtype
def test_swiglu_backward(measure, variant, dtype):
    gate_up = torch.randn(TOKENS, 2 * WIDTH, dtype=dtype)
    fn = choose(variant, swiglu, plain)
    measure(backward_of(fn, [gate_up]), moved_bytes=gate_up.nbytes * 5 // 2)
