"""`neobert bench --profile`: what an op must do, whose time is whose, and what the sum leaves."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from typer.testing import CliRunner

from neobert import NeoBERTConfig, breakdown  # noqa: F401
from neobert.breakdown import cases, report, run
from neobert.breakdown.measure import (
    REMAINDER,
    UNATTRIBUTED,
    Breakdown,
    Op,
    Roof,
    attribute,
    take_apart,
    unowned,
)
from neobert.breakdown.work import Work, WorkCounter
from neobert.cli import app
from neobert.metrics import forward_flop
from neobert_kernels import _compiled, apply_rotary_qkv_, linear_swiglu, rms_norm

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]
CPU = torch.device("cpu")
CONFIG = NeoBERTConfig(
    vocab_size=2000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=384, max_length=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def steps():
    return {what: (tokens, step) for what, tokens, step in cases.cases(CONFIG, CPU, torch.float32)}


def counted(step):
    with WorkCounter() as counter:
        step()
    return counter.ops


def test_work_of_ops():
    x, weight = torch.randn(5, 16), torch.randn(16)
    ops = counted(lambda: rms_norm(x, weight))
    assert ops == {"neobert::rms_norm": Work(1, 0, 4 * (5 * 16 + 16 + 5 * 16 + 5))}
    gate_up = torch.randn(24, 16)
    ops = counted(lambda: linear_swiglu(x, gate_up))
    assert ops["neobert::linear_swiglu"] == Work(1, 2 * 5 * 16 * 24, 4 * (80 + 24 * 16 + 5 * 12))
    qkv, table, places = torch.randn(5, 2, 3, 8), torch.randn(9, 4), torch.arange(5)
    ops = counted(lambda: apply_rotary_qkv_(qkv, table, table.clone(), places))
    # q and k are read and written, v is not; the tables once each, positions in int64.
    assert ops["neobert::rotary_qkv_"].bytes == 4 * (2 * 160 + 2 * 36) + 8 * 5
    table = torch.randn(50, 8)
    assert counted(lambda: F.embedding(places, table))["aten::embedding"].bytes == 2 * 4 * 5 * 8
    target = torch.empty(6, 8)
    assert counted(lambda: target.copy_(table[:1].expand(6, 8)))["aten::copy"].bytes == 4 * (8 + 48)
    assert "aten::view" not in counted(lambda: (target.view(48), target.t(), torch.empty(3)))


@pytest.mark.skipif(_compiled.LOADED is None, reason=_compiled.status())
def test_the_flop_are_the_models(steps):
    """And a backward takes twice those of the forward, but for attention's, which recomputes."""
    tokens, forward = steps["forward"]
    lengths = cases.LENGTHS.lengths(cases.TEXTS["cpu"])
    squares = sum(length**2 for length in lengths)
    expected = forward_flop(CONFIG, tokens, squares)
    ops = counted(forward)
    assert sum(work.flop for work in ops.values()) == expected
    of_attention = 2 * 4 * CONFIG.hidden_size * squares
    assert ops["neobert::varlen_attention"].flop == of_attention
    ops = counted(steps["forward and backward"][1])
    head = ops.pop("neobert::linear_cross_entropy_grads").flop
    flop = head + sum(work.flop for work in ops.values())
    masked = head // (3 * 2 * CONFIG.hidden_size * CONFIG.vocab_size)
    assert 0.15 < masked / tokens < 0.25
    expected = forward_flop(CONFIG, tokens, squares, masked)
    assert flop == 3 * (expected - of_attention) + 3.5 * of_attention


@pytest.mark.skipif(_compiled.LOADED is None, reason=_compiled.status())
@pytest.mark.parametrize("what", ["one query", "forward", "forward and backward"])
def test_the_sum_is_the_wall_clock(steps, what):
    tokens, step = steps[what]
    found = take_apart(step, tokens, CPU, repeats=3)
    seconds = {op.name: op.seconds for op in found.ops}
    assert all(each >= 0 for each in seconds.values())
    assert seconds["neobert::linear"] > 0 and seconds["neobert::varlen_attention"] > 0
    # Every op that is counted is found in the trace, and what is not counted is found there too.
    silent = {op.name for op in found.ops if op.seconds == 0}
    assert silent <= {"aten::ones_like"}, silent
    assert 0 < found.remainder < found.wall
    assert sum(found.host.values()) < found.remainder
    computing = {name for name in found.host if name.startswith(("aten::", "neobert::"))}
    cheap = {"view", "t", "transpose", "slice", "select", "unbind", "empty", "alias", "detach"}
    heavy = {"add", "add_", "mul", "copy_", "clone", "mm", "sum", "zero_", "fill_", "cat"}
    assert not {f"aten::{name}" for name in heavy} & computing, computing
    assert {f"aten::{name}" for name in cheap} & computing


def event(name, start, end, parent=None, own=None, on_gpu=0.0, device=DeviceType.CPU):
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        device_type=device,
        time_range=SimpleNamespace(elapsed_us=lambda: end - start),
        cpu_time_total=end - start,
        self_cpu_time_total=end - start if own is None else own,
        device_time_total=on_gpu,
    )


def test_the_outermost_counted_op_owns_its_tree():
    linear = event("aten::linear", 0, 100, own=10)
    product = event("aten::mm", 10, 100, linear, own=60, on_gpu=500)
    events = [
        linear,
        product,
        event("aten::copy_", 20, 50, product),
        event("aten::copy_", 200, 204),
        event("aten::add_", 300, 307),
        event("gemm_kernel", 0, 400, device=DeviceType.CUDA),
        event("Memcpy", 400, 600, device=DeviceType.CUDA),
    ]
    names = ["aten::mm", "aten::copy", "aten::add"]
    seconds, unattributed = attribute(events, names, on_gpu=False)
    assert seconds == pytest.approx({"aten::mm": 90e-6, "aten::copy": 4e-6, "aten::add": 7e-6})
    assert unattributed == 0
    assert unowned(events[:5], names) == pytest.approx({"aten::linear": 10e-6})
    seconds, unattributed = attribute(events, names, on_gpu=True)
    assert seconds["aten::mm"] == pytest.approx(500e-6)
    assert unattributed == pytest.approx(100e-6)


def test_report(tmp_path):
    roof = Roof(flop_rate=1e12, copy_rate=1e11)
    ops = [
        Op("neobert::linear", Work(4, 2 * 10**11, 10**9), 0.25),
        Op("neobert::rms_norm", Work(9, 0, 10**10), 0.2),
        Op("aten::sum", Work(1, 0, 10**6), 0.0),
    ]
    found = Breakdown(1000, ops, 0.5, 0.4, 0.01, {"RMSNormBackward": 0.02}, 7.0, 0.001)
    table = report.markdown("forward", found, roof)
    assert "| neobert::linear | 4 | 250.00 | 50.0% | 0.800 | 4.0 | 80% |" in table
    assert "| **row ops** | 9 | 200.00 | 40.0% |  | 50.0 | 50% |" in table
    assert f"| **{UNATTRIBUTED}** | | 10.00 | 2.0% | | | |" in table
    assert f"| **{REMAINDER}** | | 40.00 | 8.0% | | | |" in table
    assert "| RMSNormBackward | | 20.00 | 4.0% | | | |" in table
    assert "2,500 tok/s" in table
    figures = report.as_json(found, roof)
    assert figures["categories"]["GEMM"]["roof_s"] == pytest.approx(0.2)
    total = sum(each["seconds"] for each in figures["categories"].values())
    assert total == pytest.approx(figures["wall_s"])
    path, _ = report.write(tmp_path, "cpu", "float32", 28, roof, {"forward": figures})
    path, document = report.write(tmp_path, "cpu", "bfloat16", 28, roof, {"forward": figures})
    assert json.loads(path.read_text()) == document
    assert set(document["breakdown"]) == {"float32", "bfloat16"}
    report.draw(document, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "NeoBERTConfig", lambda **layers: CONFIG)
    arguments = ["bench", "--profile", "--plot", "--device", "cpu", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "**one query, float32**: 32 tokens" in done.output
    assert "**forward and backward, float32**" in done.output
    (path,) = tmp_path.glob("*-breakdown.json")
    part = json.loads(path.read_text())["breakdown"]["float32"]
    assert list(part["cases"]) == ["one query", "forward", "forward and backward"]
    assert path.with_suffix(".png").exists()
