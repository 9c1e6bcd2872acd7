"""Rotary embedding: values, layout, the packed in-place form, errors that leave no trace."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_accurate
from isa import OLDER, run_on

from neobert_kernels import apply_rotary, apply_rotary_qkv_

module = importlib.import_module("neobert_kernels.rotary")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 12, 64), (0, 3, 64), (5, 1, 2), (7, 3, 6), (9, 2, 34), (33, 4, 128), (130, 12, 64)]
MAX_POSITION = 300


def table(head_dim, max_position=MAX_POSITION):
    inverse_frequency = 10000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.outer(torch.arange(max_position).double(), inverse_frequency)
    return angles.cos().float(), angles.sin().float()


def plain(x, cos, sin, positions, dtype):
    """As the official model does it: a product of complex numbers, the adjacent pairs."""
    x, cos, sin = (t.detach().to(dtype) for t in (x, cos, sin))
    factors = torch.complex(cos[positions], sin[positions]).unsqueeze(1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * factors).flatten(-2)


def scale_of(x, cos, sin, positions):
    even, odd = x.detach().double().abs().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (t[positions].double().abs().unsqueeze(1) for t in (cos, sin))
    return torch.stack([even * cos + odd * sin, even * sin + odd * cos], -1).flatten(-2)


def assert_rotated(result, x, cos, sin, positions, what):
    group = (
        result.detach(),
        plain(x, cos, sin, positions, torch.float32),
        plain(x, cos, sin, positions, torch.float64),
        scale_of(x, cos, sin, positions),
    )
    result, yardstick, truth, scale = (t.flatten() for t in group)
    assert_accurate(result, yardstick, truth, what, scale)


def check_accuracy():
    for dtype in DTYPES:
        for tokens, heads, head_dim in SHAPES:
            cos, sin = table(head_dim)
            positions = torch.randint(0, MAX_POSITION, (tokens,))
            packed = torch.randn(tokens, heads, 3, head_dim).to(dtype)
            packed[..., ::5] *= 1330
            for x in (packed[:, :, 1], packed[:, :, 1].contiguous()):
                x = x.detach().requires_grad_()
                dy = torch.randn(tokens, heads, head_dim).to(dtype)
                y = apply_rotary(x, cos, sin, positions)
                assert y.dtype == dtype and y.is_contiguous()
                (dx,) = torch.autograd.grad(y, x, dy)
                what = f"{(tokens, heads, head_dim)}, {dtype}"
                assert_rotated(y, x, cos, sin, positions, f"y of {what}")
                assert_rotated(dx, dy, cos, -sin, positions, f"dx of {what}")
            whole = packed.clone()
            assert apply_rotary_qkv_(whole, cos, sin, positions) is whole
            for part in (0, 1):
                rotated = apply_rotary(packed[:, :, part], cos, sin, positions)
                assert torch.equal(whole[:, :, part], rotated)
            assert torch.equal(whole[:, :, 2], packed[:, :, 2])


def test_accurate():
    check_accuracy()


@pytest.mark.parametrize("isa", OLDER)
def test_accurate_on(isa):
    run_on(isa, check_accuracy)


def test_rotates_adjacent_pairs_not_halves():
    """A quarter turn of the first pair alone. Rotating halves would move x[0] to x[2]."""
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    adjacent = torch.tensor([[[-2.0, 1.0, 3.0, 4.0]]])
    halves = torch.cat(
        [x[..., :2] * cos - x[..., 2:] * sin, x[..., 2:] * cos + x[..., :2] * sin], -1
    )
    position = torch.zeros(1, dtype=torch.long)
    for rotate in (
        apply_rotary,
        lambda *a: module.reference(*a, False),
        lambda x, *a: apply_rotary_qkv_(x.unsqueeze(2).repeat(1, 1, 3, 1), *a)[:, :, 1],
    ):
        assert torch.equal(rotate(x, cos, sin, position), adjacent)
        assert not torch.equal(rotate(x, cos, sin, position), halves)


def test_packed_layout_is_per_head():
    """(heads, 3, head_dim): q and k of every head move, v of every head stays. In the contiguous
    Q|K|V layout it would be the last third of a token that stays."""
    qkv = torch.randn(4, 3, 3, 8)
    cos, sin = table(8)
    moved = apply_rotary_qkv_(qkv.clone(), cos, sin, torch.arange(1, 5)) != qkv
    assert moved[:, :, :2].any(-1).all() and not moved[:, :, 2].any()
    assert not torch.equal(moved.flatten(1)[:, :48], torch.ones(4, 48, dtype=torch.bool))
    assert moved.flatten(1)[:, 48:].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_position_dtypes(dtype):
    x, (cos, sin) = torch.randn(6, 2, 8), table(8)
    positions = torch.tensor([0, 1, 2, 0, 299, 5])
    expected = apply_rotary(x, cos, sin, positions)
    assert torch.equal(apply_rotary(x, cos, sin, positions.to(dtype)), expected)
    strided = positions.repeat_interleave(2).to(dtype)[::2]
    assert torch.equal(apply_rotary(x, cos, sin, strided), expected)


def test_packed_gradient_equals_the_separate_one():
    cos, sin = table(16)
    positions = torch.tensor([3, 0, 1, 2, 250])
    leaf = torch.randn(5, 2, 3, 16, requires_grad=True)
    dout = torch.randn(5, 2, 3, 16)
    out = apply_rotary_qkv_(leaf * 1, cos, sin, positions)
    (packed,) = torch.autograd.grad(out, leaf, dout, retain_graph=True)
    (again,) = torch.autograd.grad(out, leaf, dout)
    q, k, v = leaf.unbind(2)
    q, k = (apply_rotary(t, cos, sin, positions) for t in (q, k))
    (separate,) = torch.autograd.grad(torch.stack([q, k, v], 2), leaf, dout)
    assert torch.equal(packed, separate) and torch.equal(again, packed)


def test_gradient_of_a_broadcast_output():
    """sum().backward() hands over a gradient whose strides are all zero."""
    x, (cos, sin) = torch.randn(3, 2, 8, requires_grad=True), table(8)
    apply_rotary(x, cos, sin, torch.arange(3)).sum().backward()
    assert_rotated(x.grad, torch.ones(3, 2, 8), cos, -sin, torch.arange(3), "dx")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_batch_nor_threads(dtype):
    """12,000 tokens: past the sizes at which threads and streaming stores come in."""
    x, (cos, sin) = torch.randn(12000, 12, 64).to(dtype), table(64)
    positions = torch.arange(12000) % MAX_POSITION
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(apply_rotary(x, cos, sin, positions))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    few = apply_rotary(x[500:503], cos, sin, positions[500:503])
    assert torch.equal(few, results[0][500:503])


@pytest.mark.parametrize("bad", [MAX_POSITION, -1, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_position_outside_the_table(bad, dtype):
    cos, sin = table(8)
    positions = torch.arange(5, dtype=dtype)
    positions[3] = bad
    message = rf"positions must lie in \[0, {MAX_POSITION}\).*got.* {bad} "
    with pytest.raises(IndexError, match=rf"apply_rotary: {message}.*token 3"):
        apply_rotary(torch.randn(5, 2, 8), cos, sin, positions)
    qkv = torch.randn(5, 2, 3, 8)
    before = qkv.clone()
    with pytest.raises(IndexError, match=rf"apply_rotary_qkv_: {message}.*token 3"):
        apply_rotary_qkv_(qkv, cos, sin, positions)
    assert torch.equal(qkv, before)
    with pytest.raises(IndexError, match=r"positions must lie in \[0, 300\)"):
        module.reference(torch.randn(5, 2, 8), cos, sin, positions, False)


def test_bad_input():
    x, (cos, sin), positions = torch.randn(3, 2, 8), table(8), torch.arange(3)
    with pytest.raises(TypeError, match=r"x must be float32.*got torch.float64"):
        apply_rotary(x.double(), cos, sin, positions)
    with pytest.raises(ValueError, match=r"x must have shape \(tokens, heads, head_dim\).*\(3, 16"):
        apply_rotary(x.flatten(1), *table(16), positions)
    with pytest.raises(ValueError, match=r"even, contiguous head_dim.*\(3, 2, 7\)"):
        apply_rotary(x[..., :7], cos, sin, positions)
    with pytest.raises(ValueError, match=r"even, contiguous head_dim.*strides \(16, 1, 2\)"):
        apply_rotary(torch.randn(3, 8, 2).transpose(1, 2), cos, sin, positions)
    with pytest.raises(TypeError, match=r"cos must be float32, got torch.bfloat16"):
        apply_rotary(x, cos.bfloat16(), sin, positions)
    with pytest.raises(
        ValueError, match=r"cos must have shape \(max_position, 4\).*got \(300, 3\)"
    ):
        apply_rotary(x, cos[:, :3], sin, positions)
    with pytest.raises(ValueError, match=r"sin must have shape.*cos \(300, 4\), got \(299, 4\)"):
        apply_rotary(x, cos, sin[1:], positions)
    with pytest.raises(TypeError, match=r"positions must be int64 or int32, got torch.float32"):
        apply_rotary(x, cos, sin, positions.float())
    with pytest.raises(ValueError, match=r"positions must have shape \(3,\).*got \(2,\)"):
        apply_rotary(x, cos, sin, positions[:2])
    with pytest.raises(ValueError, match="cos is on meta but x is on cpu"):
        apply_rotary(x, cos.to("meta"), sin, positions)
    with pytest.raises(ValueError, match=r"qkv must be contiguous with shape.*got shape \(3, 2, 2"):
        apply_rotary_qkv_(torch.randn(3, 2, 2, 8), cos, sin, positions)
    with pytest.raises(ValueError, match="qkv must be contiguous"):
        apply_rotary_qkv_(torch.randn(3, 4, 3, 8)[:, ::2], cos, sin, positions)
    leaf = torch.randn(3, 2, 3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        apply_rotary_qkv_(leaf, cos, sin, positions)


def test_reference_in_float64(monkeypatch):
    monkeypatch.setattr(
        module,
        "ops",
        SimpleNamespace(rotary=module.reference, rotary_qkv_=module.reference_qkv_),
    )
    cos, sin = (t.double() for t in table(6))
    positions = torch.tensor([4, 0, 299])
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    qkv = torch.randn(3, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module._Rotary.apply(x, cos, sin, positions), x)
    assert torch.autograd.gradcheck(
        lambda x: module._RotaryQKV.apply(x * 1, cos, sin, positions), qkv
    )
