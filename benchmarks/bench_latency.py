"""Latency of small batches through the whole encoder: 1, 8 and 64 texts of 8 to 128 tokens.

From ids on the host to pooled vectors on the host, and from strings. A full-size random checkpoint;
BERT-base, a third of the work per token, has random weights too and is there for scale. On a GPU
also by CUDA graphs, in bfloat16; on a CPU in float32.

The methods take turns, one call each, so that a slow moment of a shared machine slows them all.
What is compared is p50; p90 and p99 say what a service sees (of a CPU's few calls, p99 is the
slowest). Padding counts as work for the methods that do it: lengths in a batch differ.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE
from torch import Tensor
from transformers import BertConfig, BertModel

from neobert.checkpoint import write_random_checkpoint
from neobert.docstrings import standard_library_docstrings
from neobert.encode import Encoder
from neobert.packing import pack
from neobert.plain import PlainNeoBERT
from neobert.wordpiece import train_tokenizer

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# Of the calls of one test, all methods together.
CALLS, MOST_SECONDS = (300, 10) if DEVICE == "cuda" else (30, 8)


def cases(most_tokens: int) -> pytest.MarkDecorator:
    """Batches and lengths; on a CPU those of at most so many tokens, for the minutes it takes."""
    chosen = [
        (batch, length)
        for batch in (1, 8, 64)
        for length in (8, 32, 128)
        if DEVICE == "cuda" or batch * length <= most_tokens
    ]
    return pytest.mark.parametrize(("batch", "length"), chosen)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("neobert"), outliers=False)
    train_tokenizer(standard_library_docstrings()[:4000]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoders(checkpoint) -> dict[str, Encoder]:
    ours = Encoder.from_pretrained(checkpoint, device=DEVICE, dtype=DTYPE)
    if DEVICE != "cuda":
        return {"ours": ours}
    graphed = Encoder(ours.model, ours.tokenizer, cuda_graphs=True)
    return {"ours": ours, "ours, graphed": graphed}


@pytest.fixture(scope="module")
def plain(checkpoint) -> PlainNeoBERT:
    return PlainNeoBERT.load(checkpoint, DTYPE).to(DEVICE)


@pytest.fixture(scope="module")
def bert() -> BertModel:
    config = BertConfig(attn_implementation="sdpa")
    return BertModel(config, add_pooling_layer=False).to(DEVICE, DTYPE).eval()


def lengths_of(batch: int, length: int) -> list[int]:
    """Evenly from half of `length` up to it; a single text has it."""
    return np.linspace(max(3, length // 2), length, batch).round().astype(int).tolist()[::-1]


def random_ids(batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(1000, 30000, (n,), generator=generator).tolist()
        for n in lengths_of(batch, length)
    ]


def texts(encoder: Encoder, batch: int, length: int) -> list[str]:
    """Of as many tokens as `random_ids`, each the beginning of a docstring of its own."""
    docstrings = standard_library_docstrings()[:2000]
    ends = iter(zip(docstrings, encoder.tokenizer(docstrings).encodings, strict=True))
    return [
        next(text[: e.offsets[n - 2][1]] for text, e in ends if len(e) >= n)
        for n in lengths_of(batch, length)
    ]


def padded(ids: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """ids and mask; no mask where nothing is padding, for SDPA is faster without."""
    rows = [torch.tensor(row) for row in ids]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return input_ids.to(DEVICE), None if mask.all() else mask.to(DEVICE)


def mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hidden.float().mean(1)
    keep = mask.unsqueeze(-1)
    return (hidden.float() * keep).sum(1) / keep.sum(1)


def ours_from_ids(encoder: Encoder, ids: list[list[int]]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        batch = pack(ids)
        if encoder._graphs is not None:
            rows = encoder._graphs(batch, "mean", False)
            if rows is not None:
                return rows.cpu()
        return encoder._embed(batch.to(DEVICE, non_blocking=True), "mean", False).cpu()

    return call


def plain_from_ids(model: Callable, ids: list[list[int]]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        input_ids, mask = padded(ids)
        return mean(model(input_ids, mask), mask).cpu()

    return call


def plain_from_texts(model: Callable, encoder: Encoder, given: list[str]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        ids = encoder.tokenizer(given)["input_ids"]
        input_ids, mask = padded(ids)
        return mean(model(input_ids, mask), mask).cpu()

    return call


def without_wrapping(bert: BertModel) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda input_ids, mask: bert(input_ids, mask).last_hidden_state


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    cuts = 1e3 * np.percentile(seconds, [50, 90, 99])
    return {name: round(cut, 3) for name, cut in zip(("p50", "p90", "p99"), cuts, strict=True)}


def compare(benchmark, methods: dict[str, Callable[[], Tensor]], same: tuple[str, ...]) -> None:
    """Times the methods in turns. Those named in `same` must agree with ours."""
    with torch.inference_mode():
        results = {name: torch.as_tensor(call()) for name, call in methods.items()}
        for name in same:
            cosine = F.cosine_similarity(results[name], results["ours"], dim=-1).min().item()
            assert cosine > 0.999, f"{name} gives other vectors: cosine {cosine}"
        start = time.perf_counter()
        for call in methods.values():
            call()
        turn = time.perf_counter() - start
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        others = {name: call for name, call in methods.items() if name != "ours"}

        def take_turns() -> None:
            for name, call in others.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)

        rounds = max(3, min(CALLS, int(MOST_SECONDS / turn)))
        benchmark.pedantic(methods["ours"], setup=take_turns, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable: everything ran once, nothing was timed
        return
    seconds["ours"] = list(benchmark.stats.stats.data)
    benchmark.extra_info["ms"] = {name: percentiles(each) for name, each in seconds.items()}
    median = {name: statistics.median(each) for name, each in seconds.items()}
    benchmark.extra_info["times_ours"] = {
        name: round(median[name] / median["ours"], 3) for name in others
    }


@cases(2048)
def test_from_ids(benchmark, encoders, plain, bert, batch, length):
    ids = random_ids(batch, length)
    methods = {name: ours_from_ids(encoder, ids) for name, encoder in encoders.items()}
    methods["plain"] = plain_from_ids(plain, ids)
    methods["BERT-base, sdpa"] = plain_from_ids(without_wrapping(bert), ids)
    compare(benchmark, methods, same=(*encoders, "plain"))


@cases(256)
def test_from_texts(benchmark, encoders, plain, bert, batch, length):
    ours = encoders["ours"]
    given = texts(ours, batch, length)
    methods: dict[str, Callable[[], Tensor]] = {
        name: lambda encoder=encoder: torch.from_numpy(encoder.encode(given))
        for name, encoder in encoders.items()
    }
    methods["plain"] = plain_from_texts(plain, ours, given)
    methods["BERT-base, sdpa"] = plain_from_texts(without_wrapping(bert), ours, given)
    compare(benchmark, methods, same=(*encoders, "plain"))


@contextmanager
def forgetting() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cases(128)
def test_compiled(benchmark, encoders, plain, batch, length):
    """Apart, because compiling 28 layers takes minutes. It is compiled for this very shape: what
    mode="reduce-overhead" is at its best for."""
    ids = random_ids(batch, length)
    with forgetting():
        compiled = torch.compile(plain, mode="reduce-overhead", dynamic=False)
        methods = {name: ours_from_ids(encoder, ids) for name, encoder in encoders.items()}
        methods["compiled"] = plain_from_ids(compiled, ids)
        compare(benchmark, methods, same=(*encoders, "compiled"))
