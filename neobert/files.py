"""Files of texts, a text a line, and of embeddings, a row a text; files written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np


class InputError(ValueError):
    """A line of the input that cannot be read; the message names it."""


class NpyWriter:
    """Writes rows to a .npy file that appears, whole, when the `with` block ends without an error.

    Until then the rows are in a hidden file in the same folder, which an error removes. The file
    at `path`, if there is one, is untouched until it is replaced.
    """

    HEADER_SIZE = 128  # bytes: any (rows, dim) fits, so the number of rows can be filled in last

    def __init__(self, path: Path):
        self.path = path
        self.unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        self.rows = 0
        self.dim: int | None = None

    def __enter__(self) -> NpyWriter:
        self.file = open(self.unfinished, "xb")
        self.file.write(bytes(self.HEADER_SIZE))
        return self

    def write(self, rows: np.ndarray) -> None:
        """Append (n, dim) float32 rows."""
        if rows.dtype != np.float32 or rows.ndim != 2 or self.dim not in (None, rows.shape[1]):
            raise ValueError(f"rows must be (n, {self.dim}) float32, got {rows.shape} {rows.dtype}")
        self.dim = rows.shape[1]
        self.file.write(np.ascontiguousarray(rows, "<f4").data)
        self.rows += len(rows)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.file.seek(0)
                header = {
                    "descr": "<f4",
                    "fortran_order": False,
                    "shape": (self.rows, self.dim or 0),
                }
                np.lib.format.write_array_header_1_0(self.file, header)
                assert self.file.tell() == self.HEADER_SIZE
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.unfinished, self.path)
        finally:
            self.file.close()
            self.unfinished.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a file whole, on the disk, in place of an older one: whoever reads it, after a kill
    too, finds the old text or the new. Raises OSError, and then the old one is still there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")  # others may write theirs
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_records(lines: BinaryIO, name: str, field: str | None) -> Iterator[dict[str, Any]]:
    """{"text": line} for each line, or with `field` the JSON object of each, with a text there.

    Every line is one text, an empty line the empty text, so that row i is line i + 1. Lines end
    with \\n or \\r\\n and are UTF-8. Raises InputError naming the file and the line.
    """
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 ({error})") from error
        text = text.removesuffix("\n").removesuffix("\r")
        yield {"text": text} if field is None else _json_record(text, field, where)


def read_texts(lines: BinaryIO, name: str, field: str | None) -> Iterator[str]:
    """The texts of `read_records`."""
    for record in read_records(lines, name, field):
        yield record[field or "text"]


def _json_record(line: str, field: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}): {line!r:.80}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object: {line!r:.80}")
    if field not in record:
        raise InputError(f"{where}: no field {field!r}; it has {', '.join(map(repr, record))}")
    text = record[field]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {field!r} is not a string: {text!r:.80}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: field {field!r} is not valid Unicode ({error})") from error
    return record


def count_lines(path: Path) -> int:
    """Lines of a file, the last one with or without its end."""
    lines, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")
