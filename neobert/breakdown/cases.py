"""The steps that are taken apart: the full-size model with random weights, packed batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neobert.breakdown.measure import Step
from neobert.config import NeoBERTConfig
from neobert.data import MaskedBatch
from neobert.model import NeoBERT, NeoBERTLMHead
from neobert.packing import PackedBatch, pack
from neobert.throughput.workloads import QUERY, Workload
from neobert_kernels import pool

LENGTHS = Workload("lognormal", 512)
TEXTS = {"cpu": 8, "cuda": 128}
MASKED = 0.2  # of the tokens, as in the paper's §3.2
FIRST_ID = 1000  # of BERT's vocabulary; below are special and unused ones


def cases(
    config: NeoBERTConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, int, Step]]:
    """(what it is, live tokens, one step) of each case.

    Inference has weights of `dtype`, as `Encoder` has; the training step has float32 weights and
    autocasts to bfloat16, as `neobert.pretrain` does, and its gradients are new in each step.
    """
    torch.manual_seed(0)
    lengths = LENGTHS.lengths(TEXTS[device.type])
    model: Any = NeoBERTLMHead(config)
    model.to(device)
    encoder = model.model.to(dtype).eval()
    for what, each in (("one query", [QUERY]), ("forward", lengths)):
        batch = random_batch(each, config.vocab_size).to(device)
        yield what, sum(each), lambda batch=batch: embed(encoder, batch)  # type: ignore[misc]
    model.float().train()
    packed = random_batch(lengths, config.vocab_size).to(device)
    (rows,) = (torch.rand(packed.num_tokens, device=device) < MASKED).nonzero(as_tuple=True)
    masked = MaskedBatch(packed, rows, packed.input_ids[rows])
    low = None if dtype == torch.float32 else dtype
    yield "forward and backward", sum(lengths), lambda: train(model, masked, low)


def random_batch(lengths: list[int], vocab_size: int) -> PackedBatch:
    first = min(FIRST_ID, vocab_size // 2)
    return pack([torch.randint(first, vocab_size, (length,)).tolist() for length in lengths])


@torch.inference_mode()
def embed(encoder: NeoBERT, batch: PackedBatch) -> Tensor:
    """(sequences, dim) as `Encoder` computes them."""
    hidden = encoder(**batch.inputs()).last_hidden_state[0]
    return pool(hidden, batch.cu_seqlens)


def train(model: NeoBERTLMHead, batch: MaskedBatch, autocast: torch.dtype | None) -> None:
    """Forward and backward. Clipping and the optimizer are PyTorch's."""
    with torch.autocast(batch.rows.device.type, autocast, enabled=autocast is not None):
        loss = model(**batch.inputs()).loss
    loss.backward()
    model.zero_grad()
