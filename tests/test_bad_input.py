"""Input that contradicts itself or the model is refused, by name and with both values."""

import pytest
import torch

from neobert.model import NeoBERT
from neobert.packing import pack
from tests.checkpoints import random_sequences, small_config


@pytest.fixture(scope="module")
def model():
    return NeoBERT(small_config(num_hidden_layers=1)).eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": None}, "give either input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 6, 256)}, "give either input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(6, dtype=torch.int64)}, r"input_ids must be .* got \(6,\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"shape \(2, 6\).* got \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"shape \(2, 6\).* got \(2, 1, 6, 6\)"),
        ({"attention_mask": torch.full((2, 6), -1e9)}, "attention_mask must hold only"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, "max_seqlen is None"),
        ({"max_seqlen": 6}, "cu_seqlens is None"),
        (
            {"cu_seqlens": torch.tensor([0, 12], dtype=torch.int32), "max_seqlen": 12},
            "must be one row.* got 2 rows",
        ),
        ({"input_ids": torch.ones(1, 601, dtype=torch.int64)}, "601 tokens .*max_length 600"),
    ],
)
def test_contradictory_arguments_are_refused(model, arguments, message):
    defaults = {"input_ids": torch.ones(2, 6, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        model(**(defaults | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, TypeError, "cu_seqlens must be int32"),
        ({"cu_seqlens": torch.zeros(1, 3).int()}, ValueError, r"\(sequences \+ 1,\), got \(1, 3\)"),
        ({"cu_seqlens": torch.zeros(3, device="meta").int()}, ValueError, "on meta .* on cpu"),
        ({"cu_seqlens": torch.tensor([0, 3, 7]).int()}, ValueError, "at or before the 6 tokens"),
        ({"position_ids": torch.zeros(1, 6, device="meta").int()}, ValueError, "on meta .* on cpu"),
        ({"position_ids": torch.zeros(1, 6)}, TypeError, "position_ids must be int64 or int32"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(1, 6, 256).double()},
            TypeError,
            "embeddings must be float32, bfloat16 or float16, got torch.float64",
        ),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, ValueError, "not all ones"),
        ({"max_seqlen": 601}, ValueError, "601 tokens .*max_length 600"),
        ({"position_ids": torch.arange(6)[None] + 595}, IndexError, "600"),
        ({"input_ids": torch.full((1, 6), 1000)}, IndexError, "out of range"),
    ],
)
def test_bad_packed_input_is_refused(model, arguments, error, message):
    defaults = {
        "input_ids": torch.ones(1, 6, dtype=torch.int64),
        "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32),
        "max_seqlen": 3,
    }
    with pytest.raises(error, match=message):
        model(**(defaults | arguments))


def test_packed_positions_without_boundaries_are_refused(model):
    """Read as one sequence, each text would attend to the others."""
    batch = pack(random_sequences([5, 7]))
    for positions in (batch.positions, torch.zeros(12, dtype=torch.int64)):
        with pytest.raises(ValueError, match="position_ids do not rise along the only row"):
            model(batch.input_ids[None], position_ids=positions[None])
    shared = torch.zeros(1, 12, dtype=torch.int64)
    one = model(batch.input_ids[None], torch.ones(1, 12), position_ids=shared)
    assert one.last_hidden_state.isfinite().all()
