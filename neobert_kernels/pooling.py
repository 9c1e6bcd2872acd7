"""One vector per packed sequence: the mean of its tokens, or its first token."""

import torch
from torch import Tensor

from ._checks import at_least_float32, check_cu_seqlens, check_dtype, check_same_device
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
    if torch.is_grad_enabled():
        return _Pool.apply(hidden, cu_seqlens, mode == "mean")
    return ops.pool(hidden, cu_seqlens, mode == "mean")


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, cu_seqlens, mean):
        ctx.save_for_backward(cu_seqlens)
        ctx.mean, ctx.tokens, ctx.dtype = mean, hidden.shape[0], hidden.dtype
        return ops.pool(hidden, cu_seqlens, mean)

    @staticmethod
    def backward(ctx, dpooled):
        (cu_seqlens,) = ctx.saved_tensors
        dhidden = _spread(dpooled, cu_seqlens, ctx.tokens, ctx.mean)
        return dhidden.to(ctx.dtype), None, None


def _sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(tokens,) each token's sequence; `sequences` for tokens beyond the last offset."""
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


def _spread(dpooled: Tensor, cu_seqlens: Tensor, tokens: int, mean: bool) -> Tensor:
    """(tokens, dim) the gradient of each token, from that of its sequence's vector."""
    sequence = _sequence_of(cu_seqlens, tokens)
    share = torch.cat([dpooled, dpooled.new_zeros(1, dpooled.shape[1])])
    if mean:
        lengths = cu_seqlens.diff().clamp(min=1).unsqueeze(-1)
        share = torch.cat([dpooled / lengths, share[-1:]])
        return share[sequence]
    first = (
        torch.arange(tokens, device=cu_seqlens.device)
        == cu_seqlens[sequence.clamp(max=cu_seqlens.shape[0] - 1)]
    )
    return share[sequence] * first.unsqueeze(-1)


def reference(hidden: Tensor, cu_seqlens: Tensor, mean: bool) -> Tensor:
    hidden32, lengths = at_least_float32(hidden), cu_seqlens.diff().unsqueeze(-1)
    if mean:
        sums = hidden32.new_zeros(cu_seqlens.shape[0], hidden.shape[1])
        sums = sums.index_add(0, _sequence_of(cu_seqlens, hidden.shape[0]), hidden32)
        return sums[:-1] / lengths.clamp(min=1)
    padded = torch.cat([hidden32, hidden32.new_zeros(1, hidden.shape[1])])
    return padded[cu_seqlens[:-1]].masked_fill(lengths == 0, 0.0)


define("pool(Tensor hidden, Tensor cu_seqlens, bool mean) -> Tensor", reference)
