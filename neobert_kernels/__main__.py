"""`python -m neobert_kernels`: which kernel serves which op on which device.

`python -m neobert_kernels tune` measures the tiles of the Triton kernels on the GPU at hand.
"""

import importlib.metadata
import sys

import torch

import neobert_kernels  # noqa: F401  (registers every op)
from neobert_kernels import _compiled, _gpu
from neobert_kernels._library import OPS, has_kernel
from neobert_kernels.linear import PYTORCH_GEMM_DTYPES


def served_by(name: str, key: str) -> str:
    """What the dispatcher would call for op `name` under dispatch key "CPU" or "CUDA"."""
    if not has_kernel(name, key):
        return "plain PyTorch"
    if key == "CPU":
        return f"C++ ({_compiled.LOADED})" if _compiled.LOADED else "C++"
    # The dispatcher remembers the source file of each registration.
    registrations = torch._C._dispatch_dump(f"neobert::{name}").splitlines()
    from_csrc = any(line.startswith("CUDA:") and "csrc/cuda/" in line for line in registrations)
    return "CUDA C++" if from_csrc else "Triton"


def table() -> str:
    """The ops, and for CPU and CUDA the kernel that the dispatcher would call."""
    lines = [f"{'op':<28} {'CPU':<22} CUDA"]
    for name in OPS:
        lines.append(f"{name:<28} {served_by(name, 'CPU'):<22} {served_by(name, 'CUDA')}")
    return "\n".join(lines)


def _triton_status() -> str:
    reason = _gpu.why_not()
    if reason is not None:
        return f"none: {reason}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU was found"
    return f"Triton {importlib.metadata.version('triton')}, {gpu}"


def main() -> None:
    if sys.argv[1:] == ["tune"]:
        if not torch.cuda.is_available() or _gpu.why_not() is not None:
            sys.exit(f"tune: needs a CUDA GPU and Triton: {_gpu.why_not() or 'no GPU was found'}")
        from neobert_kernels.triton import tune

        return tune.main()
    if sys.argv[1:]:
        sys.exit(f"usage: python -m neobert_kernels [tune], got {' '.join(sys.argv[1:])}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"CPU kernels: {_compiled.status()}")
    print(f"CUDA kernels: {_compiled.cuda_status()}")
    print(f"Triton kernels: {_triton_status()}\n")
    print(table())
    if PYTORCH_GEMM_DTYPES:
        dtypes = ", ".join(sorted(str(dtype) for dtype in PYTORCH_GEMM_DTYPES))
        print(f"\nlinear, linear_swiglu: on this CPU (AMX) PyTorch's own GEMM serves {dtypes}")


if __name__ == "__main__":
    main()
