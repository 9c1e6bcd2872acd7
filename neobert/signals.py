"""Being told to stop, and stopping where it suits."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    signum: int | None = None

    @property
    def requested(self) -> float:
        return float(self.signum is not None)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT in place of dying of them; a second one is obeyed at once."""
    request = StopRequest()
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

    def note(signum: int, frame: object) -> None:
        request.signum = signum
        for each, handler in before.items():
            signal.signal(each, handler)

    for each in before:
        signal.signal(each, note)
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
