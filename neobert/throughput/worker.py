"""One contestant in a process of its own: reads a request, measures, prints an event per line.

Memory that another model has held, threads that it has started and shapes that it has compiled
change no figure here; and if this process dies, what it has said so far is kept.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from neobert.devices import DTYPES
from neobert.throughput import measure, models
from neobert.throughput.shapes import CONTESTANTS, Contestant, Shape
from neobert.throughput.workloads import Workload, made_up_texts, made_up_tokenizer, random_ids

QUERIES = 16  # different ones in a row, each of its own length
WARM_UP_SECONDS = 3.0  # steps that take longer need none: a small batch has warmed up already


@dataclass(frozen=True)
class Request:
    """What a worker is asked for.

    contestant: its name; `shape` replaces the published one where it is given.
    workloads: names, in the order in which time is spent on them.
    checkpoint: the directory of the NeoBERT whose weights NeoBERT's rows have, or None.
    started: time.time() just before the process was started.
    deadline: time.time() after which nothing should be begun.
    """

    contestant: str
    device: str
    dtype: str
    workloads: list[str]
    checkpoint: str | None
    started: float
    deadline: float
    shape: dict | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Request":
        return cls(**json.loads(text))

    def resolved(self) -> Contestant:
        contestant = CONTESTANTS[self.contestant]
        return replace(contestant, shape=Shape(**self.shape)) if self.shape else contestant


class Worker:
    """Measures one contestant; `tell` is given the events."""

    def __init__(self, request: Request, tell: Callable[[dict[str, Any]], None]):
        self.request, self.tell = request, tell
        self.contestant = request.resolved()
        self.shape = self.contestant.shape
        self.device, self.dtype = torch.device(request.device), DTYPES[request.dtype]
        self.checkpoint = Path(request.checkpoint) if request.checkpoint else None
        self.pace = measure.PACES[self.device.type]
        # On a GPU torch.compile has one mode for many tokens and another for single queries.
        self.compiles_twice = self.contestant.variant == "compiled" and self.device.type == "cuda"
        self.for_latency = False
        self.rate = 0.0  # computed FLOP per second: what predictions go by

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_left(self) -> float:
        return self.request.deadline - time.time()

    @torch.inference_mode()
    def work(self) -> None:
        self.runner = self.build()
        self.runner.run(self.runner.inputs(random_ids([32], self.shape.vocab)))
        self.synchronize()
        cold_start = time.time() - self.request.started
        self.roof = measure.matmul_rate(self.device, self.dtype)
        self.rate = self.roof / 2  # until something has been measured
        parity = self.parity()
        self.tell(
            {
                "event": "ready",
                "attention": self.runner.attention,
                "cold_start_s": cold_start,
                "matmul_flops": self.roof,
                "parity": parity,
            }
        )
        if parity is not None and not parity["passed"]:
            return
        for name in self.request.workloads:
            self.tell({"event": "begin", "workload": name})
            workload = Workload.parse(name)
            cell = self.cell(workload)
            self.tell({"event": "cell", "workload": name, "cell": cell})

    def build(self) -> models.Runner:
        return models.build(
            self.contestant, self.device, self.dtype, self.checkpoint, self.for_latency
        )

    def parity(self) -> dict[str, Any] | None:
        if self.contestant.variant == "transformers":
            return None
        assert self.checkpoint is not None
        cosine, plain = models.worst_cosines(self.runner, self.checkpoint, self.dtype)
        measure.release_memory()
        passed = models.passes_parity(cosine, plain, self.dtype)
        return {"cosine": cosine, "plain_cosine": plain, "passed": passed}

    def cell(self, workload: Workload) -> dict[str, Any]:
        """The figures of one workload, or {"not_run": why}."""
        if workload.limit > self.shape.max_length:
            return {"not_run": f"beyond {self.shape.max_length} positions"}
        first = workload.batches(self.device.type)[0]
        if self.predicted(workload, first) > self.seconds_left():
            return {"not_run": "time budget"}
        latency = workload.kind == "short"
        if latency != self.for_latency and self.compiles_twice:
            self.for_latency = latency
            del self.runner
            measure.release_memory()
            self.runner = self.build()
        try:
            return self.latency(workload) if latency else self.throughput(workload)
        except Exception as error:
            if not measure.is_out_of_memory(error):
                raise
        measure.release_memory()
        return {"not_run": "out of memory"}

    def predicted(self, workload: Workload, batch: int) -> float:
        """Seconds of a trial: a step, or three of them if they are short; of queries two."""
        step = self.computed_flop(workload.lengths(batch)) / self.rate
        if workload.kind == "short":
            return 2 * step
        return step if step > WARM_UP_SECONDS else 3 * step

    def steps(self, workload: Workload, batch: int) -> measure.Step:
        """A function that computes the workload's batch, from ids on the device or from str."""
        lengths, vocab = workload.lengths(batch), self.shape.vocab
        if workload.kind == "strings":
            return self.runner.from_strings(made_up_texts(lengths, vocab), made_up_tokenizer(vocab))
        inputs = self.runner.inputs(random_ids(lengths, vocab), together=not workload.ragged)
        return lambda: self.runner.run(inputs)

    def try_batch(self, workload: Workload, batch: int, first: bool) -> measure.Trial:
        if first:
            # Compiles, for a batch with a mask or one without, whatever compiles.
            small = [min(n, 40) for n in workload.lengths(3)]
            if workload.ragged:
                small[0] = min(33, workload.limit)
            self.runner.run(self.runner.inputs(random_ids(small, self.shape.vocab)))
        step = self.steps(workload, batch)
        if self.device.type == "cuda" or self.predicted(workload, batch) <= 3 * WARM_UP_SECONDS:
            measure.time_steps(step, 2, 0.5, self.device)
        seconds = measure.time_steps(
            step, self.pace.search_steps, self.pace.search_seconds, self.device
        )
        lengths = workload.lengths(batch)
        self.rate = self.computed_flop(lengths) / statistics.median(seconds)
        return measure.Trial(batch, sum(lengths), seconds)

    def computed_flop(self, lengths: list[int]) -> int:
        """What the model computes for the batch, padding included."""
        padded = isinstance(self.runner, models.Padded)
        return self.shape.flop([max(lengths)] * len(lengths) if padded else lengths)

    def throughput(self, workload: Workload) -> dict[str, Any]:
        measure.reset_peak_memory(self.device)
        batches = workload.batches(self.device.type)
        search = measure.search_batches(
            batches,
            lambda batch: self.try_batch(workload, batch, batch == batches[0]),
            lambda batch: self.predicted(workload, batch),
            lambda: min(self.seconds_left(), 2 * self.pace.seconds),
            self.pace,
        )
        best = search.best
        if best is None:
            return {"not_run": search.ended}
        if statistics.median(best.seconds) * 2 < min(self.seconds_left(), self.pace.seconds):
            # The figure is that of the best batch, run again for longer and by itself.
            measure.reset_peak_memory(self.device)
            step = self.steps(workload, best.batch)
            measure.time_steps(step, 1, 0.0, self.device)
            seconds = min(self.pace.seconds, self.seconds_left())
            taken = measure.time_steps(step, self.pace.steps, seconds, self.device)
            best = measure.Trial(best.batch, best.tokens, taken)
        lengths = workload.lengths(best.batch)
        return {
            **self.figures(
                best.batch,
                best.rate,
                best.rate / best.tokens * self.shape.flop(lengths),
                best.seconds,
            ),
            "padding": self.padding(lengths),
            "batches_tried": {trial.batch: round(trial.rate, 1) for trial in search.trials},
            "search_ended": search.ended,
        }

    def latency(self, workload: Workload) -> dict[str, Any]:
        measure.reset_peak_memory(self.device)
        lengths = [workload.lengths(workload.number)]
        if workload.number == 1:
            lengths = [[n] for n in workload.lengths(QUERIES)]
        steps = [self.runner.query(random_ids(each, self.shape.vocab)) for each in lengths]
        # On a GPU torch, or the encoder, may warm up, then capture a CUDA graph, then replay it.
        for step in steps * (3 if self.device.type == "cuda" else 1):
            step()
        taken = measure.time_calls(
            itertools.cycle(steps), self.pace.steps, self.pace.seconds, self.synchronize
        )
        timed = list(itertools.islice(itertools.cycle(lengths), len(taken)))
        tokens, flop = (sum(map(per_batch, timed)) for per_batch in (sum, self.shape.flop))
        return {
            **self.figures(workload.number, tokens / sum(taken), flop / sum(taken), taken),
            "padding": self.padding(lengths[0]),
            "p50_ms": 1e3 * measure.percentile(taken, 0.5),
            "p90_ms": 1e3 * measure.percentile(taken, 0.9),
        }

    def padding(self, lengths: list[int]) -> float:
        """Tokens computed by a padded model over live tokens; 1 for a packed one."""
        padded = isinstance(self.runner, models.Padded)
        return max(lengths) * len(lengths) / sum(lengths) if padded else 1.0

    def figures(self, batch: int, rate: float, flops: float, seconds: list[float]) -> dict:
        return {
            "tokens_per_s": rate,
            "flops": flops,
            "mfu": flops / self.roof,
            "batch": batch,
            "steps": len(seconds),
            "step_s": seconds,
            "peak_bytes": measure.peak_memory(self.device),
        }


def main() -> None:
    """Reads a `Request` from standard input; events go to standard output, and whatever a library
    prints to standard error."""
    request = Request.from_json(sys.stdin.read())
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=events, flush=True)

    disable_progress_bar()
    Worker(request, tell).work()
