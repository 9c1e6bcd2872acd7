"""Loads the C++ kernels, where they were built: for this CPU's instruction set, and for CUDA."""

import json
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def instruction_set() -> str | None:
    """The most capable of the instruction sets the kernels are built for, or None.

    Follows torch's own choice, and so the variable ATEN_CPU_CAPABILITY that lowers it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "avx512"
    return "avx2" if capability == "AVX2" else None


def status() -> str:
    """One line that says which CPU kernels are in use, or why none are."""
    if LOADED is not None:
        return f"C++, {LOADED}"
    if not _BUILD["cpu"]:
        return f"C++ kernels not built: {_BUILD['cpu_not_built']}"
    return f"no C++ kernels for this CPU (torch reports {torch.backends.cpu.get_cpu_capability()})"


def cuda_status() -> str:
    """One line that says whether the CUDA C++ kernels are in use, or why not."""
    if CUDA_LOADED:
        return f"CUDA C++, built for {', '.join(_BUILD['cuda'])}"
    if not _BUILD["cuda"]:
        return f"CUDA C++ kernels not built: {_BUILD['cuda_not_built']}"
    return "CUDA C++ kernels built, not loaded: this torch has no CUDA"


def _load() -> str | None:
    isa = instruction_set()
    if isa is None or isa not in _BUILD["cpu"]:
        return None
    torch.ops.load_library(str(_FOLDER / f"libneobert_{isa}.so"))
    return isa


def _load_cuda() -> bool:
    # Asks how torch was built, not whether there is a GPU: that would start the driver at import.
    if not _BUILD["cuda"] or torch.version.cuda is None:
        return False
    torch.ops.load_library(str(_FOLDER / "libneobert_cuda.so"))
    return True


_manifest = _FOLDER / "build.json"
_not_installed = "the package was not installed (run `pip install -e .`)"
_BUILD = {
    "cpu": [],
    "cpu_not_built": _not_installed,
    "cuda": [],
    "cuda_not_built": _not_installed,
    **(json.loads(_manifest.read_text()) if _manifest.exists() else {}),
}
LOADED = _load()
CUDA_LOADED = _load_cuda()
if LOADED is None and torch.version.cuda is None:
    warnings.warn(
        f"neobert_kernels: {status()}; the ops run as plain PyTorch, several times slower",
        stacklevel=2,
    )
