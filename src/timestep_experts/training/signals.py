"""A run that is asked to stop ends its step and saves what it has."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def noted_signals() -> Iterator[Callable[[], signal.Signals | None]]:
    """While open, the first request to stop is only noted; a second one is obeyed at once.

    Yields:
        Which signal was noted, if any. When the context closes, the handlers from before are back: raising the signal
        then has its usual effect.
    """
    noted: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, _: FrameType | None) -> None:
        noted.append(signal.Signals(number))
        restore()

    def restore() -> None:
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:  # nohup
            signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else None
    finally:
        restore()
