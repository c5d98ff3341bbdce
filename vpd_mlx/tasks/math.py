r"""The final answer, in `\boxed{}` or after `####`, compared in value by the math-verify library."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpd_mlx.common.thoughts import spoken
from vpd_mlx.errors import DataError
from vpd_mlx.tasks.answers import final_answer
from vpd_mlx.tasks.checker import Checker
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.types import Problem, Verdict

__all__ = ["Math", "MathSettings"]


class MathSettings(DatasetSettings):
    r"""The final answer, in `\boxed{}` or after `####`, must equal the row's in value."""

    kind: Literal["math"]
    timeout: float = Field(
        10.0, gt=0, description="Seconds of processor time for one comparison; an answer that takes more is wrong."
    )


# Both of the library's own timeouts are off: they go by the clock, and a busy machine would make right answers wrong.
JUDGE = """
import functools, json
from math_verify import parse, verify

def read(text):
    return parse("\\\\boxed{" + text + "}", parsing_timeout=None, raise_on_error=True)

known = functools.lru_cache(1024)(read)

@limited
def equal(gold, got):
    return json.dumps(bool(verify(known(gold), read(got), timeout_seconds=None, raise_on_error=True)))
"""


class Math:
    """Numbers, fractions and expressions of equal value are equal: 1/2, 0.5 and \\frac{1}{2}."""

    def __init__(self, cfg: MathSettings) -> None:
        self._checker = Checker(JUDGE, "math_verify", "math", cfg.kind, cfg.timeout)
        self.notices = tuple(filter(None, [self._checker.notice]))
        self.train, self.held_out = read_split(cfg)
        for problem in (*self.train, *self.held_out):
            if not _gold(problem):
                what = f"no answer in column {cfg.answer!r}"
                raise DataError(f"row {problem.id}: {what}; name the right one in task.answer")

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """1 for an equal value, else 0 with a text that does not give the answer away."""
        got = self.answer_in(completion)
        if got is None:
            return Verdict(0.0, "There is no final answer: it must stand in \\boxed{}, or after ####.")
        gold = _gold(problem)
        if got == gold:
            return Verdict(1.0)

        def read(equal: bool) -> Verdict:
            return Verdict(1.0) if equal else Verdict(0.0, f"{got[:200]} is not the answer.")

        what = f"cannot compare {got[:80]!r} with {gold[:80]!r}"
        # Compared with itself, the row's answer would be equal as text; with 1, its value is needed.
        return self._checker.grade(problem, ("equal", gold, got), ("equal", gold, "1"), what, read)

    def answer_in(self, completion: str) -> str | None:
        """The final answer as it is written; equal values written differently are different votes."""
        return final_answer(spoken(completion))

    def reference_completion(self, problem: Problem) -> str | None:
        """The reference or the answer if it has a final answer, else the answer in a box."""
        for text in (problem.reference, problem.answer):
            if text is not None and final_answer(text) is not None:
                return text
        return f"\\boxed{{{_gold(problem)}}}"


def _gold(problem: Problem) -> str:
    # GSM8K's answer column holds the whole solution, with the answer after ####.
    answer = (problem.answer or "").strip()
    return final_answer(answer) or answer
