"""The paper's Table 10 and Figure 3, and real lengths beside them: `neobert.throughput`, by pytest.

    pytest benchmarks/bench_throughput.py --benchmark-only [-k "neobert and short"]

An entry is a model on a workload. Each model runs in a process of its own, which times its steps;
here they are played back, so that pytest-benchmark's own statistics, --benchmark-json and
--benchmark-compare are those of the steps. The table goes to benchmarks/results/
<machine>-throughput.json, over the cells that are there, and its picture beside it. The time budget
is shared among the models that are selected; `neobert bench` has options for all of it.
"""

import functools

import pytest
from timing import RESULTS

from neobert.throughput import results, run
from neobert.throughput.plot import draw

PLAN = run.default_plan()


class Playback:
    """A clock for pytest-benchmark that shows the seconds a worker measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: list[float]) -> None:
        """Lets the next of `seconds` pass."""
        self.now += seconds.pop(0)


CLOCK = Playback()


@pytest.fixture(scope="session")
def figures_of(request, tmp_path_factory):
    """figures_of(contestant): its cells; the first call runs its worker."""
    chosen = [item.callspec.params for item in request.session.items if "throughput" in item.name]
    contestants = [name for name in PLAN.contestants if name in {p["contestant"] for p in chosen}]
    budget = run.Budget(PLAN, contestants)
    here = run.describe_machine(PLAN.device)
    folder = tmp_path_factory.mktemp("throughput")
    path = None

    @functools.cache
    def measured(contestant: str) -> dict:
        workloads = {p["workload"] for p in chosen if p["contestant"] == contestant}
        nonlocal path
        plan = run.default_plan(workloads=[w for w in PLAN.workloads if w in workloads])
        figures = run.run_contestant(plan, contestant, budget, folder)
        path = results.results_path(RESULTS, here)
        part = results.part_of_document(here, plan.dtype, contestant, figures, plan.seconds)
        document = results.write(path, part)
        draw(document, path.with_suffix(".png"))
        return figures["cells"]

    yield measured
    if path:
        print(f"\nthroughput written to {path}")


@pytest.mark.benchmark(group="throughput", timer=CLOCK)
@pytest.mark.parametrize("workload", PLAN.workloads)
@pytest.mark.parametrize("contestant", PLAN.contestants)
def test_throughput(benchmark, figures_of, contestant, workload):
    if not benchmark.enabled:
        pytest.skip("a throughput has to be timed")
    cell = dict(figures_of(contestant)[workload])
    if "not_run" in cell:
        pytest.skip(cell["not_run"])
    seconds = cell.pop("step_s")
    benchmark.extra_info.update(cell)
    benchmark.pedantic(CLOCK.play, args=(list(seconds),), rounds=len(seconds))
