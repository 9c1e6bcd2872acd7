"""rms_norm, add_rms_norm and their backwards in Triton's interpreter."""

import pytest
import torch
from accuracy import assert_accurate

from neobert_kernels.rms_norm import reference, reference_add, reference_add_bwd, reference_bwd

EPS = 1e-5
# Widths of several chunks and of one, with and without a ragged end; more rows than fit a program
# and a number that leaves programs a part of one; NeoBERT's width.
SHAPES = [(1, 768), (37, 768), (5, 1), (3, 7, 100), (9, 1000), (3, 1536), (2, 4096)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),  # branches in half precision on a float32 residual stream
]


def make(shape, dtype):
    return torch.randn(shape).to(dtype)


def make_stream(shape, dtype, y_dtype):
    """A residual stream, with an outlier channel as in the trained model where y is rounded to
    half precision. In float32 the outlier would hide the errors of all other channels."""
    x = torch.randn(shape)
    if y_dtype == torch.float16:
        x[..., shape[-1] // 3] = 1330.0
    return x.to(dtype)


def double(*tensors):
    return [t if t is None else t.double() for t in tensors]


def assert_all_accurate(names, ours, plain, truth):
    for name, *tensors in zip(names, ours, plain, truth, strict=True):
        if tensors[0].dtype == torch.float32:
            # A row of y has the error of one rstd, and plain PyTorch's is now and then zero by
            # luck: its largest over all rows is the yardstick.
            tensors = [tensor.flatten() for tensor in tensors]
        assert_accurate(*tensors, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(kernels, shape, dtype):
    x, weight = make_stream(shape, dtype, dtype), torch.randn(shape[-1])
    ours, plain = kernels.rms_norm(x, weight, EPS), reference(x, weight, EPS)
    truth = reference(*double(x, weight), EPS)
    assert_all_accurate(("y", "rstd"), ours, plain, truth)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(kernels, shape, dtypes):
    x, weight = make(shape, dtypes[0]), torch.randn(shape[-1])
    residual = make_stream(shape, dtypes[1], dtypes[0])
    ours = kernels.add_rms_norm(x, residual, weight, EPS)
    plain = reference_add(x, residual, weight, EPS)
    assert torch.equal(ours[1], plain[1]), "the sum is one rounding"
    # The norm is that of the rounded sum.
    truth = reference(*double(plain[1], weight), EPS)
    assert_all_accurate(("y", "rstd"), ours[::2], plain[::2], truth)


@pytest.mark.parametrize("with_dtotal", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_bwd(kernels, shape, dtypes, with_dtotal):
    x, weight, dy = make(shape, dtypes[1]), torch.randn(shape[-1]), make(shape, dtypes[0])
    dtotal = make(shape, dtypes[1]) if with_dtotal else None
    rstd, rstd64 = reference(x, weight, EPS)[1], reference(*double(x, weight), EPS)[1]
    ours = kernels.rms_norm_bwd(dy, dtotal, x, weight, rstd)
    plain = reference_bwd(dy, dtotal, x, weight, rstd)
    truth = reference_bwd(*double(dy, dtotal, x, weight), rstd64)
    assert_all_accurate(("dx", "dweight"), ours, plain, truth)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_bwd(kernels, shape, dtypes):
    total, dtotal, weight = make(shape, dtypes[1]), make(shape, dtypes[1]), torch.randn(shape[-1])
    dy = make(shape, dtypes[0])
    rstd, rstd64 = reference(total, weight, EPS)[1], reference(*double(total, weight), EPS)[1]
    ours = kernels.add_rms_norm_bwd(dy, dtotal, total, weight, rstd)
    plain = reference_add_bwd(dy, dtotal, total, weight, rstd)
    truth = reference_add_bwd(*double(dy, dtotal, total, weight), rstd64)
    assert_all_accurate(("dx", "dresidual", "dweight"), ours, plain, truth)


def test_strided_input(kernels):
    x, weight = torch.randn(6, 2, 96)[:, 1], torch.randn(96)
    assert torch.equal(
        kernels.rms_norm(x, weight, EPS)[0], kernels.rms_norm(x.contiguous(), weight, EPS)[0]
    )
    dy = torch.randn(96).expand(6, 96)
    rstd = reference(x, weight, EPS)[1]
    for ours, contiguous in zip(
        kernels.rms_norm_bwd(dy, None, x, weight, rstd),
        kernels.rms_norm_bwd(dy.contiguous(), None, x.contiguous(), weight, rstd),
        strict=True,
    ):
        assert torch.equal(ours, contiguous)


@pytest.mark.parametrize("shape", [(0, 96), (0, 3, 96)], ids=str)
def test_no_rows(kernels, shape):
    x, weight = torch.randn(shape), torch.randn(96)
    y, total, rstd = kernels.add_rms_norm(x, x, weight, EPS)
    assert y.shape == total.shape == shape and rstd.shape == shape[:-1]
    dx, dweight = kernels.rms_norm_bwd(x, None, x, weight, rstd)
    assert dx.shape == shape and torch.equal(dweight, torch.zeros(96))


def test_rows_do_not_depend_on_the_batch(kernels):
    x, weight = torch.randn(11, 96), torch.randn(96)
    together = kernels.rms_norm(x, weight, EPS)[0]
    alone = torch.cat([kernels.rms_norm(row[None], weight, EPS)[0] for row in x])
    assert torch.equal(together, alone)


def test_errors(kernels):
    x = torch.randn(2, 96)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        kernels.rms_norm(x.double(), torch.randn(96), EPS)
    with pytest.raises(ValueError, match="a dim of up to 4096, got 5000"):
        kernels.rms_norm(torch.randn(1, 5000), torch.randn(5000), EPS)
