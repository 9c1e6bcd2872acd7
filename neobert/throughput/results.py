"""The results file: one document for a machine, which the parts of several runs make up.

    {"machine": …, "throughput": {dtype: {contestant: {"attention": …, "cells": {workload: …}}}}}

A cell has figures, or {"not_run": why}; each carries the commit, the day and the time budget.
"""

import copy
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

from neobert.machine import commit, machine_name

Figures = dict[str, Any]
TIME_BUDGET = "time budget"  # why a cell was not run that a longer run may fill


def part_of_document(
    here: Figures, dtype: str, contestant: str, figures: Figures, budget: float
) -> Figures:
    """The part of a results file that one contestant's run is."""
    stamp = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "budget_s": budget,
    }
    cells = {w: _summary(cell) | stamp for w, cell in figures["cells"].items()}
    return {"machine": here, "throughput": {dtype: {contestant: figures | {"cells": cells}}}}


def _summary(cell: Figures) -> Figures:
    """A cell with the spread of its steps instead of each one's seconds."""
    if "step_s" not in cell:
        return cell
    taken = cell["step_s"]
    spread = {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}
    return cell | {"step_s": spread}


def merge(document: Figures | None, part: Figures) -> Figures:
    """`part` over an earlier document: cell by cell, so that a table may take several runs.

    A cell that a later run did not get to does not replace one with figures.
    """
    merged = copy.deepcopy(document or {"throughput": {}}) | {"machine": part["machine"]}
    for dtype, rows in part["throughput"].items():
        for name, row in rows.items():
            old = merged["throughput"].setdefault(dtype, {}).setdefault(name, {"cells": {}})
            cells = old["cells"]
            for workload, cell in row["cells"].items():
                ran_before = "tokens_per_s" in cells.get(workload, {})
                if not (cell.get("not_run") == TIME_BUDGET and ran_before):
                    cells[workload] = cell
            old.update({key: value for key, value in row.items() if key != "cells"})
    return merged


def results_path(folder: Path, here: Figures) -> Path:
    """<folder>/<machine>-throughput.json"""
    return folder / f"{machine_name(here)}-throughput.json"


def write(path: Path, part: Figures) -> Figures:
    """Merges `part` into the results file; returns the whole document."""
    document = merge(json.loads(path.read_text()) if path.exists() else None, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return document
