"""Pairs for contrastive training: a query, a text that answers it, and texts that do not.

They are read from JSONL, Parquet or CSV files, from the hub, or from the standard library. What a
pair cannot be made of is left out, counted, and reported with its file and row.
"""

from __future__ import annotations

import csv
import gzip
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from neobert.corpus import DOCSTRINGS, files_of_one_kind
from neobert.docstrings import name_pairs
from neobert.locate import HUB_ID
from neobert.settings import nearest

FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
HELD_OUT = "held-out"
READ = 4096  # rows looked through at a time
NAMED = 5  # rows that a report names

EMPTY = "the query or the positive is empty"
NO_POSITIVE = "there is no positive"
NO_SCORE = "the score is not a number"
LOW_SCORE = "the score is below min_score"
# These leave out a negative, not its pair.
EMPTY_NEGATIVE = "a negative is empty"
FALSE_NEGATIVE = "a negative is the positive or the query itself"


@dataclass
class PairSource:
    """One data set of pairs. A batch is of one data set, so that its negatives are of its kind.

    path: a file or a glob pattern of files (.jsonl; .parquet; .csv; each also .gz), a data set on
        the hub (sentence-transformers/gooaq), or "docstrings": names of the Python standard
        library and what documents them (split "train" or "held-out").
    name: of the data set in metrics, and of its prompt in the model folder. By default that of the
        file, of the folder whose files a pattern matches, or of the hub data set.
    query, positive: the columns of the texts. A list of texts as positive: one is drawn each time.
    negatives: columns of texts, or lists of texts, that are near the query and do not answer it.
    columns: the columns' names, for a CSV file that has no first line of them.
    score, min_score: a column with numbers; only pairs with at least `min_score` are taken.
    instruction: goes before every query; symmetric: before the other texts too, as where query and
        positive are texts of a kind and an evaluation does not tell them apart.
    split, subset: of a data set on the hub.
    """

    path: str = ""
    name: str = ""
    query: str = "query"
    positive: str = "positive"
    negatives: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    score: str | None = None
    min_score: float = 0.0
    instruction: str = ""
    symmetric: bool = False
    split: str = "train"
    subset: str | None = None

    @property
    def title(self) -> str:
        fixed = [part for part in Path(self.path).parts if not set("*?[") & set(part)]
        return self.name or (Path(fixed[-1]).name.split(".")[0] if fixed else "") or self.path

    @property
    def prompt(self) -> str:
        """What goes before the texts that have the instruction; "" without one."""
        return f"{self.instruction} " if self.instruction else ""


@dataclass(frozen=True)
class Pair:
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


class Pairs:
    """The usable pairs of a source: `pairs[numbers]` reads some, `len(pairs)` is how many.

    left_out: for each reason, how many rows, and the first NAMED of them as "file, row 7"; rows
        are counted from 1, without a first line of column names.
    All rows are looked through once, here. Raises FileNotFoundError for a path that is none of
    what `PairSource` says; ValueError for files that cannot be read as their name says, for a
    missing column (with the nearest name), for a text that is not a text, naming file and row, and
    if no pair is left.
    """

    def __init__(self, source: PairSource):
        self.source = source
        tables = _open(source)
        for place, table in tables:
            _check_columns(source, place, table)
        used = [source.query, source.positive, *source.negatives]
        used += [source.score] if source.score else []
        self.places = [place for place, _ in tables]
        self.starts = [0, *accumulate(len(table) for _, table in tables)]
        parts = [table.select_columns(list(dict.fromkeys(used))) for _, table in tables]
        self.data = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
        self.left_out: dict[str, tuple[int, list[str]]] = {}
        self.rows = np.fromiter(self._usable(), np.int64)
        if not len(self.rows):
            raise ValueError(f"{source.path} has no usable pair: {self.report()}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: Sequence[int]) -> list[Pair]:
        rows = self.data[[int(self.rows[number]) for number in numbers]]
        return [self._pair(row)[0] for row in _as_rows(rows)]

    def where(self, row: int) -> str:
        """Row `row` of the data as a reader finds it: its file, and its number there from 1."""
        table = bisect_right(self.starts, row) - 1
        return f"{self.places[table]}, row {row - self.starts[table] + 1}"

    def report(self) -> str:
        """One line: how many pairs there are, and what was left out where."""
        parts = [f"{self.source.title}: {len(self.rows):,} pairs of {len(self.data):,} rows"]
        for reason, (count, places) in self.left_out.items():
            some = "; ".join(places) + ("; …" if count > len(places) else "")
            # A low score is no fault that someone would look up.
            parts.append(f"{count:,} where {reason}" + (f" ({some})" * (reason != LOW_SCORE)))
        return ", left out: ".join([parts[0], ", ".join(parts[1:])]) if parts[1:] else parts[0]

    def _usable(self) -> Iterator[int]:
        """The rows that pairs can be made of; the others are counted."""
        for start in range(0, len(self.data), READ):
            rows = self.data[start : min(start + READ, len(self.data))]
            for number, row in enumerate(_as_rows(rows), start):
                try:
                    pair, reasons = self._pair(row)
                except TypeError as error:
                    raise ValueError(f"{self.where(number)}: {error}") from None
                for reason in dict.fromkeys(reasons):
                    count, places = self.left_out.get(reason, (0, []))
                    if count < NAMED:
                        places = [*places, self.where(number)]
                    self.left_out[reason] = count + 1, places
                if pair.positives:
                    yield number

    def _pair(self, row: dict[str, Any]) -> tuple[Pair, list[str]]:
        """The pair of a row, which has no positives if it is to be left out, and what is wrong."""
        source = self.source
        nothing = Pair("", (), ())
        if source.score:
            score = _number(row[source.score])
            if score is None:
                return nothing, [NO_SCORE]
            if score < source.min_score:
                return nothing, [LOW_SCORE]
        query = _texts(row, source.query)
        positives = _texts(row, source.positive)
        if not positives:
            return nothing, [NO_POSITIVE]
        positives = [text for text in positives if text.strip()]
        if len(query) != 1 or not query[0].strip() or not positives:
            return nothing, [EMPTY]
        negatives, reasons = [], []
        for column in source.negatives:
            for text in _texts(row, column):
                if not text.strip():
                    reasons.append(EMPTY_NEGATIVE)
                elif text in positives or text == query[0]:
                    reasons.append(FALSE_NEGATIVE)
                else:
                    negatives.append(text)
        return Pair(query[0], tuple(positives), tuple(negatives)), reasons


def prompts_of(sources: Iterable[PairSource]) -> dict[str, str]:
    """{name: prompt} of a model trained on `sources`: each one's by its name; "query" if all have
    the same; "document" if all were trained alike there, nothing or the same, so that whoever
    evaluates the model does as was done in training."""
    sources = list(sources)
    prompts = {source.title: source.prompt for source in sources}
    same = len(set(prompts.values())) == 1
    if same:
        prompts.setdefault("query", sources[0].prompt)
    if not any(source.symmetric for source in sources):
        prompts.setdefault("document", "")
    elif same and all(source.symmetric for source in sources):
        prompts.setdefault("document", sources[0].prompt)
    return prompts


def _texts(row: dict[str, Any], column: str) -> list[str]:
    """The texts, none or one or several, in a column of a row."""
    value = row[column]
    values = value if isinstance(value, list) else [] if value is None else [value]
    for each in values:
        if not isinstance(each, str):
            raise TypeError(f"column {column!r} is not a text: {each!r:.80}")
    return values


def _number(value: object) -> float | None:
    try:
        number = float(cast(Any, value))
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number


def _as_rows(columns: dict[str, list]) -> Iterator[dict[str, Any]]:
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _open(source: PairSource) -> list[tuple[str, Dataset]]:
    """(file or data set, its rows) of each file."""
    path = source.path
    if path == DOCSTRINGS:
        if source.split not in ("train", HELD_OUT):
            raise ValueError(f"split of {path} is 'train' or {HELD_OUT!r}, got {source.split!r}")
        queries, positives = zip(*name_pairs(source.split == HELD_OUT), strict=True)
        columns = {source.query: list(queries), source.positive: list(positives)}
        return [(path, Dataset.from_dict(columns))]
    kind, files = files_of_one_kind(path, FILES)
    if source.columns and kind != "csv":
        raise ValueError(f"{path}: only a CSV file can be without the names of its columns")
    if files:
        return [(file, _read(kind, file, source.columns)) for file in files]
    if not HUB_ID.fullmatch(path) or Path(path).suffix in FILES:
        raise FileNotFoundError(
            f"{path!r} is neither a file, a pattern of files, a data set on the hub (owner/name) "
            f"nor {DOCSTRINGS!r}"
        )
    return [(path, cast(Dataset, load_dataset(path, source.subset, split=source.split)))]


def _read(kind: str, file: str, columns: list[str]) -> Dataset:
    if not Path(file).stat().st_size:
        raise ValueError(f"{file} is empty")
    if kind == "csv":
        return _read_csv(file, columns)
    try:
        return cast(Dataset, load_dataset(kind, data_files=[file], split="train"))
    except DatasetGenerationError as error:
        raise ValueError(f"{file} cannot be read: {error.__cause__ or error}") from error


def _read_csv(file: str, columns: list[str]) -> Dataset:
    """In memory, every field as the text it is: "None", "nan" and "007" are texts."""
    opened: Callable[..., TextIO] = gzip.open if file.endswith(".gz") else open  # type: ignore[assignment]
    with opened(file, "rt", encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            names = columns or next(reader)
            rows = []
            for row in reader:
                if len(row) != len(names):
                    raise ValueError(
                        f"{file}, line {reader.line_num}: {len(row)} fields, but there are "
                        f"{len(names)} columns: {', '.join(names)}"
                    )
                rows.append(row)
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error})") from error
    if len(set(names)) != len(names):
        raise ValueError(f"{file} has two columns of one name: {', '.join(names)}")
    if not rows:
        raise ValueError(f"{file} has no rows")
    return Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def _check_columns(source: PairSource, place: str, table: Dataset) -> None:
    wanted = {"query": [source.query], "positive": [source.positive], "negatives": source.negatives}
    wanted["score"] = [source.score] if source.score else []
    for role, columns in wanted.items():
        for column in columns:
            if column not in table.column_names:
                raise ValueError(
                    f"{place} has no column {column!r} ({role} of {source.title})"
                    f"{nearest(column, table.column_names)}"
                )
