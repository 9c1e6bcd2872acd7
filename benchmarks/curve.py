"""Keeps the loss curve of a pre-training run among the results:

    python benchmarks/curve.py RUN NAME "what was run on what"

writes benchmarks/results/pretrain/NAME.json (machine, commit, settings, records) and NAME.png.
"""

import datetime
import json
import sys
from pathlib import Path

import yaml
from timing import RESULTS

from neobert.machine import commit, machine
from neobert.metrics import plot_losses, read_metrics


def keep(run: Path, name: str, what: str) -> Path:
    """`run`: the output directory of a finished run."""
    records = [
        {key: float(f"{value:.5g}") if key != "step" else value for key, value in record.items()}
        for record in read_metrics(run)
    ]
    folder = RESULTS / "pretrain"
    folder.mkdir(parents=True, exist_ok=True)
    plot_losses(records, folder / f"{name}.png")
    document = {
        "what": what,
        "machine": machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "settings": yaml.safe_load((run / "config.yaml").read_text()),
        "seconds": records[-1]["seconds"],
        "records": records,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(keep(Path(sys.argv[1]), *sys.argv[2:4]))
