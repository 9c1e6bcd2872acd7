"""GLUE as a whole: its tasks in order, a grid searched or one run each, and Table 3's row.

    output/RTE/batch-8_lr-5e-06_decay-0.01/    a run, as `finetune` leaves it
    output/config.yaml, inputs.json            what it was begun with: settings, the model's files
    output/RTE/best.json                       when all are done: the best, by development score
    output/results.json, results.md            the row of Table 3

Started again it goes on: finished runs are read, the interrupted one continues from its checkpoint.
Of all runs on a task only the best keeps its weights. Processes may share an output if each has
tasks of its own, or a part of the grid: with the whole grid a last one compares what they did. With
transfer, MNLI's whole grid must be compared so before another task begins. An output is of one
model: it holds the settings it was begun with, and refuses others, as it does weights and data that
have changed since. It may be moved.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from neobert.digests import check_same_inputs, checkpoint_digest, note_inputs
from neobert.engine import CONFIG, NonFiniteLossError
from neobert.glue import INPUTS, MAY_CHANGE, MODEL, RESULT, FinetuneResult, finetune
from neobert.glue_recipes import FinetuneConfig, GlueConfig
from neobert.glue_tasks import TASKS
from neobert.saving import write_json
from neobert.settings import check_same_run, save_config

BEST, RESULTS, TABLE = "best.json", "results.json", "results.md"
TRANSFER_FROM, TRANSFER_TO = "MNLI", ("RTE", "STS-B", "MRPC", "QNLI")

NAMES = [task.name for task in TASKS.values()]

# NeoBERT's rows of the paper's Table 3: percent, in the order of TASKS.
PAPER = {
    "NeoBERT 1024 (paper)": (88.9, 93.9, 90.7, 91.0, 95.8, 93.4, 64.8, 92.1),
    "NeoBERT 4096 (paper)": (89.0, 93.7, 90.7, 91.3, 95.6, 93.4, 66.2, 91.8),
}


# What an evaluation may go on with other values of: which runs there are, and not what a run is.
GLUE_MAY_CHANGE = MAY_CHANGE | {"tasks", "search", "grid", "transfer", "batch_size", "lr",
                                "weight_decay"}  # fmt: skip


@dataclass
class GlueResult:
    """runs: by task, what best.json says of its best run: "run", the name of its directory, the
    grid point and the fields of `FinetuneResult`. signum: of the signal that ended the evaluation.
    """

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    signum: int | None = None

    @property
    def average(self) -> float | None:
        """Of all eight scores, as in Table 3; None while one is missing."""
        if len(self.runs) < len(NAMES):
            return None
        return fmean(run["score"] for run in self.runs.values())


def glue(config: GlueConfig) -> GlueResult:
    """Fine-tune on `config.tasks`, MNLI first; the best runs of all tasks in `config.output`.

    Raises what `finetune` does, and ValueError if a task's MNLI checkpoint is missing or if none of
    a search's runs has a score.
    """
    output, signum = Path(config.output), None
    inputs = {"model": checkpoint_digest(config.model)}
    if (output / CONFIG).exists():
        check_same_run(output / CONFIG, config, GLUE_MAY_CHANGE)
        check_same_inputs(output / INPUTS, inputs)
    else:
        output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / CONFIG)
    # MNLI is the first of the table, too, and others start from it.
    for task in [name for name in NAMES if name in config.tasks]:
        signum = run_task(config, task, start(config, task))
        if signum:
            break
        note_inputs(output / INPUTS, inputs)
        write_results(output, config.model)
    return GlueResult(best_runs(output), signum)


def start(config: GlueConfig, task: str) -> dict[str, str]:
    """The checkpoint that the runs on a task start from, as settings of a `FinetuneConfig`."""
    if not config.transfer or task not in TRANSFER_TO:
        return {"model": config.model}
    folder = Path(config.output) / TRANSFER_FROM
    if not (folder / BEST).exists():
        raise ValueError(
            f"{task} starts from the best run on {TRANSFER_FROM}, and {folder} has none: add "
            f"{TRANSFER_FROM} to tasks, or set transfer=false"
        )
    best = best_runs(Path(config.output))[TRANSFER_FROM]["run"]
    return {"model": f"{TRANSFER_FROM}/{best}/{MODEL}", "evaluation": config.output}


def run_task(config: GlueConfig, task: str, origin: dict[str, str]) -> int | None:
    """All runs on a task from the checkpoint `origin`, and best.json of the best, of equal ones the
    first; or a signal's number if one came."""
    folder = Path(config.output) / task
    points = config.points(task)
    best: dict[str, Any] | None = best_runs(Path(config.output)).get(task)
    if best and best["run"] in map(run_name, points):
        best = None  # it is compared below, in its place
    for point in points:
        name = run_name(point)
        run = config.run(task, origin, folder / name, point)
        result = finetune_or_note(run) if config.search else finetune(run)
        if result.signum:
            return result.signum
        worse = name
        if result.score is not None and (best is None or result.score > best["score"]):
            worse = best["run"] if best else ""
            best = {"run": name, **point, **asdict(result)}
        if worse:
            shutil.rmtree(folder / worse / MODEL, ignore_errors=True)
    if best is None:
        raise ValueError(f"no run on {task} has a score: see {RESULT} of the runs in {folder}")
    write_json(folder / BEST, best)
    return None


def run_name(point: dict[str, Any]) -> str:
    return "batch-{batch_size}_lr-{lr:g}_decay-{weight_decay:g}".format(**point)


def finetune_or_note(run: FinetuneConfig) -> FinetuneResult:
    """A run whose loss is not finite has no score, which is no reason to end a search."""
    try:
        return finetune(run)
    except NonFiniteLossError as error:
        result = FinetuneResult(run.task, stopped="non-finite loss", error=str(error))
        write_json(Path(run.output) / RESULT, asdict(result))
        return finetune(run)


def best_runs(output: Path) -> dict[str, dict[str, Any]]:
    """What best.json says of each task that has one, with its model where `output` is now."""
    found = {}
    for name in NAMES:
        if (file := output / name / BEST).exists():
            found[name] = json.loads(file.read_text())
            found[name]["model"] = str(file.parent / found[name]["run"] / MODEL)
    return found


def write_results(output: Path, model: str) -> None:
    result = GlueResult(best_runs(output))
    row = {"model": model, "average": result.average, "tasks": result.runs}
    write_json(output / RESULTS, row)
    (output / TABLE).write_text(table(model, result))


def table(model: str, result: GlueResult) -> str:
    """Table 3's row of `model` in Markdown, in percent, above the paper's rows of NeoBERT."""
    ours = [result.runs[name]["score"] if name in result.runs else None for name in NAMES]
    rows = {model: [None if value is None else 100 * value for value in [*ours, result.average]]}
    rows |= {name: [*values, fmean(values)] for name, values in PAPER.items()}
    lines = [["Model", *NAMES, "Avg."], ["---", *["---:"] * (len(NAMES) + 1)]]
    for name, values in rows.items():
        lines.append([name, *("-" if value is None else f"{value:.1f}" for value in values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
