"""Semantic search: a folder of embedded texts, and exact search in it.

    index.json       the model, and how texts and queries are embedded
    texts.jsonl      the records, one a line
    embeddings.npy   (texts, dim) float32, row i of record i, of length 1

Search is one matrix product and a partial sort: no approximation, nothing to tune. A million texts
of 768 dimensions are 3 GB of memory, read once for each query.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neobert.encode import Encoder, TruncationWarning
from neobert.files import NpyWriter, replace_file
from neobert.sentence_folder import Pooling

INDEX, TEXTS, EMBEDDINGS = "index.json", "texts.jsonl", "embeddings.npy"
MOST_SCORES = 1 << 26  # held at once: 256 MiB of float32


@dataclass(frozen=True)
class IndexSettings:
    """How the texts of an index are embedded.

    model: checkpoint directory or hub repository. field: of the records, which holds the text.
    pooling, max_length: see `Encoder`. prompt, query_prompt: put before every text, every query.
    dtype: that the texts were embedded in; `build_index` fills it in, and the encoder's max_length
        where it is None.
    """

    model: str
    field: str = "text"
    pooling: Pooling = "mean"
    prompt: str = ""
    query_prompt: str = ""
    max_length: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Hit:
    """A record found: its number in the index, from 0, and the cosine of its text and the query."""

    number: int
    score: float
    record: dict[str, Any]


class Index:
    """An index in memory, with the encoder for queries.

    embeddings: (texts, dim) float32, rows of length 1.
    """

    def __init__(
        self,
        settings: IndexSettings,
        encoder: Encoder,
        records: list[dict[str, Any]],
        embeddings: Tensor,
    ):
        if embeddings.shape != (len(records), encoder.dim):
            raise ValueError(
                f"embeddings must be ({len(records)} records, {encoder.dim} of the model), got "
                f"{tuple(embeddings.shape)}"
            )
        self.settings, self.encoder = settings, encoder
        self.records, self.embeddings = records, embeddings

    @classmethod
    def load(cls, folder: str | Path, model: str | None = None, device: str | None = None) -> Index:
        """Read a folder that `build_index` wrote.

        model: in place of the one that the index names, if that has moved. device: of the encoder.
        Raises FileNotFoundError if the folder is not a finished index, ValueError if model and
        embeddings do not fit.
        """
        folder = Path(folder)
        if not (folder / INDEX).exists():
            raise FileNotFoundError(f"{folder} is not an index: it has no {INDEX}")
        settings = IndexSettings(**json.loads((folder / INDEX).read_text()))
        # In the dtype of the texts' embedding: bfloat16 rounding moves scores by a percent.
        encoder = Encoder.from_pretrained(
            model or settings.model, device, settings.dtype, settings.max_length
        )
        with open(folder / TEXTS, encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        return cls(settings, encoder, records, torch.from_numpy(np.load(folder / EMBEDDINGS)))

    def search(self, queries: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """For each query its `k` best records (all, if there are fewer), best first."""
        if isinstance(queries, str):
            raise TypeError(f"queries must be a list of str, got the str {queries!r:.80}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found = []
        for scores in self.scores(queries):
            best = scores.topk(min(k, len(self.records)), dim=1)
            for values, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append(
                    [Hit(n, s, self.records[n]) for n, s in zip(numbers, values, strict=True)]
                )
        return found

    def scores(self, queries: Sequence[str]) -> Iterator[Tensor]:
        """Cosines of queries and texts, (queries, texts) float32, a block of queries at a time."""
        with truncation_expected():
            vectors = self.encoder.encode(
                queries,
                self.settings.pooling,
                normalize=True,
                prompt=self.settings.query_prompt,
                show_progress_bar=False,
            )
        for block in torch.as_tensor(vectors).split(max(1, MOST_SCORES // len(self.records))):
            yield block @ self.embeddings.T


@contextmanager
def truncation_expected() -> Iterator[None]:
    """Within, nothing warns that a text is longer than the model reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        yield


def build_index(
    folder: str | Path,
    records: Iterable[dict[str, Any]],
    encoder: Encoder,
    settings: IndexSettings,
    show_progress_bar: bool | None = None,
    total: int | None = None,
) -> tuple[int, int]:
    """Embed the texts of `records` and write an index; how many there are, and how many records
    were passed over because their text is blank.

    An index in `folder` is replaced; until index.json is there again, the folder is none.
    Memory stays bounded however many records there are. `total`: their number, if it is known.
    Raises ValueError if no record has a text.
    """
    settings = replace(
        settings,
        dtype=str(encoder.dtype).removeprefix("torch."),
        max_length=encoder.max_length if settings.max_length is None else settings.max_length,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    blank = 0
    with (
        open(folder / TEXTS, "w", encoding="utf-8") as lines,
        NpyWriter(folder / EMBEDDINGS) as writer,
    ):

        def texts() -> Iterator[str]:
            nonlocal blank
            for record in records:
                text = record[settings.field]
                if text.strip():
                    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
                    yield text
                else:
                    blank += 1

        stream = encoder.encode_stream(
            texts(),
            settings.pooling,
            normalize=True,
            prompt=settings.prompt,
            max_length=settings.max_length,
            show_progress_bar=show_progress_bar,
            total=total,
        )
        with closing(stream):
            for rows in stream:
                writer.write(rows.cpu().numpy())
        if not writer.rows:
            raise ValueError(f"no text to index: {blank} blank ones")
    replace_file(folder / INDEX, json.dumps(asdict(settings), indent=1) + "\n")
    return writer.rows, blank
