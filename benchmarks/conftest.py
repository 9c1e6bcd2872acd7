"""Fixtures for every benchmark. `pytest benchmarks/ --benchmark-only` also writes the figures to
benchmarks/results/<machine>.json.

A benchmark calls `measure(fn, moved_bytes=…)` or `measure(fn, flop=…)`; other figures go straight
into `benchmark.extra_info`, under the name of their unit ("GB/s", "share_of_copy", "GFLOP/s",
"live tok/s").
"""

from collections.abc import Callable

import pytest
import torch
from timing import copy_bytes_per_second, keep_freed_memory, median_seconds, write_results


def pytest_configure(config):
    keep_freed_memory()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def copy_bandwidth() -> Callable[[int], float]:
    """copy_bandwidth(moved_bytes): bytes read and written per second by torch's copy_, now."""
    return copy_bytes_per_second


@pytest.fixture
def measure(benchmark, copy_bandwidth) -> Callable:
    """measure(fn, moved_bytes=None, flop=None, seconds=0.5): times fn, returns its median seconds.

    moved_bytes are the bytes that fn must at least read and write; flop its floating-point
    operations.
    """

    def run(
        fn: Callable[[], object],
        moved_bytes: int | None = None,
        flop: int | None = None,
        seconds: float = 0.5,
    ) -> float:
        estimate = median_seconds(fn, budget=0.0)
        calls = max(1, round(1e-4 / estimate))
        rounds = min(1000, max(5, round(seconds / (estimate * calls))))
        benchmark.pedantic(fn, rounds=rounds, iterations=calls, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable: fn ran once, nothing was timed
            return float("nan")
        median = benchmark.stats.stats.median
        if moved_bytes is not None:
            benchmark.extra_info["GB/s"] = round(moved_bytes / median / 1e9, 2)
            share = moved_bytes / median / copy_bandwidth(moved_bytes)
            benchmark.extra_info["share_of_copy"] = round(share, 3)
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
        if not bench.has_error and bench.stats.data
    }
    if figures:
        print(f"\nfigures written to {write_results(figures)}")
