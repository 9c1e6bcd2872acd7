"""Every registered op: schema, fake kernel, compilation, and which kernel serves it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from isa import OLDER, run_on

import neobert_kernels as nk
from neobert_kernels import __main__ as table
from neobert_kernels import _compiled, _library
from neobert_kernels._library import OPS, has_kernel, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, HEADS, HEAD_DIM, DIM = 11, 2, 16, 24


def samples(dtype):
    """Op name -> arguments of one small call."""
    x, residual, dy = torch.randn(3, TOKENS, DIM).to(dtype)
    weight, rstd = torch.randn(DIM).to(dtype), torch.rand(TOKENS)
    qkv = torch.randn(TOKENS, HEADS, 3, HEAD_DIM).to(dtype)
    q, k, v = qkv.unbind(2)
    cos, sin = torch.randn(2, 20, HEAD_DIM // 2)
    positions, cu_seqlens = torch.arange(TOKENS), torch.tensor([0, 4, 4, TOKENS]).int()
    vocabulary, bias = torch.randn(30, DIM).to(dtype), torch.randn(30).to(dtype)
    labels = torch.randint(0, 30, (TOKENS,))
    some = torch.where(torch.arange(TOKENS) % 3 == 0, labels, -100)
    squares, projection = ops.sum_of_squares(x), vocabulary.repeat(4, 1)[: HEADS * 3 * HEAD_DIM]
    out, lse = ops.varlen_attention(q, k, v, cu_seqlens, 7, 0.25)
    return {
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, residual, weight, 1e-5),
        "rms_norm_bwd": (dy, residual, x, weight, rstd),
        "add_rms_norm_bwd": (dy, residual.float(), x.float(), weight, rstd),
        "swiglu": (x,),
        "swiglu_bwd": (dy[:, : DIM // 2], x),
        "rotary": (q, cos, sin, positions, False),
        "rotary_qkv_": (qkv.clone(), cos, sin, positions, True),
        "pool": (x, cu_seqlens, True),
        "pool_bwd": (torch.randn(3, DIM), cu_seqlens, TOKENS, False, dtype),
        "linear": (x, vocabulary, None),
        "linear_swiglu": (x, vocabulary),
        "batch_invariant_linear": (x, vocabulary, torch.randn(TOKENS, 30)),
        "sum_of_squares": (x,),
        "linear_add": (x, vocabulary, (x @ vocabulary.t()).float()),
        "rms_linear_swiglu": (x, squares, vocabulary, 1e-5),
        "rms_linear_swiglu_keep": (x, squares, vocabulary, 1e-5),
        "rms_linear_rotary": (x, squares, projection, cos, sin, positions, 1e-5),
        "varlen_attention": (q, k, v, cu_seqlens, 7, 0.25),
        "varlen_attention_bwd": (out.clone(), q, k, v, out, lse, cu_seqlens, 7, 0.25),
        "linear_cross_entropy": (x, vocabulary, bias, some, -100),
        "linear_cross_entropy_grads": (x, vocabulary, bias, some, -100),
        "cross_entropy_rows": (x @ vocabulary.t(), labels),
        "cross_entropy_rows_grad_": (x @ vocabulary.t(), labels, 0.5),
    }


def test_every_op_has_a_sample():
    assert sorted(samples(torch.float32)) == sorted(OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype):
    # No autograd is registered with the op: the public functions carry it.
    torch.library.opcheck(
        getattr(ops, name).default,
        samples(dtype)[name],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_references_serve_where_there_are_no_kernels():
    """A CPU that the kernels are not built for: plain PyTorch, held to the same rule."""
    checks = {
        "test_rms_norm": "check_both",
        "test_swiglu": "check_accuracy",
        "test_rotary": "check_accuracy",
        "test_cross_entropy": "check_both",
    }
    calls = "".join(f"import {module}; {module}.{check}();" for module, check in checks.items())
    program = (
        "import torch; from neobert_kernels import _compiled; assert _compiled.LOADED is None;"
        f"torch.manual_seed(0); {calls} print(_compiled.status())"
    )
    tests = Path(__file__).parent
    env = os.environ | {
        "ATEN_CPU_CAPABILITY": "default",
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
    }
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "no C++ kernels for this CPU" in done.stdout or "not built" in done.stdout


def step(x, residual, weight, vocabulary, cos, sin, positions, cu_seqlens, labels):
    """Every function of this package once, forward."""
    y, total = nk.add_rms_norm(x, residual, weight)
    qkv = nk.linear(y, vocabulary[: 3 * DIM]).view(-1, 1, 3, DIM)
    qkv = nk.apply_rotary_qkv_(qkv, cos, sin, positions)
    attended = nk.varlen_attention_qkv(qkv, cu_seqlens, 64)
    qkv = nk.linear(attended.flatten(1), vocabulary[: 3 * DIM])
    attended = nk.rotary_attention_(qkv, 1, cos, sin, positions, cu_seqlens, 64)
    turned = nk.apply_rotary(attended, cos, sin, positions).flatten(1)
    hidden = nk.rms_norm(total + turned, weight)
    gated = nk.swiglu(nk.linear(hidden, vocabulary[: 2 * DIM]))
    loss = nk.linear_cross_entropy(gated, vocabulary, None, labels)
    return loss + nk.pool(gated, cu_seqlens).square().mean()


def inputs(tokens):
    generator = torch.Generator().manual_seed(tokens)
    x, residual = torch.randn(2, tokens, DIM, generator=generator)
    weight, vocabulary = torch.ones(DIM), torch.randn(90, DIM, generator=generator) / 5
    cos, sin = torch.randn(2, 40, DIM // 2, generator=generator)
    positions, labels = torch.arange(tokens), torch.arange(tokens) % 90
    cu_seqlens = torch.tensor([0, 3, tokens]).int()
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, vocabulary)]
    return leaves, (cos, sin, positions, cu_seqlens, labels)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph_with_dynamic_tokens(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (13, 30, 21):
        leaves, others = inputs(tokens)
        results = []
        for function in (step, compiled):
            loss = function(*leaves, *others)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


# Fused for GPUs. On a CPU `linear` and `linear_swiglu` have these epilogues but for the norm's.
WITHOUT_CPU_KERNEL = {"sum_of_squares", "linear_add", "rms_linear_swiglu", "rms_linear_swiglu_keep",
                      "rms_linear_rotary"}  # fmt: skip


def check_table():
    """Run on each build: every op is C++ on the CPU, and the table names the build."""
    lines = table.table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == OPS
    for name, line in zip(OPS, lines[1:], strict=True):
        if name in WITHOUT_CPU_KERNEL:
            assert "plain PyTorch" in line
            continue
        assert has_kernel(name, "CPU"), f"{name} has no CPU kernel"
        assert f"C++ ({_compiled.LOADED})" in line


def test_every_op_has_its_cpu_kernel():
    if _compiled.LOADED is None:
        pytest.skip(_compiled.status())
    check_table()


@pytest.mark.parametrize("isa", OLDER)
def test_every_op_has_its_cpu_kernel_on(isa):
    run_on(isa, check_table)


def test_table_as_a_program():
    command = [sys.executable, "-m", "neobert_kernels"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"torch {torch.__version__}" in out and _compiled.status() in out
    assert all(f"\n{name} " in out for name in OPS)


def test_second_python_kernel_for_a_key_is_refused(monkeypatch):
    monkeypatch.setattr(_library, "_PYTHON_KERNELS", {("rms_norm", "CUDA"): print})
    with pytest.raises(RuntimeError, match="neobert::rms_norm already has a CUDA kernel in Python"):
        _library.impl("rms_norm", "CUDA")(lambda *arguments: None)


@pytest.mark.parametrize("compiled", [True, False])
def test_python_kernel_stands_back_for_a_compiled_one(monkeypatch, compiled):
    registered = []
    monkeypatch.setattr(_library, "_PYTHON_KERNELS", {})
    monkeypatch.setattr(_library, "has_kernel", lambda name, key: compiled)
    monkeypatch.setattr(
        _library, "lib", SimpleNamespace(impl=lambda *arguments: registered.append(arguments))
    )
    _library.impl("rms_norm", "CUDA")(print)
    assert registered == ([] if compiled else [("rms_norm", print, "CUDA")])


def test_python_kernels_can_serve_for_a_while(monkeypatch):
    def doubled(x, weight, eps):
        return 2 * x, x[..., 0].float()

    x, weight = torch.randn(3, 8), torch.randn(8)
    served = nk.rms_norm(x, weight)
    kernels = {("rms_norm", "CPU"): doubled, ("swiglu", "CUDA"): print}
    monkeypatch.setattr(_library, "_PYTHON_KERNELS", kernels)
    with _library.python_kernels_serve("CPU"):
        assert torch.equal(nk.rms_norm(x, weight), 2 * x)
    assert torch.equal(nk.rms_norm(x, weight), served)


def test_public_names():
    assert all(callable(getattr(nk, name)) and getattr(nk, name).__doc__ for name in nk.__all__)


def test_missing_kernels_are_announced():
    run = subprocess.run(
        [sys.executable, "-c", "import neobert_kernels"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert ("several times slower" in run.stderr) == (torch.version.cuda is None)
