"""Where documents come from: files, the hub, a prepared directory, or the standard library."""

from __future__ import annotations

import copy
import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetGenerationError

from neobert.docstrings import standard_library_docstrings
from neobert.locate import HUB_ID

DOCSTRINGS = "docstrings"
FILES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BATCH = 64  # texts tokenized at a time: what a change of source or a restart may read in vain


@dataclass
class Source:
    """One source of documents, and how often it is drawn from.

    path: a file or a glob pattern of files (.txt: a document a line; .jsonl; .parquet; each also
        .gz), a directory written by `neobert prepare`, a data set on the hub
        (tiiuae/falcon-refinedweb), or "docstrings", those of the Python standard library here.
    field: the column that holds the text ("text" for .txt).
    weight: how often a document is drawn from here, relative to the other sources.
    min_tokens: shorter documents (special tokens included, before truncation) are passed over.
    streaming: read in order as it arrives, not downloaded or indexed first. Documents are then
        shuffled only within a lane's window, and each lane reads files of its own, if there are
        at least as many files as lanes; else every lane reads everything and keeps its share.
    split, subset: of a data set on the hub.
    """

    path: str = ""
    field: str = "text"
    weight: float = 1.0
    min_tokens: int = 0
    streaming: bool = False
    split: str = "train"
    subset: str | None = None


def open_texts(source: Source) -> Dataset | IterableDataset:
    """The texts of a source that is not prepared, in the one column `source.field`.

    Raises FileNotFoundError for a path that is none of what `Source` says, and ValueError for files
    that cannot be read as their name says, for a missing column and for no document at all.
    """
    try:
        data = _load(source)
    except DatasetGenerationError as error:
        raise ValueError(f"{source.path} cannot be read: {error.__cause__ or error}") from error
    columns = data.column_names or list(next(iter(data), {}))
    if source.field not in columns and (columns or not isinstance(data, IterableDataset)):
        raise ValueError(
            f"{source.path} has no field {source.field!r}; it has {', '.join(map(repr, columns))}"
        )
    if isinstance(data, Dataset) and not len(data):
        raise ValueError(f"{source.path} has no documents")
    return data.select_columns([source.field])


def _load(source: Source) -> Dataset | IterableDataset:
    path = source.path
    if path == DOCSTRINGS:
        return Dataset.from_dict({"text": standard_library_docstrings()})
    kind, files = files_of_one_kind(path, FILES)
    if files:
        if not sum(Path(name).stat().st_size for name in files):
            raise ValueError(f"{path} has no documents: {len(files)} empty file(s)")
        return load_dataset(kind, data_files=files, split="train", streaming=source.streaming)
    if not HUB_ID.fullmatch(path) or Path(path).suffix in FILES:
        raise FileNotFoundError(
            f"{path!r} is neither a file, a pattern of files, a prepared directory, a data set on "
            f"the hub (owner/name) nor {DOCSTRINGS!r}"
        )
    return load_dataset(path, source.subset, split=source.split, streaming=source.streaming)


def files_of_one_kind(path: str, kinds: Mapping[str, str]) -> tuple[str, list[str]]:
    """The files that `path` names or matches, sorted, and their kind; none of a path that is no
    file. kinds: kind by suffix, which .gz may follow. Raises ValueError for several kinds."""
    files = sorted(glob.glob(path, recursive=True))
    found = {kinds.get(Path(name.removesuffix(".gz")).suffix, "") for name in files}
    if len(found) > 1 or "" in found:
        raise ValueError(
            f"{path}: the files must all be of one kind, one of {', '.join(kinds)}, each also .gz; "
            f"got {', '.join(files[:3])}"
        )
    return "".join(found), files


def text_batches(
    data: Dataset | IterableDataset, field: str, position: Any = None
) -> Iterator[tuple[list[str], Any]]:
    """(texts, the position after them), BATCH at a time, from `position` on; None is the start.

    Raises ValueError, with the document's number or place, for a text that is not a string.
    """
    if isinstance(data, Dataset):
        for start in range(position or 0, len(data), BATCH):
            end = min(start + BATCH, len(data))
            texts = data[start:end][field]
            for number, text in enumerate(texts, start):
                check_text(text, field, number)
            yield texts, end
        return
    data = copy.deepcopy(data)
    if position is not None:
        data.load_state_dict(position)
    records = iter(data)
    while texts := [record[field] for record in islice(records, BATCH)]:
        position = copy.deepcopy(data.state_dict())
        for text in texts:
            check_text(text, field, f"before {position}")
        yield texts, position


def check_text(text: object, field: str, where: int | str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} of document {where} is not a string: {text!r:.80}")


def lane_of_stream(data: IterableDataset, lane: int, lanes: int) -> IterableDataset:
    """The part of a stream that belongs to one lane; the parts are disjoint."""
    if data.num_shards >= lanes:
        return data.shard(lanes, lane, contiguous=False)
    return split_dataset_by_node(data, lane, lanes)  # one example in `lanes`
