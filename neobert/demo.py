"""`python -m neobert.demo`: what this package does, on this machine, in under three minutes.

It needs no network. The docstrings of the installed Python's standard library are the texts: a
few words to a few pages each, as texts are. A WordPiece tokenizer is trained on them, and a
full-size NeoBERT with random weights is written to disk in the released format (or --model names a
real checkpoint). Then the same texts go through plain PyTorch and through `Encoder`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from neobert.checkpoint import write_random_checkpoint
from neobert.config import NeoBERTConfig
from neobert.docstrings import standard_library_docstrings
from neobert.encode import Encoder, TruncationWarning
from neobert.plain import PlainNeoBERT
from neobert_kernels import _compiled

MAX_LENGTH = 512  # tokens; the rest of the few longer texts is cut off, for every contestant
BATCH = 32  # texts in a padded batch: sentence-transformers' default
WARM_UP_TOKENS = 500

VOCAB_SIZE = 30522
ALPHABET = 1000  # letters of a tokenizer at most, as BERT's trainer has it
# The first ids of BERT's vocabulary: [PAD] is 0, [UNK] 100, [CLS] 101, [SEP] 102 and [MASK] 103.
UNUSED = [f"[unused{index}]" for index in range(99)]
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def train_tokenizer(
    texts: list[str], vocab_size: int = VOCAB_SIZE, max_length: int = 4096
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer like BERT's, its special tokens at BERT's ids, trained on `texts`.

    Its vocabulary is smaller than `vocab_size` if the texts have too few words for so many. The
    same texts give the same tokenizer.
    """
    learner = Tokenizer(WordPiece(unk_token=SPECIAL["unk"]))
    learner.normalizer = BertNormalizer()
    learner.pre_tokenizer = BertPreTokenizer()
    # The trainer would number the inner letters in the random order of a hash table, and break ties
    # between pairs by those numbers.
    letters = Counter(BertNormalizer().normalize_str("\n".join(texts)))
    common = sorted(letters, key=lambda letter: (-letters[letter], letter))[:ALPHABET]
    inner = [f"##{letter}" for letter in common if not letter.isspace()]
    first = [SPECIAL["pad"], *UNUSED, *list(SPECIAL.values())[1:], *inner]
    learner.train_from_iterator(
        texts,
        WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=first,
            limit_alphabet=ALPHABET,
            show_progress=False,
        ),
    )
    # The trainer made every one of the first ids a special token; only five are.
    tokenizer = Tokenizer(WordPiece(learner.get_vocab(), unk_token=SPECIAL["unk"]))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    cls, sep = SPECIAL["cls"], SPECIAL["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, learner.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    )


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


@contextmanager
def step(what: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done, then what came of it and how long it took."""
    print(f"{what} … ", end="", flush=True)
    result = ""

    def done(text: str) -> None:
        nonlocal result
        result = text

    start = time.perf_counter()
    yield done
    print(f"{result} ({time.perf_counter() - start:.1f} s)")


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
    with warnings.catch_warnings(action="ignore", category=TruncationWarning):
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="neobert.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="checkpoint directory or hub repository")
    parser.add_argument("--seconds", type=float, default=3.5, help="of texts to embed, default 3.5")
    options = parser.parse_args(arguments)
    disable_progress_bar()  # transformers', for loading the weights
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {_compiled.status()}")
    with step("reading the docstrings of the standard library") as done:
        texts = standard_library_docstrings()
        done(f"{len(texts):,}, {sum(map(len, texts)) / 1e6:.1f} million characters")
    bfloat16 = torch.cuda.is_available() or _compiled.LOADED == "avx512_bf16"
    dtypes = ["float32", "bfloat16"] if bfloat16 else ["float32"]
    with tempfile.TemporaryDirectory(prefix="neobert-demo-") as temporary:
        if options.model is None:
            folder = Path(temporary)
            write_checkpoint(folder, texts)
        elif Path(options.model).is_dir():
            folder = Path(options.model)
        else:
            folder = Path(snapshot_download(options.model))
        print_table(demonstrate(folder, texts, dtypes, options.seconds))


if __name__ == "__main__":
    main()
