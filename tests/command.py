"""`vpd-mlx ARGUMENTS`: in a process of its own, or within this one, where its start is not what a test is about."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from vpd_mlx.commands.app import main

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def apart(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As a user runs it. Python, mlx-lm and the tokenizers take two seconds to start."""
    command = [sys.executable, "-m", "vpd_mlx", *args]
    env = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@contextlib.contextmanager
def _as_started(command: list[str], cwd: Path) -> Iterator[None]:
    """What a process of its own would find, and what it would leave to its parent as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", command)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("COLUMNS", ENVIRONMENT["COLUMNS"])
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def within(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same entry point, called. Only `SystemExit` may leave it."""
    command = ["vpd-mlx", *args]
    out, error = io.StringIO(), io.StringIO()
    with (
        _as_started(command, cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return subprocess.CompletedProcess(command, ended.value.code or 0, out.getvalue(), error.getvalue())
