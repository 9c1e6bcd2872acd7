"""batch_invariant_linear in Triton's interpreter."""

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from sequences import far_apart
from torch import Tensor

from neobert_kernels.linear import reference

DTYPES = [torch.float32, torch.float16]
# (rows, out_features, in_features): edges of tiles in each, more row tiles than a group has.
SHAPES = [(1, 1, 1), (129, 40, 100), (63, 129, 65), (20, 128, 192), (1100, 136, 8)]


def operands(rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(rows, depth), torch.randn(columns, depth) * depth**-0.5
    return x.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(kernels, shape, dtype):
    x, weight = operands(*shape, dtype)
    truth, plain = x.double() @ weight.double().t(), x @ weight.t()
    ours = kernels.batch_invariant_linear(x, weight, None)
    assert ours.dtype == dtype
    assert_accurate(ours.flatten(), plain.flatten(), truth.flatten(), "y")
    for residual_dtype in DTYPES:
        residual = torch.randn(shape[:2]).to(residual_dtype)
        ours = kernels.batch_invariant_linear(x, weight, residual)
        plain, wide = reference(x, weight, residual), truth + residual.double()
        assert ours.dtype == residual_dtype
        assert_accurate(ours.flatten(), plain.flatten(), wide.flatten(), f"+ {residual_dtype}")


def product_in_order(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """np.matmul as a GPU does it: every row of a tile alike. NumPy's BLAS does not."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        total += a[:, k, None].astype(dtype) * b[k].astype(dtype)
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_are_its_own(kernels, dtype, monkeypatch):
    """Whatever rows there are beside it, however many, wherever it lies."""
    monkeypatch.setattr(np, "matmul", product_in_order)
    x, weight = operands(300, 72, 200, dtype)
    residual = torch.randn(300, 72)
    together = kernels.batch_invariant_linear(x, weight, residual)
    for start, count in ((0, 1), (299, 1), (17, 40), (100, 129), (1, 128), (171, 129), (64, 200)):
        at = slice(start, start + count)
        assert torch.equal(
            kernels.batch_invariant_linear(x[at], weight, residual[at]), together[at]
        ), f"rows {start} to {start + count}"
    order = torch.randperm(300)
    shuffled = kernels.batch_invariant_linear(x[order], weight, residual[order])
    assert torch.equal(shuffled, together[order])
    x[7] = torch.nan  # and no row reaches another
    again = kernels.batch_invariant_linear(x, weight, residual)
    assert torch.equal(again[torch.arange(300) != 7], together[torch.arange(300) != 7])


def test_strided_operands(kernels):
    x, weight = torch.randn(9, 3, 40)[:, 1], torch.randn(40, 30).t()
    residual = torch.randn(9, 60)[:, 11:41]
    ours = kernels.batch_invariant_linear(x, weight, residual)
    dense = (t.contiguous() for t in (x, weight, residual))
    assert torch.equal(ours, kernels.batch_invariant_linear(*dense))
    ours = kernels.batch_invariant_linear(x.t().contiguous().t(), weight, residual.t().clone().t())
    assert torch.equal(ours, kernels.batch_invariant_linear(x, weight, residual))


def test_nothing_to_compute(kernels):
    assert kernels.batch_invariant_linear(torch.randn(0, 8), torch.randn(5, 8), None).shape == (
        0,
        5,
    )
    empty_sums = kernels.batch_invariant_linear(torch.randn(3, 0), torch.randn(5, 0), None)
    assert torch.equal(empty_sums, torch.zeros(3, 5))


def test_errors(kernels):
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        kernels.batch_invariant_linear(x.double(), weight.double(), None)
    with pytest.raises(TypeError, match="weight"):
        kernels.batch_invariant_linear(x, weight.half(), None)


@pytest.mark.parametrize("far", ["x", "residual"])
def test_rows_more_than_two_to_the_31_elements_apart(kernels, far):
    x, weight = torch.randn(140, 1, 16), torch.randn(24, 16)
    residual = torch.randn(140, 1, 24)
    expected = kernels.batch_invariant_linear(x[:, 0], weight, residual[:, 0])
    if far == "x":
        x = far_apart(x, 2**24)
    else:
        residual = far_apart(residual, 2**24)
    ours = kernels.batch_invariant_linear(x[:, 0], weight, residual[:, 0])
    assert torch.equal(ours, expected)
