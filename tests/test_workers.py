"""Worker threads: results, errors, order, and an end of the program that waits for none of them."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from vpd_mlx.common.workers import Workers


def test_results_and_errors_come_back_and_what_has_not_begun_is_dropped() -> None:
    workers, begun, go = Workers(1, "test"), threading.Event(), threading.Event()
    assert workers.submit(divmod, 7, 2).result(10) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        workers.submit(divmod, 7, 0).result(10)
    first = workers.submit(lambda: (begun.set(), go.wait(10))[1])
    begun.wait(10)
    second = workers.submit(int)
    workers.close()
    go.set()
    assert first.result(10)
    assert second.cancelled()


def test_the_end_of_the_program_waits_for_no_call() -> None:
    code = "import time; from vpd_mlx.common.workers import Workers; Workers(2, 'x').submit(time.sleep, 600); time.sleep(0.2)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=True).returncode == 0
