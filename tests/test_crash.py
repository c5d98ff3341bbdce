"""Kills, full disks, read-only places: a clear error, the last checkpoint good, the end the same."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import within

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "crash"))
import kill  # noqa: E402

pytestmark = pytest.mark.exact  # bits are compared


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
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills" in done.stdout


def run(folder: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Start or go on: within this process, or in one that can write no file of more than `limit` bytes."""
    if limit is None:
        return within(*kill.command("vpd", folder)[3:], cwd=folder.parent)

    def small_files() -> None:  # what a full disk does, without one: a write beyond this size fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        kill.command("vpd", folder),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=small_files,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, to compare with and to copy."""
    folder = tmp_path_factory.mktemp("crash") / "whole"
    assert run(folder).returncode == 0
    return folder


@pytest.mark.parametrize("limit", [30_000, 60_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(whole: Path, tmp_path: Path, limit: int):
    folder = tmp_path / "run"
    full = run(folder, limit)
    assert full.returncode == 3, full.stderr
    assert "Traceback" not in full.stderr
    assert len(full.stderr.strip().splitlines()) == 1, full.stderr
    assert "free space" in full.stderr
    assert run(folder).returncode == 0
    assert kill.figures(folder) == kill.figures(whole)


def test_resuming_on_a_full_disk_is_one_line_too(whole: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    full = run(folder, 500)
    assert full.returncode == 3, full.stderr
    assert len(full.stderr.strip().splitlines()) == 1, full.stderr
    assert run(folder).returncode == 0
    assert kill.figures(folder) == kill.figures(whole)


def test_a_place_that_cannot_be_written(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    result = within(*kill.command("vpd", blocked / "run")[3:], cwd=tmp_path)
    assert result.returncode == 3
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(blocked) in result.stderr


def until_a_step_is_logged(folder: Path, process: subprocess.Popen[str]) -> None:
    log, until = folder / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no step was logged"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_with_checkpoint_and_adapters(whole: Path, tmp_path: Path, number: int, code: int):
    folder = tmp_path / "run"
    (process,) = kill.start("vpd", folder)
    until_a_step_is_logged(folder, process)
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode == code
    assert (folder / "adapters" / "adapters.safetensors").exists()
    assert not (folder / "summary.json").exists()
    assert run(folder).returncode == 0
    assert kill.figures(folder) == kill.figures(whole)


def test_a_second_signal_leaves_at_once_with_the_last_checkpoint_intact(tmp_path: Path):
    folder = tmp_path / "run"
    (process,) = kill.start("vpd", folder)
    until_a_step_is_logged(folder, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    # The second one may meet a process that is leaving already, and whose handlers are gone.
    assert process.returncode in (130, -signal.SIGINT)
    assert run(folder).returncode == 0
