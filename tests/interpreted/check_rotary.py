"""rotary and rotary_qkv_, forward and inverse, in Triton's interpreter."""

import pytest
import torch
from accuracy import assert_accurate

from neobert_kernels.rotary import reference, reference_qkv_

# (tokens, heads, head_dim); heads that fill a tile, that do not, and an odd number.
SHAPES = [(1, 12, 64), (37, 12, 64), (9, 3, 128), (33, 8, 16), (130, 1, 64)]


def table(head_dim, max_position=300):
    angles = torch.outer(
        torch.arange(max_position, dtype=torch.float64),
        10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim),
    )
    return angles.cos().float(), angles.sin().float()


def restarting_positions(tokens):
    return torch.cat([torch.arange(tokens // 3), torch.arange(tokens - tokens // 3)])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary(kernels, shape, dtype, inverse):
    tokens, heads, head_dim = shape
    x = torch.randn(tokens, heads, 3, head_dim).to(dtype)[:, :, 1]  # a view, as the model has it
    cos, sin = table(head_dim)
    positions = restarting_positions(tokens)
    ours = kernels.rotary(x, cos, sin, positions, inverse)
    plain = reference(x, cos, sin, positions, inverse)
    truth = reference(x.double(), cos.double(), sin.double(), positions, inverse)
    assert ours.is_contiguous()
    assert_accurate(ours, plain, truth)
    int32 = kernels.rotary(x, cos, sin, positions.int(), inverse)
    assert torch.equal(int32, ours)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_qkv_(kernels, shape, dtype, inverse):
    tokens, heads, head_dim = shape
    qkv = torch.randn(tokens, heads, 3, head_dim).to(dtype)
    cos, sin = table(head_dim)
    positions = restarting_positions(tokens)
    ours, plain, truth = qkv.clone(), qkv.clone(), qkv.double()
    kernels.rotary_qkv_(ours, cos, sin, positions, inverse)
    reference_qkv_(plain, cos, sin, positions, inverse)
    reference_qkv_(truth, cos.double(), sin.double(), positions, inverse)
    assert_accurate(ours, plain, truth)
    assert torch.equal(ours[:, :, 2], qkv[:, :, 2]), "v is not rotated"


def test_no_tokens(kernels):
    cos, sin = table(64)
    x, positions = torch.randn(0, 12, 64), torch.empty(0, dtype=torch.int64)
    assert kernels.rotary(x, cos, sin, positions, False).shape == (0, 12, 64)


def test_errors(kernels):
    cos, sin = table(48)
    positions = torch.arange(2)
    with pytest.raises(ValueError, match="head_dim that is a power of two from 8 on, got 48"):
        kernels.rotary(torch.randn(2, 3, 48), cos, sin, positions, False)
    with pytest.raises(ValueError, match="contiguous last axis"):
        kernels.rotary(torch.randn(2, 48, 3).transpose(1, 2), cos, sin, positions, False)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        kernels.rotary(torch.randn(2, 3, 48).double(), cos, sin, positions, False)
