"""Argument checks of the public functions: errors name the argument and show both sides."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(op: str, **tensors: Tensor) -> None:
    """Raises TypeError unless every tensor is float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}"
            )


def check_same_device(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all tensors are on the device of the first."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first} is on {reference.device}"
            )


def check_same_dtype(op: str, **tensors: Tensor) -> None:
    """Raises TypeError unless all tensors have the dtype of the first."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype} but {first} is {reference.dtype}")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple, because: str) -> None:
    """Raises ValueError unless `tensor` has the expected shape (a tuple or torch.Size)."""
    if tensor.shape != expected:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(expected)} to match {because},"
            f" got {tuple(tensor.shape)}"
        )


def check_cu_seqlens(op: str, cu_seqlens: Tensor) -> None:
    """Raises unless cu_seqlens is an int32 vector of at least one offset. Never reads its values:
    that would make the host wait for the device. The CPU kernels check them."""
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}"
        )


def check_cu_seqlens_values(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raises ValueError unless the offsets begin with 0, never fall and end within the tokens.

    For references, and for tensors on the CPU only: elsewhere it would make the host wait.
    """
    if cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > tokens or offsets != sorted(offsets):
        raise ValueError(
            f"{op}: cu_seqlens must begin with 0, never fall and end at or before the {tokens}"
            f" tokens, got {offsets}"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """x in the dtype that references compute in: float32, or float64 where x is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
