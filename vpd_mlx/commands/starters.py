"""Rows and a verifier to begin with, for each kind of task: what `vpd-mlx new` writes beside the recipe."""

from __future__ import annotations

import json
from typing import Any

from vpd_mlx.recipe import builtin_recipes

__all__ = ["SUMS", "TINY_VERIFIER", "starter"]

TINY_VERIFIER = '''\
"""Says how good a completion is and, in words, what is wrong with it. The words are what the model learns from."""


def verify(problem, completion):
    """problem.answer is the row's answer, problem.data the whole row."""
    got = completion.strip()
    if got == problem.answer:
        return 1.0
    if len(got) < len(problem.answer):
        return 0.0, "hundreds missing"
    return 0.0, "tens too low"
'''
SUMS = ((47, 38), (56, 27), (88, 14), (19, 73), (65, 28), (34, 59), (77, 16), (48, 48), (29, 83), (91, 45))
THINGS = (
    "apple",
    "kettle",
    "river",
    "violin",
    "comet",
    "harbour",
    "lemon",
    "tunnel",
    "puffin",
    "glacier",
    "maple",
    "ferry",
)


def starter(kind: str, *, tiny: bool = False) -> dict[str, str]:
    """File name -> text: `rows.jsonl`, and `verifier.py` where the kind has one. A kind that makes its own rows has none.

    With `tiny`, sums for the model that comes with the package.
    """
    if tiny:
        sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in SUMS]
        return {"rows.jsonl": _lines(sums), **({"verifier.py": TINY_VERIFIER} if kind == "python" else {})}
    if kind in ("python", "exact"):
        dates = builtin_recipes()["own_task"].parent
        names = ["rows.jsonl", *(["verifier.py"] if kind == "python" else [])]
        return {name: (dates / name).read_text(encoding="utf-8") for name in names}
    return {"rows.jsonl": _lines(ROWS[kind]())} if kind in ROWS else {}


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _math() -> list[dict[str, Any]]:
    ask = "A box holds {a} pens. How many pens are in {b} boxes? Reason step by step, and put the number into \\boxed{{}}."
    return [
        {
            "prompt": ask.format(a=a, b=b),
            "answer": str(a * b),
            "reference": f"{b} boxes with {a} pens each hold {b} * {a} = {a * b} pens. \\boxed{{{a * b}}}",
        }
        for a, b in SUMS
    ]


def _mcq() -> list[dict[str, Any]]:
    ask = "Which of these is {what}?\n(A) {a}\n(B) {b}\n(C) {c}\nGive the letter alone, inside <answer> and </answer>."
    facts = (
        ("a bird", "puffin", "ferry", "lemon"),
        ("a fruit", "lemon", "comet", "violin"),
        ("an instrument", "violin", "glacier", "apple"),
        ("made of ice", "glacier", "kettle", "maple"),
        ("a ship", "ferry", "puffin", "river"),
        ("a tree", "maple", "tunnel", "kettle"),
        ("something that flows", "river", "violin", "apple"),
        ("used to boil water", "kettle", "comet", "maple"),
        ("seen in the night sky", "comet", "lemon", "ferry"),
        ("a place for ships", "harbour", "puffin", "violin"),
    )
    rows = []
    for n, (what, *options) in enumerate(facts):
        right = n % 3
        options[0], options[right] = options[right], options[0]
        prompt = ask.format(what=what, a=options[0], b=options[1], c=options[2])
        rows.append({"prompt": prompt, "answer": "ABC"[right]})
    return rows


def _regex() -> list[dict[str, Any]]:
    ask = "Write the word {word} in capital letters, with a dash between all of them, and nothing else."
    return [
        {"prompt": ask.format(word=word), "answer": "-".join(word.upper()), "reference": "-".join(word.upper())}
        for word in THINGS
    ]


def _json_schema() -> list[dict[str, Any]]:
    schema = {
        "type": "object",
        "properties": {"item": {"type": "string"}, "count": {"type": "integer"}},
        "required": ["item", "count"],
        "additionalProperties": False,
    }
    ask = 'Order: {n} of the {thing}. Write it as JSON with the keys "item" and "count", and nothing else.'
    return [
        {"prompt": ask.format(n=n, thing=thing), "schema": schema, "answer": json.dumps({"item": thing, "count": n})}
        for n, thing in enumerate(THINGS, 2)
    ]


def _code() -> list[dict[str, Any]]:
    ask = "Write a Python function `shift(x)` that returns x {what}. Answer with one fenced block of Python."
    changes = [(f"plus {n}", f"x + {n}", n) for n in range(2, 8)] + [
        (f"times {n}", f"x * {n}", -n) for n in range(2, 8)
    ]
    return [
        {
            "prompt": ask.format(what=what),
            "tests": [f"assert shift(10) == {10 + n if n > 0 else 10 * -n}", f"assert shift(0) == {max(n, 0)}"],
            "entry_point": "shift",
            "reference": f"def shift(x):\n    return {body}",
        }
        for what, body, n in changes
    ]


ROWS = {"math": _math, "mcq": _mcq, "regex": _regex, "json-schema": _json_schema, "code": _code}
