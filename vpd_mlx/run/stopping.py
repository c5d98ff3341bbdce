"""Signals that stop a run, the same on the command line and in Python."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from vpd_mlx.run.progress import Stop

__all__ = ["stoppable"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed, or the line was cut


@contextlib.contextmanager
def stoppable(stop: Stop, at_once: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """Within it, a first signal ends a run that has begun at the next safe moment.

    Before that nothing would be lost: it raises KeyboardInterrupt, as a second signal always does, after `at_once(number)`.
    A signal that is ignored stays so (`nohup`). Only a program's main thread may do this; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _frame: FrameType | None) -> None:
        if stop.begun and stop.signal is None:
            stop.signal = number
            return
        stop.signal = number
        at_once(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
