"""What a forward costs the host before any kernel computes: Python, modules and the dispatcher.

Below about 700 tokens a GPU waits for the host, so that this is the encoder's latency wherever no
CUDA graph replays it. It does not depend on widths, and is measured without a GPU in two ways:

  fakes     every op is a Python function that only allocates its outputs;
  compiled  the C++ kernels, given no tokens: they check, allocate and return.

Both are µs per layer of a 28-layer encoder, and are held to a budget: so many times what the same
ops cost when they are called in a row with all tensors at hand. That ratio, unlike the µs, is the
code's and not the machine's. On a GPU a third way times the launching of one token's forward.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from compare import DEVICE
from torch import Tensor

from neobert import NeoBERT, NeoBERTConfig
from neobert.packing import PackedBatch, pack
from neobert_kernels import _compiled
from neobert_kernels._library import ops

LAYERS, HEADS, HEAD_DIM = 28, 2, 64
ROUNDS = 300
# Host cost of the encoder over that of its ops called in a row.
BUDGET = {"fakes": 1.5, "compiled": 1.6}
LAUNCHED = ("ours", "triton") if _compiled.CUDA_LOADED else ("ours",)

# What inference drops (rstd, lse) is not made: the less a fake costs, the better.
FAKES = {
    "rms_norm": lambda x, weight, eps: (torch.empty_like(x), weight),
    "linear": lambda x, weight, residual: x.new_empty((x.shape[0], weight.shape[0])),
    "linear_swiglu": lambda x, weight: x.new_empty((x.shape[0], weight.shape[0] // 2)),
    "rotary_qkv_": lambda qkv, cos, sin, positions, inverse: None,
    "varlen_attention": lambda q, k, v, cu_seqlens, max_seqlen, scale: (
        q.new_empty(q.shape),
        cu_seqlens,
    ),
}


@pytest.fixture(scope="module")
def model() -> NeoBERT:
    config = NeoBERTConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        intermediate_size=192,
        vocab_size=1000,
    )
    return NeoBERT(config).eval()


@pytest.fixture(params=["fakes", "compiled"])
def way(request) -> Iterator[str]:
    """Puts fakes in the place of the CPU kernels, or leaves them."""
    if request.param == "compiled":
        if _compiled.LOADED is None:
            pytest.skip(_compiled.status())
        yield request.param
        return
    with torch.library._scoped_library("neobert", "IMPL") as library:
        for name, fake in FAKES.items():
            library.impl(name, fake, "CPU", allow_override=True)
        yield request.param


def encoder_call(model: NeoBERT, batch: PackedBatch) -> Callable[[], object]:
    inputs = batch.inputs()
    return lambda: model(**inputs)


def bare_ops_call(model: NeoBERT, batch: PackedBatch) -> Callable[[], Tensor]:
    """The ops of all layers and the views between them, every tensor in a local variable."""
    block = model.transformer_encoder[0]
    gain, qkv_weight, wo = block.attention_norm.weight, block.qkv.weight, block.wo.weight
    w12, w3 = block.ffn.w12.weight, block.ffn.w3.weight
    cos, sin, positions = model.rotary.cos, model.rotary.sin, batch.positions
    cu_seqlens, max_seqlen = batch.cu_seqlens, batch.max_seqlen
    embedded = model.encoder(batch.input_ids)

    def call() -> Tensor:
        hidden = embedded
        for _ in range(LAYERS):
            normed = ops.rms_norm(hidden, gain, 1e-5)[0]
            qkv = ops.linear(normed, qkv_weight, None).view(-1, HEADS, 3, HEAD_DIM)
            ops.rotary_qkv_(qkv, cos, sin, positions, False)
            attended = ops.varlen_attention(*qkv.unbind(2), cu_seqlens, max_seqlen, 0.125)[0]
            hidden = ops.linear(attended.flatten(1), wo, hidden)
            normed = ops.rms_norm(hidden, gain, 1e-5)[0]
            hidden = ops.linear(ops.linear_swiglu(normed, w12), w3, hidden)
        return hidden

    return call


def microseconds(calls: list[Callable[[], object]]) -> list[float]:
    """The median of each call, in turns, so that a slow moment of the machine slows them all."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS + 20):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if number >= 20:
                times.append(time.perf_counter() - start)
    return [1e6 * statistics.median(times) for times in seconds]


@pytest.mark.filterwarnings("ignore:Warning only once")  # that the fakes override kernels
def test_host_cost(benchmark, model, way):
    batch = pack([[5] * 20, [5] * 12] if way == "fakes" else [[]])
    with torch.inference_mode():
        calls = [encoder_call(model, batch), bare_ops_call(model, batch)]
        benchmark.pedantic(calls[0], rounds=20, warmup_rounds=5)
        if benchmark.stats is None:  # --benchmark-disable: it ran once, nothing was timed
            return
        encoder, bare = microseconds(calls)
    info = benchmark.extra_info
    info["µs per layer"] = round(encoder / LAYERS, 2)
    info["µs per layer, the ops alone"] = round(bare / LAYERS, 2)
    info["times the ops alone"] = round(encoder / bare, 3)
    assert encoder <= BUDGET[way] * bare, (
        f"{encoder / LAYERS:.1f} µs of host time per layer, {encoder / bare:.2f} times the ops"
        f" alone: the budget is {BUDGET[way]}"
    )


@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA GPU")
@pytest.mark.parametrize("implementation", LAUNCHED)
def test_launching(benchmark, model, implementation):
    """Host time until everything is launched; what the GPU then does is waited for outside."""
    model, batch = model.to("cuda", torch.bfloat16), pack([[5]]).to("cuda")
    call = encoder_call(model, batch)
    with torch.inference_mode():
        call()
        benchmark.pedantic(call, setup=torch.cuda.synchronize, rounds=ROUNDS, warmup_rounds=20)
    model.to("cpu", torch.float32)
    if benchmark.stats is not None:
        median = 1e6 * benchmark.stats.stats.median
        benchmark.extra_info["µs per layer"] = round(median / LAYERS, 2)
