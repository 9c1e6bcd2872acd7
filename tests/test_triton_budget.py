"""Every Triton kernel as shipped, compiled for sm_80, sm_90 and sm_100 on any machine, against its
budget of registers and shared memory in budgets.json. After a change that is meant,
`python tests/budgets.py` refreshes the file and prints what changed.
"""

import copy
import json
import math

import pytest

pytest.importorskip("triton", reason="Triton is not installed (Linux only)")

import budgets
import triton

from neobert_kernels.triton import cross_entropy, epilogue, rms_norm

COMMITTED = json.loads(budgets.FILE.read_text())


@pytest.fixture(scope="module")
def measured():
    return budgets.measure()


def test_no_kernel_needs_more_than_its_budget(measured):
    assert triton.__version__ == COMMITTED["triton"], (
        f"the budgets were taken with Triton {COMMITTED['triton']}, this is {triton.__version__}"
    )
    found = list(budgets.worse(COMMITTED, measured))
    assert not found, "\n".join([*found, "(python tests/budgets.py refreshes the budgets)"])


def test_no_kernel_spills(measured):
    spilled = [
        f"{arch} {name}"
        for arch, kernels in measured["kernels"].items()
        for name, budget in kernels.items()
        if budget["spilled"]
    ]
    assert not spilled


def test_no_kernel_is_empty(measured):
    """Where accumulators do not fit sm_100's tensor memory, Triton 3.6 makes an empty kernel of it:
    what fails is the launch."""
    empty = [
        f"{arch} {name}"
        for arch, kernels in measured["kernels"].items()
        for name, budget in kernels.items()
        if budget["registers"] < 16
    ]
    assert not empty


def _programs(arch: int, name: str, float32: bool) -> int:
    """How many programs of a kernel its tile table promises to a multiprocessor."""
    if name.startswith("epilogue"):
        return _programs_of_epilogue(arch, name, float32)
    products = cross_entropy.PRODUCTS_FLOAT32 if float32 else cross_entropy.PRODUCTS[arch]
    for product, tile in products.items():
        if name.startswith(f"cross_entropy {product}"):
            return tile["PROGRAMS"]
    return rms_norm.BACKWARD[arch]["PROGRAMS"] if name.startswith("rms_norm backward") else 1


def _programs_of_epilogue(arch: int, name: str, float32: bool) -> int:
    table = epilogue.TILES_FLOAT32 if float32 else epilogue.TILES[arch]
    kernel, variant = name.removeprefix("epilogue ").split(", ")
    if kernel == "squares":
        return 1
    kernel, *flags = kernel.split()
    if "KEEP" in flags:
        kernel = "swiglu_keep"
    elif kernel == "add" and variant.endswith("on float32"):
        kernel = "add_float32"
    return table[kernel]["PROGRAMS"]


@pytest.mark.parametrize("arch", budgets.SHARED)
def test_the_promised_programs_fit_a_multiprocessor(measured, arch):
    total, of_one = budgets.SHARED[arch]
    for name, budget in measured["kernels"][f"sm_{arch}"].items():
        programs = _programs(arch, name, float32=", float32" in name)
        # Registers are handed out in eights, and 1 KiB of shared memory goes with each program.
        registers = math.ceil(budget["registers"] / 8) * 8 * 32 * budget["warps"]
        assert budget["shared"] <= of_one, f"{name}: {budget}"
        assert programs * (budget["shared"] + 1024) <= total, f"{name}: {programs} x {budget}"
        assert programs * registers <= budgets.REGISTERS, f"{name}: {programs} x {budget}"


def test_a_kernel_that_got_worse_is_named():
    name = "swiglu forward, bfloat16"
    for key in ("registers", "spilled", "shared"):
        new = copy.deepcopy(COMMITTED)
        new["kernels"]["sm_90"][name][key] += 1
        assert [line.split(":")[0] for line in budgets.worse(COMMITTED, new)] == [f"sm_90 {name}"]
        assert not list(budgets.worse(new, COMMITTED)), "less is not worse"
    del new["kernels"]["sm_90"][name]
    assert list(budgets.worse(COMMITTED, new)) and list(budgets.worse(new, COMMITTED))
