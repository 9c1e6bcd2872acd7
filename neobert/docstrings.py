"""The docstrings of the Python standard library, and the names of what they document.

A corpus that every machine has: a few words to a few pages each, as texts are, and each with the
name that someone would look it up by.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path

HELD_OUT_SHARE = 0.1  # of the names, for evaluation

# Where a word of a name begins: after dots and underscores, at a capital after a small letter or a
# digit ("Dict|Reader"), and at the last of several capitals before a small letter ("HTML|Parser").
WORD_START = re.compile(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def documented(folder: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of all modules, classes and functions under `folder` that have
    one, without importing any; "csv.DictReader.writeheader" for a method."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if {"site-packages", "dist-packages", "test", "tests"} & set(parts):
            continue
        try:
            with warnings.catch_warnings():  # about escapes in other people's code
                warnings.simplefilter("ignore")
                module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a file for 2to3 or for testing the parser
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        # Breadth first, as ast.walk.
        nodes: deque[tuple[ast.AST, str]] = deque([(module, name)])
        while nodes:
            node, name = nodes.popleft()
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{name}.{node.name}"
            nodes.extend((child, name) for child in ast.iter_child_nodes(node))
            if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            ) and (text := ast.get_docstring(node)):
                yield name, text


def docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of all modules, classes and functions under `folder`, without importing any."""
    for _, text in documented(folder):
        yield text


def _standard_library() -> tuple[tuple[str, str], ...]:
    return _read(Path(sysconfig.get_path("stdlib")))


@cache
def _read(folder: Path) -> tuple[tuple[str, str], ...]:
    return tuple(documented(folder))  # once: it takes seconds


def standard_library_docstrings() -> list[str]:
    """The distinct docstrings of the installed Python's standard library, in a fixed order."""
    return list(dict.fromkeys(text for _, text in _standard_library()))


def standard_library_names() -> dict[str, str]:
    """{qualified name: docstring} of the standard library; of several names of one docstring the
    first, and of several docstrings of one name (an overridden function) the first."""
    named: dict[str, str] = {}
    seen = set()
    for name, text in _standard_library():
        if text not in seen:
            seen.add(text)
            named.setdefault(name, text)
    return named


def as_query(name: str) -> str:
    """A qualified name as text to search by: as it is, and in words.

    "csv.DictReader.writeheader" → "csv.DictReader.writeheader csv dict reader writeheader"
    """
    return f"{name} {WORD_START.sub(' ', name).strip().lower()}"


def is_held_out(name: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a name is one of the `share` kept for evaluation: by its hash alone, so that another
    version of Python holds out the same names."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def name_pairs(held_out: bool) -> list[tuple[str, str]]:
    """(name as a query, docstring) of the standard library: the held-out ones or the others."""
    return [
        (as_query(name), text)
        for name, text in standard_library_names().items()
        if is_held_out(name) == held_out
    ]
