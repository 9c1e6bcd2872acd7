"""How a figure is taken, and where it goes: benchmarks/results/<machine>.json.

Every figure is the median of its rounds, and the copy that a kernel is held against is measured the
same way beside it: a shared machine's speed drifts, and a share of the copy drifts less.
"""

import datetime
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from neobert.machine import commit, machine, machine_name

RESULTS = Path(__file__).parent / "results"


def median_seconds(fn: Callable[[], object], budget: float = 0.3) -> float:
    """The median of as many calls as fit into `budget` seconds, at least 5, after two warm-ups."""
    fn(), fn()
    seconds: list[float] = []
    deadline = time.perf_counter() + budget
    while len(seconds) < 5 or time.perf_counter() < deadline:
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cuda_seconds(fn: Callable[[], object], rounds: int = 50) -> list[float]:
    """GPU seconds of fn, by events, with nothing of its inputs left in the L2 cache.

    Before each round the cache is overwritten, for long enough that the host has launched all of
    fn before the GPU gets to it: what is timed is the GPU's work and not the launching.
    """
    fn(), fn()
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events = []
    for _ in range(rounds):
        for _ in range(8):
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def copy_bytes_per_second(moved_bytes: int, device: str = "cpu") -> float:
    """Bandwidth of torch's copy_ that reads half of `moved_bytes` and writes the other half.

    Of the same size as the op it is compared with, since a size that fits a cache is copied at the
    speed of the cache.
    """
    source = torch.ones(max(1, moved_bytes // 8), device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    seconds = statistics.median(cuda_seconds(copy)) if device == "cuda" else median_seconds(copy)
    return 8 * source.numel() / seconds


def results_file() -> Path:
    """benchmarks/results/<machine>.json, the machine named by its GPU or else by its CPU."""
    return RESULTS / f"{machine_name(machine())}.json"


def write_results(figures: dict[str, dict]) -> Path:
    """Puts `figures` (benchmark name -> figures) into this machine's file, over older ones.

    Each carries the commit and the day it was taken, so a file may hold the runs of several days.
    """
    path = results_file()
    earlier = json.loads(path.read_text())["results"] if path.exists() else {}
    stamp = {"commit": commit(), "date": datetime.date.today().isoformat()}
    results = earlier | {name: figure | stamp for name, figure in figures.items()}
    path.parent.mkdir(exist_ok=True)
    document = {"machine": machine(), "results": dict(sorted(results.items()))}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
