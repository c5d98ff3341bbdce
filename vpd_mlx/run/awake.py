"""A Mac that sleeps when nobody touches it would stop the run with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

__all__ = ["awake"]


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Within the block a Mac does not fall asleep for being idle. Closing a laptop's lid still puts it to sleep.

    `caffeinate` watches this process, too, so that it ends even if we are killed.
    """
    tool = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if tool is None:
        yield
        return
    # close_fds=False lets Python spawn it without a fork, which would copy a process that holds the GPU's buffers.
    child = subprocess.Popen(
        [tool, "-i", "-w", str(os.getpid())], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, close_fds=False
    )
    try:
        yield
    finally:
        child.terminate()
        child.wait()
