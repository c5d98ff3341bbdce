"""A verifier of the user's own: a Python file with `verify(problem, completion)`, or a function given to `vpd.train`.

It is the user's and runs in our process. It gets completions as text; they are never executed here.
"""

from __future__ import annotations

import importlib.util
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from vpd_mlx.common.functions import failure, not_handed_over
from vpd_mlx.errors import ConfigError, config_error
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.types import Problem, Verdict

__all__ = ["Function", "FunctionSettings", "PythonFile", "PythonSettings", "as_verdict"]


class PythonSettings(DatasetSettings):
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
        self._verify = _load(Path(cfg.verifier))
        self.fingerprint = Path(cfg.verifier).read_bytes()
        self.train, self.held_out = read_split(cfg)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """The user's verdict. An exception of the function becomes `Verdict.error`: the rollout leaves the batch."""
        try:
            result = self._verify(problem, completion)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code: any exception is its own failure
            return Verdict(0.0, error=failure(error))
        return as_verdict(result)

    def reference_completion(self, problem: Problem) -> str | None:
        """The reference solution where the data has one, else the answer."""
        return problem.reference or problem.answer


class FunctionSettings(DatasetSettings):
    """A verifier of a Python program, written by `vpd.train` (docs/python.md). Only that program can train with it."""

    kind: Literal["function"]
    function: str = Field(description="Name of the verifier.")
    fingerprint: str = Field(description="Hash of its source. A run is resumed with the same verifier only.")


class Function(PythonFile):
    """Calls the function `verify`. Rows that are not on the disk yet come in `files`, name -> lines.

    Where a hash leaves no row for training or for evaluation, all rows serve for both.
    """

    def __init__(
        self,
        cfg: FunctionSettings,
        verify: Callable[[Problem, str], Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        if verify is None:
            raise not_handed_over("task.kind", f"the verifier {cfg.function!r}")
        self._verify = verify
        self.fingerprint = cfg.fingerprint.encode()
        paths = [path for path in (cfg.data, cfg.eval_data) if path is not None]
        given = {path: files[Path(path).name] for path in paths if files and Path(path).name in files}
        self.train, self.held_out = read_split(cfg, given, reuse=True)
        if cfg.eval_data is None and self.train == self.held_out:
            few = "evaluation is on the training problems: there are too few to hold some out; give held_out=[…] for others"
            self.notices = (few,)


def as_verdict(result: Any) -> Verdict:
    """A verdict from what a verifier returned: score, bool or (score, text). Anything else is the verifier's failure."""
    score, text = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    if not isinstance(score, numbers.Real) or not isinstance(text, str):
        return Verdict(0.0, error=f"returned {result!r}; needs a score in 0..1, a bool, or (score, text)")
    value = float(score)
    if not math.isfinite(value) or not 0.0 <= value <= 1.0:
        return Verdict(0.0, error=f"returned the score {value!r}; needs 0..1")
    return Verdict(value, text)


def _load(path: Path) -> Callable[[Problem, str], Any]:
    def fault(problem: str, remedy: str) -> ConfigError:
        return config_error("task.verifier", problem, remedy, str(path))

    spec = importlib.util.spec_from_file_location("vpd_mlx_user_verifier", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise fault("no such Python file", "give the path of a .py file, relative to the recipe")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as for a script: it may import modules beside it, now or later
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise fault(f"cannot be imported ({type(error).__name__}: {error})", "fix the file") from error
    verify = getattr(module, "verify", None)
    if not callable(verify):
        raise fault("has no function `verify`", "define `def verify(problem, completion): ...` in it")
    return verify  # type: ignore[no-any-return]
