"""Cached gradients are the full batch's, whatever the chunks; a wrong place is seen."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from neobert.checkpoint import write_random_checkpoint
from neobert.gradcache import Chunk, backward_all, chunked, embed_all, in_company
from neobert.infonce import cached_loss, info_nce
from neobert.model import NeoBERT, NeoBERTConfig
from neobert.packing import pack
from neobert_kernels import pool
from tests.checkpoints import random_sequences

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

# Of 6 queries, their 6 positives and 5 hard negatives.
LENGTHS = [17, 3, 40, 1, 64, 9, 128, 2, 33, 65, 7, 127, 5, 1, 90, 20, 11]
QUERIES, CANDIDATES = 6, 11
TARGETS = torch.arange(QUERIES)
MASKED = torch.zeros(QUERIES, CANDIDATES, dtype=torch.bool)
MASKED[0, 3] = MASKED[4, 8] = True


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = NeoBERTConfig(
        vocab_size=500, hidden_size=128, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=192, max_length=256,
    )  # fmt: skip
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), config, outliers=False)


@pytest.fixture(scope="module")
def sequences():
    torch.manual_seed(0)
    return random_sequences(LENGTHS, vocab=500)


def embedder(model):
    def embed(packed):
        hidden = model(
            input_ids=packed.input_ids[None],
            position_ids=packed.positions[None],
            cu_seqlens=packed.cu_seqlens,
            max_seqlen=packed.max_seqlen,
        ).last_hidden_state[0]
        return pool(hidden, packed.cu_seqlens)

    return embed


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def full_batch(checkpoint, sequences):
    """Everything in one forward pass and one backward pass."""
    model = NeoBERT.from_pretrained(checkpoint)
    rows = embedder(model)(pack(sequences))
    loss, _ = info_nce(rows[:QUERIES], rows[QUERIES:], TARGETS, MASKED, 0.07)
    (loss / QUERIES).backward()
    return loss.item() / QUERIES, gradients(model)


def cached(checkpoint, chunks, change=lambda chunks: chunks):
    """change: what happens to the chunks between the passes."""
    model = NeoBERT.from_pretrained(checkpoint)
    embed = embedder(model)
    first = embed_all(chunks, embed)
    part = cached_loss(first.embeddings, [CANDIDATES], TARGETS, MASKED, 0.07, Accelerator(cpu=True))
    backward_all(change(chunks), first, part.gradient, embed)
    return part.loss.item(), gradients(model)


def difference(a, b):
    """Of all parameters' gradients, the largest error, relative to the gradient's norm."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in b)


@pytest.mark.parametrize("max_tokens", [1, 100, 129, 200, 10_000])
def test_the_full_batchs_gradients(checkpoint, sequences, max_tokens):
    loss, truth = full_batch(checkpoint, sequences)
    chunks = chunked(sequences, max_tokens)
    sizes = [chunk.packed.num_sequences for chunk in chunks]
    assert sum(sizes) == len(LENGTHS) and (len(set(sizes)) > 1) == (100 <= max_tokens <= 200)
    ours, found = cached(checkpoint, chunks)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert difference(found, truth) < 1e-6


def test_company_changes_nothing(checkpoint, sequences):
    chunks = chunked(sequences, 129)
    _, alone = cached(checkpoint, chunks)
    _, found = cached(checkpoint, in_company(chunks, len(chunks) + 2))
    assert len(in_company(chunks, len(chunks) + 2)) == len(chunks) + 2
    assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_wrong_chunks_are_seen(checkpoint, sequences):
    """What the first test must notice: rows of another chunk, rows in another order, and a chunk
    that is left out."""
    _, truth = full_batch(checkpoint, sequences)
    chunks = chunked(sequences, 129)

    def of_another(chunks):
        rows = torch.cat([chunk.rows for chunk in chunks]).roll(1)
        parts = rows.split([len(chunk.rows) for chunk in chunks])
        return [Chunk(chunk.packed, part) for chunk, part in zip(chunks, parts, strict=True)]

    def turned(chunks):
        return [*chunks[:-1], dataclasses.replace(chunks[-1], rows=chunks[-1].rows.flip(0))]

    def left_out(chunks):
        return [dataclasses.replace(chunks[0], rows=chunks[0].rows[:0]), *chunks[1:]]

    for change in (of_another, turned, left_out):
        _, found = cached(checkpoint, chunks, change)
        assert difference(found, truth) > 0.01, change.__name__


def test_dropout_falls_on_the_same_units_again():
    """And the random state afterwards is the one that one pass over all chunks would leave."""
    table = nn.Embedding(50, 16)
    dropout = nn.Dropout(0.5)

    def embed(packed):
        return pool(dropout(table(packed.input_ids)), packed.cu_seqlens)

    chunks = chunked([[1, 2, 3], [4], [5, 6], [7, 8, 9], [10, 11], [12]], 4)
    assert len(chunks) > 2
    targets, masked = torch.arange(3), torch.zeros(3, 3, dtype=torch.bool)

    torch.manual_seed(1)
    order = torch.cat([chunk.rows for chunk in chunks])
    rows = torch.cat([embed(chunk.packed) for chunk in chunks])[order.argsort()]
    loss, _ = info_nce(rows[:3], rows[3:], targets, masked, 0.1)
    (loss / 3).backward()
    truth, table.weight.grad = table.weight.grad, None
    state = torch.get_rng_state()

    torch.manual_seed(1)
    first = embed_all(chunks, embed)
    torch.testing.assert_close(first.embeddings, rows.detach())
    part = cached_loss(first.embeddings, [3], targets, masked, 0.1, Accelerator(cpu=True))
    backward_all(chunks, first, part.gradient, embed)
    torch.testing.assert_close(table.weight.grad, truth, rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.get_rng_state(), state)


def test_info_nce_is_the_papers_formula():
    q, d = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    masked = torch.zeros(3, 5, dtype=torch.bool)
    masked[1, 4] = True
    targets = torch.tensor([2, 0, 1])
    loss, correct = info_nce(3 * q, d, targets, masked, 0.07)  # cosine: the length is nothing
    expected, hits = 0.0, 0
    for i in range(3):
        s = [torch.cosine_similarity(q[i], d[j], dim=0) / 0.07 for j in range(5)]
        terms = [s[j].exp() for j in range(5) if not masked[i, j]]
        expected -= (s[targets[i]].exp() / sum(terms)).log()
        hits += max(range(5), key=lambda j: -1e9 if masked[i, j] else s[j].item()) == targets[i]
    torch.testing.assert_close(loss, expected)
    assert correct == hits
