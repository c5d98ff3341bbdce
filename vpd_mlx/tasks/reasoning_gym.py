"""Problems made by the reasoning-gym library, graded by its own scorers."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Literal

from pydantic import Field

from vpd_mlx.common.settings import Plain, Positive, Section
from vpd_mlx.errors import DataError, SourceError, config_error
from vpd_mlx.tasks.answers import in_tag
from vpd_mlx.tasks.checker import Checker
from vpd_mlx.tasks.data import fraction
from vpd_mlx.types import Problem, Verdict

__all__ = ["ReasoningGym", "ReasoningGymSettings"]


class ReasoningGymSettings(Section):
    """Any task of the reasoning-gym library, by name and settings, graded by the library's own scorer."""

    kind: Literal["reasoning_gym"]
    name: str = Field(description="The library's name of the task, e.g. `spell_backward`.")
    settings: Plain = Field({}, description="Settings of that task, as the library names them.")
    rows: Positive = Field(1000, description="Problems to make.")
    seed: int = Field(0, ge=0, description="Seed of the problems.")
    held_out: float = Field(0.1, gt=0, lt=1, description="Share held out for evaluation, by a hash of name and index.")
    partial_credit: bool = Field(
        True, description="Keep the scorer's partial scores; otherwise only a full score counts."
    )
    timeout: float = Field(
        10.0, gt=0, description="Seconds of processor time to score one answer; one that takes more is wrong."
    )


SYSTEM = "Solve the problem. Put the answer, and nothing else, between <answer> and </answer>."

# Makes and scores problems in a process of its own. Scoring compares the question: a task that makes a different problem each
# time must not grade the wrong one.
MAKER = """
import json, reasoning_gym
from reasoning_gym.factory import DATASETS
made = {}

def names():
    return json.dumps(sorted(DATASETS))

def make(name, settings, size, seed):
    made["set"] = reasoning_gym.create_dataset(name, size=size, seed=seed, **json.loads(settings))
    return json.dumps(True)

def entry(i):
    e = made[i] = made["set"][i]
    return json.dumps([e["question"], None if e["answer"] is None else str(e["answer"])])

@limited
def score(name, settings, size, seed, i, question, answer):
    if "set" not in made:
        make(name, settings, size, seed)
    e = made[i] if i in made else made["set"][i]
    if e["question"] != question:
        raise ValueError("the library makes another problem " + str(i) + " each time; it cannot be used")
    return json.dumps(float(made["set"].score_answer(answer=answer, entry=e)))
"""
# Some scorers evaluate the answer as code. Code that could tamper with the verdict is not an answer to any task.
REACHES = re.compile(
    r"__|\b(eval|exec|compile|open|input|print|getattr|setattr|delattr|globals|locals|vars|dir|type|object|super|lambda|"
    r"import|breakpoint|help|exit|quit|memoryview)\s*[(\[,)\]:.]|\.\s*[A-Za-z_]\w*\s*\("
)


class ReasoningGym:
    """Rows are split by a hash of the task's name and the row's index. Repeated questions are dropped."""

    def __init__(self, cfg: ReasoningGymSettings) -> None:
        self._checker = Checker(MAKER, "reasoning_gym", "reasoning-gym", cfg.kind, cfg.timeout)
        self.notices = tuple(filter(None, [self._checker.notice]))
        self._partial_credit = cfg.partial_credit
        self._made = (cfg.name, json.dumps(cfg.settings), cfg.rows, cfg.seed)
        names = self._checker.call("names")
        if cfg.name not in names:
            what = f"{cfg.name!r} is not a task of reasoning-gym"
            raise config_error("task.name", what, f"use one of {', '.join(names)}")
        try:
            self._checker.call("make", *self._made)
        except SourceError as error:
            what = f"{cfg.settings} are refused by {cfg.name} ({error})"
            raise config_error("task.settings", what, "see that task's settings") from None
        sides: tuple[list[Problem], list[Problem]] = ([], [])
        seen: set[str] = set()
        for index in range(cfg.rows):
            question, answer = self._checker.call("entry", index)
            if question not in seen:
                seen.add(question)
                held = fraction(f"{cfg.name}:{index}") < cfg.held_out
                messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": str(question)})
                sides[held].append(Problem(f"{cfg.name}:{index}", messages, answer, data={"index": index}))
        if not sides[0] or not sides[1]:
            what = f"{len(seen)} different problems leave none to {'evaluate' if sides[0] else 'train'} on"
            raise DataError(f"task.rows: {what}; raise task.rows or change task.held_out")
        self.train, self.held_out = tuple(sides[0]), tuple(sides[1])

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """The library's score; its scorers give no text."""
        answer = in_tag(completion, "answer")
        if answer is None:
            return Verdict(0.0, "There is no <answer>...</answer>.")
        if answer != problem.answer and REACHES.search(answer):
            return Verdict(0.0, "The answer holds code, which is no answer here.")

        def read(score: Any) -> Verdict:
            if not isinstance(score, float) or not math.isfinite(score):
                return Verdict(0.0, error=f"the scorer returned {score!r}")
            if score >= 1.0:
                return Verdict(1.0)
            return Verdict(
                max(score, 0.0) if self._partial_credit else 0.0, f"{answer[:200]!r} is not the right answer."
            )

        call = ("score", *self._made, problem.data["index"], problem.prompt)
        what = f"the scorer failed on {answer[:80]!r}"
        return self._checker.grade(problem, (*call, answer), (*call, problem.answer or ""), what, read)

    def reference_completion(self, problem: Problem) -> str | None:
        """The library's answer, if it has one: some tasks have only a scorer."""
        return None if problem.answer is None else f"<answer>{problem.answer}</answer>"
