"""Rotary embedding of one tensor, and of q and k inside the packed projection."""

import pytest
import torch
from compare import DTYPES, HEAD_DIM, HEADS, ROW_OP, backward, choose

from neobert_kernels import apply_rotary, apply_rotary_qkv_


def tables(tokens: int, length: int = 512) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(length), frequencies)
    return angles.cos(), angles.sin(), torch.arange(tokens) % length


def plain(x, cos, sin, positions):
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return rotated.flatten(-2).to(x.dtype)


def plain_qkv(qkv, cos, sin, positions):
    q, k, v = qkv.unbind(2)
    rotated = (plain(t, cos, sin, positions) for t in (q, k))
    return torch.stack((*rotated, v), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ROW_OP)
def test_rotary(measure, implementation, dtype, tokens):
    x = torch.randn(tokens, HEADS, HEAD_DIM).to(dtype)
    table, fn = tables(tokens), choose(implementation, apply_rotary, plain)
    with torch.inference_mode():
        measure(lambda: fn(x, *table), moved_bytes=2 * x.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ROW_OP)
def test_rotary_qkv(measure, implementation, dtype, tokens):
    qkv = torch.randn(tokens, HEADS, 3, HEAD_DIM).to(dtype)
    table, fn = tables(tokens), choose(implementation, apply_rotary_qkv_, plain_qkv)
    with torch.inference_mode():
        measure(lambda: fn(qkv, *table), moved_bytes=qkv.nbytes * 4 // 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ROW_OP)
def test_rotary_backward(measure, implementation, dtype, tokens):
    x, table = torch.randn(tokens, HEADS, HEAD_DIM).to(dtype), tables(tokens)
    fn = choose(implementation, apply_rotary, plain)
    measure(backward(lambda t: fn(t, *table), x), moved_bytes=2 * x.nbytes)
