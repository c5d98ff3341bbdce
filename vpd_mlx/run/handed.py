"""What a Python program hands over, as a recipe and the objects that stand in none: functions, problems.

The recipe gets the functions' names, the fingerprint of the verifier, and the file that the run folder will hold the problems in.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpd_mlx.common.functions import PREFIX, Handed, arity_fault, fingerprint, function_name
from vpd_mlx.errors import ConfigError, Fault
from vpd_mlx.recipe import Recipe, check_recipe, load_recipe, merged
from vpd_mlx.run.log import RECIPE_FILE
from vpd_mlx.run.resume import check_resume
from vpd_mlx.types import Problem

__all__ = ["Feedback", "Problems", "combine", "fault", "resumed"]

Problems = Sequence[Problem | Mapping[str, Any]]
Feedback = Sequence[str | Callable[..., str | None]] | Mapping[str, Any]
ROWS, HELD_OUT = "problems.jsonl", "held_out.jsonl"
ARGUMENTS = ("problems", "held_out", "verify", "feedback", "algorithm", "steps", "out", "resume", "overwrite", "quiet")


def fault(where: str, place: str, problem: str, remedy: str) -> ConfigError:
    """The error of one wrong argument."""
    return ConfigError([Fault(place, problem, remedy)], where)


def combine(
    where: str,
    raw: dict[str, Any],
    folder: Path,
    problems: Problems | None,
    held_out: Problems | None,
    verify: Callable[..., Any] | None,
    feedback: Feedback | None,
    algorithm: str | Callable[..., Any] | None,
) -> tuple[Recipe, Handed]:
    """The recipe that all arguments make together, and the objects that it names."""
    faults = [_unknown(key, raw.pop(key)) for key in [k for k in raw if k not in Recipe.model_fields]]
    raw = merged(raw, {} if feedback is None else {"feedback": _named(feedback)})
    sources = {n: f for n, f in _functions(feedback) if callable(f)}
    faults += [f for n, s in sources.items() if (f := arity_fault("feedback", s, ("problem", "rollout")))]
    learn = algorithm if callable(algorithm) else None
    if learn is not None:
        raw["algorithm"] = PREFIX + function_name(learn)
        faults += [f for f in [arity_fault("algorithm", learn, ("policy", "groups", "step"))] if f]
    elif algorithm is not None:
        raw["algorithm"] = algorithm
    files, more = _task(raw, folder.resolve(), problems, held_out, verify)
    faults += more
    if problems is not None and "prompts" not in raw.get("rollout", {}):
        default = Recipe.model_fields["rollout"].default.prompts
        raw = merged(raw, {"rollout": {"prompts": max(1, min(default, len(problems)))}})
    recipe = check_recipe(raw, where, Path(), faults)
    return recipe, Handed(verify, sources, learn, files)


def _unknown(key: str, value: Any) -> Fault:
    close = difflib.get_close_matches(key, [*ARGUMENTS, *Recipe.model_fields], n=1)
    remedy = f"did you mean {close[0]!r}?" if close else "keywords are arguments and the keys of docs/recipe.md"
    return Fault(key, f"unknown keyword (value {value!r})", remedy)


def _functions(feedback: Feedback | None) -> Iterator[tuple[Any, Any]]:
    """(name, source) of each source in order: a name stands for itself."""
    sources = feedback.get("sources") if isinstance(feedback, Mapping) else feedback
    for source in sources if isinstance(sources, list | tuple) else ():
        yield (PREFIX + function_name(source) if callable(source) else source), source


def _named(feedback: Feedback) -> dict[str, Any]:
    """The section `feedback` with a name for each function."""
    section = dict(feedback) if isinstance(feedback, Mapping) else {"sources": feedback}
    if isinstance(section.get("sources"), list | tuple):
        section["sources"] = [name for name, _ in _functions(feedback)]
    return section


def _task(
    raw: dict[str, Any],
    folder: Path,
    problems: Problems | None,
    held_out: Problems | None,
    verify: Callable[..., Any] | None,
) -> tuple[dict[str, str], list[Fault]]:
    """Put the section `task` of a verifier of Python into `raw`; returns the rows to be written, and the faults."""
    task = raw.get("task") or {}
    if verify is None and problems is None and task:
        return {}, []
    if verify is None and problems is None:
        fault: Fault | None = Fault(
            "problems", "missing", "give problems=[{'prompt': …}] and verify=, or task={'kind': …}"
        )
    elif verify is None:
        fault = Fault("verify", "missing", "give a function of (problem, completion) that returns a score in 0..1")
    else:
        fault = arity_fault("verify", verify, ("problem", "completion"))
    if verify is None or fault is not None:
        raw["task"] = {"kind": "addition"}  # a valid one, so that nothing else is reported about it
        return {}, [fault] if fault is not None else []
    files, faults = {}, []
    if task.get("kind", "function") != "function":
        task = {}
    for name, rows, place in ((ROWS, problems, "problems"), (HELD_OUT, held_out, "held_out")):
        if rows is not None:
            files[name], more = _lines(place, rows, str(task.get("prompt", "prompt")))
            faults += more
    own = {"data": str(folder / ROWS)} if ROWS in files or (folder / ROWS).is_file() else {}
    if HELD_OUT in files or (problems is None and (folder / HELD_OUT).is_file()):
        own["eval_data"] = str(folder / HELD_OUT)
    raw["task"] = {**task, "kind": "function", "function": function_name(verify), "fingerprint": fingerprint(verify)}
    raw["task"] |= own
    return files, faults


def _lines(place: str, problems: Any, column: str) -> tuple[str, list[Fault]]:
    """Problems as lines of JSON, up to the first one that is wrong."""
    remedy = "give a list of dicts with 'prompt', or of vpd.Problem objects"
    if not isinstance(problems, list | tuple):
        return "", [Fault(place, f"got {problems!r}, a {type(problems).__name__}", remedy)]
    if not problems:
        return "", [Fault(place, "is empty", "give at least one dict with 'prompt'")]
    lines = []
    for n, problem in enumerate(problems):
        row = _row(problem) if isinstance(problem, Problem) else problem
        if not isinstance(row, Mapping):
            return "", [Fault(f"{place}[{n}]", f"got {row!r}, a {type(row).__name__}", remedy)]
        if column not in row:
            keys = ", ".join(map(str, row)) or "none"
            add = "add it, or name the key that holds it: task={'prompt': …}"
            return "", [Fault(f"{place}[{n}]", f"has no {column!r} (keys: {keys})", add)]
        try:
            lines.append(json.dumps(dict(row)) + "\n")
        except (TypeError, ValueError) as error:
            return "", [Fault(f"{place}[{n}]", f"cannot be written as JSON ({error})", "use text, numbers and lists")]
    return "".join(lines), []


def _row(problem: Problem) -> dict[str, Any]:
    texts = {"answer": problem.answer, "reference": problem.reference}
    own = {"id": problem.id, "prompt": list(problem.messages), **{k: v for k, v in texts.items() if v is not None}}
    return {**problem.data, **own}


def resumed(where: str, folder: Path, recipe: Recipe, handed: Handed) -> Handed:
    """What a run is resumed with, once it is seen to be the run's own: its rows lie in its folder."""
    before = load_recipe(folder / RECIPE_FILE)
    old, new = (getattr(r.task, "fingerprint", None) for r in (before, recipe))
    if old != new:
        remedy = "resume with the run's own verifier, or start a new run"
        raise fault(where, "verify", f"another function than the run's (fingerprint {new}, not {old})", remedy)
    for name, text in handed.files.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            argument = "held_out" if name == HELD_OUT else "problems"
            raise fault(where, argument, f"others than those in {path}", "leave them out, or start a new run")
    check_resume(folder, before, recipe, where)
    return Handed(handed.verify, handed.sources, handed.algorithm)
