"""Linear cross entropy: loss and gradients, chunks, memory, ignored labels, autocast, errors."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from isa import OLDER, run_on

from neobert_kernels import linear_cross_entropy
from neobert_kernels._library import ops

module = importlib.import_module("neobert_kernels.cross_entropy")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(tokens, dim, vocab, dtype, labelled=0.3):
    hidden = torch.randn(tokens, dim).to(dtype)
    weight, bias = torch.randn(vocab, dim).div(dim**0.5).to(dtype), torch.randn(vocab).to(dtype)
    labels = torch.randint(0, vocab, (tokens,))
    labels[torch.rand(tokens) > labelled] = -100
    labels[:1] = vocab - 1
    return hidden, weight, bias, labels


def loss_and_gradients(function, hidden, weight, bias, labels, dtype):
    inputs = [
        t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias) if t is not None
    ]
    loss = function(*inputs[:2], inputs[2] if bias is not None else None, labels)
    return loss.detach(), *torch.autograd.grad(loss * 1.5, inputs)


def plain(hidden, weight, bias, labels):
    """All logits at once; rounded to the dtype of the GEMM, float32 after it."""
    logits = F.linear(hidden, weight, bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels)


def scales(hidden, weight, bias, labels):
    """The sums of absolute terms behind the loss and the gradients, float64."""
    kept = labels != -100
    hidden, weight = hidden.double(), weight.double()
    logits = F.linear(hidden, weight, None if bias is None else bias.double())
    p = torch.softmax(logits, -1) + F.one_hot(labels.clamp(min=0), len(weight))
    p *= 1.5 * kept.unsqueeze(-1) / kept.sum()
    size = logits[kept].abs().amax()
    return size, p @ weight.abs(), p.t() @ hidden.abs(), p.sum(0)


def check_accuracy():
    for dtype in DTYPES:
        for tokens, dim, vocab in ((1, 8, 5), (7, 33, 17), (40, 64, 1000), (1700, 24, 519)):
            hidden, weight, bias, labels = problem(tokens, dim, vocab, dtype, labelled=0.7)
            for b in (bias, None):
                arguments = (hidden, weight, b, labels)
                ours = loss_and_gradients(linear_cross_entropy, *arguments, dtype)
                yardsticks = loss_and_gradients(plain, *arguments, dtype)
                truths = loss_and_gradients(plain, *arguments, torch.float64)
                assert ours[0].dtype == torch.float32
                names = ("loss", "dhidden", "dweight", "dbias")[: len(ours)]
                sizes = scales(*arguments)[: len(ours)]
                for name, *group in zip(names, ours, yardsticks, truths, sizes, strict=True):
                    result, yardstick, truth, scale = (t.flatten() for t in group)
                    what = f"{name}, {(tokens, dim, vocab)}, {dtype}"
                    assert_accurate(result, yardstick, truth, what, scale)


def check_rows_accuracy():
    """The fused kernel alone, on given logits: rounded once, over a wide range of logits."""
    for dtype in DTYPES:
        # Many rows of few logits: plain PyTorch's worst error is to be seen, not its luck.
        for rows, vocab in ((1, 1), (150, 7), (70, 16), (15, 129), (3, 30522)):
            for spread in (0.1, 8.0, 100.0):
                logits = (torch.randn(rows, vocab) * spread - 3 * spread).to(dtype)
                labels = torch.randint(0, vocab, (rows,))
                dlogits = logits.clone()
                losses = ops.cross_entropy_rows_grad_(dlogits, labels, 0.25)
                assert torch.equal(losses, ops.cross_entropy_rows(logits, labels))
                onehot = F.one_hot(labels, vocab)
                groups = []
                for wide in (torch.float32, torch.float64):
                    log_probs = F.log_softmax(logits.to(wide), -1)
                    loss = F.nll_loss(log_probs, labels, reduction="none")
                    groups.append((loss, (log_probs.exp() - onehot) * 0.25))
                what = f"{(rows, vocab)}, spread {spread}, {dtype}"
                (plain_loss, plain_dlogits), (loss, exact) = groups
                size = logits.double().abs().amax(-1)  # a loss is a difference of such numbers
                assert_accurate(losses, plain_loss, loss, f"loss of {what}", size + loss)
                scale = (exact.abs() + 1e-30) * (1 + size.unsqueeze(-1))
                assert_accurate(
                    dlogits.flatten(),
                    plain_dlogits.flatten(),
                    exact.flatten(),
                    f"dlogits of {what}",
                    scale.flatten(),
                )


def check_both():
    check_accuracy()
    check_rows_accuracy()


def test_accurate():
    check_accuracy()


def test_rows_accurate():
    check_rows_accuracy()


@pytest.mark.parametrize("isa", OLDER)
def test_accurate_on(isa):
    run_on(isa, check_both)


def test_rows_of_infinities_and_nan():
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, -inf, 1.0], [0.0, inf, 1.0], [0.0, nan, 1.0], [-inf] * 3])
    losses = ops.cross_entropy_rows(logits, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(losses[0], torch.log(1 + torch.exp(torch.tensor(1.0))))
    assert losses[1:].isnan().all()


def test_nothing_labelled():
    hidden, weight, bias, labels = problem(6, 8, 5, torch.float32)
    loss, *grads = loss_and_gradients(
        linear_cross_entropy, hidden, weight, bias, torch.full_like(labels, -100), torch.float32
    )
    assert loss.isnan() and not any(g.any() for g in grads)
    assert ops.linear_cross_entropy(hidden[:0], weight, bias, labels[:0], -100).isnan()


def test_ignore_index():
    hidden, weight, bias, labels = problem(50, 16, 20, torch.float32)
    expected = linear_cross_entropy(hidden, weight, bias, labels)
    for other in (3, -1):
        marked = torch.where(labels == 3, 4, labels)
        expected = linear_cross_entropy(hidden, weight, bias, marked)
        swapped = torch.where(marked == -100, other, marked)
        assert torch.equal(linear_cross_entropy(hidden, weight, bias, swapped, other), expected)


def test_unlabelled_tokens_are_never_looked_at():
    """Not even NaN in them matters, and their gradient is zero."""
    hidden, weight, bias, labels = problem(60, 16, 20, torch.float32)
    expected = loss_and_gradients(linear_cross_entropy, hidden, weight, bias, labels, torch.float32)
    hidden[labels == -100] = float("nan")
    ours = loss_and_gradients(linear_cross_entropy, hidden, weight, bias, labels, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not ours[1][labels == -100].any()


def test_logits_exist_for_one_chunk_of_labelled_rows(monkeypatch):
    """Counts the rows projected onto the vocabulary: 1,900 of 6,000 tokens are labelled."""
    rows, real = [], module.product

    def counted(x, weight, residual):
        if weight.shape == (40, 8):
            rows.append(x.shape[0])
        return real(x, weight, residual)

    monkeypatch.setattr(module, "product", counted)
    hidden, weight, bias, labels = problem(6000, 8, 40, torch.float32)
    labels[:] = -100
    labels[::3][:1900] = 7
    loss_and_gradients(linear_cross_entropy, hidden, weight, bias, labels, torch.float32)
    assert max(rows) <= module.CHUNK and sum(rows) == 1900


def test_only_what_needs_a_gradient():
    hidden, weight, bias, labels = problem(9, 8, 5, torch.float32)
    all_of_them = loss_and_gradients(
        linear_cross_entropy, hidden, weight, bias, labels, torch.float32
    )
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, bias, labels)
    assert torch.equal(loss, all_of_them[0])
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0] * 1.5, all_of_them[2])
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, bias, labels), loss)


def test_autocast():
    hidden, weight, bias, labels = problem(80, 16, 20, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, bias, labels)
    grads = torch.autograd.grad(loss, [hidden, weight, bias])
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    expected = linear_cross_entropy(*low, labels)
    assert torch.equal(loss, expected)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, low), strict=True):
        assert torch.equal(ours, theirs.float())


def test_backward_twice():
    hidden, weight, bias, labels = problem(9, 8, 5, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, bias, labels)
    first, second = (
        torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bits_of_rows_depend_on_neither_batch_nor_threads():
    logits, labels = torch.randn(90, 5003), torch.randint(0, 5003, (90,))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            dlogits = logits.clone()
            results.append((ops.cross_entropy_rows_grad_(dlogits, labels, 0.5), dlogits))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(ops.cross_entropy_rows(logits[40:42], labels[40:42]), results[0][0][40:42])


def test_references_in_float64(monkeypatch):
    monkeypatch.setattr(
        module,
        "ops",
        SimpleNamespace(
            linear_cross_entropy_grads=module.reference_grads,
            cross_entropy_rows=module.reference_rows,
            cross_entropy_rows_grad_=module.reference_rows_grad_,
        ),
    )
    hidden, weight, bias, labels = problem(6, 4, 5, torch.float64)
    inputs = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: module._LinearCrossEntropy.apply(h, w, b, labels, -100), inputs
    )
    torch.testing.assert_close(module.reference(*inputs, labels, -100), plain(*inputs, labels))


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_label_outside_the_vocabulary(bad):
    hidden, weight, bias, labels = problem(6, 8, 5, torch.float32, labelled=1.0)
    labels[2] = bad
    for grad in (False, True):
        message = rf"labels must lie in \[0, 5\) or be -100, got values from .*{bad}"
        with pytest.raises(IndexError, match=message):
            linear_cross_entropy(hidden.requires_grad_(grad), weight, bias, labels)
    with pytest.raises(IndexError, match=rf"labels must lie in \[0, 5\), got {bad} for row 2"):
        ops.cross_entropy_rows(torch.randn(6, 5), labels)


def test_bad_input():
    hidden, weight, bias, labels = problem(6, 8, 5, torch.float32)
    with pytest.raises(TypeError, match=r"hidden must be float32.*got torch.float64"):
        linear_cross_entropy(hidden.double(), weight, bias, labels)
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16 but hidden is torch.float32"):
        linear_cross_entropy(hidden, weight.bfloat16(), bias, labels)
    with pytest.raises(ValueError, match=r"agree in dim.*hidden \(6, 8\) and weight \(5, 7\)"):
        linear_cross_entropy(hidden, weight[:, :7], bias, labels)
    with pytest.raises(ValueError, match=r"agree in dim.*hidden \(1, 6, 8\)"):
        linear_cross_entropy(hidden.unsqueeze(0), weight, bias, labels)
    with pytest.raises(TypeError, match=r"bias is torch.float16 but weight is torch.float32"):
        linear_cross_entropy(hidden, weight, bias.half(), labels)
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\).*\(5, 8\), got \(4,\)"):
        linear_cross_entropy(hidden, weight, bias[:4], labels)
    with pytest.raises(TypeError, match=r"labels must be int64, got torch.int32"):
        linear_cross_entropy(hidden, weight, bias, labels.int())
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\).*\(6, 8\), got \(5,\)"):
        linear_cross_entropy(hidden, weight, bias, labels[:5])
    with pytest.raises(ValueError, match="labels is on meta but hidden is on cpu"):
        linear_cross_entropy(hidden, weight, bias, labels.to("meta"))
