"""The model's four GEMMs, with what follows them, against PyTorch's: GFLOP/s.

A model's weights do not fit in a cache, so up to 128 tokens, where reading them is what takes the
time, each call takes another copy of the weight, from memory. `torch` is F.linear and the operation
after it; `neobert` is the one op.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from neobert_kernels import linear, linear_swiglu

# name: (out_features, in_features)
GEMMS = {"qkv": (2304, 768), "wo": (768, 768), "w12": (4096, 768), "w3": (768, 2048)}
COLD_BYTES = 96 << 20
COLD_TOKENS = 128


def weights(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> itertools.cycle:
    weight = (torch.randn(shape) * shape[1] ** -0.5).to(dtype)
    copies = COLD_BYTES // weight.nbytes if tokens <= COLD_TOKENS else 0
    return itertools.cycle([weight, *(weight.clone() for _ in range(copies))])


def torch_swiglu(x, weight):
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 32, 128, 512, 2379])
@pytest.mark.parametrize("name", [*GEMMS, "wo+residual", "w3+residual", "w12+swiglu"])
@pytest.mark.parametrize("by", ["torch", "neobert"])
def test_linear(measure, by, name, tokens, dtype):
    gemm, _, epilogue = name.partition("+")
    shape = GEMMS[gemm]
    x, weight = torch.randn(tokens, shape[1]).to(dtype), weights(tokens, shape, dtype)
    residual = torch.randn(tokens, shape[0]).to(dtype)
    functions = {
        ("torch", ""): lambda: F.linear(x, next(weight)),
        ("neobert", ""): lambda: linear(x, next(weight)),
        ("torch", "residual"): lambda: F.linear(x, next(weight)) + residual,
        ("neobert", "residual"): lambda: linear(x, next(weight), residual),
        ("torch", "swiglu"): lambda: torch_swiglu(x, next(weight)),
        ("neobert", "swiglu"): lambda: linear_swiglu(x, next(weight)),
    }
    with torch.inference_mode():
        flop = 2 * tokens * shape[0] * shape[1]
        measure(functions[by, epilogue], flop=flop, seconds=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("by", ["torch", "neobert"])
def test_linear_backward(measure, by, name, dtype):
    shape = GEMMS[name]
    x = torch.randn(2379, shape[1]).to(dtype).requires_grad_()
    weight = torch.randn(shape).to(dtype).requires_grad_()
    y = linear(x, weight) if by == "neobert" else F.linear(x, weight)
    dy = torch.randn_like(y)
    backward = lambda: torch.autograd.grad(y, (x, weight), dy, retain_graph=True)  # noqa: E731
    measure(backward, flop=4 * 2379 * shape[0] * shape[1], seconds=0.25)
