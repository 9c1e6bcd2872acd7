"""Runs tests/interpreted: every Triton kernel against float64 in Triton's interpreter, and proof
that those tests catch broken kernels.

The interpreter is chosen by an environment variable before Triton is imported, so both run in
processes of their own, all at once.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.interpreted.mutations import MUTATIONS

pytest.importorskip("triton", reason="Triton is not installed (Linux only)")

FOLDER = Path(__file__).parent / "interpreted"
BROKEN = FOLDER / "mutations"
CHECKS = sorted(FOLDER.glob("check_*.py"))
NAMES = [f"{mutation.op}: {mutation.what}" for mutation in MUTATIONS]


@pytest.fixture(scope="module")
def outcomes():
    """Of every file of checks, and of the mutations: its exit status and what it printed."""
    commands = {BROKEN: [sys.executable, "-m", "tests.interpreted.mutations"]} | {
        path: [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", path]
        for path in CHECKS
    }
    tests = Path(__file__).parent
    search = [str(tests.parent), str(tests), str(FOLDER)]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*search, os.environ.get("PYTHONPATH", "")]),
    }

    def run(command):
        done = subprocess.run(
            command, env=environment, cwd=tests.parent, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stdout + done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(commands, pool.map(run, commands.values()), strict=True))


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem.removeprefix("check_"))
def test_kernels_in_the_interpreter(outcomes, path):
    code, _, output = outcomes[path]
    if code:
        pytest.fail(output, pytrace=False)


def test_every_kernel_file_has_checks_and_mutations():
    kernels = Path(__file__).parent.parent / "neobert_kernels" / "triton"
    ops = {path.stem for path in kernels.glob("[!_]*.py")} - {"tune"}
    assert ops == {path.stem.removeprefix("check_") for path in CHECKS}
    assert ops == {mutation.op for mutation in MUTATIONS}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=NAMES)
def test_a_broken_kernel_is_caught(outcomes, mutation):
    code, results, output = outcomes[BROKEN]
    if code:
        pytest.fail(output, pytrace=False)
    failure = json.loads(results)[f"{mutation.op}: {mutation.what}"]
    assert failure, f"{mutation.caught_by} passes with {mutation.new!r} for {mutation.old!r}"
