"""C = feedback from an earlier time: what a person typed or gave in a run, any run's rollouts, or a file of your own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vpd_mlx.common.settings import Section
from vpd_mlx.common.text import without_surrogates
from vpd_mlx.errors import DataError
from vpd_mlx.feedback.base import Answer, SourceEntry, SourceParts, answer_each
from vpd_mlx.feedback.outside import Outside
from vpd_mlx.feedback.page.board import SCOPES, Scope
from vpd_mlx.tasks.data import read_rows
from vpd_mlx.types import Group, Rollout

__all__ = ["REPLAY", "Replay", "ReplayKeys", "read_feedback"]

Recorded = tuple[str, str | None, str | None, Scope | None]
FILES = ("human.jsonl", "rollouts.jsonl")  # of a run folder, in order of preference


class ReplayKeys(Section):
    """What `replay` adds to the section `feedback`."""

    paths: ClassVar[tuple[str, ...]] = ("replay",)

    replay: str | None = Field(
        None,
        description="Source `replay`: a run folder, or a .jsonl file with `problem`, `feedback` and, where it is about one "
        "completion, `completion`.",
    )


class Replay(Outside):
    """Feedback by problem and completion; failing that, the first on any other completion of the problem in the file."""

    def __init__(
        self, path: Path, problems: Collection[str] = (), on_success: bool = False, solutions: Collection[str] = ()
    ) -> None:
        """Reads the whole file, which must have feedback on one of `problems`, if these are known."""
        super().__init__(on_success)
        self._exact: dict[tuple[str, str], str | None] = {}
        self._any: dict[str, str] = {}
        self._task: str | None = None
        for problem, completion, text, scope in read_feedback(path, solutions):
            if (
                scope is not None and completion is not None
            ):  # given on a page: the newest counts, for what it was given for
                self._exact[problem, completion] = text
                if scope == "problem" and text is not None:
                    self._any[problem] = text
                elif scope == "task":
                    self._task = text
                continue
            if completion is not None:
                self._exact.setdefault((problem, completion), text)
            if text is not None:
                self._any.setdefault(problem, text)
        known = dict.fromkeys([*self._any, *(problem for problem, _ in self._exact)])
        if problems and self._task is None and not set(problems) & {*known}:
            some = ", ".join(map(repr, list(known)[:3])) or "nothing"
            what = f"has feedback on {some}, and none of these is a problem of this task"
            raise DataError(f"{path}: {what}; `problem` must be an id as `vpd-mlx verify` shows it")

    def __call__(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """The recorded feedback."""

        def recorded(group: Group, rollout: Rollout) -> Answer:
            problem = group.problem.id
            otherwise = self._any.get(problem, self._task)
            return self._exact.get((problem, rollout.text), otherwise) if self.asks(rollout) else None

        return answer_each(groups, wanted, recorded)


def read_feedback(path: Path, solutions: Collection[str]) -> list[Recorded]:
    """(problem id, completion or None, feedback or None, scope or None) of each row of a file, or of a run's.

    A run's contexts of the kinds in `solutions` are left out: they are not about a completion, and their own sources provide
    them anew.

    Raises:
        DataError: there is no such file, or a row is broken (with its line).
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), path / FILES[-1])
    if not file.is_file():
        raise DataError(f"{file}: no such file to replay; give a run folder or a .jsonl file in feedback.replay")
    return [found for place, row in read_rows(str(file)) for found in _row(place, row, solutions)]


def _row(place: str, row: Mapping[str, Any], solutions: Collection[str]) -> Iterator[Recorded]:
    if "problem" not in row or not {"feedback", "context"} & set(row):
        raise DataError(f"{place}: not a row of feedback; it needs `problem` and `feedback`")
    text, completion = row.get("feedback"), row.get("completion")
    if "feedback" not in row:
        context = row["context"]
        if not isinstance(context, Mapping) or context.get("kind") in solutions:
            return
        text = context.get("text")
    for name, value in (("completion", completion), ("feedback", text)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{place}: `{name}` is a {type(value).__name__}; it must be text or null")
    scope = row.get("scope")
    if scope not in (None, *SCOPES):
        raise DataError(f"{place}: `scope` is {scope!r}; it must be one of {', '.join(SCOPES)}, or left out")
    yield str(row["problem"]), completion, None if text is None else without_surrogates(text), scope


def _build(parts: SourceParts) -> Replay:
    return Replay(Path(parts.cfg.replay or ""), parts.problems, parts.cfg.on_success, parts.solutions)


REPLAY = SourceEntry(
    _build, keys=ReplayKeys, required=("replay", "give a run folder or a .jsonl file"), on_success=True
)
