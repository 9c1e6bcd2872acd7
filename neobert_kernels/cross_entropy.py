"""The masked-language-model head and its loss, on the labelled tokens alone."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import at_least_float32, check_dtype, check_same_device, check_same_dtype, check_shape
from ._library import define, has_kernel, impl, ops
from .linear import product

# Rows whose logits are in memory at one time: 1,024 x 30,522 float32 are 125 MB. Each chunk after
# the first reads and writes the weight's gradient once more.
CHUNK = 1024


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
    It is rounded to the inputs' dtype there, so that in float16 a loss scale comes too late to keep
    small gradients from the denormal numbers: train in bfloat16 or under autocast to it.

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
        check_shape(op, "bias", bias, weight.shape[:1], f"weight {tuple(weight.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels must be int64, got {labels.dtype}")
    check_shape(op, "labels", labels, hidden.shape[:1], f"hidden {tuple(hidden.shape)}")
    if torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, ignore_index)
    return ops.linear_cross_entropy(hidden, weight, bias, labels, ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index):
        loss, dhidden, dweight, dbias = ops.linear_cross_entropy_grads(
            hidden, weight, bias, labels, ignore_index
        )
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.has_bias = bias is not None
        return loss

    @staticmethod
    @once_differentiable
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
    if rows.numel():
        least, most = (int(value) for value in labels[rows].aminmax())
        if least < 0 or most >= vocab:
            raise IndexError(
                f"linear_cross_entropy: labels must lie in [0, {vocab}) or be {ignore_index},"
                f" got values from {least} to {most}"
            )
    return rows


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> Tensor:
    rows = _labelled_rows(labels, weight.shape[0], ignore_index)
    losses = [
        ops.cross_entropy_rows(_logits(hidden[chunk], weight, bias), labels[chunk])
        for chunk in rows.split(CHUNK)
    ]
    return torch.cat(losses).mean()


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, None if bias is None else bias.expand(len(x), -1))


def _wide_product(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """total + a @ b.T in total's dtype, which is float32 or wider."""
    if a.dtype == torch.float16 and not has_kernel("linear", a.device.type.upper()):
        a, b = a.to(total.dtype), b.to(total.dtype)  # the product may be beyond float16
    return product(a, b, total)


def reference_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, dhidden, dweight and dbias (empty without a bias); sums over chunks in float32.

    1 / rows is applied last, in float32: it would push the gradients of the logits, which have the
    dtype of hidden, into the denormal numbers of float16.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = _labelled_rows(labels, weight.shape[0], ignore_index)
    losses, dhidden = [], torch.zeros_like(hidden)
    # Rows of zeros that take no memory, until there is a sum to add to.
    zeros = hidden.new_zeros(1, hidden.shape[1], dtype=wide)
    dweight = zeros.expand(weight.shape)
    dbias = torch.zeros(0 if bias is None else bias.shape[0], dtype=wide, device=weight.device)
    share = 1 / max(1, len(rows))
    for chunk in rows.split(CHUNK):
        x = hidden[chunk]
        dlogits = _logits(x, weight, bias)
        losses.append(ops.cross_entropy_rows_grad_(dlogits, labels[chunk], 1.0))
        if bias is not None:
            dbias += dlogits.sum(0, dtype=wide)
        dx = _wide_product(dlogits, weight.t(), zeros.expand(x.shape))
        dhidden[chunk] = _scaled(dx, share, hidden.dtype)
        dweight = _wide_product(dlogits.t(), x.t(), dweight)
    dweight, dbias = (_scaled(total, share, weight.dtype) for total in (dweight, dbias))
    return torch.cat(losses).mean(), dhidden, dweight, dbias


def _scaled(total: Tensor, share: float, dtype: torch.dtype) -> Tensor:
    """total * share, rounded once, in one pass."""
    return torch.mul(total, share, out=torch.empty(total.shape, dtype=dtype, device=total.device))


def reference_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,) the cross entropy of each row of logits (rows, vocab) with its label."""
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def reference_rows_grad_(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """As `reference_rows`, and logits become scale times the gradient of their row's loss."""
    log_probs = F.log_softmax(at_least_float32(logits), -1)
    row = torch.arange(logits.shape[0], device=logits.device)
    losses = -log_probs[row, labels]
    dlogits = log_probs.exp()
    dlogits[row, labels] -= 1
    logits.copy_(dlogits * scale)
    return losses


def _fake(hidden, weight, bias, labels, ignore_index):
    return hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))


def _fake_grads(hidden, weight, bias, labels, ignore_index):
    loss = _fake(hidden, weight, bias, labels, ignore_index)
    dbias = torch.empty_like(bias) if bias is not None else loss.new_empty(0)
    return loss, torch.empty_like(hidden), torch.empty_like(weight), dbias


def _fake_rows(logits, labels, scale=1.0):
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


_ARGUMENTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index"
define(f"linear_cross_entropy({_ARGUMENTS}) -> Tensor loss", reference, _fake)
define(
    f"linear_cross_entropy_grads({_ARGUMENTS})"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    reference_grads,
    _fake_grads,
)
define(
    "cross_entropy_rows(Tensor logits, Tensor labels) -> Tensor losses",
    reference_rows,
    _fake_rows,
)
define(
    "cross_entropy_rows_grad_(Tensor(a!) logits, Tensor labels, float scale) -> Tensor losses",
    reference_rows_grad_,
    _fake_rows,
)
if has_kernel("cross_entropy_rows", "CPU"):
    # The same composition: on the CPU its GEMMs are the library's and its rows the C++ kernel's.
    impl("linear_cross_entropy", "CPU")(reference)
    impl("linear_cross_entropy_grads", "CPU")(reference_grads)
