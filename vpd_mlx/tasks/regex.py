"""The completion must match a regular expression: one for all rows, or each row's own."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from pydantic import Field

from vpd_mlx.errors import DataError, config_error
from vpd_mlx.tasks.answers import spoken
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.types import Problem, Verdict

__all__ = ["Regex", "RegexSettings"]


class RegexSettings(DatasetSettings):
    """The completion, less its thinking, must match a pattern."""

    kind: Literal["regex"]
    pattern: str | None = Field(None, description="Pattern of all rows; null takes each row's from the answer column.")
    match: Literal["whole", "anywhere"] = Field("whole", description="Where in the completion the pattern must match.")
    ignore_case: bool = Field(False, description="Match without regard to case.")
    timeout: float = Field(1.0, gt=0, description="Seconds for one match; after that there is no verdict.")


class Regex:
    """Ignores white space around the completion. `^` and `$` match at lines."""

    def __init__(self, cfg: RegexSettings) -> None:
        self._cfg = cfg
        # Not `re`: this library has a timeout for patterns that backtrack for ever on a model's text.
        try:
            self._regex = regex = importlib.import_module("regex")
        except ImportError:
            what = "'regex' needs the regex library, which is not installed"
            raise config_error("task.kind", what, "pip install 'vpd-mlx[regex]'") from None
        self._flags = regex.MULTILINE | (regex.IGNORECASE if cfg.ignore_case else 0)
        self._one = None
        if cfg.pattern is not None:
            try:
                self._one = regex.compile(cfg.pattern, self._flags)
            except regex.error as error:
                raise config_error("task.pattern", f"{cfg.pattern!r} is not a pattern ({error})", "fix it") from None
        self.train, self.held_out = read_split(cfg)
        for problem in (*self.train, *self.held_out):
            self._pattern(problem)

    def _pattern(self, problem: Problem) -> Any:
        if self._one is not None:
            return self._one
        if problem.answer is None:
            what = f"no column {self._cfg.answer!r} with a pattern"
            raise DataError(f"row {problem.id}: {what}; name it in task.answer, or set task.pattern")
        try:
            return self._regex.compile(problem.answer, self._flags)  # the library caches compiled patterns
        except self._regex.error as error:
            raise DataError(f"row {problem.id}: {problem.answer!r} is not a pattern ({error}); fix it") from None

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """1 for a match, else 0 with a text that does not give the pattern away."""
        pattern, text = self._pattern(problem), spoken(completion).strip()
        whole = self._cfg.match == "whole"
        try:
            found = (pattern.fullmatch if whole else pattern.search)(text, timeout=self._cfg.timeout)
        except TimeoutError:
            return Verdict(0.0, error=f"the pattern {pattern.pattern!r} took longer than {self._cfg.timeout:g} s")
        where = "is not" if whole else "has nothing"
        return Verdict(1.0) if found else Verdict(0.0, f"The answer {where} of the form that is asked for.")

    def reference_completion(self, problem: Problem) -> str | None:
        """The row's reference, if it has one."""
        return problem.reference
