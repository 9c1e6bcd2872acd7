"""Compiles every Triton kernel as it is launched, for GPUs that need not be there.

    python tests/budgets.py          refresh tests/budgets.json and print what changed

The launchers run on small CPU tensors; in place of each launch the kernel is compiled for the
architecture, with the tile, dtypes and alignment of that launch. What ptxas then reports is the
kernel's budget: registers per thread, spilled bytes, shared memory. A change for the worse is a
slower kernel, and shows without a GPU.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from neobert_kernels.triton import _device, _varlen

FILE = Path(__file__).parent / "budgets.json"
# Of a multiprocessor: registers, and bytes of shared memory for all programs and for one.
REGISTERS = 65536
SHARED = {80: (167936, 166912), 90: (233472, 232448), 100: (233472, 232448)}
DIM, VOCAB, HEADS, HEAD_DIM, WIDTH = 768, 30522, 12, 64, 2048


def launches() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(op, variant, launch) for every kernel and the dtypes that inference and training use."""
    half, full = torch.bfloat16, torch.float32
    rms_norm, swiglu, rotary, pooling, cross_entropy, batch_invariant_linear = (
        import_module(f"neobert_kernels.triton.{op}")
        for op in (
            "rms_norm", "swiglu", "rotary", "pooling", "cross_entropy", "batch_invariant_linear",
        )
    )  # fmt: skip
    yield from attention_launches()
    yield from epilogue_launches()
    positions = labels = torch.zeros(4, dtype=torch.int64)
    cos = sin = torch.zeros(8, HEAD_DIM // 2)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    weight, rstd = torch.ones(DIM), torch.ones(4)
    for branch, stream in ((half, half), (half, full), (full, full)):
        x, stream = torch.zeros(4, DIM, dtype=branch), torch.zeros(4, DIM, dtype=stream)
        name = f"{branch} on {stream.dtype}".replace("torch.", "")
        yield "rms_norm", name, lambda x=x, s=stream: rms_norm.add_rms_norm(x, s, weight, 1e-5)
        yield (
            "rms_norm",
            name,
            lambda x=x, s=stream: rms_norm.add_rms_norm_bwd(x, s, s, weight, rstd),
        )
        if branch == half:  # of a stream whose gradient goes through the norm's
            yield (
                "rms_norm",
                name,
                lambda x=x, s=stream: rms_norm.rms_norm_bwd(x, s, s, weight, rstd),
            )
    for dtype in (half, full):
        x, name = torch.zeros(4, DIM, dtype=dtype), str(dtype).removeprefix("torch.")
        gate_up, qkv = x.new_zeros(4, 2 * WIDTH), x.new_zeros(4, HEADS, 3, HEAD_DIM)
        yield "rms_norm", name, lambda x=x: rms_norm.rms_norm(x, weight, 1e-5)
        yield "rms_norm", name, lambda x=x: rms_norm.rms_norm_bwd(x, None, x, weight, rstd)
        for stream in (None, x):
            yield (
                "batch_invariant_linear",
                name,
                lambda x=x, s=stream: batch_invariant_linear.batch_invariant_linear(
                    x, x.new_zeros(DIM, DIM), s
                ),
            )
        yield "swiglu", name, lambda g=gate_up: swiglu.swiglu(g)
        yield "swiglu", name, lambda g=gate_up: swiglu.swiglu_bwd(g[:, :WIDTH], g)
        for inverse in (False, True):
            arguments = (cos, sin, positions, inverse)
            yield "rotary", name, lambda q=qkv, a=arguments: rotary.rotary(q[:, :, 0], *a)
            yield "rotary", f"{name} qkv", lambda q=qkv, a=arguments: rotary.rotary_qkv_(q, *a)
        for mean in (True, False):
            yield "pooling", name, lambda x=x, m=mean: pooling.pool(x, cu_seqlens, m)
            yield (
                "pooling",
                name,
                lambda x=x, m=mean: pooling.pool_bwd(x[:1].float(), cu_seqlens, 4, m, x.dtype),
            )
        head = (torch.zeros(VOCAB, DIM, dtype=dtype), torch.zeros(VOCAB, dtype=dtype))
        yield (
            "cross_entropy",
            name,
            lambda x=x, h=head: cross_entropy.linear_cross_entropy(x, *h, labels, -100),
        )
        for chunk in (4, 2):  # one chunk writes the weight gradient, several add to it

            def grads(x=x, head=head, chunk=chunk):
                cross_entropy.MIN_CHUNK = chunk
                cross_entropy.linear_cross_entropy_grads(x, *head, labels, -100)

            yield "cross_entropy", name if chunk == 4 else f"{name} chunks", grads


def attention_launches() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """As `launches`: both head_dims, short sequences with and without long ones, both backwards."""
    forward, bwd = (
        import_module(f"neobert_kernels.triton.{op}") for op in ("attention", "attention_bwd")
    )
    tokens, cu_seqlens = 600, torch.tensor([0, 600], dtype=torch.int32)
    lse = torch.zeros(HEADS, tokens)
    for dtype, regimes in ((torch.bfloat16, (64, 128, 600)), (torch.float32, (600,))):
        for head_dim in (64, 128):
            qkv = torch.zeros(tokens, HEADS, 3, head_dim, dtype=dtype)
            q, out = qkv.unbind(2), qkv[:, :, 0].contiguous()
            for max_seqlen in regimes:
                arguments = (cu_seqlens, max_seqlen, 0.125)
                name = f"{dtype} {head_dim}, to {max_seqlen}".removeprefix("torch.")
                yield "attention", name, lambda q=q, a=arguments: forward.varlen_attention(*q, *a)
                for deterministic in (True, False) if max_seqlen > 128 else (True,):

                    def backward(q=q, out=out, a=arguments, deterministic=deterministic):
                        torch.use_deterministic_algorithms(deterministic)
                        bwd.varlen_attention_bwd(out, *q, out, lse, *a)
                        torch.use_deterministic_algorithms(False)

                    yield "attention_bwd", name, backward


def epilogue_launches() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """As `launches`: the four GEMMs of a layer, with the residual stream in either dtype."""
    epilogue = import_module("neobert_kernels.triton.epilogue")
    tokens = 200
    positions, cos = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, HEAD_DIM // 2)
    half, full = torch.bfloat16, torch.float32
    for dtype, stream in ((half, half), (half, full), (full, full)):
        name = f"{dtype} on {stream}".replace("torch.", "")
        x = torch.zeros(tokens, DIM, dtype=stream)
        squares, gated = torch.zeros(tokens, DIM // 128), torch.zeros(tokens, WIDTH, dtype=dtype)
        qkv, w12, w3 = (
            torch.zeros(shape, dtype=dtype)
            for shape in ((3 * DIM, DIM), (2 * WIDTH, DIM), (DIM, WIDTH))
        )
        table = (cos, cos, positions)
        yield "epilogue", name, lambda x=x: epilogue.sum_of_squares(x)
        yield (
            "epilogue",
            name,
            lambda x=x, s=squares, w=qkv, t=table: epilogue.rms_linear_rotary(x, s, w, *t, 1e-5),
        )
        yield "epilogue", name, lambda g=gated, w=w3, x=x: epilogue.linear_add(g, w, x)
        yield (
            "epilogue",
            name,
            lambda x=x, s=squares, w=w12: epilogue.rms_linear_swiglu(x, s, w, 1e-5),
        )
        yield (
            "epilogue",
            name,
            lambda x=x, s=squares, w=w12: epilogue.rms_linear_swiglu_keep(x, s, w, 1e-5),
        )


def compile_all(arch: int) -> dict[str, dict[str, int]]:
    """Kernel -> its budget, on architecture `arch`. To be called once in a process."""
    _device._gpu = lambda device: (arch, 132)
    triton.runtime.driver.set_active(_NoGPU(arch))
    compiled: list[tuple[str, object]] = []
    launch = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        flags = [name for name, value in kwargs.items() if value is True]
        compiled.append((" ".join([self.fn.__name__.removeprefix("_"), *flags]), kernel))

    JITFunction.run = compile_instead
    budgets, seen = {}, set()
    for op, variant, start in launches():
        for module in (import_module(f"neobert_kernels.triton.{op}"), _varlen):
            module.check_served = lambda *args, **tensors: None  # it refuses CPU tensors
        start()
        for name, kernel in compiled:
            if kernel.hash not in seen:
                budgets[f"{op} {name}, {variant}"] = _budget(arch, kernel)
            seen.add(kernel.hash)
        compiled.clear()
    return budgets


class _NoGPU:
    """What Triton asks of its driver before it compiles."""

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


def _budget(arch: int, kernel) -> dict[str, int]:
    nvidia = triton.knobs.nvidia
    ptxas = (nvidia.ptxas_blackwell if arch >= 100 else nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [ptxas, "-v", f"--gpu-name={target}", str(source), "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", report)),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def measure() -> dict:
    """The budgets of all architectures, compiled side by side."""
    with ProcessPoolExecutor(len(SHARED), max_tasks_per_child=1) as pool:
        found = list(pool.map(compile_all, SHARED))
    kernels = {f"sm_{arch}": each for arch, each in zip(SHARED, found, strict=True)}
    return {"triton": triton.__version__, "kernels": kernels}


def differences(old: dict, new: dict) -> Iterator[str]:
    """One line for every kernel whose budget differs."""
    for arch in sorted(old["kernels"].keys() | new["kernels"].keys()):
        before, after = old["kernels"].get(arch, {}), new["kernels"].get(arch, {})
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                yield f"{arch} {name}: {_words(before.get(name))} -> {_words(after.get(name))}"


def worse(old: dict, new: dict) -> Iterator[str]:
    """One line for every kernel that is not in `old`, is no longer there, or needs more of
    anything than it did."""
    for line in differences(old, new):
        arch, name = line.split(": ")[0].split(" ", 1)
        before, after = old["kernels"].get(arch, {}).get(name), new["kernels"][arch].get(name)
        if before is None or after is None or any(after[key] > before[key] for key in before):
            yield line


def _words(budget: dict | None) -> str:
    return "none" if budget is None else ", ".join(f"{v} {k}" for k, v in budget.items())


def main() -> None:
    old = json.loads(FILE.read_text()) if FILE.exists() else {"kernels": {}}
    new = measure()
    # One kernel to a line: a difference reads as a table.
    text = json.dumps(new, indent=1)
    FILE.write_text(re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", _one_line, text) + "\n")
    print("\n".join(differences(old, new)) or "no budget changed")


def _one_line(match: re.Match) -> str:
    return "{" + re.sub(r"\s+", " ", match[1]) + "}"


if __name__ == "__main__":
    sys.exit(main())
