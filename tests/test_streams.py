"""Closed, full and broken streams, and signals: a run goes on or stops with a checkpoint, and never dies silently."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from vpd_mlx.common.streams import lasting
from vpd_mlx.report.live import make_view
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Silent, Stop
from vpd_mlx.run.stopping import stoppable

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def broken_pipe() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def full_disk() -> io.TextIOWrapper:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    return open("/dev/full", "w")


@pytest.mark.parametrize(("output", "words"), [(broken_pipe, "Broken pipe"), (full_disk, "No space left on device")])
def test_a_run_outlives_its_output(small, tmp_path: Path, monkeypatch, capsys, output, words: str):
    monkeypatch.setattr(sys, "stdout", output())
    with lasting("the run goes on in RUN") as stream, make_view("mine", quiet=False) as view:
        train(small(steps=1), tmp_path / "run", progress=view)
        print("an answer " * 10_000, flush=True)
    sys.stdout.close()  # nothing is left in it that could fail
    assert load_run(tmp_path / "run").finished
    said = [line for line in capsys.readouterr().err.splitlines() if "standard output" in line]
    assert said == [f"standard output cannot be written ({words}); the run goes on in RUN"]
    assert stream.lost == (None if output is broken_pipe else words)


@pytest.mark.parametrize(("redirect", "code"), [(">&- <&-", 0), (">/dev/full", 3)])
def test_a_command_whose_output_is_closed_or_full(tmp_path: Path, redirect: str, code: int):
    command = f"exec {sys.executable} -m vpd_mlx recipes {redirect}"
    done = subprocess.run(["sh", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines() == [
        *(["vpd-mlx: standard output cannot be written (No space left on device); give it another place"] * (code == 3))
    ]


STREAMS = """
import os, sys
from vpd_mlx.common.streams import prepare
prepare()
log = os.open("log", os.O_CREAT | os.O_WRONLY)
assert log > 2, log
print("1 − 1 = 0", len(sys.stdin.read()))
sys.stdout.flush()
os.system("echo a library speaks")
"""


def test_no_log_takes_the_place_of_a_closed_stream_and_ascii_is_no_error(tmp_path: Path):
    code, python = tmp_path / "code.py", sys.executable
    code.write_text(STREAMS)
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    closed = subprocess.run(
        ["sh", "-c", f"exec {python} code.py <&- >&-"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    assert closed.stderr == b""  # the library's program has a standard output, too
    assert (tmp_path / "log").read_text() == ""
    done = subprocess.run(
        [python, "code.py"],
        cwd=tmp_path,
        env=environment,
        input="é".encode(),
        capture_output=True,
        check=True,
        timeout=300,
    )
    assert done.stdout == b"1 ? 1 = 0 1\na library speaks\n"


HANGS = """
import time
def verify(problem, completion):
    open("hangs", "w").close()
    time.sleep(600)
"""


def test_ctrl_c_in_the_row_check_is_one_line_at_once(own_task, tmp_path: Path):
    (tmp_path / "judge.py").write_text(HANGS)
    recipe = own_task(task="task: {kind: python, data: rows.jsonl, held_out: 0.25, verifier: judge.py}\n")
    command = [sys.executable, "-m", "vpd_mlx", "train", str(recipe), "--out", "run"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not (tmp_path / "hangs").exists():
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert error == "\nvpd-mlx: stopped at once by SIGINT; nothing was written\n"
    assert not (tmp_path / "run").exists()


def test_an_interrupt_that_passed_through_exec_leaves_the_status_alone(tmp_path: Path):
    (tmp_path / "interrupted.py").write_text(
        "from vpd_mlx import __main__\n\ndef command():\n    try:\n        exec('raise KeyboardInterrupt')\n"
        "    except KeyboardInterrupt:\n        raise SystemExit(129) from None\n\n__main__._command = command\n__main__.main()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, env=env, check=False).returncode == 129


def test_ctrl_c_while_the_command_line_loads_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys):
    from vpd_mlx import __main__

    def loading() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "_command", loading)
    monkeypatch.setattr(__main__, "_end_soon", lambda: None)
    with pytest.raises(SystemExit, match="130"):
        __main__.main()
    assert capsys.readouterr().err == "\nvpd-mlx: stopped by SIGINT\n"


def test_an_mlx_without_a_backend_is_one_line_with_the_extras(monkeypatch: pytest.MonkeyPatch, capsys):
    from vpd_mlx import __main__
    from vpd_mlx.commands import app

    def imports_mlx() -> None:
        raise ImportError("libmlx.so: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(app, "main", imports_mlx)
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert "pip install 'vpd-mlx[cpu]', or 'vpd-mlx[cuda]' for an NVIDIA card" in capsys.readouterr().err


class Signals(Silent):
    """Sends this process a signal after the first step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def step(self, step, steps, metrics, seconds_left):
        signal.raise_signal(self.number)


def test_before_a_run_and_a_second_time_a_signal_ends_it_at_once():
    told: list[int] = []
    with pytest.raises(KeyboardInterrupt), stoppable(Stop(), told.append):
        signal.raise_signal(signal.SIGHUP)
    stop = Stop(begun=True)
    with stoppable(stop, told.append):
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert told == [signal.SIGHUP, signal.SIGINT]


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop(begun=True)
    try:
        with stoppable(stop):
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_python_program_ends_by_the_signal_that_stopped_its_run(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import vpd_mlx as vpd

    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: heard.append(number))
    monkeypatch.setattr("vpd_mlx.report.live.make_view", lambda *_, **__: nullcontext(Signals(signal.SIGHUP)))
    try:
        run = vpd.train(small(steps=3), out=tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (run.done, heard) == (1, [signal.SIGHUP])
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()
