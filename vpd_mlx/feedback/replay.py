"""C = feedback that was given before: what a person typed in an earlier run, any run's rollouts, or a file of one's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from vpd_mlx.common.settings import Section, absolute
from vpd_mlx.common.text import clean
from vpd_mlx.errors import DataError, Fault
from vpd_mlx.feedback.outside import Answer, Outside, eligible
from vpd_mlx.feedback.settings import unset
from vpd_mlx.tasks.data import read_rows
from vpd_mlx.types import Group, Rollout

__all__ = ["Replay", "ReplayKeys", "read_feedback"]

FILES = ("human.jsonl", "rollouts.jsonl")  # of a run folder, in order of preference
SOLUTIONS = ("sibling", "reference", "both")  # no words on a completion: their own sources give them afresh


class ReplayKeys(Section):
    """What `replay` adds to the section `feedback`."""

    replay: str | None = Field(
        None,
        description="Source `replay`: a run folder, or a .jsonl file with `problem`, `feedback` and, where it is about one "
        "completion, `completion`.",
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """The file must be given."""
        yield from unset("replay", "replay", self.replay, "give a run folder or a .jsonl file", recipe)
        yield from super().faults(recipe)

    def located(self, folder: Path) -> Self:
        """The file, as seen from the recipe's folder."""
        path = None if self.replay is None else absolute(self.replay, folder)
        return super().located(folder).model_copy(update={"replay": path})


class Replay(Outside):
    """Feedback by problem, and by completion where the very same one was spoken about.

    Words on another completion of the problem are given where there are none on this one: the first in the file.
    """

    def __init__(self, path: Path, problems: Collection[str] = (), on_success: bool = False) -> None:
        """Read it all.

        Raises:
            DataError: there is no such file, it is broken, or says nothing on any of `problems`.
        """
        self._on_success = on_success
        self._exact: dict[tuple[str, str], str | None] = {}
        self._any: dict[str, str] = {}
        for problem, completion, text in read_feedback(path):
            if completion is not None:
                self._exact.setdefault((problem, completion), text)
            if text is not None:
                self._any.setdefault(problem, text)
        if problems and not set(problems) & {*self._any}:
            some = ", ".join(map(repr, list(self._any)[:3])) or "nothing"
            raise DataError(
                f"{path}: it speaks of {some}, and none of these is a problem of this task; "
                "`problem` must be an id as `vpd-mlx verify` shows it"
            )

    def asks(self, rollout: Rollout) -> bool:
        """Failures, and successes where the recipe says so."""
        return eligible(rollout, self._on_success)

    def __call__(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """What is on record."""
        return [
            [
                self._exact.get((g.problem.id, r.text), self._any.get(g.problem.id)) if want and self.asks(r) else None
                for r, want in zip(g.rollouts, wants, strict=True)
            ]
            for g, wants in zip(groups, wanted, strict=True)
        ]


def read_feedback(path: Path) -> list[tuple[str, str | None, str | None]]:
    """(problem id, completion or None, feedback or None) of each row of a file, or of a run's.

    Raises:
        DataError: there is no such file, or a row is broken (with its line).
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), path / FILES[-1])
    if not file.is_file():
        raise DataError(f"{file}: no such file to replay; give a run folder or a .jsonl file in feedback.replay")
    return [found for place, row in read_rows(str(file)) for found in _row(place, row)]


def _row(place: str, row: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None]]:
    if "problem" not in row or not {"feedback", "context"} & set(row):
        raise DataError(f"{place}: not a row of feedback; it needs `problem` and `feedback`")
    text, completion = row.get("feedback"), row.get("completion")
    if "feedback" not in row:
        context = row["context"]
        if not isinstance(context, Mapping) or context.get("kind") in SOLUTIONS:
            return
        text = context.get("text")
    for name, value in (("completion", completion), ("feedback", text)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{place}: `{name}` is a {type(value).__name__}; it must be text or null")
    yield str(row["problem"]), completion, None if text is None else clean(text)
