"""What every launcher asks of the GPU it launches on, and of the tensors it is given."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from torch import Tensor

from .._checks import check_dtype, check_same_device

# The tile tables have one row for each; a GPU between two of them takes the lower.
ARCHITECTURES = (80, 90, 100)


def check_served(op: str, **tensors: Tensor | None) -> None:
    """Raises unless the floating-point tensors among these are of a dtype that the kernels serve,
    and all of them are on one GPU (any device in Triton's interpreter)."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_dtype(op, **{name: t for name, t in given.items() if t.is_floating_point()})
    check_same_device(op, **given)
    name, first = next(iter(given.items()))
    if first.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"{op}: the Triton kernel takes CUDA tensors, {name} is on {first.device}")


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes x's GPU current: Triton launches on the current one, wherever its arguments lie."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def architecture(x: Tensor) -> int:
    """The entry of ARCHITECTURES whose tiles serve x's GPU."""
    return _gpu(x.device)[0]


def processors(x: Tensor) -> int:
    """The number of streaming multiprocessors of x's GPU."""
    return _gpu(x.device)[1]


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return ARCHITECTURES[0], 2  # the interpreter: enough to have programs share out the work
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    if capability < ARCHITECTURES[0]:
        raise RuntimeError(
            f"the Triton kernels need compute capability 8.0 or later, {properties.name} has"
            f" {properties.major}.{properties.minor}"
        )
    arch = max(arch for arch in ARCHITECTURES if arch <= capability)
    return arch, properties.multi_processor_count
