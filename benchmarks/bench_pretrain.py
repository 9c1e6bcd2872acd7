"""A masked-LM training step against plain PyTorch, in live tokens per second.

Real lengths: docstrings of the standard library, truncated at 512 tokens, as they come. Real width
(768, 12 heads, SwiGLU 2,048, 30,522 words) but LAYERS of the 28 layers, so that the head weighs
more than in the full model. A step is forward, backward, clipping and fused AdamW on the same
sequences and masks; every method computes logits of masked tokens alone, which is kind to the plain
ones. In each round every method runs once, one after the other; figures are medians over rounds.
"""

import random
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neobert.checkpoint import write_random_checkpoint
from neobert.config import NeoBERTConfig
from neobert.data import MaskedBatch, masked
from neobert.docstrings import standard_library_docstrings
from neobert.masking import IGNORE_INDEX, Masking
from neobert.model import NeoBERTLMHead
from neobert.optim import adamw
from neobert.plain import PlainNeoBERT, rotate_adjacent_pairs
from neobert.readers import Cut, tokenized
from neobert.text import TextTokenizer
from neobert.wordpiece import train_tokenizer

LAYERS, SEQUENCES, ROUNDS = 4, 32, 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = NeoBERTConfig(num_hidden_layers=LAYERS)
    return write_random_checkpoint(tmp_path_factory.mktemp("neobert"), config, outliers=False)


@pytest.fixture(scope="module")
def batch() -> MaskedBatch:
    """The sequences of 32 documents drawn at random, 20 % of their tokens masked."""
    texts = standard_library_docstrings()
    tokenizer = train_tokenizer(texts)
    chosen = random.Random(0).sample(texts, SEQUENCES)
    sequences = [
        s for each in tokenized(chosen, 0, TextTokenizer(tokenizer), Cut(512)) for s in each
    ]
    return masked([(0, sequences)], Masking.of(tokenizer, 0.2, "mask"), seed=0, step=0)


def masked_loss(decoder: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    """Of the rows that are masked alone."""
    return F.cross_entropy(decoder(hidden).float(), labels)


def padded_loss(plain: PlainNeoBERT, batch: MaskedBatch) -> Callable[[], Tensor]:
    """All sequences in one batch, padded to the longest."""
    inputs = batch.padded_inputs(0)
    labels = inputs["labels"]
    masked = labels != IGNORE_INDEX

    def loss() -> Tensor:
        hidden = plain(inputs["input_ids"], inputs["attention_mask"])
        return masked_loss(plain.decoder, hidden[masked], labels[masked])

    return loss


def packed_loss(plain: PlainNeoBERT, batch: MaskedBatch) -> Callable[[], Tensor]:
    """Plain PyTorch without padding: all but attention on (tokens, dim), SDPA a sequence a time."""
    p = batch.packed
    lengths = p.cu_seqlens.diff().tolist()
    pairs = torch.arange(0, plain.head_dim, 2)
    angles = p.positions[:, None] * 10000.0 ** (-pairs / plain.head_dim)

    def attention(layer, x: Tensor) -> Tensor:
        qkv = layer.qkv(x).view(1, len(x), layer.heads, 3 * plain.head_dim)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = (rotate_adjacent_pairs(t, angles) for t in (q, k))
        sequences = zip(*(t.transpose(1, 2).split(lengths, 2) for t in (q, k, v)), strict=True)
        attended = [F.scaled_dot_product_attention(*each) for each in sequences]
        return layer.wo(torch.cat(attended, 2)[0].transpose(0, 1).flatten(1))

    def loss() -> Tensor:
        x = plain.model["encoder"](p.input_ids)
        for layer in plain.model["transformer_encoder"].children():
            x = x + attention(layer, layer.attention_norm(x))
            x = x + layer.ffn(layer.ffn_norm(x))
        return masked_loss(plain.decoder, plain.model["layer_norm"](x)[batch.rows], batch.labels)

    return loss


class Step:
    """One way to make a training step; `seconds` collects how long each took."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype):
        self.model, self.loss, self.dtype = model.train(), loss, dtype
        self.optimizer = adamw(model, lr=1e-6)
        self.seconds: list[float] = []

    def __call__(self) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        return loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_step(benchmark, checkpoint, batch, dtype):
    ours, plain = NeoBERTLMHead.from_pretrained(checkpoint), PlainNeoBERT.load(checkpoint)
    steps = {
        "ours": Step(ours, lambda: ours(**batch.inputs()).loss, dtype),
        "plain_packed": Step(plain, packed_loss(plain, batch), dtype),
        "plain_padded": Step(plain, padded_loss(plain, batch), dtype),
    }
    # Also the warm-up. With lr=1e-6 the weights that all three start from hardly move.
    losses = {name: step() for name, step in steps.items()}
    assert max(losses.values()) == pytest.approx(min(losses.values()), rel=1e-2), losses
    for step in steps.values():
        step.seconds.clear()

    def others():
        steps["plain_packed"]()
        steps["plain_padded"]()

    benchmark.pedantic(steps["ours"], setup=others, rounds=ROUNDS)
    if benchmark.stats is None:  # --benchmark-disable
        return
    tokens = batch.packed.num_tokens
    lengths = batch.packed.cu_seqlens.diff()
    info = benchmark.extra_info
    info["layers"] = LAYERS
    info["live tokens"], info["padded tokens"] = tokens, len(lengths) * int(lengths.max())
    rates = {name: tokens / statistics.median(step.seconds) for name, step in steps.items()}
    info["live tok/s"] = {name: round(rate, 1) for name, rate in rates.items()}
    info["times_ours"] = {name: round(rates["ours"] / rates[name], 3) for name in rates}
