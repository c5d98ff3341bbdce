"""The completion must be the answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpd_mlx.common.thoughts import spoken
from vpd_mlx.errors import DataError
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.types import Problem, Verdict

__all__ = ["Exact", "ExactSettings"]


class ExactSettings(DatasetSettings):
    """The completion, less its thinking, must equal the answer, ignoring white space at the ends."""

    kind: Literal["exact"]
    ignore_case: bool = Field(False, description="Compare without regard to case.")


class Exact:
    """Equality of text, ignoring white space at the ends."""

    def __init__(self, cfg: ExactSettings) -> None:
        self.train, self.held_out = read_split(cfg)
        self._fold = cfg.ignore_case
        for problem in (*self.train, *self.held_out):
            if problem.answer is None:
                raise DataError(f"row {problem.id}: no column {cfg.answer!r}; name the right one in task.answer")

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """1 for equal texts, else 0 with a text that does not give the answer away."""
        got, want = (said := spoken(completion).strip()), (problem.answer or "").strip()
        if self._fold:
            got, want = got.casefold(), want.casefold()
        return Verdict(1.0) if got == want else Verdict(0.0, f"{said!r} is not the answer.")

    def reference_completion(self, problem: Problem) -> str | None:
        """The answer."""
        return problem.answer
