"""C = what a person writes on a local page about failures, while training goes on.

The source never waits: failures become cards of the page, and a comment counts from the next step on, for the same answer, for
all failures on its problem, or for all failures, as the person chose; its problem is asked again in the next step. Comments are
kept in `human.jsonl`, like those typed at a terminal: a resumed run takes them up, and a later one can replay them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vpd_mlx.common.files import file_errors, own_file, read_rows
from vpd_mlx.errors import RunError, config_error
from vpd_mlx.feedback.base import Answer, Host, answer_each
from vpd_mlx.feedback.outside import Outside
from vpd_mlx.feedback.page.board import SCOPES, Board
from vpd_mlx.feedback.page.server import Server
from vpd_mlx.types import Group, Problem, Rollout

__all__ = ["Page"]

FILE = "human.jsonl"
LIBRARIES = ("starlette", "uvicorn")


class Page(Outside):
    """Shows failures on a page, and answers with the comments that were given so far."""

    def __init__(self, on_success: bool, host: Host) -> None:
        super().__init__(on_success)
        self._host = host
        self._board = Board(self._keep)
        self._server: Server | None = None
        self._file: TextIO | None = None
        self._said = 0

    def ready(self) -> None:
        """Look for the server's libraries."""
        missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
        if missing:
            raise config_error("feedback.human", f"page needs {' and '.join(missing)}", "pip install 'vpd-mlx[page]'")

    def open(self, folder: Path) -> None:
        """Read the comments of before, and serve the page."""
        path = folder / FILE
        try:
            for row in read_rows(path):
                if row.get("scope", "answer") not in SCOPES:
                    raise ValueError(f"scope {row['scope']!r}")
                self._board.restore(row)
            self._file = own_file(path, "a")
            self._file.truncate(path.read_bytes().rfind(b"\n") + 1)  # the unfinished line of a run that was killed
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise RunError(f"{path}: cannot be used ({what}); fix it, or move it away") from None
        self._said = self._board.given
        self._server = Server(self._board)
        self._host.note(f"comment on failures while the run goes on: {self._server.address}")

    def _keep(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            with file_errors(Path(self._file.name)):
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._file.flush()

    def __call__(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """The comments that count for these rollouts; all that are asked about become cards of the page."""
        self._board.step += 1

        def commented(group: Group, rollout: Rollout) -> Answer:
            if not self.asks(rollout):
                return None
            self._board.wait(group.problem, rollout)
            return self._board.text(group.problem.id, rollout.text)

        return answer_each(groups, wanted, commented)

    def for_evaluation(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """The comments given so far, those on the task above all; held-out problems are not shown."""

        def known(group: Group, rollout: Rollout) -> Answer:
            return self._board.text(group.problem.id, rollout.text) if self.asks(rollout) else None

        return answer_each(groups, wanted, known)

    def again(self, most: int) -> list[Problem]:
        """The problems that were commented on since the last step: asked again, they show what the words are worth."""
        return self._board.again(most)

    def figures(self) -> dict[str, float]:
        """Comments given since the last call, and in all."""
        new, self._said = self._board.given - self._said, self._board.given
        return {"human/comments": new, "human/comments_in_all": self._said}

    def state(self) -> dict[str, Any]:
        """The steps asked about, which comments are dated by."""
        return {"step": self._board.step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._board.step = int(state.get("step", 0))

    def close(self) -> None:
        """End the server and close the file."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._file is not None:
            self._file.close()
            self._file = None
