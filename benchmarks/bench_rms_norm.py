"""RMSNorm, alone and after a residual add, at NeoBERT's width."""

import pytest
import torch
import torch.nn.functional as F
from compare import DIM, DTYPES, ROW_OP, WITH_LIGER, WITH_XFORMERS, backward, choose

from neobert_kernels import add_rms_norm, rms_norm


def plain(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def plain_add(x, residual, weight):
    total = residual + x
    return F.rms_norm(total, weight.shape, weight, 1e-5), total


def liger():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-5)


def xformers():
    from xformers.ops import rms_norm as fused

    return lambda x, weight: fused(x, weight, 1e-5)


@pytest.fixture
def inputs(dtype, tokens):
    x, residual = torch.randn(2, tokens, DIM).to(dtype)
    return x, residual, torch.ones(DIM, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", WITH_XFORMERS)
def test_rms_norm(measure, implementation, inputs):
    x, _, weight = inputs
    fn = choose(implementation, rms_norm, plain, liger=liger, xformers=xformers)
    with torch.inference_mode():
        measure(lambda: fn(x, weight), moved_bytes=2 * x.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ROW_OP)
def test_add_rms_norm(measure, implementation, inputs):
    x, residual, weight = inputs
    fn = choose(implementation, add_rms_norm, plain_add)
    with torch.inference_mode():
        measure(lambda: fn(x, residual, weight), moved_bytes=4 * x.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", WITH_LIGER)
def test_rms_norm_backward(measure, implementation, inputs):
    x, _, weight = inputs
    fn = choose(implementation, rms_norm, plain, liger=liger)
    measure(backward(fn, x, weight), moved_bytes=3 * x.nbytes)
