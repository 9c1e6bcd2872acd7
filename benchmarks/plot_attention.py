"""Draws bench_attention.py's figures: `python benchmarks/plot_attention.py` reads this machine's
file in benchmarks/results/ and writes the plot beside it, TFLOP/s by the length of the sequences.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from timing import results_file

NAME = re.compile(r"bench_attention.py::test_(\w+)\[(.+)-(\d+|lognormal)-torch\.(\w+)\]")


def curves(results: dict) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """(direction, dtype) -> method -> length or "lognormal" -> TFLOP/s."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for name, figures in results.items():
        match = NAME.fullmatch(name)
        if match and "GFLOP/s" in figures:
            direction, method, shape, dtype = match.groups()
            found[direction, dtype][method][shape] = figures["GFLOP/s"] / 1e3
    return found


def draw(path: Path) -> Path:
    """Writes attention-<name of the results file>.svg: a panel for each direction and dtype,
    fixed lengths as lines and lognormal lengths as points at the left."""
    panels = curves(json.loads(path.read_text())["results"])
    if not panels:
        raise SystemExit(f"{path} has no figures of bench_attention.py")
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for ax, ((direction, dtype), methods) in zip(axes[0], sorted(panels.items()), strict=True):
        for number, (method, rates) in enumerate(sorted(methods.items())):
            lengths = sorted(int(shape) for shape in rates if shape != "lognormal")
            color = f"C{number}"
            ax.plot(lengths, [rates[str(n)] for n in lengths], "o-", color=color, label=method)
            if "lognormal" in rates:
                ax.plot(16, rates["lognormal"], "D", color=color)
        ax.set_xscale("log", base=2)
        ax.set_title(f"attention {direction}, {dtype}")
        ax.set_xlabel("tokens of each sequence (diamonds: lognormal lengths)")
        ax.set_ylabel("TFLOP/s of live tokens")
        ax.legend()
    figure.tight_layout()
    target = path.with_name(f"attention-{path.stem}.svg")
    figure.savefig(target)
    return target


if __name__ == "__main__":
    print(draw(results_file()))
