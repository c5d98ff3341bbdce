"""The run folder: append-only JSON lines, one writer, cut back to a known place on resume."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vpd_mlx.common.files import file_errors, plain, read_rows, write_atomic
from vpd_mlx.errors import RunError
from vpd_mlx.run.records import upgraded

__all__ = ["LOGS", "RECIPE_FILE", "RunLog", "free_run_folder", "json_lines"]

LOGS = ("metrics.jsonl", "rollouts.jsonl", "evals.jsonl")
RECIPE_FILE = "config.yaml"  # a folder that holds it is a run
LEAST_FREE = 64 << 20  # bytes: below it a run stops while its last checkpoint can still be written


def free_run_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or with -2, -3 … behind it: the first that no older run holds."""
    path, number = parent / name, 1
    while path.exists() and any(path.iterdir()):
        number += 1
        path = parent / f"{name}-{number}"
    return path


class RunLog:
    """One run's files, open for appending, held by one process. `RunLog()` is that of a rank that writes nothing."""

    def __init__(self, path: Path = Path(), lock: TextIO | None = None) -> None:
        self.path = path
        self._lock = lock
        self._files: dict[str, TextIO] = {}

    @classmethod
    def create(cls, path: Path, config: str, *, overwrite: bool) -> RunLog:
        """A new run.

        Raises:
            RunError: the folder holds something already, is held by another process, or cannot be written.
        """
        with file_errors(path):
            taken = path.exists() and any(path.iterdir())
            if taken and not overwrite:
                if not (path / RECIPE_FILE).exists():
                    raise RunError(f"{path}: holds other files already; give another --out")
                raise RunError(f"{path}: holds a run already; give another --out, or --overwrite to replace it")
            if taken and not (path / RECIPE_FILE).exists():
                raise RunError(f"{path}: is not a run folder, so --overwrite leaves it alone; give another --out")
            path.mkdir(parents=True, exist_ok=True)
            log = cls(path, _hold(path))
            if taken:
                for item in path.iterdir():
                    if item.name != "run.lock":
                        shutil.rmtree(item) if item.is_dir() else item.unlink()
            write_atomic(path / RECIPE_FILE, config)
            for name in LOGS:
                log._open(name)
            return log

    @classmethod
    def reopen(cls, path: Path) -> RunLog:
        """A run to go on with.

        Raises:
            RunError: there is no run, or another process holds it.
        """
        if not (path / RECIPE_FILE).exists():
            raise RunError(f"{path}: no run to resume here ({RECIPE_FILE} is missing)")
        with file_errors(path):
            log = cls(path, _hold(path))
            for name in LOGS:
                log._open(name)
            return log

    def _open(self, name: str) -> None:
        self._files[name] = (self.path / name).open("a", encoding="utf-8")

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
        """Cut each log to the given bytes, so that no step is logged twice."""
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
        if not self._files:
            return
        free = shutil.disk_usage(self.path).free
        if free < LEAST_FREE:
            raise RunError(
                f"{self.path}: {free >> 20} MB left on the disk, less than the {LEAST_FREE >> 20} MB that a checkpoint and "
                "the logs need; free some space, then go on with --resume"
            )

    def close(self) -> None:
        """Close the files and let the folder go."""
        for f in self._files.values():
            f.close()
        if self._lock is not None:
            self._lock.close()


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a file has them."""
    return "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)


def _hold(path: Path) -> TextIO:
    lock = (path / "run.lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise RunError(f"{path}: another process trains here (process {holder}); wait for it or stop it") from None
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
