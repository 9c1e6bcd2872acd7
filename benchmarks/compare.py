"""The three ways to run an op that every op's benchmark compares: ours, plain PyTorch, compiled."""

from collections.abc import Callable

import torch
from torch import Tensor

IMPLEMENTATIONS = ("ours", "plain", "compiled")
DTYPES = (torch.float32, torch.bfloat16)
TOKENS, DIM, HEADS, HEAD_DIM, WIDTH = 8192, 768, 12, 64, 2048


def choose(name: str, ours: Callable, plain: Callable) -> Callable:
    """The implementation called `name`: our op, plain PyTorch, or plain PyTorch compiled."""
    if name == "compiled":
        torch._dynamo.reset()
        return torch.compile(plain)
    return ours if name == "ours" else plain


def backward(fn: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """A call that runs fn's backward alone, again and again, for all `inputs`."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = fn(*inputs)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)
