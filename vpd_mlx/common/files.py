"""Atomic writes, and logs of JSON lines."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from vpd_mlx.errors import DataError, RunError

__all__ = ["file_errors", "own_file", "plain", "read_rows", "write_atomic"]


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that readers see the old one or the new one, even after a crash.

    Raises:
        RunError: it cannot be written; the old file is unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    with file_errors(path):
        try:
            with own_file(partial, "w") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):  # report the first error, not one of the clean-up
                partial.unlink(missing_ok=True)
            raise


def own_file(path: Path, mode: str) -> TextIO:
    """Open a file to write, but not through a link, which would change a file that lies somewhere else.

    Raises:
        RunError: it is a link.
        OSError: it cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise RunError(
                f"{path}: is a link, and nothing is written through it; put a copy of its file there"
            ) from None

    return cast(TextIO, open(path, mode, encoding="utf-8", opener=opener))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log. Skips a last line without a newline: it was not written completely.

    Raises:
        DataError: a line is broken.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            if line:
                rows.append(json.loads(line))
        except ValueError as error:  # broken JSON, or bytes that are no UTF-8
            raise DataError(f"{path}:{number}: broken JSON ({error}); remove the line") from None
    return rows


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn a failed read or write in the block into a `RunError` that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or path}: {error.strerror or error}; {_remedy(error.errno)}") from error


def _remedy(number: int | None) -> str:
    """What helps against a failed read or write."""
    if number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
        return "name another place: a file or a folder stands in the way, or the name is too long"
    then = "then resume the run if it had begun"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"free some space, {then}"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"fix the permissions, or name another place, {then}"
    return f"free space or fix the permissions, {then}"


def plain(value: Any) -> Any:
    """The value with NaN and infinity as text: JSON has neither, and readers should see that something went wrong."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
