"""The whole encoder against every other way to run the same weights, in live tokens per second.

A full-size random checkpoint in the released format. In each round every method runs once, one
after the other, so that a slow minute of a shared machine slows them all; figures are medians over
rounds and ratios of those. A method whose vectors disagree with float32 plain PyTorch gets no
figure. Padding counts as work for the methods that do it and never as tokens.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neobert.checkpoint import write_random_checkpoint
from neobert.model import NeoBERT
from neobert.packing import pack, token_budget_batches
from neobert.plain import PlainNeoBERT
from neobert_kernels import linear, linear_swiglu

ROUNDS = 3
SORTED_BATCH = 8  # rows in a length-sorted padded batch
GEMMS = {"qkv": (2304, 768), "wo": (768, 768), "w12": (4096, 768), "w3": (768, 2048)}


def lognormal_lengths(texts: int = 32, median: float = 60, sigma: float = 1.1) -> list[int]:
    """Token counts like those of real corpora: many short texts, a few long ones."""
    draws = np.random.default_rng(0).lognormal(np.log(median), sigma, texts)
    return [int(n) for n in draws.clip(4, 512)]


WORKLOADS = {
    "lognormal": lognormal_lengths(),
    "fixed-128": [128] * 16,
    "fixed-512": [512] * 4,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("neobert"))


def sequences(workload: str) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(1000, 30000, (length,), generator=generator).tolist()
        for length in WORKLOADS[workload]
    ]


def padded(ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(row) for row in ids]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in ids])
    return input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None]


def sorted_batches(ids: list[list[int]]) -> list[list[list[int]]]:
    by_length = sorted(ids, key=len)
    return [by_length[i : i + SORTED_BATCH] for i in range(0, len(by_length), SORTED_BATCH)]


@dataclass
class Method:
    """One way to run the encoder: `run()` returns the mean of all live hidden states, (dim,)."""

    run: Callable[[], Tensor]
    rounds: int = ROUNDS
    seconds: list[float] = field(default_factory=list)

    def time(self) -> None:
        if len(self.seconds) < self.rounds:
            start = time.perf_counter()
            self.run()
            self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def ours(model: NeoBERT, ids: list[list[int]], max_tokens: int = 4096) -> Method:
    batches = [
        pack([ids[i] for i in rows])
        for rows in token_budget_batches([len(row) for row in ids], max_tokens)
    ]

    def run() -> Tensor:
        total = torch.zeros(model.config.hidden_size)
        for b in batches:
            out = model(
                input_ids=b.input_ids[None],
                position_ids=b.positions[None],
                cu_seqlens=b.cu_seqlens,
                max_seqlen=b.max_seqlen,
            )
            total += out.last_hidden_state[0].float().sum(0)
        return total / sum(map(len, ids))

    return Method(run)


def plain_padded(plain, batches: list[list[list[int]]], rounds: int = ROUNDS) -> Method:
    inputs = [padded(batch) for batch in batches]

    def run() -> Tensor:
        total, count = torch.zeros(()), 0
        for input_ids, mask in inputs:
            # SDPA without a mask is faster: a batch without padding gets its best case.
            out = plain(input_ids, None if mask.all() else mask)
            total, count = total + out[mask].float().sum(0), count + int(mask.sum())
        return total / count

    return Method(run, rounds)


def onnx_runtime(plain: PlainNeoBERT, ids: list[list[int]], folder) -> Method:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = folder / "plain.onnx"
    if not path.exists():
        example = padded([[101, 102, 103], [101, 102]])
        shapes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        torch.onnx.export(
            plain, example, path, dynamo=True, dynamic_shapes=(shapes, shapes), verbose=False
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    inputs = [(padded(batch)) for batch in sorted_batches(ids)]
    feeds = [dict(zip(names, (t.numpy() for t in pair), strict=True)) for pair in inputs]

    def run() -> Tensor:
        total, count = torch.zeros(()), 0
        for feed, (_, mask) in zip(feeds, inputs, strict=True):
            out = torch.from_numpy(session.run(None, feed)[0])
            total, count = total + out[mask].sum(0), count + int(mask.sum())
        return total / count

    return Method(run)


def gemm_bound(tokens: int, dtype: torch.dtype, layers: int, with_ours: bool) -> Method:
    """The encoder's matrix products and nothing else: F.linear's, or our kernel's."""
    weights = {name: torch.randn(shape, dtype=dtype) for name, shape in GEMMS.items()}
    x = {name: torch.randn(tokens, shape[1], dtype=dtype) for name, shape in GEMMS.items()}

    def run() -> Tensor:
        y = torch.zeros(())
        for _ in range(layers):
            for name, weight in weights.items():
                if not with_ours:
                    y = F.linear(x[name], weight)
                else:
                    y = (linear_swiglu if name == "w12" else linear)(x[name], weight)
        return y

    return Method(run)


def compare(benchmark, checkpoint, workload: str, dtype: torch.dtype, others: dict) -> None:
    """Times ours, a turn at a time with the other methods, after holding all to one answer."""
    ids = sequences(workload)
    tokens = sum(map(len, ids))
    model = NeoBERT.from_pretrained(checkpoint, dtype=dtype).eval()
    mine = ours(model, ids)
    with torch.inference_mode():
        truth = plain_padded(PlainNeoBERT.load(checkpoint), sorted_batches(ids)).run()
        for name, method in {"ours": mine, **others}.items():
            result = method.run()  # also the warm-up, and where torch.compile compiles
            if not name.startswith("gemm"):
                similarity = F.cosine_similarity(result.float(), truth, dim=0).item()
                assert similarity > 0.999, f"{name} gives other vectors: cosine {similarity}"

        def take_turns():
            for method in others.values():
                method.time()

        benchmark.pedantic(mine.run, setup=take_turns, rounds=ROUNDS)

    if benchmark.stats is None:  # --benchmark-disable: everything ran once, nothing was timed
        return
    mine.seconds = list(benchmark.stats.stats.data)
    info = benchmark.extra_info
    info["live tokens"] = tokens
    info["padded tokens"] = len(ids) * max(map(len, ids))
    rates = {name: tokens / m.median for name, m in {"ours": mine, **others}.items()}
    info["live tok/s"] = {name: round(rate, 1) for name, rate in rates.items()}
    info["times_ours"] = {name: round(rates["ours"] / rates[name], 3) for name in others}


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@DTYPES
@pytest.mark.parametrize("workload", WORKLOADS)
def test_encoder(benchmark, checkpoint, workload, dtype):
    ids = sequences(workload)
    tokens = sum(map(len, ids))
    plain = PlainNeoBERT.load(checkpoint, dtype)
    layers = len(plain.model["transformer_encoder"])
    others = {
        "gemm_bound_torch": gemm_bound(tokens, dtype, layers, with_ours=False),
        "gemm_bound_ours": gemm_bound(tokens, dtype, layers, with_ours=True),
        "plain_one_at_a_time": plain_padded(plain, [[row] for row in ids]),
        "plain_sorted": plain_padded(plain, sorted_batches(ids)),
        "plain_padded": plain_padded(plain, [ids], rounds=2),
    }
    if dtype == torch.float32:
        others["onnxruntime_sorted"] = onnx_runtime(plain, ids, checkpoint)
    compare(benchmark, checkpoint, workload, dtype, others)


@DTYPES
def test_encoder_compiled(benchmark, checkpoint, dtype):
    """Apart, because compiling 28 layers takes minutes."""
    compiled = torch.compile(PlainNeoBERT.load(checkpoint, dtype), dynamic=True)
    others = {"compiled_sorted": plain_padded(compiled, sorted_batches(sequences("lognormal")))}
    compare(benchmark, checkpoint, "lognormal", dtype, others)
