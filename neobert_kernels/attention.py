"""Bidirectional attention over packed sequences: softmax(scale * q kᵀ) v, nothing across sequences.

Vaswani et al. 2017, eq. 1, within each sequence. The sequences lie one after another along the
token axis and `cu_seqlens` says where each begins; there is no padding and no mask.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import (
    at_least_float32,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_dtype,
    check_same_device,
    check_same_dtype,
)
from ._library import define, ops


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
) -> Tensor:
    """Attention of every token to the tokens of its own sequence.

    Args:
        q, k, v: (tokens, heads, head_dim) float32, bfloat16 or float16; any strides with a
            contiguous last axis, so views of a packed projection serve as they are.
        cu_seqlens: (sequences + 1,) int32, on the same device: sequence i is tokens
            cu_seqlens[i] to cu_seqlens[i + 1]. Starts at 0, never falls, ends at or before
            `tokens`; tokens beyond the last offset belong to no sequence and get zeros. Empty
            sequences are legal.
        max_seqlen: length of the longest sequence, or more. A Python int, so that no device is
            waited for.
        scale: multiplies q kᵀ; head_dim ** -0.5 if None.

    Returns:
        (tokens, heads, head_dim) contiguous, in q.dtype; softmax and sums in float32.
        Differentiable in q, k and v.

    What a sequence gets depends on nothing but the sequence, to the bit. The one exception is the
    GPU's gradient of q in a sequence of more than 128 tokens (in float32, of any), whose sums are
    in no fixed order unless `torch.use_deterministic_algorithms` asks for one.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes or devices that do not fit; on the CPU also offsets that do not fit the
            tokens or max_seqlen, and on a GPU a head_dim other than 64 and 128. For a GPU the host
            does not read the offsets, since it would have to wait: there a sequence of more than
            max_seqlen tokens gets NaN, and offsets that fall or leave the tokens give anything,
            but touch no memory outside the tensors.
    """
    check_dtype("varlen_attention", q=q, k=k, v=v)
    check_same_dtype("varlen_attention", q=q, k=k, v=v)
    check_same_device("varlen_attention", q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            "varlen_attention: q, k and v must have one shape (tokens, heads, head_dim), got"
            f" q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError(
            "varlen_attention: q, k and v must have a contiguous last axis, got strides"
            f" q {q.stride()}, k {k.stride()}, v {v.stride()}"
        )
    scale = _check_common("varlen_attention", cu_seqlens, max_seqlen, scale, q.shape[-1])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _VarlenAttention.apply(q, k, v, cu_seqlens, max_seqlen, scale)
    return ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale)[0]


def varlen_attention_qkv(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None
) -> Tensor:
    """`varlen_attention` on NeoBERT's packed projection; its backward writes one packed gradient.

    Args:
        qkv: (tokens, heads, 3, head_dim) contiguous, [q, k, v] along the third axis.
        cu_seqlens, max_seqlen, scale: as for `varlen_attention`.

    Returns:
        (tokens, heads, head_dim) in qkv.dtype. Differentiable in qkv.

    Raises:
        As `varlen_attention`.
    """
    check_dtype("varlen_attention_qkv", qkv=qkv)
    check_same_device("varlen_attention_qkv", qkv=qkv, cu_seqlens=cu_seqlens)
    if qkv.dim() != 4 or qkv.shape[2] != 3 or not qkv.is_contiguous():
        raise ValueError(
            "varlen_attention_qkv: qkv must be contiguous with shape (tokens, heads, 3, head_dim),"
            f" got shape {tuple(qkv.shape)}, strides {qkv.stride()}"
        )
    scale = _check_common("varlen_attention_qkv", cu_seqlens, max_seqlen, scale, qkv.shape[-1])
    return unchecked_varlen_attention_qkv(qkv, cu_seqlens, max_seqlen, scale)


def unchecked_varlen_attention_qkv(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """As `varlen_attention_qkv`, for tensors that the caller has checked (`unchecked.py`)."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _VarlenAttentionQKV.apply(qkv, cu_seqlens, max_seqlen, scale)
    return ops.varlen_attention(*qkv.unbind(2), cu_seqlens, max_seqlen, scale)[0]


def _check_common(
    op: str, cu_seqlens: Tensor, max_seqlen: int, scale: float | None, head_dim: int
) -> float:
    check_cu_seqlens(op, cu_seqlens)
    if isinstance(max_seqlen, Tensor):
        raise TypeError(f"{op}: max_seqlen must be a Python int, got a tensor")
    if head_dim < 1:
        raise ValueError(f"{op}: head_dim must be at least 1, got {head_dim}")
    return head_dim**-0.5 if scale is None else scale


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, scale):
        out, lse = ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.max_seqlen, ctx.scale = max_seqlen, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        dqkv = ops.varlen_attention_bwd(
            dout.contiguous(), q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale
        )
        return *dqkv.unbind(2), None, None, None


class _VarlenAttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, scale):
        out, lse = ops.varlen_attention(*qkv.unbind(2), cu_seqlens, max_seqlen, scale)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens)
        ctx.max_seqlen, ctx.scale = max_seqlen, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, lse, cu_seqlens = ctx.saved_tensors
        dqkv = ops.varlen_attention_bwd(
            dout.contiguous(), *qkv.unbind(2), out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale
        )
        return dqkv, None, None, None


def _boundaries(op: str, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> list[tuple[int, int]]:
    """(start, end) of each sequence, checked: a slice beyond the tokens would be cut in silence."""
    check_cu_seqlens_values(op, cu_seqlens, tokens)
    boundaries = list(pairwise(cu_seqlens.tolist()))
    longest = max((end - start for start, end in boundaries), default=0)
    if longest > max_seqlen:
        raise ValueError(
            f"{op}: cu_seqlens gives a sequence of {longest} tokens, but max_seqlen is {max_seqlen}"
        )
    return boundaries


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out (tokens, heads, head_dim) and the log-sum-exp of the scaled scores (heads, tokens)."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    q32, k32, v32 = (at_least_float32(t).transpose(0, 1) for t in (q, k, v))
    lse = q32.new_zeros(q.shape[1], q.shape[0])
    for start, end in _boundaries("varlen_attention", cu_seqlens, max_seqlen, q.shape[0]):
        scores = q32[:, start:end] @ k32[:, start:end].transpose(1, 2) * scale
        lse[:, start:end] = torch.logsumexp(scores, -1)
        attended = torch.softmax(scores, -1) @ v32[:, start:end]
        out[start:end] = attended.transpose(0, 1).to(q.dtype)
    return out, lse


def reference_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """[dq, dk, dv] as (tokens, heads, 3, head_dim); the probabilities are recomputed from lse."""
    tokens, heads, head_dim = q.shape
    dqkv = q.new_zeros(tokens, heads, 3, head_dim)
    q32, k32, v32, do32, o32 = (at_least_float32(t).transpose(0, 1) for t in (q, k, v, dout, out))
    for start, end in _boundaries("varlen_attention_bwd", cu_seqlens, max_seqlen, tokens):
        qs, ks, vs, dos, os = (t[:, start:end] for t in (q32, k32, v32, do32, o32))
        p = torch.exp(qs @ ks.transpose(1, 2) * scale - lse[:, start:end].unsqueeze(-1))
        delta = (dos * os).sum(-1, keepdim=True)
        ds = p * (dos @ vs.transpose(1, 2) - delta) * scale
        grads = (ds @ ks, ds.transpose(1, 2) @ qs, p.transpose(1, 2) @ dos)
        dqkv[start:end] = torch.stack(grads, 2).transpose(0, 1).to(q.dtype)
    return dqkv


def _fake(q, k, v, cu_seqlens, max_seqlen, scale):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _fake_bwd(dout, q, k, v, out, lse, cu_seqlens, max_seqlen, scale):
    tokens, heads, head_dim = q.shape
    return q.new_empty(tokens, heads, 3, head_dim)


define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen,"
    " float scale) -> (Tensor out, Tensor lse)",
    reference,
    _fake,
)
define(
    "varlen_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor cu_seqlens, SymInt max_seqlen, float scale) -> Tensor dqkv",
    reference_bwd,
    _fake_bwd,
)
