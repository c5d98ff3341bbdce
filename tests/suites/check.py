"""Public test suites, every reference through its verifier: `vpd-mlx data check` must find no row that fails.

    make suites-test DATA=FOLDER          or: python tests/suites/check.py --data FOLDER [--only mbpp_plus ...]

FOLDER holds the files of `SUITES`, as their authors publish them: HumanEval (openai/human-eval), MBPP+ (evalplus), GSM8K's
test split (openai/grade-school-math), MATH-500. `mbpp_plus_inputs` has a test for each of MBPP+'s `plus_input`: the canonical
program is called in the sandbox, and what it returns is expected of it when it is graded. Inputs on which it raises are left
out and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vpd_mlx.recipe import builtin_recipes
from vpd_mlx.sandbox import Failure, Limits, Sandbox, Value
from vpd_mlx.sandbox.child import encode
from vpd_mlx.tasks.suites import imports_for

Row = dict[str, Any]
GENEROUS = 600  # seconds: some inputs are large, and a row has a hundred
OUTPUT_KB = 16384  # and so are some results
MEMORY_MB = (
    2048  # of the judge, too: an expected value of 2 MB is source text, which takes Python a hundred times that to read
)
GENEROUS_LIMITS = {"wall": GENEROUS, "cpu": GENEROUS, "output_kb": OUTPUT_KB, "memory_mb": MEMORY_MB}


def humaneval(rows: list[Row]) -> Iterator[Row]:
    """Tests call functions of the prompt, which the program has to repeat."""
    for r in rows:
        yield {
            "id": r["task_id"],
            "prompt": r["prompt"],
            "tests": r["test"],
            "entry_point": r["entry_point"],
            "reference": r["prompt"] + r["canonical_solution"],
        }


def mbpp_plus(rows: list[Row]) -> Iterator[Row]:
    """The assertions that come with MBPP."""
    for r in rows:
        yield {**_program(r), "tests": r["assertion"]}


def mbpp_plus_inputs(rows: list[Row]) -> Iterator[Row]:
    """The inputs that evalplus added. JSON has made lists of tuples, and text of complex numbers: the first form counts that
    the canonical program accepts."""
    limits = Limits(wall_s=20, cpu_s=GENEROUS, output_kb=OUTPUT_KB, memory_mb=MEMORY_MB)
    sandbox, refused, calls = Sandbox(limits), 0, 0
    for r in rows:
        name, tests = r["entry_point"], []
        with sandbox.open(r["canonical_solution"], imports_for(r["canonical_solution"]), per_call=True) as program:
            for given in r["plus_input"]:
                calls += 1
                for args in forms(given):
                    got = program.send(name, [encode(a) for a in args], {})
                    if isinstance(got, Value):
                        break
                call = f"{name}(*{args!r})"
                if isinstance(got, Failure):
                    refused += 1
                elif got.opaque is not None:
                    tests.append(f"assert {'' if got.encoded['o'][1] else 'not '}{call}")
                else:
                    equal = "same_items" if name in UNORDERED else "same"
                    tests.append(f"assert {equal}({call}, {got})")
        if tests:
            yield {**_program(r), "tests": tests, "setup": SAME}
        else:
            print(f"{r['task_id']} has no input that its canonical program takes: left out", flush=True)
    print(f"{calls} inputs, of which the canonical programs refuse {refused}", flush=True)


def forms(args: list[Any]) -> Iterator[list[Any]]:
    """What the arguments may have been before they were JSON."""
    yield args
    for n, arg in enumerate(args):
        if isinstance(arg, list):
            yield [*args[:n], tuple(arg), *args[n + 1 :]]
    yield [deep(arg) for arg in args]
    with contextlib.suppress(TypeError, ValueError):
        yield [complex(arg) for arg in args]


def deep(value: Any) -> Any:
    """Tuples for all lists."""
    return tuple(map(deep, value)) if isinstance(value, list) else value


# Not a number equals itself here.
SAME = """from math import inf, nan
def same(got, expected): return got == expected or repr(got) == repr(expected)
def same_items(got, expected): return sorted(got, key=repr) == sorted(expected, key=repr)
"""
# They return the items of a set, in an order that is another in every process.
UNORDERED = {
    *(
        "similar_elements",
        "find_char_long",
        "common_in_nested_lists",
        "extract_singly",
        "larg_nnum",
        "intersection_array",
    ),
    *("find_dissimilar", "Diff"),
}


def gsm8k(rows: list[Row]) -> Iterator[Row]:
    """The answer is the whole solution, with the number after ####."""
    for r in rows:
        yield {"prompt": r["question"], "answer": r["answer"], "reference": r["answer"]}


def math500(rows: list[Row]) -> Iterator[Row]:
    """The answer alone, in LaTeX."""
    for r in rows:
        yield {"prompt": r["problem"], "answer": r["answer"]}


def _program(r: Row) -> Row:
    return {k: r[k] for k in ("prompt", "entry_point")} | {"id": r["task_id"], "reference": r["canonical_solution"]}


SUITES: dict[str, tuple[str, str, Callable[[list[Row]], Iterator[Row]]]] = {
    "humaneval": ("humaneval/HumanEval.jsonl", "code", humaneval),
    "mbpp_plus": ("mbppplus/MbppPlus.jsonl", "code", mbpp_plus),
    "mbpp_plus_inputs": ("mbppplus/MbppPlus.jsonl", "code", mbpp_plus_inputs),
    "gsm8k": ("gsm8k/test.jsonl", "math", gsm8k),
    "math500": ("math500/test.jsonl", "math", math500),
}


def check(name: str, data: Path, out: Path) -> bool:
    """Write rows and a recipe, and have `data check` read them. Returns whether no row failed."""
    file, kind, convert = SUITES[name]
    given = [json.loads(line) for line in (data / file).read_text().splitlines()]
    rows = list(convert(given))
    (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = {
        "name": name,
        "model": str(builtin_recipes()["quickstart"].parent / "model"),
        "task": {"kind": kind, "data": f"{name}.jsonl"} | (GENEROUS_LIMITS if kind == "code" else {}),
        "rollout": {"max_prompt_tokens": 7000},
    }
    (out / f"{name}.yaml").write_text(json.dumps(recipe))
    start = time.monotonic()
    print(f"{name}: {len(rows)} rows; vpd-mlx data check {out / name}.yaml", flush=True)
    found = subprocess.run([sys.executable, "-m", "vpd_mlx", "data", "check", str(out / f"{name}.yaml")], check=False)
    print(f"{name}: {time.monotonic() - start:.0f} s, exit code {found.returncode}", flush=True)
    return found.returncode == 0


def main() -> None:
    """Check the suites that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/suites"))
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only if not check(name, options.data, options.out)]
    raise SystemExit(f"rows fail in: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
