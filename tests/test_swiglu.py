"""SwiGLU: values, gradients, extreme gates, invariances, errors."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_accurate
from isa import OLDER, run_on

from neobert_kernels import swiglu

module = importlib.import_module("neobert_kernels.swiglu")  # the package's name is the function's
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 2048), (0, 17), (3, 1), (5, 7), (2, 3, 17), (65, 768), (9, 769), (4, 64)]


def plain(gate_up, dy, dtype):
    """y and dgate_up by autograd in `dtype`."""
    gate_up = gate_up.detach().to(dtype).requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    y = torch.nn.functional.silu(gate) * up
    return y.detach(), *torch.autograd.grad(y, gate_up, dy.to(dtype))


def scales(gate_up, dy):
    """The sums of absolute terms behind y and dgate_up, float64."""
    gate, up = gate_up.detach().double().chunk(2, -1)
    dy, s = dy.double().abs(), torch.sigmoid(gate)
    silu = (gate * s).abs()
    dgate = dy * up.abs() * (s + silu * torch.sigmoid(-gate))
    return silu * up.abs(), torch.cat([dgate, dy * silu], -1)


def assert_all_accurate(ours, gate_up, dy, what):
    yardsticks, truths = (plain(gate_up, dy, t) for t in (torch.float32, torch.float64))
    for name, *group, scale in zip(
        ("y", "dgate_up"), ours, yardsticks, truths, scales(gate_up, dy), strict=True
    ):
        result, yardstick, truth = (t.flatten() for t in group)
        assert_accurate(result, yardstick, truth, f"{name} of {what}", scale.flatten())


def check_accuracy():
    for dtype in DTYPES:
        for shape in SHAPES:
            for spread in (1.0, 6.0):
                gate_up = torch.randn(*shape[:-1], 2 * shape[-1]).mul(spread).to(dtype)
                dy = torch.randn(shape).to(dtype)
                gate_up.requires_grad_()
                y = swiglu(gate_up)
                assert y.dtype == dtype and y.shape == shape
                grads = torch.autograd.grad(y, gate_up, dy)
                assert_all_accurate((y.detach(), *grads), gate_up, dy, f"{shape}, {dtype}")


def test_accurate():
    check_accuracy()


@pytest.mark.parametrize("isa", OLDER)
def test_accurate_on(isa):
    run_on(isa, check_accuracy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates(dtype):
    """silu where plain PyTorch's exponential has overflowed, at denormal results and at zero."""
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20, -20, 60, -60, -87, -88, -88.8, -95, 1330])
    gate = gate.to(dtype)
    y = swiglu(torch.cat([gate, torch.ones_like(gate)]))
    exact = gate.double() * torch.sigmoid(gate.double())
    # float32 holds e^-|g| to 3 ulp down to 2^-126 and to a denormal step below.
    step = torch.finfo(torch.float32).tiny * torch.finfo(torch.float32).eps
    tolerance = 3 * 2**-23 * exact.abs() + gate.double().abs() * step
    nearest = torch.finfo(dtype).eps * exact.abs() / 2 + torch.finfo(dtype).smallest_normal * (
        torch.finfo(dtype).eps
    )
    assert ((y.double() - exact).abs() <= tolerance + nearest).all()


def test_infinities_and_nan():
    inf, nan = float("inf"), float("nan")
    y = swiglu(torch.tensor([inf, nan, 1.0, 1.0, 1.0, 1.0, nan, -inf]))
    assert y.isposinf()[0] and y.isnan()[1] and y.isnan()[2] and y.isneginf()[3]


def test_strided_input_equals_contiguous():
    gate_up, dy = torch.randn(20, 68), torch.randn(10, 34)
    results = []
    for copy in (False, True):
        a = gate_up[::2, ::2].clone() if copy else gate_up[::2, ::2]
        d = dy[:, ::2].clone() if copy else dy[:, ::2]
        a = a.detach().requires_grad_()
        y = swiglu(a)
        results.append((y, *torch.autograd.grad(y, a, d)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backward_twice():
    gate_up = torch.randn(7, 34, requires_grad=True)
    y = swiglu(gate_up)
    first, second = (torch.autograd.grad(y.sum(), gate_up, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_batch_nor_threads(dtype):
    """2,100 rows: past the sizes at which threads and streaming stores come in."""
    gate_up, dy = torch.randn(2100, 4096).to(dtype), torch.randn(2100, 2048).to(dtype)
    gate_up.requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            y = swiglu(gate_up)
            results.append((y, *torch.autograd.grad(y, gate_up, dy)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    few = gate_up.detach()[50:53].requires_grad_()
    y_few = swiglu(few)
    assert torch.equal(y_few, results[0][0][50:53])
    assert torch.equal(*torch.autograd.grad(y_few, few, dy[50:53]), results[0][1][50:53])


def test_halves_are_gate_then_up():
    gate, up = torch.randn(2, 5, 8)
    y = swiglu(torch.cat([gate, up], -1))
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up)
    interleaved = swiglu(torch.stack([gate, up], -1).flatten(-2))
    assert not torch.allclose(interleaved, y, atol=0.1)


def test_reference_in_float64(monkeypatch):
    names = {"swiglu": module.reference, "swiglu_bwd": module.reference_bwd}
    monkeypatch.setattr(module, "ops", SimpleNamespace(**names))
    gate_up = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module._SwiGLU.apply, gate_up)


def test_bad_input():
    with pytest.raises(TypeError, match=r"swiglu: gate_up must be float32.*got torch.float64"):
        swiglu(torch.randn(2, 4).double())
    with pytest.raises(ValueError, match=r"gate_up must have shape \(\.\.\., 2 \* width\).*\(2, 5"):
        swiglu(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"got \(\)"):
        swiglu(torch.tensor(1.0))
