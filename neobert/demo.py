"""`python -m neobert.demo`: what this package does, on this machine, in under three minutes.

It needs no network. The docstrings of the installed Python's standard library are the texts: a
few words to a few pages each, as texts are. A WordPiece tokenizer is trained on them, and a
full-size NeoBERT with random weights is written to disk in the released format (or --model names a
real checkpoint). Then the same texts go through plain PyTorch, padded, and through `Encoder`.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 30522
# The first ids of BERT's vocabulary: [PAD] is 0, [UNK] 100, [CLS] 101, [SEP] 102 and [MASK] 103.
UNUSED = [f"[unused{index}]" for index in range(99)]
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of all modules, classes and functions under `folder`, without importing any."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if {"site-packages", "dist-packages", "test", "tests"} & set(parts):
            continue
        try:
            with warnings.catch_warnings():  # about escapes in other people's code
                warnings.simplefilter("ignore")
                module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a file for 2to3 or for testing the parser
            continue
        for node in ast.walk(module):
            if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            ) and (text := ast.get_docstring(node)):
                yield text


def standard_library_docstrings() -> list[str]:
    """The distinct docstrings of the installed Python's standard library, in a fixed order."""
    return list(dict.fromkeys(docstrings(Path(sysconfig.get_path("stdlib")))))


def train_tokenizer(
    texts: list[str], vocab_size: int = VOCAB_SIZE, max_length: int = 4096
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer like BERT's, its special tokens at BERT's ids, trained on `texts`.

    Its vocabulary is smaller than `vocab_size` if the texts have too few words for so many.
    """
    learner = Tokenizer(WordPiece(unk_token=SPECIAL["unk"]))
    learner.normalizer = BertNormalizer()
    learner.pre_tokenizer = BertPreTokenizer()
    first = [SPECIAL["pad"], *UNUSED, *list(SPECIAL.values())[1:]]
    learner.train_from_iterator(
        texts,
        WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False),
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
