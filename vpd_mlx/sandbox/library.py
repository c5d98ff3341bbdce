"""A grading library kept in a sandbox: it reads what a model wrote, and some of them evaluate it.

math-verify and reasoning-gym hand parts of an answer to Python's `eval`, directly or through sympy, and a power tower keeps
sympy busy for ever, where only a signal in the main thread could stop it. In a process of its own it can do neither harm nor
hold up a run, and it is called from any thread.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vpd_mlx.errors import ConfigError, Fault, SourceError
from vpd_mlx.sandbox.sandbox import Failure, Limits, Sandbox, Session, Value

__all__ = ["Library"]

# Room for what numpy and sympy map; the CPU limit counts for the whole life of the process, wall time for each call.
ROOM = {"memory_mb": 4096, "cpu_s": 1_000_000, "output_kb": 1024, "threads": 32}
# One thread each: the limit on threads is ours, and answers are small.
QUIET = "import os\nos.environ.update(OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1', MPLCONFIGDIR='.')\n"


class Library:
    """Functions of `program`, called one at a time, each within `timeout` seconds. Starts anew after it was stopped.

    Raises:
        ConfigError: the module `needs` is not installed; `extra` is the extra of this package that brings it.
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
        # A thread of its own: the process ends with the thread that starts it, and those that call come and go.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=needs)
        self._session: Session | None = None

    @property
    def notice(self) -> str:
        """What the sandbox could not have on this machine, in one line, or nothing."""
        return self._sandbox.abilities.notice()

    def call(self, name: str, *args: Any) -> Any:
        """The JSON value that a function returned as text.

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
        if self._session is None or self._session.over:
            self._stop()
            self._session = self._sandbox.open(self._program, per_call=True)
        return self._session.call(name, args)

    def _stop(self) -> None:
        if self._session is not None:
            self._session.__exit__()
            self._session = None
