"""Loads the C++ CPU kernels for this machine's instruction set, where they were built."""

import json
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


def _load() -> str | None:
    isa = instruction_set()
    if isa is None or isa not in _BUILD["cpu"]:
        return None
    torch.ops.load_library(str(_FOLDER / f"libneobert_{isa}.so"))
    return isa


_manifest = _FOLDER / "build.json"
_BUILD = (
    json.loads(_manifest.read_text())
    if _manifest.exists()
    else {"cpu": [], "cpu_not_built": "the package was not installed (run `pip install -e .`)"}
)
LOADED = _load()
