"""Checkers: what exhausts them is wrong unless the row is at fault; what breaks them is no verdict; none hangs."""

from __future__ import annotations

import pytest
from fuzz.verdicts import fuzz

from vpd_mlx.errors import SourceError
from vpd_mlx.tasks.checker import Checker, Exhausted
from vpd_mlx.types import Problem, Verdict

PROGRAM = """
import json, os

@limited
def python(): # suppresses what it can
    while True:
        try:
            while True: pass
        except Exception: pass

@limited
def c(): # never looks for signals
    return json.dumps(len(str(3 ** (3 ** 18))))

@limited
def deep():
    return deep()

@limited
def wide():
    return "x" * 10**10

@limited
def leaves():
    os._exit(3)

@limited
def fails():
    raise LookupError("no such thing")

@limited
def fine(value):
    return json.dumps(value)
"""
PROBLEM = Problem("row 7", ({"role": "user", "content": "q"},))


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker(PROGRAM, "json", "none", "none", 0.3)


@pytest.mark.parametrize("name", ["python", "c", "deep", "wide"])
def test_what_exhausts_the_checker_is_wrong_unless_the_row_is_at_fault(checker: Checker, name: str) -> None:
    assert checker.call("fine", 1) == 1
    with pytest.raises(Exhausted):
        checker.call(name)
    wrong = checker.grade(PROBLEM, (name,), ("fine", 1), "cannot check", lambda value: Verdict(1.0))
    assert wrong == Verdict(0.0, "The answer takes too long to check.")
    verdict = checker.grade(PROBLEM, (name,), (name,), "cannot check", lambda value: Verdict(1.0))
    assert verdict.error is not None
    assert verdict.error.startswith("cannot check: ")
    assert "; the reference of row row 7 fails, too: " in verdict.error


def test_what_breaks_the_checker_is_no_verdict(checker: Checker) -> None:
    for name, words in (("leaves", "ended with status 3"), ("fails", "LookupError: no such thing")):
        with pytest.raises(SourceError, match=words) as caught:
            checker.call(name)
        assert not isinstance(caught.value, Exhausted)
        verdict = checker.grade(PROBLEM, (name,), ("fine", 1), "cannot check", lambda value: Verdict(1.0))
        assert verdict.error is not None
        assert words in verdict.error
    assert checker.grade(PROBLEM, ("fine", 0.5), ("fails",), "", Verdict) == Verdict(0.5)


def test_fuzzed_completions_and_verdict_texts_give_verdicts_in_time() -> None:
    """A small share of `make fuzz`."""
    kinds = ["addition", "exact", "mcq", "regex", "json-schema", "function"]
    figures = fuzz(300, 0, kinds)
    assert sum(found["cases"] for found in figures.values()) == 300
    assert all(found["cases"] > 10 for found in figures.values())
    assert figures["function"]["errors"] > 0
    assert figures["regex"]["right"] > 0
