"""Breaks the kernels one by one; see the package."""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import pytest

from . import MUTATIONS, Mutation

HERE = Path(__file__).parent.parent
KERNELS = HERE.parent.parent / "neobert_kernels" / "triton"


def caught(mutation: Mutation, folder: Path) -> str:
    """The first failure of `caught_by` with the broken kernel, or "" if it passed."""
    name = f"{mutation.file or mutation.op}.py"
    source = (KERNELS / name).read_text()
    assert mutation.old in source, f"{name} no longer has {mutation.old!r}"
    path = folder / name
    path.write_text(source.replace(mutation.old, mutation.new))
    check = HERE / f"check_{mutation.op}.py"
    output = io.StringIO()
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", f"--kernels={path}"]
    with contextlib.redirect_stdout(output):
        code = pytest.main([f"{check}::{mutation.caught_by}", *options])
    failed = [line for line in output.getvalue().splitlines() if line.startswith("FAILED")]
    if code == pytest.ExitCode.OK:
        return ""
    assert failed, output.getvalue()
    return failed[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for mutation in MUTATIONS:
            results[f"{mutation.op}: {mutation.what}"] = caught(mutation, Path(folder))
    json.dump(results, sys.stdout, indent=1)


main()
