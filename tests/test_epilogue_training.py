"""The epilogue GEMMs with gradients, against plain PyTorch: the same in float64, no further off in
the other dtypes, and nothing saved or passed over that need not be."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate

from neobert.breakdown.work import WorkCounter
from neobert_kernels import epilogue, epilogue_training, rms_norm, rotary, swiglu
from neobert_kernels.epilogue import fold_gain, interleave_gate_up
from neobert_kernels.epilogue_training import (
    linear_add,
    norm_linear_rotary,
    norm_linear_swiglu,
)
from tests.saved import saved_bytes

TOKENS, DIM, HEADS, HEAD_DIM, WIDTH, EPS = 129, 320, 2, 64, 200, 1e-5
SEEDS = range(4)
# Of the stream, of the weights, and of the products if autocast says so.
KINDS = {
    "float32": (torch.float32, torch.float32, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "float16": (torch.float16, torch.float16, None),
    "bfloat16 by autocast": (torch.float32, torch.float32, torch.bfloat16),
}
pytestmark = [pytest.mark.usefixtures("one_thread")]


def table():
    angles = torch.outer(torch.arange(64.0), 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    return angles.cos(), angles.sin(), torch.arange(TOKENS) % 50


def plain_norm(x, gain, dtype):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), (DIM,), gain.to(wide), EPS).to(x.dtype).to(dtype)


def plain_rotary(x, weight, gain, dtype):
    y = F.linear(plain_norm(x, gain, dtype), weight.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin, positions = table()
    cos, sin = (t[positions].to(wide).unsqueeze(1) for t in (cos, sin))

    def rotate(x):
        even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return turned.flatten(-2).to(dtype)

    q, k, v = y.view(len(x), HEADS, 3, HEAD_DIM).unbind(2)
    return torch.stack([rotate(q), rotate(k), v], 2), x


def plain_swiglu(x, weight, gain, dtype):
    gate, up = F.linear(plain_norm(x, gain, dtype), weight.to(dtype)).chunk(2, -1)
    return F.silu(gate) * up, x


def plain_add(x, weight, residual, dtype):
    return (residual + F.linear(x.to(dtype), weight.to(dtype)),)


def our_rotary(x, weight, gain, dtype):
    squares = epilogue.reference_squares(x.detach())
    return norm_linear_rotary(x, squares, weight, gain, *table(), EPS)


def our_swiglu(x, weight, gain, dtype):
    return norm_linear_swiglu(x, epilogue.reference_squares(x.detach()), weight, gain, EPS)


def our_add(x, weight, residual, dtype):
    total, squares = linear_add(x, weight, residual)
    assert not squares.requires_grad
    assert torch.equal(squares, epilogue.reference_squares(total.detach()))
    return (total,)


FUNCTIONS = {
    "rotary": (our_rotary, plain_rotary),
    "swiglu": (our_swiglu, plain_swiglu),
    "add": (our_add, plain_add),
}


def drawn(name, seed, stream, weights, product):
    """Leaves with the outlier of a trained model, its gain small, and gradients of what is made of
    them: the branch's, in the dtype of products, before the stream's."""
    torch.manual_seed(seed)
    x, gain = torch.randn(TOKENS, DIM), torch.exp(0.5 * torch.randn(DIM))
    x[:, 100], gain[100] = 1330.0, 0.02
    if name == "add":
        leaves = torch.randn(TOKENS, WIDTH), torch.randn(DIM, WIDTH) * WIDTH**-0.5, x
        dtypes = (product or weights, weights, stream)
        gradients = [torch.randn(TOKENS, DIM).to(stream)]
    else:
        rows = HEADS * 3 * HEAD_DIM if name == "rotary" else 2 * WIDTH
        leaves = x, torch.randn(rows, DIM) * DIM**-0.5, gain
        dtypes = stream, weights, weights
        branch = (TOKENS, HEADS, 3, HEAD_DIM) if name == "rotary" else (TOKENS, WIDTH)
        gradients = [torch.randn(branch).to(product or weights), torch.randn_like(x).to(stream)]
    leaves = [t.to(d).requires_grad_() for t, d in zip(leaves, dtypes, strict=True)]
    return leaves, gradients


def run(function, leaves, gradients, dtype):
    """What it returns, and the gradients of its leaves. (Copies go in: one is overwritten.)"""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves, dtype)
    grads = torch.autograd.grad(outputs, leaves, [g.clone() for g in gradients])
    return [t.detach() for t in (*outputs, *grads)]


def wide(tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def pooled(tensors):
    """All draws in one, (…, the last axis); of dx and dweight that is a channel of the stream."""
    return torch.cat([t.flatten(1) if t.dim() > 1 else t[None] for t in tensors])


def rms_by_column(result, truth):
    return (result.double() - truth).square().mean(0).sqrt()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(name, kind):
    """Outputs and gradients: at most twice as far off as plain PyTorch in the same dtypes; and so
    the root mean square of each channel, for most are small beside the outlier's."""
    stream, weights, product = KINDS[kind]
    ours, plain = FUNCTIONS[name]
    results = []
    for seed in SEEDS:
        leaves, gradients = drawn(name, seed, stream, weights, product)
        with torch.autocast("cpu", product, enabled=product is not None):
            mine = run(ours, leaves, gradients, None)
        yardstick = run(plain, leaves, gradients, product or weights)
        truth = run(plain, wide(leaves), wide(gradients), torch.float64)
        assert [t.dtype for t in mine] == [t.dtype for t in yardstick]
        results.append((mine, yardstick, truth))
    what = ("total", "dx", "dweight", "dresidual")
    if name != "add":
        what = ("y", "x", "dx", "dweight", "dgain")
    for number, each in enumerate(what):
        mine, yardstick, truth = (pooled([draw[i][number] for draw in results]) for i in range(3))
        assert_accurate(*(t.flatten() for t in (mine, yardstick, truth)), f"{each} of {name}")
        if each in ("dx", "dweight"):
            error, plain_error = (rms_by_column(t, truth) for t in (mine, yardstick))
            assert (error <= 2 * plain_error).all(), f"{each} of {name}: {error / plain_error}"


def references():
    """Of the ops, as their kernels do not serve float64."""
    return SimpleNamespace(
        rms_linear_rotary=epilogue.reference_rotary,
        rms_linear_swiglu_keep=epilogue.reference_swiglu_keep,
        linear_add=epilogue.reference_add,
        rms_norm=module_of(rms_norm).reference,
        rms_norm_bwd=module_of(rms_norm).reference_bwd,
        rotary_qkv_=rotary.reference_qkv_,
        swiglu_bwd=module_of(swiglu).reference_bwd,
    )


def module_of(function):
    import sys

    return sys.modules[function.__module__]


def errors_in_float64(name):
    leaves, gradients = drawn(name, 0, *3 * [torch.float64])
    ours, plain = (run(f, leaves, gradients, torch.float64) for f in FUNCTIONS[name])
    return [float((o - p).abs().max() / p.abs().max()) for o, p in zip(ours, plain, strict=True)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64(name, monkeypatch):
    monkeypatch.setattr(epilogue_training, "ops", references())
    assert max(errors_in_float64(name)) < 1e-10


def test_a_row_of_zeros(monkeypatch):
    """Whose rstd is that of eps alone."""
    monkeypatch.setattr(epilogue_training, "ops", references())
    leaves, gradients = drawn("rotary", 0, *3 * [torch.float64])
    leaves[0].data[7] = 0.0
    ours, plain = (run(f, leaves, gradients, torch.float64)[2] for f in FUNCTIONS["rotary"])
    torch.testing.assert_close(ours[7], plain[7], rtol=1e-10, atol=0.0)
    assert ours[7].abs().max() > 10


def _rotated_forwards(qkv, cos, sin, positions, inverse):
    rotary.reference_qkv_(qkv, cos, sin, positions, False)


def _without_the_stream(dy, dstream, *rest):
    return module_of(rms_norm).reference_bwd(dy, None, *rest)


def _gain_left_out(x, gain, eps):
    return module_of(rms_norm).reference(x, torch.ones_like(gain), eps)


@pytest.mark.parametrize(
    ("op", "broken", "seen"),
    [
        ("rotary_qkv_", _rotated_forwards, (2, 3, 4)),
        ("rms_norm_bwd", _without_the_stream, (2,)),
        ("rms_norm", _gain_left_out, (3,)),
    ],
)
def test_float64_sees_a_broken_backward(op, broken, seen, monkeypatch):
    monkeypatch.setattr(epilogue_training, "ops", references())
    monkeypatch.setattr(epilogue_training.ops, op, broken)
    errors = errors_in_float64("rotary")
    assert [number for number, error in enumerate(errors) if error > 1e-3] == list(seen)


@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_of_a_call_is_the_prepared_one(weight_dtype, gain_dtype, dtype):
    weight, gain = torch.randn(10, 24).to(weight_dtype), torch.randn(24).to(gain_dtype)
    expected = (weight.float() * gain.float()).to(dtype)
    assert torch.equal(epilogue_training._folded(weight, gain, dtype), expected)
    in_turn = epilogue_training._folded_in_turn(weight, gain, dtype)
    assert torch.equal(in_turn, interleave_gate_up(expected)) and in_turn.is_contiguous()
    if dtype == weight_dtype:
        assert torch.equal(expected, fold_gain(weight, gain))


def half_block(name="swiglu", kind="bfloat16 by autocast"):
    """x, the gradients of what is made of it, and a function of x: norm to residual add."""
    stream, weights, product = KINDS[kind]
    (x, weight, gain), gradients = drawn(name, 0, stream, weights, product)
    rows = WIDTH if name == "swiglu" else HEADS * HEAD_DIM
    out = torch.randn(DIM, rows).to(weights).requires_grad_()

    def forward(x):
        with torch.autocast("cpu", product, enabled=product is not None):
            branch, x = FUNCTIONS[name][0](x, weight, gain, None)
            branch = branch if name == "swiglu" else branch[:, :, 2].flatten(1)
            return linear_add(branch, out, x)[0]

    return x, gradients[-1], forward


@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16 by autocast"])
def test_no_pass_over_the_stream_but_the_norms(kind):
    """In the backward of half a block, with a leaf before it."""
    x, gradient, forward = half_block(kind=kind)
    with WorkCounter() as counter:
        total = forward(1 * x)
    calls = {name: work.calls for name, work in counter.ops.items()}
    assert calls["neobert::rms_linear_swiglu_keep"] == calls["neobert::linear_add"] == 1
    assert "neobert::rms_norm" not in calls
    with WorkCounter() as counter:
        total.backward(gradient)
    streams = {
        name
        for name, work in counter.ops.items()
        if name.startswith("aten::") and work.bytes / work.calls > x.numel() * 2
    }
    # The cast of the stream's gradient and of the norm made anew; the test's own 1 * x.
    assert streams <= {"aten::_to_copy", "aten::clone", "aten::mul", "aten::mm"}
    calls = {name: work.calls for name, work in counter.ops.items()}
    assert calls["neobert::rms_norm_bwd"] == calls["neobert::rms_norm"] == 1
    assert "aten::add" not in streams


def test_what_is_saved():
    """The stream once, its squares, what is gated and its product; no norm, no cast weight."""
    x, _, forward = half_block()
    wide, narrow = 4, 2
    per_token = saved_bytes(lambda: forward(1 * x)) / TOKENS
    expected = wide * (DIM + 3) + narrow * (2 * WIDTH + WIDTH)
    assert per_token == expected


def test_without_gradients_nothing_is_kept(monkeypatch):
    x, _, forward = half_block()
    expected = forward(x)
    monkeypatch.setattr(epilogue_training.ops, "rms_linear_swiglu_keep", None)
    with torch.no_grad():
        assert torch.equal(forward(x), expected)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_what_is_asked_for(name, frozen):
    """A gradient does not depend on which others are needed."""
    leaves, gradients = drawn(name, 0, *KINDS["float32"])
    everything = run(FUNCTIONS[name][0], leaves, gradients, None)[-3:]
    leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(leaves)]
    outputs = FUNCTIONS[name][0](*leaves, None)
    torch.autograd.backward(outputs, [g.clone() for g in gradients])
    for number, (leaf, expected) in enumerate(zip(leaves, everything, strict=True)):
        if number in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("name", ["rotary", "swiglu"])
def test_one_of_the_two_outputs_may_be_unused(name):
    """As the last block's stream is where only some tokens go on."""
    leaves, gradients = drawn(name, 0, *KINDS["float32"])
    both = run(FUNCTIONS[name][0], leaves, gradients, None)[-3:]
    branch, stream = (
        torch.autograd.grad(
            FUNCTIONS[name][0](*leaves, None)[i], leaves, gradients[i].clone(), allow_unused=True
        )
        for i in (0, 1)
    )
    assert torch.equal(stream[0], gradients[1]) and stream[1:] == (None, None)
    torch.testing.assert_close(branch[0] + stream[0], both[0])
    assert torch.equal(branch[1], both[1]) and torch.equal(branch[2], both[2])


def test_a_stream_in_another_dtype_is_refused():
    (x, weight, gain), _ = drawn("swiglu", 0, *KINDS["bfloat16"])
    squares = epilogue.reference_squares(x.detach())
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(TypeError, match=r"swiglu: x must be float32 or torch\.float16, as the"):
            norm_linear_swiglu(x, squares, weight, gain, EPS)


def test_what_is_added_is_cast_by_autocast():
    (x, weight, residual), (gradient,) = drawn("add", 0, *KINDS["float32"])
    with torch.autocast("cpu", torch.bfloat16):
        total, expected = (linear_add(each, weight, residual)[0] for each in (x, x.bfloat16()))
    assert torch.equal(total, expected) and total.dtype == torch.float32
    total.backward(gradient)
    dx = (gradient.bfloat16() @ weight.detach().bfloat16()).float()
    torch.testing.assert_close(x.grad, dx, rtol=1e-2, atol=1e-2)
