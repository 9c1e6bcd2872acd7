"""The masked-LM head and loss: 20 % of the tokens labelled, 30,522 words, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, DIM

from neobert_kernels import linear_cross_entropy

TOKENS, VOCAB = 16384 if DEVICE == "cuda" else 2048, 30522


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
    hidden = torch.randn(TOKENS, DIM, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, DIM, device=DEVICE) * DIM**-0.5).to(dtype).requires_grad_()
    bias = torch.zeros(VOCAB, dtype=dtype, device=DEVICE, requires_grad=True)
    labels = torch.randint(VOCAB, (TOKENS,), device=DEVICE)
    labels[torch.rand(TOKENS, device=DEVICE) > 0.2] = -100
    parameters = (hidden, weight, bias)
    flop = 6 * int((labels != -100).sum()) * DIM * VOCAB  # the products that are needed

    def step():
        return torch.autograd.grad(loss(hidden, weight, bias, labels), parameters)

    measure(step, flop=flop, seconds=2)
