"""Documents of a source → sequences of token ids for one lane, resumable at every sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, IterableDataset

from neobert.corpus import BATCH, Source, check_text, text_batches
from neobert.randomness import HELD_OUT, ORDER, Permutation, random_generator
from neobert.shards import WHOLE, TokenShards
from neobert.text import TextTokenizer


@dataclass(frozen=True)
class Cut:
    """How a document becomes sequences of at most max_length tokens, special tokens included.

    split: a longer document becomes several sequences; else (as in the paper) its end is dropped.
    """

    max_length: int
    split: bool = False


class Documents:
    """A source whose documents can be read in any order: texts in memory maps, or token shards.

    held_out: so many documents, chosen by the corpus alone and the same in every run, are for
        validation; places from `len(self)` on are theirs.
    Raises ValueError if nothing else is left.
    """

    def __init__(
        self,
        source: Source,
        data: Dataset | TokenShards,
        tokenize: TextTokenizer,
        cut: Cut,
        held_out: int = 0,
    ):
        if not 0 <= held_out < len(data):
            raise ValueError(
                f"{source.path} has {len(data)} documents, of which {held_out} cannot be held out"
            )
        self.source, self.data, self.tokenize, self.cut = source, data, tokenize, cut
        self.held_out = held_out
        self.order = Permutation(len(data), random_generator(0, HELD_OUT))

    def __len__(self) -> int:
        return len(self.data) - self.held_out

    def sequences(self, places: Sequence[int]) -> list[list[np.ndarray]]:
        """The sequences, (tokens,) int32 each, of documents: none of one that is too short."""
        numbers = [self.order(place) for place in places]
        if isinstance(self.data, TokenShards):
            return [self._from_shards(self.data, number) for number in numbers]
        texts = self.data[numbers][self.source.field]
        for number, text in zip(numbers, texts, strict=True):
            check_text(text, self.source.field, number)
        return tokenized(texts, self.source.min_tokens, self.tokenize, self.cut)

    def _from_shards(self, data: TokenShards, number: int) -> list[np.ndarray]:
        special = self.tokenize.num_special
        if data.length(number) + special < self.source.min_tokens:
            return []
        ids, size = data[number], self.cut.max_length - special
        starts = range(0, len(ids), size) if self.cut.split else range(1)
        return [
            np.concatenate((data.prefix, ids[start : start + size], data.suffix), dtype=np.int32)
            for start in starts
        ]


def tokenized(
    texts: list[str], min_tokens: int, tokenize: TextTokenizer, cut: Cut
) -> list[list[np.ndarray]]:
    """The sequences of each text, as of `Documents`."""
    special, prefix = tokenize.num_special, tokenize.prefix
    size = cut.max_length - special
    # No token is shorter than a character: most of what a filter refuses need not be tokenized.
    texts = [text if len(text) + special >= min_tokens else "" for text in texts]
    found: list[list[np.ndarray]] = []
    for ids in tokenize(texts, WHOLE if cut.split else cut.max_length)[0]:
        body = ids[len(prefix) : len(ids) - len(tokenize.suffix)]
        long_enough = body and len(ids) >= min_tokens
        found.append(
            [
                np.array([*prefix, *body[start : start + size], *tokenize.suffix], np.int32)
                for start in range(0, len(body) if long_enough else 0, size)
            ]
        )
    return found


class Reader(Protocol):
    """Sequences of one source for one lane, without end.

    state: where the next one is. Anything JSON holds; replaced, never changed.
    """

    state: Any

    def next(self) -> np.ndarray: ...


class DocumentReader:
    """One lane's documents, in another random order each epoch.

    state: [documents of this lane that are read, sequences of the next one that are].
    """

    def __init__(self, documents: Documents, lane: int, lanes: int, seed: int, state: Any = None):
        self.documents, self.lane, self.lanes, self.seed = documents, lane, lanes, seed
        self.state = state or [0, 0]
        self.ahead = self.state[0]  # documents whose sequences are in the queue or were
        self.queue: deque[tuple[list[int], np.ndarray]] = deque()
        self.epoch = -1

    def next(self) -> np.ndarray:
        refused = 0
        while not self.queue:
            places = [self._place(turn) for turn in range(self.ahead, self.ahead + BATCH)]
            for sequences in self.documents.sequences(places):
                done = self.state[1] if self.ahead == self.state[0] else 0
                self.ahead += 1
                for i, sequence in enumerate(sequences[done:], done + 1):
                    last = i == len(sequences)
                    after = [self.ahead, 0] if last else [self.ahead - 1, i]
                    self.queue.append((after, sequence))
            refused += BATCH
            if not self.queue and refused > 2 * len(self.documents):
                raise ValueError(nothing_passes(self.documents.source))
        self.state, sequence = self.queue.popleft()
        return sequence

    def _place(self, turn: int) -> int:
        """Document `turn` of this lane is number turn * lanes + lane of the endless corpus."""
        n = len(self.documents)
        epoch, place = divmod(turn * self.lanes + self.lane, n)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = Permutation(n, random_generator(self.seed, ORDER, epoch))
        return self.order(place)


class StreamReader:
    """One lane's part of a stream, in the stream's order, from the beginning again at its end.

    state: [the stream's own state, documents read since, sequences of the next one that are].
    """

    def __init__(
        self,
        source: Source,
        stream: IterableDataset,
        tokenize: TextTokenizer,
        cut: Cut,
        state: Any = None,
    ):
        self.source, self.stream, self.tokenize, self.cut = source, stream, tokenize, cut
        self.state = state or [None, 0, 0]
        self.queue: deque[tuple[list, np.ndarray]] = deque()
        self.batches = self._batches(*self.state)

    def next(self) -> np.ndarray:
        while not self.queue:
            next(self.batches)
        self.state, sequence = self.queue.popleft()
        return sequence

    def _batches(self, position: Any, documents: int, sequences: int) -> Iterator[None]:
        """Reads a batch into the queue at each step; the first `documents`, and the first
        `sequences` of the next, were read before."""
        while True:
            whole, found = position is None, False
            for texts, after in text_batches(self.stream, self.source.field, position):
                read = tokenized(texts, self.source.min_tokens, self.tokenize, self.cut)
                for number, pieces in enumerate(read):
                    for i, sequence in enumerate(pieces, 1):
                        if (number, i) > (documents, sequences):
                            last = i == len(pieces)
                            place = (number + 1, 0) if last else (number, i)
                            self.queue.append(([position, *place], sequence))
                    found = found or bool(pieces)
                position, documents, sequences = after, 0, 0
                yield
            if whole and not found:
                raise ValueError(nothing_passes(self.source))
            position = None


def nothing_passes(source: Source) -> str:
    return f"{source.path} has no document of at least min_tokens={source.min_tokens} tokens"
