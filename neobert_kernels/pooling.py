"""One vector per packed sequence: the mean of its tokens, or its first token."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import (
    at_least_float32,
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_dtype,
    check_same_device,
)
from ._library import define, ops

MODES = ("mean", "cls")


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: str = "mean") -> Tensor:
    """Pools the tokens of each sequence, in float32.

    Args:
        hidden: (tokens, dim) float32, bfloat16 or float16.
        cu_seqlens: (sequences + 1,) int32, offsets as for `varlen_attention`.
        mode: "mean", or "cls" for the first token of each sequence.

    Returns:
        (sequences, dim) float32, zeros for an empty sequence. Differentiable in hidden.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes, devices or a mode that do not fit; on the CPU also offsets that do not.
    """
    check_dtype("pool", hidden=hidden)
    check_same_device("pool", hidden=hidden, cu_seqlens=cu_seqlens)
    check_cu_seqlens("pool", cu_seqlens)
    if hidden.dim() != 2:
        raise ValueError(f"pool: hidden must have shape (tokens, dim), got {tuple(hidden.shape)}")
    if mode not in MODES:
        raise ValueError(f"pool: mode must be one of {MODES}, got {mode!r}")
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _Pool.apply(hidden, cu_seqlens, mode == "mean")
    return ops.pool(hidden, cu_seqlens, mode == "mean")


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, cu_seqlens, mean):
        ctx.save_for_backward(cu_seqlens)
        ctx.mean, ctx.tokens, ctx.dtype = mean, hidden.shape[0], hidden.dtype
        return ops.pool(hidden, cu_seqlens, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx, dpooled):
        (cu_seqlens,) = ctx.saved_tensors
        return ops.pool_bwd(dpooled, cu_seqlens, ctx.tokens, ctx.mean, ctx.dtype), None, None


def _sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(tokens,) each token's sequence; the number of sequences for those beyond the last offset."""
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


def reference(hidden: Tensor, cu_seqlens: Tensor, mean: bool) -> Tensor:
    check_cu_seqlens_values("pool", cu_seqlens, hidden.shape[0])
    hidden32, lengths = at_least_float32(hidden), cu_seqlens.diff().unsqueeze(-1)
    if mean:
        sums = hidden32.new_zeros(cu_seqlens.shape[0], hidden.shape[1])
        sums = sums.index_add(0, _sequence_of(cu_seqlens, hidden.shape[0]), hidden32)
        return sums[:-1] / lengths.clamp(min=1)
    padded = torch.cat([hidden32, hidden32.new_zeros(1, hidden.shape[1])])
    return padded[cu_seqlens[:-1]].masked_fill(lengths == 0, 0.0)


def reference_bwd(
    dpooled: Tensor, cu_seqlens: Tensor, tokens: int, mean: bool, dtype: torch.dtype
) -> Tensor:
    """(tokens, dim) each token's part of the gradient of its sequence's vector; zeros beyond."""
    check_cu_seqlens_values("pool_bwd", cu_seqlens, tokens)
    sequence = _sequence_of(cu_seqlens, tokens)
    if mean:
        dpooled = dpooled / cu_seqlens.diff().clamp(min=1).unsqueeze(-1)
    share = torch.cat([dpooled, dpooled.new_zeros(1, dpooled.shape[1])])[sequence]
    if not mean:
        first = torch.arange(tokens, device=cu_seqlens.device) == cu_seqlens[sequence]
        share = share * first.unsqueeze(-1)
    return share.to(dtype)


def _fake(hidden: Tensor, cu_seqlens: Tensor, mean: bool) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((cu_seqlens.shape[0] - 1, hidden.shape[1]), dtype=dtype)


def _fake_bwd(
    dpooled: Tensor, cu_seqlens: Tensor, tokens: int, mean: bool, dtype: torch.dtype
) -> Tensor:
    return dpooled.new_empty((tokens, dpooled.shape[1]), dtype=dtype)


define("pool(Tensor hidden, Tensor cu_seqlens, bool mean) -> Tensor", reference, _fake)
define(
    "pool_bwd(Tensor dpooled, Tensor cu_seqlens, SymInt tokens, bool mean, ScalarType dtype)"
    " -> Tensor",
    reference_bwd,
    _fake_bwd,
)
