"""The user's verifier in a process of its own, where a limit of time holds even against C code that never lets go of Python.

It is the user's program and no stranger's: it keeps our environment, and may use files, network and accelerator. One process
serves all calls, several at once, each in a thread, as they come. A call that takes too long ends the process: that verdict is an
error, calls beside it are made again, and the next one starts the process anew, from the same source.

Both sides of the pipe are here: `OwnProcess` is ours, `main` the child's.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import io
import math
import numbers
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from vpd_mlx.common.functions import arity_faults, failure
from vpd_mlx.errors import ConfigError, config_error
from vpd_mlx.types import Problem, Verdict

__all__ = ["OwnProcess", "as_verdict"]

BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; from vpd_mlx.tasks.own_process import main; main(sys.argv[1], sys.argv[2])"
)
IMPORT_SECONDS = 600.0  # it may load a model of its own
LEAVE_SECONDS = 2.0


class _Gone(Exception):
    """The process ended before its answer; `retry` if another call ended it."""

    def __init__(self, why: str, retry: bool) -> None:
        super().__init__(why)
        self.retry = retry


class OwnProcess:
    """Calls `verify` of the file `path`, each call within `seconds`. Safe to use from several threads.

    Raises:
        ConfigError: the file is missing, cannot be imported, or has no `verify`.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        if not path.is_file():
            remedy = "give the path of a .py file, relative to the recipe"
            raise config_error("task.verifier", "no such Python file", remedy, str(path))
        self._path, self.source, self._seconds = path, path.read_bytes(), seconds
        self._lock = threading.Lock()
        self._child = self._start()

    def _start(self) -> _Child:
        child = _Child(self._path, self.source)
        weakref.finalize(self, child.leave)
        child.wait_until_ready()
        return child

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """The user's verdict; every failure of the verifier is `Verdict.error`."""
        while True:
            try:
                with self._lock:
                    if self._child.gone:
                        self._child = self._start()
                    child = self._child
                return child.ask(problem, completion).result(self._seconds)
            except TimeoutError:
                if not child.kill():
                    continue  # held up by another call that was late, too
                return Verdict(0.0, error=f"took longer than {self._seconds:g} s; mend it, or raise task.timeout")
            except _Gone as error:
                if not error.retry:
                    return Verdict(0.0, error=str(error))
            except ConfigError as error:
                return Verdict(0.0, error=str(error))


class _Child:
    """One process, and its calls that are under way."""

    def __init__(self, path: Path, source: bytes) -> None:
        self.gone = False
        self._path, self._killed, self._number = path, False, 0
        self._waiting: dict[int, Future[Any]] = {0: Future()}
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._channel, theirs = Pipe()
        command = [sys.executable, "-c", BOOT, str(theirs.fileno()), str(path), *sys.path]
        # A session of its own: Ctrl-C in the terminal is for us, and we end it.
        self._popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        threading.Thread(target=self._listen, daemon=True, name="verifier").start()
        with contextlib.suppress(OSError):  # it is gone already: `wait_until_ready` tells
            self._channel.send(source)

    def wait_until_ready(self) -> None:
        """Wait until the file is imported. ConfigError: it cannot be used."""
        try:
            fault = self._waiting[0].result(IMPORT_SECONDS)
        except TimeoutError:
            self.kill()
            fault = (f"takes longer than {IMPORT_SECONDS:g} s to import", "load less at import")
        except _Gone as error:
            fault = (f"cannot be imported ({error})", "fix the file")
        if fault is not None:
            problem, remedy = fault
            raise config_error("task.verifier", problem, remedy, str(self._path))

    def ask(self, problem: Problem, completion: str) -> Future[Verdict]:
        """The verdict to come. _Gone: the process has ended."""
        answer: Future[Verdict] = Future()
        with self._lock:
            if self.gone:
                raise _Gone("", retry=True)
            self._number += 1
            self._waiting[self._number] = answer
            number = self._number
        with self._sending, contextlib.suppress(OSError):  # it is gone: `_listen` is about to tell
            self._channel.send((number, problem, completion))
        return answer

    def kill(self) -> bool:
        """End it at once. Returns whether it has not been killed before."""
        with self._lock:
            first, self._killed = not self._killed, True
        self._popen.kill()
        self._popen.wait()
        return first

    def leave(self) -> None:
        """Let it end in order, if it does so soon."""
        with contextlib.suppress(OSError, ValueError):  # it is gone
            self._channel.send(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(LEAVE_SECONDS)
        self.kill()

    def _listen(self) -> None:
        try:
            while True:
                number, body = self._channel.recv()
                if number < 0:
                    # What it prints. Nobody may be reading; a verdict must not be lost for that.
                    with contextlib.suppress(OSError, ValueError):
                        (sys.stdout if number == -1 else sys.stderr).write(body)
                else:
                    self._waiting[number].set_result(body)
                    if number:
                        del self._waiting[number]
        except (EOFError, OSError):
            code = self._popen.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
            with self._lock:
                self.gone = True
                for answer in self._waiting.values():
                    if not answer.done():
                        answer.set_exception(_Gone(f"its process {how}", self._killed))
            self._channel.close()


# --- the child's side


class _Said(io.TextIOBase):
    """A stream whose text is printed by the parent, before the verdict. What writes past it goes to standard error."""

    encoding = "utf-8"

    def fileno(self) -> int:
        return 2

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def write(self, text: str) -> int:
        self._say(text)
        return len(text)


def main(handle: str, path: str) -> None:
    """Import the file, then answer calls until the parent says to leave, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(int(handle), False)  # not for programs that the verifier starts
    channel, lock = Connection(int(handle)), threading.Lock()
    sys.argv[:] = [path]

    def send(number: int, body: Any) -> None:
        with lock:
            channel.send((number, body))

    os.dup2(2, 1)  # programs that it starts write past the streams below
    sys.stdout, sys.stderr = _Said(lambda text: send(-1, text)), _Said(lambda text: send(-2, text))
    verify, fault = _load(Path(path), channel.recv())
    send(0, fault)

    def answer(number: int, problem: Problem, completion: str) -> None:
        try:
            verdict = as_verdict(verify(problem, completion))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code: any exception is its own failure
            verdict = Verdict(0.0, error=failure(error))
        send(number, verdict)

    with contextlib.suppress(EOFError):
        while verify is not None and (call := channel.recv()) is not None:
            threading.Thread(target=answer, args=call, daemon=True).start()


def as_verdict(result: Any) -> Verdict:
    """A verdict from a verifier's score, bool, (score, text) or (score, None). Anything else is the verifier's failure."""
    score, text = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    text = "" if text is None else text
    if not isinstance(score, numbers.Real) or not isinstance(text, str):
        return Verdict(0.0, error=f"returned {result!r:.200}; needs a score in 0..1, a bool, or (score, text)")
    value = float(score)
    if not math.isfinite(value) or not 0.0 <= value <= 1.0:
        return Verdict(0.0, error=f"returned the score {value!r}; needs 0..1")
    return Verdict(value, text)


def _load(path: Path, source: bytes) -> tuple[Any, tuple[str, str] | None]:
    """The function `verify` of a file, or (None, what is wrong, what helps)."""
    spec = importlib.util.spec_from_file_location("vpd_mlx_user_verifier", path)
    if spec is None:
        return None, ("is not a Python file", "give the path of a .py file, relative to the recipe")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as for a script: it may import modules beside it, now or later
    try:
        # The source that the parent read once, whatever the file holds by now.
        exec(compile(source, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code
        return None, (f"cannot be imported ({type(error).__name__}: {error})", "fix the file")
    verify = getattr(module, "verify", None)
    define = "define `def verify(problem, completion): ...` in it"
    if not callable(verify):
        near = difflib.get_close_matches("verify", [n for n, v in vars(module).items() if callable(v)], n=1, cutoff=0.5)
        return None, ("has no function `verify`", f"rename {near[0]!r}, or {define}" if near else define)
    for fault in arity_faults("verify", verify, "problem", "completion"):
        return None, (fault.problem, define)
    if inspect.iscoroutinefunction(verify):
        return None, ("`verify` is async, and its verdict is wanted at once", "define it with `def`")
    return verify, None
