"""The rule itself: what it must let pass and what it must catch."""

import pytest
import torch
from accuracy import assert_accurate, rounding_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def example(dtype):
    """Truth, plain PyTorch in float32 and a result rounded once from it, with an outlier column."""
    x = torch.randn(64, 33)
    x[:, 5] *= 1e3
    truth = x.double() / 3
    plain = x * (1 / 3)
    return truth, plain, plain.to(dtype, copy=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_passes(dtype):
    truth, plain, ours = example(dtype)
    assert_accurate(ours, plain, truth, scale=truth.abs())
    assert_accurate(ours, plain.to(dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_element_fails(dtype):
    """A small element beside an outlier is caught too, given the scale of each."""
    truth, plain, ours = example(dtype)
    ours[17, 4] *= 1.02
    with pytest.raises(AssertionError, match=r"error .* at 565"):
        assert_accurate(ours, plain, truth, scale=truth.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", [0.0, float("nan")])
def test_dropped_tail_fails(dtype, left):
    truth, plain, ours = example(dtype)
    ours[:, 32:] = left
    with pytest.raises(AssertionError):
        assert_accurate(ours, plain, truth)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_two_roundings_fail(dtype):
    truth, plain, _ = example(dtype)
    twice = ((plain / 0.7).to(dtype) * 0.7).to(dtype)
    with pytest.raises(AssertionError):
        assert_accurate(twice, plain, truth, scale=truth.abs())


def test_wrong_shape_or_dtype_fails():
    truth, plain, ours = example(torch.bfloat16)
    with pytest.raises(AssertionError, match="shapes"):
        assert_accurate(ours[:-1], plain, truth)
    with pytest.raises(AssertionError, match="but plain PyTorch gives"):
        assert_accurate(ours, plain.half(), truth)
    with pytest.raises(AssertionError, match="truth is"):
        assert_accurate(ours, plain, truth.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_error_is_half_the_distance_to_the_next_number(dtype):
    x = torch.tensor([1.0, 1.5, 2.0, 0.1, 3e4, 1e-7, 0.0]).to(dtype)
    next_number = torch.nextafter(x, torch.full_like(x, float("inf"))).double()
    assert torch.equal(rounding_error(x.double(), dtype), (next_number - x.double()) / 2)
