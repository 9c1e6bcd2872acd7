"""Masked-language-model loss: 2,048 tokens, a fifth of them labelled, on NeoBERT's vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from variants import choose, each_dtype

from neobert_kernels import linear_cross_entropy

TOKENS, DIM, VOCAB, LABELLED = 2048, 768, 30522, 410


def problem(dtype):
    hidden = torch.randn(TOKENS, DIM, dtype=dtype)
    weight, bias = torch.randn(VOCAB, DIM).div(28).to(dtype), torch.zeros(VOCAB, dtype=dtype)
    labels = torch.full((TOKENS,), -100)
    labels[torch.randperm(TOKENS)[:LABELLED]] = 1234
    return hidden, weight, bias, labels


def plain(hidden, weight, bias, labels):
    """Logits of the labelled rows alone: a fifth of what they cost on every row."""
    rows = (labels != -100).nonzero().squeeze(-1)
    return F.cross_entropy(F.linear(hidden[rows], weight, bias).float(), labels[rows])


@pytest.mark.parametrize("variant", ["ours", "plain"])
@each_dtype
def test_loss(measure, variant, dtype):
    arguments, fn = problem(dtype), choose(variant, linear_cross_entropy, plain)
    with torch.inference_mode():
        measure(lambda: fn(*arguments), flop=2 * LABELLED * DIM * VOCAB)


@pytest.mark.parametrize("variant", ["ours", "plain"])
@each_dtype
def test_loss_and_gradients(measure, variant, dtype):
    *inputs, labels = problem(dtype)
    leaves = [t.requires_grad_() for t in inputs]
    fn = choose(variant, linear_cross_entropy, plain)

    def run():
        torch.autograd.grad(fn(*leaves, labels), leaves)

    measure(run, flop=6 * LABELLED * DIM * VOCAB)
