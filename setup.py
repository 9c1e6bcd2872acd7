"""Builds the CPU kernels: one shared library per instruction set; importing chooses one.

The sources use the LibTorch stable ABI and do not link Python, so one build serves every Python
and every torch >= 2.10. Everything else about the project is in pyproject.toml.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGE = "neobert_kernels"
CFLAGS = "-std=c++20 -O3 -fPIC -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall"
# GCC 12 warns of uninitialised values inside its own AVX-512 headers.
CFLAGS += " -Wno-uninitialized -Wno-maybe-uninitialized"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}


def ninja_file(compiler: str, objects: Path, target: Path) -> str:
    import torch
    from torch.utils.cpp_extension import include_paths

    includes = " ".join(f"-isystem {path}" for path in include_paths())
    torch_lib = Path(torch.__file__).parent / "lib"
    lines = [
        f"cflags = {CFLAGS} {includes} -DTORCH_TARGET_VERSION=0x020a000000000000",
        "rule compile",
        f"  command = {compiler} -MD -MF $out.d $cflags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -L{torch_lib} -ltorch_cpu -ltorch",
    ]
    for isa, flags in ISAS.items():
        built = []
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            built.append(f"{objects.resolve()}/{isa}/{source.stem}.o")
            lines += [f"build {built[-1]}: compile {source.resolve()}", f"  isa = {flags}"]
        lines.append(f"build {target.resolve()}/libneobert_{isa}.so: link {' '.join(built)}")
    return "\n".join(lines) + "\n"


class BuildKernels(build_ext):
    """Builds what this machine can, and says plainly what it could not and what that costs."""

    def get_ext_filename(self, fullname):
        # What setuptools tracks; the libraries lie beside it, without a Python ABI in their names.
        return "build.json"

    def get_outputs(self):
        folder = Path(self.build_lib) / PACKAGE
        return [str(path) for path in [folder / "build.json", *folder.glob("libneobert_*.so")]]

    def copy_extensions_to_source(self):
        for path in self.get_outputs():
            self.copy_file(path, str(ROOT / PACKAGE))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).parent
        target.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        reason = None
        if platform.machine() not in ("x86_64", "AMD64"):
            reason = f"the C++ kernels are written for x86-64, this is {platform.machine()}"
        elif sys.platform != "linux":
            reason = f"the build knows Linux only, this is {sys.platform}"
        elif compiler is None:
            reason = "no C++ compiler was found (set CXX, or install g++)"
        if reason is None:
            objects = Path(self.build_temp)
            objects.mkdir(parents=True, exist_ok=True)
            (objects / "build.ninja").write_text(ninja_file(compiler, objects, target))
            jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
            subprocess.check_call([ninja(), "-C", str(objects), *jobs])
        else:
            print(
                f"\nneobert-kernels: the CPU kernels were NOT built: {reason}.\n"
                "Everything works, on plain PyTorch operations, several times slower; "
                "`python -m neobert_kernels` shows which kernel serves which op.\n",
                file=sys.stderr,
            )
        manifest = {"cpu": [] if reason else list(ISAS), "cpu_not_built": reason}
        (target / "build.json").write_text(json.dumps(manifest) + "\n")


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        return "ninja"


class PlatformWheel(bdist_wheel):
    """No Python linkage: the wheel is for one platform and any Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"{PACKAGE}.kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
