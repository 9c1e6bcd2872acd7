"""Scores in the layout of the paper's Table 4: seven types of task, and the average.

A type's column is the mean of its tasks' main scores; the average is over tasks, each as heavy as
the next, and not over types: of NeoBERT's row, 2874.1 / 56 = 51.3, where the mean of its seven
columns is 52.4.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import mteb
from mteb.abstasks import AbsTask
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult

COLUMNS = {
    "Classification": "Class.",
    "Clustering": "Clust.",
    "PairClassification": "PairClass.",
    "Reranking": "Rerank.",
    "Retrieval": "Retriev.",
    "STS": "STS",
    "Summarization": "Summ.",
}


def summary(
    model: ModelMeta, results: list[tuple[AbsTask, TaskResult]], benchmark: str
) -> dict[str, Any]:
    """Everything the table says, and each task's score; scores are in percent.

    results: tasks with their results, at least one.
    benchmark: its name; `missing` are its tasks that `results` lacks, `others` the reverse.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task, result in results:
        tasks[task.metadata.name] = {
            "type": task.metadata.type,
            "metric": task.metadata.main_score,
            "score": round(100 * float(result.get_score()), 4),  # as exact as mteb's cache
        }
    types: dict[str, list[float]] = {}
    for figures in tasks.values():
        types.setdefault(figures["type"], []).append(figures["score"])
    expected = {task.metadata.name for task in mteb.get_benchmark(benchmark).tasks}
    return {
        "model": model.model_name_with_experiment,
        "revision": model.revision,
        "mteb": version("mteb"),
        "benchmark": benchmark,
        "types": {
            name: {"tasks": len(types[name]), "score": fmean(types[name])}
            for name in [*COLUMNS, *sorted(types.keys() - COLUMNS.keys())]
            if name in types
        },
        "average": {
            "tasks": len(tasks),
            "score": fmean(figures["score"] for figures in tasks.values()),
        },
        "tasks": dict(sorted(tasks.items())),
        "missing": sorted(expected - tasks.keys()),
        "others": sorted(tasks.keys() - expected),
    }


def markdown(summary: dict[str, Any]) -> str:
    """The table's header and the model's row, a dash for a type without a result; below it, where
    they are not the benchmark's, of which tasks the figures are."""
    types = summary["types"]
    titles, cells = [], []
    for name in [*COLUMNS, *(name for name in types if name not in COLUMNS)]:
        tasks = f", {types[name]['tasks']} tasks" if name in types else ""
        titles.append(COLUMNS.get(name, name) + tasks)
        cells.append(f"{types[name]['score']:.1f}" if name in types else "-")
    lines = [
        "| Model | " + " | ".join(titles) + " | Avg. |",
        "|---" * (len(titles) + 2) + "|",
        f"| {summary['model']} | {' | '.join(cells)} | {summary['average']['score']:.1f} |",
    ]
    missing, others = len(summary["missing"]), len(summary["others"])
    if missing or others:
        done = summary["average"]["tasks"] - others
        of_benchmark = f"{done} of the {done + missing} tasks of {summary['benchmark']}"
        lines += ["", f"{of_benchmark}, and {others} others."]
    return "\n".join(lines)


def write(folder: Path, model: ModelMeta, summary: dict[str, Any]) -> Path:
    """Writes the table as .md and everything as .json beside it; returns the path of the former."""
    name = f"{model.model_name_as_path()}-{str(model.revision)[:8]}"
    if model.experiment_name:
        name += f"-{model.experiment_name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    path = folder / f"{name}.md"
    path.write_text(markdown(summary) + "\n", encoding="utf-8")
    return path
