"""The contrastive loop: exact restarts, any number of processes, and the folder it leaves."""

import dataclasses
import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from neobert import NeoBERTConfig, NeoBERTLMHead
from neobert.cli import app
from neobert.contrastive import contrastive
from neobert.contrastive_recipes import load_config
from neobert.encode import Encoder
from neobert.engine import NonFiniteLossError
from neobert.locate import checkpoints
from neobert.pairs import PairSource, prompts_of
from neobert.saving import SaveError, load_progress
from neobert.sentence_folder import read_sentence_folder
from tests.checkpoints import word_tokenizer
from tests.runs import curve, run, started, wait_for_step

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

SETTINGS = {
    "batch_size": 16,
    "hard_negatives": 1,
    "max_length": 24,
    "max_tokens": 100,  # several chunks a step
    "steps": 8,
    "warmup_steps": 2,
    "lr": "1e-3",
    # So that an update is a smooth function of the gradient: with 1e-8 the rounding of a gradient
    # near 0 decides about its sign.
    "eps": "1e-3",
    "log_every": 1,
    "save_every": 3,
    "tensorboard": "false",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A masked-LM checkpoint and its tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = word_tokenizer()
    config = NeoBERTConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=96, max_length=64, embedding_init_range=0.5, decoder_init_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    NeoBERTLMHead(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two data sets, one with hard negatives, which not every pair has; and one row too bad."""
    folder = tmp_path_factory.mktemp("pairs")
    nouns, words = ["cat", "dog", "mat", "tree"], ["red", "blue", "old", "new", "big"]
    with open(folder / "facts.jsonl", "w") as file:
        for n, (a, b, c) in enumerate((a, b, c) for a in nouns for b in nouns for c in words):
            negatives = [f"the {c} {b} ran under the {a}"] * (n % 3 > 0)
            query = f"a {c} {a} and a {b}" if n % 2 else f"a {a} and a {b}"  # which several have
            positive = f"the {a} was {c} and it sat on the {b}"
            row = {"query": query, "positive": positive, "negatives": negatives}
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"query": " ", "positive": "x", "negatives": []}) + "\n")
    with open(folder / "alike.csv", "w") as file:
        file.writelines(f"the {c} {a},a very {c} {a},{len(c)}\n" for a in nouns for c in words)
    facts = {"path": f"{folder}/facts.jsonl", "negatives": ["negatives"], "instruction": "the old"}
    alike = {
        "path": f"{folder}/alike.csv", "columns": ["query", "positive", "score"], "min_score": 3,
        "score": "score", "instruction": "it was", "symmetric": True,
    }  # fmt: skip
    return json.dumps([facts, alike])


@pytest.fixture
def settings(start, sources, tmp_path):
    def make(name, **changes):
        values = {"output": tmp_path / name, "start_from": start, "data": sources}
        values |= SETTINGS | changes
        return load_config("tiny", None, [f"{key}={value}" for key, value in values.items()])

    return make


def test_it_learns_and_leaves_a_sentence_transformers_folder(settings):
    """Loadable there and by `Encoder`, with the same embeddings and prompts."""
    from sentence_transformers import SentenceTransformer

    config = settings("run", steps=30, save_every=20)
    result = contrastive(config)
    records = [dict(record) for record in curve(config)]
    assert np.mean([r["loss"] for r in records[-5:]]) < 0.5 * records[0]["loss"]
    assert {"loss/facts", "loss/alike"} <= {name for record in records for name in record}
    assert records[-1]["masked_negatives"] > 0
    assert result.step == 30 and result.accuracy > 0.5
    assert any("row 81" in line and "empty" in line for line in result.left_out)
    assert (result.model.parent / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {"optimizer.pt", "progress.json"} & set(os.listdir(result.model)) == set()
    with pytest.raises(ValueError, match=r"lacks 2 of the tensors of NeoBERTLMHead: decoder"):
        NeoBERTLMHead.from_pretrained(result.model)

    texts = ["a red cat", "the old dog sat on a mat and it was not very big", "tree " * 40, ""]
    for folder in (result.model, result.checkpoint):
        theirs = SentenceTransformer(str(folder), device="cpu")
        ours = Encoder.from_pretrained(folder, device="cpu")
        assert theirs.max_seq_length == config.max_length
        assert theirs.prompts["facts"] == "the old " and theirs.prompts["alike"] == "it was "
        assert read_sentence_folder(folder).prompts == {"facts": "the old ", "alike": "it was "}
        for name in ("facts", "alike"):
            expected = theirs.encode(texts, prompt_name=name)
            with pytest.warns(UserWarning, match="truncated"):
                found = ours.encode(texts, prompt=theirs.prompts[name], max_length=24)
            np.testing.assert_allclose(found, expected, atol=1e-5)
        plain = theirs.encode(texts)
        assert np.abs(plain - expected).max() > 0.01  # the prompt is not nothing


def test_a_finished_run_again(settings):
    config = settings("run", steps=4)
    first = contrastive(config)
    again = contrastive(config)
    assert (again.step, again.loss, again.accuracy) == (4, first.loss, first.accuracy)
    with pytest.raises(ValueError, match=r"steps=3, but .*step-00000004 is of step 4"):
        contrastive(dataclasses.replace(config, steps=3))


@pytest.mark.parametrize("sources, expected", [
    ([PairSource("a.csv", instruction="Do.")], {"a": "Do. ", "query": "Do. ", "document": ""}),
    ([PairSource("a.csv", instruction="Do.", symmetric=True)],
     {"a": "Do. ", "query": "Do. ", "document": "Do. "}),
    ([PairSource("a.csv", instruction="Do."),
      PairSource("b.csv", instruction="Do.", symmetric=True)],
     {"a": "Do. ", "b": "Do. ", "query": "Do. "}),
    ([PairSource("a.csv"), PairSource("x/b.jsonl.gz")],
     {"a": "", "b": "", "query": "", "document": ""}),
    ([PairSource("a.csv", "one", instruction="Do."), PairSource("a.csv", "two")],
     {"one": "Do. ", "two": "", "document": ""}),
])  # fmt: skip
def test_prompts(sources, expected):
    assert prompts_of(sources) == expected


def last_weights(folder):
    return load_file(checkpoints(folder)[-1] / "model.safetensors")


def assert_same_run(ours, theirs, rel):
    for record, other in zip(curve(ours), curve(theirs), strict=True):
        record, other = dict(record), dict(other)
        for name in ("step", "loss", "gradient_norm", "accuracy", "masked_negatives", "tokens"):
            assert record[name] == pytest.approx(other[name], rel=rel), record


def test_one_process_and_two_are_the_same(settings, tmp_path):
    """And the number of chunks does not matter: the same losses and weights within rounding."""
    one = settings("one")
    run(one)
    others = [(settings("two"), 2), (settings("whole", max_tokens=10_000), 1),
              (settings("single", max_tokens=1), 2)]  # fmt: skip
    expected = last_weights(tmp_path / "one")
    for other, processes in others:
        run(other, processes)
        assert_same_run(other, one, rel=1e-5)
        for name, weight in last_weights(Path(other.output)).items():
            assert (weight - expected[name]).abs().max() < 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_and_resume(settings, tmp_path, processes):
    """The curve and the last weights are the uninterrupted run's, bit for bit."""
    whole, broken = settings("whole", steps=12), settings("broken", steps=12)
    run(whole, processes)
    for step in (2, 5, 8)[: 4 - processes]:  # before the first checkpoint, and between others
        with started(broken, processes) as running:
            wait_for_step(broken, step, running)
            for process in running:
                os.kill(process.pid, signal.SIGKILL)
    left = [load_progress(each)["step"] for each in checkpoints(tmp_path / "broken")]
    assert left and left[-1] < 12
    run(broken, processes)
    assert curve(broken) == curve(whole) and len(curve(whole)) == 12
    weights = [last_weights(tmp_path / name) for name in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not list((tmp_path / "broken").rglob(".*unfinished"))


def test_sigterm_saves(settings, tmp_path):
    config = settings("run", steps=400, save_every=1000)
    with started(config, 2) as running:
        wait_for_step(config, 4, running)
        os.kill(running[1].pid, signal.SIGTERM)  # one process is told, and both stop
        for process in running:
            process.join(60)
        assert [process.exitcode for process in running] == [128 + signal.SIGTERM] * 2
    (saved,) = checkpoints(tmp_path / "run")
    assert 4 <= load_progress(saved)["step"] < 400
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_that_is_not_finite(settings, tmp_path):
    config = settings("run", lr="1e38", warmup_steps=0, eps="1e-8")
    with pytest.raises(NonFiniteLossError, match=r"step 2: loss nan.*non-finite-step-2.json"):
        contrastive(config)
    kept = json.loads((tmp_path / "run" / "non-finite-step-2.json").read_text())
    assert kept["data"] in ("facts", "alike")
    assert len(kept["queries"]) == len(kept["positives"]) == len(kept["negatives"]) == 16


def test_a_full_disk(settings, tmp_path):
    """Files may not grow beyond 100 kB; then there is room again."""
    config = settings("run", steps=3)
    contrastive(config)
    (good,) = checkpoints(tmp_path / "run")
    config = dataclasses.replace(config, steps=6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SaveError, match=f"the last good checkpoint is .*{good.name}"):
            contrastive(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints(tmp_path / "run") == [good]
    assert contrastive(config).step == 6


def test_a_model_that_cannot_be_written(settings, tmp_path, monkeypatch):
    """The checkpoint is there, and the next call finishes."""

    def full(source, target, **options):
        (target / "half").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("neobert.saving.shutil.copytree", full)
        with pytest.raises(SaveError, match=r"run/model could not be written .*step-00000002"):
            contrastive(settings("run", steps=2))
    assert not list((tmp_path / "run").glob(".model*"))
    assert contrastive(settings("run", steps=2)).model == tmp_path / "run" / "model"
    assert Encoder.from_pretrained(tmp_path / "run" / "model").dim == 64


@pytest.mark.parametrize("changes, error", [
    ({"temperature": 0}, "temperature must be positive, got 0"),
    ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"save_every": 0}, "save_every must be at least 1, got 0"),
    ({"precision": "float16"}, "precision must be one of float32, bfloat16, got 'float16'"),
    ({"temprature": 1}, "temprature.*[Dd]id you mean:? 'temperature'"),
    ({"data.0.instructoin": "x"}, "instructoin.*[Dd]id you mean:? 'instruction'"),
    ({"data": "[{path: a.csv}, {path: b/a.csv}]"}, "two data sets have the name 'a'"),
    ({"data": "[]"}, "data names no source"),
    ({"data.0.query": "qery"}, "facts.jsonl has no column 'qery' .query of facts.; did you mean "
     "'query'"),
    ({"batch_size": 64}, "alike has 20 usable pairs, fewer than batch_size=64"),
    ({"max_length": 65}, "max_length=65 is beyond the 64 tokens of the model"),
])  # fmt: skip
def test_what_is_refused(settings, changes, error):
    with pytest.raises(ValueError, match=error):
        contrastive(settings("run", **changes))


def test_a_run_that_is_continued_with_other_settings(settings):
    contrastive(settings("run", steps=1))
    with pytest.raises(ValueError, match=r"another configuration: temperature was 0.07 and is 0.1"):
        contrastive(settings("run", steps=2, temperature=0.1))
    assert contrastive(settings("run", steps=2, max_tokens=50)).step == 2


def test_the_command(settings, tmp_path):
    config = settings("run")
    given = [f"data={json.dumps([dataclasses.asdict(each) for each in config.data])}"]
    given += [f"{key}={value}" for key, value in SETTINGS.items()]
    command = ["contrastive", "--preset", "tiny", "--start-from", config.start_from, "--output",
               config.output, *given, "steps=2"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "facts: 80 pairs of 81 rows, left out: 1 where the query or the" in result.output
    last = result.output.splitlines()[-1]
    assert last.startswith("step 2: loss ") and last.endswith(f"model {config.output}/model")
    shown = CliRunner().invoke(app, [*command, "--show"])
    (tmp_path / "shown.yaml").write_text(shown.output)
    assert load_config(None, tmp_path / "shown.yaml").data == config.data
    two = ["--data", "a.csv", "--data", "b/c.jsonl", "--show"]
    shown = CliRunner().invoke(app, ["contrastive", "--preset", "tiny", *two])
    (tmp_path / "shown.yaml").write_text(shown.output)
    assert load_config(None, tmp_path / "shown.yaml").data == [
        PairSource("a.csv"),
        PairSource("b/c.jsonl"),
    ]
    wrong = CliRunner().invoke(app, [*command, "stepps=3"])
    assert wrong.exit_code == 1 and "'steps'" in wrong.output and "Traceback" not in wrong.output
    missing = CliRunner().invoke(app, ["contrastive", "--output", "x"])
    assert missing.exit_code == 1 and "missing mandatory value: start_from" in missing.output
