"""GLUE's examples: from its own TSV files, from the hub, or from local copies of the hub's files.

    DIR/CoLA/train.tsv, dev.tsv            GLUE's own, tab-separated without quoting
    DIR/MNLI/train.tsv, dev_matched.tsv, dev_mismatched.tsv
    DIR/cola/train-00000-of-00001.parquet, validation-00000-of-00001.parquet     the hub's
    DIR/cola/train.jsonl, validation.jsonl

Whatever does not fit is an error that names the file and the row; nothing is passed over but the
rows of QQP's own files that a line break cuts in pieces, which are counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from neobert.digests import files_digest
from neobert.glue_tasks import HIGHEST, LOWEST, Task
from neobert.packing import PackedBatch, pack, token_budget_batches

HUB, HUB_DATA = "hub", "nyu-mll/glue"
KINDS = (".tsv", ".parquet", ".jsonl")
TOKENIZED_AT_ONCE = 10_000  # texts, whose ids are Python lists until they are arrays

# Where an example is, its columns (None if it is left out), and whether the label is spelled as in
# GLUE's own files.
Row = tuple[str, dict[str, Any] | None, bool]


@dataclass(frozen=True)
class Examples:
    """texts: one or two each. labels: (examples,) int64 class numbers or float32 scores.
    source: where they are from, for messages. left_out: where rows are that were left out, each as
    "file, row 7"."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray
    source: str
    left_out: tuple[str, ...] = ()


def read_examples(data: str, task: Task, split: str) -> Examples:
    """The examples of a split (one of `task.splits`).

    data: a directory with a folder per task, by GLUE's name or the hub's; or "hub".
    Raises FileNotFoundError for missing folders and files, and ValueError for rows of another
    format, labels out of range, a split without examples or with a single label.
    """
    if data == HUB:
        source = f"{HUB_DATA} {task.subset} {_hub_split(split)}"
        rows = _hub_rows(task, split, source)
    else:
        files = find_files(Path(data), task, split)
        source = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({split})"
        rows = (row for path in files for row in READERS[path.suffix](path, task, split))
    texts, labels, left_out = [], [], []
    for where, record, spelled in rows:
        if record is None:
            left_out.append(where)
            continue
        columns = task.tsv_texts if spelled else task.texts
        for name in columns:
            if not isinstance(record[name], str):
                raise ValueError(f"{where}: {name} is not a text: {record[name]!r:.80}")
        texts.append(tuple(record[name] for name in columns))
        if not any(map(str.strip, texts[-1])):
            raise ValueError(f"{where}: no text in {' and '.join(columns)}")
        labels.append(_label(task, record[task.tsv_label if spelled else "label"], spelled, where))
    if not texts:
        raise ValueError(f"{source} has no examples")
    if len(set(labels)) == 1:
        only = task.classes[int(labels[0])] if task.classes else labels[0]
        raise ValueError(
            f"{source}: all {len(labels)} examples have the label {only!r}: with a single one "
            "there is nothing to learn and nothing to score"
        )
    array = np.array(labels, np.int64 if task.classes else np.float32)
    return Examples(texts, array, source, tuple(left_out))


def find_files(data: Path, task: Task, split: str) -> list[Path]:
    """The files of a split, of one kind. Raises FileNotFoundError, and ValueError for two kinds."""
    folders = [data / task.name, data / task.subset]
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no data for {task.name}: neither {folders[0]} nor {folders[1]} is a directory"
        )
    hub = _hub_split(split)
    found = {
        ".tsv": [path for path in [folder / f"{split}.tsv"] if path.exists()],
        ".parquet": [*folder.glob(f"{hub}.parquet"), *folder.glob(f"{hub}-*.parquet")],
        ".jsonl": [*folder.glob(f"{hub}.jsonl"), *folder.glob(f"{hub}-*.jsonl")],
    }
    kinds = [kind for kind, files in found.items() if files]
    if not kinds:
        raise FileNotFoundError(
            f"no {split} examples for {task.name}: {folder} holds neither {split}.tsv nor "
            f"{hub}.parquet, {hub}-*.parquet, {hub}.jsonl or {hub}-*.jsonl"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"{folder} holds {split} examples of {task.name} twice: "
            + ", ".join(path.name for kind in kinds for path in found[kind])
        )
    return sorted(found[kinds[0]])


def data_digest(data: str, task: Task) -> str | None:
    """40 digits that tell the files of a task's splits from any others; None for the hub's, and
    where there are none, or no longer."""
    if data == HUB:
        return None
    try:
        files = [file for split in task.splits for file in find_files(Path(data), task, split)]
    except FileNotFoundError:
        return None
    return files_digest((file.name, file) for file in files)


def _hub_split(split: str) -> str:
    return split.replace("dev", "validation")


def _hub_rows(task: Task, split: str, source: str) -> Iterator[Row]:
    data = load_dataset(HUB_DATA, task.subset, split=_hub_split(split))
    _check_columns(task, data.column_names, source)
    for number, record in enumerate(data, 1):
        yield f"{source}, row {number}", record, False


def _read_tsv(path: Path, task: Task, split: str) -> Iterator[Row]:
    """Splits at every tab, quotes being part of the texts, and at \\n alone."""
    columns = task.tsv_columns(split)
    for where, row, line in _lines(path, task.broken_rows):
        fields = tuple(line.split("\t"))
        if row == 1 and task.header:
            if fields != columns:
                raise ValueError(
                    f"{where}: the columns are {', '.join(fields)}; those of {task.name} are "
                    f"{', '.join(columns)}, in this order"
                )
            continue
        if len(fields) != len(columns):
            if task.broken_rows:
                yield where, None, True
                continue
            raise ValueError(
                f"{where}: {len(fields)} columns; {task.name} has {len(columns)}: "
                f"{', '.join(columns)}"
            )
        yield where, dict(zip(columns, fields, strict=True)), True


def _read_jsonl(path: Path, task: Task, split: str) -> Iterator[Row]:
    for where, _, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        _check_columns(task, record if isinstance(record, dict) else (), where)
        yield where, record, False


def _read_parquet(path: Path, task: Task, split: str) -> Iterator[Row]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    _check_columns(task, file.schema_arrow.names, str(path))
    row = 0
    for batch in file.iter_batches(columns=[*task.texts, "label"]):
        for record in batch.to_pylist():
            row += 1
            yield f"{path}, row {row}", record, False


READERS = {".tsv": _read_tsv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _lines(path: Path, empty: bool = False) -> Iterator[tuple[str, int, str]]:
    """(where, row from 1 on, line). Raises ValueError for an empty line, if not told that there may
    be some, and for another encoding than UTF-8."""
    with open(path, "rb") as lines:
        for row, line in enumerate(lines, 1):
            where = f"{path}, row {row}"
            try:
                # MRPC's files begin with a byte order mark.
                text = line.decode("utf-8-sig" if row == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error})") from error
            if not text.strip() and not empty:
                raise ValueError(f"{where}: an empty line")
            yield where, row, text


def _check_columns(task: Task, names: Any, where: str) -> None:
    missing = [name for name in (*task.texts, "label") if name not in names]
    if missing:
        raise ValueError(
            f"{where}: no {', '.join(missing)}; {task.name} has the columns "
            f"{', '.join(task.texts)} and label"
        )


def _label(task: Task, value: Any, spelled: bool, where: str) -> int | float:
    if not task.classes:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not LOWEST <= number <= HIGHEST:
            raise ValueError(
                f"{where}: the score {value!r} is not a number from {LOWEST:g} to {HIGHEST:g}"
            )
        return number
    known: Sequence = task.tsv_classes if spelled else range(len(task.classes))
    if value not in known or isinstance(value, bool):
        raise ValueError(
            f"{where}: the label {value!r} is none of {task.name}'s: {', '.join(map(str, known))}"
        )
    return known.index(value)


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[np.ndarray]:
    """Token ids, (tokens,) int32, of each example: [CLS] a [SEP], or [CLS] a [SEP] b [SEP].

    max_length: the most tokens, special ones included; the longer text of a pair is cut first.
    Raises ValueError for a tokenizer that does not put pairs together so.
    """
    _check_pairs(tokenizer)
    found: list[np.ndarray] = []
    for start in range(0, len(examples.texts), TOKENIZED_AT_ONCE):
        columns = zip(*examples.texts[start : start + TOKENIZED_AT_ONCE], strict=True)
        ids = tokenizer(*map(list, columns), truncation=True, max_length=max_length)["input_ids"]
        found += [np.array(each, np.int32) for each in ids]
    return found


def _check_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    a, b = tokenizer(["a", "b"], add_special_tokens=False)["input_ids"]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    pair = tokenizer("a", "b")["input_ids"]
    if pair != [cls, *a, sep, *b, sep]:
        raise ValueError(
            f"tokenizer must give [CLS] a [SEP] b [SEP] for a pair, {[cls, *a, sep, *b, sep]} for "
            f"'a' and 'b', but gives {pair}"
        )


@dataclass(frozen=True)
class LabelledBatch:
    """Packed sequences and a label each: labels (sequences,) int64 or float32.

    indices: the examples' numbers, in the order of the sequences.
    """

    packed: PackedBatch
    labels: Tensor
    indices: list[int]

    def to(self, device: torch.device | str) -> LabelledBatch:
        labels = self.labels.to(device, non_blocking=True)
        return LabelledBatch(self.packed.to(device, True), labels, self.indices)

    def inputs(self) -> dict[str, Any]:
        """Arguments of `NeoBERTForSequenceClassification.forward`."""
        return {**self.packed.inputs(), "labels": self.labels}

    def padded_inputs(self, pad_id: int) -> dict[str, Any]:
        """The same sequences as (sequences, longest) arrays with padding, for comparison."""
        rows = self.packed.input_ids.split(self.packed.cu_seqlens.diff().tolist())
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True),
            "labels": self.labels,
        }


def packed_batches(
    sequences: Sequence[np.ndarray], labels: np.ndarray, indices: Sequence[int], max_tokens: int
) -> list[LabelledBatch]:
    """The examples `indices` in packed batches of at most `max_tokens` tokens; one with a longer
    sequence holds nothing else."""
    lengths = [len(sequences[index]) for index in indices]
    batches = []
    for places in token_budget_batches(lengths, max_tokens):
        chosen = [int(indices[place]) for place in places]
        packed = pack([sequences[index] for index in chosen])
        batches.append(LabelledBatch(packed, torch.from_numpy(labels[chosen]), chosen))
    return batches
