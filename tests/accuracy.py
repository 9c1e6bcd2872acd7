"""The rule for "correct": truth is float64, and we may err at most twice as far as plain PyTorch.

A tolerance in digits would have to be guessed for every op, dtype and shape, and a guess that is
too loose hides a wrong kernel. Plain PyTorch is the yardstick instead.
"""

import torch
from torch import Tensor


def rounding_error(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding `truth` to `dtype` can err: half the distance between neighbours."""
    _, exponent = torch.frexp(truth.abs().clamp(min=torch.finfo(dtype).tiny))
    return torch.finfo(dtype).eps * torch.ldexp(torch.ones_like(truth), exponent - 1) / 2


def assert_accurate(
    ours: Tensor,
    plain: Tensor,
    truth: Tensor,
    what: str = "output",
    scale: Tensor | None = None,
) -> None:
    """Asserts |ours - truth| <= 2 * (plain PyTorch's error there) + one rounding, elementwise.

    A single element's plain error can be zero by luck, so plain's error "there" is its largest
    over the last axis (over all of it for a vector). The one rounding is to the dtype of ours,
    and for a 16-bit dtype another to float32, which is what is rounded.

    Args:
        ours: the result under test.
        plain: plain PyTorch's result, same shape, in the same dtype or in float32. With float32 the
            test of a 16-bit result is that it was computed in float32 and rounded once: two
            roundings fail.
        truth: float64, same shape.
        what: named in the failure.
        scale: float64, same shape: the magnitude to which an element's rounding errors are
            proportional, such as the sum of the absolute values of its terms. Plain's errors are
            then compared over the last axis relative to it. Without it an element of 1e-3 beside
            one of 1e3 could be anything.
    """
    assert ours.shape == plain.shape == truth.shape, (
        f"{what}: shapes {tuple(ours.shape)}, {tuple(plain.shape)}, {tuple(truth.shape)}"
    )
    assert plain.dtype in (ours.dtype, torch.float32), (
        f"{what}: {ours.dtype} but plain PyTorch gives {plain.dtype}"
    )
    assert truth.dtype == torch.float64, f"{what}: truth is {truth.dtype}"
    if ours.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    error = (ours.double() - truth).abs()
    scale = torch.ones_like(truth) if scale is None else scale.clamp(min=1e-300)
    relative = (plain.double() - truth).abs() / scale
    yardstick = scale * (relative.amax(-1, keepdim=True) if truth.dim() > 1 else relative.max())
    allowed = 2 * yardstick + rounding_error(truth, ours.dtype)
    allowed += rounding_error(truth, torch.float32)
    excess = error - allowed
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{what}: error {error.flatten()[worst]:.3e} at {worst} of {tuple(truth.shape)}, where"
        f" plain PyTorch's is at most {yardstick.flatten()[worst]:.3e}"
        f" (ours {ours.flatten()[worst]}, truth {truth.flatten()[worst]})"
    )
