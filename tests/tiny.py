"""A tiny checkpoint in the released layout, its tokenizer trained on this package's docstrings."""

from pathlib import Path

import neobert
from neobert.checkpoint import write_random_checkpoint
from neobert.config import NeoBERTConfig
from neobert.docstrings import docstrings
from neobert.wordpiece import train_tokenizer

MAX_LENGTH = 96
HIDDEN_SIZE = 128


def texts() -> list[str]:
    """A few hundred texts of very different lengths, a number of them beyond MAX_LENGTH tokens."""
    return list(docstrings(Path(neobert.__file__).parent))


def write_tiny_checkpoint(path: Path) -> Path:
    """Two layers of head_dim 64, ordinary random weights, and the tokenizer beside them."""
    config = NeoBERTConfig(
        vocab_size=1000,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=192,
        max_length=MAX_LENGTH,
    )
    write_random_checkpoint(path, config, outliers=False)
    train_tokenizer(texts(), vocab_size=1000, max_length=MAX_LENGTH).save_pretrained(path)
    return path
