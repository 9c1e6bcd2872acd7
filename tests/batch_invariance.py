"""The same text in random batches of real text: `python tests/batch_invariance.py --help`.

test_batch_invariance.py does the same with fewer batches.
"""

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from neobert.checkpoint import write_random_checkpoint
from neobert.config import NeoBERTConfig
from neobert.docstrings import standard_library_docstrings
from neobert.encode import Encoder
from neobert.wordpiece import train_tokenizer

MAX_LENGTH = 160

docstrings = cache(standard_library_docstrings)


def real_texts(number: int) -> list[str]:
    """Docstrings from a few words to beyond MAX_LENGTH tokens, and the empty text."""
    return ["", *random.Random(0).sample(docstrings(), number - 1)]


def write_wide_checkpoint(folder: Path, layers: int) -> Path:
    """The released widths and outlier channel, fewer layers, a small vocabulary, a tokenizer."""
    config = NeoBERTConfig(vocab_size=4000, num_hidden_layers=layers, max_length=MAX_LENGTH)
    write_random_checkpoint(folder, config)
    tokenizer = train_tokenizer(docstrings(), config.vocab_size, MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    return folder


def differing_texts(
    encoder: Encoder,
    texts: Sequence[str],
    batches: int,
    threads: Sequence[int],
    largest: int = 12,
    seed: int = 0,
) -> int:
    """How many texts have, in one of so many random batches, other bits than alone.

    A batch is up to `largest` texts in random order, encoded by a random one of the numbers of
    threads in calls of the model of at most a random number of tokens.
    """
    rng, before = random.Random(seed), torch.get_num_threads()
    differing = set()
    for pooling, normalize in (("mean", False), ("cls", True)):
        alone = np.stack([encoder.encode(text, pooling, normalize) for text in texts])
        assert len({row.tobytes() for row in alone}) == len(texts), "the texts must differ"
        for _ in range(batches // 2):
            batch = rng.sample(range(len(texts)), rng.randint(1, largest))
            torch.set_num_threads(rng.choice(threads))
            budget = rng.choice([1, 50, 200, 4096])
            rows = encoder.encode([texts[i] for i in batch], pooling, normalize, max_tokens=budget)
            differing |= {i for i, row in zip(batch, rows, strict=True) if (row != alone[i]).any()}
        torch.set_num_threads(before)
    return len(differing)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--default", action="store_true", help="without batch_invariant=True")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_wide_checkpoint(Path(folder), arguments.layers)
        encoder = Encoder.from_pretrained(
            path, arguments.device, arguments.dtype, batch_invariant=not arguments.default
        )
    texts, start = real_texts(arguments.texts), time.perf_counter()
    warnings.simplefilter("ignore")  # of truncation
    found = differing_texts(encoder, texts, arguments.batches, [1, 2, 3])
    print(
        f"{vars(arguments)}: {found} of {len(texts)} texts ever had other bits than alone"
        f" ({time.perf_counter() - start:.0f} s)"
    )
    raise SystemExit(found > 0)


if __name__ == "__main__":
    main()
