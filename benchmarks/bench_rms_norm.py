"""RMSNorm, alone and after a residual add, at 8,192 tokens of NeoBERT's width, and for one row."""

import pytest
import torch
import torch.nn.functional as F
from variants import backward_of, choose, each_dtype, each_variant

from neobert_kernels import add_rms_norm, rms_norm

TOKENS, DIM, EPS = 8192, 768, 1e-5


def plain(x, weight):
    return F.rms_norm(x, (DIM,), weight, EPS)


def plain_add(x, residual, weight):
    total = residual + x
    return plain(total, weight), total


@each_variant
@each_dtype
def test_rms_norm(measure, variant, dtype):
    x, weight = torch.randn(TOKENS, DIM, dtype=dtype), torch.ones(DIM, dtype=dtype)
    fn = choose(variant, rms_norm, plain)
    with torch.inference_mode():
        measure(lambda: fn(x, weight), moved_bytes=2 * x.nbytes)


@each_variant
@each_dtype
def test_rms_norm_backward(measure, variant, dtype):
    x, weight = torch.randn(TOKENS, DIM, dtype=dtype), torch.ones(DIM, dtype=dtype)
    fn = choose(variant, rms_norm, plain)
    measure(backward_of(fn, [x, weight]), moved_bytes=3 * x.nbytes)


@each_variant
@each_dtype
def test_add_rms_norm(measure, variant, dtype):
    x, residual = torch.randn(2, TOKENS, DIM, dtype=dtype)
    weight = torch.ones(DIM, dtype=dtype)
    fn = choose(variant, add_rms_norm, plain_add)
    with torch.inference_mode():
        measure(lambda: fn(x, residual, weight), moved_bytes=4 * x.nbytes)


@each_variant
@each_dtype
def test_add_rms_norm_backward(measure, variant, dtype):
    x, residual = torch.randn(2, TOKENS, DIM, dtype=dtype)
    weight = torch.ones(DIM, dtype=dtype)
    fn = choose(variant, add_rms_norm, plain_add)
    measure(backward_of(fn, [x, residual, weight]), moved_bytes=4 * x.nbytes)


@pytest.mark.parametrize("variant", ["ours", "plain"])
def test_one_row(measure, benchmark, variant):
    """What a call costs before it moves any data to speak of."""
    x, weight = torch.randn(1, DIM), torch.ones(DIM)
    fn = choose(variant, rms_norm, plain)
    with torch.inference_mode():
        benchmark.extra_info["us/call"] = round(measure(lambda: fn(x, weight)) * 1e6, 2)
