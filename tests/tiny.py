"""A tiny checkpoint in the released layout, its tokenizer trained on this package's docstrings."""

from pathlib import Path

import torch

import neobert
from neobert import NeoBERTConfig, NeoBERTLMHead
from neobert.demo import docstrings, train_tokenizer

MAX_LENGTH = 96
HIDDEN_SIZE = 128


def texts() -> list[str]:
    """A few hundred texts of very different lengths, a number of them beyond MAX_LENGTH tokens."""
    return list(docstrings(Path(neobert.__file__).parent))


def write_tiny_checkpoint(path: Path) -> Path:
    """Two layers of head_dim 64; random weights of an ordinary size, so that texts differ."""
    torch.manual_seed(0)
    config = NeoBERTConfig(
        vocab_size=1000,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=192,
        max_length=MAX_LENGTH,
        embedding_init_range=1.0,
        decoder_init_range=0.1,
    )
    NeoBERTLMHead(config).save_pretrained(path)
    train_tokenizer(texts(), vocab_size=1000, max_length=MAX_LENGTH).save_pretrained(path)
    return path
