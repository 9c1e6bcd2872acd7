"""Rotary embedding of 8,192 tokens, 12 heads of 64: one tensor, and q and k in the packed qkv."""

import pytest
import torch
from variants import backward_of, choose, each_dtype, each_variant

from neobert_kernels import apply_rotary, apply_rotary_qkv_

TOKENS, HEADS, HEAD_DIM = 8192, 12, 64


def tables():
    positions = torch.arange(TOKENS) % 512
    frequency = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(4096.0), frequency)
    return angles.cos(), angles.sin(), positions


def plain(x, cos, sin, positions):
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.flatten(-2).to(x.dtype)


def both(rotate, others):
    return lambda x: rotate(x, *others)


@each_variant
@each_dtype
def test_rotary(measure, variant, dtype):
    x, others = torch.randn(TOKENS, HEADS, HEAD_DIM, dtype=dtype), tables()
    fn = choose(variant, both(apply_rotary, others), both(plain, others))
    with torch.inference_mode():
        measure(lambda: fn(x), moved_bytes=2 * x.nbytes)


@each_variant
@each_dtype
def test_rotary_backward(measure, variant, dtype):
    x, others = torch.randn(TOKENS, HEADS, HEAD_DIM, dtype=dtype), tables()
    fn = choose(variant, both(apply_rotary, others), both(plain, others))
    measure(backward_of(fn, [x]), moved_bytes=2 * x.nbytes)


@pytest.mark.parametrize("variant", ["ours", "plain"])
@each_dtype
def test_rotary_qkv_in_place(measure, variant, dtype):
    qkv, others = torch.randn(TOKENS, HEADS, 3, HEAD_DIM, dtype=dtype), tables()

    def plain_qkv_(qkv):
        for part in (0, 1):
            qkv[:, :, part] = plain(qkv[:, :, part], *others)

    fn = choose(variant, both(apply_rotary_qkv_, others), plain_qkv_)
    with torch.inference_mode():
        measure(lambda: fn(qkv), moved_bytes=2 * qkv.nbytes * 2 // 3)
