"""Atomic writes, and logs of JSON lines."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpd_mlx.errors import RunError

__all__ = ["file_errors", "plain", "read_rows", "write_atomic"]


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that readers see the old one or the new one, even after a crash.

    Raises:
        RunError: it cannot be written; the old file is unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    with file_errors(path):
        try:
            with partial.open("w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):  # report the first error, not one of the clean-up
                partial.unlink(missing_ok=True)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log. Skips a last line without a newline: it was not written completely."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn a failed read or write in the block into a `RunError` that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or path}: {error.strerror or error}; free space or fix the permissions, then "
            "continue the run, if it had begun, with --resume"
        ) from error


def plain(value: Any) -> Any:
    """The value with NaN and infinity as text: JSON has neither, and readers should see that something went wrong."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
