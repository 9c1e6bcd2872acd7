"""What a pre-training run is told: one dataclass, its presets, YAML files and overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from neobert.config import NeoBERTConfig
from neobert.corpus import Source
from neobert.masking import SCHEMES
from neobert.settings import TrainingSettings, at_least, load, one_of, save_config

__all__ = ["PRESETS", "ModelShape", "PretrainConfig", "load_config", "save_config"]


@dataclass
class ModelShape:
    """As in `NeoBERTConfig`; the longest sequence is `PretrainConfig.max_length`."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    norm_eps: float = 1e-5
    embedding_init_range: float = 0.02
    decoder_init_range: float = 0.02


@dataclass
class MaskedLMSettings:
    """What is trained, and on what.

    output: directory for checkpoints, metrics and the loss curve. A run continues from the newest
        checkpoint in it.
    data: the mixture (see `Source`).
    tokenizer: directory or hub repository. None: that of prepared data or of `start_from`, or else
        a WordPiece of model.vocab_size pieces trained on the first documents.
    start_from: a checkpoint (directory, or hub repository, or a run's output for its newest one)
        whose weights, and optimizer state if it has one, the run starts from; its data and schedule
        start anew. Stage 2 does.
    max_length: most tokens in a sequence; split_documents: cut a longer document into several
        sequences instead of dropping its end.
    bin_tokens, batch_bins: a step trains on batch_bins bins of bin_tokens packed tokens each.
    micro_batch_bins: bins in one forward pass. Neither it nor the number of processes changes what
        a step computes, only memory and speed; their product divides batch_bins.
    padded: padded batches of the same sequences, for comparison.
    mask_rate, mask_scheme: see `Masking`.
    fused_epilogues: compute blocks with their norms, rotation, SwiGLU and residual adds in the
        GEMMs' epilogues (`neobert.fused`); a GPU's kernels, not yet timed on one.
    validation_documents: how many documents of each source are held out; validate_every: steps.
    """

    output: str = "???"
    data: list[Source] = field(default_factory=list)
    tokenizer: str | None = None
    model: ModelShape = field(default_factory=ModelShape)
    start_from: str | None = None

    max_length: int = 1024
    split_documents: bool = False
    bin_tokens: int = 32 * 1024
    batch_bins: int = 64
    micro_batch_bins: int = 1
    padded: bool = False
    mask_rate: float = 0.2
    mask_scheme: str = "mask"
    seed: int = 0

    fused_epilogues: bool = False

    validation_documents: int = 0
    validate_every: int = 1000


# Of two bases the last one's fields come first, in YAML and as arguments.
@dataclass
class PretrainConfig(TrainingSettings, MaskedLMSettings):
    """A masked-LM pre-training run. The defaults are the paper's first stage (§3.2, §3.3, App. A).

    See `MaskedLMSettings` and `TrainingSettings`.
    """

    def __post_init__(self):
        super().__post_init__()
        one_of(self, SCHEMES, "mask_scheme")
        at_least(self, 1, "max_length", "batch_bins", "micro_batch_bins", "validate_every")
        if self.bin_tokens < self.max_length:
            raise ValueError(
                f"bin_tokens must hold a sequence of max_length={self.max_length} tokens, got "
                f"{self.bin_tokens}"
            )

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step if every bin were full; 2,097,152 in the paper."""
        return self.bin_tokens * self.batch_bins

    def model_config(self) -> NeoBERTConfig:
        return NeoBERTConfig(**vars(self.model), max_length=self.max_length)


REFINEDWEB = "tiiuae/falcon-refinedweb"


def neobert_1024() -> PretrainConfig:
    """Stage 1: 1M steps of 2M tokens at 1,024, as the defaults."""
    return PretrainConfig(
        output="runs/neobert-1024",
        data=[Source(REFINEDWEB, "content", streaming=True)],
        tokenizer="google-bert/bert-base-uncased",
    )


def neobert_4096() -> PretrainConfig:
    """Stage 2: 50k more steps at 4,096 and the last learning rate, on longer documents."""
    return PretrainConfig(
        output="runs/neobert-4096",
        data=[
            Source(REFINEDWEB, "content", 0.2, streaming=True),
            Source(REFINEDWEB, "content", 0.4, min_tokens=1024, streaming=True),
            Source(REFINEDWEB, "content", 0.4, min_tokens=2048, streaming=True),
        ],
        start_from="???",
        max_length=4096,
        steps=50_000,
        lr=6e-5,
        warmup_steps=0,
        min_lr_ratio=1.0,
    )


def tiny() -> PretrainConfig:
    """Learns something on two CPU cores while one waits."""
    return PretrainConfig(
        output="runs/tiny",
        data=[Source("docstrings")],
        model=ModelShape(
            vocab_size=4096,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=384,
            # 0.02 suits a width of 768: here it would take twice the steps.
            embedding_init_range=0.5,
            decoder_init_range=0.08,
        ),
        max_length=128,
        split_documents=True,
        bin_tokens=2048,
        batch_bins=1,
        steps=2200,
        lr=2e-3,
        warmup_steps=100,
        precision="float32",
        validation_documents=200,
        validate_every=100,
        save_every=500,
    )


PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    "neobert-1024": neobert_1024,
    "neobert-4096": neobert_4096,
    "tiny": tiny,
}


def load_config(
    preset: str | None = None, file: Path | None = None, overrides: Iterable[str] = ()
) -> PretrainConfig:
    """The settings of a pre-training run; see `neobert.settings.load`."""
    return load(PretrainConfig, PRESETS, preset, file, overrides)
