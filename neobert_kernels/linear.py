"""Linear layers without bias, with what follows them in the block done in the GEMM's epilogue."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import at_least_float32, check_dtype, check_same_device, check_same_dtype
from ._library import define, has_kernel, impl, is_any_autocast_enabled, ops
from .swiglu import reference as swiglu_reference
from .swiglu import swiglu

# The dtypes that PyTorch's own GEMM serves on this CPU, decided once, here: with AMX tiles oneDNN
# multiplies 16-bit matrices several times faster than the vector instructions of our kernel can.
# `python -m neobert_kernels` shows it.
PYTORCH_GEMM_DTYPES = (
    frozenset({torch.bfloat16, torch.float16})
    if torch.cpu._is_amx_tile_supported()
    else frozenset()
)


# And those of the weight's gradient, a sum over tokens with both operands transposed: there oneDNN
# is a tenth faster where the CPU multiplies bfloat16 itself.
PYTORCH_DWEIGHT_DTYPES = (
    PYTORCH_GEMM_DTYPES | {torch.bfloat16}
    if torch.cpu._is_avx512_bf16_supported()
    else PYTORCH_GEMM_DTYPES
)


def linear(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, batch_invariant: bool = False
) -> Tensor:
    """x @ weight.T, plus the residual stream where one is given. Honours autocast.

    Args:
        x: (tokens, in_features) float32, bfloat16 or float16.
        weight: (out_features, in_features) in x.dtype (any dtype under autocast).
        residual: (tokens, out_features) or None; its dtype may differ from that of x.
        batch_invariant: a row's bits depend on that row of x (and of residual) alone, wherever the
            op has a kernel: not on the other rows, their number, its place among them, or the
            threads.
            That keeps the libraries' GEMMs out, which choose how to sum by the number of rows.

    Returns:
        (tokens, out_features) in residual.dtype if a residual is given, else in x.dtype (the
        autocast dtype under autocast). Differentiable in all three. With the compiled CPU kernel
        it is batch-invariant in any case (but see `PYTORCH_GEMM_DTYPES`), and where the CPU
        multiplies bfloat16 itself, denormal bfloat16 inputs and products count as zero.

    Raises:
        TypeError: a dtype that is not served, or x and weight of different dtypes.
        ValueError: shapes or devices that do not fit.
    """
    x, weight = _autocast(x, weight)
    _check("linear", x, weight)
    if residual is not None:
        check_dtype("linear", residual=residual)
        check_same_device("linear", x=x, residual=residual)
        if tuple(residual.shape) != (x.shape[0], weight.shape[0]):
            raise ValueError(
                f"linear: residual must have shape {(x.shape[0], weight.shape[0])} to match"
                f" x {tuple(x.shape)} and weight {tuple(weight.shape)}, got {tuple(residual.shape)}"
            )
    return unchecked_linear(x, weight, residual, batch_invariant)


def unchecked_linear(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, batch_invariant: bool = False
) -> Tensor:
    """As `linear`, for tensors that the caller has checked (`unchecked.py`)."""
    if is_any_autocast_enabled():
        x, weight = _autocast(x, weight)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (residual is not None and residual.requires_grad)
    ):
        return _Linear.apply(x, weight, residual, batch_invariant)
    return product(x, weight, residual, batch_invariant)


def linear_swiglu(x: Tensor, weight: Tensor, batch_invariant: bool = False) -> Tensor:
    """swiglu(x @ weight.T): the first half of the feed-forward block. Honours autocast.

    Without gradients the projection never reaches memory (on devices with a kernel for it); with
    gradients it is kept for the backward.

    Args:
        x: (tokens, in_features) float32, bfloat16 or float16.
        weight: (2 * width, in_features), the gate's rows first, in x.dtype.
        batch_invariant: as `linear`.

    Returns:
        (tokens, width) in x.dtype. Differentiable in both.

    Raises:
        As `linear`; ValueError if weight has an odd number of rows.
    """
    x, weight = _autocast(x, weight)
    _check("linear_swiglu", x, weight)
    if weight.shape[0] % 2:
        raise ValueError(
            f"linear_swiglu: weight must have shape (2 * width, {x.shape[1]}),"
            f" got {tuple(weight.shape)}"
        )
    return unchecked_linear_swiglu(x, weight, batch_invariant)


def unchecked_linear_swiglu(x: Tensor, weight: Tensor, batch_invariant: bool = False) -> Tensor:
    """As `linear_swiglu`, for tensors that the caller has checked (`unchecked.py`)."""
    if is_any_autocast_enabled():
        x, weight = _autocast(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return swiglu(_Linear.apply(x, weight, None, batch_invariant))
    # Only the CPU has a kernel of both; elsewhere a library multiplies, and SwiGLU has its own.
    if _invariant_apart(x) if batch_invariant else (not x.is_cpu or _served_by_pytorch(x)):
        return swiglu(product(x, weight, None, batch_invariant))
    return ops.linear_swiglu(x, weight)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of products on x's device under autocast; None where it is off."""
    if is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return None


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = autocast_dtype(x)
    return (x, weight) if dtype is None else (x.to(dtype), weight.to(dtype))


def _served_by_pytorch(x: Tensor) -> bool:
    return x.dtype in PYTORCH_GEMM_DTYPES and x.is_cpu


def _invariant_apart(x: Tensor) -> bool:
    """Whether batch invariance takes an op of its own: the compiled CPU kernel has it as it is."""
    return not (x.is_cpu and CPU_KERNEL)


def product(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, batch_invariant: bool = False
) -> Tensor:
    """`linear` without its checks and without gradients. On the CPU a transposed operand is read as
    it lies: product(dy, weight.t()) is dy @ weight, product(dy.t(), x.t()) is dy.T @ x."""
    if batch_invariant and _invariant_apart(x):
        return ops.batch_invariant_linear(x, weight, residual)
    # float64 is what references of other ops take.
    if x.dtype == torch.float64 or (_served_by_pytorch(x) and not batch_invariant):
        return reference(x, weight, residual)
    return ops.linear(x, weight, residual)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    check_dtype(op, x=x, weight=weight)
    check_same_dtype(op, x=x, weight=weight)
    check_same_device(op, x=x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x (tokens, in_features) and weight (out_features, in_features) must agree in"
            f" in_features, got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, batch_invariant):
        ctx.save_for_backward(x, weight)
        ctx.residual_dtype = None if residual is None else residual.dtype
        return product(x, weight, residual, batch_invariant)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dresidual = dy if ctx.residual_dtype is not None else None
        dy = dy.to(x.dtype)
        dx = product(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = _dweight(dy, x) if ctx.needs_input_grad[1] else None
        return dx, dweight, dresidual, None


def _dweight(dy: Tensor, x: Tensor) -> Tensor:
    if dy.is_cpu and dy.dtype in PYTORCH_DWEIGHT_DTYPES:
        return torch.mm(dy.t(), x)
    return product(dy.t(), x.t())


def reference(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return F.linear(x, weight)
    if residual.dtype == x.dtype and x.device.type != "cpu":
        return torch.addmm(residual, x, weight.t())  # the library's GEMM adds in its own epilogue
    return (at_least_float32(residual) + F.linear(x, weight)).to(residual.dtype)


def reference_batch_invariant(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """One row at a time, whatever their number. What a residual adds is elementwise."""
    rows = [F.linear(row, weight) for row in x.split(1)]
    y = torch.cat(rows) if rows else x.new_empty(0, weight.shape[0])
    if residual is None:
        return y
    return (at_least_float32(residual) + y).to(residual.dtype)


def _fake_batch_invariant(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else residual.dtype
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def reference_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    return swiglu_reference(F.linear(x, weight))


define("linear(Tensor x, Tensor weight, Tensor? residual) -> Tensor", reference)
define("linear_swiglu(Tensor x, Tensor weight) -> Tensor", reference_swiglu)
define(
    "batch_invariant_linear(Tensor x, Tensor weight, Tensor? residual) -> Tensor",
    reference_batch_invariant,
    _fake_batch_invariant,
)
CPU_KERNEL = has_kernel("linear", "CPU")
if CPU_KERNEL:

    @impl("batch_invariant_linear", "CPU")
    def _batch_invariant_linear(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        return ops.linear(x, weight, residual)
