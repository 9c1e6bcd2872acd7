"""The ways to run an op that every op's benchmark compares: ours, plain PyTorch, compiled, and on a
GPU Liger's and xformers' kernels where they are installed, and our Triton kernel where a CUDA C++
one serves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from neobert_kernels import _compiled
from neobert_kernels._library import python_kernels_serve

IMPLEMENTATIONS = ("ours", "plain", "compiled")
DTYPES = (torch.float32, torch.bfloat16)
DIM, HEADS, HEAD_DIM, WIDTH = 768, 12, 64, 2048
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (64, 1024, 8192, 32768, 131072) if DEVICE == "cuda" else (8192,)
HAS_LIGER = DEVICE == "cuda" and find_spec("liger_kernel") is not None
HAS_XFORMERS = DEVICE == "cuda" and find_spec("xformers") is not None
# Of the ops that have a CUDA C++ kernel, and of those of them that Liger has.
ROW_OP = (*IMPLEMENTATIONS, "triton") if _compiled.CUDA_LOADED else IMPLEMENTATIONS
WITH_LIGER = (*ROW_OP, "liger") if HAS_LIGER else ROW_OP
# Of the one of those that xformers has too, forward only.
WITH_XFORMERS = (*WITH_LIGER, "xformers") if HAS_XFORMERS else WITH_LIGER


def choose(
    name: str, ours: Callable, plain: Callable, **others: Callable[[], Callable]
) -> Callable:
    """The implementation called `name`: our op (also for "triton", see `serving`), plain PyTorch,
    plain PyTorch compiled, or what one of the others imports."""
    if name in others:
        return others[name]()
    if name == "compiled":
        torch._dynamo.reset()
        return torch.compile(plain)
    return plain if name == "plain" else ours


@contextmanager
def serving(name: str | None) -> Iterator[None]:
    """Within, the Triton kernels serve if `name` is "triton"; else what the dispatcher chooses."""
    if name != "triton":
        yield
        return
    with python_kernels_serve("CUDA"):
        yield


def backward(fn: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """A call that runs fn's backward alone, again and again, for all `inputs`."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = fn(*inputs)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)
