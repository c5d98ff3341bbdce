"""Starting a process without forking this one, which may hold gigabytes of a model in a GPU's buffers.

`subprocess` forks on macOS whenever it is to pass pipes. `posix_spawn` never copies this process. It passes on what C libraries
opened without care, too, which the child closes first of all.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Sequence

__all__ = ["Child"]


class Child:
    """A process whose files 0, 1, 2, ... are `files`, in a process group of its own, without environment.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: list[str], files: Sequence[int]) -> None:
        # Where this process has closed a standard file, a pipe may have a number that is to become another.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(files)) for fd in files]
        try:
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(high)]
            self.pid = os.posix_spawn(
                command[0], command, {}, file_actions=actions, setpgroup=0, setsigmask=[], setsigdef=_default_signals()
            )
        finally:
            for fd in high:
                os.close(fd)
        self.exit: int | None = None

    def wait(self, seconds: float = 0.0) -> int | None:
        """Its exit code, negative for a signal; None if it lives on after `seconds`."""
        deadline, pause = time.monotonic() + seconds, 0.0005
        while self.exit is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else waited for it
                pid, status = self.pid, 256
            if pid:
                self.exit = os.waitstatus_to_exitcode(status)
            elif (left := deadline - time.monotonic()) <= 0:
                break
            else:
                pause = min(2 * pause, left, 0.05)
                time.sleep(pause)
        return self.exit

    def kill(self) -> None:
        """End it and its group, unless it has been waited for: then another process may have its number."""
        if self.exit is None:
            for end in (os.killpg, os.kill):
                try:
                    end(self.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue


def _default_signals() -> list[int]:
    # Python ignores these, and an ignored signal stays ignored in a new program.
    return [signal.SIGPIPE, signal.SIGXFSZ]
