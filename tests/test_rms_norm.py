"""RMSNorm, alone and after a residual add: values, gradients, invariances, errors."""

import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_accurate
from isa import OLDER, run_on

from neobert_kernels import add_rms_norm, rms_norm

module = importlib.import_module("neobert_kernels.rms_norm")  # the package's name is the function's
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 768), (0, 768), (4, 1), (5, 7), (2, 3, 17), (130, 768), (33, 769), (257, 16)]
EPS = 1e-5


def norm(x, weight):
    """Zhang & Sennrich's formula in the dtype of x."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def plain(x, weight, dy, dtotal, dtype):
    """y, dx and dweight by autograd in `dtype`; dtotal is another gradient that reaches x."""
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    y = norm(x, weight)
    grads = torch.autograd.grad([y, x * 1], [x, weight], [dy.to(dtype), dtotal.to(dtype)])
    return y.detach(), *grads


def scales(x, weight, dy, dtotal):
    """The sums of absolute terms behind y, dx and dweight, float64."""
    x, weight, dy, dtotal = (t.double() for t in (x, weight, dy, dtotal))
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    x_hat, g = (x * rstd).abs(), (dy * weight).abs()
    dx = rstd * (g + x_hat * (g * x_hat).mean(-1, keepdim=True)) + dtotal.abs()
    return x_hat * weight.abs(), dx, (dy.abs() * x_hat).flatten(0, -2).sum(0)


def assert_all_accurate(ours, x, weight, dy, dtotal, what):
    """ours: y, dx and dweight. Plain is float32: the results must have been rounded only once."""
    yardsticks = plain(x, weight, dy, dtotal, torch.float32)
    truths = plain(x, weight, dy, dtotal, torch.float64)
    for name, *group, scale in zip(
        ("y", "dx", "dweight"), ours, yardsticks, truths, scales(x, weight, dy, dtotal), strict=True
    ):
        result, yardstick, truth = (t.flatten() for t in group)
        assert_accurate(result, yardstick, truth, f"{name} of {what}", scale.flatten())


def check_accuracy():
    for dtype, outliers, shape in itertools.product(DTYPES, (False, True), SHAPES):
        x, dy = torch.randn(2, *shape).to(dtype)
        if outliers:  # as in the released checkpoint's residual stream
            x = x * 1e-3
            x[..., :: max(1, shape[-1] // 2)] = 1330.0
        weight = (torch.randn(shape[-1]) / 10 + 1).to(dtype)
        x.requires_grad_(), weight.requires_grad_()
        y = rms_norm(x, weight, EPS)
        assert y.dtype == dtype and y.shape == x.shape
        ours = (y.detach(), *torch.autograd.grad(y, [x, weight], dy))
        assert_all_accurate(ours, x, weight, dy, torch.zeros_like(x), f"{shape}, {dtype}")


def check_add_accuracy():
    """The sum is rounded once; y and the gradients are those of a norm of the rounded sum."""
    for dtype, residual_dtype, shape in itertools.product(DTYPES, DTYPES, SHAPES):
        x, dy = torch.randn(2, *shape).to(dtype)
        residual, dtotal = torch.randn(2, *shape).to(residual_dtype)
        residual[..., :: max(2, shape[-1] // 2)] *= 1330
        weight = torch.randn(shape[-1])
        for t in (x, residual, weight):
            t.requires_grad_()
        y, total = add_rms_norm(x, residual, weight, EPS)
        assert y.dtype == dtype and total.dtype == residual_dtype
        inputs = [x, residual, weight]
        dx, dresidual, dweight = torch.autograd.grad([y, total], inputs, [dy, dtotal])
        assert dx.dtype == dtype and dresidual.dtype == residual_dtype
        exact = x.double() + residual.double()
        once = (x.float() + residual.float()).detach()
        what = f"{shape}, {dtype}, residual {residual_dtype}"
        assert_accurate(total.detach().flatten(), once.flatten(), exact.flatten(), what)
        for d in (dx, dresidual):
            ours = (y.detach(), d, dweight)
            assert_all_accurate(ours, total.detach(), weight, dy, dtotal, what)


def check_both():
    check_accuracy()
    check_add_accuracy()


def test_accurate():
    check_accuracy()


def test_add_accurate():
    check_add_accuracy()


@pytest.mark.parametrize("isa", OLDER)
def test_accurate_on(isa):
    run_on(isa, check_both)


def test_mixed_weight_dtypes():
    x, dy = torch.randn(2, 9, 40).bfloat16()
    weight = torch.randn(40, requires_grad=True)
    x.requires_grad_()
    y = rms_norm(x, weight, EPS)
    dx, dweight = torch.autograd.grad(y, [x, weight], dy)
    assert y.dtype == dx.dtype == torch.bfloat16 and dweight.dtype == torch.float32
    assert_all_accurate(
        (y.detach(), dx, dweight), x, weight, dy, torch.zeros_like(x), "float32 weight"
    )


def test_strided_inputs_equal_contiguous():
    x, residual, dy = torch.randn(3, 20, 34)
    weight = torch.randn(17)
    results = []
    for copy in (False, True):
        a, r, d = (t[::2, ::2].clone() if copy else t[::2, ::2] for t in (x, residual, dy))
        a, r = a.detach().requires_grad_(), r.detach().requires_grad_()
        y, total = add_rms_norm(a, r, weight)
        results.append([y, total, rms_norm(a, weight), *torch.autograd.grad(y, [a, r], d)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unused_outputs():
    """Only the sum is used, or only the norm: the gradient of the other counts as zero."""
    x, residual = torch.randn(2, 3, 8, requires_grad=True).unbind()
    weight = torch.randn(8, requires_grad=True)
    y, total = add_rms_norm(x, residual, weight)
    ones = torch.ones_like(total)
    dx, dresidual = torch.autograd.grad(total, [x, residual], ones, retain_graph=True)
    assert torch.equal(dx, ones) and torch.equal(dresidual, ones)
    (unused,) = torch.autograd.grad(total, [weight], ones, retain_graph=True, allow_unused=True)
    assert unused is None
    from_y = torch.autograd.grad(y, [x, weight], ones, retain_graph=True)
    with_zeros = torch.autograd.grad([y, total], [x, weight], [ones, 0 * ones])
    assert all(torch.equal(a, b) for a, b in zip(from_y, with_zeros, strict=True))


def test_backward_twice():
    x, weight = torch.randn(70, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    y, total = add_rms_norm(x, x.detach(), weight)
    first, second = (
        torch.autograd.grad(y.sum() + total.sum(), [x, weight], retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (dx,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_batch_nor_threads(dtype):
    """9,000 rows: past the sizes at which threads and streaming stores come in."""
    x, residual, dy = torch.randn(3, 9000, 768).to(dtype)
    weight = torch.randn(768)
    x.requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            y, total = add_rms_norm(x, residual, weight)
            results.append([y, total, rms_norm(x, weight), *torch.autograd.grad(y, x, dy)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    y, total, alone, dx = results[0]
    few = x.detach()[100:103].requires_grad_()
    y_few, total_few = add_rms_norm(few, residual[100:103], weight)
    assert torch.equal(y_few, y[100:103]) and torch.equal(total_few, total[100:103])
    assert torch.equal(rms_norm(few, weight), alone[100:103])
    assert torch.equal(*torch.autograd.grad(y_few, few, dy[100:103]), dx[100:103])


def test_large_backward_is_accurate():
    """Past the size at which the gradient is written with streaming stores, in both dtypes."""
    x, dy = torch.randn(2, 3700, 768).bfloat16()
    residual, dtotal = torch.randn(2, 3700, 768)
    weight = torch.randn(768, requires_grad=True)
    x.requires_grad_(), residual.requires_grad_()
    y, total = add_rms_norm(x, residual, weight, EPS)
    dx, dresidual, dweight = torch.autograd.grad([y, total], [x, residual, weight], [dy, dtotal])
    for d in (dx, dresidual):
        assert_all_accurate((y.detach(), d, dweight), total.detach(), weight, dy, dtotal, "large")


def test_references_in_float64(monkeypatch):
    """The hand-written backward formulas against numerical differentiation."""
    names = {
        "rms_norm": module.reference,
        "add_rms_norm": module.reference_add,
        "rms_norm_bwd": module.reference_bwd,
        "add_rms_norm_bwd": module.reference_add_bwd,
    }
    monkeypatch.setattr(module, "ops", SimpleNamespace(**names))
    x, residual = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda x, w: module._RMSNorm.apply(x, w, EPS), (x, weight))
    assert gradcheck(lambda x, r, w: module._AddRMSNorm.apply(x, r, w, EPS), (x, residual, weight))


def test_reference_of_mixed_dtypes_agrees():
    """The plain PyTorch that serves devices without a kernel, in the training case."""
    x, dy = torch.randn(2, 50, 24).bfloat16()
    residual, dtotal = torch.randn(2, 50, 24)
    weight = torch.randn(24)
    y, total, rstd = module.reference_add(x, residual, weight, EPS)
    dx, dresidual, dweight = module.reference_add_bwd(dy, dtotal, total, weight, rstd)
    for d in (dx, dresidual):
        assert_all_accurate((y, d, dweight), total, weight, dy, dtotal, "reference")


def test_bad_input():
    x, weight = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(TypeError, match=r"rms_norm: x must be float32.*got torch.float64"):
        rms_norm(x.double(), weight)
    with pytest.raises(TypeError, match=r"rms_norm: weight must be.*got torch.int64"):
        rms_norm(x, weight.long())
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\).*\(3, 8\).*got \(7,\)"):
        rms_norm(x, weight[:7])
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., dim\), got a scalar"):
        rms_norm(x[0, 0], weight)
    with pytest.raises(ValueError, match="weight is on meta but x is on cpu"):
        rms_norm(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"residual must have shape \(3, 8\).*got \(2, 8\)"):
        add_rms_norm(x, x[:2], weight)
    with pytest.raises(TypeError, match=r"residual must be float32.*got torch.float64"):
        add_rms_norm(x, x.double(), weight)
    with pytest.raises(ValueError, match="residual is on meta but x is on cpu"):
        add_rms_norm(x, x.to("meta"), weight)
