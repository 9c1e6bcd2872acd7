"""`python -m neobert_kernels tune`: times other tiles of the kernels on the GPU at hand.

Prints, for every kernel at NeoBERT's sizes, the tiles from the fastest on and marks the shipped
one. Nothing is stored: a better tile goes into the kernel's table by hand, with the figures in
LOG.md, so that everyone runs the same kernels from the first call.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton

from . import (
    _varlen,
    attention,
    attention_bwd,
    cross_entropy,
    epilogue,
    pooling,
    rms_norm,
    rotary,
    swiglu,
)
from ._device import architecture

TOKENS, DIM, HEADS, HEAD_DIM, WIDTH, VOCAB = 32768, 768, 12, 64, 2048, 30522
MASKED = 0.2


class Candidate(NamedTuple):
    """A table entry to vary, the other values to try, and a call that launches the kernel."""

    name: str
    table: dict  # holds the tile under `key`
    key: object
    tiles: list[dict]
    call: Callable[[], object]


def candidates() -> Iterator[Candidate]:
    """Every kernel whose tile is in a table, with bfloat16 inputs."""
    x = torch.randn(TOKENS, DIM, dtype=torch.bfloat16, device="cuda")
    arch, stream, weight = architecture(x), x.float(), torch.ones(DIM, device="cuda")
    rows = [{"ROWS": r, "num_warps": w} for r in (1, 2, 4, 8, 16) for w in (2, 4, 8) if r >= w // 2]
    yield Candidate(
        "add_rms_norm",
        rms_norm.FORWARD,
        arch,
        rows,
        lambda: rms_norm.add_rms_norm(x, stream, weight, 1e-5),
    )
    total, rstd = rms_norm.add_rms_norm(x, stream, weight, 1e-5)[1:]
    yield Candidate(
        "add_rms_norm_bwd",
        rms_norm.BACKWARD,
        arch,
        [tile | {"PROGRAMS": n} for tile in rows for n in (1, 2, 4, 8) if tile["ROWS"] <= 8],
        lambda: rms_norm.add_rms_norm_bwd(x, stream, total, weight, rstd),
    )
    gate_up = torch.randn(TOKENS, 2 * WIDTH, dtype=torch.bfloat16, device="cuda")
    flat = [{"TILE": n, "num_warps": w} for n in (512, 1024, 2048, 4096, 8192) for w in (2, 4, 8)]
    yield Candidate("swiglu", swiglu.FORWARD, arch, flat, lambda: swiglu.swiglu(gate_up))
    dy = gate_up[:, :WIDTH].contiguous()
    yield Candidate(
        "swiglu_bwd", swiglu.BACKWARD, arch, flat, lambda: swiglu.swiglu_bwd(dy, gate_up)
    )
    qkv = torch.randn(TOKENS, HEADS, 3, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    cos = sin = torch.ones(512, HEAD_DIM // 2, device="cuda")
    positions = torch.arange(TOKENS, device="cuda") % 512
    yield Candidate(
        "rotary_qkv_",
        rotary.TILES,
        arch,
        flat,
        lambda: rotary.rotary_qkv_(qkv, cos, sin, positions, False),
    )
    cu_seqlens = torch.arange(0, TOKENS + 1, 512, dtype=torch.int32, device="cuda")
    blocks = [
        {"BLOCK_T": t, "BLOCK": b, "num_warps": w}
        for t in (8, 16, 32, 64, 128)
        for b in (64, 128, 256)
        for w in (4, 8)
    ]
    yield Candidate(
        "pool", pooling.FORWARD, arch, blocks, lambda: pooling.pool(x, cu_seqlens, True)
    )
    pooled = pooling.pool(x, cu_seqlens, True)
    yield Candidate(
        "pool_bwd",
        pooling.BACKWARD,
        arch,
        blocks,
        lambda: pooling.pool_bwd(pooled, cu_seqlens, TOKENS, True, x.dtype),
    )
    yield from attention_candidates(arch)
    yield from epilogue_candidates(arch)
    head = torch.randn(VOCAB, DIM, dtype=torch.bfloat16, device="cuda") / DIM**0.5
    labels = torch.randint(VOCAB, (TOKENS,), device="cuda")
    labels[torch.rand(TOKENS, device="cuda") > MASKED] = -100
    products = [
        {"BLOCK_M": 128, "BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s, "PROGRAMS": p}
        for n in (64, 128, 256)
        for k in (32, 64)
        for w in (4, 8)
        for s in (2, 3, 4)
        for p in (1, 2)
    ]
    for product in cross_entropy.PRODUCTS[arch]:
        yield Candidate(
            f"linear_cross_entropy_grads, {product}",
            cross_entropy.PRODUCTS[arch],
            product,
            products,
            lambda: cross_entropy.linear_cross_entropy_grads(x, head, None, labels, -100),
        )


def epilogue_candidates(arch: int) -> Iterator[Candidate]:
    """Of the GEMMs with epilogues, w3 standing for wo too."""

    def weight(out_features: int, in_features: int) -> torch.Tensor:
        shape = (out_features, in_features)
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda") / in_features**0.5

    x = torch.randn(TOKENS, DIM, dtype=torch.bfloat16, device="cuda")
    gated = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda")
    squares, stream = epilogue.sum_of_squares(x), x.float()
    qkv, w12, w3 = weight(3 * DIM, DIM), weight(2 * WIDTH, DIM), weight(DIM, WIDTH)
    table = torch.ones(512, HEAD_DIM // 2, device="cuda")
    positions = torch.arange(TOKENS, device="cuda") % 512
    calls = {
        "swiglu": lambda: epilogue.rms_linear_swiglu(x, squares, w12, 1e-5),
        "swiglu_keep": lambda: epilogue.rms_linear_swiglu_keep(x, squares, w12, 1e-5),
        "rotary": lambda: epilogue.rms_linear_rotary(
            x, squares, qkv, table, table, positions, 1e-5
        ),
        "add": lambda: epilogue.linear_add(gated, w3, x),
        "add_float32": lambda: epilogue.linear_add(gated, w3, stream),
    }
    for name, call in calls.items():
        # The residual add's tile is as wide as a sum of squares.
        widths = (epilogue.BLOCK,) if name.startswith("add") else (128, 256)
        tiles = [
            epilogue.TILES[arch][name]
            | {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s}
            | {"PROGRAMS": p, "FLATTEN": f}
            for m in (64, 128)
            for n in widths
            for w in (4, 8)
            for s in (3, 4)
            for p in (1, 2)
            for f in (False, True)
        ]
        yield Candidate(f"epilogue, {name}", epilogue.TILES[arch], name, tiles, call)


def attention_candidates(arch: int) -> Iterator[Candidate]:
    """Of forward and backward, for sequences of 512 and of 64 tokens."""
    qkv = torch.randn(TOKENS, HEADS, 3, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    q, k, v = qkv.unbind(2)
    # Filling would be timed, too.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    shapes = [{"num_warps": w, "num_stages": s} for w in (4, 8) for s in (1, 2, 3, 4)]
    for length in (512, 64):
        cu_seqlens = torch.arange(0, TOKENS + 1, length, dtype=torch.int32, device="cuda")
        arguments = (cu_seqlens, length, HEAD_DIM**-0.5)
        out, lse = attention.varlen_attention(q, k, v, *arguments)

        def forward(arguments=arguments):
            return attention.varlen_attention(q, k, v, *arguments)

        def backward(deterministic=False, out=out, lse=lse, arguments=arguments):
            torch.use_deterministic_algorithms(deterministic)
            attention_bwd.varlen_attention_bwd(out, q, k, v, out, lse, *arguments)
            torch.use_deterministic_algorithms(False)

        name = f"{length} tokens each"
        if length <= _varlen.SHORT:
            tiles = [{"BLOCK_M": m} | shape for m in (32, 64) for shape in shapes]
            yield Candidate(
                f"varlen_attention, {name}", attention.SHORT_TILES, arch, tiles, forward
            )
            tiles = [{"STEP": step} | shape for step in (16, 32, 64) for shape in shapes]
            table = attention_bwd.SHORT_TILES[arch]
            yield Candidate(f"varlen_attention_bwd, {name}", table, HEAD_DIM, tiles, backward)
            continue
        tiles = [
            {"BLOCK_M": m, "BLOCK_N": n} | shape
            for m in (64, 128)
            for n in (32, 64, 128)
            for shape in shapes
        ]
        table = attention.LONG[arch]
        yield Candidate(f"varlen_attention, {name}", table, HEAD_DIM, tiles, forward)
        table = attention_bwd.LONG[arch]
        for kernel, deterministic in (("keys", False), ("keys", True), ("queries", True)):
            order = "one order" if deterministic else "atomics"
            yield Candidate(
                f"varlen_attention_bwd, {name}, {kernel}, {order}",
                table,
                HEAD_DIM,
                [
                    table[HEAD_DIM] | {"ROWS": rows, kernel: {"STEP": step} | shape}
                    for rows in (64, 128)
                    for step in (32, 64, 128)
                    for shape in shapes
                ],
                partial(backward, deterministic),
            )


def measure(candidate: Candidate) -> list[tuple[float, dict]]:
    """(milliseconds, tile) of the shipped tile and the others, from the fastest on; infinite for a
    tile that needs more than the GPU has."""
    shipped, found = candidate.table[candidate.key], []
    for tile in [shipped, *(tile for tile in candidate.tiles if tile != shipped)]:
        candidate.table[candidate.key] = tile
        try:
            found.append((triton.testing.do_bench(candidate.call), tile))
        except triton.runtime.errors.OutOfResources:
            found.append((float("inf"), tile))
        except RuntimeError as error:
            if "PassManager" not in str(error):
                raise
            found.append((float("inf"), tile))  # Triton cannot compile it
    candidate.table[candidate.key] = shipped
    return sorted(found, key=lambda each: each[0])


def main() -> None:
    """Prints the five fastest tiles of every kernel, and the shipped one."""
    print(f"{torch.cuda.get_device_name()}, {TOKENS} tokens, bfloat16, median milliseconds")
    for candidate in candidates():
        shipped = candidate.table[candidate.key]
        print(f"\n{candidate.name}")
        for place, (milliseconds, tile) in enumerate(measure(candidate)):
            if place < 5 or tile == shipped:
                words = " ".join(f"{name}={value}" for name, value in tile.items())
                print(f"{milliseconds:9.4f}  {words}{'  (shipped)' if tile == shipped else ''}")
