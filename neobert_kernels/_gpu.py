"""Whether this installation can serve CUDA tensors with the Triton kernels."""

import importlib.util

import torch


def why_not() -> str | None:
    """Why the Triton kernels cannot serve here, or None if they can.

    Asks how torch was built, not whether a GPU is there: that would wake the driver, and a process
    that did so can no longer fork. Without a GPU the kernels are registered and never called.
    """
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None
