"""The rotary table: float32 whatever happens to the model, and transformers' own rope types."""

import math

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from neobert.layers import RotaryTable
from neobert.model import NeoBERT
from tests.checkpoints import small_config


def true_angles(config):
    head_dim = config.hidden_size // config.num_attention_heads
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return torch.arange(config.max_length).double()[:, None] * frequencies


def assert_is_table(table, angles, scale=1.0):
    assert table.cos.dtype == table.sin.dtype == torch.float32
    assert torch.equal(table.cos, (angles.cos() * scale).float())
    assert torch.equal(table.sin, (angles.sin() * scale).float())


def test_table_is_rounded_once_from_float64():
    config = small_config(max_length=4096)
    assert_is_table(RotaryTable(config), true_angles(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half().float(),
        lambda model: model.double(),
        lambda model: model.to("meta").to_empty(device="cpu"),
    ],
)
def test_table_survives_casts_and_the_meta_device(change):
    config = small_config(num_hidden_layers=1)
    model = change(NeoBERT(config))
    assert_is_table(model.rotary, true_angles(config))
    assert not any("rotary" in name for name in model.state_dict())


def test_model_made_on_the_meta_device_gets_its_table_when_materialised():
    config = small_config(num_hidden_layers=1)
    with torch.device("meta"):
        model = NeoBERT(config)
    assert model.rotary.cos.is_meta
    assert_is_table(model.to_empty(device="cpu").rotary, true_angles(config))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 150},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 150,
        },
    ],
)
def test_scaled_rope_types_follow_transformers(rope):
    config = small_config(rope_parameters={"rope_theta": 10000.0, **rope})
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    angles = torch.arange(config.max_length).double()[:, None] * frequencies.double()
    assert_is_table(RotaryTable(config), angles, scale)
    assert not torch.allclose(angles, true_angles(config))
    if rope["rope_type"] == "yarn":
        assert math.isclose(scale, 0.1 * math.log(4.0) + 1)


def test_theta_is_read():
    config = small_config(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    table = RotaryTable(config)
    assert torch.allclose(table.cos[3, 1], torch.tensor(3 * 500.0 ** (-1 / 32)).cos())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 32,
            "long_factor": [2.0] * 32,
            "original_max_position_embeddings": 150,
        },
    ],
)
def test_rope_types_that_depend_on_the_batch_are_refused(rope):
    config = small_config(rope_parameters={"rope_theta": 10000.0, **rope})
    with pytest.raises(ValueError, match=f"{rope['rope_type']}.*is not served"):
        RotaryTable(config)


def test_partial_rotation_is_refused():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"partial_rotary_factor 0\.5.*head_dim 64"):
        RotaryTable(small_config(rope_parameters=rope))
