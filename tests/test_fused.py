"""A model with fused epilogues: the model as it was, to rounding, however it is called."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard

from neobert.checkpoint import write_random_checkpoint
from neobert.fused import fuse_epilogues
from neobert.invariance import make_batch_invariant
from neobert.model import NeoBERT, NeoBERTForSequenceClassification, NeoBERTLMHead
from neobert.packing import pack
from neobert.plain import PlainNeoBERT
from neobert_kernels import epilogue_training
from tests.checkpoints import pad, random_sequences, small_config
from tests.saved import saved_bytes

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]
LENGTHS = [5, 1, 64, 33]
SEEDS = range(4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Seven layers with an outlier channel, and gains between 0.02 and 60."""
    return write_random_checkpoint(tmp_path_factory.mktemp("small"), small_config())


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """Three layers without one, in which every gradient shows."""
    config = small_config(num_hidden_layers=3)
    return write_random_checkpoint(tmp_path_factory.mktemp("ordinary"), config, outliers=False)


def loaded(checkpoint, fused, cls=NeoBERTLMHead, **kwargs):
    model = cls.from_pretrained(checkpoint, **kwargs).train()
    if fused:
        fuse_epilogues(model)
    return model


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def packed_inputs(keep=False):
    batch = pack(random_sequences(LENGTHS))
    rows = torch.arange(0, batch.num_tokens, 3)
    labels = batch.input_ids[rows] if keep else batch.input_ids
    return {
        **batch.inputs(),
        "labels": labels[None],
        **({"tokens_to_keep": rows} if keep else {}),
    }


def padded_inputs():
    ids, mask = pad(random_sequences(LENGTHS), "left")
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


INPUTS = {
    "packed": packed_inputs,
    "padded": padded_inputs,
    "tokens to keep": lambda: packed_inputs(keep=True),
    "hidden states": lambda: packed_inputs() | {"output_hidden_states": True},
}


def loss_of(model, inputs):
    """With hidden states, of them too: each has a gradient besides that of what follows it."""
    output = model(**inputs)
    states = output.hidden_states or ()
    return output.loss + sum(state.square().mean() for state in states)


def assert_same_gradients(ours, theirs, rtol=2e-5):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        error = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()
        assert error < rtol, (name, error)


@pytest.mark.parametrize("given", INPUTS)
def test_float32_is_the_model_that_is_not_fused(ordinary, given):
    inputs, results = INPUTS[given](), []
    for fused in (False, True):
        model = loaded(ordinary, fused)
        loss = loss_of(model, inputs)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    (expected, theirs), (loss, ours) = results
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(ours, theirs)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours), "another path"


@torch.no_grad()
def test_inference_is_too(checkpoint):
    inputs = packed_inputs() | {"labels": None, "output_hidden_states": True}
    theirs, ours = (loaded(checkpoint, fused).eval()(**inputs) for fused in (False, True))
    for mine, yours in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert mine.shape == yours.shape
        assert ((mine - yours).norm() / yours.norm()) < 1e-6


def loss_and_errors(model, inputs, truth):
    """The relative error of the gradient of each parameter."""
    loss = model(**inputs).loss
    loss.backward()
    found = gradients(model)
    return torch.stack([(found[n].double() - t).norm() / t.norm() for n, t in truth.items()])


class Plain(nn.Module):
    """PlainNeoBERT with the loss of a NeoBERTLMHead."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, input_ids, attention_mask, labels):
        logits = self.plain.decoder(self.plain(input_ids, attention_mask))
        self.loss = F.cross_entropy(logits.flatten(0, 1).to(wide_of(logits)), labels.flatten())
        return self

    def named_parameters(self, *args, **kwargs):
        return self.plain.named_parameters(*args, **kwargs)


def wide_of(x):
    return torch.promote_types(x.dtype, torch.float32)


PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16 by autocast": (torch.float32, True),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_agree_with_float64(checkpoint, precision):
    """Of every parameter, with the outlier. As for the model that is not fused: the gradient of a
    gain is one number in the outlier channel, so draws are pooled, and plain PyTorch's worst and
    median parameter are the yardstick."""
    dtype, autocast = PRECISIONS[precision]
    ours = loaded(checkpoint, True, dtype=dtype)
    plain = Plain(PlainNeoBERT.load(checkpoint, dtype))
    exact = Plain(PlainNeoBERT.load(checkpoint, dtype).double())
    errors = {"ours": [], "plain": []}
    for seed in SEEDS:
        torch.manual_seed(seed)
        inputs = padded_inputs()
        exact(**inputs).loss.backward()
        truth = gradients(exact)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            errors["ours"].append(loss_and_errors(ours, inputs, truth))
            errors["plain"].append(loss_and_errors(plain, inputs, truth))
    mine, yardstick = (torch.stack(errors[name]).square().mean(0).sqrt() for name in errors)
    assert 0 < yardstick.median() < (1e-5 if precision == "float32" else 0.1)
    assert mine.max() <= 2 * yardstick.max()
    assert mine.median() <= 2 * yardstick.median()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(ordinary, reentrant, monkeypatch):
    model, inputs = loaded(ordinary, True), packed_inputs(keep=True)
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls, project = [], epilogue_training.norm_linear_rotary
    monkeypatch.setattr(
        epilogue_training, "norm_linear_rotary", lambda *given: calls.append(1) or project(*given)
    )
    model(**inputs).loss.backward()
    assert len(calls) == 6, "the blocks were not computed again"
    ours = gradients(model)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("frozen", ["encoder", "attention_norm", "qkv", "ffn.w12", "wo"])
def test_frozen_parameters(ordinary, frozen):
    inputs, results = packed_inputs(), []
    for fused in (False, True):
        model = loaded(ordinary, fused)
        for name, parameter in model.named_parameters():
            if f"{frozen}.weight" in name and "decoder" not in name:
                parameter.requires_grad_(False)
        model(**inputs).loss.backward()
        results.append(gradients(model))
    assert len(results[0]) < len(list(model.parameters()))
    assert_same_gradients(*results)


def test_a_head_other_than_the_language_models(ordinary):
    ids, mask = pad(random_sequences(LENGTHS), "right")
    model = loaded(ordinary, False, NeoBERTForSequenceClassification).eval()
    expected = model(ids, mask).logits
    fuse_epilogues(model)
    torch.testing.assert_close(model(ids, mask).logits, expected)


@pytest.fixture
def one_process(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp(ordinary, one_process):
    """Whose hooks are those of the blocks: weights come before a block and its backward."""
    inputs, model = packed_inputs(keep=True), loaded(ordinary, True)
    model(**inputs).loss.backward()
    expected = gradients(model)
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model.model.transformer_encoder:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**inputs).loss.backward()
    ours = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_compiles_into_at_most_three_graphs(ordinary):
    torch._dynamo.reset()
    model = loaded(ordinary, True, NeoBERT)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([5, 9, 7], [33, 2], [64, 3, 3, 12], [17]):
        batch = pack(random_sequences(lengths))
        arguments = batch.inputs()
        results = []
        for function in (model, compiled):
            function(**arguments).last_hidden_state.square().mean().backward()
            results.append(gradients(model))
        assert_same_gradients(results[1], results[0])
    assert counter.frame_count <= 3


LAYERS, DIM, WIDTH, HEADS = 3, 256, 512, 4


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_layer_keeps_for_the_backward(ordinary, autocast):
    """Of a token: the norms' outputs less, the squares for rstd; and no weight in another dtype."""
    dtype = torch.float32 if autocast else torch.bfloat16
    kept = {}
    for fused in (False, True):
        model = loaded(ordinary, fused, NeoBERT, dtype=dtype)
        inputs = packed_inputs()
        del inputs["labels"]
        sizes = []
        for layers in (1, 2):
            model.transformer_encoder = model.transformer_encoder[: 3 - layers]

            def forward(model=model, inputs=inputs):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    return model(**inputs).last_hidden_state

            sizes.append(saved_bytes(forward))
        kept[fused] = sizes[0] - sizes[1]
    tokens = sum(LENGTHS)
    weights = 2 * (4 * DIM * DIM + 3 * DIM * WIDTH) if autocast else 0  # those of autocast
    norms, rstd, squares = 2 * 2 * DIM * tokens, 2 * 4 * tokens, 2 * 2 * 4 * tokens
    assert kept[False] - kept[True] == norms + rstd - squares + weights


def test_modules_that_must_be_called_are_refused(ordinary):
    model = NeoBERT.from_pretrained(ordinary)
    hook = model.transformer_encoder[2].ffn.w12.register_forward_hook(lambda *given: None)
    expected = r"ffn\.w12 must be a bare Linear.*one with hooks"
    with pytest.raises(ValueError, match=r"transformer_encoder\.2\." + expected):
        fuse_epilogues(model)
    hook.remove()
    fuse_epilogues(model)
    model.transformer_encoder[2].ffn.w12.register_forward_hook(lambda *given: None)
    ids = torch.tensor(random_sequences([5]))
    with pytest.raises(ValueError, match=expected):
        model(ids)
    model.transformer_encoder[2].ffn = nn.Identity()
    with pytest.raises(ValueError, match=r"block\.ffn must be a bare SwiGLU.*is a Identity"):
        model(ids)
    model.transformer_encoder[2] = nn.Identity()
    with pytest.raises(ValueError, match=r"\.2 must be a NeoBERTBlock, it is a Identity"):
        fuse_epilogues(model)


def test_batch_invariance_is_not_promised(ordinary):
    model = NeoBERT.from_pretrained(ordinary)
    model.transformer_encoder[0].qkv.batch_invariant = True
    with pytest.raises(ValueError, match="the model is batch-invariant"):
        fuse_epilogues(model)
    model = NeoBERT.from_pretrained(ordinary)
    fuse_epilogues(model)
    with pytest.raises(ValueError, match="the model has fused epilogues"):
        make_batch_invariant(model)


@pytest.mark.parametrize("lost", ["gain", "order", "stream"])
def test_the_comparison_sees_what_is_lost(ordinary, lost, monkeypatch):
    if lost == "gain":
        plain = epilogue_training._folded
        monkeypatch.setattr(
            epilogue_training, "_folded", lambda w, g, d: plain(w, 0 * g + g.mean(), d)
        )
    elif lost == "order":
        monkeypatch.setattr(epilogue_training, "_folded_in_turn", epilogue_training._folded)
    else:
        kept = epilogue_training._norm_linear_bwd
        monkeypatch.setattr(
            epilogue_training,
            "_norm_linear_bwd",
            lambda dy, dstream, *rest: kept(dy, 0 * dstream, *rest),
        )
    inputs, results = packed_inputs(), []
    for fused in (False, True):
        model = loaded(ordinary, fused)
        model(**inputs).loss.backward()
        results.append(gradients(model))
    with pytest.raises(AssertionError):
        assert_same_gradients(*results, rtol=1e-2)
