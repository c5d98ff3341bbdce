"""What a program may take, how it ended, and the plain values that it returned, which are compared and shown but never trusted.

Values stay as `child.encode` wrote them. Elements of sets and dicts are looked up in our own value. None is built from what a
program sent, which may be chosen so that hashes collide and keep us busy for minutes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from vpd_mlx.sandbox.child import decode

__all__ = ["Ended", "Failure", "Limits", "Outcome", "Result", "Value", "show_arguments"]

Ended = Literal["ok", "error", "timeout", "memory", "output", "disk"]
SEQUENCES = ("t", "s", "z")
_ABSENT = object()


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
        kind = kind if kind.isidentifier() and len(kind) <= 100 else "Exception"
        return cls(kind, message[:4000], int(line) if line.isdecimal() and len(line) < 9 else 0)


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


@dataclass(frozen=True)
class Value:
    """The encoded value that a call returned. `str` shows it as Python would."""

    encoded: Any

    @property
    def opaque(self) -> str | None:
        """What it is, if it is an object that is not plain data; the encoding has its truth alone."""
        return str(self.encoded["o"][0]) if isinstance(self.encoded, dict) and "o" in self.encoded else None

    def equals(self, expected: Any, tuples_as_lists: bool = False) -> bool:
        """Python's == with a plain value of ours. Set `tuples_as_lists` if ours was read from JSON."""
        return self.opaque is None and _same(expected, self.encoded, tuples_as_lists)

    def __str__(self) -> str:
        return self.opaque or _show(self.encoded)


def show_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Encoded arguments as written in a call."""
    return ", ".join([*map(_show, args), *(f"{k}={_show(v)}" for k, v in kwargs.items())])


def _scalar(obj: Any) -> Any:
    """The value of a scalar. Raises ValueError for containers."""
    if not isinstance(obj, list | dict):
        return obj
    if isinstance(obj, dict):
        ((tag, _),) = obj.items()
        if tag in ("i", "f", "b", "c"):
            return decode(obj)
    raise ValueError("not a scalar")


def _hashable(obj: Any) -> Any:
    """The value of a scalar or a tuple of scalars. Raises ValueError for others."""
    if isinstance(obj, dict) and "t" in obj:
        return tuple(_hashable(x) for x in obj["t"])
    return _scalar(obj)


def _same(want: Any, got: Any, loose: bool) -> bool:
    tag, body = next(iter(got.items())) if isinstance(got, dict) else ("l" if isinstance(got, list) else "", got)
    if tag == "l" or tag == "t":
        kind = list | tuple if loose else (list if tag == "l" else tuple)
        return isinstance(want, kind) and len(want) == len(body) and all(map(_same, want, body, [loose] * len(body)))
    if tag in ("s", "z"):
        if not isinstance(want, set | frozenset) or len(want) != len(body):
            return False
        found = [_find(want, item, loose) for item in body]
        return all(x is not _ABSENT for x in found) and len(set(found)) == len(want)
    if tag == "d":
        if not isinstance(want, dict) or len(want) != len(body):
            return False
        keys = [_find(want, key, loose) for key, _ in body]
        fine = all(k is not _ABSENT for k in keys) and len(set(keys)) == len(want)
        return fine and all(_same(want[k], value, loose) for k, (_, value) in zip(keys, body, strict=True))
    return bool(want == _scalar(got))


def _find(ours: Collection[Any], item: Any, loose: bool) -> Any:
    """The member of `ours` that equals `item`, else _ABSENT."""
    try:
        key = _hashable(item)
    except ValueError:
        # A frozenset, or a tuple with one in it: the kind is looked at first, because a program chooses how often this is done.
        return next((x for x in ours if isinstance(x, tuple | frozenset) and _same(x, item, loose)), _ABSENT)
    return key if key in ours else _ABSENT


def _show(obj: Any) -> str:
    if isinstance(obj, list):
        return f"[{', '.join(map(_show, obj))}]"
    if not isinstance(obj, dict):
        return repr(obj)
    ((tag, body),) = obj.items()
    if tag == "d":
        return "{" + ", ".join(f"{_show(k)}: {_show(v)}" for k, v in body) + "}"
    if tag in SEQUENCES:
        inner = ", ".join(map(_show, body))
        if tag == "t":
            return f"({inner},)" if len(body) == 1 else f"({inner})"
        shown = "{" + inner + "}" if body else "set()"
        return shown if tag == "s" else f"frozenset({shown if body else ''})"
    if tag == "i" and len(body) > 3000:  # Python refuses to write out longer ones
        return str(body)
    return repr(_scalar(obj))
