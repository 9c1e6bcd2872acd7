"""The document of a run as a picture: Figure 3 redrawn, MFU, and speed-up against padding."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from neobert.throughput.shapes import CONTESTANTS
from neobert.throughput.table import KINDS, columns, figure

# One colour for each architecture; large models dashed, NeoBERT as in the text: ours thick.
COLOURS = {
    "bert": "tab:gray",
    "roberta": "tab:brown",
    "modernbert": "tab:blue",
    "nomic_bert": "tab:green",
    "neobert": "tab:red",
}
DASHES = {"plain": ":", "compiled": "-.", "ours": "-"}


def find_plotting() -> None:
    """Raises ImportError, which says what to install, if plots cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'neobert-kernels[bench]'")


def draw(document: dict[str, Any], path: Path) -> None:
    """Writes a row of three panels for each dtype. Needs matplotlib (the `bench` extra)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = document["throughput"]
    chart, axes = pyplot.subplots(len(tables), 3, figsize=(15, 4.6 * len(tables)), squeeze=False)
    for (dtype, rows), (throughput, mfu, speedup) in zip(tables.items(), axes, strict=True):
        _by_length(throughput, rows, "tokens_per_s")
        throughput.set(ylabel=f"live tokens per second, {dtype}", yscale="log")
        _legend(throughput)
        _by_length(mfu, rows, "mfu")
        mfu.set(ylabel="MFU, share of the fastest matrix product")
        mfu.set_ylim(bottom=0)
        _by_padding(speedup, rows)
    title = document["machine"].get("gpu") or document["machine"]["cpu"]
    chart.suptitle(f"{title}, torch {document['machine']['torch']}")
    chart.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, dpi=110)
    pyplot.close(chart)


def _by_length(axes: Any, rows: dict[str, Any], key: str) -> None:
    lengths = columns(rows, ["fixed"])
    for name, contestant in CONTESTANTS.items():
        values = [(w.number, figure(rows, name, w.name, key)) for w in lengths]
        points = [(length, value) for length, value in values if value is not None]
        if points:
            style = "--" if contestant.size == "large" else DASHES.get(contestant.variant, "-")
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=COLOURS[contestant.shape.family],
                linewidth=3 if contestant.variant == "ours" else 1.5,
                marker="o",
                markersize=4,
                label=contestant.label,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([w.number for w in lengths], [f"{w.number:,}" for w in lengths])
    axes.set_xlabel("sequence length, tokens")


def _by_padding(axes: Any, rows: dict[str, Any]) -> None:
    """Workloads by how much of what a padded model computes is padding."""
    for other in ("neobert-plain", "neobert-compiled"):
        points = []
        for workload in columns(rows, KINDS):
            ours, rate = (
                figure(rows, name, workload.name, "tokens_per_s") for name in ("neobert", other)
            )
            if ours and rate:
                padding = figure(rows, other, workload.name, "padding")
                points.append((padding, ours / rate, workload.name))
        if points:
            x, y, names = zip(*sorted(points), strict=True)
            axes.plot(x, y, "o", label=f"over {CONTESTANTS[other].label}")
            for each in zip(x, y, names, strict=True):
                axes.annotate(
                    each[2], each[:2], fontsize=7, xytext=(4, 3), textcoords="offset points"
                )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="computed tokens over live tokens, padded", ylabel="times as fast")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)  # room for the names
    _legend(axes)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:  # matplotlib warns of an empty one
        axes.legend(fontsize=7)
