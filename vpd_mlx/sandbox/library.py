"""A grading library in a sandbox of its own, because it reads model-written text and may evaluate it.

math-verify and reasoning-gym pass parts of an answer to Python's `eval`, directly or through sympy, and a power tower keeps
sympy busy for ever. In a child process they can neither do harm nor hang a run, and any thread may call them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vpd_mlx.errors import ConfigError, Fault, SourceError
from vpd_mlx.sandbox.results import Failure, Limits
from vpd_mlx.sandbox.sandbox import LoadedProgram, Sandbox
from vpd_mlx.sandbox.values import Value

__all__ = ["Library"]

# numpy and sympy map much memory. The CPU limit counts for the whole life of the process, wall time for each call.
ROOM = {"memory_mb": 4096, "cpu_s": 1_000_000, "output_kb": 1024, "threads": 32}
# One thread each: answers are small, and the sandbox limits threads.
QUIET = "import os\nos.environ.update(OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1', MPLCONFIGDIR='.')\n"


class Library:
    """Functions of `program`, called one at a time, each within `timeout` seconds. Restarts after a call that killed it.

    Raises:
        ConfigError: the module `needs` is not installed; `extra` is this package's extra that installs it.
        SourceError: it does not start.
    """

    def __init__(self, program: str, needs: str, extra: str, kind: str, timeout: float) -> None:
        if importlib.util.find_spec(needs) is None:
            fault = Fault(
                "task.kind", f"{kind!r} needs {needs}, which is not installed", f"pip install 'vpd-mlx[{extra}]'"
            )
            raise ConfigError([fault])
        folders = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") and Path(p).is_dir()]
        self._program = QUIET + program
        self._sandbox = Sandbox(Limits(wall_s=timeout, **ROOM), packages=folders)
        # A thread of its own: the process ends with the thread that starts it, and callers' threads come and go.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=needs)
        self._loaded: LoadedProgram | None = None

    @property
    def notice(self) -> str:
        """`Abilities.notice` of its sandbox."""
        return self._sandbox.abilities.notice()

    def call(self, name: str, *args: Any) -> Any:
        """Call a function that returns JSON text; returns the value.

        Raises:
            SourceError: it raised, took too long, or returned no JSON.
        """
        answer = self._thread.submit(self._call, name, args).result()
        if isinstance(answer, Failure):
            raise SourceError(str(answer))
        try:
            return json.loads(answer.encoded)
        except (TypeError, ValueError):
            raise SourceError(f"{name} returned {str(answer)[:80]}") from None

    def close(self) -> None:
        """End the process. The next call starts another."""
        self._thread.submit(self._stop).result()

    def _call(self, name: str, args: tuple[Any, ...]) -> Value | Failure:
        if self._loaded is None or self._loaded.ended:
            self._stop()
            self._loaded = self._sandbox.open(self._program, per_call=True)
        return self._loaded.call(name, args)

    def _stop(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None
