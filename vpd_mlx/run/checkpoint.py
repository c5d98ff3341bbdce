"""Checkpoints: everything that a resume needs, on the disk.

A checkpoint is a folder `step-000020`: one safetensors file, one JSON file, and a manifest with their hashes. It is written
under another name, synced, and renamed, so that a crash at any moment leaves the last good one; one whose files do not match its
manifest, or that counts more bytes of a log than there are, is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpd_mlx.errors import RunError

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["Checkpoint", "find_checkpoint", "newest_state", "write_checkpoint"]

VERSION = 1
ARRAYS, STATE, MANIFEST = "arrays.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps: named arrays and plain values."""

    step: int
    arrays: dict[str, mx.array]
    state: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Raises:
        RunError: it cannot be written; the older ones are untouched then.
    """
    import mlx.core as mx  # late: what a checkpoint says of a run is asked before a command loads it

    final = folder / f"step-{checkpoint.step:06d}"
    partial = folder / f".partial-{checkpoint.step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        mx.save_safetensors(str(partial / ARRAYS), dict(checkpoint.arrays))
        state = {"version": VERSION, "step": checkpoint.step, **checkpoint.state}
        (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        hashes = {name: _sha256(partial / name) for name in (ARRAYS, STATE)}
        (partial / MANIFEST).write_text(json.dumps({"version": VERSION, "sha256": hashes}), encoding="utf-8")
        for name in (ARRAYS, STATE, MANIFEST):
            _sync(partial / name)
        _sync(partial)
        if final.exists():  # the same step again, after a resume: the content is the same
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(folder)
    except (OSError, RuntimeError) as error:  # mlx reports a failed write as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        remedy = "free space or fix the permissions, then resume the run"
        raise RunError(f"{final}: the checkpoint cannot be written ({error}); {remedy}") from error
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)
    return final


def find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a line for every newer one that is damaged.

    Raises:
        RunError: there are checkpoints, but none of them is whole, or one was written by a newer version.
    """
    import mlx.core as mx

    path, state, notes = newest_state(folder)
    if path is None:
        return None, notes
    arrays: Any = mx.load(str(path / ARRAYS))
    mx.eval(arrays)
    return Checkpoint(state["step"], arrays, state), notes


def newest_state(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest whole checkpoint's folder and its plain values, and a line for every newer one that is damaged.

    Raises:
        RunError: as `find_checkpoint`.
    """
    notes: list[str] = []
    for path in _folders(folder):
        fault, state = _read(path)
        if fault is None:
            if state["version"] > VERSION:
                raise RunError(f"{path}: written by a newer vpd-mlx (checkpoint version {state['version']}); update it")
            return path, state, notes
        notes.append(f"{path.name}: {fault}; going back to the one before")
    if notes:
        remedy = "put back what is missing, or start the run anew"
        raise RunError(f"{folder}: no whole checkpoint ({'; '.join(notes)}); {remedy}")
    return None, {}, notes


def _folders(folder: Path) -> list[Path]:
    """Newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def _read(path: Path) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong with a checkpoint, its plain values)."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in (ARRAYS, STATE):
            if _sha256(path / name) != manifest["sha256"][name]:
                return f"{name} is damaged (its hash differs from the manifest's)", {}
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({type(error).__name__}: {error})", {}
    return _uncovered(path.parent.parent, state["offsets"]), state


def _uncovered(run: Path, offsets: Mapping[str, int]) -> str | None:
    """A log that does not reach as far as a checkpoint says: to cut it back would fill it up with zeros."""
    for name, offset in offsets.items():
        log = run / name
        size = log.stat().st_size if log.is_file() else 0
        if size < offset:
            return f"{name} has {size} bytes, and had {offset} then"
        if offset:
            with log.open("rb") as f:
                f.seek(offset - 1)
                if f.read(1) != b"\n":
                    return f"{name} has been changed: no row ends at byte {offset}, as one did then"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
