"""The classes that callers use: they start programs, call their functions, and judge them by tests."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from vpd_mlx.common.workers import Workers
from vpd_mlx.errors import ConfigError, Fault, SourceError
from vpd_mlx.sandbox.child import encode
from vpd_mlx.sandbox.folders import sweep
from vpd_mlx.sandbox.frames import Report, read_call, read_report, read_value
from vpd_mlx.sandbox.layers import GIVE_UP_ORDER, Abilities, possible_layers, python
from vpd_mlx.sandbox.process import Process
from vpd_mlx.sandbox.results import Ended, Failure, Limits, Outcome, Result, Value, show_arguments

__all__ = ["Library", "LibraryError", "LoadedProgram", "Sandbox"]

LOAD_SECONDS = 120.0  # for a program that stays: it may import a library from a cold disk
MOST_SHOWN = 400  # characters of a test in a message
SELF_TEST = "import collections, heapq, json, math, random, re, sys, threading\nprint(sys.stdin.read()[::-1])\n"
# numpy and sympy map much memory. The CPU limit counts for the whole life of the process, wall time for each call.
LIBRARY_LIMITS = {"memory_mb": 4096, "cpu_s": 1_000_000, "output_kb": 1024, "threads": 32}
# One thread each: answers are small, and the sandbox limits threads.
LIBRARY_SETUP = "import os\nos.environ.update(OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1', MPLCONFIGDIR='.')\n"


class Sandbox:
    """Runs programs within `limits`. Safe to use from several threads.

    `packages` are folders of libraries that programs may import besides the standard library. `without` leaves layers out.

    Raises:
        SourceError: no program runs at all; or `strict` is set and this machine cannot keep every promise; or it isolates nothing
            and `unisolated` is not set.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        strict: bool = False,
        packages: Sequence[str] = (),
        without: Sequence[str] = (),
        unisolated: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self._packages = tuple(packages)
        sweep()
        self._probe([layer for layer in possible_layers() if layer not in without])
        if strict and self.abilities.missing:
            raise SourceError(f"{self.abilities.notice()}; use a machine that prevents it, or set strict to false")
        if not unisolated and not self.abilities.layers:
            raise SourceError(
                f"{self.abilities.notice()}; use another machine, or set unisolated to true to accept that"
            )

    def run(self, program: str, stdin: str = "", prelude: str = "") -> Result:
        """Run a whole program from standard input to standard output. `prelude` runs before it, in the same namespace.

        Raises:
            SourceError: the sandbox itself failed.
        """
        with closing(self._start("run", program, prelude, stdin)) as process:
            process.pump()
            return process.result()

    def open(self, program: str, prelude: str = "", per_call: bool = False) -> LoadedProgram:
        """Load a program whose functions are then called one by one. Use as a context manager, in one thread: the program
        ends with the thread that opened it.

        With `per_call`, wall time and output count anew for every call. It is for a trusted program that stays, such as a
        library's scorer, and allows two minutes for loading.
        """
        return LoadedProgram(self._start("serve", program, prelude), per_call)

    def judge(
        self,
        loaded: LoadedProgram,
        tests: Sequence[str],
        names: Mapping[str, str],
        setup: str = "",
        most_failures: int = 1,
    ) -> list[Outcome]:
        """Run tests (statements such as `assert f(1) == 2`) against a loaded program.

        `names` maps a name in the tests to the program's function. The tests run in a child of their own. Their calls of the
        program are carried out here, with plain data both ways, so the program sees the arguments and never the expected
        values. Stops after `most_failures`, or when the program ends.

        Raises:
            SourceError: the sandbox failed, or a test failed before it called the program, so the test is at fault.
        """
        plan = json.dumps({"setup": setup, "tests": list(tests), "names": dict(names)})
        # The judge waits for the program, and both sides of every call pass through it.
        limits = replace(self.limits, wall_s=self.limits.wall_s * 2 + 5, output_kb=4 * self.limits.output_kb + 1024)
        outcomes: list[Outcome] = []
        failed: Failure | None = None
        call: tuple[str, str, str] | None = None
        with closing(self._start("judge", plan, limits=limits)) as process:
            while len(outcomes) < len(tests) and sum(not o.passed for o in outcomes) < most_failures:
                frame = process.next_frame()
                if frame is None:
                    end = process.result()
                    if call is not None and end.ended in ("timeout", "memory", "output"):
                        # The value that the program returned did this: numbers whose hashes collide, for example.
                        stalled = Failure("ValueError", "returned a value on which the tests hang or exceed a limit")
                        return [*outcomes, Outcome(False, True, stalled, call)]
                    raise SourceError(f"the tests cannot be run: {end.failure or end.ended}; fix the row's tests")
                letter, body = frame
                report: Report | None = None
                try:
                    if letter == b"T":
                        report = read_report(body)
                    else:
                        name, args, kwargs = read_call(body if letter == b"C" else b"")
                except ValueError:
                    raise SourceError("the tests write to the sandbox's pipe; fix the row's tests") from None
                if report is None:
                    answer = loaded.send(name, args, kwargs)
                    call = (name, show_arguments(args, kwargs), str(answer))
                    if isinstance(answer, Failure):
                        failed = answer
                        process.write_ctl(b"X" + answer.kind.encode("utf-8", "replace"))
                    else:
                        process.write_ctl(b"V" + json.dumps(answer.encoded).encode())
                else:
                    outcomes.append(_outcome(report, tests[len(outcomes)], setup, failed, call))
                    failed = call = None
                    if loaded.ended:
                        break
        return outcomes

    def _start(
        self, mode: str, program: str, prelude: str = "", stdin: str = "", limits: Limits | None = None
    ) -> Process:
        return Process(limits or self.limits, self.abilities.layers, self._packages, mode, program, prelude, stdin)

    def _probe(self, layers: list[str]) -> None:
        """Find the largest set of layers under which a program runs."""
        reasons: list[str] = []
        # A busy machine is no reason to give a layer up.
        patient = replace(self.limits, wall_s=max(self.limits.wall_s, 60), cpu_s=max(self.limits.cpu_s, 10))
        while True:
            self.abilities = Abilities(tuple(layers), tuple(reasons))
            try:
                with closing(self._start("run", SELF_TEST, stdin="olleh", limits=patient)) as process:
                    process.pump()
                    result = process.result()
                if result.ended == "ok" and result.stdout == "hello\n":
                    return
                why, culprit = f"{result.ended}: {result.failure}", None
            except SourceError as error:
                why = str(error).removeprefix("sandbox: a process could not isolate itself: ")
                culprit = next((layer for layer in layers if why.startswith(f"{layer}: ")), None)
            if not layers:
                raise SourceError(
                    f"sandbox: not even an empty program runs ({why}); raise the limits or fix the Python at {python()}"
                )
            dropped = culprit or next(layer for layer in GIVE_UP_ORDER if layer in layers)
            layers.remove(dropped)
            reasons.append(why if culprit else f"{dropped}: {why}")


class LoadedProgram(AbstractContextManager["LoadedProgram"]):
    """A program whose functions can be called. If it fails to load, every call returns that failure."""

    def __init__(self, process: Process, per_call: bool) -> None:
        self._process = process
        self._per_call = per_call
        if per_call:
            process.granted_s = LOAD_SECONDS
        self._loaded = False
        self._end: Result | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the program."""
        self._process.close()

    @property
    def ended(self) -> Ended | None:
        """How it ended, after which every call fails; None while it lives."""
        return self._end.ended if self._end else None

    def call(self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Value | Failure:
        """Call a function of the program, or a method of its class `Solution`, with plain values.

        Raises:
            TypeError: an argument is not plain data.
            SourceError: the sandbox itself failed.
        """
        answer = self.send(name, [encode(a) for a in args], {k: encode(v) for k, v in (kwargs or {}).items()})
        if isinstance(answer, Value) and answer.opaque is not None:
            return Failure("TypeError", f"the call returned {answer.opaque}")
        return answer

    def send(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Value | Failure:
        """Like `call`, with encoded arguments; an object that is not plain data comes back as a value with its truth alone."""
        if not self._loaded and self._end is None:
            self._receive()
            self._loaded = True
        if self._end is None:
            if self._per_call:
                self._process.renew()
            self._process.write_ctl(json.dumps([name, args, kwargs]).encode())
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
            return Failure.parse(body)
        try:
            return read_value(body if letter == b"V" else b"")
        except ValueError:
            # Only a program that writes to the pipe by itself can cause this.
            self._process.kill()
            self._end = Result("error", "", "", Failure("ValueError", "the program returned no readable value"))
            return None


class LibraryError(SourceError):
    """A call of a library failed, or ended its process."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Library:
    """Functions of `program`, called one at a time, each within `timeout` seconds. Restarts after a call that killed it.

    For a grading library, because it reads model-written text and may evaluate it: math-verify and reasoning-gym pass parts of an
    answer to Python's `eval`, directly or through sympy, and a power tower keeps sympy busy for ever. In a child process they can
    neither do harm nor hang a run, and any thread may call them.

    Raises:
        ConfigError: the module `needs` is not installed; `extra` is this package's extra that installs it.
        SourceError: it does not start.
    """

    def __init__(self, program: str, needs: str, extra: str, kind: str, timeout: float) -> None:
        if importlib.util.find_spec(needs) is None:
            problem = f"{kind!r} needs {needs}, which is not installed"
            raise ConfigError([Fault("task.kind", problem, f"pip install 'vpd-mlx[{extra}]'")])
        folders = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") and Path(p).is_dir()]
        self._program = LIBRARY_SETUP + program
        # The code is the library's own: where nothing isolates it, `notice` says so.
        self._sandbox = Sandbox(Limits(wall_s=timeout, **LIBRARY_LIMITS), packages=folders, unisolated=True)
        # A thread of its own: the process ends with the thread that starts it, and callers' threads come and go.
        self._thread = Workers(1, needs)
        self._loaded: LoadedProgram | None = None

    @property
    def notice(self) -> str:
        """`Abilities.notice` of its sandbox."""
        return self._sandbox.abilities.notice()

    def call(self, name: str, *args: Any) -> Any:
        """Call a function that returns JSON text; returns the value.

        Raises:
            LibraryError: it raised, or took too long.
            SourceError: it returned no JSON.
        """
        answer = self._thread.submit(self._call, name, args).result()
        if isinstance(answer, Failure):
            raise LibraryError(answer)
        try:
            return json.loads(answer.encoded)
        except (TypeError, ValueError, RecursionError):
            raise SourceError(f"{name} returned {str(answer)[:80]}") from None

    def close(self) -> None:
        """End the process. The next call starts another."""
        self._thread.submit(self._stop).result()

    def _call(self, name: str, args: tuple[Any, ...]) -> Value | Failure:
        if self._loaded is None or self._loaded.ended:
            self._stop()
            self._loaded = self._sandbox.open(self._program, per_call=True)
        return self._loaded.call(name, args)

    def _stop(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None


def _outcome(
    report: Report, test: str, setup: str, failed: Failure | None, call: tuple[str, str, str] | None
) -> Outcome:
    if report.why is None:
        return Outcome(True)
    failure, (file, line) = report.why, report.at
    source = _statement(setup if file == "<setup>" else test, line)
    if failed is not None and failure.kind in (failed.kind, "CallFailed"):
        return Outcome(False, True, failed, call, source)
    if not report.called:
        shown = source if len(source) <= MOST_SHOWN else f"{source[:MOST_SHOWN]}…"
        raise SourceError(f"the test {shown!r} failed before it called the program ({failure}); fix the row's tests")
    return Outcome(False, False, replace(failure, line=0), call, source)


def _statement(source: str, line: int) -> str:
    """The innermost statement of `source` on this line, or all of `source` if it has none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source.strip()
    on_it = (n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= line <= (n.end_lineno or n.lineno))
    innermost = max(on_it, key=lambda node: node.lineno, default=None)
    return (innermost and ast.get_source_segment(source, innermost)) or source.strip()
