"""What a contrastive run is told: one dataclass and its presets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from neobert.pairs import PairSource
from neobert.settings import TrainingSettings, at_least, load


@dataclass
class PairSettings:
    """What is trained, and on what.

    output: directory for checkpoints, metrics, the loss curve and, at the end, `model`. A run
        continues from the newest checkpoint in it.
    start_from: the pre-trained model: a checkpoint, a run of `neobert pretrain` (its newest), or a
        hub repository. Its tokenizer is used.
    data: the data sets (see `PairSource`), drawn with probability proportional to n^alpha.
    temperature: of the loss (see `info_nce`).
    batch_size: pairs in a step, of all processes together; each is a negative of the others.
    hard_negatives: of a pair's own negatives, how many are taken at most.
    max_length: most tokens of a text, its instruction included.
    max_tokens: tokens in one forward pass. Neither it nor the number of processes changes what a
        step computes, only memory and speed.
    """

    output: str = "???"
    start_from: str = "???"
    data: list[PairSource] = field(default_factory=list)

    alpha: float = 0.5
    temperature: float = 0.07
    batch_size: int = 1024
    hard_negatives: int = 1
    max_length: int = 512
    max_tokens: int = 32 * 1024
    seed: int = 0


# Of two bases the last one's fields come first, in YAML and as arguments.
@dataclass
class ContrastiveConfig(TrainingSettings, PairSettings):
    """A contrastive run. The defaults are the paper's (§5.2.1, Appendix D.2) where it says one:
    temperature, alpha and steps; the others are ours.

    See `PairSettings` and `TrainingSettings`; similarities are float32 in either precision.
    """

    steps: int = 2000
    lr: float = 2e-5
    warmup_steps: int = 200
    decay_fraction: float = 1.0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.01
    save_every: int = 500

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "batch_size")
        at_least(self, 0, "hard_negatives", "alpha")
        at_least(self, 1, "max_length", "max_tokens")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        titles = [source.title for source in self.data]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two data sets have the name {title!r}: give one another name")


def neobert() -> ContrastiveConfig:
    """The paper's recipe, for data of one's own or that of configs/contrastive-paper.yaml."""
    return ContrastiveConfig(output="runs/neobert-contrastive", start_from="chandar-lab/NeoBERT")


def tiny() -> ContrastiveConfig:
    """Names and docstrings, for the model of `neobert pretrain --preset tiny`: a minute or so on
    two CPU cores."""
    return ContrastiveConfig(
        output="runs/tiny-contrastive",
        start_from="runs/tiny",
        data=[PairSource("docstrings")],
        batch_size=64,
        max_length=64,
        max_tokens=4096,
        steps=300,
        lr=2e-3,
        warmup_steps=20,
        precision="float32",
        save_every=100,
    )


PRESETS: dict[str, Callable[[], ContrastiveConfig]] = {"neobert": neobert, "tiny": tiny}


def load_config(
    preset: str | None = None, file: Path | None = None, overrides: Iterable[str] = ()
) -> ContrastiveConfig:
    """The settings of a contrastive run; see `neobert.settings.load`."""
    return load(ContrastiveConfig, PRESETS, preset, file, overrides)
