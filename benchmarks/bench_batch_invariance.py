"""What batch invariance costs: the full-size encoder with it and without, in turns.

On a CPU without AMX both are the same kernels, and the price is what the measurement varies by.
"""

import statistics

import pytest
import torch
from bench_encoder import WORKLOADS, sequences
from compare import DEVICE
from timing import cuda_seconds, median_seconds

from neobert import NeoBERT, NeoBERTConfig
from neobert.invariance import make_batch_invariant
from neobert.packing import pack

ROUNDS = 5


@pytest.mark.parametrize("workload", ["lognormal", "query"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_batch_invariance(benchmark, workload, dtype):
    """Lognormal lengths in one batch, and a query of 32 tokens."""
    models = [NeoBERT(NeoBERTConfig()).to(DEVICE, dtype).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    make_batch_invariant(models[1])
    ids = sequences(workload) if workload in WORKLOADS else [list(range(1000, 1032))]
    batch = pack(ids).to(DEVICE)

    @torch.inference_mode()
    def forward(model: NeoBERT) -> torch.Tensor:
        return model(**batch.inputs()).last_hidden_state

    default, invariant = (forward(model) for model in models)
    assert torch.nn.functional.cosine_similarity(
        default.flatten().float(), invariant.flatten().float(), dim=0
    ) == pytest.approx(1, abs=1e-3)
    benchmark.pedantic(lambda: forward(models[1]), rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    rounds = []
    for _ in range(ROUNDS):
        if DEVICE == "cuda":
            seconds = [statistics.median(cuda_seconds(lambda m=m: forward(m), 10)) for m in models]
        else:
            seconds = [median_seconds(lambda m=m: forward(m), 0.5) for m in models]
        rounds.append(seconds)
    default_s, invariant_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    info = benchmark.extra_info
    info["default_s"], info["batch_invariant_s"] = default_s, invariant_s
    info["price"] = round(statistics.median(b / a for a, b in rounds) - 1, 4)
    info["live tok/s"] = round(batch.num_tokens / invariant_s, 1)
