"""The throughput table's run: budget, processes that die, results file, report, command line."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neobert.cli import app
from neobert.throughput import results, run, table
from neobert.throughput.plot import draw
from neobert.throughput.shapes import CONTESTANTS
from tests.test_throughput import tiny

ROOT = Path(__file__).parent.parent
WORKLOADS = ("fixed-16", "fixed-32", "short-1")
HERE = {"cpu": "A CPU", "cores": 2, "cpu_kernels": "avx2", "torch": "2.13"}

# A worker that says what a real one would, but for one workload in which it does as told.
FAKE = """
import json, os, subprocess, signal, sys, time
request = json.load(sys.stdin)
def say(**event): print(json.dumps(event), flush=True)
{before}
say(event="ready", attention="sdpa", cold_start_s=1.0, matmul_flops=1e12, parity={parity})
for workload in request["workloads"] if {goes_on} else []:
    say(event="begin", workload=workload)
    if workload == "fixed-32":
        {act}
    say(event="cell", workload=workload, cell={{"tokens_per_s": 1.0}})
"""


def plan(*contestants: str, workloads=WORKLOADS, seconds=60.0) -> run.Plan:
    return run.Plan(
        contestants,
        workloads,
        "cpu",
        "float32",
        seconds,
        {name: tiny(name) for name in contestants},
    )


def cells_after(tmp_path, act="pass", before="", parity="None", goes_on=True, seconds=60.0):
    script = FAKE.format(before=before, act=act, parity=parity, goes_on=goes_on)
    events = []
    figures = run.run_contestant(
        plan("bert-base", seconds=seconds),
        "bert-base",
        run.Budget(plan("bert-base", seconds=seconds)),
        tmp_path,
        events.append,
        [sys.executable, "-c", script],
    )
    shown = [e["workload"] for e in events if e["event"] == "cell"]
    assert sorted(shown) == sorted(figures["cells"]) == sorted(WORKLOADS)
    assert list(tmp_path.iterdir()) == [tmp_path / "stderr.txt"]
    return figures["cells"]


DONE = {"tokens_per_s": 1.0}


def test_a_whole_run(tmp_path):
    assert cells_after(tmp_path) == dict.fromkeys(WORKLOADS, DONE)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed, as by a system that is out of memory"),
        ("os.abort()", "crashed: SIGABRT, no message"),
        ("raise RuntimeError('a bad kernel')", "crashed: RuntimeError: a bad kernel"),
        ("sys.exit(3)", "crashed: no message"),
    ],
)
def test_a_crash_costs_one_workload(tmp_path, act, reason):
    cells = cells_after(tmp_path, act)
    assert cells == {"fixed-16": DONE, "fixed-32": {"not_run": reason}, "short-1": DONE}


def test_a_worker_that_cannot_start_is_not_started_for_ever(tmp_path):
    cells = cells_after(tmp_path, before="raise ImportError('no such model')")
    reason = "crashed: ImportError: no such model"
    assert cells == {workload: {"not_run": reason} for workload in WORKLOADS}


def test_a_worker_beyond_its_share_is_ended_with_all_it_started(tmp_path):
    pid = tmp_path.parent / "pid"
    act = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    start = time.time()
    cells = cells_after(tmp_path, act, seconds=1.0)
    assert time.time() - start < 10
    cut = {"not_run": "time budget"}
    assert cells == {"fixed-16": DONE, "fixed-32": cut, "short-1": cut}
    status = Path(f"/proc/{pid.read_text()}/status")
    if status.exists():  # not yet collected by the system's first process
        assert "State:\tZ" in status.read_text()


def test_a_model_without_parity_has_no_figures(tmp_path):
    parity = {"cosine": 0.91, "plain_cosine": 0.9995, "passed": False}
    cells = cells_after(tmp_path, parity=repr(parity), goes_on=False)
    (reason,) = {cell["not_run"] for cell in cells.values()}
    assert reason.startswith("withheld: cosine 0.910000 to float32 plain PyTorch")


def test_the_budget_is_shared_and_what_is_left_goes_on(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    names = ("bert-base", "roberta-base", "bert-large")
    shares = [CONTESTANTS[name].share for name in names]
    budget = run.Budget(plan(*names, seconds=120.0))
    assert budget.next_deadline(names[0]) == pytest.approx(1000 + 120 * shares[0] / sum(shares))
    now[0] += 10.0  # it took 10 s, less than its share
    assert budget.next_deadline(names[1]) == pytest.approx(
        1010 + 110 * shares[1] / (shares[1] + shares[2])
    )
    assert budget.next_deadline(names[2]) == pytest.approx(1120)


def test_a_budget_that_is_spent_gives_nothing(monkeypatch):
    now = time.time
    budget = run.Budget(plan("bert-base", seconds=1.0))
    monkeypatch.setattr(time, "time", lambda: now() + 2.0)
    assert budget.next_deadline("bert-base") <= time.time()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contestants": ("bert",)}, "models must be among .*neobert.*, got 'bert'"),
        ({"contestants": ()}, "models and workloads must name at least one each"),
        ({"workloads": ("long-512",)}, "a workload is named .* got 'long-512'"),
        ({"device": "abacus"}, "device must be one of cpu, cuda, got 'abacus'"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"seconds": 0.0}, "seconds must be positive, got 0.0"),
    ],
)
def test_plans_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        replace(run.default_plan(device="cpu"), **change)


def test_default_plans():
    whole = run.default_plan(device="cpu")
    assert whole.contestants == tuple(CONTESTANTS) and whole.seconds <= 600
    quick = run.default_plan(quick=True, device="cpu")
    assert quick.seconds <= 180 and set(quick.contestants) < set(whole.contestants)
    assert set(quick.workloads) < set(whole.workloads)
    one = run.default_plan(quick=True, contestants=["nomicbert"], seconds=9, device="cpu")
    assert one.contestants == ("nomicbert",) and one.workloads == quick.workloads
    assert one.seconds == 9


def cell(rate=1000.0, **more):
    figures = {
        "tokens_per_s": rate,
        "flops": rate * 4e8,
        "mfu": 0.5,
        "batch": 4,
        "steps": 3,
        "step_s": {"median": 0.2, "min": 0.1, "max": 0.3},
        "padding": 1.0,
        "peak_bytes": 2**30,
    }
    return figures | {"commit": "abc", "date": "2026-01-01", "budget_s": 60.0} | more


def document():
    parity = {"cosine": 0.99991, "plain_cosine": 0.9999, "passed": True}
    ready = {"attention": "sdpa", "cold_start_s": 9.0, "matmul_flops": 1e12}
    cut = {"not_run": "time budget", "budget_s": 60.0}
    beyond = {"not_run": "beyond 512 positions", "budget_s": 60.0}
    bert = {"fixed-512": cell(3000.0), "fixed-1024": beyond, "lognormal-512": cut}
    ours = {
        "fixed-512": cell(1200.0),
        "fixed-1024": cell(1100.0),
        "lognormal-512": cell(1150.0),
        "short-1": cell(900.0, p50_ms=25.04, p90_ms=31.23),
    }
    plain = {
        "fixed-512": cell(600.0),
        "fixed-1024": {"not_run": "crashed: RuntimeError: x", "budget_s": 60.0},
        "lognormal-512": cell(250.0, padding=1.83),
        "short-1": cell(450.0, p50_ms=50.0, p90_ms=60.0),
    }
    rows = {
        "bert-base": ready | {"cells": bert},
        "neobert-plain": ready | {"cells": plain, "parity": parity},
        "neobert": ready | {"cells": ours, "parity": parity, "attention": "varlen_attention"},
    }
    return {"machine": HERE, "throughput": {"float32": rows}}


def test_the_table():
    lines = table.markdown(document(), "neobert bench").splitlines()
    for line in (
        "| all texts of length | attention | 512 | 1,024 | paper, 512 | paper, 1,024 |",
        "| **NeoBERT, neobert-kernels** | varlen_attention "
        "| 1,200 (4) | 1,100 (4) | 24.5k | 22.2k |",
        "| NeoBERT, plain PyTorch | sdpa | 600 (4) | *crashed* |  |  |",
        "| BERT-base | sdpa | 3,000 (4) | - | 27.6k | - |",
        "|  | lognormal lengths ≤ 512 | queries, 1 at a time, ms, p50 / p90 |",
        "| **NeoBERT, neobert-kernels** | 1,150 (1.00) | 25 / 31.2 |",
        "| NeoBERT, plain PyTorch | 250 (1.83) | 50 / 60 |",
        "| BERT-base | *time* |  |",
        "| NeoBERT, plain PyTorch | 0.24, 50% | *crashed* | 1.0 | 9.0 | 9e-05 |",
        "neobert-kernels, times as fast (unsorted batches of 32 texts or more): "
        "fixed-512: 2.00x plain; lognormal-512: 4.60x plain; short-1: 2.00x plain.",
        "Not run: NeoBERT, plain PyTorch: crashed: RuntimeError: x (fixed-1024); "
        "BERT-base: time: beyond its share of the budget of 60 s (lognormal-512)",
    ):
        assert line in lines, "\n".join(lines)
    assert "under 4 %" in "\n".join(lines) and lines[-1] == "Made by `neobert bench`."


def test_the_table_of_a_model_that_never_started():
    crashed = {"not_run": "crashed: ImportError", "budget_s": 60.0}
    rows = {"bert-base": {"cells": {"fixed-512": crashed}}}
    text = table.markdown({"machine": HERE, "throughput": {"float32": rows}})
    assert "| BERT-base |  | *crashed* | 27.6k |" in text
    assert "BERT-base: crashed: ImportError (fixed-512)" in text


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    draw(document(), tmp_path / "new/table.png")
    assert (tmp_path / "new/table.png").read_bytes().startswith(b"\x89PNG")


def part(name="bert-base", dtype="float32", **cells):
    cells = {workload.replace("_", "-"): cell for workload, cell in cells.items()}
    return results.part_of_document(HERE, dtype, name, {"attention": "sdpa", "cells": cells}, 60.0)


def test_a_later_run_joins_an_earlier_one(tmp_path):
    path = results.results_path(tmp_path / "results", HERE)
    assert path.name == "a-cpu-2-cores-avx2-throughput.json"
    late = {"not_run": "time budget"}
    results.write(path, part(fixed_16={"tokens_per_s": 1.0}, fixed_32=late))
    results.write(path, part(fixed_32={"tokens_per_s": 2.0}, short_1={"tokens_per_s": 3.0}))
    results.write(path, part(fixed_16={"tokens_per_s": 4.0}, short_1=late))
    results.write(path, part(dtype="bfloat16", fixed_16={"tokens_per_s": 5.0}))
    found = json.loads(path.read_text())
    cells = found["throughput"]["float32"]["bert-base"]["cells"]
    assert {w: c.get("tokens_per_s") for w, c in cells.items()} == {
        "fixed-16": 4.0,
        "fixed-32": 2.0,
        "short-1": 3.0,
    }
    assert list(found["throughput"]) == ["float32", "bfloat16"] and found["machine"] == HERE
    assert {"commit", "date", "budget_s"} <= set(cells["fixed-16"])
    crashed = {"not_run": "crashed: x"}  # unlike lack of time, this says something of the code
    results.write(path, part(fixed_16=crashed))
    cells = json.loads(path.read_text())["throughput"]["float32"]["bert-base"]["cells"]
    assert cells["fixed-16"]["not_run"] == "crashed: x"


def invoke(*arguments):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_command_line(tmp_path, monkeypatch):
    """With two real processes."""
    pytest.importorskip("matplotlib")
    default = run.default_plan

    def tiny_plan(*arguments):
        plan = default(*arguments)
        return replace(plan, shapes={name: tiny(name) for name in plan.contestants})

    monkeypatch.setattr(run, "default_plan", tiny_plan)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code, said = invoke("--models", "neobert,bert-base", "--workloads", "fixed-16,short-1",
                        "--device", "cpu", "--seconds", 120, "--output", tmp_path, "--plot",
                        "--progress")  # fmt: skip
    assert code == 0, said
    (written,) = tmp_path.glob("*-throughput.json")
    assert written.with_suffix(".png").exists()
    rows = json.loads(written.read_text())["throughput"]["float32"]
    assert set(rows) == {"neobert", "bert-base"}
    for row in rows.values():
        assert all(cell["tokens_per_s"] > 0 for cell in row["cells"].values()), row
        assert row["cold_start_s"] > 0 and row["matmul_flops"] > 1e9
    assert rows["neobert"]["parity"]["passed"]
    assert "2 models, 2 workloads, float32 on cpu, at most 120 s" in said
    assert "| **NeoBERT, neobert-kernels** |" in said and f"written to {written}" in said
    assert "4/4" in said  # of the progress bar's cells


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "bert"], "models must be among"),
        (["--workloads", "long"], "a workload is named"),
        (["--device", "abacus"], "device must be one of cpu, cuda, got 'abacus'"),
        (["--seconds", 0], "seconds must be positive"),
    ],
)
def test_mistaken_options(tmp_path, arguments, message):
    code, said = invoke(*arguments, "--output", tmp_path)
    assert code == 1 and f"Error: {message}" in said, said
    assert not list(tmp_path.iterdir())


PLUGIN = """
import pathlib, sys
from neobert.throughput import run

def fake(plan, name, budget, folder):
    seconds = [0.25, 0.5, 0.75]
    done = {"tokens_per_s": 7.0, "flops": 1.0, "mfu": 0.5, "batch": 1, "steps": 3,
            "step_s": seconds, "padding": 1.0, "peak_bytes": 1}
    cells = {w: dict(done) for w in plan.workloads}
    if "fixed-8192" in cells:
        cells["fixed-8192"] = {"not_run": "beyond 512 positions"}
    return {"attention": "sdpa", "cold_start_s": 1.0, "cells": cells}

run.run_contestant = fake

def pytest_collection_modifyitems(items):
    for item in items:
        item.module.RESULTS = pathlib.Path(__file__).parent
"""


def test_pytest_benchmark_has_the_steps_that_were_measured(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "fake_workers.py").write_text(PLUGIN)
    saved = tmp_path / "saved.json"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-rs", "-p", "fake_workers"),
        *("-p", "no:cacheprovider", "benchmarks/bench_throughput.py", "--benchmark-only"),
        *("-k", "bert-base and fixed and (512 or 8192)", f"--benchmark-json={saved}"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "beyond 512 positions" in result.stdout
    entries = json.loads(saved.read_text())["benchmarks"]
    assert [entry["params"]["workload"] for entry in entries] == ["fixed-512"] * len(entries)
    for entry in entries:
        assert entry["stats"]["rounds"] == 3 and entry["stats"]["median"] == pytest.approx(0.5)
        assert entry["stats"]["min"] == pytest.approx(0.25)
        assert entry["extra_info"]["tokens_per_s"] == 7.0
    (written,) = tmp_path.glob("*-throughput.json")
    rows = json.loads(written.read_text())["throughput"]["float32"]
    assert set(rows) == {entry["params"]["contestant"] for entry in entries}
    assert rows["bert-base"]["cells"]["fixed-512"]["step_s"] == {
        "median": 0.5,
        "min": 0.25,
        "max": 0.75,
    }
