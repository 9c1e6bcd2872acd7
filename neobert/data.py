"""Documents → packed, masked batches: the same global batch whatever the number of processes.

The corpus is dealt to *lanes* like cards: document g of the shuffled corpus goes to lane g mod
`lanes`. A lane packs its own documents into bins of `bin_tokens` tokens, and a step trains on one
bin of every lane. Process r of n has the lanes r, r + n, r + 2n, …: the processes' data are
disjoint, and neither their number nor how many bins share a forward pass changes what a step
sees. A lane packs a *window* of documents at a time; its state says where the window began and how
many of its bins are used up, which is a few integers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from neobert.corpus import Source, lane_of_stream, open_texts
from neobert.masking import IGNORE_INDEX, Masking
from neobert.packing import PackedBatch, best_fit, concatenate, pack
from neobert.randomness import BINS, MIXTURE, random_generator
from neobert.readers import Cut, DocumentReader, Documents, Reader, StreamReader
from neobert.shards import TokenShards, is_prepared
from neobert.text import TextTokenizer

# A window fills this many bins to this share, so that best fit seldom needs one more. Of bins of a
# few sequences and more that leaves 0.3 to 0.7 % empty, of bins as short as the longest sequence up
# to 2 %; windows of 16 bins would leave 4 % of those.
WINDOW_BINS, WINDOW_FILL = 32, 0.997
VALIDATION_SEED = 1
AHEAD = 2  # steps made ready in the background


@dataclass(frozen=True)
class MaskedBatch:
    """Packed sequences and what to predict.

    rows: (masked,) int64, the tokens to predict, ascending; labels: (masked,) int64, their ids.
    """

    packed: PackedBatch
    rows: Tensor
    labels: Tensor

    @property
    def num_masked(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> MaskedBatch:
        return MaskedBatch(
            self.packed.to(device, True),
            self.rows.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> MaskedBatch:
        """Copied to memory that a GPU reads while the host goes on."""
        p = self.packed
        packed = PackedBatch(
            p.input_ids.pin_memory(),
            p.positions.pin_memory(),
            p.cu_seqlens.pin_memory(),
            p.max_seqlen,
        )
        return MaskedBatch(packed, self.rows.pin_memory(), self.labels.pin_memory())

    def inputs(self) -> dict[str, Any]:
        """Arguments of `NeoBERTLMHead.forward`. What the model makes of tokens that are not
        masked is not asked for."""
        predicted = {"tokens_to_keep": self.rows, "labels": self.labels[None]}
        return {**self.packed.inputs(), **predicted}

    def padded_inputs(self, pad_id: int) -> dict[str, Any]:
        """The same sequences as (sequences, longest) arrays with padding, for comparison."""
        lengths = self.packed.cu_seqlens.diff().tolist()
        labels = torch.full_like(self.packed.input_ids, IGNORE_INDEX)
        labels[self.rows] = self.labels

        def pad(x: Tensor, value: int) -> Tensor:
            rows = x.split(lengths)
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        return {
            "input_ids": pad(self.packed.input_ids, pad_id),
            "attention_mask": pad(torch.ones_like(labels), 0),
            "labels": pad(labels, IGNORE_INDEX),
        }


def masked(
    bins: Sequence[tuple[int, list[np.ndarray]]], masking: Masking, seed: int, step: int
) -> MaskedBatch:
    """One batch of several lanes' bins, each masked for itself: bins are (lane, sequences)."""
    packs = [pack(sequences) for _, sequences in bins]
    ids, labels = zip(
        *(masking(p.input_ids, seed, step, lane) for p, (lane, _) in zip(packs, bins, strict=True)),
        strict=True,
    )
    whole = concatenate(packs)
    packed = PackedBatch(torch.cat(ids), whole.positions, whole.cu_seqlens, whole.max_seqlen)
    to_predict = torch.cat(labels)
    (rows,) = (to_predict != IGNORE_INDEX).nonzero(as_tuple=True)
    return MaskedBatch(packed, rows, to_predict[rows])


class Lane:
    """Bins of one lane, without end.

    readers, weights: the mixture: each sequence comes from reader i with probability proportional
        to weights[i].
    state: what `state` was after a bin, to go on with the next one.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        weights: Sequence[float],
        bin_tokens: int,
        lane: int,
        lanes: int,
        seed: int,
        state: dict | None = None,
    ):
        self.readers, self.bin_tokens, self.seed = readers, bin_tokens, seed
        self.lane, self.lanes = lane, lanes
        self.shares = np.cumsum(weights) / sum(weights)
        self.drawn: int = state["drawn"] if state else 0
        self.after = self._place()  # of what is drawn but not in the window
        self.pending: np.ndarray | None = None
        self.bins: list[list[np.ndarray]] = []
        self.used = 0
        if state and state["used"]:
            self._fill_window()
            self.used = state["used"]

    @property
    def state(self) -> dict:
        """{"drawn", "readers", "used"}: sequences drawn and the readers' states where the window
        began, and how many of its bins are used up."""
        if self.used == len(self.bins):
            return {**self.after, "used": 0}
        return {**self.start, "used": self.used}

    def next(self) -> list[np.ndarray]:
        """The sequences, (tokens,) int32 each, of the next bin."""
        if self.used == len(self.bins):
            self._fill_window()
        self.used += 1
        return self.bins[self.used - 1]

    def _place(self) -> dict:
        return {"drawn": self.drawn, "readers": [reader.state for reader in self.readers]}

    def _fill_window(self) -> None:
        self.start = self.after
        bins = WINDOW_BINS
        if self.start["drawn"] == 0:
            # First windows of different lengths, or all lanes would ever after need a new one in
            # the same step, which would have to wait for all of it.
            bins = ceil(WINDOW_BINS * (self.lane + 1) / self.lanes)
        sequences = [] if self.pending is None else [self.pending]
        total = sum(map(len, sequences))
        while True:
            self.after = self._place()
            self.pending = self._draw()
            total += len(self.pending)
            if total > WINDOW_FILL * bins * self.bin_tokens and sequences:
                break
            sequences.append(self.pending)
        packed = best_fit([len(sequence) for sequence in sequences], self.bin_tokens)
        # Best fit begins with the longest: without this a step would see long sequences alone.
        random_generator(self.seed, BINS, self.lane, self.start["drawn"]).shuffle(packed)
        self.bins = [[sequences[index] for index in each] for each in packed]
        self.used = 0

    def _draw(self) -> np.ndarray:
        reader = 0
        if len(self.readers) > 1:
            u = random_generator(self.seed, MIXTURE, self.lane, self.drawn).random()
            reader = int(np.searchsorted(self.shares, u, side="right"))
        self.drawn += 1
        return self.readers[reader].next()


class Corpus:
    """Sources, opened and checked.

    held_out: documents of each source kept for validation; a stream can hold none.
    Raises FileNotFoundError and ValueError as `open_texts` and `TokenShards` do, and ValueError for
    values out of range and for shards of another tokenizer.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        cut: Cut,
        held_out: int = 0,
    ):
        if not sources:
            raise ValueError("data names no source")
        self.tokenizer, self.cut = tokenizer, cut
        self.tokenize = TextTokenizer(tokenizer)
        self.sources = sources
        self.opened = [self._open(source, held_out) for source in sources]

    def _open(self, source: Source, held_out: int) -> Documents | IterableDataset:
        if source.weight <= 0:
            raise ValueError(f"weight of {source.path} must be positive, got {source.weight}")
        if not self.cut.split and source.min_tokens > self.cut.max_length:
            raise ValueError(
                f"min_tokens of {source.path} is {source.min_tokens}, but documents are truncated "
                f"to max_length={self.cut.max_length} tokens"
            )
        if is_prepared(source.path):
            data = TokenShards(source.path)
            data.check_tokenizer(self.tokenize)
        else:
            data = open_texts(source)
        if not isinstance(data, IterableDataset):
            return Documents(source, data, self.tokenize, self.cut, held_out)
        if held_out:
            raise ValueError(f"{source.path} is streamed: no documents of it can be held out")
        return data

    def lane(
        self, lane: int, lanes: int, bin_tokens: int, seed: int, state: dict | None = None
    ) -> Lane:
        states = state["readers"] if state else [None] * len(self.sources)
        readers: list[Reader] = []
        for source, data, reader_state in zip(self.sources, self.opened, states, strict=True):
            if isinstance(data, Documents):
                readers.append(DocumentReader(data, lane, lanes, seed, reader_state))
            else:
                part = lane_of_stream(data, lane, lanes)
                readers.append(StreamReader(source, part, self.tokenize, self.cut, reader_state))
        weights = [source.weight for source in self.sources]
        return Lane(readers, weights, bin_tokens, lane, lanes, seed, state)

    def validation(self, bin_tokens: int, masking: Masking) -> list[MaskedBatch]:
        """The held-out documents, packed and masked the same way in every run."""
        sequences = [
            sequence
            for documents in self.opened
            if isinstance(documents, Documents)
            for each in documents.sequences(range(len(documents), len(documents.data)))
            for sequence in each
        ]
        packed = best_fit([len(sequence) for sequence in sequences], bin_tokens)
        return [
            masked([(lane, [sequences[i] for i in each])], masking, VALIDATION_SEED, 0)
            for lane, each in enumerate(packed)
        ]


class TrainingStream(AbstractContextManager):
    """The micro-batches of one process, step by step, made ready in a background thread.

    lanes: this process's.
    micro_batch_bins: bins in one micro-batch; it divides the number of lanes.
    step: the number of the first step.
    Iterating gives, per step, the micro-batches and {lane: state} after it, for a checkpoint.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        masking: Masking,
        seed: int,
        micro_batch_bins: int,
        step: int = 0,
        pin_memory: bool = False,
    ):
        if len(lanes) % micro_batch_bins:
            raise ValueError(
                f"micro_batch_bins={micro_batch_bins} must divide the {len(lanes)} bins that each "
                "process has in a step"
            )
        self.lanes, self.masking, self.seed = lanes, masking, seed
        self.size, self.step, self.pin_memory = micro_batch_bins, step, pin_memory
        self.ready: queue.Queue = queue.Queue(AHEAD)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="neobert-data", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[tuple[list[MaskedBatch], dict[int, dict]]]:
        while True:
            item = self.ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        while self.thread.is_alive():
            try:  # the thread may wait for room in the queue
                self.ready.get(timeout=0.05)
            except queue.Empty:
                pass
        self.thread.join()

    def _run(self) -> None:
        try:
            # Lanes are independent, and the tokenizer leaves Python to work: several at once.
            with ThreadPoolExecutor(4, thread_name_prefix="neobert-lane") as pool:
                while not self.closed.is_set():
                    self.ready.put(self._make_step(pool))
                    self.step += 1
        except BaseException as error:  # raised where the steps are used
            self.ready.put(error)

    def _make_step(self, pool: ThreadPoolExecutor) -> tuple[list[MaskedBatch], dict[int, dict]]:
        bins = list(pool.map(lambda lane: (lane.lane, lane.next()), self.lanes))
        batches = [
            masked(bins[i : i + self.size], self.masking, self.seed, self.step)
            for i in range(0, len(bins), self.size)
        ]
        if self.pin_memory:
            batches = [batch.pin_memory() for batch in batches]
        return batches, {lane.lane: lane.state for lane in self.lanes}
