"""Every op under compute-sanitizer: no access outside an allocation, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_findings(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "3", sys.executable, "gpu/cases.py"]
    done = subprocess.run(
        command, cwd=TESTS, capture_output=True, text=True, env=_environment(), timeout=500
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def _environment() -> dict[str, str]:
    # The caching allocator hands out pieces of larger blocks, whose edges memcheck cannot see.
    return os.environ | {"PYTHONPATH": str(TESTS.parent), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
