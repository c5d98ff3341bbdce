"""C = the feedback of a program of the user's own. docs/feedback-command.md is its protocol.

JSON lines on standard input and output, one request at a time; the program stays alive between them. A program that dies,
answers late or breaks the protocol is killed and started again for the next request, each time after a longer pause.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import selectors
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any, Self

from pydantic import Field

from vpd_mlx.common.settings import Positive, Section, absolute
from vpd_mlx.errors import SourceError, config_error
from vpd_mlx.feedback.base import Host, SourceEntry
from vpd_mlx.feedback.outside import Asking
from vpd_mlx.types import Problem, Rollout

__all__ = ["COMMAND", "Command", "CommandKeys"]

LONGEST = 1 << 20  # bytes of one answer
PAUSES = (0.1, 5.0)  # seconds before the first restart, and at most
KEPT = 4000  # bytes of standard error, for the message when the program dies


class CommandKeys(Section):
    """What `command` adds to the section `feedback`."""

    command: list[str] | None = Field(
        None,
        min_length=1,
        description="Source `command`: the program and its arguments, files relative to the recipe. It reads and writes "
        "JSON lines, see docs/feedback-command.md.",
    )
    command_timeout: float = Field(30.0, gt=0, description="Seconds for one answer of the program, its start included.")
    command_workers: Positive = Field(1, description="Copies of the program that run side by side.")

    def located(self, folder: Path) -> Self:
        """As for every section; words of the command that name a file beside the recipe become absolute paths, too."""
        # os.path.isfile, unlike Path.is_file, returns False for a word that is too long to be a file name.
        words = [
            absolute(w, folder) if os.path.isfile(folder / w) or w.startswith(("./", "../", "~/")) else w
            for w in self.command or []
        ]
        return super().located(folder).model_copy(update={"command": words or None})


class Command(Asking):
    """Copies of one program, each of which serves one request at a time."""

    def __init__(self, cfg: Any, host: Host) -> None:
        """Checks that the program can be found; starts nothing yet. `cfg` is the recipe's section `feedback`."""
        super().__init__("command", cfg, cfg.command_workers, host)
        if shutil.which(cfg.command[0]) is None:
            what = f"{cfg.command[0]!r} is not a program that can be run"
            raise config_error("feedback.command", what, "give its path, relative to the recipe, or a name in PATH")
        self._closed = threading.Event()
        self._programs = [_Program(cfg.command, cfg.command_timeout, self._closed) for _ in range(cfg.command_workers)]
        self._free: queue.SimpleQueue[_Program] = queue.SimpleQueue()
        for program in self._programs:
            self._free.put(program)
        self._numbers = itertools.count(1)

    def ask(self, problem: Problem, rollout: Rollout) -> str | None:
        """The program's feedback, or the error that it died, was too slow, or broke the protocol."""
        verdict = rollout.verdict
        assert verdict is not None  # see `asks`
        request = {
            "id": str(next(self._numbers)),
            "problem": problem.id,
            "prompt": problem.prompt,
            "completion": rollout.text,
            "score": verdict.score,
            "verdict": verdict.text,
            "answer": problem.answer,
            "reference": problem.reference,
        }
        program = self._free.get()
        try:
            return program.ask(request)
        finally:
            self._free.put(program)

    def close(self) -> None:
        """End the programs; requests that wait for an answer fail."""
        super().close()
        self._closed.set()
        for program in self._programs:
            program.kill()


@dataclass(eq=False)
class _Program:
    _argv: Sequence[str]
    _timeout: float
    _closed: threading.Event
    _failures: int = 0
    _process: Popen[bytes] | None = None
    _end: weakref.finalize[..., _Program] | None = None
    _rest: bytes = b""
    _said: list[bytes] = field(default_factory=list)  # the end of its standard error

    def ask(self, request: Mapping[str, Any]) -> str | None:
        if self._failures:
            first, most = PAUSES
            self._closed.wait(min(most, first * 2.0 ** (self._failures - 1)))
        try:
            text = _feedback(self._exchange(self._running(), json.dumps(request).encode() + b"\n"), request["id"])
        except SourceError:
            # Late output would be taken for the answer to the next request: only a fresh program can serve that.
            self.kill()
            self._failures += 1
            raise
        self._failures = 0
        return text

    def _running(self) -> Popen[bytes]:
        if self._closed.is_set():
            raise SourceError("the run is ending")
        if self._process is not None:
            return self._process
        try:
            # A session of its own: Ctrl-C in the terminal does not reach it, and its whole process group can be killed.
            process = Popen(self._argv, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True)
        except OSError as error:
            raise SourceError(f"{self._argv[0]} cannot be started ({error.strerror or error})") from None
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        self._process, self._rest, self._said = process, b"", []
        self._end = weakref.finalize(self, _end, process)  # at exit, too
        threading.Thread(target=_listen, args=(process, self._said), daemon=True).start()
        return process

    def _exchange(self, process: Popen[bytes], data: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        give, take = process.stdin.fileno(), process.stdout.fileno()
        until, left, got = time.monotonic() + self._timeout, memoryview(data), self._rest
        with selectors.DefaultSelector() as selector:
            selector.register(take, selectors.EVENT_READ)
            selector.register(give, selectors.EVENT_WRITE)
            while b"\n" not in got:
                seconds = until - time.monotonic()
                if seconds <= 0:
                    raise SourceError(f"no answer within {self._timeout:g} s (feedback.command_timeout)")
                for key, _ in selector.select(seconds):
                    if key.fd == take:
                        chunk = os.read(take, 1 << 16)
                        if not chunk:
                            raise SourceError(self._obituary(process))
                        got += chunk
                        if len(got) > LONGEST:
                            raise SourceError(f"answered more than {LONGEST >> 20} MB in one line")
                    else:
                        with contextlib.suppress(BlockingIOError):
                            try:
                                left = left[os.write(give, left[: 1 << 16]) :]
                            except BrokenPipeError:  # it has stopped reading, but may still answer
                                left = left[:0]
                        if not left:
                            selector.unregister(give)
        line, _, self._rest = got.partition(b"\n")
        return line

    def _obituary(self, process: Popen[bytes]) -> str:
        try:
            code = process.wait(1.0)
        except TimeoutExpired:
            return "closed its standard output"
        time.sleep(0.05)  # for the last of its standard error
        lines = b"".join(self._said).decode(errors="replace").strip().splitlines()
        name = {-s: s.name for s in signal.Signals}.get(code, f"signal {-code}")
        end = f"was killed by {name}" if code < 0 else f"exited with code {code}"
        return f"the program {end}" + (f": {lines[-1][:200]}" if lines else "")

    def kill(self) -> None:
        self._process = None
        if self._end is not None:
            self._end()  # only the first call does anything, so a process id that the system reuses is safe


def _end(process: Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutExpired):
        process.wait(5.0)


def _listen(process: Popen[bytes], said: list[bytes]) -> None:
    assert process.stderr is not None
    with contextlib.suppress(OSError, ValueError):
        while chunk := os.read(process.stderr.fileno(), 1 << 12):
            said[:] = [b"".join((*said, chunk))[-KEPT:]]


def _feedback(line: bytes, expected: str) -> str | None:
    shown = line[:80].decode(errors="replace")
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        remedy = "all output but answers must go to its standard error"
        raise SourceError(f"answered {shown!r}, which is not JSON; {remedy}") from None
    if not isinstance(answer, dict) or "feedback" not in answer or "id" not in answer:
        raise SourceError(f'answered {shown!r}; an answer is {{"id": ..., "feedback": ...}}')
    if answer["id"] != expected:
        raise SourceError(f"answered request {answer['id']!r} when {expected!r} was asked; it must answer each once")
    text = answer["feedback"]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"answered {shown!r}; feedback must be text or null")
    return text


COMMAND = SourceEntry(
    lambda parts: Command(parts.cfg, parts.host),
    keys=CommandKeys,
    required=("command", "give the program as a list, e.g. [python3, critic.py]"),
    on_success=True,
)
