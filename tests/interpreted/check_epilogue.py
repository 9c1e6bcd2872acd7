"""The epilogue GEMMs in Triton's interpreter: by pointers, as on Ampere, and by tensor descriptors,
as on Hopper and Blackwell."""

import pytest
import torch
from accuracy import assert_accurate

from neobert_kernels.epilogue import (
    BLOCK,
    reference_rotary,
    reference_squares,
    reference_swiglu,
    reference_swiglu_keep,
)

EPS = 1e-5
# The dtype of x, or of the residual stream, and that of the weights.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float16),
]


@pytest.fixture(params=[80, 90], ids=["pointers", "descriptors"])
def arch(request, kernels, monkeypatch):
    """Whose tiles the launchers take."""
    monkeypatch.setattr(kernels, "architecture", lambda x: request.param)
    return request.param


def make(shape, dtype):
    """(tokens, out_features, in_features) to an x with two outlier channels, as the trained model's
    residual stream has, its squares, and a weight."""
    tokens, out_features, in_features = shape
    x = torch.randn(tokens, in_features)
    x[:, in_features // 3], x[:, -1] = 1330.0, -200.0
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    x, weight = x.to(dtype[0]), weight.to(dtype[1])
    return x, reference_squares(x), weight


def assert_rounded_once(ours, plain, truth, terms, what):
    """Against plain PyTorch in float32: the bits it would round, rounded once. A yardstick for the
    whole, relative to the size of each element's terms, as a row's errors share one rstd."""
    assert_accurate(*(t.flatten() for t in (ours, plain, truth)), what, terms.flatten())


def float32_of(reference, x, squares, weight, *table):
    """plain PyTorch's and the true result before it is rounded to the weight's dtype, and the sum
    of the absolute values of the terms of each element of the product."""
    x = x.to(weight.dtype)
    plain = reference(x.float(), squares, weight.float(), EPS, *table)
    wide = [t.double() if t.is_floating_point() else t for t in table]
    truth = reference(x.double(), squares.double(), weight.double(), EPS, *wide)
    rstd = torch.rsqrt(squares.double().sum(1, keepdim=True) / x.shape[1] + EPS)
    return plain, truth, (x.double().abs() @ weight.double().abs().t()) * rstd


# Ragged in every dimension: tokens of one tile and of several, columns beyond the last tile, k
# beyond the last step; a width of one block of squares, of a part of one, and of several.
SWIGLU = [(1, 512, 768), (131, 192, 128), (129, 544, 200), (300, 64, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SWIGLU, ids=str)
def test_rms_linear_swiglu(kernels, arch, shape, dtype):
    x, squares, weight = make(shape, dtype)
    ours = kernels.rms_linear_swiglu(x, squares, weight, EPS)
    assert ours.dtype == dtype[1] and ours.shape == (shape[0], shape[1] // 2)
    plain, truth, terms = float32_of(reference_swiglu, x, squares, weight)
    gate, up = terms.unflatten(1, (-1, 2)).unbind(2)
    # An error in gate is multiplied by up, and one in up by gate.
    assert_rounded_once(ours, plain, truth, gate * up, f"y of {shape}")


def gate_up_reference(x, squares, weight, eps):
    return reference_swiglu_keep(x, squares, weight, eps)[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SWIGLU, ids=str)
def test_rms_linear_swiglu_keep(kernels, arch, shape, dtype):
    """y has the bits of inference; what is kept is the product, gate's columns before up's."""
    x, squares, weight = make(shape, dtype)
    y, gate_up = kernels.rms_linear_swiglu_keep(x, squares, weight, EPS)
    assert torch.equal(y, kernels.rms_linear_swiglu(x, squares, weight, EPS))
    assert gate_up.dtype == dtype[1] and gate_up.shape == shape[:2] and gate_up.is_contiguous()
    plain, truth, terms = float32_of(gate_up_reference, x, squares, weight)
    terms = torch.cat([terms[:, ::2], terms[:, 1::2]], 1)
    assert_rounded_once(gate_up, plain, truth, terms, f"gate_up of {shape}")


# (tokens, heads, head_dim, in_features): tiles that hold whole heads and that cut through them.
ROTARY = [(1, 12, 64, 768), (131, 1, 64, 128), (129, 3, 128, 200), (300, 2, 64, 64)]


def table(head_dim, tokens, restart):
    angles = torch.outer(
        torch.arange(300, dtype=torch.float64),
        10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim),
    )
    positions = torch.arange(tokens) % restart
    return angles.cos().float(), angles.sin().float(), positions


def rotary_reference(x, squares, weight, eps, cos, sin, positions):
    return reference_rotary(x, squares, weight, cos, sin, positions, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROTARY, ids=str)
def test_rms_linear_rotary(kernels, arch, shape, dtype):
    tokens, heads, head_dim, in_features = shape
    x, squares, weight = make((tokens, heads * 3 * head_dim, in_features), dtype)
    cos, sin, positions = table(head_dim, tokens, 77)
    ours = kernels.rms_linear_rotary(x, squares, weight, cos, sin, positions, EPS)
    assert ours.dtype == dtype[1] and ours.shape == (tokens, heads, 3, head_dim)
    plain, truth, terms = float32_of(rotary_reference, x, squares, weight, cos, sin, positions)
    pairs = terms.view(tokens, heads, 3, -1, 2).sum(-1, keepdim=True).expand(-1, -1, -1, -1, 2)
    assert_rounded_once(ours, plain, truth, pairs.flatten(3), f"qkv of {shape}")


# As for swiglu; in_features need not be a multiple of anything but 8.
ADD = [(1, 768, 512), (131, 128, 192), (129, 200, 72), (300, 100, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ADD, ids=str)
def test_linear_add(kernels, arch, shape, dtype):
    tokens, out_features, _ = shape
    x, _, weight = make(shape, (dtype[1], dtype[1]))
    residual = torch.randn(tokens, out_features)
    residual[:, out_features // 3] = 1330.0
    residual = residual.to(dtype[0])
    total, squares = kernels.linear_add(x, weight, residual)
    assert total.dtype == dtype[0]
    plain = x.float() @ weight.float().t() + residual.float()
    product = x.double() @ weight.double().t()
    terms = x.double().abs() @ weight.double().abs().t() + residual.double().abs()
    assert_rounded_once(total, plain, product + residual.double(), terms, f"total of {shape}")
    assert_sums(squares, total)


def assert_sums(squares, total):
    """The squares are those of what is stored, not of what was rounded to it."""
    plain, truth = reference_squares(total), reference_squares(total.double())
    assert squares.dtype == torch.float32
    assert_accurate(squares.flatten(), plain.flatten(), truth.flatten(), "squares", truth.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 768), (37, 200), (16, 128), (5, 1)], ids=str)
def test_sum_of_squares(kernels, shape, dtype):
    x = torch.randn(shape).to(dtype)
    squares = kernels.sum_of_squares(x)
    assert squares.shape == (shape[0], -(-shape[1] // BLOCK))
    assert_sums(squares, x)


def test_outliers_do_not_overflow(kernels, arch):
    """x @ weight.T alone is beyond float16."""
    x = torch.full((3, 128), 30000.0, dtype=torch.float16)
    weight = torch.ones(384, 128, dtype=torch.float16)
    squares = reference_squares(x)
    cos, sin = torch.ones(1, 32), torch.zeros(1, 32)
    positions = torch.zeros(3, dtype=torch.int64)
    qkv = kernels.rms_linear_rotary(x, squares, weight, cos, sin, positions, EPS)
    assert (qkv == 128).all()
    y = kernels.rms_linear_swiglu(x, squares, weight, EPS)
    assert (y == 128 * 128).all()


def test_zeros(kernels, arch):
    """A row of zeros is divided by sqrt(eps), and stays one."""
    x = torch.zeros(3, 128, dtype=torch.float16)
    weight = torch.ones(384, 128, dtype=torch.float16)
    y = kernels.rms_linear_swiglu(x, reference_squares(x), weight, EPS)
    assert (y == 0).all()


def test_rows_do_not_depend_on_the_batch(kernels, arch):
    """Alone, among others, in another order: the same bits. Of small integers, whose products are
    exact in any order: the interpreter's own product rounds by a row's place in its tile."""
    x, weight = torch.randint(-4, 5, (140, 128)).half(), torch.randint(-4, 5, (384, 128)).half()
    residual, squares = torch.randint(-9, 9, (140, 384)).half(), reference_squares(x)
    cos, sin, positions = table(64, 140, 77)

    def run(rows):
        table_of_rows = (cos, sin, positions[rows].contiguous())
        total, sums = kernels.linear_add(x[rows], weight, residual[rows])
        y, gate_up = kernels.rms_linear_swiglu_keep(x[rows], squares[rows], weight, EPS)
        qkv = kernels.rms_linear_rotary(x[rows], squares[rows], weight, *table_of_rows, EPS)
        return total, sums, y, gate_up, qkv

    together = run(torch.arange(140))
    for rows in (torch.tensor([139]), torch.randperm(140), torch.arange(3, 70)):
        for alone, all_rows in zip(run(rows), together, strict=True):
            assert torch.equal(alone, all_rows[rows])


def test_no_tokens(kernels, arch):
    x, squares, weight = make((0, 384, 128), (torch.float16, torch.float16))
    cos, sin, positions = table(64, 0, 77)
    assert kernels.sum_of_squares(x).shape == (0, 1)
    assert kernels.rms_linear_swiglu(x, squares, weight, EPS).shape == (0, 192)
    y, gate_up = kernels.rms_linear_swiglu_keep(x, squares, weight, EPS)
    assert y.shape == (0, 192) and gate_up.shape == (0, 384)
    qkv = kernels.rms_linear_rotary(x, squares, weight, cos, sin, positions, EPS)
    assert qkv.shape == (0, 2, 3, 64)
    total, squares = kernels.linear_add(x, weight, x.new_empty(0, 384))
    assert total.shape == (0, 384) and squares.shape == (0, 3)


def test_errors(kernels, arch, monkeypatch):
    x, squares, weight = make((2, 288, 128), (torch.float16, torch.float16))
    cos, sin, positions = table(48, 2, 77)
    with pytest.raises(ValueError, match="serves a head_dim of 64 or 128, got 48"):
        kernels.rms_linear_rotary(x, squares, weight, cos, sin, positions, EPS)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        kernels.sum_of_squares(x.double())
    if arch == 90:
        odd = torch.randn(2, 129, dtype=torch.float16)[:, :127]
        with pytest.raises(ValueError, match=r"x must begin at a multiple of 16 bytes.*\(2, 127\)"):
            kernels.rms_linear_swiglu(odd, squares, torch.randn(4, 127).half(), EPS)
