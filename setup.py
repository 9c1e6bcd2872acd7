"""Builds the C++ kernels: one shared library per CPU instruction set, of which importing chooses
one, and one for CUDA where there is a toolkit.

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
# Native code for A100-like and Hopper GPUs, PTX for whatever comes after.
CUDA_ARCHS = "8.0 9.0a PTX-9.0"


def rules(compiler: str) -> list[str]:
    """The ninja rules that the CPU and the CUDA library share."""
    import torch
    from torch.utils.cpp_extension import include_paths

    includes = " ".join(f"-isystem {path}" for path in include_paths())
    torch_lib = Path(torch.__file__).parent / "lib"
    return [
        f"torch_headers = {includes} -DTORCH_TARGET_VERSION=0x020a000000000000",
        f"cflags = {CFLAGS} $torch_headers",
        f"torch = -L{torch_lib} -ltorch_cpu -ltorch",
        "rule compile",
        f"  command = {compiler} -MD -MF $out.d $cflags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out $torch",
    ]


def cpu_libraries(objects: Path, target: Path) -> list[str]:
    lines, libraries = [], []
    for isa, flags in ISAS.items():
        built = []
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            built.append(f"{objects.resolve()}/{isa}/{source.stem}.o")
            lines += [f"build {built[-1]}: compile {source.resolve()}", f"  isa = {flags}"]
        libraries.append(f"{target.resolve()}/libneobert_{isa}.so")
        lines.append(f"build {libraries[-1]}: link {' '.join(built)}")
    return [*lines, f"build cpu: phony {' '.join(libraries)}"]


def cuda_library(nvcc: str, archs: str, objects: Path, target: Path) -> list[str]:
    """libneobert_cuda.so, with ptxas' report (registers, spills) beside each object.

    The CUDA runtime is linked in, so that it need not be the one torch ships. libtorch_cuda is
    not linked: a torch without CUDA builds the library too, and where it is loaded libtorch brings
    libtorch_cuda along.
    """
    host = f"-ccbin {os.environ['CXX']}" if "CXX" in os.environ else ""
    lines = [
        f"nvcc = {nvcc} {host} -std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden",
        "rule nvcc",
        "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out > $out.log 2>&1"
        " || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc_link",
        "  command = $nvcc -shared -cudart static $in -o $out -Xlinker --no-as-needed $torch",
    ]
    flags = {".cu": f"{gencode(archs)} -Xptxas -v", ".cpp": "$torch_headers -DUSE_CUDA"}
    built = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.c*")):
        if source.suffix in flags:
            built.append(f"{objects.resolve()}/cuda/{source.stem}.o")
            lines += [f"build {built[-1]}: nvcc {source.resolve()}"]
            lines += [f"  flags = {flags[source.suffix]}"]
    library = f"{target.resolve()}/libneobert_cuda.so"
    return [
        *lines,
        f"build {library}: nvcc_link {' '.join(built)}",
        f"build cuda: phony {library}",
    ]


def gencode(archs: str) -> str:
    """nvcc's flags for a list such as torch's TORCH_CUDA_ARCH_LIST: "8.0;9.0a" or "8.0 9.0+PTX".

    "PTX-9.0", which torch does not know, is the PTX without the native code.
    """
    flags = []
    for arch in archs.replace(";", " ").split():
        number = arch.removeprefix("PTX-").removesuffix("+PTX")
        name = number.replace(".", "")
        if not name.rstrip("af").isdigit():
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: cannot read {arch!r} (like 8.0, 9.0a, 9.0+PTX)"
            )
        if not arch.startswith("PTX-"):
            flags.append(f"-gencode arch=compute_{name},code=sm_{name}")
        if "PTX" in arch:
            flags.append(f"-gencode arch=compute_{name},code=compute_{name}")
    return " ".join(flags)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def why_no_cuda(nvcc: str | None) -> str | None:
    """Why this machine should not spend a minute on CUDA kernels; None if it should."""
    import torch

    if nvcc is None:
        return "no CUDA toolkit was found (set CUDA_HOME, or put nvcc on PATH)"
    if os.environ.get("FORCE_CUDA") == "1":
        return None
    if torch.version.cuda is None:
        return (
            "the torch that this was built with has no CUDA (FORCE_CUDA=1 builds them all the same)"
        )
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = told.split("release ")[1].split(",")[0]
    if int(release.split(".")[0]) > int(torch.version.cuda.split(".")[0]):
        return (
            f"nvcc is CUDA {release}, newer than torch's {torch.version.cuda}: the driver that"
            " serves torch need not serve them (FORCE_CUDA=1 builds them all the same)"
        )
    return None


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
        nvcc, archs = find_nvcc(), os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS
        cuda_reason = reason or why_no_cuda(nvcc)
        if reason is None:
            objects = Path(self.build_temp)
            objects.mkdir(parents=True, exist_ok=True)
            lines = rules(compiler) + cpu_libraries(objects, target)
            if cuda_reason is None:
                lines += cuda_library(nvcc, archs, objects, target)
            (objects / "build.ninja").write_text("\n".join(lines) + "\n")
            run_ninja(objects, "cpu")
            if cuda_reason is None:
                try:
                    run_ninja(objects, "cuda")
                except subprocess.CalledProcessError:
                    cuda_reason = f"{nvcc} failed (`pip install -v` shows how)"
        else:
            print(
                f"\nneobert-kernels: the CPU kernels were NOT built: {reason}.\n"
                "Everything works, on plain PyTorch operations, several times slower; "
                "`python -m neobert_kernels` shows which kernel serves which op.\n",
                file=sys.stderr,
            )
        print(
            f"neobert-kernels: CUDA C++ kernels built for {archs}"
            if cuda_reason is None
            else f"neobert-kernels: CUDA C++ kernels not built: {cuda_reason}."
            " On a GPU the Triton kernels serve.",
            file=sys.stderr,
        )
        manifest = {
            "cpu": [] if reason else list(ISAS),
            "cpu_not_built": reason,
            "cuda": [] if cuda_reason else archs.replace(";", " ").split(),
            "cuda_not_built": cuda_reason,
        }
        (target / "build.json").write_text(json.dumps(manifest) + "\n")


def run_ninja(objects: Path, target: str) -> None:
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.check_call([ninja(), "-C", str(objects), *jobs, target])


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


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"{PACKAGE}.kernels", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    )
