"""The document of a run as Markdown: the README's section."""

from collections.abc import Callable, Iterable
from typing import Any

from neobert.throughput.shapes import CONTESTANTS, PAPER_LENGTHS
from neobert.throughput.workloads import RAGGED_TEXTS, Workload

Figures = dict[str, Any]

KINDS = ("fixed", "normal", "lognormal", "strings", "short")
TITLES = {
    "normal": "normal lengths ≤ {0}",
    "lognormal": "lognormal lengths ≤ {0}",
    "strings": "lognormal ≤ {0} from strings",
    "short": "queries, {0} at a time",
}
PAPER = """\
The paper's figures, right, are of an A100, with dtype, attention and synchronisation unstated. Its
24.5 thousand tokens a second at length 512 are 11 TFLOP/s, under 4 % of the 312 that an A100 has in
bfloat16: they are the speed of an implementation, not of an architecture."""
LEGEND = """\
Live tokens alone are counted; in brackets, at real lengths, computed tokens over live ones.
Lognormal: median 300, sigma 1.1; normal: mean of half the limit, deviation of an eighth; both
clipped to the limit, texts in batches as they come. Queries have 4 to 32 tokens; on a GPU CUDA
graphs answer them, torch.compile's (mode reduce-overhead) and those of Encoder(cuda_graphs=True),
which takes them from the host and pools. For 8,192 tokens NeoBERT's
max_length is raised from 4,096. MFU: the FLOP that the live tokens need (2 per weight of a matrix
product and token, 4 · dim per layer and pair of tokens that attend; for NeoBERT 396.4 M + 86,016 ·
length per token) per second, over the fastest large matrix product measured in the same process,
torch's or ours. Memory: the process's peak, weights included. Cold start: from the start of the
process to the first vectors, imports, weights and compiling included (NeoBERT reads a checkpoint,
the others draw random weights). Cosine: of the worst token to float32 plain PyTorch on the same
weights."""


def markdown(document: Figures, command: str = "neobert bench") -> str:
    """Tables for each dtype of a results document: throughput at fixed and at real lengths,
    latency, efficiency, and NeoBERT's speed-ups."""
    lines: list[str] = []
    for dtype, rows in document["throughput"].items():
        ordered = {name: rows[name] for name in CONTESTANTS if name in rows}
        lines += [f"**{dtype}.** Live tokens per second; in brackets the best batch.", ""]
        lines += [*_fixed(ordered), "", *_ragged(ordered), "", *_efficiency(ordered), ""]
        lines += [*_speedups(ordered), ""]
        lines += _not_run(ordered)
    return "\n".join([*lines, PAPER, "", LEGEND, "", f"Made by `{command}`."])


def columns(rows: Figures, kinds: Iterable[str]) -> list[Workload]:
    """The workloads of these kinds for which any contestant has figures or a reason."""
    found = {Workload.parse(name) for row in rows.values() for name in row["cells"]}
    chosen = [workload for workload in found if workload.kind in kinds]
    return sorted(chosen, key=lambda each: (KINDS.index(each.kind), each.number))


def figure(rows: Figures, contestant: str, workload: str, key: str) -> float | None:
    """One figure, or None if it was not measured."""
    return rows.get(contestant, {"cells": {}})["cells"].get(workload, {}).get(key)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value < 1e5 else f"{value / 1e3:,.0f}k"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(rows: Figures, name: str, workload: Workload, show: Callable[[Figures], str]) -> str:
    cell = rows[name]["cells"].get(workload.name)
    if cell is None:
        return ""
    if "not_run" in cell:
        return "-" if cell["not_run"].startswith("beyond") else f"*{_short(cell['not_run'])}*"
    return show(cell)


def _short(reason: str) -> str:
    """For a cell: "time budget" is "time", "crashed: …" is "crashed"."""
    return {"time budget": "time", "out of memory": "memory"}.get(reason, reason.split(":")[0])


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    rule = "|---" * len(header) + "|"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in body)]


def _label(name: str) -> str:
    label = CONTESTANTS[name].label
    return f"**{label}**" if CONTESTANTS[name].variant == "ours" else label


def _fixed(rows: Figures) -> list[str]:
    lengths = columns(rows, ["fixed"])
    header = ["all texts of length", "attention", *(f"{w.number:,}" for w in lengths)]
    paper_lengths = [w.number for w in lengths if w.number in PAPER_LENGTHS]
    header += [f"paper, {n:,}" for n in paper_lengths]

    def show(cell: Figures) -> str:
        return f"{_rate(cell['tokens_per_s'])} ({cell['batch']})"

    body = []
    for name, row in rows.items():
        cells = [_cell(rows, name, w, show) for w in lengths]
        paper = dict(zip(PAPER_LENGTHS, CONTESTANTS[name].paper, strict=False))
        # A row that the paper has not stays empty; a length that its model has not is a dash.
        missing = "-" if paper else ""
        cells += [f"{paper[n]:.1f}k" if n in paper else missing for n in paper_lengths]
        body.append([_label(name), row.get("attention", ""), *cells])
    return _table(header, body)


def _ragged(rows: Figures) -> list[str]:
    workloads = columns(rows, ["normal", "lognormal", "strings", "short"])
    if not workloads:
        return []

    def show(workload: Workload) -> Callable[[Figures], str]:
        if workload.kind == "short":
            return lambda cell: f"{_ms(cell['p50_ms'])} / {_ms(cell['p90_ms'])}"
        return lambda cell: f"{_rate(cell['tokens_per_s'])} ({cell['padding']:.2f})"

    header = ["", *(TITLES[w.kind].format(f"{w.number:,}") for w in workloads)]
    for index, workload in enumerate(workloads, 1):
        if workload.kind == "short":
            header[index] += ", ms, p50 / p90"
    body = [[_label(name), *(_cell(rows, name, w, show(w)) for w in workloads)] for name in rows]
    return _table(header, body)


def _efficiency(rows: Figures) -> list[str]:
    lengths = columns(rows, ["fixed"])
    header = ["", *(f"TFLOP/s, MFU at {w.number:,}" for w in lengths)]
    header += ["memory, GiB", "cold start, s", "1 - cosine"]

    def show(cell: Figures) -> str:
        return f"{cell['flops'] / 1e12:,.3g}, {cell['mfu']:.0%}"

    body = []
    for name, row in rows.items():
        peaks = [cell.get("peak_bytes") or 0 for cell in row["cells"].values()]
        parity = row.get("parity")
        cold = row.get("cold_start_s")
        body.append(
            [
                _label(name),
                *(_cell(rows, name, w, show) for w in lengths),
                f"{max(peaks) / 2**30:.1f}" if any(peaks) else "",
                "" if cold is None else f"{cold:.1f}",
                f"{1 - parity['cosine']:.0e}" if parity else "",
            ]
        )
    return _table(header, body)


def _speedups(rows: Figures) -> list[str]:
    """One line per workload: how many times as fast as padded and as compiled plain PyTorch."""
    lines = []
    for workload in columns(rows, KINDS):
        ours = figure(rows, "neobert", workload.name, "tokens_per_s")
        times = []
        for other, title in (("neobert-plain", "plain"), ("neobert-compiled", "torch.compile")):
            rate = figure(rows, other, workload.name, "tokens_per_s")
            if ours and rate:
                times.append(f"{ours / rate:.2f}x {title}")
        if times:
            lines.append(f"{workload.name}: {', '.join(times)}")
    if not lines:
        return []
    title = f"neobert-kernels, times as fast (unsorted batches of {RAGGED_TEXTS} texts or more)"
    return [f"{title}: {'; '.join(lines)}."]


def _not_run(rows: Figures) -> list[str]:
    """The reasons that do not fit a cell."""
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        for workload, cell in row["cells"].items():
            why = cell.get("not_run", "")
            if why == "time budget":
                why = f"time: beyond its share of the budget of {cell['budget_s']:.0f} s"
            if why and not why.startswith("beyond"):
                reasons.setdefault(f"{CONTESTANTS[name].label}: {why}", []).append(workload)
    if not reasons:
        return []
    return ["Not run: " + "; ".join(f"{why} ({', '.join(w)})" for why, w in reasons.items()), ""]
