"""Prints the README's tables from benchmarks/results/; --write puts them into the README."""

import json
import sys
from pathlib import Path

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
    columns = [
        (f"{WORKLOADS[workload]}, {dtype}", results[name])
        for dtype in DTYPES
        for workload in WORKLOADS
        if (name := f"bench_encoder.py::test_encoder[{workload}-{dtype}]") in results
    ]
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


def render(path: Path) -> str:
    """The Markdown between the README's markers, from one results file."""
    document = json.loads(path.read_text())
    machine, results = document["machine"], document["results"]
    return "\n".join(
        [
            f"Full-size NeoBERT on {machine['cores']} cores of an {machine['cpu']}"
            f" ({machine['cpu_kernels']} kernels, torch {machine['torch']});"
            " in brackets, speed relative to ours:",
            "",
            *encoder_table(results),
            "",
            f"From `{path.relative_to(ROOT)}`.",
        ]
    )


def main() -> None:
    (path,) = sorted((ROOT / "benchmarks/results").glob("*.json"))
    text = render(path)
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
