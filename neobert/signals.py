"""Being told to stop, and stopping where it suits."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


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


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP, as an exception: what is unfinished is removed on the way out."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within, each of these signals raises Stopped."""
    signals = [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in dir(signal)
    ]

    def stop(signum: int, frame: FrameType | None) -> None:
        for each in signals:  # a second Ctrl-C must not interrupt the cleaning up
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signum)

    before = {each: signal.signal(each, stop) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
