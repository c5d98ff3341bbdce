"""Functions that a Python program hands over beside a recipe: the recipe has their names, `function:NAME`, as plain text."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import textwrap
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from vpd_mlx.errors import ConfigError, Fault, config_error

__all__ = ["NOTHING", "PREFIX", "Handed", "Listed"]
__all__ += ["arity_faults", "failure", "fingerprint", "function_name", "not_handed_over"]

PREFIX = "function:"
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Handed:
    """The objects that a recipe has the names of, and rows, name -> lines, that the run folder is to hold."""

    verify: Callable[..., Any] | None = None
    sources: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)
    algorithm: Callable[..., Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)


NOTHING = Handed()


class Listed(dict[str, Entry]):
    """Entries by name, and one for any `function:NAME`, which iteration leaves out."""

    def __init__(self, function: Callable[[str], Entry], /, **entries: Entry) -> None:
        super().__init__(entries)
        self._function = function

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(PREFIX) and name != PREFIX)

    def __missing__(self, name: str) -> Entry:
        if name not in self:
            raise KeyError(name)
        return self._function(name)


def not_handed_over(place: str, name: str) -> ConfigError:
    """The error of a recipe that names a function, opened where there is none."""
    remedy = "call vpd.train(..., resume=True) or vpd.evaluate there"
    return config_error(place, f"{name} is a function of a Python program", remedy)


def function_name(function: Callable[..., Any]) -> str:
    """A plain name for a function or a callable object."""
    name = getattr(function, "__name__", None) or type(function).__name__
    return re.sub(r"\W+", "", name) or "function"


def arity_faults(place: str, function: Any, *arguments: str) -> list[Fault]:
    """What is wrong with a function that is to be called with these arguments."""
    remedy = f"give a function of ({', '.join(arguments)})"
    if not callable(function):
        return [Fault(place, f"got {function!r}, a {type(function).__name__}", remedy)]
    with contextlib.suppress(ValueError):  # some builtins have no signature
        signature = inspect.signature(function)
        try:
            signature.bind(*arguments)
        except TypeError as error:
            return [
                Fault(
                    place,
                    f"{function_name(function)}{signature} does not take ({', '.join(arguments)}): {error}",
                    remedy,
                )
            ]
    return []


def fingerprint(function: Callable[..., Any]) -> str:
    """A short hash of a function's source, or of its code where the source is not known.

    The lines of a lambda hold what surrounds it, too: its code is taken.
    """
    function = inspect.unwrap(function)
    code: CodeType | None = getattr(function, "__code__", None)
    target: Any = function if code is not None or inspect.ismethod(function) else type(function)
    try:
        if code is not None and code.co_name == "<lambda>":
            raise OSError
        text = textwrap.dedent(inspect.getsource(target))
    except (OSError, TypeError):
        text = repr(function) if code is None else _code(code)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code.hex(), constants, code.co_names, code.co_varnames))


def failure(error: BaseException) -> str:
    """An exception of foreign code in one line, with the place that raised it."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(frame.f_code.co_filename).name}:{line})"
