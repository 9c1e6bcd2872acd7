"""Gradients of a loss over a batch of any size, with the memory of one chunk of it.

A contrastive loss compares every text of a batch with every other, so a batch cannot be cut as
gradient accumulation cuts it. But the loss needs the embeddings alone. So (GradCache, Gao et al.
2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): embed the chunks
without keeping what a backward pass needs; compute the loss and its gradient with respect to the
embeddings; embed chunk after chunk once more, now for the backward pass, and hand each its rows of
that gradient. Chunks are packed, and as large as a budget of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neobert.packing import PackedBatch, pack, token_budget_batches

Embed = Callable[[PackedBatch], Tensor]
NoSync = Callable[[], AbstractContextManager]
RandomState = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Chunk:
    """Some of a batch's texts. rows: (sequences,) int64, their places in the batch; a chunk that
    only keeps other processes company has none."""

    packed: PackedBatch
    rows: Tensor


def chunked(sequences: Sequence[Sequence[int] | np.ndarray], max_tokens: int) -> list[Chunk]:
    """Token ids of texts in chunks of at most `max_tokens` tokens, longest texts first."""
    groups = token_budget_batches([len(ids) for ids in sequences], max_tokens)
    return [Chunk(pack([sequences[i] for i in group]), torch.tensor(group)) for group in groups]


def in_company(chunks: list[Chunk], number: int) -> list[Chunk]:
    """`number` chunks: with FSDP all processes must call the model equally often."""
    companion = Chunk(pack([chunks[-1].packed.input_ids[:1].numpy()]), chunks[-1].rows[:0])
    return [*[companion] * (number - len(chunks)), *chunks]


@dataclass(frozen=True)
class Embedded:
    """Embeddings of all chunks.

    embeddings: (texts, dim) float32, a leaf that wants a gradient.
    kept: the last chunk's, with its graph: its backward pass needs no second forward.
    states: the random state before each chunk, so that dropout falls on the same units again.
    """

    embeddings: Tensor
    kept: Tensor
    states: list[RandomState]


def embed_all(chunks: Sequence[Chunk], embed: Embed, no_sync: NoSync = nullcontext) -> Embedded:
    """The first pass. embed: packed texts → (sequences, dim) float32, differentiable.

    no_sync: holds back a data-parallel engine's exchange of gradients; only the last backward
        pass of `backward_all` is outside it.
    """
    states, parts = [], []
    for number, chunk in enumerate(chunks, 1):
        states.append(_random_state())
        # With several chunks the kept one's backward pass is not the last.
        held_back = no_sync() if len(chunks) > 1 else nullcontext()
        with torch.set_grad_enabled(number == len(chunks)), held_back:
            parts.append(embed(chunk.packed)[: len(chunk.rows)])
    with torch.no_grad():
        rows = torch.cat([chunk.rows for chunk in chunks]).to(parts[-1].device)
        found = torch.cat(parts)
        embeddings = torch.empty_like(found).index_copy_(0, rows, found)
    return Embedded(embeddings.requires_grad_(), parts[-1], states)


def backward_all(
    chunks: Sequence[Chunk],
    embedded: Embedded,
    gradient: Tensor,
    embed: Embed,
    backward: Callable[[Tensor], object] = Tensor.backward,
    no_sync: NoSync = nullcontext,
) -> None:
    """The second pass: adds the gradient of the loss to the parameters' gradients.

    gradient: (texts, dim) float32, that of the loss with respect to `embedded.embeddings`.
    backward: called with a scalar for each chunk, whose gradient is the loss's.
    """
    order = [len(chunks) - 1, *range(len(chunks) - 1)]  # the one that is kept first, to free it
    after = _random_state()
    for number in order:
        chunk = chunks[number]
        with nullcontext() if number == order[-1] else no_sync():
            if number == order[0]:
                rows = embedded.kept
            else:
                _set_random_state(embedded.states[number])
                rows = embed(chunk.packed)[: len(chunk.rows)]
            backward((rows * gradient[chunk.rows.to(gradient.device)]).sum())
    _set_random_state(after)


def _random_state() -> RandomState:
    """Of the CPU, and of the current GPU if there is one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: RandomState) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
