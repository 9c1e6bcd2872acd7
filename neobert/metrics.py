"""What a run says of itself: console, metrics.jsonl, TensorBoard, W&B, and a plot of the loss."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from neobert.config import NeoBERTConfig
from neobert.data import MaskedBatch
from neobert.files import replace_file

METRICS, PLOT, WANDB_RUN = "metrics.jsonl", "loss.png", "wandb-run"
UNIGRAMS = "validation_unigram_entropy"


def forward_flop(
    config: NeoBERTConfig, tokens: int, squares: int, masked: int | None = None
) -> int:
    """Floating-point operations of the model's matrix products and attention, forward.

    squares: the sum of the squared sequence lengths.
    masked: of a masked-LM loss, the tokens that have logits: for them alone the last block goes on
        after its attention. None: no logits, and every token to the end.
    """
    dim, width = config.hidden_size, config.swiglu_width
    layers = config.num_hidden_layers
    attention = layers * (2 * tokens * 3 * dim * dim + 4 * dim * squares)
    to_the_end = tokens if masked is None else masked
    after = ((layers - 1) * tokens + to_the_end) * 2 * (dim * dim + 3 * dim * width)
    return attention + after + 2 * dim * config.vocab_size * (masked or 0)


def training_flop(config: NeoBERTConfig, batches: list[MaskedBatch]) -> int:
    """Of forward and backward; what gradient checkpointing computes again does not count."""
    lengths = torch.cat([batch.packed.cu_seqlens.diff() for batch in batches]).long()
    masked = sum(batch.num_masked for batch in batches)
    return 3 * forward_flop(config, int(lengths.sum()), int(lengths.square().sum()), masked)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product here and now: what MFU is a share of."""
    size, calls = (8192, 20) if device.type == "cuda" else (1024, 5)
    a = torch.randn(size, size, device=device, dtype=dtype)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(3):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            a @ a
        wait()
        best = min(best, (time.perf_counter() - start) / calls)
    return 2 * size**3 / best


def unigram_entropy(batches: list[MaskedBatch], special_ids: tuple[int, ...]) -> float:
    """Entropy, nats per token, of the frequencies of the texts' own tokens: no model that ignores
    the context has a lower loss on them."""
    ids = [b.packed.input_ids.index_copy(0, b.rows, b.labels) for b in batches]
    counts = np.bincount(torch.cat(ids).numpy()).astype(float)
    counts[[i for i in special_ids if i < len(counts)]] = 0
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


class Metrics:
    """Writes what a run measures, in the main process.

    name: of the command, beside the progress bar.
    step: the step the run goes on from: what an interrupted run had written beyond it is dropped.
        At 0 that is everything.
    wandb: a Weights & Biases project, or None. A run that goes on is one run there, too.
    """

    def __init__(
        self,
        name: str,
        output: Path,
        step: int,
        steps: int,
        tensorboard: bool,
        wandb: str | None = None,
    ):
        self.path = output / METRICS
        self.records = [r for r in read_metrics(output) if r["step"] <= step and step > 0]
        replace_file(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        self.file = open(self.path, "a")
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self.wandb = start_wandb(wandb, output, step) if wandb else None
        self.progress = tqdm(total=steps, initial=step, desc=name, unit="step", disable=None)

    def write(self, step: int, **values: float) -> None:
        record = {"step": step, **values}
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in values.items():
            if self.board is not None:
                self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(record)
        said = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        self.say(f"step {step}  {said}")

    def say(self, line: str) -> None:
        self.progress.write(line)

    def advance(self, loss: float) -> None:
        self.progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.progress.update()

    def close(self) -> None:
        self.progress.close()
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(project: str, output: Path, step: int) -> Any:
    """The run on Weights & Biases that belongs to `output`, a new one for a run from step 0.

    Its x-axis is our step, not W&B's own, which cannot go back to that of the last checkpoint.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"wandb={project!r} needs a package: pip install wandb") from error
    kept = output / WANDB_RUN
    if step == 0 or not kept.exists():
        kept.write_text(uuid.uuid4().hex[:8])
    run = wandb.init(
        project=project, name=output.name, id=kept.read_text(), resume="allow", dir=str(output)
    )
    run.define_metric("*", step_metric="step")
    return run


def read_metrics(output: Path) -> list[dict]:
    """The records of a run; the last line may be half, if the run was killed."""
    path = output / METRICS
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot_losses(
    records: list[dict], path: Path, label: str = "masked-LM loss (nats per masked token)"
) -> None:
    """Training and validation loss over steps, and the validation texts' unigram entropy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, line in (("loss", "training"), ("validation_loss", "validation")):
        points = [(r["step"], r[name]) for r in records if name in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=line, linewidth=1)
    for record in records:
        if UNIGRAMS in record:
            axes.axhline(record[UNIGRAMS], color="grey", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel=label)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
