"""The completion must match a regular expression: one for all rows, or each row's own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpd_mlx.common.thoughts import spoken
from vpd_mlx.errors import DataError, SourceError, config_error
from vpd_mlx.tasks.checker import Checker
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.types import Problem, Verdict

__all__ = ["Regex", "RegexSettings"]


class RegexSettings(DatasetSettings):
    """The completion, less its thinking, must match a pattern."""

    kind: Literal["regex"]
    pattern: str | None = Field(None, description="Pattern of all rows; null takes each row's from the answer column.")
    match: Literal["whole", "anywhere"] = Field("whole", description="Where in the completion the pattern must match.")
    ignore_case: bool = Field(False, description="Match without regard to case.")
    timeout: float = Field(
        1.0, gt=0, description="Seconds of processor time for one match; a completion that takes more does not match."
    )


# Not `re`: this library looks for signals in the midst of a match, also of one that backtracks for ever on a model's text.
MATCHER = """
import functools, json, regex

@functools.lru_cache(4096)
def compiled(pattern, ignore_case):
    return regex.compile(pattern, regex.MULTILINE | (regex.IGNORECASE if ignore_case else 0))

@limited
def fault(pattern, ignore_case):
    try:
        compiled(pattern, ignore_case)
    except regex.error as error:
        return json.dumps(str(error))
    return json.dumps("")

@limited
def matches(pattern, ignore_case, whole, text):
    found = compiled(pattern, ignore_case)
    return json.dumps(bool(found.fullmatch(text) if whole else found.search(text)))
"""


class Regex:
    """Ignores white space around the completion. `^` and `$` match at lines."""

    def __init__(self, cfg: RegexSettings) -> None:
        self._cfg = cfg
        self._checker = Checker(MATCHER, "regex", "regex", cfg.kind, cfg.timeout)
        if cfg.pattern is not None and (fault := self._fault(cfg.pattern)):
            raise config_error("task.pattern", f"{cfg.pattern!r} is not a pattern ({fault})", "fix it")
        self.train, self.held_out = read_split(cfg)
        for problem in (*self.train, *self.held_out):
            pattern = self._pattern(problem)
            if cfg.pattern is None and (fault := self._fault(pattern)):
                raise DataError(f"row {problem.id}: {pattern!r} is not a pattern ({fault}); fix it")

    def _fault(self, pattern: str) -> str:
        try:
            return str(self._checker.call("fault", pattern, self._cfg.ignore_case))
        except SourceError as error:
            return str(error)

    def _pattern(self, problem: Problem) -> str:
        if self._cfg.pattern is not None:
            return self._cfg.pattern
        if problem.answer is None:
            what = f"no column {self._cfg.answer!r} with a pattern"
            raise DataError(f"row {problem.id}: {what}; name it in task.answer, or set task.pattern")
        return problem.answer

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """1 for a match, else 0 with a text that does not give the pattern away."""
        pattern, whole = self._pattern(problem), self._cfg.match == "whole"
        call = ("matches", pattern, self._cfg.ignore_case, whole)

        def read(found: bool) -> Verdict:
            where = "is not" if whole else "has nothing"
            return Verdict(1.0) if found else Verdict(0.0, f"The answer {where} of the form that is asked for.")

        known, what = spoken(problem.reference or "").strip(), f"the pattern {pattern!r} cannot be used"
        return self._checker.grade(problem, (*call, spoken(completion).strip()), (*call, known), what, read)

    def reference_completion(self, problem: Problem) -> str | None:
        """The row's reference, if it has one."""
        return problem.reference
