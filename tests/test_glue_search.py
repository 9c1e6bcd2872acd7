"""GLUE as a whole: the search and its resumption, MNLI transfer, Table 3's row, the command."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from neobert.cli import app
from neobert.glue_recipes import TABLE_6, FinetuneConfig, GlueConfig, Grid
from neobert.glue_search import PAPER, GlueResult, glue, start, table
from neobert.glue_tasks import TASKS
from neobert.metrics import Metrics
from neobert.settings import load
from tests.glue_files import SETTINGS, after, glue_settings, write_learnable, write_model

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

SEARCH = {
    "search": "true", "epochs": 1, "tasks": "[rte, MNLI]", "grid__batch_size": "[8]",
    "grid__lr": "[1e-5, 3e-3, 2e-5]", "grid__weight_decay": "[0.01]",
}  # fmt: skip
RUNS = [f"batch-8_lr-{lr}_decay-0.01" for lr in ("1e-05", "0.003", "2e-05")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_learnable(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def searched(model, data, tmp_path_factory):
    config = glue_settings(model, data, tmp_path_factory.mktemp("searches") / "whole", **SEARCH)
    return config, glue(config)


def results(output):
    """result.json of every run, but for its directory and its duration."""
    found = {}
    for path in sorted(Path(output).glob("*/*/result.json")):
        record = json.loads(path.read_text())
        found["/".join(path.parts[-3:-1])] = record | {"seconds": 0, "model": ""}
    return found


def test_the_best_of_the_grid(searched):
    config, result = searched
    output = Path(config.output)
    scores = {name: record["score"] for name, record in results(output).items()}
    assert sorted(scores) == sorted(f"{task}/{run}" for task in ("MNLI", "RTE") for run in RUNS)
    assert list(result.runs) == ["MNLI", "RTE"] and result.signum is None
    for task, best in result.runs.items():
        assert best["score"] == max(scores[f"{task}/{run}"] for run in RUNS)
        first = next(run for run in RUNS if scores[f"{task}/{run}"] == best["score"])
        assert best["run"] == first
        assert [run for run in RUNS if (output / task / run / "model").exists()] == [first]
        assert json.loads((output / task / "best.json").read_text()) == best
    mnli = result.runs["MNLI"]
    assert mnli["score"] == pytest.approx(
        (mnli["scores"]["accuracy_matched"] + mnli["scores"]["accuracy_mismatched"]) / 2
    )
    assert (mnli["lr"], mnli["batch_size"], mnli["weight_decay"]) == (3e-3, 8, 0.01)


def test_rte_starts_from_the_best_mnli_run(searched, model):
    output = Path(searched[0].output)
    starts = {task: [] for task in ("MNLI", "RTE")}
    for task, run in itertools.product(starts, RUNS):
        saved = yaml.safe_load((output / task / run / "config.yaml").read_text())
        starts[task].append((saved["model"], saved["evaluation"]))
    best = searched[1].runs["MNLI"]["run"]
    assert set(starts["MNLI"]) == {(str(model), None)}
    assert set(starts["RTE"]) == {(f"MNLI/{best}/model", str(output))}
    settings = FinetuneConfig(model=f"MNLI/{best}/model", evaluation=str(output))
    assert settings.checkpoint == searched[1].runs["MNLI"]["model"]


def test_a_stopped_search_goes_on_where_it_was(searched, model, data, tmp_path, monkeypatch):
    config = glue_settings(model, data, tmp_path / "broken", **SEARCH)
    calls = []
    advance = Metrics.advance
    monkeypatch.setattr(
        Metrics, "advance", lambda self, loss: (calls.append(1), advance(self, loss))
    )
    with monkeypatch.context() as patch:  # in the fifth of the second run's twelve steps
        patch.setattr(Metrics, "advance", after(17, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert glue(config).signum == signal.SIGTERM
    assert list(results(tmp_path / "broken")) == [f"MNLI/{RUNS[0]}"]
    assert not (tmp_path / "broken" / "MNLI" / "best.json").exists(), "not before all are done"
    result = glue(config)
    assert len(calls) == 6 * 12, "every step is taken once"
    assert results(tmp_path / "broken") == results(searched[0].output)
    assert {task: run["run"] for task, run in result.runs.items()} == {
        task: run["run"] for task, run in searched[1].runs.items()
    }
    assert glue(config).runs == result.runs and len(calls) == 6 * 12, "nothing is left to do"
    for task in result.runs:
        kept = list((tmp_path / "broken" / task).glob("*/model"))
        assert [path.parent.name for path in kept] == [result.runs[task]["run"]]


def test_a_moved_evaluation_goes_on(searched, model, data, tmp_path, monkeypatch):
    first = Path(shutil.copytree(searched[0].output, tmp_path / "first"))
    shutil.rmtree(first / "RTE")
    with monkeypatch.context() as patch:  # within RTE's second run
        patch.setattr(Metrics, "advance", after(17, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert glue(glue_settings(model, data, first, **SEARCH)).signum == signal.SIGTERM
    first.rename(tmp_path / "second")
    result = glue(glue_settings(model, data, tmp_path / "second", **SEARCH))
    assert results(tmp_path / "second") == results(searched[0].output)
    monkeypatch.chdir(tmp_path)  # by another path, everything is found finished
    again = glue(glue_settings(model, data, Path("second"), **SEARCH))
    for task, run in result.runs.items():
        folder = f"second/{task}/{run['run']}/model"
        assert (run["model"], again.runs[task]["model"]) == (str(tmp_path / folder), folder)
        assert Path(folder, "config.json").exists()


def test_results_of_a_model_or_of_data_that_have_changed_are_refused(
    searched, model, data, tmp_path
):
    """The paths are the same. Even where only tasks are asked for that the change does not reach,
    the row would be of two models."""
    output = shutil.copytree(searched[0].output, tmp_path / "copy")
    mine, texts = (shutil.copytree(each, tmp_path / each.name) for each in (model, data))
    for file in output.rglob("config.yaml"):
        text = file.read_text().replace(str(model), str(mine)).replace(str(data), str(texts))
        file.write_text(text)
    config = glue_settings(mine, texts, output, **SEARCH)
    assert glue(config).runs.keys() == searched[1].runs.keys()

    changed = texts / "rte" / "validation.jsonl"
    before = changed.read_bytes()
    changed.write_bytes(before.replace(b"red", b"old"))
    glue(dataclasses.replace(config, tasks=["MNLI"]))
    with pytest.raises(ValueError, match=rf"RTE/{RUNS[0]} holds a run of another data: the files"):
        glue(config)
    changed.write_bytes(before)
    glue(config)

    weights = load_file(mine / "model.safetensors")
    weights["model.encoder.weight"] *= 2
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    for tasks in (["MNLI"], ["RTE"]):
        with pytest.raises(ValueError, match="copy holds a run of another model: the files have"):
            glue(dataclasses.replace(config, tasks=tasks))
    shutil.rmtree(mine)  # a model that is no longer there cannot have changed
    assert glue(config).runs.keys() == searched[1].runs.keys()


def test_a_run_on_mnli_that_is_made_anew_is_another_start(searched, model, data, tmp_path):
    output = shutil.copytree(searched[0].output, tmp_path / "copy")
    start = output / "MNLI" / searched[1].runs["MNLI"]["run"] / "model" / "model.safetensors"
    weights = load_file(start)
    save_file({name: w + 1 for name, w in weights.items()}, start, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"RTE/{RUNS[0]} holds a run of another model"):
        glue(glue_settings(model, data, output, **SEARCH))


def test_a_part_of_the_grid_keeps_a_better_best(searched, model, data, tmp_path):
    output = shutil.copytree(searched[0].output, tmp_path / "copy")
    before = searched[1].runs["MNLI"]
    worse = next(run for run in RUNS if run != before["run"])
    part = SEARCH | {"tasks": "[MNLI]", "grid__lr": f"[{worse.split('_')[1][3:]}]"}
    kept = Path(output, "MNLI", before["run"], "model")
    best = glue(glue_settings(model, data, output, **part)).runs["MNLI"]
    assert best == before | {"model": str(kept)} and kept.exists()


def test_an_output_is_of_one_model(searched, data, tmp_path):
    output = shutil.copytree(searched[0].output, tmp_path / "copy")
    other = write_model(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another configuration: model was"):
        glue(glue_settings(other, data, output, **SEARCH))


def test_a_run_that_diverges_does_not_end_a_search(model, data, tmp_path):
    settings = SEARCH | {"tasks": "[rte]", "transfer": "false", "grid__lr": "[1e38, 1e-3]"}
    result = glue(glue_settings(model, data, tmp_path / "search", **settings))
    assert result.runs["RTE"]["lr"] == 1e-3
    (lost,) = (tmp_path / "search" / "RTE").glob("batch-8_lr-1e+38*/result.json")
    record = json.loads(lost.read_text())
    assert record["score"] is None and "step 2: loss nan" in record["error"]
    settings["grid__lr"] = "[1e38]"
    with pytest.raises(ValueError, match=r"no run on RTE has a score: see result.json"):
        glue(glue_settings(model, data, tmp_path / "lost", **settings))


def test_without_a_search_a_task_has_table_6s_settings():
    config = load(GlueConfig, {}, overrides=["output=x", "tasks=[cola, stsb]", "seed=3"])
    assert config.tasks == ["CoLA", "STS-B"]
    (point,) = config.points("CoLA")
    assert point == {"batch_size": 8, "lr": 8e-6, "weight_decay": 1e-5}
    run = config.run("CoLA", {"model": "m"}, Path("r"), point)
    assert (run.task, run.model, run.output, run.lr, run.seed) == ("CoLA", "m", "r", 8e-6, 3)
    assert (run.epochs, run.patience, run.evaluation_interval(10_000)) == (10, 15, 500)
    config = load(GlueConfig, {}, overrides=["output=x", "lr=1e-4"])
    assert config.points("MNLI") == [{"batch_size": 16, "lr": 1e-4, "weight_decay": 1e-5}]
    assert set(TABLE_6) == {task.name for task in TASKS.values()} == set(config.tasks)


def test_the_papers_grid():
    config = load(GlueConfig, {}, overrides=["output=x", "search=true"])
    points = [tuple(point.values()) for point in config.points("RTE")]
    assert len(points) == len(set(points)) == 60
    assert set(TABLE_6.values()) <= set(points), "the best of the paper's runs are in it"


@pytest.mark.parametrize("override, error", [
    ("grid.lrs=[1]", "no key 'lrs'|Did you mean.*'lr'"),
    ("grid.lr=[]", "grid.lr has no values"),
    ("tasks=[rte, wnli]", "there is no task 'wnli'"),
    ("tasks=[]", "tasks names none"),
    ("patience=0", "patience must be at least 1, got 0"),
    ("precision=float16", "precision must be one of float32, bfloat16, got 'float16'"),
])  # fmt: skip
def test_what_is_refused(override, error):
    with pytest.raises(ValueError, match=error):
        load(GlueConfig, {}, overrides=["output=x", override])


def test_a_search_has_no_settings_of_its_own_beside_the_grid():
    with pytest.raises(ValueError, match="lr: a search takes the values in grid"):
        load(GlueConfig, {}, overrides=["output=x", "search=true", "lr=1e-3"])


def test_transfer_needs_mnli(tmp_path):
    config = load(GlueConfig, {}, overrides=[f"output={tmp_path}", "model=m"])
    with pytest.raises(ValueError, match=r"RTE starts from the best run on MNLI, and .* has none"):
        start(config, "RTE")
    assert start(config, "CoLA") == {"model": "m"}
    assert start(dataclasses.replace(config, transfer=False), "RTE") == {"model": "m"}


def test_the_row_of_table_3():
    values = PAPER["NeoBERT 4096 (paper)"]
    result = GlueResult(
        {task.name: {"score": x / 100} for task, x in zip(TASKS.values(), values, strict=True)}
    )
    lines = table("mine", result).splitlines()
    assert lines[0] == "| Model | MNLI | QNLI | QQP | RTE | SST-2 | MRPC | CoLA | STS-B | Avg. |"
    assert lines[2] == "| mine | 89.0 | 93.7 | 90.7 | 91.3 | 95.6 | 93.4 | 66.2 | 91.8 | 89.0 |"
    assert lines[2].replace("mine", "NeoBERT 4096 (paper)") == lines[4]
    assert lines[3].endswith("| 88.8 |")
    del result.runs["QQP"]
    assert table("mine", result).splitlines()[2].count(" - |") == 2 and result.average is None


def invoke(*arguments):
    result = CliRunner().invoke(app, ["eval", "glue", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command(model, data, tmp_path):
    given = ["--model", model, "--data", data, "--tasks", "rte", "--output", tmp_path / "out"]
    small = [f"{name}={value}" for name, value in SETTINGS.items()] + ["epochs=1", "batch_size=8"]
    code, said = invoke(*given, *small)
    assert code == 1 and "add MNLI to tasks, or set transfer=false" in said
    code, said = invoke(*given, *small, "transfer=false")
    assert code == 0, said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    row = f"| {model} | - | - | - | {100 * results['tasks']['RTE']['score']:.1f} | - |"
    assert row in said and row in (tmp_path / "out" / "results.md").read_text()
    code, said = invoke(*given, *small, "transfer=false", "seed=4")
    assert code == 1 and "seed was 0 and is 4" in said
    code, said = invoke("--tasks", "rte,colla", "--output", "x")
    assert code == 1 and "no task 'colla'; did you mean 'cola'" in said
    missing = tmp_path / "missing"
    code, said = invoke("--model", missing, *given[2:-1], tmp_path / "new", "transfer=false")
    assert code == 1 and str(missing) in said.splitlines()[-1]
    code, said = invoke("--output", "x", "epoch=3")
    assert code == 1 and "epoch" in said and "Did you mean" in said, said


def test_show_prints_what_config_reads(tmp_path):
    code, said = invoke("--output", "x", "--tasks", "rte", "--search", "--show", "grid.lr=[1e-3]")
    assert code == 0, said
    (tmp_path / "shown.yaml").write_text(said)
    shown = load(GlueConfig, {}, file=tmp_path / "shown.yaml")
    assert shown.search and shown.grid == Grid(lr=[1e-3])
    assert OmegaConf.to_yaml(OmegaConf.structured(shown)) == said
