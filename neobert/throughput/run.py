"""The run of a table: who, what, within which time, and a worker process for each."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from neobert.machine import ROOT, machine
from neobert.throughput import models
from neobert.throughput.results import TIME_BUDGET, Figures, part_of_document
from neobert.throughput.shapes import CONTESTANTS, Shape
from neobert.throughput.worker import DTYPES, Request
from neobert.throughput.workloads import Workload

Event = dict[str, Any]

WORKER = (sys.executable, "-m", "neobert.throughput")
GRACE = 0.1  # of a contestant's share: how much longer what it has begun may take

# In the order of their worth, for time may run out.
WORKLOADS = {
    "cpu": (
        "fixed-512",
        "lognormal-512",
        "short-1",
        "fixed-1024",
        "short-64",
        "fixed-2048",
        "normal-512",
        "strings-512",
        "fixed-4096",
        "fixed-8192",
    ),
    "cuda": (
        "fixed-512",
        "fixed-1024",
        "fixed-2048",
        "fixed-4096",
        "fixed-8192",
        "lognormal-512",
        "lognormal-4096",
        "normal-512",
        "normal-8192",
        "strings-512",
        "short-1",
        "short-64",
    ),
}
# Of a run: ten minutes with what comes before and after. On a GPU for a third of the contestants.
SECONDS = {"cpu": 570.0, "cuda": 560.0}
QUICK_SECONDS = 160.0
QUICK_CONTESTANTS = ("neobert", "neobert-plain", "bert-base", "modernbert-base")
QUICK_WORKLOADS = ("fixed-512", "lognormal-512", "short-1", "short-64")


@dataclass(frozen=True)
class Plan:
    """What to run. Raises ValueError for names that are not there and a budget that is none.

    contestants: keys of CONTESTANTS. workloads: names as `Workload.parse` takes them.
    device: "cpu" or "cuda". dtype: "float32", "bfloat16" or "float16".
    seconds: the time budget of all of it, start to end.
    shapes: other shapes than the published ones, for tests.
    """

    contestants: tuple[str, ...]
    workloads: tuple[str, ...]
    device: str
    dtype: str
    seconds: float
    shapes: dict[str, Shape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device not in WORKLOADS:
            raise ValueError(f"device must be one of {', '.join(WORKLOADS)}, got {self.device!r}")
        for name in self.contestants:
            if name not in CONTESTANTS:
                raise ValueError(f"models must be among {', '.join(CONTESTANTS)}, got {name!r}")
        for name in self.workloads:
            Workload.parse(name)
        if not self.contestants or not self.workloads:
            raise ValueError("models and workloads must name at least one each")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is cuda, but torch {torch.__version__} finds no GPU")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")

    def shape(self, contestant: str) -> Shape:
        return self.shapes.get(contestant, CONTESTANTS[contestant].shape)


def default_plan(
    quick: bool = False,
    contestants: Sequence[str] = (),
    workloads: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    seconds: float | None = None,
) -> Plan:
    """The whole table on this machine, or what the arguments say of it.

    quick: four models, four workloads, in under three minutes on two cores; without
        torch.compile, whose compiling alone takes that long.
    """
    if device is None:  # asks the driver, but does not start it
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if quick:
        contestants = contestants or QUICK_CONTESTANTS
        workloads = workloads or QUICK_WORKLOADS
        seconds = seconds or QUICK_SECONDS
    return Plan(
        tuple(contestants or CONTESTANTS),
        tuple(workloads or WORKLOADS.get(device, ())),
        device,
        dtype or ("bfloat16" if device == "cuda" else "float32"),
        SECONDS.get(device, 0.0) if seconds is None else seconds,
    )


class Budget:
    """Seconds, shared out among contestants: each gets its part of what is left."""

    def __init__(self, plan: Plan, contestants: Sequence[str] | None = None):
        self.deadline = time.time() + plan.seconds
        self.waiting = {
            name: CONTESTANTS[name].share if plan.device == "cpu" else 1.0
            for name in contestants or plan.contestants
        }

    def next_deadline(self, contestant: str) -> float:
        """time.time() at which the contestant, whose turn it is, has used up its share."""
        share = self.waiting[contestant] / sum(self.waiting.values())
        del self.waiting[contestant]
        now = time.time()
        return now + max(0.0, self.deadline - now) * share


def run(plan: Plan, update: Callable[[Figures], object], progress: bool = True) -> None:
    """Runs the plan. `update` is given each contestant's part of the document as it is done.

    progress: show a bar on standard error.
    """
    budget = Budget(plan)
    here = describe_machine(plan.device)
    cells = len(plan.contestants) * len(plan.workloads)
    with (
        tempfile.TemporaryDirectory(prefix="neobert-bench-") as folder,
        tqdm(total=cells, unit="cell", disable=not progress) as bar,
    ):
        for name in plan.contestants:
            bar.set_description(name)

            def show(event: Event) -> None:
                if event["event"] == "begin":
                    bar.set_postfix_str(event["workload"])
                elif event["event"] == "cell":
                    bar.update()

            figures = run_contestant(plan, name, budget, Path(folder), show)
            update(part_of_document(here, plan.dtype, name, figures, plan.seconds))


def describe_machine(device: str) -> Figures:
    """`machine()`, of a GPU in another process: this one must not take memory from the workers'."""
    if device == "cpu":
        return machine(device)
    code = "import json; from neobert.machine import machine; print(json.dumps(machine()))"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment()
    )
    return json.loads(said.stdout.splitlines()[-1])


def run_contestant(
    plan: Plan,
    name: str,
    budget: Budget,
    folder: Path,
    show: Callable[[Event], object] = lambda event: None,
    worker: Sequence[str] = WORKER,
) -> Figures:
    """One contestant's figures, whatever becomes of its process.

    The workload in which a process dies says how, and another process goes on after it; what is
    not reached in time says so. `show` is given the events as they come.
    """
    share = budget.next_deadline(name) - time.time()
    deadline = time.time() + share
    checkpoint = None
    if CONTESTANTS[name].variant != "transformers":
        checkpoint = folder / "neobert"
        if not checkpoint.exists():
            models.write_checkpoint(checkpoint, plan.shape(name))
    cells: dict[str, Figures] = {}
    figures: Figures = {"cells": cells}
    begun: list[str] = []

    def hear(event: Event) -> None:
        if event["event"] == "ready":
            figures.update({key: value for key, value in event.items() if key != "event"})
        elif event["event"] == "begin":
            begun.append(event["workload"])
        else:
            cells[event["workload"]] = event["cell"]
        show(event)

    def give_up(workloads: Sequence[str], why: str) -> None:
        for workload in workloads:
            hear({"event": "cell", "workload": workload, "cell": {"not_run": why}})

    pending = list(plan.workloads)
    while pending:
        request = Request(
            name,
            plan.device,
            plan.dtype,
            pending,
            str(checkpoint) if checkpoint else None,
            time.time(),
            deadline,
            asdict(plan.shapes[name]) if name in plan.shapes else None,
        )
        cause = run_worker(request, deadline + GRACE * share, folder, worker, hear)
        pending = [workload for workload in pending if workload not in cells]
        if cause is None:
            if pending:
                give_up(pending, _withheld(figures))
            break
        if cause == TIME_BUDGET or not begun or begun[-1] in cells:
            give_up(pending, cause)  # no time, or nothing to go on without
            break
        give_up(begun[-1:], cause)
        pending.remove(begun[-1])
    return figures


def run_worker(
    request: Request,
    kill_at: float,
    folder: Path,
    command: Sequence[str],
    hear: Callable[[Event], object],
) -> str | None:
    """Runs one process to its end, or until the time `kill_at`; returns how it died, or None."""
    errors = folder / "stderr.txt"
    # Caches of its own: cold start counts what a first run has to compile.
    with open(errors, "wb") as stderr, tempfile.TemporaryDirectory(dir=folder) as caches:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=_environment() | {"TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": caches},
            start_new_session=True,  # so that what it starts ends with it
        )
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(request.to_json())
            for event in _events(process, kill_at):
                hear(event)
            code = process.wait()
        except TimeoutError:
            return TIME_BUDGET
        finally:
            _end(process)
    return None if code == 0 else _cause_of_death(code, errors.read_text(errors="replace"))


def _events(process: subprocess.Popen, kill_at: float) -> Iterator[Event]:
    """The process's lines as they come; TimeoutError at the time `kill_at`."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, kill_at - time.time()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        yield json.loads(line)


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        # The largest batch must not fail for the memory's being in pieces.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # glibc keeps freed blocks: else every large tensor of a CPU model is mapped anew, and what
        # is timed is page faults, the plain models' above all.
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    }


def _end(process: subprocess.Popen) -> None:
    """Ends the process and whatever it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _cause_of_death(code: int, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else "no message"
    if code == -signal.SIGKILL:
        return "killed, as by a system that is out of memory"
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}, {last}"
    return f"crashed: {last}"


def _withheld(figures: Figures) -> str:
    parity = figures["parity"]
    return (
        f"withheld: cosine {parity['cosine']:.6f} to float32 plain PyTorch, whose own in this "
        f"dtype is {parity['plain_cosine']:.6f}"
    )
