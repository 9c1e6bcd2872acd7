"""linear_cross_entropy and its gradients in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate

IGNORE = -100
# tokens, dim, vocab, bias, share of tokens labelled, tokens in a chunk. Vocabularies that no tile
# divides; chunks that are full, partly labelled rows and empty.
CASES = {
    "one chunk": (40, 96, 315, True, 0.3, 64),
    "live and dead chunks": (70, 40, 197, True, 0.4, 16),
    "every token": (70, 40, 197, False, 1.0, 32),
    "several tiles": (150, 96, 131, True, 0.95, 512),
}


def make(tokens, dim, vocab, bias, share, dtype):
    hidden, weight = torch.randn(tokens, dim).to(dtype), (0.3 * torch.randn(vocab, dim)).to(dtype)
    labels = torch.randint(0, vocab, (tokens,))
    labels[torch.randperm(tokens)[round(share * tokens) :]] = IGNORE
    return hidden, weight, torch.randn(vocab).to(dtype) if bias else None, labels


def plain_torch(hidden, weight, bias, labels, double=False):
    """Loss and gradients (dbias empty without a bias) by autograd, all in float64 if `double`."""
    leaves = [t if t is None else t.double() if double else t for t in (hidden, weight, bias)]
    leaves = [t if t is None else t.detach().requires_grad_() for t in leaves]
    logits = F.linear(*leaves)
    logits = logits.float() if logits.dtype == torch.float16 else logits
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
    loss.backward()
    grads = [torch.empty(0, dtype=loss.dtype) if t is None else t.grad for t in leaves]
    return loss.detach(), *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradients(kernels, monkeypatch, case, dtype):
    *sizes, chunk = case
    monkeypatch.setattr(kernels, "MIN_CHUNK", chunk)
    check(kernels, sizes, dtype)


def test_one_token(kernels):
    # In half precision only: in float32 all rests on the error of one row, so on luck.
    check(kernels, (1, 64, 129, True, 1.0), torch.float16)


def dbias_magnitude(hidden, weight, bias, labels):
    """The mean of |p - y| over labelled tokens, float64. A word that is a label several times has a
    far larger gradient than the others, and rounds as far."""
    if bias is None:
        return None
    labelled = labels != IGNORE
    logits = F.linear(hidden[labelled].double(), weight.double(), bias.double())
    return (logits.softmax(-1) - F.one_hot(labels[labelled], len(weight))).abs().mean(0)


def check(kernels, sizes, dtype):
    hidden, weight, bias, labels = make(*sizes, dtype)
    ours = kernels.linear_cross_entropy_grads(hidden, weight, bias, labels, IGNORE)
    plain = plain_torch(hidden, weight, bias, labels)
    truth = plain_torch(hidden, weight, bias, labels, double=True)
    names = ("loss", "dhidden", "dweight", "dbias")
    for name, *tensors in zip(names, ours, plain, truth, strict=True):
        # A row of dweight has the errors of a few logits, and plain PyTorch's are now and then
        # small by luck: its largest over all rows is the yardstick.
        scale = dbias_magnitude(hidden, weight, bias, labels) if name == "dbias" else None
        assert_accurate(*(tensor.flatten() for tensor in tensors), name, scale)
    loss = kernels.linear_cross_entropy(hidden, weight, bias, labels, IGNORE)
    assert torch.equal(loss, ours[0]), "the same bits with and without gradients"


@pytest.mark.parametrize("tokens", [7, 0])
def test_no_labelled_token(kernels, tokens):
    hidden, weight, bias, labels = make(tokens, 40, 100, True, 0.0, torch.float32)
    loss, *gradients = kernels.linear_cross_entropy_grads(hidden, weight, bias, labels, IGNORE)
    assert loss.isnan() and F.cross_entropy(torch.zeros(len(labels), 100), labels).isnan()
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("label", [-1, 100])
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(kernels, label):
    hidden, weight, bias, labels = make(7, 40, 100, True, 1.0, torch.float32)
    labels[3] = label
    loss, dhidden, *_ = kernels.linear_cross_entropy_grads(hidden, weight, bias, labels, IGNORE)
    assert loss.isnan() and dhidden[3].isnan().all()


def test_a_forbidden_word(kernels):
    # A bias of -inf over a whole tile of the vocabulary.
    hidden, weight, bias, labels = make(5, 40, 300, True, 1.0, torch.float32)
    bias[64:256] = float("-inf")
    labels.clamp_(max=63)
    loss = kernels.linear_cross_entropy(hidden, weight, bias, labels, IGNORE)
    plain = plain_torch(hidden, weight, bias, labels)
    truth = plain_torch(hidden, weight, bias, labels, double=True)
    assert_accurate(loss, plain[0], truth[0])


def test_confident_predictions_have_tiny_gradients(kernels):
    # p - 1 at the label, where p is almost 1: only a log-sum-exp of the very logits that p is
    # taken from gets this right in half precision.
    hidden = 1.1 * torch.eye(8, 64).half()
    weight = torch.zeros(100, 64).half()
    weight[:8, :8] = 20.3 * torch.eye(8).half()
    labels = torch.arange(8)
    ours = kernels.linear_cross_entropy_grads(hidden, weight, None, labels, IGNORE)
    plain = plain_torch(hidden, weight, None, labels)
    truth = plain_torch(hidden, weight, None, labels, double=True)
    for name, *tensors in zip(("loss", "dhidden", "dweight"), ours, plain, truth, strict=False):
        assert_accurate(*tensors, name)


def test_errors(kernels):
    hidden, weight, bias, labels = make(7, 40, 100, True, 1.0, torch.float32)
    with pytest.raises(TypeError, match="hidden must be float32, bfloat16 or float16"):
        kernels.linear_cross_entropy(hidden.double(), weight.double(), None, labels, IGNORE)
    with pytest.raises(TypeError, match=r"weight is torch\.float16 but hidden is torch\.float32"):
        kernels.linear_cross_entropy(hidden, weight.half(), bias, labels, IGNORE)
