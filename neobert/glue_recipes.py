"""What fine-tuning on GLUE is told: the settings of a run, of a whole evaluation, and the grid."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from neobert.glue_data import HUB
from neobert.glue_tasks import TASKS, find_task
from neobert.settings import PRECISIONS, at_least, one_of

POINT = ("batch_size", "lr", "weight_decay")
# Of the best run of NeoBERT_4096: the paper's Table 6.
TABLE_6 = {
    "CoLA": (8, 8e-6, 1e-5),
    "MNLI": (16, 5e-6, 1e-5),
    "MRPC": (2, 1e-5, 1e-5),
    "QNLI": (8, 5e-6, 1e-5),
    "QQP": (32, 8e-6, 1e-5),
    "RTE": (32, 5e-6, 1e-5),
    "SST-2": (32, 8e-6, 1e-2),
    "STS-B": (32, 2e-5, 1e-5),
}


@dataclass
class FinetuneSettings:
    """How a model is fine-tuned. The defaults are the paper's (App. C); what it leaves open is as
    in the released code: the schedule, the optimizer's betas, no gradient clipping.

    epochs, patience: at most so many epochs; it stops early after so many evaluations without a
        better score.
    evaluate_every, evaluations_per_epoch: an evaluation every
        min(evaluate_every, batches of an epoch // evaluations_per_epoch) steps.
    warmup_fraction, decay_fraction, min_lr_ratio: up in a line, down in a line (see
        `learning_rate`), fractions of all steps.
    max_length: longer sequences are cut to so many tokens, or to what the model takes.
    max_tokens: most tokens in a forward pass; it changes memory and speed alone, but for the random
        numbers of dropout where a batch does not fit.
    padded: padded batches of the same sequences, for comparison.
    precision: "float32", or "bfloat16": autocast, with float32 weights and optimizer.
    seed: of the new head, the order of the examples and dropout.
    save_every: steps between checkpoints, of which the newest is kept until the run is finished.
    """

    epochs: int = 10
    patience: int = 15
    evaluate_every: int = 500
    evaluations_per_epoch: int = 10
    warmup_fraction: float = 0.06
    decay_fraction: float = 0.9
    min_lr_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = math.inf
    max_length: int = 512
    max_tokens: int = 16 * 1024
    padded: bool = False
    precision: str = "bfloat16"
    seed: int = 0
    log_every: int = 50
    save_every: int = 2000
    tensorboard: bool = False

    def __post_init__(self):
        one_of(self, PRECISIONS, "precision")
        at_least(self, 1, "epochs", "patience", "evaluate_every", "evaluations_per_epoch",
                 "max_tokens", "log_every", "save_every")  # fmt: skip


@dataclass
class FinetuneConfig(FinetuneSettings):
    """One run: a model fine-tuned on one task.

    output: directory of the run; it goes on from the checkpoint there, and a finished one is not
        repeated.
    task: as GLUE or the hub calls it. data: see `read_examples`.
    model: checkpoint directory or hub repository, tokenizer included. Of a fine-tuned one all but
        the last layer is taken, which is always new.
    evaluation: folder of an evaluation that `model` is a path within, as that of its MNLI run: the
        folder may be moved, and its runs go on.
    batch_size: examples in a step.
    """

    output: str = "???"
    task: str = "???"
    data: str = HUB
    model: str = "chandar-lab/NeoBERT"
    evaluation: str | None = None
    batch_size: int = 16
    lr: float = 1e-5
    weight_decay: float = 1e-2

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "batch_size")
        if self.task != "???":  # not given yet
            self.task = find_task(self.task).name

    @property
    def checkpoint(self) -> str:
        """What `from_pretrained` takes: `model`, wherever its evaluation is now."""
        return self.model if self.evaluation is None else str(Path(self.evaluation) / self.model)

    def evaluation_interval(self, batches: int) -> int:
        """Steps between evaluations, at least 1; batches: of an epoch."""
        return max(1, min(self.evaluate_every, batches // self.evaluations_per_epoch))


@dataclass
class Grid:
    """Values searched, all combinations: 60 runs, as below Table 6. (The text of App. C leaves out
    batch size 2 and 8e-6, which Table 6 has among the best.)"""

    batch_size: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32])
    lr: list[float] = field(default_factory=lambda: [5e-6, 6e-6, 8e-6, 1e-5, 2e-5, 3e-5])
    weight_decay: list[float] = field(default_factory=lambda: [1e-2, 1e-5])

    def __post_init__(self):
        for name, values in vars(self).items():
            if not values:
                raise ValueError(f"grid.{name} has no values")

    def points(self) -> list[dict[str, Any]]:
        values = product(*(getattr(self, name) for name in POINT))
        return [dict(zip(POINT, each, strict=True)) for each in values]


@dataclass
class GlueConfig(FinetuneSettings):
    """A model evaluated on GLUE.

    output: directory; an interrupted evaluation goes on there.
    model, data: as for `FinetuneConfig`.
    tasks: of the eight.
    search: every combination in `grid` for each task, in place of one run.
    transfer: RTE, STS-B, MRPC and QNLI start from the best MNLI run in `output`.
    batch_size, lr, weight_decay: of a run without a search. None: the task's in TABLE_6.
    """

    output: str = "???"
    model: str = "chandar-lab/NeoBERT"
    data: str = HUB
    tasks: list[str] = field(default_factory=lambda: [task.name for task in TASKS.values()])
    search: bool = False
    grid: Grid = field(default_factory=Grid)
    transfer: bool = True
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self.tasks = [find_task(name).name for name in self.tasks]
        if not self.tasks:
            raise ValueError("tasks names none")
        if self.search and (given := [name for name in POINT if getattr(self, name) is not None]):
            raise ValueError(f"{', '.join(given)}: a search takes the values in grid")

    def points(self, task: str) -> list[dict[str, Any]]:
        """The batch size, learning rate and weight decay of each run on a task."""
        if self.search:
            return self.grid.points()
        best = dict(zip(POINT, TABLE_6[task], strict=True))
        given = {name: getattr(self, name) for name in POINT if getattr(self, name) is not None}
        return [best | given]

    def run(
        self, task: str, origin: dict[str, str], output: Path, point: dict[str, Any]
    ) -> FinetuneConfig:
        """The configuration of one of those runs; origin: its `model`, and `evaluation` if any."""
        names = [each.name for each in dataclasses.fields(FinetuneSettings)]
        settings = {name: getattr(self, name) for name in names} | origin | point
        return FinetuneConfig(output=str(output), task=task, data=self.data, **settings)
