"""The masked-LM head and loss: 2,048 tokens, 20 % labelled, 30,522 words, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from compare import DIM

from neobert_kernels import linear_cross_entropy

TOKENS, VOCAB = 2048, 30522


def gather_first(hidden, weight, bias, labels):
    """What a careful user of plain PyTorch writes: logits of the labelled rows alone."""
    rows = labels != -100
    return F.cross_entropy(F.linear(hidden[rows], weight, bias).float(), labels[rows])


def all_rows(hidden, weight, bias, labels):
    """What most training code does."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


@pytest.mark.parametrize(
    "loss", [linear_cross_entropy, gather_first, all_rows], ids=["ours", "plain-gather", "plain"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_step(measure, loss, dtype):
    hidden = torch.randn(TOKENS, DIM).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, DIM) * DIM**-0.5).to(dtype).requires_grad_()
    bias = torch.zeros(VOCAB, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[torch.rand(TOKENS) > 0.2] = -100
    parameters = (hidden, weight, bias)
    flop = 6 * int((labels != -100).sum()) * DIM * VOCAB  # the products that are needed

    def step():
        return torch.autograd.grad(loss(hidden, weight, bias, labels), parameters)

    measure(step, flop=flop, seconds=2)
