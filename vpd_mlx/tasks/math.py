r"""The final answer, in `\boxed{}` or after `####`, compared in value by the math-verify library."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpd_mlx.errors import DataError, SourceError
from vpd_mlx.sandbox import Library
from vpd_mlx.tasks.answers import final_answer, spoken
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.types import Problem, Verdict

__all__ = ["Math", "MathSettings"]


class MathSettings(DatasetSettings):
    r"""The final answer, in `\boxed{}` or after `####`, must equal the row's in value."""

    kind: Literal["math"]
    timeout: float = Field(10.0, gt=0, description="Seconds for one comparison; after that there is no verdict.")


# A signal interrupts pure Python, and the process survives; everything else is killed from outside.
JUDGE = """
import json
from math_verify import parse, verify
from math_verify.errors import TimeoutException

def read(text, seconds):
    return parse("\\\\boxed{" + text + "}", parsing_timeout=seconds, raise_on_error=True)

def equal(gold, got, seconds):
    try:
        return json.dumps(bool(verify(read(gold, seconds), read(got, seconds), timeout_seconds=seconds, raise_on_error=True)))
    except TimeoutException:
        raise TimeoutError("the comparison took too long") from None
"""


class Math:
    """Numbers, fractions and expressions of equal value are equal: 1/2, 0.5 and \\frac{1}{2}."""

    def __init__(self, cfg: MathSettings) -> None:
        self._seconds = max(1, int(cfg.timeout / 3))  # for each of two readings and a comparison
        self._library = Library(JUDGE, "math_verify", "math", cfg.kind, cfg.timeout)
        self.notices = tuple(filter(None, [self._library.notice]))
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
        try:
            equal = self._library.call("equal", gold, got, self._seconds)
        except SourceError as error:
            return Verdict(0.0, error=f"cannot compare {got[:80]!r} with {gold[:80]!r}: {error}")
        return Verdict(1.0) if equal else Verdict(0.0, f"{got[:200]} is not the answer.")

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
