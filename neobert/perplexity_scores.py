"""Scores of pseudo-perplexity: a document's, their file, their means, and the plot."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from neobert.perplexity import Document

# The largest loss, nats, whose perplexity a float holds; what is infinite for a larger one.
LARGEST_LOSS = math.log(sys.float_info.max)
INFINITE = ("perplexity", "perplexity_standard_error")


@dataclass(frozen=True)
class Score:
    """The pseudo-perplexity of one document.

    document: its number. tokens: its length, special tokens included. truncated: see `Document`.
    masked: how many tokens were masked, of `maskable`: all but the special ones.
    special: of those, what is in the text itself, as {"[UNK]": 2}.
    loss: mean cross entropy of the masked tokens, nats.
    loss_standard_error: of `loss` as an estimate of the mean over all maskable tokens; 0 if all
        were masked.
    perplexity, perplexity_standard_error: see `perplexity_of`. To second order a sampled
        perplexity is also too large, on average by half the relative error squared.
    """

    document: int
    tokens: int
    masked: int
    maskable: int
    special: dict[str, int]
    loss: float
    loss_standard_error: float
    perplexity: float
    perplexity_standard_error: float
    truncated: bool

    @classmethod
    def of(cls, document: Document, losses: np.ndarray) -> Score:
        """losses: (masked,) nats of a simple random sample without replacement, or of all."""
        losses = losses.astype(np.float64)
        masked, maskable = len(losses), document.maskable
        error = 0.0
        if masked < maskable:
            error = math.sqrt(losses.var(ddof=1) / masked * (1 - masked / maskable))
        loss = float(losses.mean())
        perplexity, perplexity_error = perplexity_of(loss, error)
        return cls(
            document.number, len(document.ids), masked, maskable, document.special, loss, error,
            perplexity, perplexity_error, document.truncated,
        )  # fmt: skip


def perplexity_of(loss: float, standard_error: float) -> tuple[float, float]:
    """exp(loss), infinite where no float holds it, and its standard error to first order (the delta
    method): as many times as large as `standard_error`, that of the loss."""
    perplexity = math.exp(loss) if loss <= LARGEST_LOSS else math.inf
    return perplexity, perplexity * standard_error if standard_error else 0.0


def score_line(score: Score) -> str:
    """A score as a line of JSON, which has no number for what is infinite: null."""
    record = asdict(score)
    record |= {name: None for name in INFINITE if record[name] == math.inf}
    return json.dumps(record, allow_nan=False) + "\n"


def read_scores(path: Path) -> list[Score]:
    """The scores in a JSONL file; of a last line that was cut short nothing is read.

    Raises ValueError for a line that `score_line` does not write, as of older versions: their
    scores, which have no "special", are of the special tokens in a text too.
    """
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [
        _read_score(line, f"{path}, line {number}")
        for number, line in enumerate(whole.splitlines(), 1)
    ]


def _read_score(line: bytes, where: str) -> Score:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    names = [each.name for each in fields(Score)]
    record = record if isinstance(record, dict) else {}
    if set(record) != set(names):
        missing = [name for name in names if name not in record]
        if missing == ["special"]:
            raise ValueError(
                f"{where}: a score without 'special', of an older version, which also scored the "
                "special tokens in a text, [UNK] above all: it is not comparable. Score it anew"
            )
        raise ValueError(
            f"{where}: not a score of `neobert eval perplexity`, which has {', '.join(names)}"
        )
    record |= {name: math.inf for name in INFINITE if record[name] is None}
    return Score(**record)


def resume(path: Path, settings: Mapping[str, Any]) -> list[Score]:
    """The scores that an interrupted run left in `path`; the file then ends with a whole line.

    settings: what the scores depend on, as JSON holds it. They are beside the file, in
        <its whole name>.settings.json, from the run's beginning on.
    Raises ValueError if the file was begun with others, or is not one of scores.
    """
    beside = path.with_name(f"{path.name}.settings.json")
    if not path.exists():
        beside.write_text(json.dumps(settings, indent=1) + "\n")
        return []
    scores = read_scores(path)
    if not beside.exists():
        raise ValueError(
            f"{path} is there and {beside.name}, which says what its scores are of, is not beside "
            "it: choose another output"
        )
    begun = json.loads(beside.read_text())
    changed = [
        f"{name} was {begun.get(name)!r} and is {settings.get(name)!r}"
        for name in dict.fromkeys([*begun, *settings])
        if begun.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(f"{path} holds a run with other settings: {'; '.join(changed)}")
    with open(path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return scores


def mean_perplexity(scores: Sequence[Score]) -> tuple[float, float]:
    """exp of the mean loss of all maskable tokens of all documents, and its standard error.

    A document counts by its maskable tokens, however many of them were masked: it is a stratum of
    a stratified sample, of whose mean the documents' errors, which are independent, make the error.
    """
    maskable = sum(score.maskable for score in scores)
    loss = sum(score.loss * score.maskable for score in scores) / maskable
    error = math.hypot(*(score.loss_standard_error * score.maskable for score in scores)) / maskable
    return perplexity_of(loss, error)


def means_by_length(scores: Sequence[Score]) -> list[tuple[float, float]]:
    """(mean length in tokens, geometric mean of the perplexities) of documents of like length: of
    one length where several have each, else between one power of 2 and the next."""
    lengths = np.array([score.tokens for score in scores])
    losses = np.array([score.loss for score in scores])
    several = np.unique(lengths, return_counts=True)[1].min() > 1
    groups = lengths if several else np.ceil(np.log2(lengths))
    return [
        (
            float(lengths[groups == group].mean()),
            perplexity_of(losses[groups == group].mean(), 0)[0],
        )
        for group in np.unique(groups)
    ]


def check_plot(path: Path) -> None:
    """Raises ValueError or FileNotFoundError for a path that `plot_by_length` cannot write to."""
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{path}: a plot's name ends in one of {', '.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: {path.parent} is not a directory")


def plot_by_length(
    curves: Mapping[str, Sequence[Score]], path: Path, trained_length: int | None = None
) -> None:
    """Draw Figures 2 and 6: a point for each document, and `means_by_length` as a line.

    curves: name → scores, at least one each. path: see `check_plot`.
    trained_length: tokens of the longest sequence seen in training, drawn as a line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, scores) in enumerate(curves.items()):
        color = f"C{number}"
        lengths = np.array([score.tokens for score in scores])
        perplexities = [score.perplexity for score in scores]
        axes.plot(lengths, perplexities, ".", color=color, alpha=0.35, markersize=4)
        axes.plot(*zip(*means_by_length(scores), strict=True), "o-", color=color, label=name)
    if trained_length is not None:
        axes.axvline(trained_length, color="grey", linestyle="--", label="longest in training")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tokens of the text", ylabel="pseudo-perplexity")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
