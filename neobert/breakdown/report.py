"""Breakdowns as Markdown, as a results file, and as stacked bars."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neobert.breakdown.measure import CATEGORIES, REMAINDER, UNATTRIBUTED, Breakdown, Op, Roof
from neobert.machine import commit, machine, machine_name

COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:purple", "tab:brown", "tab:orange", "tab:pink")


def results_path(folder: Path, here: dict[str, Any]) -> Path:
    """<folder>/<machine>-breakdown.json"""
    return folder / f"{machine_name(here)}-breakdown.json"


def as_json(breakdown: Breakdown, roof: Roof) -> dict[str, Any]:
    """Seconds per step, FLOP, bytes; `roof_s` is what the roofline allows an op."""
    return {
        "tokens": breakdown.tokens,
        "wall_s": breakdown.wall,
        "unprofiled_wall_s": breakdown.unprofiled,
        "host_s": breakdown.host,
        "page_faults": breakdown.page_faults,
        "system_s": breakdown.system,
        "categories": {
            name: {
                "seconds": sum(op.seconds for op in ops),
                "roof_s": sum(roof.seconds(op.work) for op in ops),
                "ops": {
                    op.name: asdict(op.work)
                    | {"seconds": op.seconds, "roof_s": roof.seconds(op.work)}
                    for op in ops
                },
            }
            for name, ops in breakdown.by_category().items()
            if ops
        }
        | {
            name: {"seconds": seconds, "roof_s": 0.0, "ops": {}}
            for name, seconds in (
                (UNATTRIBUTED, breakdown.unattributed),
                (REMAINDER, breakdown.remainder),
            )
            if seconds
        },
    }


def write(
    folder: Path, device: str, dtype: str, layers: int, roof: Roof, cases: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Puts one dtype's breakdowns into the machine's file, over older ones; returns the whole."""
    here = machine(device)
    path = results_path(folder, here)
    document = json.loads(path.read_text()) if path.exists() else {"breakdown": {}}
    document["machine"] = here
    document["breakdown"][dtype] = {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "layers": layers,
        "roof": asdict(roof),
        "cases": cases,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path, document


def markdown(what: str, breakdown: Breakdown, roof: Roof) -> str:
    """A table of categories and their ops, then what the sum leaves."""
    b = breakdown
    lines = [
        f"**{what}**: {b.tokens:,} tokens, {_ms(b.wall)} ms"
        f" ({_ms(b.unprofiled)} without the profiler), {b.tokens / b.unprofiled:,.0f} tok/s;"
        f" {b.page_faults:,.0f} page faults, {_ms(b.system)} ms in the system\n",
        "| | calls | ms | share | TFLOP/s | GB/s | of the roofline |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, ops in b.by_category().items():
        if ops:
            lines.append(_row(f"**{name}**", ops, b.wall, roof))
            lines += [_row(op.name, [op], b.wall, roof) for op in ops if op.seconds > b.wall / 1e3]
    for name, seconds in ((UNATTRIBUTED, b.unattributed), (REMAINDER, b.remainder)):
        if seconds:
            lines.append(f"| **{name}** | | {_ms(seconds)} | {seconds / b.wall:.1%} | | | |")
    named = [(name, each) for name, each in b.host.items() if each > b.wall / 1e3][:6]
    lines += [f"| {name} | | {_ms(each)} | {each / b.wall:.1%} | | | |" for name, each in named]
    return "\n".join(lines)


def _row(name: str, ops: list[Op], wall: float, roof: Roof) -> str:
    seconds = sum(op.seconds for op in ops)
    flop, moved = sum(op.work.flop for op in ops), sum(op.work.bytes for op in ops)
    rate = f"{flop / seconds / 1e12:.3f}" if flop and seconds else ""
    share = sum(roof.seconds(op.work) for op in ops) / seconds if seconds else 0.0
    return (
        f"| {name} | {sum(op.work.calls for op in ops):,} | {_ms(seconds)} | {seconds / wall:.1%} |"
        f" {rate} | {moved / seconds / 1e9 if seconds else 0:,.1f} | {share:.0%} |"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def summary(document: dict[str, Any]) -> str:
    """One table of a results file: each category's share of the step, and of what the roofline
    allows it."""
    cases = [
        (f"{what}, {dtype}", case)
        for dtype, part in document["breakdown"].items()
        for what, case in part["cases"].items()
    ]
    lines = [
        "| share of the step (of the roofline) | " + " | ".join(name for name, _ in cases) + " |",
        "|---|" + "---|" * len(cases),
        "| tokens per second | "
        + " | ".join(f"{c['tokens'] / c['unprofiled_wall_s']:,.0f}" for _, c in cases)
        + " |",
    ]
    for name in (*CATEGORIES, UNATTRIBUTED, REMAINDER):
        cells = []
        for _, case in cases:
            found = case["categories"].get(name)
            cell = "-" if found is None else f"{found['seconds'] / case['wall_s']:.1%}"
            if found and found["roof_s"] and found["seconds"]:
                cell += f" ({found['roof_s'] / found['seconds']:.0%})"
            cells.append(cell)
        if any(cell != "-" for cell in cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(document: dict[str, Any], path: Path) -> None:
    """Two stacked bars for each case: shares of the step's wall clock, and beneath them what the
    roofline allows the same ops. Needs matplotlib (the `bench` extra)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{what}, {dtype}\n{case['tokens']:,} tokens, {_ms(case['wall_s'])} ms", case)
        for dtype, part in document["breakdown"].items()
        for what, case in part["cases"].items()
    ]
    chart, axes = pyplot.subplots(figsize=(11, 1.3 + 0.95 * len(bars)))
    names = [*CATEGORIES, UNATTRIBUTED, REMAINDER]
    colours = dict(zip(names, [*COLOURS, "black", "lightgrey"], strict=True))
    for key, shift, height in (("seconds", 0.0, 0.45), ("roof_s", 0.4, 0.25)):
        ends = [0.0] * len(bars)
        for name in names:
            widths = [
                case["categories"].get(name, {key: 0.0})[key] / case["wall_s"] for _, case in bars
            ]
            axes.barh(
                [place + shift for place in range(len(bars))],
                widths,
                height,
                left=ends,
                color=colours[name],
                label=name if key == "seconds" and any(widths) else None,
                alpha=1.0 if key == "seconds" else 0.55,
            )
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.set_yticks([place + 0.15 for place in range(len(bars))], [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("share of the step's time; the thin bars beneath: what the roofline allows")
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    chart.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(chart)
