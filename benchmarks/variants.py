"""The three ways each op is run: this library, plain PyTorch, and plain PyTorch compiled."""

from collections.abc import Callable

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_variant = pytest.mark.parametrize("variant", ["ours", "plain", "compiled"])


def choose(variant: str, ours: Callable, plain: Callable) -> Callable:
    """The function that `variant` names; compiled anew, for its own shape alone."""
    if variant == "ours":
        return ours
    if variant == "plain":
        return plain
    torch._dynamo.reset()
    return torch.compile(plain, fullgraph=True, dynamic=False)


def backward_of(fn: Callable, inputs: list[torch.Tensor]) -> Callable[[], object]:
    """A call of the backward alone: the graph is built once and kept."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outs = fn(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    douts = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)
