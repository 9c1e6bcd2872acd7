"""What the contestants are given: batches of random ids, or of made-up texts, of many lengths."""

import re
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

Kind = Literal["fixed", "normal", "lognormal", "strings", "short"]
PATTERN = re.compile(r"(fixed|normal|lognormal|strings|short)-([1-9]\d*)")

RAGGED_TEXTS = 32  # in a batch of different lengths on a CPU, and in the smallest one on a GPU
SHORTEST, QUERY = 4, 32  # tokens of a text, and of the longest query
FIRST_ID = 5  # below are the special tokens
LONGEST_BATCH = 512  # texts: the paper's


@dataclass(frozen=True)
class Workload:
    """One column of the table. `number` is the limit in tokens, for "short" the batch in texts.

    fixed: every text has as many tokens as the limit, as in the paper.
    normal: mean of half the limit, standard deviation of an eighth (ModernBERT's Table 2).
    lognormal: median 300, sigma 1.1: the lengths of real corpora, many short and a few long.
    strings: the same texts from str to the first token's vector on the host, tokenizing included.
    short: queries of 4 to 32 tokens, timed one batch at a time.

    All are clipped to between 4 tokens and the limit.
    """

    kind: Kind
    number: int

    @classmethod
    def parse(cls, name: str) -> "Workload":
        """From a name such as "lognormal-512"; raises ValueError for others."""
        match = PATTERN.fullmatch(name)
        if match is None:
            raise ValueError(
                "a workload is named fixed-, normal-, lognormal- or strings- and a length in "
                f"tokens, or short- and a number of texts (fixed-512, short-1), got {name!r}"
            )
        kind: Kind = match[1]  # type: ignore[assignment]
        return cls(kind, int(match[2]))

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}"

    @property
    def limit(self) -> int:
        """The most tokens of a text."""
        return QUERY if self.kind == "short" else self.number

    @property
    def ragged(self) -> bool:
        return self.kind in ("normal", "lognormal", "strings")

    def batches(self, device: str) -> list[int]:
        """The batch sizes to try, in texts: doubled from 1 to 512 as in the paper. Of different
        lengths on a CPU, 32 as they come."""
        if self.kind == "short":
            return [self.number]
        if not self.ragged:
            return [2**i for i in range(10)]
        texts, sizes = RAGGED_TEXTS, []
        while texts <= (RAGGED_TEXTS if device == "cpu" else LONGEST_BATCH):
            sizes.append(texts)
            texts *= 2
        return sizes

    def lengths(self, texts: int) -> list[int]:
        """Token counts of `texts` texts; always the same, and the first ones of a larger batch."""
        if self.kind == "fixed":
            return [self.number] * texts
        random = np.random.default_rng(0)
        drawn: np.ndarray
        if self.kind == "short":
            # One of every batch has the full length: all batches of 64 are padded alike.
            drawn = random.integers(SHORTEST, QUERY + 1, texts)
            drawn[0] = QUERY
        elif self.kind == "normal":
            drawn = random.normal(self.number / 2, self.number / 8, texts)
        else:
            drawn = random.lognormal(np.log(300), 1.1, texts)
        # Not float: numpy's clip keeps 511.9, which is no length.
        return [int(n) for n in drawn.clip(min(SHORTEST, self.limit), self.limit)]


def random_ids(lengths: list[int], vocab: int) -> list[list[int]]:
    """Ids of ordinary tokens, a list for each length."""
    random = np.random.default_rng(1)
    return [random.integers(FIRST_ID, vocab, n).tolist() for n in lengths]


STEMS = ["".join(letters) for letters in product("bdfgklmnprstvz", "aeiou", repeat=2)]
ENDINGS = ["".join(letters) for letters in product("bdfgklmnprstvz", "aeiou", "lmnrst")]
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def made_up_words(vocab: int) -> tuple[list[str], list[str]]:
    """Stems and endings of a made-up language, which a vocabulary of `vocab` pieces holds."""
    endings = ENDINGS[: vocab // 10]
    return STEMS[: vocab - len(SPECIAL) - len(endings)], endings


def made_up_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of at most `vocab` pieces that does a BERT tokenizer's work: split at
    spaces and punctuation, cut words into pieces, add [CLS] and [SEP]. It needs no download."""
    stems, endings = made_up_words(vocab)
    pieces = [*SPECIAL.values(), *stems, *(f"##{ending}" for ending in endings)]
    ids = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(WordPiece(ids, unk_token=SPECIAL["unk"]))
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single=f"{SPECIAL['cls']} $A {SPECIAL['sep']}",
        special_tokens=[(SPECIAL[name], ids[SPECIAL[name]]) for name in ("cls", "sep")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    )


def made_up_texts(lengths: list[int], vocab: int) -> list[str]:
    """Texts that `made_up_tokenizer(vocab)` turns into just these numbers of tokens, [CLS] and
    [SEP] among them. Every third word has two pieces, as in English."""
    random = np.random.default_rng(2)
    stems, endings = made_up_words(vocab)

    def text(tokens: int) -> str:
        words: list[str] = []
        left = tokens - 2
        while left > 0:
            word = stems[random.integers(len(stems))]
            if left > 1 and len(words) % 3 == 2:
                word += endings[random.integers(len(endings))]
                left -= 1
            words.append(word)
            left -= 1
        return " ".join(words)

    return [text(n) for n in lengths]
