"""A grading library in a process of its own: no text that a model writes can hang, crash or exhaust ours.

One process for each task, started once and fed through a pipe (`sandbox.Library`). A call has `seconds` of processor time: a
machine that is busy with training makes no answer wrong. At half of it a signal interrupts Python code, and the process goes on;
at the whole of it the kernel ends the process, which helps against C code that never looks for signals, and the next call starts
another. Far later, by the clock, we give up on a process that gets no processor time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vpd_mlx.errors import SourceError
from vpd_mlx.sandbox import Library, LibraryError
from vpd_mlx.types import Problem, Verdict

__all__ = ["Checker", "Exhausted"]

# `limited` wraps a function that answers calls. BaseException: libraries suppress others.
LIMITED = """
import signal

class Exhausted(BaseException):
    pass

def interrupt(number, frame):
    raise Exhausted("took more than {seconds:g} s of processor time")

signal.signal(signal.SIGVTALRM, interrupt)

def limited(function):
    def call(*args):
        signal.setitimer(signal.ITIMER_VIRTUAL, {seconds} / 2)
        signal.setitimer(signal.ITIMER_PROF, {seconds})
        try:
            return function(*args)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return call
"""
TOO_MUCH = {"Exhausted", "MemoryError", "RecursionError", "OverflowError", "OutputLimit"}
CLOCK = 10  # times as many seconds by the clock, and a few more


class Exhausted(SourceError):
    """A call took more than its share of time, memory or depth."""


class Checker:
    """Functions of `program`, which it wraps in `limited`, each within `seconds` of processor time. Safe to call from any thread.

    Raises:
        ConfigError: the module `needs` is not installed; `extra` is this package's extra that installs it.
        SourceError: it does not start.
    """

    def __init__(self, program: str, needs: str, extra: str, kind: str, seconds: float) -> None:
        self._library = Library(LIMITED.format(seconds=seconds) + program, needs, extra, kind, CLOCK * (seconds + 1))
        self._seconds = seconds
        self._faults: dict[tuple[Any, ...], str] = {}  # of references, by their calls

    @property
    def notice(self) -> str:
        """What this machine's isolation cannot promise."""
        return self._library.notice

    def close(self) -> None:
        """End the process. The next call starts another."""
        self._library.close()

    def call(self, name: str, *args: Any) -> Any:
        """Call a function that returns JSON text; returns the value.

        Raises:
            Exhausted: it took too much time, memory or depth.
            SourceError: it failed otherwise.
        """
        try:
            return self._library.call(name, *args)
        except LibraryError as error:
            failure = error.failure
            if failure.kind == "Killed" and failure.message.endswith("SIGPROF"):
                raise Exhausted(f"took more than {self._seconds:g} s of processor time") from None
            if failure.kind in TOO_MUCH:
                raise Exhausted(str(failure)) from None
            raise

    def grade(
        self, problem: Problem, call: tuple[Any, ...], known: tuple[Any, ...], what: str, read: Callable[[Any], Verdict]
    ) -> Verdict:
        """The verdict that `read` makes of a call (name, arguments); `what` failed if the call fails.

        A completion that exhausts the checker is wrong, unless the call `known`, of the row's reference, exhausts it, too: then
        the row is at fault.
        """
        try:
            return read(self.call(*call))
        except Exhausted as error:
            if fault := self._fault(known):
                return Verdict(0.0, error=f"{what}: {error}; the reference of row {problem.id} fails, too: {fault}")
            return Verdict(0.0, "The answer takes too long to check.")
        except SourceError as error:
            return Verdict(0.0, error=f"{what}: {error}")

    def _fault(self, known: tuple[Any, ...]) -> str:
        if known not in self._faults:
            try:
                self.call(*known)
                self._faults[known] = ""
            except SourceError as error:
                self._faults[known] = str(error)
        return self._faults[known]
