"""Compiles csrc/cuda for the host, every CUDA thread a fiber, and loads it as torch ops."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

import neobert_kernels  # noqa: F401  (the schemas)

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
OPS = (
    "rms_norm",
    "add_rms_norm",
    "rms_norm_bwd",
    "add_rms_norm_bwd",
    "swiglu",
    "swiglu_bwd",
    "rotary",
    "rotary_qkv_",
)
COMPILER = os.environ.get("CXX") or shutil.which("g++")
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wno-class-memaccess",  # the emulated words check every copy; memcpy of their bytes is meant
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{HERE}",
    *(f"-isystem{path}" for path in include_paths()),
]


class Emulated:
    """The CUDA ops on CPU tensors. Every call runs twice, with the threads of a block in ascending
    and in descending order; results that differ in a bit are a race."""

    def __init__(self, namespace: str, sources: Path):
        library = build(namespace, sources)
        torch.ops.load_library(str(library))
        self._definitions = torch.library.Library(namespace, "FRAGMENT")
        for name in OPS:
            schema = str(getattr(torch.ops.neobert, name).default._schema)
            self._definitions.define(schema.split("::", 1)[1])
        self._ops = getattr(torch.ops, namespace)
        self._emulation = ctypes.CDLL(str(library))
        self._emulation.emulation_accesses.restype = ctypes.c_int64

    def __getattr__(self, name: str):
        op = getattr(self._ops, name)

        def run(*arguments) -> list[Tensor]:
            outputs, first = [], arguments[0].clone()
            for descending in (False, True):
                arguments[0].copy_(first)
                self._emulation.emulation_start(descending)
                returned = op(*arguments)
                if returned is None:  # works in place
                    returned = arguments[0].clone()
                outputs.append([returned] if isinstance(returned, Tensor) else returned)
            for one, other in zip(*outputs, strict=True):
                # As bytes: a NaN must be the same NaN.
                one, other = (t.contiguous().view(torch.uint8) for t in (one, other))
                assert one.equal(other), (
                    f"{name}: a race, the order of the threads changes the result"
                )
            arguments[0].copy_(first)
            return outputs[0]

        return run

    def accesses(self) -> tuple[int, int]:
        """Of the last call: accesses to tensors of 16 bytes, and narrower ones."""
        return self._emulation.emulation_accesses(True), self._emulation.emulation_accesses(False)


def build(namespace: str, sources: Path) -> Path:
    """The library for the CUDA sources in a folder; compiled anew only if something changed."""
    headers = [*sources.glob("*.h"), *sources.glob("*.cuh"), *HERE.glob("*.h")]
    seed = [COMPILER, torch.__version__, *FLAGS, *(path.read_text() for path in sorted(headers))]
    commands, objects = [], []
    for source in [*sorted(sources.glob("*.cu")), sources / "ops.cpp"]:
        flags = FLAGS
        if source.suffix == ".cpp":
            torch_side = HERE / "emulated_torch.h"
            flags = [*FLAGS, "-include", str(torch_side), f"-DEMULATED_NAMESPACE={namespace}"]
        name = digest(*seed, *flags, source.read_text())
        objects.append(ROOT / "build/cuda_emulation" / f"{source.stem}-{name}.o")
        if not objects[-1].exists():
            commands.append([COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]])
    library = objects[0].with_name(f"lib{namespace}-{digest(*map(str, objects))}.so")
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(compile_to, commands))
    torch_lib = Path(torch.__file__).parent / "lib"
    link = [COMPILER, "-shared", *objects, f"-L{torch_lib}", "-ltorch_cpu", "-ltorch", "-o"]
    compile_to([*link, library])
    return library


def compile_to(command: list) -> None:
    """Runs a compiler whose last argument is its output, which appears whole or not at all."""
    *rest, output = command
    partial = output.with_suffix(f".{os.getpid()}.partial")
    subprocess.run([*rest, partial], check=True)
    partial.replace(output)


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
