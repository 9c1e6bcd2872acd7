"""rotary_attention_: the bits of its two ops, their gradients, and no copies beside them."""

import pytest
import torch
from sequences import EDGES, offsets

from neobert.breakdown.work import WorkCounter
from neobert_kernels import apply_rotary_qkv_, linear, rotary_attention_, varlen_attention_qkv

HEADS, HEAD_DIM = 3, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments(lengths: list[int], beyond: int = 2):
    tokens = sum(lengths) + beyond
    angles = torch.rand(600, HEAD_DIM // 2) * 6
    positions = torch.randint(600, (tokens,))
    return angles.cos(), angles.sin(), positions, offsets(lengths), max(lengths, default=0)


def apart(projection, heads, cos, sin, positions, cu_seqlens, max_seqlen, scale=None):
    """The same by the ops that have tests of their own against float64."""
    qkv = projection.view(projection.shape[0], heads, 3, HEAD_DIM)
    qkv = apply_rotary_qkv_(qkv, cos, sin, positions)
    return varlen_attention_qkv(qkv, cu_seqlens, max_seqlen, scale)


def made(lengths: list[int], dtype: torch.dtype, beyond: int = 2):
    tokens = sum(lengths) + beyond
    leaf = torch.randn(tokens, HEADS * 3 * HEAD_DIM).to(dtype).requires_grad_()
    return leaf, torch.randn(tokens, HEADS, HEAD_DIM).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [EDGES, [1], [0], []], ids=str)
def test_bits_are_those_of_its_ops(lengths, dtype):
    leaf, dout = made(lengths, dtype)
    rest = arguments(lengths)
    with torch.no_grad():
        alone = rotary_attention_(leaf.clone(), HEADS, *rest)
    out, expected = rotary_attention_(1 * leaf, HEADS, *rest), apart(1 * leaf, HEADS, *rest)
    assert torch.equal(out, expected) and torch.equal(alone, expected)
    (ours,), (theirs,) = (torch.autograd.grad(each, leaf, dout) for each in (out, expected))
    assert torch.equal(ours, theirs)
    assert ours.dtype == dtype
    scaled = rotary_attention_(1 * leaf, HEADS, *rest, -0.3)
    assert torch.equal(scaled, apart(1 * leaf, HEADS, *rest, -0.3))
    assert not torch.equal(scaled, out) or max(lengths, default=0) < 2


def test_no_pass_over_the_gradient_but_its_ops():
    leaf, dout = made([40, 9], torch.float32)
    weight = torch.randn(leaf.shape[1], leaf.shape[1]).requires_grad_()
    out = rotary_attention_(linear(leaf, weight), HEADS, *arguments([40, 9]))
    with WorkCounter() as counter:
        out.backward(dout)
    calls = {name: work.calls for name, work in counter.ops.items()}
    assert calls == {
        "neobert::varlen_attention_bwd": 1,
        "neobert::rotary_qkv_": 1,
        "neobert::linear": 2,
        # The caller's leaves keep their gradients: while ops are counted autograd copies those.
        **({"aten::clone": calls["aten::clone"]} if "aten::clone" in calls else {}),
    }


def test_the_rotated_projection_may_be_used_too():
    leaf, dout = made([20, 5], torch.float32)
    rest = arguments([20, 5])
    cos, sin, positions = rest[:3]
    results = []
    for function in (rotary_attention_, None):
        projection = 1 * leaf
        if function is not None:
            out = rotary_attention_(projection, HEADS, *rest)
        else:
            qkv = projection.view(-1, HEADS, 3, HEAD_DIM)
            projection = apply_rotary_qkv_(qkv, cos, sin, positions)
            out = varlen_attention_qkv(projection, *rest[3:])
        both = (out * dout).sum() + projection.square().sum()
        results.append(torch.autograd.grad(both, leaf, retain_graph=True)[0])
        results.append(torch.autograd.grad(projection.square().sum(), leaf)[0])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


def test_overwriting_is_known_to_autograd():
    leaf, _ = made([6], torch.float32)
    projection = torch.tanh(leaf)  # whose backward needs its output
    out = rotary_attention_(projection, HEADS, *arguments([6]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        rotary_attention_(leaf, HEADS, *arguments([6]))


def test_errors():
    cos, sin, positions, cu_seqlens, longest = arguments([10], beyond=0)
    rest = (cos, sin, positions, cu_seqlens, longest)
    good = torch.randn(10, HEADS * 3 * HEAD_DIM)
    assert rotary_attention_(good.clone(), HEADS, *rest).shape == (10, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"projection must have shape .* got \(10, 143\)"):
        rotary_attention_(good[:, 1:], HEADS, *rest)
    with pytest.raises(ValueError, match="heads 0"):
        rotary_attention_(good, 0, *rest)
    with pytest.raises(ValueError, match="projection must be contiguous"):
        rotary_attention_(torch.randn(144, 10).t(), HEADS, *rest)
    with pytest.raises(TypeError, match="projection must be float32, bfloat16 or float16"):
        rotary_attention_(good.double(), HEADS, *rest)
    with pytest.raises(ValueError, match=r"positions must have shape \(10,\)"):
        rotary_attention_(good, HEADS, cos, sin, positions[1:], cu_seqlens, longest)
    with pytest.raises(TypeError, match="max_seqlen must be a Python int"):
        rotary_attention_(good, HEADS, cos, sin, positions, cu_seqlens, torch.tensor(10))
