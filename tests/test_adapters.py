"""A projection that is wrapped, replaced or hooked is called, never bypassed by a fused op."""

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization

from neobert.checkpoint import write_random_checkpoint
from neobert.layers import Linear, RMSNorm
from neobert.model import NeoBERT
from tests.checkpoints import random_sequences, small_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = small_config(num_hidden_layers=3)
    return write_random_checkpoint(tmp_path_factory.mktemp("small"), config)


def relative_error(ours, truth):
    return float((ours - truth).abs().max() / truth.abs().max())


class LowRankAdapter(nn.Module):
    """Replaces a linear layer as PEFT's LoRA does: calls it, then adds a low-rank term."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, base_layer.out_features, bias=False)

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs) + self.up(self.down(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qkv", "wo", "ffn.w12", "ffn.w3"])
def test_an_adapter_around_any_projection_counts(checkpoint, name):
    ids = torch.tensor(random_sequences([20]))
    model, merged = NeoBERT.from_pretrained(checkpoint), NeoBERT.from_pretrained(checkpoint)
    before = model(ids).last_hidden_state
    block = model.transformer_encoder[1]
    adapter = LowRankAdapter(block.get_submodule(name))
    block.set_submodule(name, adapter)
    target = merged.transformer_encoder[1].get_submodule(name)
    target.weight += adapter.up.weight @ adapter.down.weight
    adapted = model(ids).last_hidden_state
    assert relative_error(adapted, merged(ids).last_hidden_state) <= 1e-6
    assert not torch.allclose(adapted, before, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qkv", "wo", "ffn.w12", "ffn.w3"])
def test_a_hook_on_any_projection_runs(checkpoint, name):
    model = NeoBERT.from_pretrained(checkpoint)
    projection = model.transformer_encoder[1].get_submodule(name)
    assert type(projection) is Linear
    projection.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    ids = torch.tensor(random_sequences([20]))
    merged = NeoBERT.from_pretrained(checkpoint)
    if name in ("qkv", "ffn.w12"):
        merged.transformer_encoder[1].get_submodule(name).weight.zero_()
        expected = merged(ids).last_hidden_state
        assert relative_error(model(ids).last_hidden_state, expected) <= 1e-6
    else:  # the hook's zeros replace the residual stream that these add to
        assert not torch.equal(model(ids).last_hidden_state, merged(ids).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention_norm", "ffn_norm", "ffn", ""])
def test_a_hook_on_any_other_module_runs(checkpoint, name):
    model = NeoBERT.from_pretrained(checkpoint)
    called = []
    hooked = model.transformer_encoder[1].get_submodule(name)
    hooked.register_forward_hook(lambda module, args, output: called.append(module))
    model(torch.tensor(random_sequences([20])))
    assert called == [hooked]


@torch.no_grad()
def test_a_hook_on_all_modules_sees_every_one(checkpoint):
    model = NeoBERT.from_pretrained(checkpoint)
    seen = set()
    handle = register_module_forward_hook(lambda module, args, output: seen.add(module))
    try:
        model(torch.tensor(random_sequences([20])))
    finally:
        handle.remove()
    assert {m for m in model.modules() if type(m) in (Linear, RMSNorm)} <= seen


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention_norm", "qkv", "wo", "ffn_norm", "ffn.w12", "ffn.w3"])
@pytest.mark.parametrize("how", ["parametrized", "attribute", "forward"])
def test_a_weight_that_is_made_elsewhere_counts(checkpoint, name, how):
    """Parametrisations, FSDP's views of a flat parameter, and offloading that fetches the weight
    in a forward of its own."""
    ids = torch.tensor(random_sequences([20]))
    model, expected = NeoBERT.from_pretrained(checkpoint), NeoBERT.from_pretrained(checkpoint)
    expected.transformer_encoder[1].get_submodule(name).weight *= 1.5
    module = model.transformer_encoder[1].get_submodule(name)
    forward, weight = module.forward, module.weight
    if how == "parametrized":
        register_parametrization(module, "weight", Scaled())
    elif how == "attribute":
        del module.weight
        module.weight = (1.5 * weight).detach()
    else:
        whole = nn.Parameter(1.5 * weight)

        def fetching(*args):
            module.weight = whole
            output = forward(*args)
            module.weight = nn.Parameter(torch.zeros_like(whole))
            return output

        module.forward = fetching
        module.weight = nn.Parameter(torch.zeros_like(whole))
    ours, truth = model(ids).last_hidden_state, expected(ids).last_hidden_state
    assert torch.equal(ours, truth)
    assert not torch.equal(truth, NeoBERT.from_pretrained(checkpoint)(ids).last_hidden_state)


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


@torch.no_grad()
def test_offloaded_weights_are_fetched(checkpoint):
    ids = torch.tensor(random_sequences([20]))
    model = NeoBERT.from_pretrained(checkpoint)
    expected = model(ids).last_hidden_state
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.transformer_encoder[0].qkv.weight.is_meta
    assert torch.equal(model(ids).last_hidden_state, expected)
