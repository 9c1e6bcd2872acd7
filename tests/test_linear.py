"""linear and linear_swiglu: accuracy against float64, bits that ignore the batch, bad input."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from isa import OLDER, run_on
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from neobert_kernels import _compiled, linear, linear_swiglu
from neobert_kernels._library import ops

# The package's attribute `linear` is the function.
module = importlib.import_module("neobert_kernels.linear")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [0, 1, 2, 13, 14, 15, 127, 129]
# (tokens, out_features, in_features): ragged in every dimension, and the model's own.
SHAPES = [
    (129, 1, 769),
    (129, 31, 1),
    (127, 33, 7),
    (15, 62, 2),
    (3, 30522, 40),
    (29, 2304, 768),
    (29, 768, 2048),
]

needs_kernel = pytest.mark.skipif(_compiled.LOADED is None, reason=_compiled.status())


def operands(tokens: int, out_features: int, in_features: int, dtype=torch.float32):
    x, weight = torch.randn(tokens, in_features), torch.randn(out_features, in_features)
    return x.to(dtype), (weight * in_features**-0.5).to(dtype)


def plain_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up


def check_accuracy(tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> None:
    x, weight = operands(tokens, out_features, in_features, dtype)
    what = f"{tokens} x {out_features} x {in_features}, {dtype}"
    # Over all elements: a row of one or two can have a plain error of zero by luck.
    truth, plain = F.linear(x.double(), weight.double()), F.linear(x, weight)
    assert_accurate(linear(x, weight).flatten(), plain.flatten(), truth.flatten(), what)
    for residual_dtype in DTYPES:
        residual = torch.randn(tokens, out_features).to(residual_dtype)
        added = (plain.float() + residual.float()).to(residual_dtype)
        assert_accurate(
            linear(x, weight, residual).flatten(),
            added.flatten(),
            (truth + residual.double()).flatten(),
            f"{what} + {residual_dtype}",
        )
    if out_features % 2 == 0:
        assert_accurate(
            linear_swiglu(x, weight).flatten(),
            plain_swiglu(x, weight).flatten(),
            plain_swiglu(x.double(), weight.double()).flatten(),
            f"swiglu of {what}",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype):
    check_accuracy(*shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_accuracy_at_tile_edges(tokens, dtype):
    check_accuracy(tokens, 98, 769, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outlier_channels(dtype):
    """Two channels of the residual stream reach a thousand times the others in trained models."""
    x, weight = operands(40, 96, 768, dtype)
    x[:, [5, 300]] *= 1300
    truth = F.linear(x.double(), weight.double())
    assert_accurate(linear(x, weight), F.linear(x, weight), truth)


def check_bits(dtype: torch.dtype) -> None:
    x, weight = operands(400, 118, 1050, dtype)  # more than one block of k, and of tokens
    residual = torch.randn(400, 118).to(dtype)
    together = linear(x, weight, residual), linear_swiglu(x, weight)

    def assert_same(at: slice, what: str) -> None:
        again = linear(x[at], weight, residual[at]), linear_swiglu(x[at], weight)
        for a, b in zip(again, together, strict=True):
            assert torch.equal(a, b[at]), f"{what}, {dtype}"

    # The kernel takes another way through memory up to 64 rows, and cuts up x from more than that.
    for count in (1, 2, 3, 7, 8, 13, 14, 15, 16, 29, 31, 63, 64, 65, 127, 200):
        for start in (0, 1, 17, 200):
            assert_same(slice(start, start + count), f"rows {start} to {start + count}")
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        try:
            assert_same(slice(None), f"{count} threads")
            assert_same(slice(3, 20), f"17 rows, {count} threads")
        finally:
            torch.set_num_threads(threads)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_row_alone(dtype):
    if dtype in module.PYTORCH_GEMM_DTYPES:
        pytest.skip(f"PyTorch's GEMM serves {dtype} on this CPU")
    check_bits(dtype)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "in_features"), [(192, 2048), (130, 768)])
def test_a_row_has_the_same_bits_among_few_tokens_and_many(width, in_features, dtype):
    """The model's own sums, of one panel of weight and of several, ragged and not."""
    if dtype in module.PYTORCH_GEMM_DTYPES:
        pytest.skip(f"PyTorch's GEMM serves {dtype} on this CPU")
    x, weight = operands(300, width, in_features, dtype)
    for residual in (None, torch.randn(300, width), torch.randn(300, width).to(dtype)):
        many = linear(x, weight, residual)
        for tokens in (1, 8, 31, 64, 65):
            few = linear(x[:tokens], weight, None if residual is None else residual[:tokens])
            assert torch.equal(few, many[:tokens]), f"{tokens} tokens"
    many = linear_swiglu(x, weight)
    for tokens in (1, 8, 31, 64, 65):
        assert torch.equal(linear_swiglu(x[:tokens], weight), many[:tokens]), f"{tokens} tokens"


def test_a_column_depends_on_its_row_of_weight_alone():
    """NaN in one row of weight and of x spreads no further."""
    x, weight = operands(40, 100, 70)
    expected = linear(x, weight)
    x[7], weight[33] = torch.nan, torch.nan
    y = linear(x, weight)
    assert y[7].isnan().all()
    assert y[:, 33].isnan().all()
    rows, columns = torch.arange(40) != 7, torch.arange(100) != 33
    assert torch.equal(y[rows][:, columns], expected[rows][:, columns])


def check_compactly() -> None:
    for dtype in DTYPES:
        for shape in ((15, 62, 769), (1, 33, 7), (29, 98, 768)):
            check_accuracy(*shape, dtype)
        check_bits(dtype)
    check_transposed()


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa):
    run_on(isa, check_compactly)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    """Columns of a wider tensor, a transposed one, one row repeated: the values decide the bits."""
    x, weight = operands(33, 50, 64, dtype)
    residual = torch.randn(33, 50).to(dtype)
    expected = linear(x, weight, residual)
    wide = torch.full((33, 90), torch.nan, dtype=dtype)
    wide[:, 7:71] = x
    wide_weight = torch.full((50, 67), torch.nan, dtype=dtype)
    wide_weight[:, 3:] = weight
    wide_residual = torch.full((33, 51), torch.nan, dtype=dtype)
    wide_residual[:, :50] = residual
    strided = (wide[:, 7:71], wide_weight[:, 3:], wide_residual[:, :50])
    transposed = tuple(t.t().contiguous().t() for t in (x, weight, residual))
    for a, b, c in (strided, transposed):
        assert torch.equal(linear(a, b, c), expected)
        assert torch.equal(linear_swiglu(a, b), linear_swiglu(x, weight))
    assert torch.equal(linear(x[:1].expand(33, 64), weight), linear(x[:1], weight).expand(33, 50))


def check_transposed() -> None:
    """The products of the backward pass: sums over many rows, of operands that lie transposed."""
    for dtype in DTYPES:
        for rows, columns, depth in ((1, 1, 3), (15, 33, 1601), (250, 70, 771), (1400, 40, 385)):
            a, b = torch.randn(depth, rows).to(dtype), torch.randn(depth, columns).to(dtype)
            total = torch.randn(rows, columns)
            truth, plain = a.double().t() @ b.double(), a.t() @ b
            what = f"{rows} x {columns} x {depth}, {dtype}"
            ours = ops.linear(a.t(), b.t(), None)
            assert_accurate(ours.flatten(), plain.flatten(), truth.flatten(), what)
            assert torch.equal(ours, ops.linear(a.t().contiguous(), b.t().contiguous(), None))
            # A float32 total is not rounded to the operands' dtype on the way.
            plain = a.float().t() @ b.float() + total
            ours = ops.linear(a.t(), b.t(), total)
            assert_accurate(ours.flatten(), plain.flatten(), (truth + total).flatten(), what)


@needs_kernel
def test_transposed_operands():
    check_transposed()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_gradient_depend_on_its_row_alone(dtype):
    dy, weight = torch.randn(200, 98).to(dtype), torch.randn(98, 70).to(dtype)
    dx = ops.linear(dy, weight.t(), None)
    for at in (slice(0, 1), slice(3, 20), slice(57, 200)):
        assert torch.equal(ops.linear(dy[at], weight.t(), None), dx[at])


def test_empty():
    for tokens, out_features, in_features in ((0, 4, 3), (3, 0, 4), (0, 0, 0)):
        x, weight = operands(tokens, out_features, max(1, in_features))
        assert linear(x, weight).shape == (tokens, out_features)
        assert linear_swiglu(x, weight).shape == (tokens, out_features // 2)
    residual = torch.randn(3, 40)
    x, weight = torch.empty(3, 0), torch.empty(40, 0)
    assert torch.equal(linear(x, weight, residual), residual)
    assert torch.equal(linear_swiglu(x, weight), torch.zeros(3, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    x, weight = operands(37, 66, 65, dtype)
    # A float32 residual stream with 16-bit branches is how the model trains.
    residual, dy, dgated = torch.randn(37, 66), torch.randn(37, 66), torch.randn(37, 33).to(dtype)

    def leaves(to: torch.dtype) -> list[Tensor]:
        return [x.to(to, copy=True).requires_grad_(), weight.to(to, copy=True).requires_grad_()]

    def run(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(function(*inputs), inputs, grad.to(inputs[-1].dtype)))

    extra = [residual.clone().requires_grad_()]
    added = run(linear, leaves(dtype) + extra, dy)
    assert torch.equal(added.pop(), dy)
    plain, truth = (run(F.linear, leaves(to), dy.to(dtype)) for to in (dtype, torch.float64))
    for name, *grads in zip(("dx", "dweight"), added, plain, truth, strict=True):
        assert_accurate(*grads, f"{name}, {dtype}")

    gated = run(linear_swiglu, leaves(dtype), dgated)
    plain, truth = (run(plain_swiglu, leaves(to), dgated) for to in (dtype, torch.float64))
    for name, *grads in zip(("dx", "dweight"), gated, plain, truth, strict=True):
        assert_accurate(*grads, f"{name} of swiglu, {dtype}")


def test_only_the_gradients_asked_for():
    x, weight = operands(5, 6, 7)
    linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None and x.grad is None
    frozen = linear(x, weight.detach())
    assert not frozen.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, weight = operands(19, 34, 21, dtype)
    for residual in (None, torch.randn(19, 34), torch.randn(19, 34).to(dtype)):
        torch.library.opcheck(ops.linear.default, (x, weight, residual))
    torch.library.opcheck(ops.linear_swiglu.default, (x, weight))


def test_compile_with_any_number_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def block(x, up, down):
        return linear(linear_swiglu(x, up), down, x)

    up, down = torch.randn(80, 24), torch.randn(24, 40)
    for tokens in (5, 17, 40):
        x = torch.randn(tokens, 24)
        assert torch.equal(block(x, up, down), linear(linear_swiglu(x, up), down, x))
        x.requires_grad_()
        (compiled,) = torch.autograd.grad(block(x, up, down).sum(), x)
        (eager,) = torch.autograd.grad(linear(linear_swiglu(x, up), down, x).sum(), x)
        torch.testing.assert_close(compiled, eager)
    assert counter.frame_count == 2  # without and with gradients


def test_autocast():
    x, weight = operands(9, 34, 21)
    half = [t.bfloat16() for t in (x, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        y, gated, added = (
            linear(x, weight),
            linear_swiglu(x, weight),
            linear(x, weight, x[:, :1] * 0 + torch.ones(9, 34)),
        )
    assert torch.equal(y, linear(*half))
    assert torch.equal(gated, linear_swiglu(*half))
    assert torch.equal(added, linear(*half, torch.ones(9, 34)))
    assert added.dtype == torch.float32


def test_dtypes_left_to_pytorch(monkeypatch):
    """What a CPU with AMX does: the listed dtypes go to PyTorch's GEMM, the others do not."""
    monkeypatch.setattr(module, "PYTORCH_GEMM_DTYPES", frozenset({torch.bfloat16}))
    calls = []
    monkeypatch.setattr(F, "linear", lambda *a, f=F.linear: calls.append(a[0].dtype) or f(*a))
    for dtype in DTYPES:
        x, weight = operands(9, 34, 21, dtype)
        residual = torch.randn(9, 34)
        plain = torch.mm(x, weight.t())
        if dtype == torch.bfloat16:
            assert torch.equal(linear(x, weight), plain)
            assert torch.equal(linear(x, weight, residual), residual + plain.float())
            assert linear_swiglu(x, weight.requires_grad_()).requires_grad
        linear_swiglu(x, weight)
    assert calls.count(torch.bfloat16) == 4
    if _compiled.LOADED is not None:
        assert set(calls) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4, 6)}, ValueError, r"x \(4, 6\) and weight \(8, 5\)"),
        ({"x": torch.ones(4, 3, 5)}, ValueError, r"x \(4, 3, 5\) and weight \(8, 5\)"),
        ({"weight": torch.ones(5)}, ValueError, r"x \(4, 5\) and weight \(5,\)"),
        ({"x": torch.ones(4, 5).double()}, TypeError, "float64"),
        ({"x": torch.ones(4, 5).half()}, TypeError, "weight is torch.float32 but x is"),
        ({"residual": torch.ones(4, 9)}, ValueError, r"\(4, 8\).*got \(4, 9\)"),
        ({"residual": torch.ones(1, 8)}, ValueError, r"\(4, 8\).*got \(1, 8\)"),
        ({"residual": torch.ones(4, 8).long()}, TypeError, "residual.*int64"),
        ({"weight": torch.ones(8, 5, device="meta")}, ValueError, "cpu.*meta|meta.*cpu"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"x": torch.ones(4, 5), "weight": torch.ones(8, 5)} | change
    with pytest.raises(error, match=message):
        linear(**arguments)
    if "residual" not in change:
        with pytest.raises(error, match=message):
            linear_swiglu(**arguments)


def test_an_odd_weight_has_no_halves():
    with pytest.raises(ValueError, match=r"\(2 \* width, 5\), got \(7, 5\)"):
        linear_swiglu(torch.ones(4, 5), torch.ones(7, 5))


@needs_kernel
@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(4, 6), torch.ones(8, 5), None),
        (torch.ones(4, 5), torch.ones(8, 5).bfloat16(), None),
        (torch.ones(4, 5).double(), torch.ones(8, 5).double(), None),
        (torch.ones(4, 5), torch.ones(8, 5), torch.ones(4, 7)),
        (torch.ones(4, 5), torch.ones(8, 5), torch.ones(4, 8).double()),
    ],
)
def test_the_kernel_itself_refuses(arguments):
    """Below the checks of the public function too, no memory is read that is not there."""
    with pytest.raises(ValueError, match="linear: "):
        ops.linear(*arguments)


def test_without_a_fused_kernel_swiglu_still_has_its_own():
    """On a GPU, which has no kernel of `linear_swiglu`; a meta tensor takes the same way."""
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    x, weight = torch.empty(3, 8, device="meta"), torch.empty(12, 8, device="meta")
    with Calls():
        assert module.unchecked_linear_swiglu(x, weight).shape == (3, 6)
    assert "neobert.swiglu.default" in called and "neobert.linear_swiglu.default" not in called
