"""Standard streams that end no run: closed ones, full ones, pipes whose reader has left, terminals that are gone."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

__all__ = ["Lasting", "lasting", "prepare"]

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # no later write will succeed either


def prepare() -> None:
    """See that the three standard streams are open, and that their encoding lets every text through.

    A file opened while number 1 is free becomes standard output: a log of the run would get what libraries print.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(null, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - lasts as long as we do
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # PYTHONIOENCODING=ascii
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8")  # what is piped in is read as files are


class Lasting:
    """A text stream that drops what cannot be written.

    Attributes:
        about: what goes on all the same, said once on the other standard stream; empty says nothing.
        lost: why something was dropped, None if nothing was, or if nobody reads it any more.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.about = ""
        self.lost: str | None = None
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        """Write, or drop."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        if error.errno not in GONE:
            self.lost = error.strerror
        self._divert()
        about, self.about = self.about, ""
        other = sys.stderr if self._name == "output" else sys.stdout
        if about:
            with contextlib.suppress(OSError):
                other.write(f"standard {self._name} cannot be written ({error.strerror}); {about}\n")
                other.flush()

    def _divert(self) -> None:
        """Send to nowhere what is still buffered, what comes, and what libraries print."""
        with contextlib.suppress(OSError):  # a stream that is no file of the system's
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def lasting(about: str = "") -> Iterator[Lasting]:
    """Within it, an error of standard output or standard error ends nothing; yields standard output."""
    before = sys.stdout, sys.stderr
    wrapped = [
        s if isinstance(s, Lasting) else Lasting(s, name) for s, name in zip(before, ("output", "error"), strict=True)
    ]
    for stream in wrapped:
        stream.about = about
    sys.stdout, sys.stderr = cast(list[TextIO], wrapped)
    try:
        yield wrapped[0]
    finally:
        for stream in wrapped:
            stream.flush()
            stream.about = ""
        sys.stdout, sys.stderr = before
