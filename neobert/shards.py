"""Tokenized documents on disk: written once by `neobert prepare`, then read by memory map.

A directory holds `shards.json`, the tokenizer, and per shard two flat little-endian arrays:
NAME.tokens, the ids of its documents end to end without special tokens, and NAME.offsets,
(documents + 1,) int64, where each begins. A shard counts from the moment `shards.json` lists it,
which is replaced as a whole: a writer killed at any moment leaves what it had finished, and goes on
from there.
"""

from __future__ import annotations

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from neobert.files import replace_file
from neobert.text import TextTokenizer

INDEX = "shards.json"
FORMAT = 1
WHOLE = 1 << 40  # tokens: more than any document has
SHARD_TOKENS = 100_000_000  # 200 MB of uint16


class CorruptShardError(ValueError):
    """A file of a prepared directory is not what was written; the message names it."""


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a directory that `neobert prepare` has written, or begun to."""
    return (Path(path) / INDEX).is_file()


def _write_index(directory: Path, index: dict[str, Any]) -> None:
    replace_file(directory / INDEX, json.dumps(index, indent=1))


def prepare(
    directory: Path,
    batches: Callable[[Any], Iterable[tuple[list[str], Any]]],
    tokenizer: PreTrainedTokenizerBase,
    source: dict,
    total: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    show_progress_bar: bool | None = None,
) -> TokenShards:
    """Tokenize texts into `directory`, going on where an earlier call stopped.

    batches: batches(position) yields (texts, the position after them), from `position` on; None is
        the beginning. A position is anything JSON holds.
    source: what the texts are, for the record: an unfinished directory of another source, tokenizer
        or shard size is refused.
    total: the number of texts if it is known, for the progress bar.
    Raises ValueError if there is no token in all texts.
    """
    tokenize = TextTokenizer(tokenizer)
    dtype = np.dtype("<u2" if tokenize.vocab_size <= 1 << 16 else "<u4")
    header = {
        "format": FORMAT,
        "dtype": dtype.str,
        "vocab_size": tokenize.vocab_size,
        "prefix": tokenize.prefix,
        "suffix": tokenize.suffix,
        "tokenizer_crc32": _fingerprint(tokenize),
        "source": source,
        "shard_tokens": shard_tokens,
    }
    index = {**header, "complete": False, "position": None, "texts": 0, "shards": []}
    if is_prepared(directory):
        index = _read_index(directory)
        for key, value in header.items():
            if index.get(key) != value:
                raise ValueError(
                    f"{directory} was begun with another {key}: {index.get(key)!r}, now {value!r}; "
                    "choose another directory, or remove this one"
                )
    else:
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(directory)
        _write_index(directory, index)
    if not index["complete"]:
        with tqdm(
            total=total,
            initial=index["texts"],
            desc="prepare",
            unit="text",
            disable=None if show_progress_bar is None else not show_progress_bar,
        ) as progress:
            for shard in _shards(batches(index["position"]), tokenize, shard_tokens, progress):
                _write_shard(directory, index, *shard, dtype)
        index["complete"] = True
        if not index["shards"]:
            raise ValueError(f"there is no token in the texts of {source}")
        _write_index(directory, index)
    return TokenShards(directory)


def _shards(
    batches: Iterable[tuple[list[str], Any]], tokenize: TextTokenizer, tokens: int, progress: tqdm
) -> Iterator[tuple[list[list[int]], int, Any]]:
    """(documents, texts read for them, position after them), about `tokens` tokens at a time."""
    documents: list[list[int]] = []
    texts = held = 0
    position = None
    special = len(tokenize.prefix), tokenize.num_special - len(tokenize.prefix)
    for batch, position in batches:
        for ids in tokenize(batch, WHOLE)[0]:
            document = ids[special[0] : len(ids) - special[1]]
            if document:  # a text without a token teaches nothing
                documents.append(document)
                held += len(document)
        texts += len(batch)
        progress.update(len(batch))
        progress.set_postfix_str(f"{held:,} tokens in this shard", refresh=False)
        if held >= tokens:
            yield documents, texts, position
            documents, texts, held = [], 0, 0
    if documents:
        yield documents, texts, position


def _write_shard(
    directory: Path, index: dict, documents: list[list[int]], texts: int, position, dtype: np.dtype
) -> None:
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    offsets = np.concatenate(([0], lengths.cumsum())).astype("<i8")
    ids = np.concatenate([np.asarray(document, dtype) for document in documents])
    name = f"{len(index['shards']):05}"
    entry = {"name": name, "documents": len(documents), "tokens": len(ids)}
    for suffix, array in (("tokens", ids), ("offsets", offsets)):
        with open(directory / f"{name}.{suffix}", "wb") as file:
            file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        entry[f"{suffix}_crc32"] = zlib.crc32(array.data)
    index["shards"].append(entry)
    index["position"] = position
    index["texts"] += texts
    _write_index(directory, index)


def _fingerprint(tokenize: TextTokenizer) -> int:
    """Of what the ids mean; the tokenizer's file may say the same in other words one day."""
    vocabulary = sorted(tokenize.backend.get_vocab(with_added_tokens=True).items())
    return zlib.crc32(json.dumps([vocabulary, tokenize.prefix, tokenize.suffix]).encode())


def _read_index(directory: Path) -> dict:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptShardError(f"{path} is not JSON: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CorruptShardError(
            f"{path} is not of format {FORMAT}; was it written by this version?"
        )
    return index


class TokenShards:
    """The documents of a prepared directory: a sequence of (tokens,) arrays without special tokens.

    Opening it checks the length of every file; `check()` reads them all and compares checksums.
    Raises FileNotFoundError if nothing was prepared there, ValueError if `prepare` has not
    finished, and CorruptShardError for files that do not fit shards.json.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not is_prepared(self.directory):
            raise FileNotFoundError(f"{directory} has no {INDEX}: `neobert prepare` writes one")
        self.index = _read_index(self.directory)
        if not self.index["complete"]:
            raise ValueError(
                f"{directory} is not finished ({self.index['texts']:,} texts so far): run the same "
                "`neobert prepare` again and it goes on"
            )
        self.dtype = np.dtype(self.index["dtype"])
        self.vocab_size: int = self.index["vocab_size"]
        self.prefix: list[int] = self.index["prefix"]
        self.suffix: list[int] = self.index["suffix"]
        self.shards: list[dict] = self.index["shards"]
        self.starts = list(accumulate((each["documents"] for each in self.shards), initial=0))
        for shard in self.shards:
            self._check_size(shard, "tokens", shard["tokens"] * self.dtype.itemsize)
            self._check_size(shard, "offsets", (shard["documents"] + 1) * 8)
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def num_tokens(self) -> int:
        """Of all documents, special tokens not counted."""
        return sum(shard["tokens"] for shard in self.shards)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the ids are of."""
        return AutoTokenizer.from_pretrained(self.directory)

    def check_tokenizer(self, tokenize: TextTokenizer) -> None:
        """Raises ValueError if the ids are not this tokenizer's."""
        if _fingerprint(tokenize) != self.index["tokenizer_crc32"]:
            raise ValueError(
                f"{self.directory} was prepared with another tokenizer; use the one that lies in it"
            )

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, document: int) -> np.ndarray:
        """(tokens,) ids of one document; a view of the file."""
        number, tokens, start, end = self._find(document)
        ids = tokens[start:end]
        if ids.max() >= self.vocab_size:
            raise CorruptShardError(
                f"{self._path(number, 'tokens')}: document {document} has the id {ids.max()}, "
                f"beyond the vocabulary of {self.vocab_size}"
            )
        return ids

    def length(self, document: int) -> int:
        """Tokens of one document, special tokens not counted; does not read them."""
        _, _, start, end = self._find(document)
        return end - start

    def check(self) -> None:
        """Read every file and compare its checksum. Raises CorruptShardError, naming the file."""
        for number, shard in enumerate(tqdm(self.shards, desc="check", unit="shard", disable=None)):
            for suffix, array in zip(("tokens", "offsets"), self._shard(number), strict=True):
                if zlib.crc32(array.data) != shard[f"{suffix}_crc32"]:
                    raise CorruptShardError(f"{self._path(number, suffix)}: its checksum is wrong")

    def _find(self, document: int) -> tuple[int, np.ndarray, int, int]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        number = bisect_right(self.starts, document) - 1
        tokens, offsets = self._shard(number)
        place = document - self.starts[number]
        start, end = int(offsets[place]), int(offsets[place + 1])
        if not 0 <= start < end <= len(tokens):
            raise CorruptShardError(
                f"{self._path(number, 'offsets')}: document {document} is tokens {start} to {end} "
                f"of {len(tokens)}"
            )
        return number, tokens, start, end

    def _shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._open:
            self._open[number] = (
                np.memmap(self._path(number, "tokens"), self.dtype, "r"),
                np.memmap(self._path(number, "offsets"), "<i8", "r"),
            )
        return self._open[number]

    def _path(self, number: int, suffix: str) -> Path:
        return self.directory / f"{self.shards[number]['name']}.{suffix}"

    def _check_size(self, shard: dict, suffix: str, expected: int) -> None:
        path = self.directory / f"{shard['name']}.{suffix}"
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise CorruptShardError(
                f"{path} {state}; {INDEX} says {expected:,}. Copy it again, or prepare it anew"
            )
