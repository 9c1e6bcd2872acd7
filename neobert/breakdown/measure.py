"""Seconds of each op by torch.profiler, and what the ops' sum leaves of the wall clock."""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from neobert.breakdown.work import Work, WorkCounter, out_of_place
from neobert.throughput.measure import matmul_rate, time_steps

Step = Callable[[], object]

# What the bars are made of, in their order. An op in none of the sets is among the "other ops".
CATEGORIES = {
    "GEMM": {
        "neobert::linear",
        "neobert::linear_swiglu",
        "neobert::batch_invariant_linear",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
    },
    "attention": {"neobert::varlen_attention", "neobert::varlen_attention_bwd"},
    "row ops": {
        f"neobert::{name}{suffix}"
        for name in ("rms_norm", "add_rms_norm", "swiglu", "rotary", "rotary_qkv_")
        for suffix in ("", "_bwd")
    },
    "pooling, loss": {
        "neobert::pool",
        "neobert::pool_bwd",
        "neobert::linear_cross_entropy",
        "neobert::linear_cross_entropy_grads",
    },
    "embedding": {"aten::embedding", "aten::embedding_dense_backward"},
    "copies, casts": {
        f"aten::{name}"
        for name in ("copy", "_to_copy", "clone", "cat", "fill", "zero", "zeros", "new_zeros")
    },
    "other ops": set(),
}
UNATTRIBUTED = "kernels of no op"
REMAINDER = "launch gaps, Python, dispatcher"


def category(op: str) -> str:
    return next((name for name, ops in CATEGORIES.items() if op in ops), "other ops")


@dataclass(frozen=True)
class Roof:
    """What the machine can do, measured: FLOP per second of its fastest large matrix product, and
    bytes per second, read and written, of a copy that no cache holds."""

    flop_rate: float
    copy_rate: float

    def seconds(self, work: Work) -> float:
        """The least time that the work takes: one of its two limits."""
        return max(work.flop / self.flop_rate, work.bytes / self.copy_rate)


@dataclass(frozen=True)
class Op:
    """One op of a step: its work, and its seconds, of all its calls and all that they call."""

    name: str
    work: Work
    seconds: float


@dataclass(frozen=True)
class Breakdown:
    """A step, taken apart; all seconds are per step.

    wall: the profiled step's. unprofiled: the same without the profiler, median.
    unattributed: seconds of GPU kernels that no op of this process launched, graph replays above
        all.
    host: on the CPU, what of the remainder torch.profiler has names for: the ops and autograd
        nodes outside the counted ops, without what is called in them. The rest is Python.
    page_faults, system: pages that the process touched for the first time, and the seconds that
        the operating system took, in an unprofiled step.
    """

    tokens: int
    ops: list[Op]
    wall: float
    unprofiled: float
    unattributed: float
    host: dict[str, float]
    page_faults: float
    system: float

    @property
    def remainder(self) -> float:
        """What no kernel accounts for. Less than nothing if GPU kernels ran side by side."""
        return self.wall - sum(op.seconds for op in self.ops) - self.unattributed

    def by_category(self) -> dict[str, list[Op]]:
        """The ops, those that take longest first."""
        groups: dict[str, list[Op]] = {name: [] for name in CATEGORIES}
        for op in sorted(self.ops, key=lambda op: -op.seconds):
            groups[category(op.name)].append(op)
        return groups


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    return Roof(matmul_rate(device, dtype), copy_rate(device))


@torch.no_grad()
def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of torch's copy of more than the caches hold; the best of
    ten, so that no share of it is flattered by a slow moment."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)
    target = torch.ones_like(source)
    taken = time_steps(lambda: target.copy_(source), 10, 2.0, device)
    return 2 * source.numel() * source.element_size() / min(taken)


def take_apart(step: Step, tokens: int, device: torch.device, repeats: int) -> Breakdown:
    """Runs the step 2 + 2 * repeats times: to warm up, to count its work, as it is, profiled."""
    synchronize: Step = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step()
    with WorkCounter() as counter:
        step()
    synchronize()

    taken, before = [], resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        synchronize()
        taken.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF)

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
            synchronize()
        wall = time.perf_counter() - start
    on_gpu, events = device.type == "cuda", list(profiler.events() or ())
    seconds, unattributed = attribute(events, counter.ops, on_gpu)
    host = {} if on_gpu else unowned(events, counter.ops)
    return Breakdown(
        tokens,
        [Op(name, work, seconds[name] / repeats) for name, work in counter.ops.items()],
        wall / repeats,
        statistics.median(taken),
        unattributed / repeats,
        {name: each / repeats for name, each in host.items()},
        (after.ru_minflt - before.ru_minflt) / repeats,
        (after.ru_stime - before.ru_stime) / repeats,
    )


def attribute(
    events: Iterable[Any], names: Iterable[str], on_gpu: bool
) -> tuple[dict[str, float], float]:
    """Seconds of each of the ops `names`, and of the GPU kernels that belong to none.

    The profiler's events form trees. The outermost event with one of the names owns all of its
    tree: on the CPU its duration, on a GPU the durations of the kernels launched in it.
    """
    owners, seconds, of_kernels = set(names), dict.fromkeys(names, 0.0), 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            of_kernels += event.time_range.elapsed_us() / 1e6
        elif (name := out_of_place(event.name)) in owners and not _has_owner(event, owners):
            time_of = event.device_time_total if on_gpu else event.cpu_time_total
            seconds[name] += time_of / 1e6
    return seconds, max(0.0, of_kernels - sum(seconds.values())) if on_gpu else 0.0


def unowned(events: Iterable[Any], names: Iterable[str]) -> dict[str, float]:
    """Seconds on the CPU in each kind of event outside the ops `names`, those called in it apart;
    the longest first."""
    owners, seconds = set(names), defaultdict[str, float](float)
    for event in events:
        if out_of_place(event.name) not in owners and not _has_owner(event, owners):
            seconds[event.name] += event.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda each: -each[1]))


def _has_owner(event: Any, owners: set[str]) -> bool:
    while (event := event.cpu_parent) is not None:
        if out_of_place(event.name) in owners:
            return True
    return False
