"""Fine-tuning on GLUE: what a step computes, early stopping, exact restarts, transfer."""

import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from neobert.engine import NonFiniteLossError
from neobert.glue import EarlyStopping, FinetuneResult, finetune, forward, load_model
from neobert.glue_data import packed_batches, read_examples
from neobert.glue_recipes import FinetuneConfig
from neobert.glue_tasks import find_task
from neobert.locate import checkpoints
from neobert.metrics import Metrics, read_metrics
from neobert.plain import PlainNeoBERT
from neobert.saving import SaveError, load_progress
from tests.glue_files import after, run_settings, write_learnable, write_model, write_tsv
from tests.runs import CONTEXT, curve

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_learnable(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "dropout")


@pytest.fixture(scope="module")
def sure_model(tmp_path_factory):
    """Without dropout."""
    return write_model(tmp_path_factory.mktemp("models") / "sure", dropout=0.0)


def difference(a, b):
    """The largest over all parameters, relative to the largest gradient of each."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in b)


def plain_loss_and_gradients(checkpoint, ours, batch):
    """Of padded plain PyTorch with the head of `ours`."""
    plain = PlainNeoBERT.load(checkpoint)
    head = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()
            if not n.startswith("model.")}  # fmt: skip
    inputs = batch.padded_inputs(pad_id=0)
    first = plain(inputs["input_ids"], inputs["attention_mask"])[:, 0]
    first = torch.tanh(first @ head["dense.weight"].T + head["dense.bias"])
    logits = first @ head["classifier.weight"].T + head["classifier.bias"]
    if ours.config.problem_type == "regression":
        loss = mse_loss(logits[:, 0], batch.labels)
    else:
        loss = cross_entropy(logits, batch.labels)
    loss.backward()
    encoder = {n: p for n, p in plain.named_parameters() if not n.startswith("decoder.")}
    return loss.item(), {n: p.grad for n, p in (encoder | head).items()}


@pytest.mark.parametrize("name", ["MNLI", "STS-B"])
def test_packed_is_padded_is_plain(sure_model, name):
    """Losses and gradients in float32, of classes and of scores."""
    task = find_task(name)
    ids = np.random.default_rng(0)
    sequences = [ids.integers(5, 24, n, np.int32) for n in (17, 3, 40, 1, 64, 9, 30, 2)]
    labels = (
        np.array([0, 2, 1, 1, 0, 2, 2, 0])
        if task.classes
        else np.array([0, 5, 1.5, 2, 4.2, 3, 0.1, 2], np.float32)
    )
    (batch,) = packed_batches(sequences, labels, range(8), 1000)
    torch.manual_seed(0)
    reference = load_model(sure_model, task)
    loss, gradients = plain_loss_and_gradients(sure_model, reference, batch)
    for padded in (False, True):
        torch.manual_seed(0)
        ours = load_model(sure_model, task).train()
        config = FinetuneConfig(task=name, padded=padded, precision="float32")
        our_loss = forward(ours, batch, config).loss
        our_loss.backward()
        assert our_loss.item() == pytest.approx(loss, rel=1e-5)
        assert difference({n: p.grad for n, p in ours.named_parameters()}, gradients) < 1e-5


def losses(output):
    return [
        (r["step"], r["loss"], r["gradient_norm"])
        for r in read_metrics(Path(output))
        if "loss" in r
    ]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """An uninterrupted run."""
    config = run_settings(model, data, tmp_path_factory.mktemp("runs") / "whole")
    return config, finetune(config)


def test_padded_run_is_the_packed_one(model, data, tmp_path, whole):
    """Dropout included: the random numbers are drawn for sequences, not for tokens."""
    config = run_settings(model, data, tmp_path / "padded", padded="true")
    finetune(config)
    ours, theirs = losses(config.output), losses(whole[0].output)
    assert [step for step, *_ in ours] == list(range(1, 37))
    for our, their in zip(ours[:6], theirs[:6], strict=True):  # rounding has not grown yet
        assert our == pytest.approx(their, rel=1e-5)


def test_a_batch_beyond_the_budget_gives_the_same_step(sure_model, data, tmp_path):
    found = {}
    for max_tokens in (10_000, 40):
        output = tmp_path / str(max_tokens)
        finetune(run_settings(sure_model, data, output, epochs=1, max_tokens=max_tokens))
        found[max_tokens] = losses(output)
    for ours, theirs in zip(found[40][:6], found[10_000][:6], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_says_which_rows_are_left_out(model, tmp_path, capsys):
    folder = write_tsv(tmp_path / "data", "QQP")
    with open(folder / "train.tsv", "a") as file:
        file.write("5\t1\t2\tHow do\n\nI?\tWhat?\t1\n7\t8\n")
    finetune(run_settings(model, tmp_path / "data", tmp_path / "run", task="qqp", epochs=1))
    path = folder / "train.tsv"
    rows = "; ".join(f"{path}, row {row}" for row in (4, 5, 6))
    said = "".join(capsys.readouterr())
    assert f"4 rows of {path} do not have its columns and are left out: {rows}; …" in said
    assert "dev.tsv do not have" not in said


def test_what_a_run_leaves(whole, model, data):
    """The saved model predicts, one example at a time, with the score of the result."""
    config, result = whole
    output = Path(config.output)
    assert sorted(path.name for path in output.iterdir()) == [
        "config.yaml", "inputs.json", "metrics.jsonl", "model", "result.json",
    ]  # fmt: skip
    assert FinetuneResult(**json.loads((output / "result.json").read_text())) == result
    assert (result.task, result.stopped, result.step) == ("RTE", "epochs", 36)
    scores = [r for r in read_metrics(output) if "accuracy" in r]
    assert [r["step"] for r in scores] == list(range(1, 37))  # 12 batches an epoch: each step
    best = max(r["accuracy"] for r in scores)
    assert result.score == best == result.scores["accuracy"] > 0.9, "it did not learn"
    assert result.best_step == next(r["step"] for r in scores if r["accuracy"] == best)

    classifier = AutoModelForSequenceClassification.from_pretrained(output / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert classifier.config.id2label == {0: "entailment", 1: "not_entailment"}
    examples = read_examples(str(data), find_task("RTE"), "dev")
    with torch.no_grad():
        hits = [
            classifier(**tokenizer(*texts, return_tensors="pt")).logits.argmax().item() == label
            for texts, label in zip(examples.texts, examples.labels, strict=True)
        ]
    assert np.mean(hits) == result.score


def test_a_finished_run_does_nothing(whole):
    config, result = whole
    before = Path(config.output, "metrics.jsonl").read_bytes()
    assert finetune(config) == result
    assert Path(config.output, "metrics.jsonl").read_bytes() == before


def test_early_stopping():
    stopping = EarlyStopping(patience=3)
    assert [stopping.update(step, x) for step, x in enumerate([0.1, 0.3, 0.3, 0.2], 1)] == [
        True, True, False, False,
    ]  # fmt: skip
    assert (stopping.best, stopping.best_step, stopping.since) == (0.3, 2, 2)
    assert not stopping.exhausted
    assert stopping.update(5, 0.31) and stopping.since == 0
    for step in (6, 7, 8):
        assert not stopping.exhausted
        stopping.update(step, 0.1)
    assert stopping.exhausted and (stopping.best, stopping.best_step) == (0.31, 5)
    assert EarlyStopping(3).update(1, 0.0), "the first score is the best so far, whatever it is"


@pytest.mark.parametrize("batches, interval", [
    (24_544, 500), (5_000, 500), (4_999, 499), (312, 31), (19, 1), (9, 1),
])  # fmt: skip
def test_evaluation_interval(batches, interval):
    assert FinetuneConfig(task="mnli").evaluation_interval(batches) == interval


def test_a_run_without_progress_stops_early(model, data, tmp_path):
    """With a learning rate of 0 the first score stays the best."""
    config = run_settings(model, data, tmp_path / "run", lr=0, evaluations_per_epoch=6, patience=4)
    result = finetune(config)
    assert (result.stopped, result.best_step, result.step) == ("patience", 2, 2 * (1 + 4))
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    start = load_file(model / "model.safetensors")
    assert all(torch.equal(weights[name], start[name]) for name in weights if name in start)


def die(config, steps):
    torch.set_num_threads(1)
    Metrics.advance = after(steps, lambda: os.kill(os.getpid(), signal.SIGKILL))
    finetune(config)


def same_result(ours, theirs):
    ignored = {"seconds", "model"}
    return {k: v for k, v in vars(ours).items() if k not in ignored} == {
        k: v for k, v in vars(theirs).items() if k not in ignored
    }


def assert_same_run(ours, theirs):
    """Every loss and score, and the weights, bit for bit."""
    assert curve(ours) == curve(theirs)
    weights = [
        load_file(Path(each.output, "model", "model.safetensors")) for each in (ours, theirs)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_kill_9_and_resume(model, data, tmp_path, whole):
    config = run_settings(model, data, tmp_path / "broken")
    # At 3, before the first checkpoint, at 13, and from the checkpoint of 10 on at 28.
    for steps in (3, 13, 18):
        process = CONTEXT.Process(target=die, args=(config, steps))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    (saved,) = checkpoints(tmp_path / "broken")
    assert load_progress(saved)["step"] == 25
    assert same_result(finetune(config), whole[1])
    assert_same_run(config, whole[0])
    assert not (tmp_path / "broken" / "checkpoints").exists()


def test_sigterm_saves_and_it_goes_on(model, data, tmp_path, whole, monkeypatch):
    config = run_settings(model, data, tmp_path / "broken", save_every=1000)
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "advance", after(17, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        result = finetune(config)
    assert (result.stopped, result.signum, result.step) == ("signal", signal.SIGTERM, 17)
    assert not (tmp_path / "broken" / "result.json").exists()
    (saved,) = checkpoints(tmp_path / "broken")
    assert load_progress(saved)["step"] == 17
    assert same_result(finetune(config), whole[1])
    assert_same_run(config, whole[0])


def test_a_full_disk(model, data, tmp_path, whole):
    """The system refuses to write: files may not grow beyond 100 kB, as on a full disk."""
    config = run_settings(model, data, tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SaveError, match="step-00000005 could not be written"):
            finetune(config)
        with pytest.raises(SaveError, match=r"run.model could not be written"):
            finetune(run_settings(model, data, tmp_path / "run", save_every=1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").glob(".*"))
    assert same_result(finetune(config), whole[1])  # there is room again


def test_a_loss_that_is_not_finite(model, data, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"step 2: .*non-finite-step-2-process-0.pt"):
        finetune(run_settings(model, data, tmp_path / "run", lr="1e38"))
    kept = torch.load(tmp_path / "run" / "non-finite-step-2-process-0.pt", weights_only=True)
    assert set(kept[0]) == {"input_ids", "position_ids", "cu_seqlens", "max_seqlen", "labels"}
    assert sum(len(inputs["labels"]) for inputs in kept) == 8


def test_a_new_head_on_a_fine_tuned_model(whole):
    """The encoder and the layer before the last are taken over; the last one is new, even where the
    number of labels is the same."""
    folder = Path(whole[1].model)
    before = load_file(folder / "model.safetensors")
    for name, labels in (("MNLI", 3), ("STS-B", 1), ("QNLI", 2)):
        after = load_model(folder, find_task(name)).state_dict()
        assert after["classifier.weight"].shape[0] == labels
        assert after["classifier.bias"].eq(0).all() and before["classifier.bias"].ne(0).any()
        same = {n for n in before if before[n].shape == after[n].shape
                and torch.equal(before[n], after[n])}  # fmt: skip
        assert same == {n for n in before if not n.startswith("classifier.")}


def test_bfloat16_learns_too(model, data, tmp_path, whole):
    config = run_settings(model, data, tmp_path / "run", precision="bfloat16")
    assert finetune(config).score > 0.9
    ours, theirs = losses(config.output)[0], losses(whole[0].output)[0]
    assert ours == pytest.approx(theirs, rel=5e-2) and ours != theirs


def test_what_is_refused(model, data, tmp_path, whole):
    config, _ = whole
    changed = run_settings(model, data, config.output, seed=1, batch_size=4)
    with pytest.raises(ValueError, match=r"another configuration: seed was 0 and is 1; batch_size"):
        finetune(changed)
    with pytest.raises(FileNotFoundError, match="no data for CoLA"):
        finetune(run_settings(model, data, tmp_path / "run", task="cola"))
    folder = write_tsv(tmp_path, "RTE")
    (folder / "dev.tsv").write_text((folder / "dev.tsv").read_text() + "2\ta\tb\tmaybe\n")
    with pytest.raises(ValueError, match=r"dev.tsv, row 4: the label 'maybe'"):
        finetune(run_settings(model, tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    for override, error in {"epoch": "no key 'epoch'|epochs", "task": "no task 'rt'"}.items():
        with pytest.raises(ValueError, match=error):
            run_settings(model, data, tmp_path / "run", **{override: "rt"})
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        run_settings(model, data, tmp_path / "run", batch_size=0)
