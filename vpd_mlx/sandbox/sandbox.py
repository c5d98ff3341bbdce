"""Model-written programs, run where they can do no harm.

A program is hostile by assumption. It runs in a process of its own (`child.py`) that sees no environment, no home
folder, no network and no other process, within limits of time, memory, output and disk, and all that it starts dies with
it. It cannot forge a verdict, because it never holds what it is judged by: expected values stay outside, and what it says
comes back as text or as plain data (JSON, never pickle) that others compare.

What the machine grants differs. On Linux: namespaces, a user id of its own, Landlock, seccomp, each tried once when the
sandbox is made; on macOS: `sandbox-exec`. `Sandbox.abilities` names what is promised and what could not be had. Tests whose
source is code (`assert f(1) == 2`) run in a second process, the judge, whose calls of the program go through here.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from vpd_mlx.errors import SourceError
from vpd_mlx.sandbox.child import encode
from vpd_mlx.sandbox.values import Value, check, show_arguments

__all__ = [
    "Abilities",
    "Failure",
    "Limits",
    "Outcome",
    "Result",
    "Sandbox",
    "Session",
    "Value",
]

Ended = Literal["ok", "error", "timeout", "memory", "output", "disk"]

PLATFORM = str(sys.platform)
CHILD = Path(__file__).with_name("child.py")
# A script would be compiled at every start; this takes the cached byte code, and puts nothing of ours on the import path.
START = """import sys, _frozen_importlib_external as e
child = type(sys)("child")
exec(e.SourceFileLoader("child", sys.argv[1]).get_code("child"), child.__dict__)
sys.exit(child.main(sys.argv[2:]))"""
LOAD_SECONDS = 120.0  # for what a program that stays has to load, from a cold disk
SETUP_SECONDS = 30.0  # for our own part, on a machine that is busy training
TICK = 0.05  # seconds between looks at what the kernel does not limit for us
PROMISES = {
    "files": "programs could read and change files outside their own folder",
    "network": "programs could use the network",
    "processes": "programs could signal and inspect other processes of this user",
    "descendants": "processes that a program leaves behind could live on",
    "memory": "memory is not limited",
}
# Which layers keep a promise; any one of the sets will do.
KEPT_BY: dict[str, tuple[set[str], ...]] = {
    "files": ({"namespaces"}, {"landlock"}, {"seatbelt"}),
    "network": ({"namespaces"}, {"seccomp"}, {"seatbelt"}),
    "processes": ({"namespaces"}, {"seccomp", "landlock"}, {"seatbelt", "lookups"}),
    "descendants": ({"namespaces"}, {"seccomp"}, {"seatbelt"}),
    "memory": (set(),),
}
SELF_TEST = "import collections, heapq, json, math, random, re, sys, threading\nprint(sys.stdin.read()[::-1])\n"


@dataclass(frozen=True)
class Limits:
    """What one program may take. `wall_s` and `cpu_s` count from its first line, for all its calls together."""

    wall_s: float = 8.0
    cpu_s: int = 4
    memory_mb: int = 512
    output_kb: int = 256
    file_mb: int = 16
    threads: int = 16


@dataclass(frozen=True)
class Failure:
    """Why a program or a call failed: exception, message, and the program's own line (0: none)."""

    kind: str
    message: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.message else self.kind


@dataclass(frozen=True)
class Result:
    """How a program ended. `failure` is set unless `ended` is ok."""

    ended: Ended
    stdout: str
    stderr: str
    seconds: float
    failure: Failure | None = None


@dataclass(frozen=True)
class Outcome:
    """One test of the judge: passed, or why not. `call` is the last call made (name, arguments, value), `source` the failed
    statement of the tests, `raised` whether the program itself failed there."""

    passed: bool
    raised: bool = False
    failure: Failure | None = None
    call: tuple[str, str, str] | None = None
    source: str = ""


@dataclass(frozen=True)
class Abilities:
    """The layers of isolation that this machine grants, the promises kept, and for those that are not: what follows."""

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    missing: tuple[str, ...]
    reasons: tuple[str, ...]

    def notice(self) -> str:
        """One line on what could not be had, or nothing."""
        if not self.missing:
            return ""
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"sandbox: {'; '.join(PROMISES[m] for m in self.missing)}{why}"


class Sandbox:
    """Runs programs under `limits`. Safe to use from several threads.

    `packages` are folders of libraries that programs may import besides the standard library. `without` leaves layers out.

    Raises:
        SourceError: no program runs at all, or `strict` and a promise cannot be kept on this machine.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        strict: bool = False,
        packages: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> None:
        self.limits = limits or Limits()
        self._packages = tuple(packages)
        self._layers, reasons = self._probe([layer for layer in _possible_layers() if layer not in without])
        have = set(self._layers)
        kept = [p for p, ways in KEPT_BY.items() if any(way <= have for way in ways)]
        missing = [p for p in PROMISES if p not in kept]
        self.abilities = Abilities(tuple(self._layers), tuple(kept), tuple(missing), tuple(reasons))
        if strict and missing:
            raise SourceError(f"{self.abilities.notice()}; run on a machine that grants it, or set strict to false")

    def run(self, program: str, stdin: str = "", prelude: str = "") -> Result:
        """Run a whole program from standard input to standard output. `prelude` runs before it, in its names.

        Raises:
            SourceError: the sandbox itself failed.
        """
        with self._start("run", program, prelude, stdin) as process:
            process.pump(lambda: False)
            return process.result()

    def open(self, program: str, prelude: str = "", per_call: bool = False) -> Session:
        """Load a program whose functions are then called one by one. Use as a context manager, in one thread: the program
        ends with the thread that opened it.

        With `per_call` wall time and output count anew for every call, for a program that stays: a library's scorer, say. Its
        loading has two minutes: it is not the model's, and a library read from a cold disk takes longer than any call.
        """
        return Session(self._start("serve", program, prelude), per_call)

    def judge(
        self, session: Session, tests: Sequence[str], names: Mapping[str, str], setup: str = "", most_failures: int = 1
    ) -> list[Outcome]:
        """Run tests (statements such as `assert f(1) == 2`) against a program loaded in `session`.

        `names` maps a name in the tests to the program's function. The tests run in a process of their own, where calls of
        these are carried out by the session with plain data both ways, so the program sees the arguments and never what is
        expected. Stops after `most_failures`, or with the program's end.

        Raises:
            SourceError: the sandbox failed, or a test failed before it called the program: the test is at fault.
        """
        plan = json.dumps({"setup": setup, "tests": list(tests), "names": dict(names)})
        # The judge waits for the program, and holds both sides of what is said.
        limits = replace(self.limits, wall_s=self.limits.wall_s * 2 + 5, output_kb=4 * self.limits.output_kb + 1024)
        outcomes: list[Outcome] = []
        failed: Failure | None = None
        call: tuple[str, str, str] | None = None
        with self._start("judge", plan, limits=limits) as process:
            while len(outcomes) < len(tests) and sum(not o.passed for o in outcomes) < most_failures:
                frame = process.next_frame()
                if frame is None:
                    end = process.result()
                    if call is not None and end.ended in ("timeout", "memory", "output"):
                        # Over what the program returned: numbers whose hashes collide, for one.
                        outcomes.append(
                            Outcome(False, True, Failure("ValueError", "returned what no test can bear"), call)
                        )
                        break
                    raise SourceError(f"the tests cannot be run: {end.failure or end.ended}; mend the row's tests")
                letter, body = frame
                if letter == b"C":
                    name, args, kwargs = json.loads(body)
                    answer = session.send(name, args, kwargs)
                    call = (name, show_arguments(args, kwargs), str(answer))
                    if isinstance(answer, Failure):
                        failed = answer
                        process.write_ctl(b"X" + _bytes(answer.kind))
                    else:
                        process.write_ctl(b"V" + _dump(answer.encoded))
                elif letter == b"T":
                    outcome = _outcome(json.loads(body), tests[len(outcomes)], setup, failed, call)
                    outcomes.append(outcome)
                    failed = call = None
                    if session.over:
                        break
        return outcomes

    def _start(
        self,
        mode: str,
        program: str,
        prelude: str = "",
        stdin: str = "",
        limits: Limits | None = None,
        layers: Sequence[str] | None = None,
    ) -> _Process:
        chosen = self._layers if layers is None else layers
        return _Process(limits or self.limits, chosen, self._packages, mode, program, prelude, stdin)

    def _probe(self, layers: list[str]) -> tuple[list[str], list[str]]:
        """The largest set of layers under which a program runs, and why others were left out."""
        reasons: list[str] = []
        layers = list(layers)
        while True:
            try:
                with self._start("run", SELF_TEST, stdin="olleh", layers=layers) as process:
                    process.pump(lambda: False)
                    result = process.result()
                if result.ended == "ok" and result.stdout == "hello\n":
                    return layers, reasons
                why, culprit = f"{result.ended}: {result.failure}", None
            except SourceError as error:
                why = str(error)
                culprit = next((layer for layer in layers if layer in why), None)
            if not layers:
                raise SourceError(
                    f"sandbox: not even an empty program runs ({why}); raise the limits or mend the Python at {_python()}"
                )
            dropped = culprit or next(layer for layer in GIVE_UP_ORDER if layer in layers)
            layers.remove(dropped)
            reasons.append(why if culprit else f"{dropped}: {why}")


GIVE_UP_ORDER = ("lookups", "userid", "landlock", "namespaces", "seccomp", "seatbelt")


def _possible_layers() -> list[str]:
    if PLATFORM == "linux":
        return ["namespaces", *(["userid"] if os.geteuid() == 0 else []), "landlock", "seccomp"]
    if PLATFORM == "darwin" and Path("/usr/bin/sandbox-exec").exists():
        return ["seatbelt", "lookups"]
    return []


class Session:
    """A loaded program, ready to be called. The first failure to load is the answer to every call."""

    def __init__(self, process: _Process, per_call: bool) -> None:
        self._process = process
        self._per_call = per_call
        if per_call:
            process.granted_s = LOAD_SECONDS
        self._loaded = False
        self._end: Result | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    @property
    def over(self) -> bool:
        """Whether the program has ended; then every call fails."""
        return self._end is not None

    @property
    def ended(self) -> Ended | None:
        """How it ended, where it has."""
        return self._end.ended if self._end else None

    def call(self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Value | Failure:
        """Call a function of the program, or a method of its class `Solution`, with plain values.

        Raises:
            TypeError: an argument is not plain data.
            SourceError: the sandbox itself failed.
        """
        return self.send(name, [encode(a) for a in args], {k: encode(v) for k, v in (kwargs or {}).items()})

    def send(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Value | Failure:
        """`call` with arguments that are already encoded."""
        if not self._loaded and self._end is None:
            self._receive()
            self._loaded = True
        if self._end is None:
            if self._per_call:
                self._process.renew()
            self._process.write_ctl(_dump([name, args, kwargs]))
            answer = self._receive()
            if answer is not None:
                return answer
        assert self._end is not None
        return self._end.failure or Failure("SystemExit", "the program ended before the call returned")

    def _receive(self) -> Value | Failure | None:
        frame = self._process.next_frame()
        if frame is None:
            self._end = self._process.result()
            return None
        letter, body = frame
        if letter == b"X":
            return _failure(body)
        try:
            if letter != b"V":
                raise ValueError("not a value")
            value = json.loads(body)
            check(value)
            return Value(value)
        except (ValueError, RecursionError):
            # Only a program that writes to our pipe itself can do this.
            self._process.kill()
            self._end = Result("error", "", "", 0.0, Failure("ValueError", "the program returned no readable value"))
            return None


# --- the process and its pipes


class _Process:
    """One child, its pipes, its deadline. Ends with everything killed and closed."""

    def __init__(
        self,
        limits: Limits,
        layers: Sequence[str],
        packages: Sequence[str],
        mode: str,
        program: str,
        prelude: str,
        stdin: str,
    ) -> None:
        self.limits = limits
        self.granted_s = limits.wall_s
        self._ready = False
        self._forced: Ended | None = None
        self._failure: Failure | None = None
        self._setup_fault = ""
        self._frames: list[tuple[bytes, bytes]] = []
        self._frame_buffer = bytearray()
        self._frame_total = 0
        self._text = {"out": bytearray(), "err": bytearray()}
        self._exit: int | None = None
        self._started = time.monotonic()
        self._deadline = self._started + SETUP_SECONDS
        self._end = self._started
        self._folder = None if "namespaces" in layers else tempfile.mkdtemp(prefix="vpd-sandbox-")
        self._selector = selectors.DefaultSelector()
        self._open: dict[str, int] = {}
        self._pending: dict[str, bytearray] = {"in": bytearray(_bytes(stdin)), "ctl": bytearray()}
        theirs: dict[str, int] = {}
        try:
            for name, reading in (("in", False), ("ctl", False), ("out", True), ("err", True), ("res", True)):
                read, write = os.pipe()
                self._open[name], theirs[name] = (read, write) if reading else (write, read)
                os.set_blocking(self._open[name], False)
                if reading:
                    self._selector.register(read, selectors.EVENT_READ, name)
            command = _command(limits, layers, packages, mode, theirs["ctl"], theirs["res"], self._folder or "/tmp")
            self._popen = subprocess.Popen(
                command,
                stdin=theirs["in"],
                stdout=theirs["out"],
                stderr=theirs["err"],
                pass_fds=(theirs["ctl"], theirs["res"]),
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._shut()
            raise SourceError(f"sandbox: cannot start a process ({error}); free memory or file handles") from error
        finally:
            for fd in theirs.values():
                os.close(fd)
        self.write_ctl(_bytes(prelude))
        self.write_ctl(_bytes(program))
        if not stdin:
            self._close("in")
        else:
            self._selector.register(self._open["in"], selectors.EVENT_WRITE, "in")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def write_ctl(self, body: bytes) -> None:
        """Queue one block for the child."""
        if "ctl" not in self._open:
            return
        if not self._pending["ctl"]:
            self._selector.register(self._open["ctl"], selectors.EVENT_WRITE, "ctl")
        self._pending["ctl"] += len(body).to_bytes(4, "big") + body

    def renew(self) -> None:
        """Let time and output count from here."""
        self._frame_total = 0
        for text in self._text.values():
            text.clear()
        if self._ready:
            self.granted_s = self.limits.wall_s
            self._deadline = time.monotonic() + self.limits.wall_s

    def next_frame(self) -> tuple[bytes, bytes] | None:
        """The next frame, or None where the child has ended."""
        self.pump(lambda: bool(self._frames))
        return self._frames.pop(0) if self._frames else None

    def pump(self, until: Callable[[], bool]) -> None:
        """Move bytes until `until()`, the child's end, or a limit, at which it is killed.

        Raises:
            SourceError: the child could not shut itself in.
        """
        watch = self._folder is not None or PLATFORM == "darwin"
        next_look = time.monotonic() + TICK
        while not until() and self._exit is None:
            now = time.monotonic()
            if now >= self._deadline:
                self._force("timeout")
                break
            if not any(name in self._open for name in ("out", "err", "res")):
                self._wait(self._deadline - now)
                continue
            for key, _ in self._selector.select(min(self._deadline - now, TICK)):
                self._move(key.data)
            if self._forced is not None:
                break
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + TICK
                if watch:
                    self._look()
                # A process that it left behind may hold the pipes open; its own end is the end.
                if self._popen.poll() is not None:
                    self._drain()
                    self._wait(0)
        if not self._ready:
            self.kill()
            why = self._setup_fault or self._text["err"].decode("utf-8", "replace").strip()[-300:] or "it ended early"
            raise SourceError(f"sandbox: a process could not shut itself in: {why}")

    def result(self) -> Result:
        """How it ended; to be asked after the end."""
        self.kill()
        out, err = (bytes(self._text[name]).decode("utf-8", "replace") for name in ("out", "err"))
        ended, failure = self._verdict(err)
        return Result(ended, out, err, self._end - self._started, failure)

    def _verdict(self, err: str) -> tuple[Ended, Failure | None]:
        limits, code = self.limits, self._exit
        if code is not None and code < 0:
            code = 128 - code
        if self._forced == "timeout":
            return "timeout", Failure("Timeout", f"took longer than {self.granted_s:g} s")
        if self._forced is None and code == 128 + signal.SIGXCPU:
            return "timeout", Failure("Timeout", f"took more than {limits.cpu_s} s of processor time")
        if self._forced == "output":
            return "output", Failure("OutputLimit", f"wrote more than {limits.output_kb} kB")
        if self._forced == "disk":
            return "disk", Failure("DiskLimit", f"wrote more than {limits.file_mb} MB of files")
        out_of_memory = Failure(
            "MemoryError", f"took more than {limits.memory_mb} MB", getattr(self._failure, "line", 0)
        )
        if self._forced == "memory":
            return "memory", out_of_memory
        if self._failure is not None:
            return ("memory", out_of_memory) if self._failure.kind == "MemoryError" else ("error", self._failure)
        if code == 0:
            return "ok", None
        if err.rstrip().rpartition("\n")[2].startswith("MemoryError"):
            return "memory", out_of_memory
        if code is not None and code > 128 and code - 128 in signal.valid_signals():
            return "error", Failure("Killed", f"ended by signal {signal.Signals(code - 128).name}")
        return "error", Failure("SystemExit", f"ended with status {code}")

    def _move(self, name: str) -> None:
        fd = self._open[name]
        if name in self._pending:
            try:
                del self._pending[name][: os.write(fd, self._pending[name][:65536])]
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._pending[name].clear()
            if not self._pending[name]:
                self._selector.unregister(fd)
                if name == "in":
                    os.close(self._open.pop(name))
            return
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        if not data:
            self._close(name)
        elif name == "res":
            self._frame_buffer += data
            self._frame_total += len(data)
            self._cut_frames()
        else:
            self._text[name] += data
        # Frames carry returned values, and count like what is printed.
        if len(self._text["out"]) + len(self._text["err"]) + self._frame_total > self.limits.output_kb * 1024:
            self._force("output")

    def _cut_frames(self) -> None:
        buffer = self._frame_buffer
        while len(buffer) >= 5:
            size = int.from_bytes(buffer[:4], "big")
            if len(buffer) < 4 + size or size < 1:
                return
            letter, body = bytes(buffer[4:5]), bytes(buffer[5 : 4 + size])
            del buffer[: 4 + size]
            if not self._ready:
                if letter == b"R":
                    self._ready = True
                    self._started = time.monotonic()
                    self._deadline = self._started + self.granted_s
                else:
                    self._setup_fault = body.decode("utf-8", "replace")
            elif letter == b"E":
                self._failure = _failure(body)
            else:
                self._frames.append((letter, body))

    def _drain(self) -> None:
        for name in ("out", "err", "res"):
            while name in self._open and self._forced is None:
                before = len(self._text["out"]) + len(self._text["err"]) + self._frame_total
                self._move(name)
                if before == len(self._text["out"]) + len(self._text["err"]) + self._frame_total:
                    break

    def _look(self) -> None:
        if self._folder is not None and _folder_bytes(self._folder) > self.limits.file_mb << 20:
            self._force("disk")
        elif PLATFORM == "darwin" and _footprint(self._popen.pid) > self.limits.memory_mb << 20:
            self._force("memory")

    def _force(self, why: Ended) -> None:
        self._forced = self._forced or why
        self.kill()

    def _wait(self, seconds: float) -> None:
        try:
            code = self._popen.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return
        if self._exit is None:
            self._exit, self._end = code, time.monotonic()

    def kill(self) -> None:
        """End it and all it started."""
        if self._exit is None:
            # The group while its leader is not yet reaped: its number cannot have gone to anyone else.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.kill()
            self._wait(SETUP_SECONDS)

    def close(self) -> None:
        """Kill, close, and remove its folder."""
        self.kill()
        self._shut()

    def _close(self, name: str) -> None:
        fd = self._open.pop(name, None)
        if fd is not None:
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
            os.close(fd)

    def _shut(self) -> None:
        for name in list(self._open):
            self._close(name)
        self._selector.close()
        if self._folder is not None:
            _remove(self._folder)
            self._folder = None


_numbers = itertools.count()


def _python() -> str:
    # A virtual environment's interpreter is a link that may lie in the very folders that programs must not see.
    return str(getattr(sys, "_base_executable", "") or sys.executable)


def _library_folders() -> list[str]:
    own = [f"{prefix}/{lib}" for prefix in (sys.base_prefix, sys.base_exec_prefix) for lib in ("lib", "lib64")]
    system = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/nix/store"]
    return sorted({path for path in (*own, *system) if os.path.isdir(path)}, key=lambda path: (len(path), path))


def _command(
    limits: Limits, layers: Sequence[str], packages: Sequence[str], mode: str, ctl: int, res: int, tmp: str
) -> list[str]:
    python = _python()
    # No other process has this user id: the kernel counts a user's processes, and lets a user's processes meddle.
    uid = 1_000_000_000 + os.getpid() % 2**22 * 256 + next(_numbers) % 256
    words = {
        "mode": mode,
        "layers": ",".join(layers),
        "ctl": ctl,
        "res": res,
        "tmp": tmp,
        "cpu": limits.cpu_s,
        "memory": limits.memory_mb << 20,
        "file": limits.file_mb << 20,
        "threads": limits.threads,
        "uid": uid,
    }
    command = [python, "-I", "-S", "-B", "-X", "utf8", "-c", START, str(CHILD), *(f"{k}={v}" for k, v in words.items())]
    command += [f"read={path}" for path in (*_library_folders(), *packages)]
    command += [f"path={path}" for path in packages]
    if "seatbelt" in layers:
        command[:0] = ["/usr/bin/sandbox-exec", "-p", seatbelt_profile(python, tmp, packages, "lookups" in layers)]
    return command


def seatbelt_profile(python: str, tmp: str, packages: Sequence[str], lookups: bool) -> str:
    """The profile for macOS's `sandbox-exec`; in it the last rule that matches holds.

    One process that may run this Python and nothing else, read system libraries and it, write to its folder, and signal
    itself. `lookups` also shuts off system services, through which others could be asked to act.
    """

    def folders(*paths: str) -> str:
        every = dict.fromkeys(path for p in paths for path in (p, os.path.realpath(p)))
        return " ".join(f"(subpath {json.dumps(path)})" for path in every)

    prefix = (sys.base_prefix, sys.base_exec_prefix, str(Path(python).parent))
    code = (str(CHILD), importlib.util.cache_from_source(str(CHILD)))
    system = [
        "/System",
        "/usr/lib",
        "/usr/share",
        "/Library/Apple",
        "/Library/Frameworks",
        "/dev",
        "/private/var/db/dyld",
    ]
    # Libraries that Homebrew's Python is linked with.
    system += [f"{brew}/{folder}" for brew in ("/opt/homebrew", "/usr/local") for folder in ("lib", "opt", "Cellar")]
    rules = [
        "(version 1)(allow default)",
        "(deny network*)(deny process-fork)(deny process-exec*)(deny signal)(allow signal (target self))",
        "(deny ipc-posix-shm*)(deny ipc-sysv*)",
        f"(allow process-exec* {folders(*prefix)})",
        f'(deny file-read-data)(allow file-read-data (literal "/") {folders(*system, *prefix, *packages, *code, tmp)})',
        f'(deny file-write*)(allow file-write* {folders(tmp)} (literal "/dev/null"))',
    ]
    if lookups:
        rules.append("(deny mach-lookup)(deny mach-register)(deny iokit-open)(deny appleevent-send)(deny job-creation)")
        rules.append("(deny lsopen)(deny process-info*)(allow process-info* (target self))")
    return "".join(rules)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _failure(body: bytes) -> Failure:
    kind, line, message = [*body.decode("utf-8", "replace").split("\0", 2), "0", ""][:3]
    return Failure(kind[:100], message, int(line) if line.isdecimal() and len(line) < 9 else 0)


def _outcome(
    told: Mapping[str, Any], test: str, setup: str, failed: Failure | None, call: tuple[str, str, str] | None
) -> Outcome:
    if told["ok"]:
        return Outcome(True)
    failure = _failure(told["why"].encode())
    place, line = told["at"]
    source = _statement(setup if place == "<setup>" else test, line)
    if failed is not None and failure.kind in (failed.kind, "CallFailed"):
        return Outcome(False, True, failed, call, source)
    if not told["called"]:
        raise SourceError(f"the test {source!r} failed before it called the program ({failure}); mend the row's tests")
    return Outcome(False, False, replace(failure, line=0), call, source)


def _statement(source: str, line: int) -> str:
    """The innermost statement of `source` that stands on this line; all of it where there is none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source.strip()
    on_it = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    innermost = max(on_it, key=lambda node: node.lineno, default=None)
    return (innermost and ast.get_source_segment(source, innermost)) or source.strip()


def _folder_bytes(folder: str) -> int:
    """What lies in it; more than 4096 entries, or 30 folders one in another, count as too much."""
    total, entries = 0, 0
    todo = [(folder, 0)]
    while todo:
        where, depth = todo.pop()
        with contextlib.suppress(OSError), os.scandir(where) as listing:
            for entry in listing:
                entries += 1
                if entries > 4096 or depth > 30:
                    return sys.maxsize
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        todo.append((entry.path, depth + 1))
    return total


def _footprint(pid: int) -> int:
    """Memory of a process on macOS, which does not hold RLIMIT_AS: `ri_phys_footprint` of proc_pid_rusage."""
    buffer = ctypes.create_string_buffer(512)
    if ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage(pid, 0, ctypes.byref(buffer)) != 0:
        return 0
    return int.from_bytes(buffer.raw[72:80], sys.byteorder)


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        # Folders without rights, or nested deeper than Python climbs.
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
