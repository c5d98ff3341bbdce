"""A verifier of the user's own: a Python file with `verify(problem, completion)`, or a function given to `vpd.train`.

A file runs in a process of its own, a function in ours, in a thread of its own. It gets completions as text; they are never
executed here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from vpd_mlx.common.functions import failure, not_handed_over
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.tasks.own_process import OwnProcess, as_verdict
from vpd_mlx.types import Problem, Verdict

__all__ = ["Function", "FunctionSettings", "PythonFile", "PythonSettings"]


class OwnSettings(DatasetSettings):
    """What the two below share."""

    timeout: float = Field(
        60.0, gt=0, description="Seconds for one verdict; a verifier that takes longer has failed, and gives no score."
    )


class PythonSettings(OwnSettings):
    """A verifier of your own: a Python file with `verify(problem, completion)`."""

    paths: ClassVar[tuple[str, ...]] = ("verifier",)
    kind: Literal["python"]
    verifier: str = Field(
        description="Python file, relative to the recipe, with `verify(problem, completion)` that returns a score in "
        "0..1, a bool, or `(score, feedback text)`."
    )


class PythonFile:
    """Calls the user's function with the problem and the completion's text."""

    def __init__(self, cfg: PythonSettings) -> None:
        self._process = OwnProcess(Path(cfg.verifier), cfg.timeout)
        self.fingerprint = self._process.source
        self.train, self.held_out = read_split(cfg)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """The user's verdict. A failure of the function becomes `Verdict.error`: the rollout leaves the batch."""
        return self._process.verify(problem, completion)

    def reference_completion(self, problem: Problem) -> str | None:
        """The reference solution where the data has one, else the answer."""
        return problem.reference or problem.answer


class FunctionSettings(OwnSettings):
    """A verifier of a Python program, written by `vpd.train` (docs/python.md). Only that program can train with it."""

    kind: Literal["function"]
    function: str = Field(description="Name of the verifier.")
    fingerprint: str = Field(description="Hash of its source. A run is resumed with the same verifier only.")


class Function:
    """Calls the function `verify` in a thread, which is abandoned when it takes too long.

    Rows that are not on the disk yet come in `files`, name -> lines. Where a hash leaves no row for training or for
    evaluation, all rows serve for both.
    """

    def __init__(
        self,
        cfg: FunctionSettings,
        verify: Callable[[Problem, str], Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        if verify is None:
            raise not_handed_over("task.kind", f"the verifier {cfg.function!r}")
        self._verify, self._seconds = verify, cfg.timeout
        self.fingerprint = cfg.fingerprint.encode()
        paths = [path for path in (cfg.data, cfg.eval_data) if path is not None]
        given = {path: files[Path(path).name] for path in paths if files and Path(path).name in files}
        self.train, self.held_out = read_split(cfg, given, reuse=True)
        if cfg.eval_data is None and self.train == self.held_out:
            few = "evaluation is on the training problems: there are too few to hold some out; give held_out=[…] for others"
            self.notices = (few,)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """The function's verdict. Its failure becomes `Verdict.error`: the rollout leaves the batch."""
        found: Future[Verdict] = Future()

        def call() -> None:
            try:
                found.set_result(as_verdict(self._verify(problem, completion)))
            except BaseException as error:  # noqa: BLE001 - foreign code: any exception is its own failure
                found.set_result(Verdict(0.0, error=failure(error)))

        threading.Thread(target=call, daemon=True, name="verifier").start()
        try:
            return found.result(self._seconds)
        except TimeoutError:
            return Verdict(0.0, error=f"took longer than {self._seconds:g} s; mend it, or raise task.timeout")

    def reference_completion(self, problem: Problem) -> str | None:
        """The reference solution where the data has one, else the answer."""
        return problem.reference or problem.answer
