"""A verifier that a Python program hands over: `vpd.train(..., verify=verify)`.

The recipe has its name and the fingerprint of its source; the function itself comes with the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vpd_mlx.common.functions import not_handed_over
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.tasks.python_file import PythonFile
from vpd_mlx.types import Problem

__all__ = ["Function", "FunctionSettings"]


class FunctionSettings(DatasetSettings):
    """A verifier of a Python program, written by `vpd.train` (docs/python.md). Only that program can train with it."""

    kind: Literal["function"]
    function: str = Field(description="Name of the verifier.")
    fingerprint: str = Field(description="Hash of its source. A run is resumed with the same verifier only.")


class Function(PythonFile):
    """Calls the function with the problem and the completion's text.

    Rows that are not on the disk yet come in `files`, name -> lines. Where a hash leaves no row for training or for evaluation,
    all rows serve for both.
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
        given = {path: (files or {}).get(Path(path).name) for path in (cfg.data, cfg.eval_data) if path is not None}
        self.train, self.held_out = read_split(cfg, {k: v for k, v in given.items() if v is not None}, reuse=True)
        if cfg.eval_data is None and self.train == self.held_out:
            few = "evaluation is on the training problems: there are too few to hold some out; give held_out=[…] for others"
            self.notices = (few,)
