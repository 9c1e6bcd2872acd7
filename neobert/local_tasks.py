"""mteb tasks on files of one's own, in mteb's column names.

| path | columns | task |
|---|---|---|
| a file | sentence1, sentence2, score | STS: Spearman's correlation of cosine and score |
| a file | sentence1, sentence2, labels (0 or 1) | pair classification: average precision |
| a file | sentences, labels | clustering: V-measure |
| a folder with train and test files | text, label | classification: accuracy |
| a folder with corpus, queries, qrels files | _id, text (title); _id, text; query-id, corpus-id,
score | retrieval: nDCG at 10 |

Files are .csv or .tsv whose first line names the columns, .jsonl, or .parquet. Other columns are
ignored. A BEIR folder's qrels/test.tsv is found too. mteb's cached result of a task is known by its
name: the path's with a digest of the contents, so that a changed file is a new task.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A type of task that one table of texts makes.

    texts, label: its columns.
    expected, check: what a label must be, in words and as a function that gives it or raises
        ValueError or TypeError.
    """

    base: type[AbsTask]
    type: str
    main_score: str
    texts: tuple[str, ...]
    label: str
    expected: str
    check: Callable[[Any], Any]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.texts, self.label)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _zero_or_one(value: Any) -> int:
    if (number := _number(value)) not in (0, 1):
        raise ValueError
    return int(number)


def _name(value: Any) -> str:
    if not isinstance(value, (str, int)) or not (name := str(value).strip()):
        raise ValueError
    return name


PAIR = ("sentence1", "sentence2")
STS = Kind(AbsTaskSTS, "STS", "cosine_spearman", PAIR, "score", "a number", _number)
FILES = (
    STS,
    Kind(
        AbsTaskPairClassification,
        "PairClassification",
        "max_ap",
        PAIR,
        "labels",
        "0 or 1",
        _zero_or_one,
    ),
    Kind(AbsTaskClustering, "Clustering", "v_measure", ("sentences",), "labels", "a name", _name),
)
CLASSIFICATION = Kind(
    AbsTaskClassification, "Classification", "accuracy", ("text",), "label", "a name", _name
)


def is_local(name: str) -> bool:
    """Whether `name` is meant as a path: it ends as a file of data does, or is a path's."""
    return name.endswith(SUFFIXES) or "/" in name or Path(name).is_dir()


def local_task(path: Path) -> AbsTask:
    """The task that a file or folder makes, its data read and checked.

    Raises ValueError for columns that make none, an empty text, a label of the wrong kind or the
    same in every row, naming the file and the row; FileNotFoundError if there is nothing there.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no task data at {path}")
    if path.is_dir():
        if _find(path, "corpus"):
            return _retrieval(path)
        train, test = _file(path, "train"), _file(path, "test")
        splits = {
            name: _read_kind(file, [CLASSIFICATION])[1]
            for name, file in (("train", train), ("test", test))
        }
        return _task(CLASSIFICATION, [train, test], path, _numbered(splits, test))
    kind, data = _read_kind(path, FILES)
    task = _task(kind, [path], path, DatasetDict(test=data))
    if kind is STS:
        # The correlations do not change by it; mteb scales scores by the range that it is told.
        task.min_score, task.max_score = min(data["score"]), max(data["score"])  # type: ignore[attr-defined]
    if issubclass(kind.base, AbsTaskClustering):
        task.max_fraction_of_documents_to_embed = None  # type: ignore[attr-defined] # all of them
    return task


def _task(kind: Kind, files: Sequence[Path], path: Path, data: Any) -> AbsTask:
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    metadata = TaskMetadata(
        name=f"{re.sub(r'[^A-Za-z0-9.-]+', '-', path.resolve().stem)}-{digest[:8]}",
        description=f"Local data: {path}",
        type=kind.type,  # type: ignore[arg-type]
        category="t2c" if kind.type in ("Classification", "Clustering") else "t2t",
        dataset={"path": str(path), "revision": digest[:40]},
        eval_langs=["eng-Latn"],
        main_score=kind.main_score,
    )
    task = type(f"Local{kind.type}", (kind.base,), {"metadata": metadata})()
    task.dataset, task.data_loaded = data, True
    return task


def _read_kind(path: Path, kinds: Sequence[Kind]) -> tuple[Kind, Dataset]:
    """The kind whose columns a file has, and its checked rows."""
    columns, rows = read_rows(path)
    kind = next((kind for kind in kinds if set(kind.columns) <= set(columns)), None)
    if kind is None:
        known = " or ".join(", ".join(kind.columns) for kind in kinds)
        raise ValueError(f"{path}: has the columns {', '.join(map(repr, columns))}, needs {known}")
    data: dict[str, list] = {column: [] for column in kind.columns}
    for where, row in rows:
        for column in kind.texts:
            data[column].append(_text(row, column, where))
        try:
            data[kind.label].append(kind.check(row[kind.label]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{where}: {kind.label!r} is {row.get(kind.label)!r:.80}, must be {kind.expected}"
            ) from None
    if len(set(data[kind.label])) < 2:
        raise ValueError(
            f"{path}: {kind.label!r} is the same in all of its {len(data[kind.label])} rows"
        )
    return kind, Dataset.from_dict(data)


def _numbered(splits: dict[str, Dataset], test: Path) -> DatasetDict:
    """The splits with their labels as numbers, which mteb's scores for two labels need."""
    numbers = {label: number for number, label in enumerate(sorted(set(splits["train"]["label"])))}
    for row, label in enumerate(splits["test"]["label"], 1):
        if label not in numbers:
            raise ValueError(f"{test}, row {row}: the label {label!r} is in no row of train")
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"text": split["text"], "label": [numbers[label] for label in split["label"]]}
            )
            for name, split in splits.items()
        }
    )


def _text(row: Row, column: str, where: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {column!r} must be a text, is {text!r:.80}")
    return text


def read_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    """The columns of a file, and its rows, each with the file and row to name in an error."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: must end in {', '.join(SUFFIXES)}")
    rows = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix, _read_csv)(path)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path}: has no rows")

    def all_rows() -> Iterator[tuple[str, Row]]:
        yield first
        yield from rows

    return list(first[1]), all_rows()


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            columns = next(lines, [])
            for number, cells in enumerate(lines, 1):
                where = f"{path}, row {number}"
                if len(cells) != len(columns):
                    raise ValueError(
                        f"{where}: has {len(cells)} cells, the first line names {len(columns)} "
                        f"columns ({', '.join(columns)})"
                    )
                yield where, dict(zip(columns, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {lines.line_num + 1}: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, row {number}"
            try:
                row = json.loads(line)  # whose errors of encoding are ValueErrors too
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({error}): {line!r:.80}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not a JSON object: {line!r:.80}")
            yield where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from error
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _find(folder: Path, name: str) -> Path | None:
    return next((file for s in SUFFIXES if (file := folder / f"{name}{s}").is_file()), None)


def _file(folder: Path, *names: str) -> Path:
    for name in names:
        if file := _find(folder, name):
            return file
    raise ValueError(f"{folder}: has no {' or '.join(names)} ({', '.join(SUFFIXES)})")


def _retrieval(folder: Path) -> AbsTask:
    """The task of a BEIR folder."""
    files = [
        _file(folder, "corpus"),
        _file(folder, "queries"),
        _file(folder, "qrels/test", "qrels"),
    ]
    corpus, queries = (_texts_by_id(file) for file in files[:2])
    relevant: dict[str, dict[str, int]] = {}
    columns, rows = read_rows(files[2])
    if not {"query-id", "corpus-id", "score"} <= set(columns):
        raise ValueError(
            f"{files[2]}: has the columns {', '.join(map(repr, columns))}, needs query-id, "
            "corpus-id, score"
        )
    for where, row in rows:
        ids = {"query-id": queries, "corpus-id": corpus}
        for column, known in ids.items():
            if str(row.get(column)) not in known:
                file = files[1] if known is queries else files[0]
                raise ValueError(f"{where}: the {column} {row.get(column)!r} is not in {file}")
        try:
            number = float(row.get("score"))  # type: ignore[arg-type]
            if number != (score := int(number)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{where}: 'score' is {row.get('score')!r}, must be an integer"
            ) from None
        relevant.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = score
    kind = Kind(AbsTaskRetrieval, "Retrieval", "ndcg_at_10", ("text",), "score", "", int)
    split = {
        "corpus": Dataset.from_list(list(corpus.values())),
        "queries": Dataset.from_list([row for id, row in queries.items() if id in relevant]),
        "relevant_docs": relevant,
        "top_ranked": None,
    }
    return _task(kind, files, folder, {"default": {"test": split}})


def _texts_by_id(path: Path) -> dict[str, Row]:
    columns, rows = read_rows(path)
    key = "_id" if "_id" in columns else "id"
    if not {key, "text"} <= set(columns):
        raise ValueError(
            f"{path}: has the columns {', '.join(map(repr, columns))}, needs _id and text"
        )
    found: dict[str, Row] = {}
    for where, row in rows:
        if (id := str(row.get(key))) in found:
            raise ValueError(f"{where}: the {key} {id!r} is there twice")
        found[id] = {"id": id, "text": _text(row, "text", where), "title": row.get("title") or ""}
    return found
