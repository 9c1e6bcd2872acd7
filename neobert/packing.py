"""Packed batches: sequences laid end to end, with no padding between them.

A batch of n sequences with T tokens in all is four things: ``input_ids`` (T,), ``positions`` (T,)
that restart at 0 with each sequence, ``cu_seqlens`` (n+1,) int32 with sequence i in rows
``cu_seqlens[i]:cu_seqlens[i+1]``, and ``max_seqlen``, the longest length, as a Python int so that
no kernel launch ever waits for the device to learn it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Sequences packed end to end.

    input_ids: (tokens,) int64.
    positions: (tokens,) int64, the place of each token in its own sequence.
    cu_seqlens: (sequences + 1,) int32, from 0 to the number of tokens.
    max_seqlen: the length of the longest sequence, in tokens.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on `device`."""
        return PackedBatch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.positions.to(device, non_blocking=non_blocking),
            self.cu_seqlens.to(device, non_blocking=non_blocking),
            self.max_seqlen,
        )

    def inputs(self) -> dict[str, Any]:
        """Arguments of `NeoBERT.forward`."""
        return {
            "input_ids": self.input_ids[None],
            "position_ids": self.positions[None],
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
        }


def pack(sequences: Iterable[Sequence[int] | np.ndarray]) -> PackedBatch:
    """Lists or (length,) arrays of token ids → one PackedBatch on the CPU. Empty sequences are
    legal and stay."""
    sequences = list(sequences)
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    cu_seqlens = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    total = int(lengths.sum())
    if sequences and all(isinstance(sequence, np.ndarray) for sequence in sequences):
        input_ids = np.concatenate(sequences, dtype=np.int64)
    else:
        input_ids = np.fromiter(chain.from_iterable(sequences), np.int64, total)
    positions = np.arange(total, dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        torch.from_numpy(cu_seqlens),
        int(lengths.max(initial=0)),
    )


def concatenate(batches: Sequence[PackedBatch]) -> PackedBatch:
    """The sequences of several batches, one batch after the other, as one; on the CPU."""
    starts = np.cumsum([0, *(batch.num_tokens for batch in batches)])
    ends = [b.cu_seqlens[1:] + int(start) for b, start in zip(batches, starts[:-1], strict=True)]
    return PackedBatch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.positions for batch in batches]),
        torch.cat([torch.zeros(1, dtype=torch.int32), *ends]),
        max(batch.max_seqlen for batch in batches),
    )


def unpack(hidden: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """(tokens, …) → one view per sequence, (length, …). Reads `cu_seqlens` on the host."""
    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != hidden.shape[0]:
        raise ValueError(
            f"cu_seqlens describes {sum(lengths)} tokens, but hidden has {hidden.shape[0]} rows"
        )
    return list(hidden.split(lengths))


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in batches of at most `max_tokens` tokens, longest texts first.

    Sorting puts similar lengths beside each other, and the largest memory is asked for first. A
    text longer than the budget makes a batch of its own. Equal lengths keep their input order.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    batches: list[list[int]] = []
    room = -1
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if lengths[index] > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity` tokens: best fit, longest first.

    Each goes where the least room stays, and into a new bin if it fits nowhere: at most 11/9 of the
    fewest possible bins and four more (Johnson 1973), and with texts, whose short ones fill the
    gaps, hardly any room is left. Raises ValueError for a length beyond `capacity`.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"a sequence of {lengths[order[0]]} tokens in bins of {capacity}")
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens of room, number of the bin), ascending
    for index in order:
        place = bisect_left(rooms, (lengths[index], -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        insort(rooms, (room - lengths[index], number))
    return bins


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(num_tokens,) int64, the number of the sequence that each token belongs to."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def restarting_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(num_tokens,) int64 positions that restart at 0 with each sequence; never waits for a GPU."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    return tokens - cu_seqlens[sequence_of_token(cu_seqlens, num_tokens)]


@dataclass(frozen=True)
class PaddedLayout:
    """Where the tokens of a padded (batch, length) array lie.

    shape: (batch, length) of the padded array.
    indices: (tokens,) int64 into the flattened array; None when nothing is padding.
    cu_seqlens: (batch + 1,) int32, one sequence per row, zero-length for a row of padding only.
    max_seqlen: the most tokens in a row.
    """

    shape: tuple[int, int]
    indices: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int


def padded_layout(
    shape: tuple[int, int], attention_mask: Tensor | None, device: torch.device
) -> PaddedLayout:
    """Find the tokens of a padded batch; waits for the device once, and never without a mask.

    attention_mask: (batch, length) of ones (keep) and zeros (padding), anywhere in a row; bool,
    integer or float. Raises ValueError for another shape and for values other than 0 and 1: an
    additive mask or segment numbers would otherwise be silently misread.
    """
    batch, length = shape
    if attention_mask is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return PaddedLayout(shape, None, cu_seqlens, length)
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must have the input's shape {tuple(shape)}, one value per token, "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask.to(device)
    keep = mask != 0
    odd = (keep & (mask != 1)).any()
    lengths = keep.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = lengths.amax() if batch else lengths.sum()
    odd, total, max_seqlen = torch.stack([odd.long(), lengths.sum(), longest]).tolist()
    if odd:
        raise ValueError(
            "attention_mask must hold only 1 (keep) and 0 (padding); got other values, as in an "
            "additive mask or segment numbers"
        )
    indices = torch.nonzero_static(keep.flatten(), size=total).squeeze(1)
    return PaddedLayout((batch, length), indices, cu_seqlens, max_seqlen)


def pack_padded(x: Tensor, layout: PaddedLayout) -> Tensor:
    """(batch, length, …) → (tokens, …), differentiable."""
    x = x.flatten(0, 1)
    return x if layout.indices is None else x.index_select(0, layout.indices)


def unpack_padded(x: Tensor, layout: PaddedLayout) -> Tensor:
    """(tokens, …) → (batch, length, …) with zeros at the padding, differentiable."""
    if layout.indices is not None:
        rows = x.new_zeros(layout.shape[0] * layout.shape[1], *x.shape[1:])
        x = rows.index_copy(0, layout.indices, x)
    return x.unflatten(0, layout.shape)
