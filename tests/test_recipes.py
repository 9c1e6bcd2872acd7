"""The configuration: presets as in the paper, YAML and overrides, unknown keys, the optimizer."""

import dataclasses

import pytest
import torch

from neobert.corpus import Source
from neobert.model import NeoBERTConfig, NeoBERTLMHead
from neobert.optim import adamw, learning_rate
from neobert.recipes import PretrainConfig, load_config, save_config


def test_the_first_stage_is_the_papers():
    c = load_config("neobert-1024", overrides=["output=x"])
    assert c.batch_tokens == 2**21 and (c.steps, c.max_length) == (1_000_000, 1024)
    assert (c.lr, c.warmup_steps, c.weight_decay, c.clip_norm) == (6e-4, 2000, 0.1, 1.0)
    assert (c.beta1, c.beta2, c.eps) == (0.9, 0.95, 1e-8)
    assert (c.mask_rate, c.mask_scheme, c.precision) == (0.2, "mask", "bfloat16")
    assert not c.split_documents
    shape = {f.name: getattr(NeoBERTConfig(), f.name) for f in dataclasses.fields(c.model)}
    assert vars(c.model) == shape
    assert c.model_config().max_length == 1024


def test_the_second_stage_is_the_papers():
    c = load_config("neobert-4096", overrides=["output=x", "start_from=stage-1"])
    assert (c.steps, c.max_length, c.batch_tokens) == (50_000, 4096, 2**21)
    assert [(s.weight, s.min_tokens) for s in c.data] == [(0.2, 0), (0.4, 1024), (0.4, 2048)]
    last = rate_of(load_config("neobert-1024", None, ["output=x"]), 999_999)
    assert [rate_of(c, step) for step in (0, 1, 25_000, 49_999)] == pytest.approx([last] * 4)
    with pytest.raises(ValueError, match="missing mandatory value: start_from"):
        load_config("neobert-4096", overrides=["output=x"])


def rate_of(c, step):
    return learning_rate(step, c.steps, c.lr, c.warmup_steps, c.decay_fraction, c.min_lr_ratio)


def test_learning_rate_of_the_paper():
    at = {step: learning_rate(step, 1_000_000) for step in range(0, 1_000_000, 500)}
    assert learning_rate(0, 1_000_000) == 6e-4 / 2000
    assert learning_rate(1999, 1_000_000) == learning_rate(2000, 1_000_000) == 6e-4
    middle = (2000 + 900_000) // 2
    assert learning_rate(middle, 1_000_000) == pytest.approx((6e-4 + 6e-5) / 2)
    assert [at[step] for step in at if step >= 900_000] == pytest.approx([6e-5] * 200)
    rising = [at[step] for step in at if step < 2000]
    falling = [at[step] for step in at if 2000 <= step <= 900_000]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


def test_schedules_without_warmup_or_decay():
    assert learning_rate(0, 10, 1.0, 0, 0.9, 0.1) == 1.0
    assert learning_rate(5, 10, 1.0, 0, 0.0, 0.1) == pytest.approx(0.1)
    assert learning_rate(7, 10, 1.0, 10, 0.5, 0.1) == 0.8


def test_a_linear_decay():
    rates = [learning_rate(step, 100, 1.0, 6, 0.9, 0.1, linear=True) for step in range(100)]
    assert rates[:6] == pytest.approx([(step + 1) / 6 for step in range(6)])
    assert rates[6:90] == pytest.approx([1 - 0.9 * (step - 6) / 84 for step in range(6, 90)])
    assert rates[90:] == pytest.approx([0.1] * 10)


def test_weight_decay_spares_gains_and_biases():
    model = NeoBERTLMHead(
        NeoBERTConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=1)
    )
    optimizer = adamw(model)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert {n for n in names.values() if "norm" in n or n.endswith("bias")} == spared
    assert "model.layer_norm.weight" in spared and "decoder.bias" in spared
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-8


def test_fused_adamw_is_adamw():
    torch.manual_seed(0)
    weight = torch.nn.Linear(3, 5, bias=False)
    optimizer = adamw(weight, lr=0.1)
    w, m, v = weight.weight.detach().clone(), 0, 0
    for step in range(1, 4):
        grad = torch.randn(5, 3)
        weight.weight.grad = grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        w *= 1 - 0.1 * 0.1
        w -= 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.weight.detach(), w, rtol=1e-5, atol=1e-7)


def test_a_file_and_overrides_over_a_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "lr: 3e-4\nmodel: {num_hidden_layers: 12}\n"
        "data:\n- {path: a.txt}\n- {path: b.jsonl, field: body, weight: 2}\n"
    )
    c = load_config("tiny", path, ["output=x", "model.hidden_size=192", "data.0.min_tokens=8",
                                   "tokenizer=bert", "lr=1e-3"])  # fmt: skip
    assert (c.lr, c.model.num_hidden_layers, c.model.hidden_size) == (1e-3, 12, 192)
    assert c.data == [Source("a.txt", min_tokens=8), Source("b.jsonl", "body", 2.0)]
    assert c.model.vocab_size == load_config("tiny", None, ["output=x"]).model.vocab_size
    assert (c.output, c.tokenizer) == ("x", "bert")
    save_config(c, tmp_path / "saved.yaml")
    assert load_config(None, tmp_path / "saved.yaml") == c
    c = load_config(overrides=["output=x", "data=[{path: c.txt}]", "tokenizer=null"])
    assert c == PretrainConfig("x", [Source("c.txt")])


@pytest.mark.parametrize("override, error", [
    ("lrr=1", "lrr: .*[Dd]id you mean:? 'lr'"),
    ("model.hiden_size=64", "hiden_size.*[Dd]id you mean:? 'hidden_size'"),
    ("data.0.wieght=1", "wieght.*[Dd]id you mean:? 'weight'"),
    ("data=[{pth: a}]", "there is no key 'pth'; did you mean 'path'"),
    ("steps=many", "steps: Value 'many' .* could not be converted to Integer"),
    ("steps", "'steps' is not of the form key=value"),
    ("steps=[1", "not YAML"),
    ("steps=0", "steps must be at least 1, got 0"),
    ("precision=float16", "precision must be one of float32, bfloat16, got 'float16'"),
    ("mask_scheme=all", "mask_scheme must be one of mask, 80/10/10, got 'all'"),
    ("bin_tokens=100", "bin_tokens must hold a sequence of max_length=128 tokens, got 100"),
])  # fmt: skip
def test_what_is_refused(override, error):
    with pytest.raises(ValueError, match=error):
        load_config("tiny", None, ["output=x", override])


def test_what_is_refused_in_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("warmup_step: 3\n")
    with pytest.raises(ValueError, match="no key 'warmup_step'; did you mean 'warmup_steps'"):
        load_config("tiny", path, ["output=x"])
    path.write_text("zzz: 3\n")
    with pytest.raises(ValueError, match="no key 'zzz'; there are output, data, tokenizer"):
        load_config("tiny", path, ["output=x"])
    with pytest.raises(ValueError, match="no preset 'neobert-4069'; did you mean 'neobert-4096'"):
        load_config("neobert-4069")
    with pytest.raises(ValueError, match="missing mandatory value: output"):
        load_config()
