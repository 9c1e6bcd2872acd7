"""Packing: nothing is lost, added or reordered between lists, packed and padded."""

import dataclasses

import numpy as np
import pytest
import torch

from neobert.packing import (
    PackedBatch,
    best_fit,
    concatenate,
    pack,
    pack_padded,
    padded_layout,
    restarting_positions,
    sequence_of_token,
    token_budget_batches,
    unpack,
    unpack_padded,
)

CPU = torch.device("cpu")


def test_pack_lays_sequences_end_to_end():
    batch = pack([[7, 8, 9], [], [4, 5]])
    assert batch.input_ids.tolist() == [7, 8, 9, 4, 5]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert batch.max_seqlen == 3 and type(batch.max_seqlen) is int
    assert (batch.num_tokens, batch.num_sequences) == (5, 3)
    assert batch.input_ids.dtype == batch.positions.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("sequences", [[], [[]], [[], []]])
def test_pack_of_nothing(sequences):
    batch = pack(sequences)
    assert (batch.num_tokens, batch.num_sequences, batch.max_seqlen) == (0, len(sequences), 0)
    assert batch.cu_seqlens.tolist() == [0] * (len(sequences) + 1)


def test_pack_takes_tuples_and_generators():
    assert pack((i, i) for i in range(3)).input_ids.tolist() == [0, 0, 1, 1, 2, 2]


def test_packed_batch_is_immutable_and_moves():
    batch = pack([[1, 2], [3]])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.max_seqlen = 5
    moved = batch.to("meta")
    assert isinstance(moved, PackedBatch) and moved.max_seqlen == 2
    assert {moved.input_ids.device.type, moved.positions.device.type} == {"meta"}
    assert moved.cu_seqlens.device.type == "meta"


def test_unpack_returns_every_sequence():
    batch = pack([[7, 8, 9], [], [4, 5]])
    hidden = torch.randn(5, 4)
    parts = unpack(hidden, batch.cu_seqlens)
    assert [len(part) for part in parts] == [3, 0, 2]
    assert torch.equal(torch.cat(parts), hidden)


def test_unpack_names_both_counts():
    with pytest.raises(ValueError, match=r"describes 5 tokens, but hidden has 6 rows"):
        unpack(torch.zeros(6, 2), torch.tensor([0, 3, 5], dtype=torch.int32))


def test_token_budget_batches_fill_without_overflow():
    lengths = torch.randint(0, 300, (500,)).tolist()
    batches = token_budget_batches(lengths, 1024)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    totals = [sum(lengths[i] for i in batch) for batch in batches]
    assert max(totals) <= 1024
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True)
    for total, following in zip(totals, batches[1:], strict=False):
        assert total + lengths[following[0]] > 1024, "a batch closed although the next text fits"


def test_token_budget_gives_a_longer_text_a_batch_of_its_own():
    assert token_budget_batches([3, 9, 1, 4, 4], 8) == [[1], [3, 4], [0, 2]]
    assert token_budget_batches([], 8) == []
    assert token_budget_batches([0, 0], 1) == [[0, 1]]


def test_token_budget_must_be_positive():
    with pytest.raises(ValueError, match=r"max_tokens must be at least 1, got 0"):
        token_budget_batches([1], 0)


def test_positions_and_sequence_numbers_from_boundaries():
    batch = pack([[1] * n for n in (0, 3, 0, 0, 1, 5, 0)])
    assert torch.equal(restarting_positions(batch.cu_seqlens, 9), batch.positions)
    assert sequence_of_token(batch.cu_seqlens, 9).tolist() == [1, 1, 1, 4, 5, 5, 5, 5, 5]


MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32]
)
def test_layout_of_any_keep_mask(dtype):
    layout = padded_layout((3, 4), MASK.to(dtype), CPU)
    assert layout.indices.tolist() == [0, 1, 9, 11]
    assert layout.cu_seqlens.tolist() == [0, 2, 2, 4]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == 2 and type(layout.max_seqlen) is int


def test_layout_without_mask_moves_nothing():
    layout = padded_layout((3, 4), None, CPU)
    x = torch.randn(3, 4, 2)
    assert layout.cu_seqlens.tolist() == [0, 4, 8, 12] and layout.max_seqlen == 4
    assert pack_padded(x, layout).data_ptr() == x.data_ptr()
    assert torch.equal(unpack_padded(pack_padded(x, layout), layout), x)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_layout_of_an_empty_batch(shape):
    layout = padded_layout(shape, torch.ones(shape), CPU)
    assert (layout.max_seqlen, layout.indices.numel()) == (0, 0)
    assert layout.cu_seqlens.tolist() == [0] * (shape[0] + 1)


@pytest.mark.parametrize(
    "mask", [torch.tensor([[0.0, -1e9]]), torch.tensor([[1, 2]]), torch.tensor([[1, torch.nan]])]
)
def test_layout_refuses_masks_of_other_kinds(mask):
    with pytest.raises(ValueError, match="attention_mask must hold only 1"):
        padded_layout((1, 2), mask, CPU)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 1), (6,), (3, 1, 2, 2)])
def test_layout_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"attention_mask must have the input's shape \(3, 2\)"):
        padded_layout((3, 2), torch.ones(shape), CPU)


def test_round_trip_zeroes_padding_and_is_differentiable():
    layout = padded_layout((3, 4), MASK, CPU)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    there_and_back = unpack_padded(pack_padded(x, layout), layout)
    assert torch.equal(there_and_back, x * MASK.unsqueeze(-1))
    assert torch.autograd.gradcheck(lambda x: unpack_padded(pack_padded(x, layout), layout), x)


def test_pack_takes_arrays():
    arrays = pack([np.array([7, 8, 9], np.uint16), np.array([], np.int32), np.array([4, 5])])
    lists = pack([[7, 8, 9], [], [4, 5]])
    assert torch.equal(arrays.input_ids, lists.input_ids)
    assert arrays.input_ids.dtype == torch.int64
    assert torch.equal(arrays.cu_seqlens, lists.cu_seqlens)


def test_concatenate():
    sequences = [[[7, 8, 9], [], [4, 5]], [[1]], [], [[2, 3], [6]]]
    whole, parts = (
        pack([s for each in sequences for s in each]),
        concatenate([pack(each) for each in sequences]),
    )
    for name in ("input_ids", "positions", "cu_seqlens", "max_seqlen"):
        a, b = getattr(whole, name), getattr(parts, name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def test_best_fit_places_every_sequence_once_and_overfills_nothing():
    lengths = np.random.default_rng(0).integers(0, 101, 500).tolist()
    bins = best_fit(lengths, 100)
    assert sorted(i for each in bins for i in each) == list(range(500))
    assert max(sum(lengths[i] for i in each) for each in bins) <= 100
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 100) + 4


def test_best_fit_takes_the_tightest_place():
    assert best_fit([60, 50, 40, 50], 100) == [[0, 2], [1, 3]]
    assert best_fit([], 100) == []
    with pytest.raises(ValueError, match="a sequence of 101 tokens in bins of 100"):
        best_fit([1, 101], 100)
