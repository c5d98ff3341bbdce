"""Folders of programs, where no namespace gives them a file system of their own, and removal of those that killed runs left."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import subprocess
import sys
import tempfile

from vpd_mlx.errors import SourceError

__all__ = ["FIRST_UID", "Folder", "sweep"]

PREFIX = "vpd-sandbox-locked-"  # version 1 did not lock its folders, and may still run
FIRST_UID = 1_000_000_000  # programs that have a user id of their own have one from here on


class Folder:
    """A folder for one program. Locked while its owner lives: the kernel drops the lock when the owner dies in any way.

    Raises:
        SourceError: it cannot be made or locked.
    """

    def __init__(self) -> None:
        while True:
            try:
                self.path = tempfile.mkdtemp(prefix=PREFIX)
                self._lock = os.open(self.path, os.O_RDONLY)
                # Between these two lines another process may have taken it for a dead one's.
                if _take(self._lock) and os.path.isdir(self.path):
                    return
            except OSError as error:
                raise SourceError(f"sandbox: no folder for a program: {error}; set TMPDIR to a local folder") from error
            os.close(self._lock)

    def size(self) -> int:
        """Bytes on disk. More than 4096 entries, or 30 levels, count as too much."""
        total, entries = 0, 0
        todo = [(self.path, 0)]
        while todo:
            where, depth = todo.pop()
            with contextlib.suppress(OSError), os.scandir(where) as listing:
                for entry in listing:
                    entries += 1
                    if entries > 4096 or depth > 30:
                        return sys.maxsize
                    with contextlib.suppress(OSError):
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            todo.append((entry.path, depth + 1))
        return total

    def remove(self) -> None:
        """Delete it and all in it."""
        _remove(self.path)
        os.close(self._lock)


def sweep() -> None:
    """Remove folders that processes of this user left behind when they were killed."""
    ours = os.geteuid()
    for path in glob.glob(f"{glob.escape(tempfile.gettempdir())}/{PREFIX}*"):
        # Other users' folders, and one that its owner removes at this moment, are none of our business.
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                owner = os.fstat(fd).st_uid
                if (owner == ours or (ours == 0 and owner >= FIRST_UID)) and _take(fd):
                    _remove(path)
            finally:
                os.close(fd)


def _take(fd: int) -> bool:
    """Lock a folder; False if somebody else has."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        # Folders without permissions, or nested more deeply than Python follows.
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
