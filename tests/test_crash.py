"""Kills, full disks, read-only places: a clear error, the last checkpoint good, the end the same."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "crash"))
import kill  # noqa: E402


def test_a_dozen_kills_end_as_undisturbed():
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "crash" / "kill.py"),
            "--kills",
            "12",
            "--cases",
            "vpd-adapter",
            "grpo",
            "joint",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills" in done.stdout


def run(folder: Path, limit: int | None = None, extra: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    def small_files() -> None:
        if limit is not None:  # what a full disk does, without one: a write beyond this size fails
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [*kill.command("vpd", folder), *extra],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=small_files,
    )


@pytest.mark.parametrize("limit", [30_000, 60_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path: Path, limit: int):
    whole = tmp_path / "whole"
    assert run(whole).returncode == 0
    folder = tmp_path / "run"
    full = run(folder, limit)
    assert full.returncode == 3, full.stderr
    assert "Traceback" not in full.stderr
    assert len(full.stderr.strip().splitlines()) == 1, full.stderr
    assert "free space" in full.stderr
    assert run(folder).returncode == 0
    assert kill.figures(folder) == kill.figures(whole)


def test_resuming_on_a_full_disk_is_one_line_too(tmp_path: Path):
    folder = tmp_path / "run"
    assert run(folder).returncode == 0
    before = kill.figures(folder)
    full = run(folder, 500)
    assert full.returncode == 3, full.stderr
    assert len(full.stderr.strip().splitlines()) == 1, full.stderr
    assert run(folder).returncode == 0
    assert kill.figures(folder) == before


def test_a_place_that_cannot_be_written(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    result = run(blocked / "run")
    assert result.returncode == 3
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(blocked) in result.stderr
