"""The code task: every form of tests, what feedback says first, and that no completion can forge its verdict."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from vpd_mlx.errors import ConfigError, DataError, SourceError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.tasks import build_task, examine, prove
from vpd_mlx.tasks.code import Code
from vpd_mlx.tasks.suites import imports_for, read_suite

SUM_STDIN = [{"input": "1 2\n", "output": "3\n"}, {"input": "10 -4", "output": "6"}]
LISTS = [{"input": "[3, 1, 2]\n1", "output": "[1, 2]", "testtype": "functional"}]


def packed(tests: list[dict[str, Any]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


ROWS: dict[str, dict[str, Any]] = {
    "stdin": {
        "prompt": "Add two numbers.",
        "tests": SUM_STDIN,
        "private_tests": packed([{"input": "5 5", "output": "10"}, {"input": "0 0", "output": "0"}]),
        "reference": "a, b = map(int, input().split())\nprint(a + b)",
    },
    "call": {
        "prompt": "The k+1 smallest, sorted.",
        "tests": json.dumps(LISTS),
        "private_tests": json.dumps([{"input": "[9, 8]\n0", "output": "[8]", "testtype": "functional"}]),
        "entry_point": json.dumps({"func_name": "smallest"}),
        "reference": "class Solution:\n  def smallest(self, xs: List[int], k: int):\n    return nsmallest(k + 1, xs)",
    },
    "inputs": {
        "prompt": "Double.",
        "tests": {"inputs": [[2], [[1]]], "outputs": [4, [1, 1]], "fn_name": "double"},
        "reference": "def double(x):\n    return x * 2",
    },
    "mbpp": {
        "prompt": "Common elements.",
        "tests": [
            "assert set(common((3, 4, 5), (5, 4))) == set((4, 5))",
            "assert math.isclose(len(common((1,), (2,))), 0)",
        ],
        "reference": "def common(a, b):\n    return tuple(set(a) & set(b))",
    },
    "humaneval": {
        "prompt": "Increment all.",
        "tests": "METADATA = {}\n\ndef check(candidate):\n    for n in range(5):\n"
        "        assert candidate(list(range(n))) == [i + 1 for i in range(n)]\n    assert candidate([]) == []\n",
        "entry_point": "increment",
        "reference": "def increment(xs):\n    return [x + 1 for x in xs]",
    },
    "asserts": {
        "prompt": "A root of a polynomial.",
        "tests": "import math\nassert abs(evaluate([1, 2], root([1, 2]))) < 1e-6\nassert root([4, 2]) == -2.0\n",
        "setup": "def evaluate(cs, x):\n    return sum(c * x**i for i, c in enumerate(cs))",
        "entry_point": "root",
        "reference": "def root(cs):\n    return -cs[0] / cs[1]\ndef evaluate(cs, x):\n    return 0",
    },
    # As HumanEval/32, 38 and 50: the tests call a function of the prompt, which uses others in turn.
    "helper": {
        "prompt": "from string import ascii_lowercase as letters\n\nSHIFT = 5\n\ndef code(c, by):\n"
        "    return letters[(letters.index(c) + by) % 26]\n\ndef encode(s):\n    return ''.join(code(c, SHIFT) for c in s)"
        '\n\ndef decode(s):\n    """The inverse of encode."""\n',
        "tests": "def check(candidate):\n    import random\n    for _ in range(9):\n"
        "        s = ''.join(random.choices('abcxyz', k=5))\n        assert candidate(encode(s)) == s\n",
        "entry_point": "decode",
        "reference": "def encode(s):\n    return 'aaaaa'\n\n"
        "def decode(s):\n    return ''.join(chr((ord(c) - 5 - 97) % 26 + 97) for c in s)",
    },
    # As MBPP+ 737, 787 and 794: an object of which the tests use the truth alone.
    "truth": {
        "prompt": "Starts with a vowel?",
        "tests": "assert vowel('annie')\nassert not vowel('dawood')\n",
        "entry_point": "vowel",
        "reference": "import re\ndef vowel(s):\n    return re.search('^[aeiou]', s)",
    },
}


def task(folder: Path, *names: str, **keys: Any) -> Code:
    rows = [{"id": name, **ROWS[name]} for name in names or ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "eval.jsonl").write_text(json.dumps({**rows[0], "id": "held", "prompt": "held out"}) + "\n")
    settings = {"kind": "code", "data": "rows.jsonl", "eval_data": "eval.jsonl", "wall": 2.0, "cpu": 2, **keys}
    (folder / "r.yaml").write_text(json.dumps({"name": "x", "model": "./m", "task": settings}))
    built = build_task(load_recipe(folder / "r.yaml"))
    assert isinstance(built, Code)
    return built


def fenced(code: str) -> str:
    return f"I think:\n```python\n{code}\n```"


def feedback(built: Code, code: str) -> str:
    verdict = built.verify(built.train[0], fenced(code))
    assert (verdict.score, verdict.error) == (0.0, None)
    return verdict.text


def test_references_of_every_form_pass(tmp_path: Path) -> None:
    built = task(tmp_path)
    prove(built)
    for problem in built.train:
        for verdict in (built.verify(problem, fenced("x = 1")), built.evaluate(problem, fenced("x = 1"))):
            assert (verdict.score, verdict.error) == (0.0, None)


def test_private_tests_decide_in_evaluation(tmp_path: Path) -> None:
    built = task(tmp_path, "stdin", "call")
    cheat = fenced("print({'1 2': 3}.get(input(), 6))")
    assert built.verify(built.train[0], cheat).score == 1.0
    verdict = examine(built, built.train[0], cheat)
    assert verdict.score == 0.0
    cheat = fenced("def smallest(xs, k): return [1, 2]")
    assert built.verify(built.train[1], cheat).score == 1.0
    assert examine(built, built.train[1], cheat).score == 0.0


def test_the_same_problems_are_trained_by_public_and_evaluated_by_private_tests(tmp_path: Path) -> None:
    built = task(tmp_path, "stdin", "call", same_problems=True, eval_data=None)
    assert [p.id for p in built.train] == [p.id for p in built.held_out]
    assert len(built.train) == 2
    prove(built)
    cheat = fenced("print({'1 2': 3}.get(input(), 6))")
    assert built.verify(built.train[0], cheat).score == 1.0
    assert examine(built, built.held_out[0], cheat).score == 0.0
    with pytest.raises(DataError, match=r"no column 'private_tests', by which task.same_problems evaluates"):
        task(tmp_path, "mbpp", same_problems=True, eval_data=None)
    with pytest.raises(ConfigError, match=r"evaluates the rows of task.data, not task.eval_data"):
        task(tmp_path, "stdin", same_problems=True)


# --- feedback


def test_no_code_is_a_format_error(tmp_path: Path) -> None:
    built = task(tmp_path, "stdin")
    problem = built.train[0]
    assert built.verify(problem, "print(3)").text == "Format error: there is no code block (```python ... ```)."
    assert built.verify(problem, "```python\nprint(3)").text == "Format error: the last code block is not closed."
    assert built.verify(problem, "```\n\n```").text.startswith("Format error")
    assert built.verify(problem, fenced("boom") + "\n" + fenced(ROWS["stdin"]["reference"])).score == 1.0


def test_a_runtime_error_comes_first_with_its_line_and_input(tmp_path: Path) -> None:
    built = task(tmp_path, "stdin")
    code = "a, b = map(int, input().split())\nif b < 0:\n    raise ValueError('no negatives')\nprint(a)"
    assert feedback(built, code) == "ValueError: no negatives\nLine 3: raise ValueError('no negatives')\nInput: 10 -4"
    assert feedback(built, "print(") == "SyntaxError: '(' was never closed\nLine 1: print(\nInput: 1 2"
    assert feedback(built, "import sys\nsys.exit(3)") == "SystemExit: ended with status 3\nInput: 1 2"


def test_time_memory_and_output_limits_are_told(tmp_path: Path) -> None:
    built = task(tmp_path, "stdin", cpu=1, memory_mb=128, output_kb=8)
    assert feedback(built, "while True: pass").startswith("Time limit: the program took ")
    assert feedback(built, "import time\ntime.sleep(9)") == "Time limit: the program took longer than 2 s.\nInput: 1 2"
    assert feedback(built, "x = [0]\nwhile True: x += x").startswith("MemoryError: took more than 128 MB\nLine 2")
    assert feedback(built, "while True: print('x' * 99)").startswith("OutputLimit: wrote more than 8 kB")


def test_up_to_two_failing_cases_cut_to_size(tmp_path: Path) -> None:
    built = task(tmp_path, "stdin", feedback_chars=30)
    code = "print('y' * 100, int(input().split()[0]))"
    first, second = feedback(built, code).split("\n\n")
    assert first == "Input: 1 2\nExpected: 3\nGot: yyyyyyyyyyyyyyyyyyyy [...] yyyyyyyy 1"
    assert second.startswith("Input: 10 -4\nExpected: 6\nGot: ")


def test_calls_show_call_expected_and_got(tmp_path: Path) -> None:
    built = task(tmp_path, "call")
    assert feedback(built, "def smallest(xs, k): return tuple(xs)") == (
        "Input: smallest([3, 1, 2], 1)\nExpected: [1, 2]\nGot: (3, 1, 2)"
    )
    assert built.verify(built.train[0], fenced("def smallest(xs, k): return (1, 2)")).score == 1.0
    assert feedback(built, "def smallest(xs, k):\n  return xs[k * 9]") == (
        "IndexError: list index out of range\nLine 2: return xs[k * 9]\nInput: smallest([3, 1, 2], 1)"
    )
    assert "AttributeError" in feedback(built, "class Solution:\n  def largest(self): pass")
    assert "returned a function, which is not plain data" in feedback(built, "def smallest(xs, k): return smallest")
    assert feedback(built, "def smallest(xs, k):\n  while 1: pass").startswith("Time limit")


def test_assertions_show_statement_and_call(tmp_path: Path) -> None:
    built = task(tmp_path, "mbpp")
    assert feedback(built, "def common(a, b): return a") == (
        "Failed: assert set(common((3, 4, 5), (5, 4))) == set((4, 5))\nThere: common((3, 4, 5), (5, 4)) gave (3, 4, 5)"
        "\n\nFailed: assert math.isclose(len(common((1,), (2,))), 0)\nThere: common((1,), (2,)) gave (1,)"
    )
    assert "There: common((1,), (2,)) gave None" in feedback(
        built, "def common(a, b): return {4, 5} if 5 in b else None"
    )
    assert feedback(built, "def common(a, b):\n  return a / b").startswith(
        "TypeError: unsupported operand type(s) for /: 'tuple' and 'tuple'\nLine 2: return a / b\nInput: common((3, 4, 5)"
    )
    built = task(tmp_path, "humaneval")
    assert "assert candidate(list(range(n))) == [i + 1 for i in range(n)]\nThere: increment([0]) gave [0]" in feedback(
        built, "def increment(xs): return xs"
    )


def test_a_completion_cannot_bring_its_own_helpers_to_the_tests(tmp_path: Path) -> None:
    built = task(tmp_path, "asserts")
    assert "root([1, 2]) gave 5" in feedback(built, "def root(cs): return 5\ndef evaluate(cs, x): return 0")
    built = task(tmp_path, "helper")
    assert feedback(built, "def encode(s): return 'a'\ndef code(c, by): return 'a'\nSHIFT = 0\ndef decode(s): return s")


def test_helpers_may_stand_in_a_fence_or_in_the_reference_alone(tmp_path: Path) -> None:
    row = ROWS["helper"]
    whole = row["prompt"].replace('    """The inverse of encode."""', "    return s")
    for prompt, reference in (
        (f"Write decode:\n```python\n{row['prompt']}\n```\nThank you.", ""),
        ("Write decode, please.", whole),
        ("def encode(s):\n    pass\n", whole),
    ):
        suite = read_suite(row["tests"], "decode", "", "row 1", [prompt, reference])
        names: dict[str, Any] = {}
        exec(suite.setup, names)
        assert names["encode"]("xyz") == "cde"
    assert "decode" not in read_suite(row["tests"], "decode", "", "row 1", [row["prompt"]]).setup.split("def check")[0]


# --- forging


@pytest.mark.parametrize(
    "code",
    [
        "print('PASS')\nimport os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "class Any:\n  def __eq__(s, o): return True\n  def __getattr__(s, n): return s\n  def __call__(s, *a): return s\n"
        "common = smallest = increment = double = root = Any()",
        "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.set = lambda *a: 0\n"
        "def common(*a): return 0\nsmallest = increment = double = root = common",
        "def common(*a): raise AssertionError\nsmallest = increment = double = root = common",
        "import gc, sys\ndef common(*a):\n  return [o for o in gc.get_objects() if type(o) is tuple and o == (4, 5)][:1]\n"
        "smallest = increment = double = root = common",
        "import os\nfor fd in range(3, 99):\n  for b in (b'Vtrue', b'T{\"ok\": true}'):\n"
        "    try: os.write(fd, len(b).to_bytes(4, 'big') + b)\n    except OSError: pass",
    ],
)
def test_nothing_forged_scores_in_any_form(tmp_path: Path, code: str) -> None:
    built = task(tmp_path)
    for problem in built.train:
        for verdict in (built.verify(problem, fenced(code)), built.evaluate(problem, fenced(code))):
            assert (verdict.score, verdict.error) == (0.0, None), problem.id


# --- reading tests


def test_output_is_compared_line_by_line_and_by_number(tmp_path: Path) -> None:
    ROWS["numbers"] = {"prompt": "p", "tests": [{"input": "", "output": "1.50 2\nabc\n"}]}
    try:
        built = task(tmp_path, "numbers")
    finally:
        del ROWS["numbers"]
    for good in ("1.5 2.0\n abc", "\n1.50 2\nabc\n\n", "15e-1 2\nabc"):
        assert built.verify(built.train[0], fenced(f"print({good!r})")).score == 1.0, good
    for bad in ("1.5 2 abc", "1.5 2\nabcd", "1.51 2\nabc", "sNaN 2\nabc", "1.5 2\nabc\nabc", ""):
        assert built.verify(built.train[0], fenced(f"print({bad!r})")).score == 0.0, bad


def test_packed_tests_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    trap = base64.b64encode(zlib.compress(pickle.dumps(Trap()))).decode()
    with pytest.raises(DataError):
        read_suite(trap, None, "", "row 1")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("raw", "function", "words"),
    [
        (None, None, "no tests in 'None'"),
        ([], None, "no tests"),
        ("", None, "no tests"),
        ([{"input": "1"}], None, "a test without input or output"),
        (LISTS, None, "calls of a function without its name"),
        ([*LISTS, *SUM_STDIN], "f", "mixed with others"),
        ([{"input": "x y", "output": "1", "testtype": "functional"}], "f", "values are not JSON"),
        (["assert f(1) =="], None, "not Python"),
        (["assert f(g(1)) == 2"], None, "the tests call f, g; name the one under test"),
        (["assert 1 == 1"], None, "the tests call no function"),
        ("x = 1", "f", "without an assertion"),
    ],
)
def test_faulty_tests_are_named(raw: Any, function: str | None, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_suite(raw, function, "", "row 7, tests")
    assert str(caught.value).startswith("row 7, tests: ")
    assert words in str(caught.value)


def test_a_broken_test_is_no_score(tmp_path: Path) -> None:
    ROWS["broken"] = {
        "prompt": "p",
        "tests": ["assert f(undefined()) == 1"],
        "entry_point": "f",
        "reference": "def f(x): ...",
    }
    try:
        built = task(tmp_path, "broken")
    finally:
        del ROWS["broken"]
    verdict = built.verify(built.train[0], fenced("def f(x): return 1"))
    assert verdict.error is not None
    assert "'assert f(undefined()) == 1' failed before it called the program" in verdict.error
    with pytest.raises(DataError, match="the verifier failed on the reference answer"):
        prove(built)


def test_a_wrong_reference_is_refused(tmp_path: Path) -> None:
    ROWS["wrong"] = {**ROWS["stdin"], "reference": "print(3)"}
    try:
        with pytest.raises(DataError, match=r"row wrong: .* scores 0, not 1 \(Input: 10 -4"):
            prove(task(tmp_path, "wrong"))
    finally:
        del ROWS["wrong"]


def test_usual_imports_are_there_and_only_those() -> None:
    source = "def f(xs: List[int]) -> int:\n    heapify(xs)\n    count = math.gcd(*xs)\n    return count"
    assert imports_for(source).split("\n") == ["from heapq import heapify", "from typing import List", "import math"]
    assert imports_for("import math\nx = math.pi") == ""
    assert imports_for("def f(:") == ""


def test_strict_and_limits_reach_the_sandbox(tmp_path: Path) -> None:
    built = task(tmp_path, "stdin", wall=3.5, cpu=2, memory_mb=200, output_kb=7)
    limits = built._sandbox.limits
    assert (limits.wall_s, limits.cpu_s, limits.memory_mb, limits.output_kb) == (3.5, 2, 200, 7)
    assert built.notices == tuple(filter(None, [built._sandbox.abilities.notice()]))


def test_unisolated_programs_run_only_where_the_recipe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpd_mlx.sandbox.sandbox.possible_layers", list)  # as on a Mac without sandbox-exec
    with pytest.raises(SourceError, match="unisolated"):
        task(tmp_path, "stdin")
    built = task(tmp_path, "stdin", unisolated=True)
    assert "could read and change files" in built.notices[0]
