"""What every training loop asks of accelerate and torch.distributed."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CONFIG = "config.yaml"  # a run's settings, in its output


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the message says where the batch is."""


def start_accelerator() -> Accelerator:
    """For one process, DDP, FSDP2 or DeepSpeed, as torchrun or `accelerate launch` says."""
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # or accelerate ignores torchrun on a machine without
        mixed_precision="no",  # it would cast the residual stream too: the loops autocast
        gradient_accumulation_steps=1,  # until the number of processes is known
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # One process may download, look through data or upload while the others wait.
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),
        ],
    )


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any]:
    """The model and the optimizer as the engine wraps them."""
    with warnings.catch_warnings():
        # torch renames broadcast_buffers; accelerate does not know the new name yet.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return accelerator.prepare(model, optimizer)


def whole(norm: Tensor | float | None, like: Tensor) -> Tensor:
    """A gradient norm as (1,) of the dtype and device of `like`; FSDP's comes as a DTensor, and
    DeepSpeed has none before its first step."""
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return torch.as_tensor(0.0 if norm is None else norm).to(like).reshape(1)
