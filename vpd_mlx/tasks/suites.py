"""Test suites of programs, read from the forms that data sets use.

- input and output: `[{"input": ..., "output": ...}, ...]` or `{"inputs": [...], "outputs": [...]}`, as LiveCodeBench and APPS;
- function calls: the same with a function's name (LiveCodeBench's `testtype: functional`: one line of JSON for each argument);
- assertions: a list of statements as in MBPP, or code, with or without HumanEval's `check(candidate)`. They may call helpers
  that the prompt or the row's reference defines, as in HumanEval/32; those come from the row, never from a completion.

All but the last may be JSON text; LiveCodeBench's packed private tests are read without unpickling.
"""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import contextlib
import json
import pickletools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vpd_mlx.errors import DataError
from vpd_mlx.tasks.answers import in_fence

__all__ = ["Suite", "imports_for", "read_suite"]

MOST_UNPACKED = 256 << 20  # bytes
UNREADABLE = (
    SyntaxError,
    ValueError,
    RecursionError,
    MemoryError,
)  # what `ast.parse` raises on text that is not Python


@dataclass(frozen=True)
class Suite:
    """Tests of one kind. `cases` holds (input, output), (arguments, value) or (statement, None)."""

    kind: Literal["stdin", "call", "assert"]
    cases: tuple[tuple[Any, Any], ...]
    function: str = ""
    setup: str = ""


def read_suite(raw: Any, function: str | None, setup: str, place: str, helpers: Sequence[str] = ()) -> Suite:
    """The tests in one cell of a row. Functions that assertions call and nothing defines are looked for in `helpers`, texts.

    Raises:
        DataError: they have none of the forms above, or assert on several functions and none is named.
    """

    def fault(problem: str, remedy: str) -> DataError:
        return DataError(f"{place}: {problem}; {remedy}")

    value = _unpacked(raw)
    if isinstance(value, Mapping) and "inputs" in value and "outputs" in value:
        function = value.get("fn_name") or function
        kind = value.get("testtype", "functional" if function else "stdin")
        value = [
            {"input": i, "output": o, "testtype": kind} for i, o in zip(value["inputs"], value["outputs"], strict=False)
        ]
    if isinstance(value, str) and value.strip():
        return _assertions([], f"{setup}\n{value}", function, place, helpers)
    if not isinstance(value, list) or not value:
        raise fault(f"no tests in {str(raw)[:60]!r}", "give input and output, calls, or assertions")
    if all(isinstance(v, str) for v in value):
        return _assertions(value, setup, function, place, helpers)
    if not all(isinstance(v, Mapping) and "input" in v and "output" in v for v in value):
        raise fault("a test without input or output", "give both in each, or assertions as text")
    calls = {v.get("testtype", "stdin") != "stdin" for v in value}
    if calls == {False}:
        return Suite("stdin", tuple((_text(v["input"]), _text(v["output"])) for v in value))
    if calls != {True} or not function:
        raise fault("calls of a function without its name, or mixed with others", "name its column in task.entry_point")
    try:
        return Suite("call", tuple((_arguments(v["input"]), _json(v["output"])) for v in value), function)
    except ValueError as error:
        raise fault(f"a call whose values are not JSON ({error})", "fix the test") from None


def imports_for(source: str) -> str:
    """Imports for the common names that a program uses and does not bind, as in LiveCodeBench's own harness."""
    try:
        missing = _unbound(ast.parse(source))
    except UNREADABLE:
        return ""
    return "\n".join(sorted(USUAL[name] for name in missing & set(USUAL)))


def _assertions(statements: list[str], setup: str, function: str | None, place: str, helpers: Sequence[str]) -> Suite:
    try:
        tree = ast.parse("\n".join([setup, *statements]))
        if not statements:
            # Code with assertions of its own: each is a test, and the rest is setup.
            if any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
                statements = ["check(candidate)"]
            else:
                tests = [node for node in tree.body if isinstance(node, ast.Assert)]
                statements = [ast.unparse(node) for node in tests]
                setup = ast.unparse(ast.Module([n for n in tree.body if n not in tests], []))
        for statement in statements:
            ast.parse(statement)
    except UNREADABLE as error:
        raise DataError(f"{place}: tests that are not Python ({error}); fix them") from None
    if not statements:
        raise DataError(f"{place}: code without an assertion or a function `check`; give tests")
    unbound = _unbound(tree) - {"candidate"}
    if not function:
        called = unbound - set(USUAL)
        if len(called) != 1:
            names = ", ".join(sorted(called)) or "no function"
            remedy = "name the one under test in the column of task.entry_point"
            raise DataError(f"{place}: the tests call {names}; {remedy}")
        function = called.pop()
    else:
        given = _definitions(helpers, unbound - {function})
        unbound |= _unbound(ast.parse(given))
        setup = f"{given}\n{setup}"
    needed = sorted(USUAL[name] for name in unbound & set(USUAL) - {function})
    return Suite("assert", tuple((s, None) for s in statements), function, "\n".join([*needed, setup]))


def _definitions(texts: Sequence[str], wanted: set[str]) -> str:
    """Statements that define the wanted names, from the first text that does, with all that they use in turn."""
    lines: list[str] = []
    for text in texts:
        if not wanted:
            break
        body = _parsed(text)
        known = {name: node for node in body for name in _defined(node)}
        todo, found = sorted(wanted & set(known)), set()
        wanted = wanted - set(known)
        while todo:
            node = known[todo.pop()]
            if node not in found:
                found.add(node)
                todo += sorted(_unbound(node) & set(known))
        lines += [ast.unparse(node) for node in body if node in found]
    return "\n".join(lines)


def _parsed(text: str) -> list[ast.stmt]:
    """The statements of a text that is Python, or whose last fenced block is."""
    for source in (text, in_fence(text) or ""):
        with contextlib.suppress(*UNREADABLE):
            return ast.parse(source).body
    return []


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement defines. A function that the prompt leaves to be written defines none."""
    match node:
        case ast.FunctionDef(name=name, body=body):
            blank = all(isinstance(n, ast.Pass | ast.Expr | ast.Raise) for n in body)
            return [] if blank else [name]
        case ast.ClassDef(name=name):
            return [name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name.partition(".")[0] for alias in names]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def _unbound(tree: ast.AST) -> set[str]:
    """Names that are used and bound nowhere, without regard to scopes."""
    used, bound = set(), set(dir(builtins))
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name):
                bound.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.arg(arg=name):
                bound.add(name)
            case ast.alias(name=name, asname=other):
                bound.add(other or name.partition(".")[0])
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
    return used - bound


def _unpacked(raw: Any) -> Any:
    """JSON text as its value; LiveCodeBench's base64 of zlib of a pickled JSON text as that text's value."""
    if not isinstance(raw, str):
        return raw
    if raw.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(raw)
        except ValueError:
            return raw
    try:
        packed = base64.b64decode(raw.strip(), validate=True)
        unzip = zlib.decompressobj()
        data = unzip.decompress(packed, MOST_UNPACKED)
        texts = [arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str)]
        return json.loads(texts[0]) if len(texts) == 1 else raw
    except (binascii.Error, zlib.error, ValueError, UnicodeDecodeError):
        return raw


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(value: Any) -> list[Any]:
    return [json.loads(line) for line in value.split("\n") if line.strip()] if isinstance(value, str) else list(value)


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


MODULES = (
    "bisect collections copy datetime decimal fractions functools heapq itertools json math operator random re statistics "
    "string sys time typing"
)
MEMBERS = {
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generator Iterable Iterator List Mapping NamedTuple Optional "
    "Sequence Set Tuple TypeVar Union",
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "itertools": "accumulate chain combinations combinations_with_replacement count cycle groupby islice pairwise "
    "permutations product repeat starmap takewhile zip_longest",
    "math": "ceil comb cos factorial floor gcd inf isqrt lcm log log10 log2 perm pi prod sin sqrt tan",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits",
    "operator": "add itemgetter mul xor",
    "copy": "deepcopy",
    "random": "randint",
    "datetime": "timedelta",
}
USUAL = {module: f"import {module}" for module in MODULES.split()} | {
    name: f"from {module} import {name}" for module, names in MEMBERS.items() for name in names.split()
}
