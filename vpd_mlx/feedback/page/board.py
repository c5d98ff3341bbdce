"""The failures that wait for a comment, and the comments given: what the page shows. It knows no server and no file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from vpd_mlx.common.text import without_surrogates
from vpd_mlx.types import Problem, Rollout

__all__ = ["SCOPES", "Board", "Refused", "Scope"]

Scope = Literal["answer", "problem", "task"]
SCOPES = get_args(Scope)
"""What a comment is for: this very answer; every failure on the problem; every failure on any problem. The nearest one counts."""

MOST_WAITING = 200  # cards without a comment: more than anybody reads, and what every look of the page fetches
MOST_TEXT = 4000  # characters of a comment


class Refused(Exception):
    """A comment that cannot be taken, and why."""


@dataclass(frozen=True)
class Card:
    """All answers of the same words to the same problem, their verdict, and the comment on them."""

    number: int
    problem: Problem
    completion: str
    verdict: str
    score: float
    right: bool
    cut_off: bool
    count: int
    step: int
    comment: str | None = None
    scope: Scope | None = None

    def shown(self) -> dict[str, Any]:
        """What the page gets."""
        return {
            "number": self.number,
            "problem": self.problem.id,
            "prompt": self.problem.prompt,
            "completion": self.completion,
            "verdict": self.verdict,
            "score": self.score,
            "right": self.right,
            "cut_off": self.cut_off,
            "expected": self.problem.answer if self.problem.answer is not None else self.problem.reference,
            "count": self.count,
            "step": self.step,
            "comment": self.comment,
            "scope": self.scope,
        }


class Board:
    """Cards and comments; the run's thread and the server's both use it.

    `keep` is called with each comment's row before it counts. What it raises reaches the page, and the comment is not taken.
    """

    def __init__(self, keep: Callable[[Mapping[str, Any]], None] = lambda row: None) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._cards: dict[tuple[str, str], Card] = {}
        self._exact: dict[tuple[str, str], str] = {}
        self._problem: dict[str, str] = {}
        self._task: str | None = None
        self._again: dict[str, Problem] = {}
        self._version = 0
        self._numbers = 0
        self.given = 0
        self.step = 0

    def restore(self, row: Mapping[str, Any]) -> None:
        """Take up a row of `human.jsonl`, of this run's earlier part; those typed at a terminal are for their answer alone."""
        text = row["feedback"]
        if text is not None:
            self._count(str(row["problem"]), str(row["completion"]), str(text), row.get("scope", "answer"))

    def _count(self, problem: str, completion: str, text: str, scope: Scope) -> None:
        self._exact[problem, completion] = text
        if scope == "problem":
            self._problem[problem] = text
        elif scope == "task":
            self._task = text
        self.given += 1

    def text(self, problem: str, completion: str) -> str | None:
        """The comment that counts for an answer: its own, else the problem's, else the task's, the newest of each."""
        with self._lock:
            return self._exact.get((problem, completion)) or self._problem.get(problem) or self._task

    def wait(self, problem: Problem, rollout: Rollout) -> None:
        """Let an answer wait for a comment; one that waits already is counted once more."""
        assert rollout.verdict is not None
        with self._lock:
            key = problem.id, rollout.text
            known = self._cards.pop(key, None)
            if known is None:
                self._numbers += 1
                known = Card(
                    self._numbers,
                    problem,
                    rollout.text,
                    rollout.verdict.text,
                    rollout.verdict.score,
                    rollout.success,
                    rollout.finish == "length",
                    0,
                    self.step,
                )
            self._cards[key] = replace(known, count=known.count + 1, step=self.step)  # the newest stand last
            waiting = [k for k, card in self._cards.items() if card.comment is None]
            for old in waiting[: max(0, len(waiting) - MOST_WAITING)]:
                del self._cards[old]
            self._version += 1

    def comment(self, number: Any, text: Any, scope: Any) -> None:
        """Take a comment on a card; a later one on the same card replaces it.

        Raises:
            Refused: there is no such card any more, or the comment is none.
        """
        if not isinstance(text, str) or not text.strip() or len(text) > MOST_TEXT:
            raise Refused(f"a comment has 1 to {MOST_TEXT} characters")
        if scope not in SCOPES:
            raise Refused(f"a comment is for one of {', '.join(SCOPES)}")
        with self._lock:
            key = next((k for k, card in self._cards.items() if card.number == number), None)
            if key is None:
                raise Refused("this answer no longer waits: newer ones took its place")
            card, text = self._cards[key], without_surrogates(text.strip())
            self._keep(
                {
                    "problem": card.problem.id,
                    "prompt": card.problem.prompt,
                    "completion": card.completion,
                    "score": card.score,
                    "feedback": text,
                    "how": "page",
                    "scope": scope,
                    "step": self.step,
                }
            )
            self._count(card.problem.id, card.completion, text, scope)
            self._cards[key] = replace(card, comment=text, scope=scope)
            if scope != "task":
                self._again[card.problem.id] = card.problem
            self._version += 1

    def again(self, most: int) -> list[Problem]:
        """The first problems whose comments have not met another answer yet, `most` at most; each is named once."""
        with self._lock:
            return [self._again.pop(name) for name in list(self._again)[:most]]

    def view(self, version: int) -> dict[str, Any]:
        """What the page shows, newest first; without the cards where nothing has changed since this version."""
        with self._lock:
            out: dict[str, Any] = {"version": self._version, "step": self.step, "given": self.given}
            if version != self._version:
                out["cards"] = [card.shown() for card in reversed(self._cards.values())]
            return out
