"""C = the words of a function that a Python program hands over: `vpd.train(..., feedback=[words])`."""

from __future__ import annotations

from collections.abc import Callable

from vpd_mlx.common.functions import PREFIX, failure, not_handed_over
from vpd_mlx.errors import SourceError
from vpd_mlx.feedback.base import Source, SourceEntry, SourceParts
from vpd_mlx.feedback.outside import Asking
from vpd_mlx.types import Problem, Rollout

__all__ = ["Function", "function_entry"]


class Function(Asking):
    """Asks the function about one rollout at a time, in a thread of its own."""

    def __init__(self, name: str, words: Callable[[Problem, Rollout], str | None], parts: SourceParts) -> None:
        super().__init__(name, parts.cfg, 1, parts.host)
        self._words = words

    def ask(self, problem: Problem, rollout: Rollout) -> str | None:
        """The function's text.

        Raises:
            SourceError: it raised, or returned something else.
        """
        try:
            text = self._words(problem, rollout)
        except (Exception, SystemExit) as error:
            raise SourceError(failure(error)) from error
        if not isinstance(text, str | None):
            raise SourceError(f"returned {text!r}; needs a text, or None for no feedback")
        return text


def function_entry(name: str) -> SourceEntry:
    """The entry of the source `function:NAME`."""

    def build(parts: SourceParts) -> Source:
        words = parts.functions.get(name)
        if words is None:
            raise not_handed_over("feedback.sources", f"the source {name.removeprefix(PREFIX)!r}")
        return Function(name, words, parts)

    return SourceEntry(build, on_success=True)
