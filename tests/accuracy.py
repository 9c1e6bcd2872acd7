"""The one rule for "correct": truth is float64, our error at most twice that of plain PyTorch.

A tolerance in digits would have to be guessed for every op, dtype and shape, and a guess that is
too loose hides a wrong kernel. Plain PyTorch in the same dtype is the yardstick instead.
"""

import torch
from torch import Tensor


def rounding_step(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbouring values of `dtype` at each value of `truth`."""
    magnitude = truth.abs().clamp(min=torch.finfo(dtype).tiny)
    return torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(magnitude)) / 2


def assert_accurate(ours: Tensor, plain: Tensor, truth: Tensor, what: str = "output") -> None:
    """Asserts |ours - truth| <= 2 * |plain - truth| + one rounding step, elementwise.

    Elementwise means against the plain error of the elements around: a single element's plain
    error can be zero by luck, so the yardstick is its largest over the tensor's last axis, and for
    a vector over all of it. The rounding step is that of the output's dtype at the true value.

    Args:
        ours: the result under test.
        plain: plain PyTorch in the same dtype, same shape.
        truth: float64, same shape.
        what: named in the failure.
    """
    assert ours.shape == plain.shape == truth.shape, (
        f"{what}: shapes {tuple(ours.shape)}, {tuple(plain.shape)}, {tuple(truth.shape)}"
    )
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype} but plain PyTorch gives {plain.dtype}"
    assert truth.dtype == torch.float64, f"{what}: truth is {truth.dtype}"
    if ours.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    error = (ours.double() - truth).abs()
    plain_error = (plain.double() - truth).abs()
    yardstick = plain_error.amax(-1, keepdim=True) if truth.dim() > 1 else plain_error.max()
    excess = error - 2 * yardstick - 2 * rounding_step(truth, ours.dtype)
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{what}: error {error.flatten()[worst]:.3e} at {worst} of {tuple(truth.shape)}, where"
        f" plain PyTorch's is at most {yardstick.expand_as(error).flatten()[worst]:.3e}"
        f" (ours {ours.flatten()[worst]}, truth {truth.flatten()[worst]})"
    )
