"""What the compiler says of the CUDA kernels, where there is nvcc, and how the build decides.

`python tests/test_cuda_build.py` measures the registers anew and writes tests/cuda_budget.json.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_emulation.build import OPS

ROOT = Path(__file__).parents[1]
BUDGET = Path(__file__).with_name("cuda_budget.json")
ARCHS = "8.0 9.0a"


def load_setup():
    spec = importlib.util.spec_from_file_location("neobert_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()
NVCC = SETUP.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit")


def compiled() -> Path:
    """The folder of the objects and of libneobert_cuda.so; ninja compiles only what changed."""
    folder = ROOT / "build/cuda_check"
    folder.mkdir(parents=True, exist_ok=True)
    lines = SETUP.rules(os.environ.get("CXX", "g++")) + SETUP.cuda_library(
        NVCC, ARCHS, folder, folder
    )
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run([SETUP.ninja(), "-C", folder, "--quiet", *jobs, "cuda"], check=True)
    return folder


def nvcc_release() -> str:
    told = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return told.split("release ")[1].split(",")[0]


def kernel_resources(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """kernel → architecture → registers and spilled bytes, from ptxas' reports."""
    reports = "".join(path.read_text() for path in sorted((folder / "cuda").glob("*.log")))
    reports = subprocess.run(
        ["c++filt"], input=reports, capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(
        r"Compiling entry function '(.*)' for '(sm_\w+)'\n.*\n"
        r".*, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
        reports,
    )
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for name, arch, stores, loads, registers in found:
        counts = {"registers": int(registers), "spills": int(stores) + int(loads)}
        kernels.setdefault(short(name), {})[arch] = counts
    return kernels


def short(name: str) -> str:
    """`void neobert::(anonymous namespace)::f<8, __half>(__half const*)` as `f<8, fp16>`."""
    name = name.replace("neobert::", "").replace("(anonymous namespace)::", "")
    name = name.removeprefix("void ").replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    return name[: name.rindex("(")]


@pytest.fixture(scope="module")
def kernels():
    return kernel_resources(compiled())


@needs_nvcc
def test_nothing_spills(kernels):
    spilled = {
        (name, arch): counts["spills"]
        for name, archs in kernels.items()
        for arch, counts in archs.items()
        if counts["spills"]
    }
    assert kernels and not spilled


@needs_nvcc
def test_every_kernel_is_compiled_for_every_architecture(kernels):
    expected = {f"sm_{arch.replace('.', '')}" for arch in ARCHS.split()}
    assert all(set(archs) == expected for archs in kernels.values())
    ops = {name.split("<")[0] for name in kernels}
    assert {"rms_norm_in_registers", "rms_norm_bwd_in_registers", "column_sum"} <= ops
    assert {"swiglu_rows", "swiglu_bwd_rows", "rotary_rows"} <= ops


@needs_nvcc
def test_registers_stay_in_the_budget(kernels):
    """A register more can be a block less on each multiprocessor. They are handed out in eights."""
    budget = json.loads(BUDGET.read_text())
    if budget["nvcc"] != nvcc_release():
        pytest.skip(f"the budget is that of nvcc {budget['nvcc']}, this is {nvcc_release()}")
    over = {
        (name, arch): (counts["registers"], budget["registers"].get(name, {}).get(arch, 0))
        for name, archs in kernels.items()
        for arch, counts in archs.items()
        if -(-counts["registers"] // 8) > -(-budget["registers"].get(name, {}).get(arch, 0) // 8)
    }
    assert not over, f"(registers, budget): {over}; `python {Path(__file__).name}` writes a new one"
    assert set(budget["registers"]) == set(kernels), "the budget names kernels that are no more"


@needs_nvcc
def test_the_library_needs_of_torch_only_its_stable_shims():
    """Nothing from libtorch_cuda is linked; what is left open, every torch with CUDA resolves."""
    library = compiled() / "libneobert_cuda.so"
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    assert "libtorch_cuda" not in needed and "libc10" not in needed and "libpython" not in needed
    torch_cpu = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    missing = {s for s in symbols(library, "--undefined-only") if "torch" in s}
    missing -= symbols(torch_cpu, "--defined-only")
    assert missing <= {
        "aoti_torch_get_current_cuda_stream",
        "torch_c10_cuda_check_msg",
        "torch_c10_cuda_free_error_msg",
    }


SHIMS = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
extern "C" int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) {
  return 1;
}
extern "C" void torch_c10_cuda_free_error_msg(char*) {}
"""
LOADED = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[2])
from neobert_kernels.__main__ import served_by
from neobert_kernels._library import OPS
print([name for name in OPS if served_by(name, "CUDA") == "CUDA C++"])
"""


@needs_nvcc
def test_the_library_loads_and_registers_its_ops(tmp_path):
    """With stand-ins for the three symbols of libtorch_cuda. Loading starts no driver."""
    stand_in = tmp_path / "shims.so"
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", stand_in]
    subprocess.run(command, input=SHIMS, text=True, check=True)
    command = [sys.executable, "-c", LOADED, stand_in, compiled() / "libneobert_cuda.so"]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert set(ast.literal_eval(loaded.stdout)) == set(OPS)


def symbols(library: Path, which: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


def test_architecture_lists():
    assert SETUP.gencode("8.0;9.0a") == (
        "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a"
    )
    assert SETUP.gencode("10.0+PTX") == (
        "-gencode arch=compute_100,code=sm_100 -gencode arch=compute_100,code=compute_100"
    )
    assert SETUP.gencode("PTX-9.0") == "-gencode arch=compute_90,code=compute_90"
    with pytest.raises(ValueError, match="cannot read 'Ampere'"):
        SETUP.gencode("8.0 Ampere")


def test_when_cuda_is_not_built(monkeypatch, tmp_path):
    """Neither without a toolkit, nor for a torch that could not use it, unless it is asked for."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    assert "no CUDA toolkit" in SETUP.why_no_cuda(None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in SETUP.why_no_cuda(str(nvcc))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "CUDA 13.0, newer than torch's 12.8" in SETUP.why_no_cuda(str(nvcc))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert SETUP.why_no_cuda(str(nvcc)) is None
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert SETUP.why_no_cuda(str(nvcc)) is None


def write_budget() -> None:
    registers = {
        name: {arch: counts["registers"] for arch, counts in sorted(archs.items())}
        for name, archs in sorted(kernel_resources(compiled()).items())
    }
    rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in registers.items())
    BUDGET.write_text(f'{{"nvcc": "{nvcc_release()}", "registers": {{\n{rows}\n}}}}\n')


if __name__ == "__main__":
    write_budget()
