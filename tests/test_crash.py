"""Kills, full disks, read-only places: a clear error, the last checkpoint good, the end the same."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "crash"))
import kill  # noqa: E402


@pytest.mark.long
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


def until_a_step_is_logged(folder: Path) -> None:
    for _ in range(600):
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
            return
        time.sleep(0.05)
    raise AssertionError("no step was logged within 30 s")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_checkpoint_and_adapters(tmp_path: Path, number: int, code: int):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(whole).returncode == 0
    process = kill.start("vpd", folder)
    until_a_step_is_logged(folder)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert (folder / "adapters" / "adapters.safetensors").exists()
    assert not (folder / "summary.json").exists()
    assert run(folder).returncode == 0
    assert kill.figures(folder) == kill.figures(whole)


def test_a_second_signal_leaves_at_once_with_the_last_checkpoint_intact(tmp_path: Path):
    folder = tmp_path / "run"
    process = kill.start("vpd", folder)
    until_a_step_is_logged(folder)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    # The second one may meet a process that is leaving already, and whose handlers are gone.
    assert process.returncode in (130, -signal.SIGINT)
    assert run(folder).returncode == 0
