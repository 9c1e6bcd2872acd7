"""Timing, memory, and the search for the best batch: all that knows nothing of models."""

import gc
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from neobert_kernels import linear

Step = Callable[[], object]

OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.I
)


@dataclass(frozen=True)
class Pace:
    """How long to measure for. Deviates from the paper's 100 steps where a step takes long.

    steps: timed steps of the best batch, at most.
    seconds: of timed steps, after which no further one is begun.
    search_steps, search_seconds: the same for each batch size that is tried.
    patience: batch sizes in a row, each twice the last, that may bring less than `gain` more
        tokens per second before the search is over.
    """

    steps: int
    seconds: float
    search_steps: int
    search_seconds: float
    patience: int
    gain: float


PACES = {
    "cpu": Pace(steps=100, seconds=3.0, search_steps=2, search_seconds=1.0, patience=1, gain=0.05),
    "cuda": Pace(steps=100, seconds=5.0, search_steps=5, search_seconds=1.0, patience=2, gain=0.01),
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may work: CUDA's, the CPU allocator's or cuBLAS's way to say so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def time_steps(step: Step, steps: int, seconds: float, device: torch.device) -> list[float]:
    """Seconds of each of up to `steps` calls, at least one, device-synchronised.

    On a GPU by events between the steps, at most two of which are queued: the host launches ahead
    as it does in use, and what is timed is what comes out.
    """
    if device.type != "cuda":
        taken: list[float] = []
        while not taken or (len(taken) < steps and sum(taken) < seconds):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        return taken

    def event() -> torch.cuda.Event:
        here = torch.cuda.Event(enable_timing=True)
        here.record()
        return here

    torch.cuda.synchronize()
    events, start = [event()], time.perf_counter()
    while len(events) == 1 or (len(events) <= steps and time.perf_counter() - start < seconds):
        step()
        events.append(event())
        if len(events) > 2:
            events[-3].synchronize()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def time_calls(steps: Iterator[Step], calls: int, seconds: float, synchronize: Step) -> list[float]:
    """Seconds from each call to the end of the device's work on it: latencies."""
    taken: list[float] = []
    while not taken or (len(taken) < calls and sum(taken) < seconds):
        step = next(steps)
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        taken.append(time.perf_counter() - start)
    return taken


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass
class Trial:
    """What one batch size gave. `seconds` of each step; tokens are live ones."""

    batch: int
    tokens: int
    seconds: list[float]

    @property
    def rate(self) -> float:
        """Live tokens per second at the median step."""
        return self.tokens / statistics.median(self.seconds)


@dataclass
class Search:
    """The batch sizes tried, and why no larger one was: "out of memory", "no gain", "time" or
    "all tried"."""

    trials: list[Trial]
    ended: str

    @property
    def best(self) -> Trial | None:
        return max(self.trials, key=lambda trial: trial.rate, default=None)


def search_batches(
    batches: list[int],
    try_batch: Callable[[int], Trial],
    predict: Callable[[int], float],
    seconds_left: Callable[[], float],
    pace: Pace,
) -> Search:
    """Tries batch sizes, smallest first, until one does not fit, or is no gain, or time is up.

    try_batch: times a batch of that many texts; an out-of-memory error ends the search.
    predict: the seconds that a trial of it will take. The first size is tried in any case.
    """
    search = Search([], "all tried")
    best, without_gain = 0.0, 0
    for batch in batches:
        if search.trials and predict(batch) > seconds_left():
            search.ended = "time"
            break
        error = None
        try:
            search.trials.append(try_batch(batch))
        except Exception as raised:
            if not is_out_of_memory(raised):
                raise
            error = raised.with_traceback(None)  # whose frames hold the batch's tensors
        if error is not None:
            search.ended = "out of memory"
            release_memory()
            break
        rate = search.trials[-1].rate
        without_gain = without_gain + 1 if rate < best * (1 + pace.gain) else 0
        best = max(best, rate)
        if without_gain > pace.patience - 1:
            search.ended = "no gain"
            break
    return search


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # the high-water mark of resident memory (man 5 proc)


def peak_memory(device: torch.device) -> int | None:
    """Bytes, weights included: on a GPU those reserved, on Linux the process's resident ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else None


@torch.inference_mode()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the fastest large matrix product at hand, torch's or ours: the roof that
    MFU is a share of. The best of its calls, so that no share is flattered by a slow moment."""
    n = 8192 if device.type == "cuda" else 1536
    x, weight = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        step = partial(product, x, weight)
        time_steps(step, 2, 1.0, device)
        return min(time_steps(step, 20, 0.5, device))

    return 2 * n**3 / min(seconds(F.linear), seconds(linear))
