"""The masked-language-model head and its loss, on the labelled tokens alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import at_least_float32, check_dtype, check_same_device, check_same_dtype
from ._library import define, ops

# Rows whose logits are in memory at one time: 512 x 30,522 float32 are 63 MB.
CHUNK = 512


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
) -> Tensor:
    """Mean cross entropy of softmax(hidden @ weight.T + bias) over the labelled tokens.

    Logits exist for labelled tokens only, a chunk of rows at a time. Where a gradient is needed
    it is computed in the forward pass, chunk by chunk, so that no logits are kept or recomputed.

    Args:
        hidden: (tokens, dim) float32, bfloat16 or float16.
        weight: (vocab, dim) in hidden.dtype (any dtype under autocast).
        bias: (vocab,) or None, in weight.dtype.
        labels: (tokens,) int64, the target id, or ignore_index where there is none.
        ignore_index: the label that means "no label".

    Returns:
        A float32 scalar; NaN if no token is labelled, as torch.nn.functional.cross_entropy.
        Log-sum-exp in float32. Differentiable in hidden, weight and bias.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes or devices that do not fit.
        IndexError: a label outside the vocabulary (CPU).
    """
    op = "linear_cross_entropy"
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    check_dtype(op, hidden=hidden, weight=weight)
    check_same_dtype(op, hidden=hidden, weight=weight)
    check_same_device(op, hidden=hidden, weight=weight, labels=labels)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden (tokens, dim) and weight (vocab, dim) must agree in dim,"
            f" got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        )
    if bias is not None:
        check_same_dtype(op, weight=weight, bias=bias)
        check_same_device(op, weight=weight, bias=bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"{op}: bias must have shape ({weight.shape[0]},) to match weight"
                f" {tuple(weight.shape)}, got {tuple(bias.shape)}"
            )
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels must be int64, got {labels.dtype}")
    if tuple(labels.shape) != (hidden.shape[0],):
        raise ValueError(
            f"{op}: labels must have shape ({hidden.shape[0]},) to match hidden"
            f" {tuple(hidden.shape)}, got {tuple(labels.shape)}"
        )
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, ignore_index)
    return ops.linear_cross_entropy(hidden, weight, bias, labels, ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index):
        if not any(ctx.needs_input_grad):
            return ops.linear_cross_entropy(hidden, weight, bias, labels, ignore_index)
        loss, dhidden, dweight, dbias = ops.linear_cross_entropy_grads(
            hidden, weight, bias, labels, ignore_index
        )
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.has_bias = bias is not None
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dhidden, dweight, dbias = ctx.saved_tensors
        return (
            dhidden * dloss.to(dhidden.dtype),
            dweight * dloss.to(dweight.dtype),
            dbias * dloss.to(dbias.dtype) if ctx.has_bias else None,
            None,
            None,
        )


def _labelled_rows(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    rows = (labels != ignore_index).nonzero().squeeze(-1)
    kept = labels[rows]
    if kept.numel() and not (0 <= int(kept.min()) and int(kept.max()) < vocab):
        raise IndexError(
            f"linear_cross_entropy: labels must lie in [0, {vocab}) or be {ignore_index},"
            f" got values from {int(kept.min())} to {int(kept.max())}"
        )
    return rows


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> Tensor:
    total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    total = total.to(hidden.device)
    rows = _labelled_rows(labels, weight.shape[0], ignore_index)
    for chunk in rows.split(CHUNK):
        logits = at_least_float32(F.linear(hidden[chunk], weight, bias))
        total += F.cross_entropy(logits, labels[chunk], reduction="sum")
    return total / rows.numel()


def reference_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, dhidden, dweight and dbias (empty without a bias); sums over rows in float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    dhidden = torch.zeros_like(hidden)
    dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    dbias = torch.zeros(0 if bias is None else bias.shape[0], dtype=wide, device=weight.device)
    rows = _labelled_rows(labels, weight.shape[0], ignore_index)
    for chunk in rows.split(CHUNK):
        x, target = hidden[chunk], labels[chunk]
        log_probs = F.log_softmax(at_least_float32(F.linear(x, weight, bias)), -1)
        total += F.nll_loss(log_probs, target, reduction="sum")
        dlogits = log_probs.exp_()
        dlogits[torch.arange(len(chunk), device=chunk.device), target] -= 1
        dlogits /= rows.numel()
        if bias is not None:
            dbias += dlogits.sum(0)
        dlogits = dlogits.to(hidden.dtype)
        dhidden[chunk] = dlogits @ weight
        dweight += dlogits.t() @ x
    dbias = dbias if bias is None else dbias.to(bias.dtype)
    return total / rows.numel(), dhidden, dweight.to(weight.dtype), dbias


def _fake(hidden, weight, bias, labels, ignore_index):
    return hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))


def _fake_grads(hidden, weight, bias, labels, ignore_index):
    loss = _fake(hidden, weight, bias, labels, ignore_index)
    dbias = torch.empty_like(bias) if bias is not None else loss.new_empty(0)
    return loss, torch.empty_like(hidden), torch.empty_like(weight), dbias


_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index"
define(f"linear_cross_entropy({_ARGUMENTS}) -> Tensor loss", reference, _fake)
define(
    f"linear_cross_entropy_grads({_ARGUMENTS})"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    reference_grads,
    _fake_grads,
)
