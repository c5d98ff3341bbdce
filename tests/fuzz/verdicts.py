"""Hostile completions and verdict texts, by the thousand, for every kind of task: no exception, none over its time limit.

    python tests/fuzz/verdicts.py --cases 10000 [--seed 0]

A case is a completion for a task, or something strange that a verifier returns. Each must give a verdict whose score lies in 0..1
and whose texts can be written to a file; an error is a verdict, too. A case is given the task's limit of processor time for the
completion and as much for the row's reference, and `SLOW` seconds by the clock; our own process a second of processor time.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vpd_mlx.common.functions import Handed
from vpd_mlx.recipe import load_recipe
from vpd_mlx.sandbox.sandbox import LOAD_SECONDS
from vpd_mlx.tasks import Task, answer_of, build_task, examine
from vpd_mlx.tasks.checker import CLOCK
from vpd_mlx.types import MOST_TEXT, Verdict

LIMIT = 0.3  # seconds of processor time: `task.timeout`
# Seconds by the clock, on a machine that may be busy: two calls, and a process to start for each.
SLOW = 2 * CLOCK * (LIMIT + 1) + 2 * LOAD_SECONDS
MOST = 320_000  # characters of a completion
OURS = 1.0  # seconds of our own processor time

ATOMS = [
    "\\boxed{", "}", "{", "####", "<answer>", "</answer>", "<think>", "</think>", "```", "```python\n", "~~~", "\n",
    " ", "\t", "\\frac", "\\approx", "9^{9^{9}}", "(10^{9})!", "100000!", "\\sum_{i=1}^{10^9} i", "\\int",
    "\\sqrt{", "\\begin{pmatrix}", "&", "\\\\", "^", "_", "=", "<", ">", "(", ")", "[", "]", "-", "+", "*", "/",
    "!", "%", "$", ",", ".", "1", "0", "7", "x", "a", "aa", "b", "A", "B", "12", "1e999", "-0", "1" * 400, "NaN",
    "Infinity", "null", "true", '"', '"k"', ":", "{}", "[1, 1]", '{"k": [', "\\u0000", "\\ud800", "\ud800",
    "\udfff", "\x00", "\x1b[2J", "\u202e", "\u2028", "é", "𝟙", "٣", "ﬁ", "İ", "def f(x):\n", "    return x\n",
    "import os\n", "while 1: pass\n", "raise StopIteration\n", "lambda: 0", "__import__('os')", "assert ",
    "print(input())\n", "exit()\n", "yes", "no", "2024-05",
]  # fmt: skip
RETURNED: list[Callable[[random.Random], Any]] = [
    lambda r: r.random(),
    lambda r: (r.choice([0, 1, 0.5, -0.0]), text(r)),
    lambda r: (0.0, text(r)[:100] * r.choice([1, 50_000])),
    lambda r: r.choice(
        [
            None,
            "1",
            [],
            {},
            2,
            -1,
            float("nan"),
            float("inf"),
            10**400,
            True,
            1j,
            b"1",
            (1, 2),
            (1,),
            (1, b"x"),
            object(),
        ]
    ),
]
FORMS: dict[str, list[str]] = {
    "mcq": ["<answer>{}</answer>"],
    "math": ["\\boxed{{{}}}", "#### {}"],
    "json-schema": ["```json\n{}\n```", '"{}"', "[{}]"],
    "code": ["```python\n{}\n```", "```python\ndef f(x):\n    return {}\n```"],
    "reasoning_gym": ["<answer>{}</answer>"],
}
TREE = {
    "$ref": "#/$defs/n",
    "$defs": {
        "n": {
            "anyOf": [
                {"type": "array", "items": {"$ref": "#/$defs/n"}, "uniqueItems": True},
                {
                    "type": "object",
                    "additionalProperties": {"$ref": "#/$defs/n"},
                    "propertyNames": {"pattern": "^(a|aa)+$"},
                },
                {"type": ["string", "number", "boolean", "null"], "pattern": "^(a|aa)+$", "multipleOf": 0.1},
            ]
        }
    },
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # row, settings, share of the cases
    "addition": ({}, {}, 8),
    "exact": ({"answer": "A"}, {"ignore_case": True}, 15),
    "mcq": ({"answer": "B"}, {}, 15),
    "math": ({"answer": "12"}, {"timeout": LIMIT}, 8),
    "regex": ({"answer": "(a|aa|1)*x?", "reference": "aax"}, {"timeout": LIMIT}, 16),
    "json-schema": ({"schema": TREE}, {"timeout": LIMIT}, 16),
    "python": ({"answer": "12"}, {"verifier": "verifier.py", "timeout": 5}, 6),
    "function": ({"answer": "12"}, {}, 8),
    "reasoning_gym": ({}, {"name": "countdown", "rows": 20, "held_out": 0.3, "timeout": LIMIT}, 3),
    "code": ({"tests": ["assert f(1) == 1"], "entry_point": "f"}, {"wall": 3, "cpu": 1}, 1),
}
VERIFIER = """
def verify(problem, completion):
    return {}[len(completion) % 5]
"""
VERIFIER = VERIFIER.format("(1.0, (0.5, completion), (0, completion * 999), completion, [completion])")


def text(r: random.Random) -> str:
    """A text of atoms, some of them many times; now and then nothing but one of them."""
    if r.random() < 0.1:
        return r.choice(ATOMS) * r.choice([1, 2, 900, 4000, 40_000])
    return "".join(r.choice(ATOMS) * r.choice([1, 1, 1, 1, 2, 3, 60]) for _ in range(r.randint(0, 12)))


def value(r: random.Random, depth: int = 0, wide: int | None = None) -> Any:
    """A JSON value, some of which a schema takes long to check. Lists are wide at one depth alone: the text stays short."""
    wide = r.randrange(4) if wide is None else wide
    kind = r.randrange(9 if depth < 4 else 5)
    if kind < 5:
        return r.choice([None, True, 0.1, 10**30, -1e300, "", "a", "aab", "a" * 40 + "b", text(r)[:50]])
    items = [value(r, depth + 1, wide) for _ in range(r.randint(0, 4))]
    many = items * (300 if depth == wide else 1)
    return r.choice([items, many, {str(v)[:9]: v for v in items}, {"a" * (i % 40): v for i, v in enumerate(items)}])


def completion_for(kind: str, r: random.Random) -> str:
    """Something for a task to grade; most of it has the form that the task wants."""
    if kind == "json-schema" and r.random() < 0.5:
        return json.dumps(value(r)) if r.random() < 0.9 else "[" * (n := r.randint(1, 1200)) + "]" * n
    if kind in ("regex", "addition") and r.random() < 0.5:
        return r.choice(["a", "aa1", "1", "7"]) * r.choice([1, 30, 3000]) + r.choice(["x", "", "b"])
    if kind == "code" and r.random() < 0.3:
        return f"```python\ndef f(x):\n    return {r.choice(['x', '[x] * 10**9', '1 if x else f(x)', 'f(x)'])}\n```"
    filled = text(r)
    return r.choice(FORMS.get(kind, ["{}"])).format(filled) if r.random() < 0.8 else filled


def tasks(folder: Path, kinds: list[str], returned: Callable[..., Any]) -> dict[str, Task]:
    """A task of each kind, of one row and one that is held out."""
    (folder / "verifier.py").write_text(VERIFIER)
    built = {}
    for kind in kinds:
        row, settings, _ = SETTINGS[kind]
        task: dict[str, Any] = {"kind": kind, **settings}
        if kind not in ("addition", "reasoning_gym"):
            for name, prompt in (("rows", "p"), ("held", "q")):
                (folder / f"{kind}-{name}.jsonl").write_text(json.dumps({"prompt": prompt, **row}) + "\n")
            task |= {"data": f"{kind}-rows.jsonl", "eval_data": f"{kind}-held.jsonl"}
        if kind == "function":
            task |= {"function": "returned", "fingerprint": "0"}
        (folder / f"{kind}.yaml").write_text(json.dumps({"name": kind, "model": "./m", "task": task}))
        handed = Handed(verify=returned) if kind == "function" else Handed()
        built[kind] = build_task(load_recipe(folder / f"{kind}.yaml"), handed)
    return built


def sound(verdict: Verdict) -> bool:
    """Whether a verdict can be trusted, logged and shown."""
    texts = [verdict.text, verdict.error or ""]
    return 0.0 <= verdict.score <= 1.0 and all(len(t) <= MOST_TEXT and t.encode() is not None for t in texts)


def fuzz(cases: int, seed: int, kinds: list[str]) -> dict[str, dict[str, float]]:
    """Run the cases; returns figures by kind of task. AssertionError: a case broke a rule."""
    r = random.Random(seed)
    figures: dict[str, dict[str, float]] = {kind: collections.defaultdict(float) for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        built = tasks(Path(folder), kinds, lambda problem, completion: r.choice(RETURNED)(r))
        for kind in r.choices(kinds, [SETTINGS[k][2] for k in kinds], k=cases):
            task, completion = built[kind], completion_for(kind, r)[:MOST]
            clock, ours = time.monotonic(), time.process_time()
            verdict = r.choice([task.verify, lambda p, c, t=task: examine(t, p, c)])(task.train[0], completion)
            vote = answer_of(task, completion)
            clock, ours = time.monotonic() - clock, time.process_time() - ours
            shown = f"{kind}, seed {seed}: {completion[:200]!r} ({len(completion)} characters)"
            assert sound(verdict), shown
            assert vote is None or len(vote) <= len(completion), shown
            assert clock < SLOW, f"{shown}: {clock:.1f} s"
            assert ours < OURS, f"{shown}: {ours:.1f} s of our processor time"
            found = figures[kind]
            found["cases"] += 1
            found["right"] += verdict.score == 1.0
            found["errors"] += verdict.error is not None
            found["exhausted"] += verdict.text == "The answer takes too long to check."
            found["slowest_s"] = max(found["slowest_s"], clock)
            found["ours_s"] = max(found["ours_s"], ours)
    return figures


def main() -> None:
    """Fuzz all tasks and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    figures = fuzz(options.cases, options.seed, list(SETTINGS))
    for kind, found in figures.items():
        print(f"{kind:14}", *(f"{name} {value:.3g}" for name, value in found.items()), sep="  ")
    print(f"{options.cases} cases in {time.monotonic() - start:.0f} s: no exception, none over its limit")


if __name__ == "__main__":
    main()
