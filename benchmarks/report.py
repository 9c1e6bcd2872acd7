"""Prints the README's tables from benchmarks/results/; --write puts them into the README."""

import json
import re
import sys
from pathlib import Path

from neobert.breakdown import report as breakdown
from neobert.throughput import table

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results:", "<!-- end of results -->"
METHODS = {
    "ours": "neobert-kernels, packed",
    "plain_padded": "plain PyTorch, one padded batch",
    "plain_sorted": "plain PyTorch, length-sorted batches of 8",
    "compiled_sorted": "the same under `torch.compile`",
    "plain_one_at_a_time": "plain PyTorch, one at a time",
    "onnxruntime_sorted": "ONNX Runtime, length-sorted batches of 8",
    "gemm_bound_torch": "*only the matrix products, `F.linear`*",
    "gemm_bound_ours": "*only the matrix products, ours*",
}
WORKLOADS = {"lognormal": "lognormal lengths", "fixed-128": "128 each", "fixed-512": "512 each"}
DTYPES = ("float32", "bfloat16")


def encoder_table(results: dict) -> list[str]:
    """Live tokens per second of every method, and how many times slower than ours it is."""
    columns = []
    for dtype in DTYPES:
        # The compiled model took turns with ours in a test of its own: its ratio carries over.
        compiled = results.get(f"bench_encoder.py::test_encoder_compiled[{dtype}]")
        for workload in WORKLOADS:
            name = f"bench_encoder.py::test_encoder[{workload}-{dtype}]"
            if name not in results:
                continue
            figures = results[name]
            if compiled and workload == "lognormal":
                ratio = compiled["times_ours"]["compiled_sorted"]
                figures["times_ours"]["compiled_sorted"] = ratio
                figures["live tok/s"]["compiled_sorted"] = figures["live tok/s"]["ours"] / ratio
            columns.append((f"{WORKLOADS[workload]}, {dtype}", figures))
    lines = [
        "| live tokens per second | " + " | ".join(title for title, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method, label in METHODS.items():
        cells = []
        for _, figures in columns:
            rate = figures["live tok/s"].get(method)
            ratio = figures["times_ours"].get(method)
            times = f" ({1 / ratio:.2f}x)" if ratio and method != "ours" else ""
            cells.append("-" if rate is None else f"{rate:,.0f}{times}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def attention_table(results: dict) -> list[str]:
    """GFLOP/s of attention at lognormal lengths, ours and SDPA a sequence at a time."""
    lines = [
        "| attention, lognormal lengths, GFLOP/s | ours | SDPA, one at a time |",
        "|---|---|---|",
    ]
    for direction in ("forward", "backward"):
        for dtype in DTYPES:
            name = f"bench_attention.py::test_{direction}[{{}}-lognormal-torch.{dtype}]"
            pair = [results.get(name.format(by)) for by in ("ours", "sdpa-one-by-one")]
            if all(pair):
                cells = " | ".join(f"{figures['GFLOP/s']:.0f}" for figures in pair)
                lines.append(f"| {direction}, {dtype} | {cells} |")
    return lines


def perplexity_table(results: dict) -> list[str]:
    """Seconds of a document's pseudo-perplexity, and how many times as long the other ways take."""
    lines = [
        "| pseudo-perplexity of a document of 128 tokens | ours, s | plain PyTorch, a copy at a"
        " time | plain PyTorch, 32 copies at a time | ours, a copy at a time |",
        "|---|---|---|---|---|",
    ]
    for size, label in (("full", "full size"), ("tiny", "the `tiny` preset's size")):
        for dtype in DTYPES:
            figures = results.get(f"bench_perplexity.py::test_document[{size}-{dtype}]")
            if figures:
                cells = [f"{times:.1f}x" for times in figures["times_as_fast_as"].values()]
                seconds = f"{figures['median_s']:.3g}"
                lines.append(f"| {label}, {dtype} | {' | '.join([seconds, *cells])} |")
    return lines


ROW_OPS = {
    "RMSNorm": "bench_rms_norm.py::test_rms_norm",
    "add + RMSNorm": "bench_rms_norm.py::test_add_rms_norm",
    "SwiGLU": "bench_swiglu.py::test_swiglu",
    "rotary": "bench_rotary.py::test_rotary",
    "rotary on packed qkv": "bench_rotary.py::test_rotary_qkv",
}


def row_op_table(results: dict) -> list[str]:
    """Share of copy bandwidth of the row ops' forward: ours, torch.compile and plain PyTorch."""
    columns = [(by, dtype) for dtype in DTYPES for by in ("ours", "compiled", "plain")]
    titles = " | ".join(f"{by}, {dtype}" for by, dtype in columns)
    lines = [
        f"| forward, share of the bandwidth of a copy from memory (of one as large) | {titles} |",
        "|---|" + "---|" * len(columns),
    ]
    for label, test in ROW_OPS.items():
        figures = [results.get(f"{test}[{by}-torch.{dtype}]") for by, dtype in columns]
        cells = [
            f"{each['share_of_memory_copy']:.2f} ({each['share_of_copy']:.2f})" if each else "-"
            for each in figures
        ]
        if any(figures):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def gpu_row_op_table(results: dict) -> list[str]:
    """Share of copy bandwidth in bfloat16, of every implementation that was there, by tokens."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for label, test in ROW_OPS.items():
        for suffix, direction in (("", "forward"), ("_backward", "backward")):
            for name, figures in results.items():
                match = re.fullmatch(
                    rf"{re.escape(test)}{suffix}\[(\d+)-([^-]+)-torch\.bfloat16\]", name
                )
                if match and "share_of_copy" in figures:
                    row = found.setdefault((f"{label} {direction}", match[2]), {})
                    row[int(match[1])] = figures["share_of_copy"]
    tokens = sorted({count for row in found.values() for count in row})
    lines = [
        "| share of copy bandwidth, bfloat16, at tokens | by | "
        + " | ".join(f"{count:,}" for count in tokens)
        + " |",
        "|---|---|" + "---|" * len(tokens),
    ]
    for (label, by), row in found.items():
        cells = [f"{row[count]:.2f}" if count in row else "-" for count in tokens]
        lines.append(f"| {label} | {by} | " + " | ".join(cells) + " |")
    return lines


def latency_table(results: dict) -> list[str]:
    """Milliseconds of small batches, from ids and from strings."""
    prefix = "bench_latency.py::test_"
    tests = {
        tuple(name.removeprefix(prefix).rstrip("]").replace("_", " ").split("[")): figures["ms"]
        for name, figures in results.items()
        if name.startswith(prefix)
    }
    methods = list(dict.fromkeys(method for figures in tests.values() for method in figures))
    columns = [(method, p) for method in methods for p in ("p50", "p90", "p99")]
    columns = [(m, p) for m, p in columns if p == "p50" or m.startswith("ours")]
    titles = " | ".join(f"{method}, {p}" for method, p in columns)
    lines = [f"| latency, ms | {titles} |", "|---|" + "---|" * len(columns)]
    for (test, shape), figures in sorted(tests.items(), key=lambda item: _in_numbers(item[0])):
        times = [figures[method][p] if method in figures else None for method, p in columns]
        cells = ["-" if ms is None else f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}" for ms in times]
        batch, length = shape.split("-")
        lines.append(f"| {test}, {batch} x {length} tokens | " + " | ".join(cells) + " |")
    return lines


def _in_numbers(test_and_shape: tuple[str, str]) -> tuple[str, list[int]]:
    test, shape = test_and_shape
    return test, [int(number) for number in shape.split("-")]


def throughput_section(document: dict, source: str, picture: Path) -> str:
    """The paper's Table 10 and Figure 3 on one machine."""
    machine = document["machine"]
    where = machine.get("gpu") or f"{machine['cores']} cores of an {machine['cpu']}"
    lines = [f"Encoders' throughput on {where} ({source}", ""]
    command = "pytest benchmarks/bench_throughput.py --benchmark-only"
    lines.append(table.markdown(document, command))
    if picture.exists():
        lines += ["", f"![Throughput, MFU and speed-up]({picture.relative_to(ROOT)})"]
    return "\n".join(lines)


def breakdown_section(document: dict, source: str, picture: Path) -> str:
    machine = document["machine"]
    where = machine.get("gpu") or f"{machine['cores']} cores of an {machine['cpu']}"
    lines = [f"Where the time goes, on {where} ({source}", "", breakdown.summary(document)]
    if picture.exists():
        lines += ["", f"![Where the time goes]({picture.relative_to(ROOT)})"]
    return "\n".join(lines)


def render(path: Path) -> str:
    """The Markdown between the README's markers, from one results file."""
    document = json.loads(path.read_text())
    machine = document["machine"]
    source = f"torch {machine['torch']}), from `{path.relative_to(ROOT)}`:"
    if "throughput" in document:
        return throughput_section(document, source, path.with_suffix(".png"))
    if "breakdown" in document:
        return breakdown_section(document, source, path.with_suffix(".png"))
    results = document["results"]
    if "gpu" in machine:
        title = f"On an {machine['gpu']} (triton {machine['triton']}, {source}"
        return "\n".join([title, "", *gpu_row_op_table(results)])
    lines = [
        f"On {machine['cores']} cores of an {machine['cpu']} ({machine['cpu_kernels']} kernels,"
        f" {source}",
        "",
    ]
    if any("bench_encoder" in name for name in results):
        lines += ["Full-size encoder; in brackets, speed relative to ours.", ""]
        lines += [*encoder_table(results), ""]
    if any("bench_latency" in name for name in results):
        lines += [*latency_table(results), ""]
    for rows in (perplexity_table(results), attention_table(results), row_op_table(results)):
        if len(rows) > 2:  # more than its head
            lines += [*rows, ""]
    return "\n".join(lines[:-1])


def main() -> None:
    paths = sorted((ROOT / "benchmarks/results").glob("*.json"))
    text = "\n\n".join(render(path) for path in paths)
    if "--write" not in sys.argv:
        print(text)
        return
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    after = rest.split(END, 1)[1]
    readme.write_text(f"{before}{BEGIN}{marker}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
