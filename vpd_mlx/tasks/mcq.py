"""Multiple choice in SciKnowEval's format: the letter of the right option, and nothing else, inside `<answer>` tags."""

from __future__ import annotations

import re
from typing import Literal

from vpd_mlx.errors import DataError
from vpd_mlx.tasks.answers import in_tag
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.types import Problem, Verdict

__all__ = ["Mcq", "McqSettings"]


class McqSettings(DatasetSettings):
    """Multiple choice: the letter of the right option inside `<answer>` tags."""

    kind: Literal["mcq"]


_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?", re.I)


class Mcq:
    """Only a letter inside the tags is an answer."""

    def __init__(self, cfg: McqSettings) -> None:
        self.train, self.held_out = read_split(cfg)
        for problem in (*self.train, *self.held_out):
            answer = (problem.answer or "").strip()
            if len(answer) != 1 or not answer.isascii() or not answer.isupper():
                remedy = "name the column of the letters in task.answer, or fix the row"
                raise DataError(f"row {problem.id}: the answer {problem.answer!r} is not a capital letter; {remedy}")

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """1 for the right letter, else 0 with what is wrong, which does not give the right letter away."""
        inner, letter = in_tag(completion, "answer"), self.answer_in(completion)
        if inner is None:
            return Verdict(0.0, "There is no <answer>...</answer> with the letter of an option.")
        if letter is None:
            shown = inner if len(inner) <= 60 else inner[:60] + "..."
            return Verdict(0.0, f"Inside <answer> stands {shown!r}; only the letter of one option may stand there.")
        right = letter == (problem.answer or "").strip()
        return Verdict(1.0) if right else Verdict(0.0, f"{letter} is not the right option.")

    def answer_in(self, completion: str) -> str | None:
        """The letter."""
        letter = _LETTER.fullmatch(in_tag(completion, "answer") or "")
        return None if letter is None else letter[1].upper()

    def reference_completion(self, problem: Problem) -> str | None:
        """The reference if it has an answer in tags, else the letter in its tags."""
        if problem.reference is not None and in_tag(problem.reference, "answer") is not None:
            return problem.reference
        return f"<answer>\n{(problem.answer or '').strip()}\n</answer>"
