"""The trainer: what a step computes, that it is the same however it is cut, and exact restarts."""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, AutoTokenizer

from neobert.checkpoint import released_shapes, write_random_checkpoint
from neobert.data import MaskedBatch
from neobert.locate import checkpoints
from neobert.masking import IGNORE_INDEX, Masking
from neobert.metrics import forward_flop
from neobert.model import NeoBERTConfig, NeoBERTLMHead
from neobert.packing import PackedBatch, pack
from neobert.plain import PlainNeoBERT
from neobert.pretrain import pretrain
from neobert.saving import load_progress
from tests.checkpoints import random_sequences
from tests.runs import curve, run, settings, started, wait_for_step, write_texts

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

LENGTHS = [17, 3, 40, 1, 64, 9, 128]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = NeoBERTConfig(
        vocab_size=500, hidden_size=128, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=192, max_length=256,
    )  # fmt: skip
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), config, outliers=False)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    packed = pack(random_sequences(LENGTHS, vocab=500))
    ids, labels = Masking(4, (0, 1, 2, 3, 4), 500)(packed.input_ids, 0, 0)
    packed = PackedBatch(ids, packed.positions, packed.cu_seqlens, packed.max_seqlen)
    (rows,) = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    return MaskedBatch(packed, rows, labels[rows])


def loss_and_gradients(checkpoint, inputs):
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def plain_loss_and_gradients(checkpoint, inputs):
    """Of padded plain PyTorch, which computes the padding and the logits of every token."""
    model = PlainNeoBERT.load(checkpoint)
    logits = model.decoder(model(inputs["input_ids"], inputs["attention_mask"]))
    loss = cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def difference(a, b):
    """The largest over all parameters, relative to the largest gradient of each."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in b)


def test_packed_is_padded_and_leakage_is_seen(checkpoint, batch):
    padded = batch.padded_inputs(pad_id=0)
    loss, gradients = plain_loss_and_gradients(checkpoint, padded)
    for inputs in (batch.inputs(), padded):
        ours, our_gradients = loss_and_gradients(checkpoint, inputs)
        assert ours == pytest.approx(loss, rel=1e-5)
        assert difference(our_gradients, gradients) < 1e-5
    whole = torch.tensor([0, sum(LENGTHS)], dtype=torch.int32)
    leaking = {**batch.inputs(), "cu_seqlens": whole, "max_seqlen": sum(LENGTHS)}
    leaking["position_ids"] = torch.arange(sum(LENGTHS))[None]
    model = NeoBERTLMHead.from_pretrained(checkpoint, max_length=300)
    leaked = model(**leaking).loss
    assert abs(leaked.item() - loss) > 1e-4 * loss  # ten times what packing may err
    leaked.backward()
    assert difference({n: p.grad for n, p in model.named_parameters()}, gradients) > 0.1


def assert_same_curve(ours, theirs):
    """Losses and gradient norms within what float32 sums in another order make of them."""
    for our_record, record in zip(curve(ours), curve(theirs), strict=True):
        our_record, record = dict(our_record), dict(record)
        assert our_record.keys() == record.keys()
        for name in record.keys() & {"step", "loss", "validation_loss", "gradient_norm"}:
            assert our_record[name] == pytest.approx(record[name], rel=1e-4), our_record


def moments(folder):
    """AdamW's first moment after one step: the (clipped) gradient it saw, times 1 - beta1."""
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    return {name: state["exp_avg"] for name, state in saved["optimizer"]["state"].items()}


def test_a_step_is_the_same_however_it_is_cut(texts, tmp_path):
    """The gradient of 8 bins, as 1 x 8, 2 x 4 and 8 x 1 in one process and in two."""
    gradients, losses = {}, {}
    for processes, size in [(1, 8), (1, 2), (1, 1), (2, 1), (2, 4)]:
        config = settings(texts, tmp_path / f"{processes}-{size}", steps=1, micro_batch_bins=size,
                          precision="float32", clip_norm=1e9)  # fmt: skip
        run(config, processes)
        gradients[processes, size] = moments(checkpoints(tmp_path / f"{processes}-{size}")[-1])
        losses[processes, size] = dict(curve(config)[1])["loss"]
    for cut in gradients:
        assert losses[cut] == pytest.approx(losses[1, 8], rel=1e-6), cut
        assert difference(gradients[cut], gradients[1, 8]) < 2e-6, cut


def test_micro_batches_differ_in_masked_tokens_and_mean_of_means_would_show(texts, tmp_path):
    """So that the test above can tell: bins of one step have unlike numbers of masked tokens."""
    config = settings(texts, tmp_path / "run", steps=1, lr="1e38")
    config.steps = 3
    with pytest.raises(RuntimeError, match=r"step 2: loss nan.*non-finite-step-2-process-0.pt"):
        pretrain(config)
    kept = torch.load(tmp_path / "run" / "non-finite-step-2-process-0.pt", weights_only=True)
    counts = [inputs["labels"].numel() for inputs in kept]
    assert len(counts) == 8 and len(set(counts)) > 3
    assert set(kept[0]) == {
        "input_ids", "position_ids", "cu_seqlens", "max_seqlen", "tokens_to_keep", "labels",
    }  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_and_resume(texts, tmp_path, processes):
    """The curve and the last weights are the uninterrupted run's, bit for bit."""
    whole = settings(texts, tmp_path / "whole", micro_batch_bins=2, steps=12)
    run(whole, processes)
    broken = settings(texts, tmp_path / "broken", micro_batch_bins=2, steps=12)
    for step in (2, 5, 8):  # before the first checkpoint, and between others
        with started(broken, processes) as running:
            wait_for_step(broken, step, running)
            for process in running:
                os.kill(process.pid, signal.SIGKILL)
    left = [load_progress(each)["step"] for each in checkpoints(tmp_path / "broken")]
    assert left and left[-1] < 12
    run(broken, processes)
    assert curve(broken) == curve(whole)
    assert len([r for r in curve(whole) if "loss" in dict(r)]) == 12
    ends = [checkpoints(tmp_path / name)[-1] for name in ("whole", "broken")]
    assert [end.name for end in ends] == ["step-00000012"] * 2
    weights = [load_file(end / "model.safetensors") for end in ends]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [torch.load(end / "optimizer.pt", weights_only=True)["optimizer"] for end in ends]
    for name, state in states[0]["state"].items():
        for key, value in state.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(states[1]["state"][name][key])
            )
    assert not list((tmp_path / "broken" / "checkpoints").glob(".*"))


def test_sigterm_saves_and_another_number_of_processes_goes_on(texts, tmp_path):
    whole = settings(texts, tmp_path / "whole", steps=12)
    run(whole)
    broken = settings(texts, tmp_path / "broken", steps=12, save_every=100)
    with started(broken, 2) as running:
        wait_for_step(broken, 4, running)
        os.kill(running[1].pid, signal.SIGTERM)  # one process is told, and both stop
        for process in running:
            process.join(60)
        assert [process.exitcode for process in running] == [128 + signal.SIGTERM] * 2
    (saved,) = checkpoints(tmp_path / "broken")
    assert 4 < load_progress(saved)["step"] < 12
    run(broken)
    assert_same_curve(broken, whole)


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    config = settings(
        texts, tmp_path_factory.mktemp("runs") / "run", keep_checkpoints=2, tensorboard="true"
    )
    return config, pretrain(config)


def test_checkpoints_load_as_released_ones(finished):
    config, result = finished
    kept = checkpoints(result.checkpoint.parent.parent)
    assert [each.name for each in kept] == ["step-00000006", "step-00000008"]
    for folder in kept:
        stored = load_file(folder / "model.safetensors")
        assert {n: tuple(t.shape) for n, t in stored.items()} == released_shapes(
            config.model_config()
        )
        assert {t.dtype for t in stored.values()} == {torch.float32}
        model = AutoModelForMaskedLM.from_pretrained(folder)
        assert type(model) is NeoBERTLMHead and model.config.max_length == config.max_length
        tokenizer = AutoTokenizer.from_pretrained(folder)
        logits = model(**tokenizer(["the cat [MASK] the dog"], return_tensors="pt")).logits
        assert logits.shape[-1] == 600 and torch.isfinite(logits).all()


def test_what_a_run_leaves(finished):
    _, result = finished
    output = result.checkpoint.parent.parent
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == list(range(1, 9))
    assert set(training[0]) == {"step", "loss", "masked_accuracy", "gradient_norm",
                                "learning_rate", "tokens", "seconds", "tokens_per_second", "mfu",
                                "packing_efficiency"}  # fmt: skip
    assert [r["step"] for r in records if "validation_loss" in r] == [4, 8]
    assert records[0]["step"] == 0 and 2 < records[0]["validation_unigram_entropy"] < 3
    assert result.validation["validation_loss"] == records[-1]["validation_loss"] < 6.4
    assert training[-1]["loss"] == result.loss < training[0]["loss"]
    assert training[0]["learning_rate"] == 1e-3 and training[1]["learning_rate"] == 2e-3
    assert 0 < training[0]["mfu"] < 2 and 0.5 < training[0]["packing_efficiency"] <= 1
    assert list((output / "tensorboard").glob("events*"))
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_does_nothing(finished):
    config, result = finished
    assert pretrain(config) == result  # its loss and last validation, too
    assert len(curve(config)) == 11
    with pytest.raises(ValueError, match=r"steps=7, but .*step-00000008 is of step 8"):
        pretrain(dataclasses.replace(config, steps=7))


def test_forward_flop_of_the_released_model():
    """DESIGN's figures: 396.4 MFLOP per token in GEMMs, 86,016 S in attention, and the head's."""
    config = NeoBERTConfig()
    assert forward_flop(config, 1000, 0) / 1000 == pytest.approx(396.4e6, rel=1e-3)
    assert forward_flop(config, 512, 512**2) - forward_flop(config, 512, 0) == 86016 * 512**2
    assert forward_flop(config, 0, 0, 0) == 0
    # A masked token: its logits, and what follows the attention in the last block.
    after = 2 * (768 * 768 + 3 * 768 * 2048)
    assert forward_flop(config, 0, 0, 1) == 2 * 768 * 30522 + after
    assert forward_flop(config, 10, 0) - forward_flop(config, 10, 0, 0) == 10 * after


@pytest.mark.parametrize("option", ["padded", "gradient_checkpointing"])
def test_options_that_change_no_result(texts, tmp_path, finished, option):
    config = settings(texts, tmp_path / "run", **{option: "true", "steps": 8})
    pretrain(config)
    assert_same_curve(config, finished[0])


def losses(config):
    return [dict(record)["loss"] for record in curve(config) if "loss" in dict(record)]


def test_fused_epilogues_are_the_same_training(texts, tmp_path):
    """In float32, five steps of it; and a run goes on with them, or without, from a checkpoint
    that is the released one."""
    changes = dict(steps=5, save_every=2, validate_every=5)
    plain = settings(texts, tmp_path / "plain", **changes)
    fused = settings(texts, tmp_path / "fused", fused_epilogues="true", **changes)
    pretrain(plain), pretrain(fused)
    assert len(losses(plain)) == 5 and losses(fused) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(fused) != losses(plain), "another path"
    ends = [checkpoints(tmp_path / name)[-1] for name in ("plain", "fused")]
    weights = [load_file(end / "model.safetensors") for end in ends]
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in weights]
    assert shapes[0] == shapes[1]
    changes["steps"] = 7
    for option in ("true", "false"):
        shutil.copytree(tmp_path / "plain", tmp_path / option)
        pretrain(settings(texts, tmp_path / option, fused_epilogues=option, **changes))
    on, off = (settings(texts, tmp_path / name) for name in ("true", "false"))
    assert len(losses(on)) == 7 and losses(on) == pytest.approx(losses(off), rel=1e-5)
    assert losses(on)[:5] == losses(off)[:5] == losses(plain) and losses(on) != losses(off)


def test_bfloat16_keeps_weights_residual_and_optimizer_in_float32(texts, tmp_path, monkeypatch):
    seen = {}
    forward = NeoBERTLMHead.forward

    def watched(self, *args, **kwargs):
        block = self.model.transformer_encoder[1]
        handles = [
            block.register_forward_hook(lambda m, a, out: seen.update(residual=out.dtype)),
            block.qkv.register_forward_hook(lambda m, a, out: seen.update(branch=out.dtype)),
            block.ffn.w3.register_forward_hook(
                lambda m, a, out: seen.update(weight=m.weight.dtype)
            ),
        ]
        out = forward(self, *args, **kwargs)
        for handle in handles:
            handle.remove()
        return out

    monkeypatch.setattr(NeoBERTLMHead, "forward", watched)
    result = pretrain(settings(texts, tmp_path / "run", precision="bfloat16", steps=3))
    assert seen == {
        "residual": torch.float32, "branch": torch.bfloat16, "weight": torch.float32,
    }  # fmt: skip
    assert {each.dtype for each in moments(result.checkpoint).values()} == {torch.float32}
    reference = settings(texts, tmp_path / "float32", steps=3)
    run(reference)
    loss = max(dict(record).get("loss", 0) for record in curve(reference)[3:4])
    assert result.loss == pytest.approx(loss, rel=1e-2) and result.loss != loss


def test_stage_2_starts_from_stage_1(texts, tmp_path, finished):
    _, stage_1 = finished
    changes = dict(max_length=96, bin_tokens=128, warmup_steps=0, min_lr_ratio=1.0, lr="1e-9")
    result = pretrain(
        settings(texts, tmp_path / "run", start_from=stage_1.checkpoint, steps=1, **changes)
    )
    assert AutoModelForMaskedLM.from_pretrained(result.checkpoint).config.max_length == 96
    stages = stage_1.checkpoint, result.checkpoint
    before, after = (load_file(stage / "model.safetensors") for stage in stages)
    assert max((before[n] - after[n]).abs().max() for n in before) < 1e-6
    # The second moments are stage 1's, all but (1 - beta2) of them.
    saved = [
        torch.load(stage / "optimizer.pt", weights_only=True)["optimizer"]["state"]
        for stage in stages
    ]
    for name in saved[0]:
        assert (saved[1][name]["exp_avg_sq"] >= 0.9499 * saved[0][name]["exp_avg_sq"]).all()


def test_it_learns(texts, tmp_path):
    """Each word follows from its neighbours: no model without context gets below 2.5 nats."""
    changes = dict(steps=150, warmup_steps=10, lr="5e-3", micro_batch_bins=8, log_every=50)
    result = pretrain(
        settings(texts, tmp_path / "run", validate_every=150, save_every=1000, **changes)
    )
    assert result.validation["validation_loss"] < 1.8
