"""Packed attention inputs, and the yardstick that every attention kernel's results are held to."""

import itertools
import mmap

import torch
from accuracy import assert_accurate
from torch import Tensor

EDGES = [1, 0, 63, 64, 65, 2, 0, 127, 128, 129, 511, 513, 0]
ARGUMENTS = ("q", "k", "v")


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(lengths: list[int], heads: int, head_dim: int, dtype=torch.float32, beyond: int = 0):
    """A random packed projection and dout, with `beyond` tokens that belong to no sequence."""
    tokens = sum(lengths) + beyond
    qkv = torch.randn(tokens, heads, 3, head_dim).to(dtype)
    return qkv, torch.randn(tokens, heads, head_dim).to(dtype), offsets(lengths)


def plain(qkv: Tensor, dout: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk, dv by softmax(q kᵀ / sqrt(head_dim)) v and autograd, sequence by sequence."""
    q, k, v = (t.to(dtype, copy=True).requires_grad_() for t in qkv.unbind(2))
    outs, bounds = [], cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        qs, ks, vs = (t[start:end].transpose(0, 1) for t in (q, k, v))
        p = torch.softmax(qs @ ks.transpose(1, 2) * qkv.shape[-1] ** -0.5, -1)
        outs.append((p @ vs).transpose(0, 1))
    out = torch.cat([*outs, torch.zeros_like(q[bounds[-1] :])])
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))]


def assert_accurate_by_sequence(
    ours: Tensor, plain: Tensor, truth: Tensor, lengths: list[int], what: str
) -> None:
    """`assert_accurate` on (tokens, heads, head_dim), with a yardstick for each sequence.

    An error in one score is an error in all of a token's output, so a single token has too few
    errors to compare: the yardstick is plain PyTorch's largest error over a whole sequence, and
    over all the short ones together.
    """
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    long = [i for i, length in enumerate(lengths) if length >= 32]
    groups = {f"{lengths[i]} tokens": which == i for i in long}
    groups["short sequences"] = ~torch.isin(which, torch.tensor(long))
    for group, rows in groups.items():
        if rows.any():
            of_group = (t[: sum(lengths)][rows].flatten() for t in (ours, plain, truth))
            assert_accurate(*of_group, f"{what} of {group}")


def far_apart(x: Tensor, stride: int) -> Tensor:
    """x, (tokens, 1, head_dim), with `stride` elements from token to token, in memory of which
    nothing exists but the pages of the rows."""
    memory = mmap.mmap(-1, len(x) * stride * x.element_size())
    whole = torch.frombuffer(memory, dtype=x.dtype)
    return whole.as_strided(x.shape, (stride, x.shape[2], 1)).copy_(x)
