"""Runs a check in a fresh process on another build of the C++ kernels than this machine's best.

A library is chosen once, when the package is imported, so another one needs another process.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neobert_kernels import _compiled

OLDER = ("avx2", "avx512")  # what machines without AVX512-BF16 run

_PROGRAM = """
import sys
import torch
if {isa!r} == "avx512":
    torch.cpu._is_avx512_bf16_supported = lambda: False
sys.path.insert(0, {tests!r})
from neobert_kernels import _compiled
assert _compiled.LOADED == {isa!r}, _compiled.LOADED
torch.manual_seed(0)
import {module}
{module}.{function}()
"""


def run_on(isa: str, check: Callable[[], None]) -> None:
    """Calls `check`, a function of a test module without arguments, on the kernels built for `isa`.

    Skips where the kernels are not built or the CPU lacks the instructions. Fails with the other
    process's output if `check` raises or the process dies.
    """
    if _compiled.LOADED is None:
        pytest.skip(_compiled.status())
    if isa == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX-512")
    tests = Path(__file__).parent
    program = _PROGRAM.format(
        isa=isa, tests=str(tests), module=check.__module__, function=check.__name__
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tests.parent,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2" if isa == "avx2" else "avx512"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{isa}: exit {done.returncode}\n{done.stdout}{done.stderr}"
