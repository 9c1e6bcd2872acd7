"""The encoder against an independent float64 NeoBERT, however its input is laid out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from neobert import plain as plain_neobert
from neobert.checkpoint import released_shapes, write_random_checkpoint
from neobert.model import NeoBERT, NeoBERTConfig, NeoBERTLMHead
from neobert.packing import pack, unpack
from neobert.plain import PlainNeoBERT
from neobert_kernels import _compiled
from tests.accuracy import assert_accurate
from tests.checkpoints import pad, random_sequences, small_config

LENGTHS = [5, 1, 64, 129, 33, 63, 65, 300]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("small"), small_config())


@pytest.fixture(scope="module")
def model(checkpoint):
    return NeoBERT.from_pretrained(checkpoint)


def run_packed(model, sequences):
    """One (length, dim) tensor per sequence."""
    batch = pack(sequences)
    output = model(batch.input_ids[None], cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
    return unpack(output.last_hidden_state[0], batch.cu_seqlens)


@torch.no_grad()
def run_plain(checkpoint, sequences, dtype):
    plain = PlainNeoBERT.load(checkpoint, dtype)
    return [plain(torch.tensor([ids]))[0] for ids in sequences]


def relative_error(ours, truth):
    return float(((ours.double() - truth).abs().max() / truth.abs().max()).detach())


# --- the same function as the released model ---


def test_names_and_shapes_are_the_released_ones():
    shapes = released_shapes(NeoBERTConfig())
    with torch.device("meta"):
        state = NeoBERTLMHead(NeoBERTConfig()).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert len(shapes) == 172
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 245_136_954
    assert shapes["model.transformer_encoder.27.ffn.w12.weight"] == (4096, 768)
    assert shapes["model.transformer_encoder.27.ffn.w3.weight"] == (768, 2048)


@torch.no_grad()
def test_float32_agrees_with_float64(checkpoint, model):
    sequences = random_sequences(LENGTHS)
    ours = torch.cat(run_packed(model, sequences))
    truth = torch.cat(run_plain(checkpoint, sequences, torch.float64))
    plain = torch.cat(run_plain(checkpoint, sequences, torch.float32))
    assert truth.abs().max() > 50, "the checkpoint should have an outlier channel"
    assert relative_error(ours, truth) <= 1e-6
    quiet = truth.abs().amax(0) < 50
    assert relative_error(ours[:, quiet], truth[:, quiet]) <= 1e-5
    # Every token takes the same path: the yardstick is plain PyTorch's worst over all of them.
    assert_accurate(*(x[:, quiet].flatten() for x in (ours, plain, truth)))


@torch.no_grad()
def test_bfloat16_is_as_near_as_plain_bfloat16(checkpoint):
    sequences = random_sequences(LENGTHS)
    model = NeoBERT.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ours = torch.cat(run_packed(model, sequences))
    truth = torch.cat(run_plain(checkpoint, sequences, torch.float64))
    plain = torch.cat(run_plain(checkpoint, sequences, torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    assert_accurate(ours, plain, truth)
    quiet = truth.abs().amax(0) < 50  # the outlier's channel alone would make any cosine 1
    assert F.cosine_similarity(ours[:, quiet].double(), truth[:, quiet]).min() >= 0.999
    rms = [(x.double() - truth)[:, quiet].square().mean().sqrt() for x in (ours, plain)]
    assert rms[0] <= 1.1 * rms[1]


@torch.no_grad()
def test_28_layers_of_released_width_agree_with_float64(tmp_path):
    checkpoint = write_random_checkpoint(tmp_path, NeoBERTConfig(vocab_size=1000))
    sequences = random_sequences([40, 3, 90])
    truth = torch.cat(run_plain(checkpoint, sequences, torch.float64))
    ours = torch.cat(run_packed(NeoBERT.from_pretrained(checkpoint), sequences))
    assert relative_error(ours, truth) <= 1e-5
    bfloat16 = NeoBERT.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ours = torch.cat(run_packed(bfloat16, sequences))
    assert F.cosine_similarity(ours.double(), truth).min() >= 0.999


def wrong_rotation(x, angles):
    """Rotate-half instead of adjacent pairs."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos()[None, :, None].to(x.dtype), angles.sin()[None, :, None].to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@torch.no_grad()
def test_other_rotations_and_layouts_do_not_pass(checkpoint, model, monkeypatch):
    """The comparison above must see a swapped layout: each moves the output a thousand times
    further than the tolerance."""
    sequences = random_sequences([64, 33])
    ours = torch.cat(run_packed(model, sequences))
    quiet = ours.abs().amax(0) < 50
    with monkeypatch.context() as patch:
        patch.setattr(plain_neobert, "rotate_adjacent_pairs", wrong_rotation)
        swapped = torch.cat(run_plain(checkpoint, sequences, torch.float64))
    assert relative_error(ours[:, quiet], swapped[:, quiet]) > 1e-2

    contiguous = NeoBERT.from_pretrained(checkpoint)
    heads, dim = model.config.num_attention_heads, model.config.hidden_size
    for block in contiguous.transformer_encoder:
        per_head = block.qkv.weight.view(3, heads, dim // heads, dim).transpose(0, 1)
        block.qkv.weight.copy_(per_head.reshape(3 * dim, dim))
    swapped = torch.cat(run_packed(contiguous, sequences))
    assert relative_error(ours[:, quiet], swapped[:, quiet].double()) > 1e-2


# --- however it is laid out ---


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left", "gap"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_anywhere_agrees_with_plain(checkpoint, model, side, dtype):
    sequences = random_sequences([5, 1, 64, 33])
    ids, mask = pad(sequences, side)
    ours = model(ids, mask.to(dtype)).last_hidden_state
    truth = PlainNeoBERT.load(checkpoint, torch.float64)(ids, mask)
    live = mask.bool()
    assert relative_error(ours[live], truth[live]) <= 1e-6
    assert (ours[~live] == 0).all()


@torch.no_grad()
def test_packed_padded_and_one_at_a_time_agree(model):
    sequences = random_sequences(LENGTHS)
    packed = torch.cat(run_packed(model, sequences))
    alone = torch.cat([model(torch.tensor([ids])).last_hidden_state[0] for ids in sequences])
    assert relative_error(packed, alone.double()) <= 1e-6
    if _compiled.LOADED:  # the C++ kernels' promise; PyTorch's GEMM makes none
        assert torch.equal(packed, alone)
    for side in ("right", "left"):
        ids, mask = pad(sequences, side)
        padded = model(ids, mask).last_hidden_state[mask.bool()]
        assert relative_error(packed, padded.double()) <= 1e-6


@torch.no_grad()
def test_every_spelling_of_packed_input_is_the_same(model):
    batch = pack(random_sequences([5, 1, 64]))
    ids, positions, cu = batch.input_ids[None], batch.positions[None], batch.cu_seqlens
    spellings = [
        dict(cu_seqlens=cu, max_seqlen=64),
        dict(cu_seqlens=cu, max_seqlen=torch.tensor(64)),
        dict(cu_seqlens=cu, max_seqlen=64, position_ids=positions),
        dict(cu_seqlens=cu, max_seqlen=64, position_ids=positions.int()),
        dict(cu_seqlens=cu, max_seqlen=64, attention_mask=torch.ones_like(ids)),
        dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=64, max_length_k=64),
        dict(cu_seqlens=cu, max_seqlen=64, inputs_embeds=model.encoder(ids)),
    ]
    first = model(ids, **spellings[0]).last_hidden_state
    assert first.shape == (1, 70, 256)
    for arguments in spellings[1:]:
        given = None if "inputs_embeds" in arguments else ids
        assert torch.equal(model(given, **arguments).last_hidden_state, first)


@torch.no_grad()
def test_only_differences_of_positions_matter(model):
    ids = torch.tensor(random_sequences([40]))
    here = model(ids).last_hidden_state
    there = model(ids, position_ids=torch.arange(40)[None] + 500).last_hidden_state
    assert relative_error(here, there.double()) <= 1e-6
    apart = model(ids, position_ids=2 * torch.arange(40)[None]).last_hidden_state
    assert relative_error(here[..., :100], apart[..., :100].double()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_one_sequence_leaves_the_others_bits(checkpoint, dtype):
    model = NeoBERT.from_pretrained(checkpoint, dtype=dtype)
    sequences = random_sequences([64, 33, 5, 129])
    before = run_packed(model, sequences)
    padded_before = model(*pad(sequences, "right")).last_hidden_state
    sequences[1] = random_sequences([33])[0]
    after = run_packed(model, sequences)
    padded_after = model(*pad(sequences, "right")).last_hidden_state
    for i in (0, 2, 3):
        assert torch.equal(before[i], after[i])
        assert torch.equal(padded_before[i], padded_after[i])
    assert not torch.equal(before[1], after[1])


def test_a_row_of_padding_only_is_legal(model):
    ids, mask = pad(random_sequences([5, 9]), "right")
    mask[0] = 0
    output = model(ids, mask)
    assert (output.last_hidden_state[0] == 0).all()
    alone = model(ids[1:], mask[1:]).last_hidden_state[0]
    assert relative_error(output.last_hidden_state[1], alone.detach().double()) <= 1e-6
    nothing = model(ids, torch.zeros_like(mask)).last_hidden_state
    assert nothing.shape == (*ids.shape, 256) and (nothing == 0).all()


@torch.no_grad()
def test_empty_batches_are_legal(model):
    assert model(torch.zeros(0, 5, dtype=torch.int64)).last_hidden_state.shape == (0, 5, 256)
    assert [len(part) for part in run_packed(model, [[], [3, 4], []])] == [0, 2, 0]
    assert [len(part) for part in run_packed(model, [[]])] == [0]


# --- what else a caller may ask for ---


@torch.no_grad()
def test_hidden_states_are_embedding_blocks_and_final_norm(checkpoint, model):
    ids, mask = pad(random_sequences([5, 33]), "left")
    output = model(ids, mask, output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(states[0], model.encoder(ids) * mask.unsqueeze(-1))
    assert torch.equal(states[-1], output.last_hidden_state)
    shorter = PlainNeoBERT.load(checkpoint, torch.float64)
    del shorter.model["transformer_encoder"][3:]
    shorter.model["layer_norm"] = nn.Identity()
    live = mask.bool()
    assert relative_error(states[3][live], shorter(ids, mask)[live]) <= 1e-6


def test_attentions_are_the_probabilities(checkpoint, model):
    sequences = random_sequences([5, 12])
    ids, mask = pad(sequences, "gap")
    output = model(ids, mask, output_attentions=True)
    assert torch.equal(output.last_hidden_state, model(ids, mask).last_hidden_state)
    assert len(output.attentions) == 7
    probabilities = output.attentions[1]
    assert probabilities.shape == (2, 4, 14, 14)
    live = mask[:, None, :, None] * mask[:, None, None, :] == 1
    live = live.expand_as(probabilities)
    assert (probabilities[~live] == 0).all() and (probabilities[live] > 0).all()
    assert torch.allclose(probabilities.sum(-1), mask[:, None].expand(2, 4, 14).float())

    with torch.no_grad():  # the first layer's, from scratch
        plain = PlainNeoBERT.load(checkpoint, torch.float64)
        layer = plain.model["transformer_encoder"][0]
        q, k, _ = (
            layer.qkv(layer.attention_norm(plain.model["encoder"](ids)))
            .view(2, 14, 4, 3, 64)
            .unbind(3)
        )
        angles = torch.arange(14)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64.0).double()
        q, k = (plain_neobert.rotate_adjacent_pairs(t, angles).transpose(1, 2) for t in (q, k))
        scores = (q @ k.mT / 8).masked_fill(mask[:, None, None] == 0, -torch.inf)
    assert relative_error(output.attentions[0][live], scores.softmax(-1)[live]) <= 1e-5

    batch = pack(sequences)
    packed = model(
        batch.input_ids[None], cu_seqlens=batch.cu_seqlens, max_seqlen=12, output_attentions=True
    ).attentions[1]
    assert packed.shape == (1, 4, 17, 17)
    assert (packed[..., :5, 5:] == 0).all() and (packed[..., 5:, :5] == 0).all()
    assert torch.allclose(packed.sum(-1), torch.ones(1, 4, 17))
    probabilities.square().sum().backward()
    gradient = model.transformer_encoder[1].qkv.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    model.zero_grad()


def test_gradients_agree_with_float64(checkpoint):
    """Of a masked-language loss over left-padded batches, for every parameter.

    The gradient of a norm's gain is nearly all in the outlier channel, where tokens cancel: one
    number, whose error is a matter of luck in any implementation. So several batches are drawn,
    and the yardstick is plain PyTorch's worst parameter.
    """
    models = {
        "ours": NeoBERTLMHead.from_pretrained(checkpoint),
        "plain": PlainNeoBERT.load(checkpoint, torch.float32),
        "truth": PlainNeoBERT.load(checkpoint, torch.float64),
    }
    errors = {"ours": [], "plain": []}
    for _ in range(4):
        ids, mask = pad(random_sequences([5, 33, 64]), "left")
        labels = torch.where((torch.rand(ids.shape) < 0.3) & (mask == 1), ids, -100)
        gradients = {}
        for name, model in models.items():
            model.zero_grad()
            if name == "ours":
                loss = model(ids, mask, labels=labels).loss
            else:
                logits = model.decoder(model(ids, mask))
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            gradients[name] = [parameter.grad for _, parameter in sorted(model.named_parameters())]
        truth = gradients.pop("truth")
        for name, gradient in gradients.items():
            relative = [(g - t).norm() / t.norm() for g, t in zip(gradient, truth, strict=True)]
            errors[name].append(torch.stack(relative))
    ours, plain = (torch.stack(errors[name]).square().mean(0).sqrt() for name in errors)
    assert 0 < plain.max() < 1e-5
    assert ours.max() <= 2 * plain.max()
    assert ours.median() <= 2 * plain.median()


@pytest.mark.no_poison
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(checkpoint, reentrant):
    ids, mask = pad(random_sequences([5, 33]), "right")
    model = NeoBERTLMHead.from_pretrained(checkpoint).train()
    model(ids, mask, labels=ids).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    block = model.model.transformer_encoder[0]
    block.qkv.register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, mask, labels=ids).loss.backward()
    assert len(calls) == 2, "the block was not recomputed"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name]), name


def test_autocast_keeps_the_residual_stream_in_float32(checkpoint, model):
    ids, mask = pad(random_sequences([5, 33]), "right")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, mask, output_hidden_states=True)
        output.last_hidden_state[..., 1].sum().backward()
    assert {state.dtype for state in output.hidden_states} == {torch.float32}
    assert model.transformer_encoder[0].qkv.weight.grad.dtype == torch.float32
    model.zero_grad()
    truth = PlainNeoBERT.load(checkpoint, torch.float64)(ids, mask)[mask.bool()]
    ours = output.last_hidden_state[mask.bool()].double()
    quiet = truth.abs().amax(0) < 50
    bfloat16 = PlainNeoBERT.load(checkpoint, torch.bfloat16)(ids, mask)[mask.bool()]
    errors = [(x - truth)[:, quiet].square().mean() for x in (ours, bfloat16)]
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole_into_at_most_three_graphs(tmp_path, training, dynamic):
    """Whatever the numbers of tokens and sequences and the longest length are."""
    torch._dynamo.reset()
    config = small_config(num_hidden_layers=2)
    checkpoint = write_random_checkpoint(tmp_path, config, outliers=False)
    model = NeoBERT.from_pretrained(checkpoint).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    for lengths in ([5, 9, 7], [33, 2], [64, 3, 3, 12], [17], [200, 0, 1, 1], [64] * 9, [2] * 40):
        batch = pack(random_sequences(lengths))
        arguments = batch.inputs()
        results = []
        for function in (model, compiled):
            with torch.set_grad_enabled(training):
                hidden = function(**arguments).last_hidden_state
            results.append([hidden])
            if training:
                qkv = model.transformer_encoder[0].qkv.weight
                results[-1] += torch.autograd.grad(hidden.square().mean(), qkv)
        for eager, graph in zip(*results, strict=True):
            assert torch.allclose(graph, eager, atol=1e-6)
    assert counter.frame_count <= 3, "recompiled for another number of tokens or sequences"
