"""The eight GLUE tasks (Wang et al. 2019): columns and labels of their files, and their scores.

Without WNLI, as in the paper (App. C).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from neobert.settings import nearest

LOWEST, HIGHEST = 0.0, 5.0  # STS-B's scores
TRAIN = "train"


@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks.

    name: what GLUE calls it, and its folder. subset: what nyu-mll/glue calls it.
    texts: the columns of nyu-mll/glue that hold its one or two texts, in the model's order.
    classes: in the order of the labels' numbers; () for STS-B, whose label is a score.
    columns: of GLUE's own TSV files, in order. The last is the label, but where `tsv_label` says
        otherwise.
    tsv_texts: those that hold the texts.
    tsv_classes: how the label is spelled there, in the order of `classes`.
    header: whether the first row names the columns.
    dev_columns: if those of the development files are others.
    dev_sets: the development sets, by the ends of their files' names.
    metrics: on each development set, names in METRICS.
    broken_rows: whether GLUE's own files have rows of another number of columns, from line breaks
        within a text. They are left out.
    """

    name: str
    subset: str
    texts: tuple[str, ...]
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    tsv_texts: tuple[str, ...]
    tsv_label: str
    tsv_classes: tuple[str, ...] = ("0", "1")
    header: bool = True
    dev_columns: tuple[str, ...] | None = None
    dev_sets: tuple[str, ...] = ("",)
    metrics: tuple[str, ...] = ("accuracy",)
    broken_rows: bool = False

    @property
    def num_labels(self) -> int:
        """Outputs of the model: one per class, or the score."""
        return len(self.classes) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """ "train", then the development sets: "dev", or "dev_matched" and "dev_mismatched"."""
        return TRAIN, *(f"dev{each}" for each in self.dev_sets)

    def tsv_columns(self, split: str) -> tuple[str, ...]:
        return self.columns if split == TRAIN else self.dev_columns or self.columns


ENTAILMENT = ("entailment", "not_entailment")
SENTENCES = ("sentence1", "sentence2")
MNLI_COLUMNS = (
    "index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
    "sentence1_parse", "sentence2_parse", "sentence1", "sentence2",
)  # fmt: skip

TASKS = {
    task.subset: task
    for task in (
        Task(
            "MNLI", "mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
            (*MNLI_COLUMNS, "label1", "gold_label"), SENTENCES, "gold_label",
            ("entailment", "neutral", "contradiction"),
            dev_columns=(*MNLI_COLUMNS, *(f"label{i}" for i in range(1, 6)), "gold_label"),
            dev_sets=("_matched", "_mismatched"),
        ),
        Task(
            "QNLI", "qnli", ("question", "sentence"), ENTAILMENT,
            ("index", "question", "sentence", "label"), ("question", "sentence"), "label",
            ENTAILMENT,
        ),
        Task(
            "QQP", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"),
            ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
            ("question1", "question2"), "is_duplicate", metrics=("accuracy", "f1"),
            broken_rows=True,
        ),
        Task(
            "RTE", "rte", SENTENCES, ENTAILMENT, ("index", *SENTENCES, "label"), SENTENCES, "label",
            ENTAILMENT,
        ),
        Task(
            "SST-2", "sst2", ("sentence",), ("negative", "positive"), ("sentence", "label"),
            ("sentence",), "label",
        ),
        Task(
            "MRPC", "mrpc", SENTENCES, ("not_equivalent", "equivalent"),
            ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("#1 String", "#2 String"),
            "Quality", metrics=("accuracy", "f1"),
        ),
        Task(
            "CoLA", "cola", ("sentence",), ("unacceptable", "acceptable"),
            ("source", "label", "annotation", "sentence"), ("sentence",), "label", header=False,
            metrics=("matthews",),
        ),
        Task(
            "STS-B", "stsb", SENTENCES, (),
            ("index", "genre", "filename", "year", "old_index", "source1", "source2", *SENTENCES,
             "score"),
            SENTENCES, "score", metrics=("pearson", "spearman"),
        ),
    )
}  # fmt: skip  # in the order of the paper's Table 3


def find_task(name: str) -> Task:
    """The task that GLUE or its hub data set calls so, in any case. ValueError for another name."""
    subset = re.sub(r"[-_ ]", "", name).lower()
    if subset not in TASKS:
        raise ValueError(f"there is no task {name!r}{nearest(subset, TASKS)}")
    return TASKS[subset]


def _correlation(statistic, labels, predictions) -> float:
    """Of a constant prediction it is not defined: 0, as scikit-learn has it for Matthews'."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        value = float(statistic(labels, predictions).statistic)
    return value if np.isfinite(value) else 0.0


METRICS = {
    "accuracy": accuracy_score,
    "f1": lambda labels, predictions: f1_score(labels, predictions, zero_division=0.0),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predictions: _correlation(pearsonr, labels, predictions),
    "spearman": lambda labels, predictions: _correlation(spearmanr, labels, predictions),
}


def scores(
    task: Task, labels: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
) -> dict[str, float]:
    """Every metric on every development set, as fractions of 1.

    labels: per development set, (examples,) class numbers or scores. outputs: the model's, per
    development set (examples, num_labels).
    """
    found = {}
    for suffix, truth, output in zip(task.dev_sets, labels, outputs, strict=True):
        predictions = output.argmax(-1) if task.classes else output[:, 0]
        for metric in task.metrics:
            found[metric + suffix] = float(METRICS[metric](truth, predictions))
    return found


def score(found: dict[str, float]) -> float:
    """The task's score, that of Table 3 as a fraction of 1: of two metrics, and of MNLI matched and
    mismatched, the mean (App. C)."""
    return fmean(found.values())
