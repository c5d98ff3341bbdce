"""What a program may take, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

__all__ = ["Ended", "Failure", "Limits", "Outcome", "Result"]

Ended = Literal["ok", "error", "timeout", "memory", "output", "disk"]


@dataclass(frozen=True)
class Limits:
    """What one program may take. `wall_s` and `cpu_s` count from its first line, for all its calls together."""

    wall_s: float = 8.0
    cpu_s: int = 4
    memory_mb: int = 512
    output_kb: int = 256
    file_mb: int = 16
    threads: int = 16


@dataclass(frozen=True)
class Failure:
    """Why a program or a call failed: exception, message, and the program's own line (0: none)."""

    kind: str
    message: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.message else self.kind

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """A failure as `child.describe` wrote it. The program may have forged it: every body gives a failure."""
        kind, line, message = [*body.decode("utf-8", "replace").split("\0", 2), "0", ""][:3]
        return cls(kind[:100], message, int(line) if line.isdecimal() and len(line) < 9 else 0)


@dataclass(frozen=True)
class Result:
    """How a program ended. `failure` is set unless `ended` is ok."""

    ended: Ended
    stdout: str
    stderr: str
    failure: Failure | None = None


@dataclass(frozen=True)
class Outcome:
    """One test of the judge: passed, or why not.

    `raised` says whether the program itself failed, `call` is its last call (name, arguments, value), `source` the statement
    of the tests that failed.
    """

    passed: bool
    raised: bool = False
    failure: Failure | None = None
    call: tuple[str, str, str] | None = None
    source: str = ""
