"""Pairs → batches of one data set each, as a pure function of (seed, step).

Data set i of n_i pairs is drawn with probability proportional to n_i^alpha (paper, Appendix D.2). A
data set is read in a random order, another one in every epoch, and a last batch that would not be
full is left for the next. Nothing but the step is needed to go on, and the batch is the same
whatever the number of processes, each of which takes a slice of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neobert.gradcache import Chunk, chunked
from neobert.pairs import Pairs, PairSource
from neobert.randomness import (
    PAIR_ORDER,
    PAIR_SOURCES,
    PAIR_TEXTS,
    Permutation,
    random_generator,
)
from neobert.text import TextTokenizer


@dataclass(frozen=True)
class PairBatch:
    """The pairs of one step, of all processes.

    positives: of each pair the one that was drawn, one for each query.
    known: of each query, the texts that are no negatives of it: itself, and all positives of the
        batch's pairs that have the same query.
    """

    source: PairSource
    queries: list[str]
    positives: list[str]
    negatives: list[list[str]]
    known: list[frozenset[str]]

    def slices(self, processes: int) -> list[slice]:
        """The pairs of each process."""
        size = len(self.queries) // processes
        return [slice(rank * size, (rank + 1) * size) for rank in range(processes)]

    def candidates(self, processes: int) -> list[list[str]]:
        """What queries are compared with, by process: its positives, then its hard negatives."""
        return [
            self.positives[part] + [text for each in self.negatives[part] for text in each]
            for part in self.slices(processes)
        ]


class PairSampler:
    """`sampler(step)` is the batch of step `step`, 0 being the first.

    data: the pairs of each source.
    hard_negatives: how many of a pair's own negatives are taken at most.
    Raises ValueError for a data set with fewer pairs than a batch: a text would be in it twice.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        data: Sequence[Pairs],
        batch_size: int,
        hard_negatives: int = 0,
        alpha: float = 0.5,
        seed: int = 0,
    ):
        for source, pairs in zip(sources, data, strict=True):
            if len(pairs) < batch_size:
                raise ValueError(
                    f"{source.title} has {len(pairs)} usable pairs, fewer than "
                    f"batch_size={batch_size}"
                )
        self.sources, self.data = sources, data
        self.batch_size, self.hard_negatives, self.seed = batch_size, hard_negatives, seed
        weights = np.array([len(pairs) for pairs in data], float) ** alpha
        self.probabilities = weights / weights.sum()

    def source_of(self, step: int) -> tuple[int, int]:
        """The number of the data set of a step, and how many steps before it had the same."""
        draws = random_generator(self.seed, PAIR_SOURCES).random(step + 1)
        # Rounding may leave the last sum below 1, and a draw above it.
        shares = self.probabilities.cumsum()[:-1]
        drawn = np.searchsorted(shares, draws, side="right")
        return int(drawn[-1]), int((drawn[:-1] == drawn[-1]).sum())

    def numbers(self, step: int) -> tuple[int, list[int]]:
        """The number of the data set of a step, and those of its pairs."""
        source, before = self.source_of(step)
        pairs = len(self.data[source])
        epoch, place = divmod(before, pairs // self.batch_size)
        order = Permutation(pairs, random_generator(self.seed, PAIR_ORDER, source, epoch))
        first = place * self.batch_size
        return source, [order(first + i) for i in range(self.batch_size)]

    def __call__(self, step: int) -> PairBatch:
        source, numbers = self.numbers(step)
        pairs = self.data[source][numbers]
        random = random_generator(self.seed, PAIR_TEXTS, step)
        positives, negatives = [], []
        known: dict[str, set[str]] = {}
        for pair in pairs:
            positives.append(pair.positives[random.integers(len(pair.positives))])
            some = random.permutation(len(pair.negatives))[: self.hard_negatives]
            negatives.append([pair.negatives[i] for i in some])
            known.setdefault(pair.query, {pair.query}).update(pair.positives)
        return PairBatch(
            self.sources[source],
            [pair.query for pair in pairs],
            positives,
            negatives,
            [frozenset(known[pair.query]) for pair in pairs],
        )


@dataclass(frozen=True)
class Share:
    """What one process computes of a step.

    chunks: its texts, tokenized and packed: queries, then candidates as in `PairBatch.candidates`.
    counts: how many candidates each process has.
    targets: (queries,) int64, the place of each query's positive among all candidates.
    masked: (queries, all candidates) bool, candidates that are no negatives of the query because
        they are its positives or itself, as texts; never the target.
    truncated: how many texts were cut off at max_length tokens.
    """

    batch: PairBatch
    chunks: list[Chunk]
    counts: list[int]
    targets: Tensor
    masked: Tensor
    truncated: int

    @property
    def num_texts(self) -> int:
        return sum(len(chunk.rows) for chunk in self.chunks)


def share_of(
    batch: PairBatch,
    rank: int,
    processes: int,
    tokenize: TextTokenizer,
    max_length: int,
    max_tokens: int,
) -> Share:
    """The part of a batch that process `rank` of `processes` computes."""
    part = batch.slices(processes)[rank]
    candidates = batch.candidates(processes)
    prompt = batch.source.prompt
    document_prompt = prompt if batch.source.symmetric else ""
    texts = [prompt + text for text in batch.queries[part]]
    texts += [document_prompt + text for text in candidates[rank]]
    sequences, truncated = tokenize(texts, max_length)
    counts = [len(each) for each in candidates]
    targets = torch.arange(len(batch.queries[part])) + sum(counts[:rank])
    return Share(
        batch,
        chunked(sequences, max_tokens),
        counts,
        targets,
        _masked(batch.known[part], [text for each in candidates for text in each], targets),
        truncated,
    )


def _masked(known: Sequence[frozenset[str]], candidates: Sequence[str], targets: Tensor) -> Tensor:
    places: dict[str, list[int]] = {}
    for place, text in enumerate(candidates):
        places.setdefault(text, []).append(place)
    masked = torch.zeros(len(known), len(candidates), dtype=torch.bool)
    for row, texts in enumerate(known):
        for text in texts & places.keys():
            masked[row, places[text]] = True
    masked[torch.arange(len(known)), targets] = False
    return masked


def shares(
    sampler: PairSampler,
    steps: range,
    rank: int,
    processes: int,
    tokenize: TextTokenizer,
    max_length: int,
    max_tokens: int,
) -> Iterator[Share]:
    """What process `rank` computes in each of `steps`; the next one is made while one is used."""

    def make(step: int) -> Share:
        return share_of(sampler(step), rank, processes, tokenize, max_length, max_tokens)

    with ThreadPoolExecutor(1, thread_name_prefix="neobert-pairs") as pool:
        upcoming = [pool.submit(make, step) for step in steps[:1]]
        for step in steps:
            share = upcoming.pop().result()
            if step + 1 in steps:
                upcoming.append(pool.submit(make, step + 1))
            yield share
