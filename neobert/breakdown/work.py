"""The FLOP and bytes of each op, counted below autograd while a step runs once, untimed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Work:
    """Of all calls of an op: floating-point operations of its matrix products, and the bytes that
    it must at least read and write."""

    calls: int = 0
    flop: int = 0
    bytes: int = 0


class WorkCounter(TorchDispatchMode):
    """Within, every op that computes something is counted under its dispatcher name.

    Ops that an op calls in its turn are part of it. Views and bare allocations are left out: they
    move nothing, and their time is the host's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: defaultdict[str, Work] = defaultdict(Work)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not _moves_nothing(func):
            name = func._schema.name
            work = self.ops[out_of_place(name)]
            work.calls += 1
            work.flop += FLOP[name](*args) if name in FLOP else 0
            work.bytes += _moved(func, args, kwargs or {}, out)
        return out


def out_of_place(name: str) -> str:
    """add for add_: autograd sums gradients in place, but not while they are counted."""
    return name.rstrip("_") if name.startswith("aten::") else name


def _moves_nothing(func: Any) -> bool:
    """Views, and what only allocates."""
    name = func._schema.name.removeprefix("aten::")
    if name.startswith(("empty", "new_empty", "_local_scalar_dense")) or name == "detach":
        return True
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


def _bytes(t: Tensor) -> int:
    """Of the distinct elements: an expanded axis is read once."""
    elements = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _moved(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    name, arguments = func._schema.name, func._schema.arguments
    results = _tensors(out)
    if name in GATHERS:
        return 2 * sum(map(_bytes, results))  # of the table only the rows that are asked for
    given = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
    changed = _tensors([given.get(a.name) for a in arguments if a.alias_info])
    new = [t for t in results if not any(t is c for c in changed)]
    read = [
        t for t in _tensors(given) if name not in OVERWRITES or not any(t is c for c in changed)
    ]
    distinct = {(t.data_ptr(), t.shape): t for t in read}
    moved = sum(map(_bytes, (*distinct.values(), *changed, *new)))
    if name == "neobert::rotary_qkv_":
        moved -= 2 * _bytes(args[0]) // 3  # v is neither read nor written
    return moved


GATHERS = {"aten::embedding", "aten::index_select", "aten::index"}
OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::mul.out"}


def _product(x: Tensor, weight: Tensor, *_: Any) -> int:
    """x @ weight.T"""
    return 2 * x.shape[0] * x.shape[1] * weight.shape[0]


def _mm(a: Tensor, b: Tensor, *_: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _pairs(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().long().square().sum())


def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any) -> int:
    """Two products of a sequence's queries and keys."""
    return 4 * q.shape[1] * q.shape[2] * _pairs(cu_seqlens)


def _attention_bwd(dout: Tensor, q, k, v, out, lse, cu_seqlens: Tensor, *_: Any) -> int:
    """Five: the scores again, and the gradients of weights, v, q and k."""
    return 10 * q.shape[1] * q.shape[2] * _pairs(cu_seqlens)


def _loss(products: int) -> Callable[..., int]:
    def flop(hidden: Tensor, weight: Tensor, bias, labels: Tensor, ignore_index: int) -> int:
        return products * 2 * int((labels != ignore_index).sum()) * weight.numel()

    return flop


FLOP: dict[str, Callable[..., int]] = {
    "neobert::linear": _product,
    "neobert::linear_swiglu": _product,
    "neobert::batch_invariant_linear": _product,
    "neobert::varlen_attention": _attention,
    "neobert::varlen_attention_bwd": _attention_bwd,
    "neobert::linear_cross_entropy": _loss(1),
    "neobert::linear_cross_entropy_grads": _loss(3),
    "aten::mm": _mm,
    "aten::bmm": _mm,
    "aten::addmm": lambda c, a, b, *_: _mm(a, b),
}
