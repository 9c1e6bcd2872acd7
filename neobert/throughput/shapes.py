"""Who takes part in the throughput table: shapes as published, and what a token costs them."""

from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["bert", "roberta", "modernbert", "nomic_bert", "neobert"]


@dataclass(frozen=True)
class Shape:
    """An encoder's size.

    intermediate: width of the feed-forward layer; of NeoBERT the nominal one, whose SwiGLU is two
        thirds as wide.
    max_length: the most tokens of a sequence.
    window: how many tokens to either side a local layer attends to; None if all layers are global.
    global_every: of `global_every` layers the first is global, if there is a window.
    """

    family: Family
    vocab: int
    dim: int
    layers: int
    heads: int
    intermediate: int
    max_length: int
    window: int | None = None
    global_every: int = 1

    @property
    def linear_weights(self) -> int:
        """Weights of the matrix products of all layers: a token takes part in each once."""
        attention = 4 * self.dim**2
        if self.family == "neobert":
            width = -(-int(2 * self.intermediate / 3) // 8) * 8
            return self.layers * (attention + 3 * self.dim * width)
        gated = self.family in ("modernbert", "nomic_bert")
        return self.layers * (attention + (3 if gated else 2) * self.dim * self.intermediate)

    def flop(self, lengths: list[int]) -> int:
        """Floating-point operations of the forward pass that sequences of these lengths need.

        Two per weight and token, and 4 * dim per layer and pair of tokens that attend: local
        layers count only the pairs within their window, whatever the implementation computes.
        Element-wise work is not counted. For NeoBERT: 396.4 M + 86,016 * length per token.
        """
        every_pair = sum(n * n for n in lengths)
        near = every_pair
        if self.window is not None:
            near = sum(pairs_within(n, self.window) for n in lengths)
        layers_global = -(-self.layers // self.global_every)
        pairs = layers_global * every_pair + (self.layers - layers_global) * near
        return 2 * self.linear_weights * sum(lengths) + 4 * self.dim * pairs


def pairs_within(length: int, window: int) -> int:
    """Ordered pairs of tokens at most `window` apart in a sequence of `length` tokens."""
    reach = max(0, min(window, length - 1))
    return length * (2 * reach + 1) - reach * (reach + 1)


@dataclass(frozen=True)
class Contestant:
    """A row of the table.

    variant: "plain", "compiled" or "ours" for NeoBERT; "transformers" for the others.
    size: the group it has in the paper's Table 10.
    share: of a CPU's time budget, relative to the others'. A GPU's time is in what all have to go
        through, and shared evenly.
    paper: Table 10's figures for it, 10³ tokens per second by length.
    """

    name: str
    label: str
    size: str
    shape: Shape
    share: float
    variant: Literal["transformers", "plain", "compiled", "ours"] = "transformers"
    paper: tuple[float, ...] = ()


_BERT = Shape("bert", 30522, 768, 12, 12, 3072, 512)
_ROBERTA = replace(_BERT, family="roberta", vocab=50265)
_MODERNBERT = Shape("modernbert", 50368, 768, 22, 12, 1152, 8192, window=64, global_every=3)
_NOMIC = Shape("nomic_bert", 30528, 768, 12, 12, 3072, 2048)
# Trained on 4,096 positions. Its table of rotations is made longer here, as in the paper, whose
# longest inputs have 8,192 tokens: the speed is that of a model extended by YaRN.
_NEOBERT = Shape("neobert", 30522, 768, 28, 12, 3072, 8192)


def _contestants() -> list[Contestant]:
    def large(shape: Shape, layers: int = 24, intermediate: int = 4096) -> Shape:
        return replace(shape, dim=1024, layers=layers, heads=16, intermediate=intermediate)

    modernbert_large = large(_MODERNBERT, layers=28, intermediate=2624)
    # In the order in which they run: what one leaves of its share goes to those after it. Shares
    # are about the seconds that the CPU's workloads take on two cores, compiling among them.
    ours = Contestant("neobert", "NeoBERT, neobert-kernels", "medium", _NEOBERT, 120, "ours")
    return [
        replace(ours, paper=(24.5, 22.2, 20.5, 17.2, 13.0)),
        Contestant("neobert-plain", "NeoBERT, plain PyTorch", "medium", _NEOBERT, 110, "plain"),
        Contestant(
            "neobert-compiled", "NeoBERT, torch.compile", "medium", _NEOBERT, 230, "compiled"
        ),
        Contestant("bert-base", "BERT-base", "base", _BERT, 35, paper=(27.6,)),
        Contestant("roberta-base", "RoBERTa-base", "base", _ROBERTA, 35, paper=(24.9,)),
        replace(
            Contestant("modernbert-base", "ModernBERT-base", "base", _MODERNBERT, 50),
            paper=(25.4, 22.6, 17.2, 11.7, 6.8),
        ),
        Contestant("nomicbert", "NomicBERT", "base", _NOMIC, 45),
        Contestant("bert-large", "BERT-large", "large", large(_BERT), 50, paper=(19.5,)),
        Contestant("roberta-large", "RoBERTa-large", "large", large(_ROBERTA), 50, paper=(15.9,)),
        replace(
            Contestant("modernbert-large", "ModernBERT-large", "large", modernbert_large, 60),
            paper=(13.4, 11.4, 9.2, 6.5, 3.8),
        ),
    ]


CONTESTANTS = {each.name: each for each in _contestants()}
PAPER_LENGTHS = (512, 1024, 2048, 4096, 8192)
