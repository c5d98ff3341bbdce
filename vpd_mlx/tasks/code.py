"""Programs judged by tests: public ones give feedback in training, private ones decide in evaluation, on held-out problems or, as
LiveCodeBench's own protocol has it, on the same ones.

A completion's program is its last fenced block. It runs in the sandbox and never sees the expected values: output and returned
values are compared here, as text and plain data, and assertions run in a process of their own. Only plain data passes between
tests and program. A test that passes a function or an object of a class, or that checks how a call changed its arguments, does
not work; the check of the reference answers at start reports it.

The score is 1 when all tests pass, else 0: a program that is half right is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from pydantic import Field

from vpd_mlx.common.settings import Positive
from vpd_mlx.common.thoughts import spoken
from vpd_mlx.errors import DataError, Fault, SourceError
from vpd_mlx.sandbox import Ended, Failure, Limits, Sandbox
from vpd_mlx.tasks.answers import in_fence
from vpd_mlx.tasks.data import DatasetSettings, read_all, read_split
from vpd_mlx.tasks.suites import Suite, imports_for, read_suite
from vpd_mlx.types import Problem, Verdict

__all__ = ["Code", "CodeSettings"]


class CodeSettings(DatasetSettings):
    """Write a program that passes tests: standard input and output, function calls, or assertions."""

    kind: Literal["code"]
    tests: str = Field("tests", description="Column of the tests that grade training and give feedback.")
    private_tests: str = Field(
        "private_tests", description="Column of the tests that decide in evaluation; without it `tests` decide."
    )
    same_problems: bool = Field(
        False,
        description="Evaluate the training problems themselves, by their private tests: LiveCodeBench's protocol. No row "
        "is held out.",
    )
    entry_point: str = Field(
        "entry_point",
        description="Column with the name of the function under test, or with an object that holds it as `func_name`.",
    )
    setup: str = Field("setup", description="Column of code that assertions need; it never runs beside the completion.")
    strict: bool = Field(False, description="Refuse to run where the machine cannot isolate programs in full.")
    unisolated: bool = Field(False, description="Run programs even where the machine cannot isolate them at all.")
    wall: float = Field(8.0, gt=0, description="Seconds for one program: one input, or all calls of a test set.")
    cpu: Positive = Field(4, description="The same in seconds of CPU time.")
    memory_mb: int = Field(512, ge=64, description="Memory of one program.")
    output_kb: Positive = Field(256, description="Most a program may print or return.")
    feedback_chars: int = Field(
        400, ge=20, description="Longest input, expected or got value in feedback, in characters; more is cut."
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Held-out rows, or the training problems."""
        if self.same_problems and self.eval_data is not None:
            yield Fault(
                "task.same_problems", "evaluates the rows of task.data, not task.eval_data", "leave one of them out"
            )
        yield from super().faults(recipe)


MOST_CASES = 2  # failing cases in one feedback text


@dataclass(frozen=True)
class _FailedTest:
    """One test that failed: the program's failure, or a wrong result (`got`)."""

    shown: str  # the input, the call or the assertion
    expected: str | None = None
    got: str = ""
    failure: Failure | None = None
    ended: Ended | None = None


class Code:
    """The task.

    Raises:
        SourceError: `strict` is set and this machine cannot isolate programs in full; or it isolates nothing, and `unisolated` is
            not set.
    """

    def __init__(self, cfg: CodeSettings) -> None:
        self._cfg = cfg
        limits = Limits(wall_s=cfg.wall, cpu_s=cfg.cpu, memory_mb=cfg.memory_mb, output_kb=cfg.output_kb)
        self._sandbox = Sandbox(limits, strict=cfg.strict, unisolated=cfg.unisolated)
        self.notices = tuple(filter(None, [self._sandbox.abilities.notice()]))
        self.train, self.held_out = (rows := read_all(cfg), rows) if cfg.same_problems else read_split(cfg)
        for problem in (*self.train, *self.held_out):  # find a broken row now, not in the middle of a run
            self._tests(problem, private=False)
        for problem in self.held_out:
            if cfg.same_problems and not problem.data.get(cfg.private_tests):
                what = f"no column {cfg.private_tests!r}, by which task.same_problems evaluates"
                raise DataError(f"row {problem.id}: {what}; add tests that training does not see, or hold rows out")
            self._tests(problem, private=True)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Grade by the public tests, with feedback from them."""
        return self._grade(problem, completion, private=False)

    def evaluate(self, problem: Problem, completion: str) -> Verdict:
        """Grade by the private tests, or by the public ones if a row has no others. Stops at the first failure."""
        return self._grade(problem, completion, private=True)

    def reference_completion(self, problem: Problem) -> str | None:
        """The row's solution, fenced if it is not."""
        code = problem.reference
        return code if code is None or in_fence(code) is not None else f"```python\n{code}\n```"

    def _tests(self, problem: Problem, private: bool) -> Suite:
        row, cfg = problem.data, self._cfg
        column = cfg.private_tests if private and row.get(cfg.private_tests) else cfg.tests
        function, setup = _function(row.get(cfg.entry_point)), str(row.get(cfg.setup) or "")
        helpers = [problem.prompt, problem.reference or ""]
        return read_suite(row.get(column), function, setup, f"row {problem.id}, {column}", helpers)

    def _grade(self, problem: Problem, completion: str, private: bool) -> Verdict:
        program = in_fence(completion)
        if program is None or not program.strip():
            unclosed = "```" in spoken(completion)
            why = "the last code block is not closed" if unclosed else "there is no code block (```python ... ```)"
            return Verdict(0.0, f"Format error: {why}.")
        failed: list[_FailedTest] = []
        try:
            tests = self._tests(problem, private)
            with closing(self._run(tests, program, 1 if private else len(tests.cases))) as run:
                for test in run:
                    failed.append(test)
                    # An exception explains more than wrong results, and a program that hangs would hang on every test.
                    if test.failure is not None or private:
                        break
        except SourceError as error:
            return Verdict(0.0, error=str(error))
        return Verdict(0.0, self._feedback(failed, program)) if failed else Verdict(1.0)

    def _run(self, tests: Suite, program: str, most: int) -> Generator[_FailedTest, None, None]:
        """The tests that fail; assertions stop after `most` failures."""
        prelude = imports_for(program)
        if tests.kind == "stdin":
            for given, expected in tests.cases:
                result = self._sandbox.run(program, given, prelude)
                if result.failure is not None:
                    yield _FailedTest(given, failure=result.failure, ended=result.ended)
                elif not _same_output(expected, result.stdout):
                    yield _FailedTest(given, expected.strip(), result.stdout.strip())
            return
        with self._sandbox.open(program, prelude) as loaded:
            if tests.kind == "assert":
                statements = [statement for statement, _ in tests.cases]
                names = {"candidate": tests.function, tests.function: tests.function}
                for outcome in self._sandbox.judge(loaded, statements, names, tests.setup, most):
                    name, arguments, got = outcome.call or (tests.function, "", "")
                    call = f"{name}({arguments})"
                    if outcome.raised:
                        yield _FailedTest(call, failure=outcome.failure, ended=loaded.ended)
                    elif not outcome.passed:
                        there = f"{call} gave {got}" if outcome.call else str(outcome.failure)
                        yield _FailedTest(outcome.source, None, there)
                return
            for arguments, expected in tests.cases:
                value = loaded.call(tests.function, arguments)
                shown = f"{tests.function}({', '.join(map(repr, arguments))})"
                if isinstance(value, Failure):
                    yield _FailedTest(shown, failure=value, ended=loaded.ended)
                elif not value.equals(expected, tuples_as_lists=True):
                    yield _FailedTest(shown, repr(expected), str(value))

    def _feedback(self, failed: list[_FailedTest], program: str) -> str:
        """The program's failure with its line, else a few wrong results."""
        last = failed[-1]
        if (failure := last.failure) is not None:
            lines = program.split("\n")
            late = last.ended == "timeout"
            text = f"Time limit: the program {failure.message}." if late else self._cut(str(failure))
            if 0 < failure.line <= len(lines):
                text += f"\nLine {failure.line}: {self._cut(lines[failure.line - 1].strip())}"
            return f"{text}\nInput: {self._cut(last.shown)}" if last.shown else text
        cases = []
        for test in failed[:MOST_CASES]:
            if test.expected is not None:
                parts = {"Input": test.shown, "Expected": test.expected, "Got": test.got}
            else:
                parts = {"Failed": test.shown, "There": test.got}
            cases.append("\n".join(f"{name}: {self._cut(text)}" for name, text in parts.items()))
        return "\n\n".join(cases)

    def _cut(self, text: str) -> str:
        text, most = text.strip(), self._cfg.feedback_chars
        return text if len(text) <= most else f"{text[: most * 2 // 3]} [...] {text[-most // 3 :]}"


def _function(cell: Any) -> str | None:
    """A function's name: the cell itself, or `func_name` in an object (LiveCodeBench's metadata)."""
    if isinstance(cell, str) and cell.lstrip().startswith("{"):
        try:
            cell = json.loads(cell)
        except ValueError:
            return None
    if isinstance(cell, Mapping):
        cell = cell.get("func_name")
    return cell if isinstance(cell, str) and cell else None


def _same_output(expected: str, got: str) -> bool:
    """Line by line without white space at the ends, or number by number: LiveCodeBench's rule."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (expected, got))
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(ours: str, theirs: str) -> bool:
    try:
        return [Decimal(w) for w in ours.split()] == [Decimal(w) for w in theirs.split()]
    except InvalidOperation:
        return False
