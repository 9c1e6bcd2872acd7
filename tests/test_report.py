"""The README's tables are what the results files say, for a CPU and for a GPU."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def report(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    return module


def write(root: Path, machine: dict, results: dict) -> Path:
    path = root / "benchmarks/results/machine.json"
    path.write_text(json.dumps({"machine": machine | {"torch": "2.13"}, "results": results}))
    return path


def test_gpu(report, tmp_path):
    names = {
        "bench_rms_norm.py::test_rms_norm[1024-ours-torch.bfloat16]": 0.5,
        "bench_rms_norm.py::test_rms_norm[131072-ours-torch.bfloat16]": 0.91,
        "bench_rms_norm.py::test_rms_norm[131072-liger-torch.bfloat16]": 0.77,
        "bench_rms_norm.py::test_rms_norm[131072-ours-torch.float32]": 0.11,
        "bench_rms_norm.py::test_rms_norm_backward[131072-ours-torch.bfloat16]": 0.81,
    }
    results = {name: {"share_of_copy": share} for name, share in names.items()}
    text = report.render(write(tmp_path, {"gpu": "NVIDIA H200", "triton": "3.6.0"}, results))
    assert text.splitlines()[2:] == [
        "| share of copy bandwidth, bfloat16, at tokens | by | 1,024 | 131,072 |",
        "|---|---|---|---|",
        "| RMSNorm forward | ours | 0.50 | 0.91 |",
        "| RMSNorm forward | liger | - | 0.77 |",
        "| RMSNorm backward | ours | - | 0.81 |",
    ]


def test_cpu(report, tmp_path):
    machine = {"cores": 2, "cpu": "CPU", "cpu_kernels": "avx2"}
    shares = {"share_of_copy": 0.753, "share_of_memory_copy": 1.204}
    results = {"bench_swiglu.py::test_swiglu[ours-torch.bfloat16]": shares}
    text = report.render(write(tmp_path, machine, results))
    assert "| SwiGLU | - | - | - | 1.20 (0.75) | - | - |" in text


def test_cpu_has_the_tables_that_were_measured(report, tmp_path):
    machine = {"cores": 2, "cpu": "CPU", "cpu_kernels": "avx2"}
    times = {"plain, a copy at a time": 5.37, "plain, 32": 2.0, "ours, a copy at a time": 3.04}
    name = "bench_perplexity.py::test_document[tiny-float32]"
    text = report.render(
        write(tmp_path, machine, {name: {"median_s": 0.0704, "times_as_fast_as": times}})
    )
    lines = text.splitlines()
    assert lines[2].startswith("| pseudo-perplexity of a document of 128 tokens | ours, s |")
    assert lines[4:] == ["| the `tiny` preset's size, float32 | 0.0704 | 5.4x | 2.0x | 3.0x |"]


def test_throughput(report, tmp_path):
    machine = {"cores": 2, "cpu": "CPU", "cpu_kernels": "avx2", "torch": "2.13"}
    cell = {"tokens_per_s": 1234.0, "flops": 5e11, "mfu": 0.5, "padding": 1.0, "batch": 2}
    rows = {"bert-base": {"attention": "sdpa", "cells": {"fixed-512": cell}}}
    path = tmp_path / "benchmarks/results/machine-throughput.json"
    path.write_text(json.dumps({"machine": machine, "throughput": {"float32": rows}}))
    text = report.render(path)
    assert "on 2 cores of an CPU (torch 2.13), from `benchmarks/results/machine-thr" in text
    assert "| BERT-base | sdpa | 1,234 (2) | 27.6k |" in text and "png" not in text
    path.with_suffix(".png").write_bytes(b"")
    assert "](benchmarks/results/machine-throughput.png)" in report.render(path)


def test_breakdown(report, tmp_path):
    machine = {"cores": 2, "cpu": "CPU", "cpu_kernels": "avx2", "torch": "2.13"}
    parts = {
        "GEMM": {"seconds": 0.3, "roof_s": 0.24, "ops": {}},
        "launch gaps, Python, dispatcher": {"seconds": 0.1, "roof_s": 0.0, "ops": {}},
    }
    case = {"tokens": 100, "wall_s": 0.4, "unprofiled_wall_s": 0.2, "categories": parts}
    document = {"machine": machine, "breakdown": {"float32": {"cases": {"forward": case}}}}
    path = tmp_path / "benchmarks/results/machine-breakdown.json"
    path.write_text(json.dumps(document))
    text = report.render(path)
    assert "| share of the step (of the roofline) | forward, float32 |" in text
    assert "| tokens per second | 500 |" in text
    assert "| GEMM | 75.0% (80%) |" in text
    assert "| launch gaps, Python, dispatcher | 25.0% |" in text and "png" not in text
    path.with_suffix(".png").write_bytes(b"")
    assert "](benchmarks/results/machine-breakdown.png)" in report.render(path)


def test_the_readme_says_what_the_files_that_it_names_say():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    named = [path for path in (ROOT / "benchmarks/results").glob("*.json") if path.name in readme]
    assert named
    for path in named:
        assert module.render(path) in readme, "run `python benchmarks/report.py --write`"
