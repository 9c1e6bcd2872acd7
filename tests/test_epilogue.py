"""The epilogue ops: what they compute, against the ops that they replace, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate

from neobert_kernels import (
    apply_rotary_qkv_,
    linear_add,
    rms_linear_rotary,
    rms_linear_swiglu,
    rms_norm,
    sum_of_squares,
    swiglu,
)
from neobert_kernels.epilogue import BLOCK, fold_gain, interleave_gate_up

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, DIM, HEADS, HEAD_DIM, WIDTH = 129, 320, 2, 64, 200
pytestmark = pytest.mark.usefixtures("one_thread")


def make(dtype, stream=None):
    """x with the outlier of a trained model, a gain that is small there, weights of qkv and w12."""
    x, gain = torch.randn(TOKENS, DIM), torch.exp(0.5 * torch.randn(DIM))
    x[:, 100], gain[100] = 1330.0, 0.02
    qkv, w12 = (torch.randn(n, DIM) * DIM**-0.5 for n in (HEADS * 3 * HEAD_DIM, 2 * WIDTH))
    return x.to(stream or dtype), *(t.to(dtype) for t in (gain, qkv, w12))


def table():
    angles = torch.outer(torch.arange(64.0), 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    return angles.cos(), angles.sin(), torch.arange(TOKENS) % 50


def unfused(x, gain, qkv, w12, cos, sin, positions, dtype):
    """Norm, GEMM, rotation or SwiGLU one after the other, each rounded to dtype."""
    x, gain, qkv, w12 = (t.to(dtype) for t in (x, gain, qkv, w12))
    wide = torch.promote_types(dtype, torch.float32)
    y = F.rms_norm(x.to(wide), (DIM,), gain.to(wide), 1e-5).to(dtype)
    q, k, v = F.linear(y, qkv).view(TOKENS, HEADS, 3, HEAD_DIM).to(wide).unbind(2)
    cos, sin = (t[positions].to(wide).unsqueeze(1) for t in (cos, sin))

    def rotate(x):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    gate, up = F.linear(y, w12).to(wide).chunk(2, -1)
    return torch.stack([rotate(q), rotate(k), v], 2).to(dtype), (F.silu(gate) * up).to(dtype)


@pytest.mark.parametrize("stream", ["of the weights' dtype", "of float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_folded_gain_errs_no_further_than_a_norm(dtype, stream):
    """At most twice as far as norm, GEMM and rotation or SwiGLU in the same dtype."""
    x, gain, qkv, w12 = make(dtype, None if stream.startswith("of the") else torch.float32)
    squares = sum_of_squares(x)
    fused = (
        rms_linear_rotary(x, squares, fold_gain(qkv, gain), *table()),
        rms_linear_swiglu(x, squares, interleave_gate_up(fold_gain(w12, gain))),
    )
    plain = unfused(x, gain, qkv, w12, *table(), dtype)
    truth = unfused(x, gain, qkv, w12, *table(), torch.float64)
    for what, *tensors in zip(("qkv", "y"), fused, plain, truth, strict=True):
        assert tensors[0].dtype == dtype and tensors[0].shape == tensors[1].shape
        assert_accurate(*(t.flatten() for t in tensors), what)


def test_the_ops_that_they_replace():
    """In float32, all of a block's first half by this package's other ops."""
    x, gain, qkv, w12 = make(torch.float32)
    cos, sin, positions = table()
    y = rms_norm(x, gain)
    expected = apply_rotary_qkv_(
        F.linear(y, qkv).view(TOKENS, HEADS, 3, HEAD_DIM), cos, sin, positions
    )
    squares = sum_of_squares(x)
    actual = rms_linear_rotary(x, squares, fold_gain(qkv, gain), cos, sin, positions)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual = rms_linear_swiglu(x, squares, interleave_gate_up(fold_gain(w12, gain)))
    torch.testing.assert_close(actual, swiglu(F.linear(y, w12)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 129])
def test_linear_add(tokens, dtype, residual_dtype):
    x, weight = torch.randn(tokens, 72).to(dtype), torch.randn(DIM, 72).to(dtype)
    residual = (100 * torch.randn(tokens, DIM)).to(residual_dtype)
    total, squares = linear_add(x, weight, residual)
    plain = F.linear(x.float(), weight.float()) + residual.float()
    truth = F.linear(x.double(), weight.double()) + residual.double()
    assert total.dtype == residual_dtype
    assert_accurate(total, plain, truth)
    assert squares.shape == (tokens, 3)
    blocks = total.double().square().split(BLOCK, 1)
    sums = torch.stack([block.sum(1) for block in blocks], 1)
    torch.testing.assert_close(squares, sums.float())
    assert torch.equal(sum_of_squares(total), squares)


def test_rows_of_gate_and_up_alternate():
    weight = torch.arange(12).view(6, 2)
    assert interleave_gate_up(weight)[:, 0].tolist() == [0, 6, 2, 8, 4, 10]


def test_they_are_for_inference():
    x, weight = torch.randn(3, 128), torch.randn(256, 128, requires_grad=True)
    squares = sum_of_squares(x)
    with pytest.raises(RuntimeError, match=r"rms_linear_swiglu is for inference.*but weight"):
        rms_linear_swiglu(x, squares, weight)
    with pytest.raises(RuntimeError, match=r"linear_add is for inference.*but weight"):
        linear_add(x, weight, torch.randn(3, 256))
    with torch.no_grad():
        assert not rms_linear_swiglu(x, squares, weight).requires_grad


def test_one_graph_with_dynamic_tokens():
    torch._dynamo.reset()
    _, gain, qkv, w12 = make(torch.float32)
    qkv, w12, cos, sin = fold_gain(qkv, gain), interleave_gate_up(w12), *table()[:2]
    wo = torch.randn(DIM, HEADS * HEAD_DIM)

    def layer(x, positions):
        rotated = rms_linear_rotary(x, sum_of_squares(x), qkv, cos, sin, positions)
        return rms_linear_swiglu(*linear_add(rotated[:, :, 2].flatten(1), wo, x), w12)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x, positions = torch.randn(tokens, DIM), torch.arange(tokens)
        torch.testing.assert_close(compiled(x, positions), layer(x, positions))


def test_errors():
    x, _, qkv, w12 = make(torch.bfloat16)
    squares, (cos, sin, positions) = sum_of_squares(x), table()
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        sum_of_squares(x.double())
    with pytest.raises(ValueError, match=r"x must have shape \(tokens, dim\), got \(3,\)"):
        sum_of_squares(torch.randn(3))
    with pytest.raises(ValueError, match=r"agree in in_features, got x \(129, 320\) and.*\(400, 3"):
        rms_linear_swiglu(x, squares, w12[:, :300])
    with pytest.raises(ValueError, match=r"squares must have shape \(129, 3\).*got \(129, 2\)"):
        rms_linear_swiglu(x, squares[:, :2], w12)
    with pytest.raises(TypeError, match="squares must be float32, got"):
        rms_linear_swiglu(x, squares.bfloat16(), w12)
    with pytest.raises(TypeError, match=r"x must be torch\.float16, as weight is, or float32"):
        rms_linear_swiglu(x, squares, w12.half())
    with pytest.raises(ValueError, match=r"must have shape \(2 \* width, 320\).*\(399, 320\)"):
        rms_linear_swiglu(x, squares, w12[:-1])
    with pytest.raises(ValueError, match=r"must have shape \(heads \* 3 .*got \(383, 320\)"):
        rms_linear_rotary(x, squares, qkv[:-1], cos, sin, positions)
    with pytest.raises(ValueError, match=r"positions must have shape \(129,\)"):
        rms_linear_rotary(x, squares, qkv, cos, sin, positions[1:])
    with pytest.raises(IndexError, match=r"positions must lie in \[0, 64\)"):
        rms_linear_rotary(x, squares, qkv, cos, sin, positions + 20)
    with pytest.raises(TypeError, match=r"weight is torch\.float16 but x is torch\.bfloat16"):
        linear_add(x, w12.half(), x)
    with pytest.raises(ValueError, match=r"residual must have.*\(129, 400\).*got \(129, 320\)"):
        linear_add(x, w12, x)
    with pytest.raises(ValueError, match="residual is on meta but x is on cpu"):
        linear_add(x, w12, torch.empty(129, 400, device="meta"))
