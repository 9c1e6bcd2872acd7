"""The demo's table: the same texts through plain PyTorch and through `Encoder`.

The docstrings of the installed Python's standard library are the texts: a few words to a few pages
each, as texts are. A WordPiece tokenizer is trained on them, and a full-size NeoBERT with random
weights is written to disk in the released format, unless there is a real checkpoint.
"""

from __future__ import annotations

import random
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from neobert.checkpoint import write_random_checkpoint
from neobert.config import NeoBERTConfig
from neobert.encode import Encoder, TruncationWarning
from neobert.plain import PlainNeoBERT
from neobert.stopwatch import step
from neobert.wordpiece import train_tokenizer

MAX_LENGTH = 512  # tokens; the rest of the few longer texts is cut off, for every contestant
BATCH = 32  # texts in a padded batch: sentence-transformers' default
WARM_UP_TOKENS = 500


def write_checkpoint(folder: Path, texts: list[str], config: NeoBERTConfig | None = None) -> None:
    """A random checkpoint in the released format, with a tokenizer trained on `texts`."""
    config = config or NeoBERTConfig()
    with step(f"training a WordPiece tokenizer on {len(texts):,} docstrings") as done:
        tokenizer = train_tokenizer(texts, config.vocab_size, config.max_length)
        tokenizer.save_pretrained(folder)
        done(f"{len(tokenizer):,} word pieces")
    with step("writing a NeoBERT of random weights in the released format") as done:
        # Without the trained model's one huge channel: it would hide differences in the others.
        write_random_checkpoint(folder, config, outliers=False)
        size = (folder / "model.safetensors").stat().st_size
        done(f"{config.num_hidden_layers} layers, {size / 1e6:,.0f} MB")


def spread(texts: list[str], lengths: list[int], tokens: float) -> list[str]:
    """About `tokens` tokens of `texts` with the same spread of lengths, in random order."""
    by_length = sorted(range(len(texts)), key=lengths.__getitem__)
    count = max(1, min(len(texts), round(tokens * len(texts) / sum(lengths))))
    chosen = [by_length[int((i + 0.5) * len(texts) / count)] for i in range(count)]
    random.Random(0).shuffle(chosen)
    return [texts[index] for index in chosen]


@dataclass(frozen=True)
class Run:
    """One way to embed the texts: (texts, dim) float32 embeddings, tokens, and wall seconds.

    Live tokens are those of the texts; the computed ones include padding.
    """

    dtype: str
    name: str
    embeddings: Tensor
    live: int
    computed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Live tokens per second."""
        return self.live / self.seconds


@torch.inference_mode()
def run_padded(
    name: str, batch: int, model: PlainNeoBERT, encoder: Encoder, texts: list[str]
) -> Run:
    """Embed with plain PyTorch, `batch` texts at a time as they come, padded to the longest."""
    embeddings = []
    live = computed = 0
    start = time.perf_counter()
    with tqdm(total=len(texts), desc=name, unit="text") as progress:
        for first in range(0, len(texts), batch):
            inputs = encoder.tokenizer(
                texts[first : first + batch],
                padding=True,
                truncation=True,
                max_length=encoder.max_length,
                return_tensors="pt",
            ).to(encoder.device)
            mask = inputs["attention_mask"].unsqueeze(-1)
            hidden = model(inputs["input_ids"], inputs["attention_mask"]).float()
            embeddings.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
            live += int(mask.sum())
            computed += mask.numel()
            rate = live / (time.perf_counter() - start)
            progress.set_postfix_str(f"{rate:,.0f} tok/s", refresh=False)
            progress.update(len(hidden))
    seconds = time.perf_counter() - start
    return Run(_name(encoder.dtype), name, torch.cat(embeddings), live, computed, seconds)


def run_packed(encoder: Encoder, texts: list[str]) -> Run:
    """Embed with this package, a progress bar and all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        embeddings = encoder.encode(texts, show_progress_bar=True)
    stats = encoder.stats
    return Run(
        _name(encoder.dtype),
        "neobert.Encoder",
        torch.from_numpy(embeddings),
        stats.tokens,
        stats.tokens,
        stats.seconds,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def compare(encoder: Encoder, folder: Path, texts: list[str]) -> list[Run]:
    """The same texts through plain PyTorch, padded and one at a time, and through `encoder`."""
    packed = run_packed(encoder, texts)
    plain = PlainNeoBERT.load(folder, encoder.dtype).to(encoder.device)
    plain(torch.full((1, 128), 100, device=encoder.device))  # warm up, as the encoder is
    return [
        run_padded(f"plain, {BATCH} at a time", BATCH, plain, encoder, texts),
        run_padded("plain, one at a time", 1, plain, encoder, texts),
        packed,
    ]


def print_table(runs: list[Run]) -> None:
    """The runs of each dtype in turn, the first of all being the reference for differences."""
    reference = runs[0].embeddings
    scale = reference.abs().max()
    header = f"{'':<9} {'':<25} {'tok/s':>8} {'speed':>7} {'padding':>8} {'difference':>11}"
    print(f"\n{header}\n{'-' * len(header)}")
    for run in runs:
        first = next(each for each in runs if each.dtype == run.dtype)
        difference = ((run.embeddings - reference).abs().max() / scale).item()
        print(
            f"{run.dtype if run is first else '':<9} {run.name:<25} {run.rate:>8,.0f} "
            f"{run.rate / first.rate:>6.1f}x {1 - run.live / run.computed:>8.0%} "
            + (f"{difference:>11.1e}" if run is not runs[0] else f"{'reference':>11}")
        )
    print(
        f"\ntok/s       tokens of the texts themselves per second, tokenizing included"
        f"\nspeed       against plain PyTorch in the same dtype, padded, {BATCH} texts at a time"
        f"\npadding     share of the computed tokens that was padding: none with one at a time,"
        f"\n            and next to none where a large corpus is sorted by length"
        f"\ndifference  largest in any embedding, relative to the largest value, {scale:.3g}"
    )


def demonstrate(folder: Path, texts: list[str], dtypes: list[str], seconds: float) -> list[Run]:
    """Load the checkpoint in `folder` in each dtype, and compare on about `seconds` of texts."""
    runs: list[Run] = []
    chosen: list[str] = []
    for dtype in dtypes:
        with step(f"loading it with Encoder.from_pretrained(dtype={dtype!r})") as done:
            encoder = Encoder.from_pretrained(str(folder), dtype=dtype, max_length=MAX_LENGTH)
            ids = encoder.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
            lengths = list(map(len, ids))
            for _ in range(2):  # the first warms up, the second says how fast this machine is
                encoder.encode(spread(texts, lengths, WARM_UP_TOKENS), show_progress_bar=False)
            done(f"on {encoder.device}")
        if not chosen:
            tokens = seconds * encoder.stats.tokens_per_second
            chosen = spread(texts, lengths, max(tokens, WARM_UP_TOKENS))
            print(
                f"embedding {len(chosen):,} docstrings of all lengths, cut at {MAX_LENGTH} tokens"
            )
        runs += compare(encoder, folder, chosen)
    return runs
