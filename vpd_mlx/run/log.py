"""The run folder: append-only JSON lines, one writer, cut back to a known place on resume."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vpd_mlx.common.files import file_errors, own_file, plain, read_rows, write_atomic
from vpd_mlx.errors import RunError
from vpd_mlx.run.records import upgraded

__all__ = ["LOGS", "RECIPE_FILE", "RunLog", "check_free", "claimed_folder", "json_lines"]

LOGS = ("metrics.jsonl", "rollouts.jsonl", "evals.jsonl", "selection.jsonl", "answers.jsonl", "general.jsonl")
RECIPE_FILE = "config.yaml"  # a folder that holds it is a run
LEAST_FREE = 64 << 20  # bytes: below it a run stops while its last checkpoint can still be written


@contextlib.contextmanager
def claimed_folder(base: Path) -> Iterator[Path]:
    """`base`, or with -2, -3 … behind it: the first that is not there, made for this run alone.

    It is made at once, so that two runs that begin together take two; and taken away again if nothing was written in it.
    """
    made = [p for p in reversed(base.parents) if not p.exists()]
    number, path = 1, base
    with file_errors(base):
        base.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
                path = base.with_name(f"{base.name}-{number}")
    try:
        yield path
    finally:
        for folder in (path, *reversed(made)):
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


def check_free(path: Path, *, overwrite: bool) -> None:
    """See that a run may begin in this folder.

    Raises:
        RunError: it is a file, or holds something that is to stay.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file, and a run needs a folder; give another --out")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "may not be written to" if above.is_dir() else "is a file"
        raise RunError(f"{path}: {above} {what}; give another --out")
    with file_errors(path):
        taken = path.exists() and any(path.iterdir())
    if taken and not (path / RECIPE_FILE).exists():
        what = "is not a run folder, so --overwrite leaves it alone" if overwrite else "holds other files already"
        raise RunError(f"{path}: {what}; give another --out")
    if taken and not overwrite:
        raise RunError(f"{path}: holds a run already; give another --out, or --overwrite to replace it")


class RunLog:
    """One run's files, open for appending, held by one process. `RunLog()` is that of a rank that writes nothing."""

    def __init__(self, path: Path = Path(), lock: ExitStack | None = None) -> None:
        self.path = path
        self._lock = lock
        names = LOGS if lock is not None else ()
        self._files = {name: own_file(path / name, "a") for name in names}

    @classmethod
    def create(cls, path: Path, config: str, *, overwrite: bool) -> RunLog:
        """A new run.

        Raises:
            RunError: the folder holds something already, is held by another process, or cannot be written.
        """
        check_free(path, overwrite=overwrite)
        with file_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = _hold(path)
            for item in path.iterdir():
                if item.name != "run.lock":
                    shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
            write_atomic(path / RECIPE_FILE, config)
            return cls(path, lock)

    @classmethod
    def reopen(cls, path: Path) -> RunLog:
        """A run to go on with.

        Raises:
            RunError: there is no run, or another process holds it.
        """
        if not (path / RECIPE_FILE).exists():
            raise RunError(f"{path}: no run to resume here ({RECIPE_FILE} is missing)")
        with file_errors(path):
            return cls(path, _hold(path))

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` as it stands."""
        return [upgraded(row) for row in read_rows(self.path / "metrics.jsonl")] if self._files else []

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to a log, so that other processes can read them at once.

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        if (f := self._files.get(name)) is None:
            return
        with file_errors(self.path):
            f.write(json_lines(rows))
            f.flush()

    def offsets(self) -> dict[str, int]:
        """Bytes in each log, for a checkpoint."""
        return {name: os.fstat(f.fileno()).st_size for name, f in self._files.items()}

    def cut_back(self, offsets: Mapping[str, int]) -> None:
        """Cut each log to the given bytes, which it has (`checkpoint.newest_state`), so that no step is logged twice."""
        with file_errors(self.path):
            for name, f in self._files.items():
                f.truncate(offsets.get(name, 0))
                os.fsync(f.fileno())

    def write(self, name: str, text: str) -> None:
        """Write a file of the run, whole or not at all."""
        if self._files:
            with file_errors(self.path):
                (self.path / name).parent.mkdir(exist_ok=True)
            write_atomic(self.path / name, text)

    def sync(self) -> None:
        """Write the logs through to the disk."""
        with file_errors(self.path):
            for f in self._files.values():
                os.fsync(f.fileno())

    def check_space(self) -> None:
        """Refuse to go on when the disk is nearly full.

        Raises:
            RunError: less than 64 MB are free.
        """
        if self._files and (free := shutil.disk_usage(self.path).free) < LEAST_FREE:
            needed = f"{LEAST_FREE >> 20} MB that a checkpoint and the logs need"
            remedy = "free some space, then resume the run"
            raise RunError(f"{self.path}: {free >> 20} MB left on the disk, less than the {needed}; {remedy}")

    def close(self) -> None:
        """Close the files and let the folder go."""
        for f in self._files.values():
            f.close()
        if self._lock is not None:
            self._lock.close()


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as lines of a log."""
    return "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)


def _hold(path: Path) -> ExitStack:
    """Take the folder for this process, until the stack is closed.

    The folder itself is locked, since a file in it can be removed and made anew; and a file, which also holds where a network's
    file system locks no folders, and names the holder.
    """
    held = ExitStack()
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        held.callback(os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                raise
        lock = held.enter_context(own_file(path / "run.lock", "a+"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        file = path / "run.lock"
        holder = (file.read_text(encoding="utf-8").strip() if file.is_file() else "") or "unknown"
        raise RunError(f"{path}: another process trains here (process {holder}); wait for it or stop it") from None
    except BaseException:
        held.close()
        raise
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()
    return held
