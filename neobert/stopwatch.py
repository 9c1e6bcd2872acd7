"""Saying what is being done and how long it took, for programs that one watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def step(what: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done, then what came of it and how long it took."""
    print(f"{what} … ", end="", flush=True)
    result = ""

    def done(text: str) -> None:
        nonlocal result
        result = text

    start = time.perf_counter()
    yield done
    print(f"{result} ({time.perf_counter() - start:.1f} s)")
