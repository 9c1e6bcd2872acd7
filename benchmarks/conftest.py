"""Fixtures for every benchmark. `pytest benchmarks/ --benchmark-only` also writes the figures to
benchmarks/results/<machine>.json.

A benchmark calls `measure(fn, moved_bytes=…)` or `measure(fn, flop=…)`; other figures go straight
into `benchmark.extra_info`, under the name of their unit ("GB/s", "share_of_copy", "GFLOP/s",
"live tok/s").
"""

import statistics
from collections.abc import Callable

import pytest
import torch
from compare import DEVICE, TOKENS, serving
from timing import copy_bytes_per_second, cuda_seconds, median_seconds, write_results

from neobert.memory import keep_freed_memory


def pytest_configure(config):
    keep_freed_memory()


@pytest.fixture(autouse=True)
def _seed_and_device(request):
    """Seeds torch; on a GPU, what the benchmark of an op makes is made there."""
    torch.manual_seed(0)
    if DEVICE == "cuda" and "tokens" in request.fixturenames:
        with torch.device(DEVICE):
            yield
    else:
        yield


def pytest_generate_tests(metafunc):
    if "tokens" in metafunc.fixturenames and len(TOKENS) > 1:
        metafunc.parametrize("tokens", TOKENS)


@pytest.fixture(autouse=True)
def _kernels(request):
    """What the test's `implementation` asks for."""
    parameters = getattr(request.node, "callspec", None)
    with serving(parameters and parameters.params.get("implementation")):
        yield


@pytest.fixture
def tokens() -> int:
    """How many tokens an op is given: one number on the CPU, and on a GPU several."""
    (only,) = TOKENS
    return only


@pytest.fixture(scope="session")
def copy_bandwidth() -> Callable[[int], float]:
    """copy_bandwidth(moved_bytes): bytes read and written per second by torch's copy_, now."""
    return lambda moved_bytes: copy_bytes_per_second(moved_bytes, DEVICE)


@pytest.fixture(scope="session")
def memory_bandwidth() -> float | None:
    """Bytes read and written per second by a copy that no cache holds; on a CPU. On a GPU every
    copy is measured with a cold cache."""
    return copy_bytes_per_second(2**30) if DEVICE == "cpu" else None


@pytest.fixture
def measure(benchmark, copy_bandwidth, request) -> Callable:
    """measure(fn, moved_bytes=None, flop=None, seconds=0.5): times fn, returns its median seconds.

    moved_bytes are the bytes that fn must at least read and write; flop its floating-point
    operations. On a GPU the seconds are the GPU's, with a cold L2 cache; what pytest-benchmark
    prints is the host's, up to the end of the GPU's work.
    """

    def run(
        fn: Callable[[], object],
        moved_bytes: int | None = None,
        flop: int | None = None,
        seconds: float = 0.5,
    ) -> float:
        if DEVICE == "cuda":
            # The host's seconds: a few rounds will do.
            call, fn_seconds = lambda: (fn(), torch.cuda.synchronize()), 0.05
        else:
            call, fn_seconds = fn, seconds
        estimate = median_seconds(call, budget=0.0)
        calls = max(1, round(1e-4 / estimate))
        rounds = min(1000, max(5, round(fn_seconds / (estimate * calls))))
        benchmark.pedantic(call, rounds=rounds, iterations=calls, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable: fn ran once, nothing was timed
            return float("nan")
        median = benchmark.stats.stats.median
        if DEVICE == "cuda":
            median = statistics.median(cuda_seconds(fn))
            benchmark.extra_info["median_s"] = median
        if moved_bytes is not None:
            benchmark.extra_info["GB/s"] = round(moved_bytes / median / 1e9, 2)
            share = moved_bytes / median / copy_bandwidth(moved_bytes)
            benchmark.extra_info["share_of_copy"] = round(share, 3)
            if memory := request.getfixturevalue("memory_bandwidth"):
                share = moved_bytes / median / memory
                benchmark.extra_info["share_of_memory_copy"] = round(share, 3)
        if flop is not None:
            benchmark.extra_info["GFLOP/s"] = round(flop / median / 1e9, 1)
        return median

    return run


def pytest_sessionfinish(session):
    timed = getattr(session.config, "_benchmarksession", None)
    figures = {
        bench.fullname.split("/")[-1]: {
            "median_s": bench.stats.median,
            "rounds": bench.stats.rounds,
            **bench.extra_info,
        }
        for bench in (timed.benchmarks if timed is not None else [])
        # The throughput table, many models on many workloads, has a file of its own.
        if not bench.has_error and bench.stats.data and bench.group != "throughput"
    }
    if figures:
        print(f"\nfigures written to {write_results(figures)}")
