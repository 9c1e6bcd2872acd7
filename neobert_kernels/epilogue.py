"""The block's GEMMs with everything between them in their epilogues, for inference.

A pre-norm layer is then five launches: qkv with the norm's rstd and the rotation, attention, wo
with the residual add, w12 with rstd and SwiGLU, w3 with the residual add. What makes the norm
disappear:

    rms_norm(x) @ W.T = rstd(x) * (x @ (W * gain).T)

The gain goes into the weight once (`fold_gain`), rstd is one factor for each row, and the sum of
squares that it is made of is taken where x is written, in the epilogue of the GEMM before: over
BLOCK columns at a time, so that the order of the sum does not depend on the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import at_least_float32, check_dtype, check_same_device, check_same_dtype, check_shape
from ._library import define, ops
from .linear import autocast_dtype
from .rotary import check_table
from .rotary import reference as rotary_reference
from .swiglu import reference as swiglu_reference

BLOCK = 128  # columns to a sum of squares


def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """weight * gain, rounded once: the weight of a GEMM whose input's norm has that gain.

    Args:
        weight: (out_features, in_features).
        gain: (in_features,), the norm's weight.

    Returns:
        (out_features, in_features) in weight.dtype.
    """
    return (at_least_float32(weight) * at_least_float32(gain)).to(weight.dtype)


def interleave_gate_up(weight: Tensor) -> Tensor:
    """The rows of a (2 * width, in_features) weight, the gate's before the up's, as gate and up in
    turn: a gate and the value it gates are then neighbours in the GEMM's tile."""
    return weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).contiguous()


def sum_of_squares(x: Tensor) -> Tensor:
    """Each row's sums of squares over BLOCK columns at a time: what `rms_linear_rotary` and
    `rms_linear_swiglu` take beside x, for an x that `linear_add` did not make.

    Args:
        x: (tokens, dim) float32, bfloat16 or float16.

    Returns:
        (tokens, ceil(dim / BLOCK)) float32.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: a shape that does not fit.
        RuntimeError: x requires a gradient, and gradients are enabled.
    """
    check_dtype("sum_of_squares", x=x)
    if x.dim() != 2:
        raise ValueError(f"sum_of_squares: x must have shape (tokens, dim), got {tuple(x.shape)}")
    _check_inference("sum_of_squares", x=x)
    return ops.sum_of_squares(x)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """residual + x @ weight.T, and its sums of squares. For inference.

    Args:
        x: (tokens, in_features) float32, bfloat16 or float16.
        weight: (out_features, in_features) in x.dtype.
        residual: (tokens, out_features); its dtype may differ from that of x.

    Returns:
        (tokens, out_features) in residual.dtype, rounded once, and `sum_of_squares` of that.

    Raises:
        As `sum_of_squares`; ValueError for devices that differ.
    """
    _check_operands("linear_add", x, weight, residual=residual)
    check_same_dtype("linear_add", x=x, weight=weight)
    because = f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
    check_dtype("linear_add", residual=residual)
    check_shape("linear_add", "residual", residual, (x.shape[0], weight.shape[0]), because)
    _check_inference("linear_add", x=x, weight=weight, residual=residual)
    return ops.linear_add(x, weight, residual)


def rms_linear_swiglu(x: Tensor, squares: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """swiglu(rms_norm(x) @ weight.T), the norm's gain folded into the weight. For inference.

    Args:
        x: (tokens, in_features) float32, bfloat16 or float16.
        squares: (tokens, ceil(in_features / BLOCK)) float32, the sums of squares of x.
        weight: (2 * width, in_features), gate and up in turn (`interleave_gate_up`, `fold_gain`),
            in x.dtype; or bfloat16 or float16 with an x in float32, which is rounded to that.
        eps: added to the mean square.

    Returns:
        (tokens, width) in weight.dtype, computed in float32 and rounded once.

    Raises:
        As `linear_add`.
    """
    _check_rms("rms_linear_swiglu", x, squares, weight)
    if weight.shape[0] % 2:
        raise ValueError(
            f"rms_linear_swiglu: weight must have shape (2 * width, {x.shape[1]}),"
            f" got {tuple(weight.shape)}"
        )
    return ops.rms_linear_swiglu(x, squares, weight, eps)


def rms_linear_rotary(
    x: Tensor,
    squares: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """NeoBERT's packed projection of rms_norm(x), q and k rotated. For inference.

    Args:
        x, squares, eps: as for `rms_linear_swiglu`.
        weight: (heads * 3 * head_dim, in_features), each head's q, k and v in turn, the norm's gain
            folded in (`fold_gain`); its dtype as for `rms_linear_swiglu`.
        cos, sin, positions: as for `apply_rotary`; head_dim is twice the columns of cos.

    Returns:
        (tokens, heads, 3, head_dim) in weight.dtype, computed in float32 and rounded once.

    Raises:
        As `linear_add`; IndexError for a position outside the table (CPU).
    """
    _check_rms("rms_linear_rotary", x, squares, weight)
    if cos.dim() != 2 or weight.shape[0] == 0 or weight.shape[0] % max(6 * cos.shape[1], 1):
        raise ValueError(
            "rms_linear_rotary: weight must have shape (heads * 3 * head_dim, in_features) with a"
            f" head_dim of twice the columns of cos {tuple(cos.shape)}, got {tuple(weight.shape)}"
        )
    check_table("rms_linear_rotary", "x", x, cos, sin, positions, 2 * cos.shape[1])
    return ops.rms_linear_rotary(x, squares, weight, cos, sin, positions, eps)


def _check_operands(op: str, x: Tensor, weight: Tensor, **others: Tensor) -> None:
    check_dtype(op, x=x, weight=weight)
    check_same_device(op, x=x, weight=weight, **others)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"{op}: x (tokens, in_features) and weight (out_features, in_features) must agree in"
            f" in_features, got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )


def _check_rms(op: str, x: Tensor, squares: Tensor, weight: Tensor) -> None:
    _check_operands(op, x, weight, squares=squares)
    if x.dtype not in (weight.dtype, torch.float32):
        raise TypeError(f"{op}: x must be {weight.dtype}, as weight is, or float32, got {x.dtype}")
    if squares.dtype != torch.float32:
        raise TypeError(f"{op}: squares must be float32, got {squares.dtype}")
    expected = (x.shape[0], -(-x.shape[1] // BLOCK))
    check_shape(op, "squares", squares, expected, f"x {tuple(x.shape)}, {BLOCK} columns to a sum")
    _check_inference(op, x=x, squares=squares, weight=weight)


def _check_inference(op: str, **tensors: Tensor) -> None:
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise RuntimeError(
                    f"{op} is for inference and has no backward, but {name} requires a gradient;"
                    " call it under torch.no_grad() or torch.inference_mode()"
                )


def reference_squares(x: Tensor) -> Tensor:
    wide = at_least_float32(x)
    padding = -x.shape[1] % BLOCK
    return F.pad(wide.square(), (0, padding)).unflatten(1, (-1, BLOCK)).sum(2)


def reference_add(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = (at_least_float32(residual) + _product(x, weight)).to(residual.dtype)
    return total, reference_squares(total)


def _rms_linear(x: Tensor, squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32 throughout: before rstd, outliers may take a product beyond float16."""
    x = x if x.dtype == torch.float64 else x.to(weight.dtype)
    rstd = torch.rsqrt(squares.sum(1, keepdim=True) / x.shape[1] + eps)
    return _product(x, weight) * rstd


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """In float32, also where autocast would round what PyTorch multiplies."""
    x, weight = at_least_float32(x), at_least_float32(weight)
    if autocast_dtype(x) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight)
    return F.linear(x, weight)


def reference_swiglu(x: Tensor, squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference_swiglu_keep(x, squares, weight, eps)[0]


def reference_swiglu_keep(
    x: Tensor, squares: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference_swiglu`; also what it gates, as swiglu takes it: gate's columns before up's."""
    pairs = _rms_linear(x, squares, weight, eps).unflatten(1, (-1, 2))
    gate_up = pairs.transpose(1, 2).flatten(1)
    return swiglu_reference(gate_up).to(weight.dtype), gate_up.to(weight.dtype)


def reference_rotary(
    x: Tensor,
    squares: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    eps: float,
) -> Tensor:
    qkv = _rms_linear(x, squares, weight, eps).unflatten(1, (-1, 3, 2 * cos.shape[1]))
    q, k = (rotary_reference(qkv[:, :, i], cos, sin, positions, False) for i in (0, 1))
    return torch.stack([q, k, qkv[:, :, 2]], 2).to(weight.dtype)


def _fake_rotary(x, squares, weight, cos, sin, positions, eps):
    head_dim = 2 * cos.shape[1]
    return weight.new_empty(x.shape[0], weight.shape[0] // (3 * head_dim), 3, head_dim)


define("sum_of_squares(Tensor x) -> Tensor", reference_squares)
define(
    "linear_add(Tensor x, Tensor weight, Tensor residual) -> (Tensor total, Tensor squares)",
    reference_add,
)
define(
    "rms_linear_swiglu(Tensor x, Tensor squares, Tensor weight, float eps) -> Tensor",
    reference_swiglu,
)
define(
    "rms_linear_swiglu_keep(Tensor x, Tensor squares, Tensor weight, float eps)"
    " -> (Tensor y, Tensor gate_up)",
    reference_swiglu_keep,
)
define(
    "rms_linear_rotary(Tensor x, Tensor squares, Tensor weight, Tensor cos, Tensor sin,"
    " Tensor positions, float eps) -> Tensor",
    reference_rotary,
    _fake_rotary,
)
