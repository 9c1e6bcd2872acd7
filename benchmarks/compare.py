"""The ways to run an op that every op's benchmark compares: ours, plain PyTorch, compiled, and
Liger's kernel on a GPU where it is installed."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

IMPLEMENTATIONS = ("ours", "plain", "compiled")
DTYPES = (torch.float32, torch.bfloat16)
DIM, HEADS, HEAD_DIM, WIDTH = 768, 12, 64, 2048
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1024, 8192, 32768, 131072) if DEVICE == "cuda" else (8192,)
HAS_LIGER = DEVICE == "cuda" and find_spec("liger_kernel") is not None
# Of the ops that Liger has.
WITH_LIGER = (*IMPLEMENTATIONS, "liger") if HAS_LIGER else IMPLEMENTATIONS


def choose(
    name: str, ours: Callable, plain: Callable, liger: Callable[[], Callable] | None = None
) -> Callable:
    """The implementation called `name`: our op, plain PyTorch, plain PyTorch compiled, or what
    `liger` imports."""
    if name == "liger" and liger is not None:
        return liger()
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
