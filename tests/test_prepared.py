"""The prepared NeoBERT against an independent float64 NeoBERT, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from neobert import prepared
from neobert.checkpoint import write_random_checkpoint
from neobert.encode import Encoder
from neobert.model import NeoBERT
from neobert.packing import pack
from neobert.plain import PlainNeoBERT
from neobert.prepared import PreparedNeoBERT
from tests.accuracy import assert_accurate
from tests.checkpoints import random_sequences, small_config
from tests.tiny import texts, write_tiny_checkpoint

LENGTHS = [5, 1, 64, 0, 129, 33, 63, 65, 300]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Seven layers with an outlier channel, and gains between 0.02 and 60."""
    return write_random_checkpoint(tmp_path_factory.mktemp("small"), small_config())


@torch.no_grad()
def run_plain(checkpoint, sequences, dtype):
    plain = PlainNeoBERT.load(checkpoint, dtype)
    return torch.cat([plain(torch.tensor([ids]))[0] for ids in sequences if ids])


def relative_error(ours, truth):
    return float((ours.double() - truth).abs().max() / truth.abs().max())


def test_float32_agrees_with_float64(checkpoint):
    sequences = random_sequences(LENGTHS)
    ours = PreparedNeoBERT(NeoBERT.from_pretrained(checkpoint))(pack(sequences))
    truth = run_plain(checkpoint, sequences, torch.float64)
    plain = run_plain(checkpoint, sequences, torch.float32)
    assert truth.abs().max() > 50, "the checkpoint should have an outlier channel"
    assert relative_error(ours, truth) <= 1e-6
    quiet = truth.abs().amax(0) < 50
    assert relative_error(ours[:, quiet], truth[:, quiet]) <= 1e-5
    assert_accurate(*(x[:, quiet].flatten() for x in (ours, plain, truth)))


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16_is_as_near_as_plain_bfloat16(checkpoint, stream):
    """With the residual stream in bfloat16, and, by an embedding in it, in float32."""
    sequences = random_sequences(LENGTHS)
    model = NeoBERT.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.encoder.to(stream)
    ours = PreparedNeoBERT(model)(pack(sequences))
    assert ours.dtype == stream
    truth = run_plain(checkpoint, sequences, torch.float64)
    plain = run_plain(checkpoint, sequences, torch.bfloat16)
    assert_accurate(ours.bfloat16(), plain, truth)
    quiet = truth.abs().amax(0) < 50
    assert F.cosine_similarity(ours[:, quiet].double(), truth[:, quiet]).min() >= 0.999
    rms = [(x.double() - truth)[:, quiet].square().mean().sqrt() for x in (ours, plain)]
    assert rms[0] <= 1.1 * rms[1]


@pytest.mark.parametrize("lost", ["gains", "order", "squares"])
def test_the_comparison_sees_what_a_wrong_preparation_does(checkpoint, lost, monkeypatch):
    if lost == "gains":
        monkeypatch.setattr(prepared, "fold_gain", lambda weight, gain: weight)
    elif lost == "order":
        monkeypatch.setattr(prepared, "interleave_gate_up", lambda weight: weight)
    else:
        monkeypatch.setattr(prepared, "sum_of_squares", lambda x: torch.ones(len(x), 2))
    sequences = random_sequences([64, 33])
    ours = PreparedNeoBERT(NeoBERT.from_pretrained(checkpoint))(pack(sequences))
    truth = run_plain(checkpoint, sequences, torch.float64)
    quiet = truth.abs().amax(0) < 50
    assert relative_error(ours[:, quiet], truth[:, quiet]) > 1e-2


def test_autocast_changes_nothing(checkpoint):
    prepared, batch = PreparedNeoBERT(NeoBERT.from_pretrained(checkpoint)), pack([[5, 6, 7], [8]])
    expected = prepared(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared(batch), expected)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(prepared(batch), expected)


def test_changing_one_sequence_leaves_the_others_bits(checkpoint):
    model = PreparedNeoBERT(NeoBERT.from_pretrained(checkpoint))
    sequences = random_sequences([64, 33, 5])
    before = model(pack(sequences))
    sequences[1] = random_sequences([33])[0]
    after = model(pack(sequences))
    changed = torch.arange(102).sub(64).div(33, rounding_mode="floor") == 0
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.equal(before[changed], after[changed])


def test_the_model_is_left_as_it_was(checkpoint):
    model = NeoBERT.from_pretrained(checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = PreparedNeoBERT(model)
    prepared(pack(random_sequences([9])))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert prepared.layers[0].wo is model.transformer_encoder[0].wo.weight, "shared, not copied"


def test_an_encoder_of_it_gives_the_same_embeddings(tmp_path):
    checkpoint, given = write_tiny_checkpoint(tmp_path), texts()[:20]
    plain = Encoder.from_pretrained(checkpoint, device="cpu")
    fused = Encoder.from_pretrained(checkpoint, device="cpu", fused_epilogues=True)
    expected, actual = plain.encode(given), fused.encode(given)
    assert 0 < abs(actual - expected).max() <= 1e-5 * abs(expected).max(), "another path"
    with torch.no_grad():
        fused.model.transformer_encoder[0].wo.weight.zero_()
    assert abs(fused.encode(given) - expected).max() > 1e-3 * abs(expected).max()


def test_what_must_be_called_is_refused(checkpoint):
    model = NeoBERT.from_pretrained(checkpoint)
    hook = model.transformer_encoder[2].ffn.w12.register_forward_hook(lambda *given: None)
    expected = r"transformer_encoder\.2\.ffn\.w12 must be a bare Linear.*one with hooks"
    with pytest.raises(ValueError, match=expected):
        PreparedNeoBERT(model)
    hook.remove()
    model.transformer_encoder[3].qkv = torch.nn.Linear(256, 768, bias=True)
    with pytest.raises(ValueError, match=r"transformer_encoder\.3\.qkv must be a bare Linear"):
        PreparedNeoBERT(model)


def test_a_sequence_beyond_max_length_is_refused(checkpoint):
    model = PreparedNeoBERT(NeoBERT.from_pretrained(checkpoint))
    with pytest.raises(ValueError, match="601 tokens is longer than the model's max_length, 600"):
        model(pack(random_sequences([3, 601])))
