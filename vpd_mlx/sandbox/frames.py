"""What children send, read as if a program had forged it: it may write to the pipe itself.

Every function takes the body of one frame, or raises ValueError and nothing else, in time that is linear in its length.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from vpd_mlx.sandbox.child import DEEPEST
from vpd_mlx.sandbox.results import SEQUENCES, Failure, Value

__all__ = ["Report", "read_call", "read_report", "read_value"]

INTEGER = re.compile(r"-?0x[0-9a-f]+").fullmatch
BYTES = re.compile(r"(?:[0-9a-f]{2})*").fullmatch


@dataclass(frozen=True)
class Report:
    """What the judge says about one test: why it failed (None: passed), where (file, line), and whether it called the program."""

    why: Failure | None = None
    at: tuple[str, int] = ("", 0)
    called: bool = False


def read_value(body: bytes) -> Value:
    """The value of a call."""
    match value := _json(body):
        case {"o": [str(), bool()], **rest} if not rest:  # an object that is not plain data, and its truth
            return Value(value)
    _check(value)
    return Value(value)


def read_call(body: bytes) -> tuple[str, list[Any], dict[str, Any]]:
    """The call that the judge asks for: name, encoded arguments, encoded keyword arguments."""
    match _json(body):
        case [str(name), list(args), dict(kwargs)]:
            for value in (*args, *kwargs.values()):
                _check(value)
            return name, args, kwargs
    raise ValueError("not a call")


def read_report(body: bytes) -> Report:
    """The judge's report on one test."""
    match _json(body):
        case {"ok": True, **rest} if not rest:
            return Report()
        case {"ok": False, "why": str(why), "called": bool(called), "at": [str(file), int(line)], **rest} if not rest:
            return Report(Failure.parse(why.encode("utf-8", "replace")), (file, line), called)
    raise ValueError("not a report")


def _json(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _check(obj: Any, depth: int = 0, key: bool = False) -> None:
    """Refuse what `child.encode` cannot have written; `key`: in a place where Python wants a hash."""
    if depth > DEEPEST:
        raise ValueError("nested too deeply")
    match obj:
        case None | bool() | str():
            return
        case int() if -(2**53) < obj < 2**53:
            return
        case float() if math.isfinite(obj):
            return
        case list() if not key:
            _check_all(obj, depth, key)
            return
        case dict() if len(obj) == 1:
            ((tag, body),) = obj.items()
            if (not key or tag not in ("s", "d")) and _fits(tag, body, depth, key):
                return
    raise ValueError("not an encoded value")


def _fits(tag: str, body: Any, depth: int, key: bool) -> bool:
    """Whether `{tag: body}` is an encoded value. Raises ValueError if something in it is not."""
    if tag in SEQUENCES and isinstance(body, list):
        _check_all(body, depth, key or tag != "t")
        return True
    if tag == "d" and isinstance(body, list):
        for pair in body:
            if not isinstance(pair, list) or len(pair) != 2:
                return False
            _check(pair[0], depth + 1, key=True)
            _check(pair[1], depth + 1)
        return True
    if tag == "c" and isinstance(body, list) and len(body) == 2:
        _check_all(body, depth, key=True)
        return all(isinstance(part, float) or (isinstance(part, dict) and "f" in part) for part in body)
    if tag == "f":
        return body in ("inf", "-inf", "nan")
    return isinstance(body, str) and bool((tag == "i" and INTEGER(body)) or (tag == "b" and BYTES(body)))


def _check_all(items: list[Any], depth: int, key: bool) -> None:
    for item in items:
        _check(item, depth + 1, key)
