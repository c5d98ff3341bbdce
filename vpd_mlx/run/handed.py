"""What a Python program hands over, as a recipe and the objects that stand in none: functions, problems.

The recipe gets the functions' names, the fingerprint of the verifier, and the file that the run folder will hold the problems in.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpd_mlx.common.functions import PREFIX, Handed, arity_faults, fingerprint, function_name
from vpd_mlx.common.settings import merged
from vpd_mlx.errors import Fault, config_error
from vpd_mlx.recipe import Recipe, check_recipe, load_recipe, preset_faults
from vpd_mlx.run.log import RECIPE_FILE
from vpd_mlx.run.resume import check_resume
from vpd_mlx.types import Problem

__all__ = ["Feedback", "Problems", "combine", "resumed"]

Problems = Sequence[Problem | Mapping[str, Any]]
Feedback = Sequence[str | Callable[..., str | None]] | Mapping[str, Any]
ROWS, HELD_OUT = "problems.jsonl", "held_out.jsonl"
ARGUMENTS = ("problems", "held_out", "verify", "feedback", "algorithm", "steps", "out", "resume", "overwrite", "quiet")


def combine(
    where: str,
    raw: Mapping[str, Any],
    folder: Path,
    /,
    *,
    problems: Problems | None = None,
    held_out: Problems | None = None,
    verify: Callable[..., Any] | None = None,
    feedback: Feedback | None = None,
    algorithm: str | Callable[..., Any] | None = None,
    **keys: Any,
) -> tuple[Recipe, Handed]:
    """The recipe that all arguments make together, and the objects that it names."""
    faults = [_unknown(key, keys.pop(key)) for key in list(keys) if key not in Recipe.model_fields]
    section, sources = _feedback(feedback)
    raw = merged(raw, {**keys, "feedback": section})
    if "preset" in keys:
        faults += preset_faults(raw)
    for source in sources.values():
        faults += arity_faults("feedback", source, "problem", "rollout")
    learn = algorithm if callable(algorithm) else None
    if learn is not None:
        raw["algorithm"] = PREFIX + function_name(learn)
        faults += arity_faults("algorithm", learn, "policy", "groups", "step")
    elif algorithm is not None:
        raw["algorithm"] = algorithm
    files, more = _task(raw, folder.resolve(), problems, held_out, verify)
    if problems is not None and "prompts" not in raw.get("rollout", {}):
        default = Recipe.model_fields["rollout"].default.prompts
        raw = merged(raw, {"rollout": {"prompts": max(1, min(default, len(problems)))}})
    return check_recipe(raw, where, Path(), faults + more), Handed(verify, sources, learn, files)


def _unknown(key: str, value: Any) -> Fault:
    close = difflib.get_close_matches(key, [*ARGUMENTS, *Recipe.model_fields], n=1)
    remedy = f"did you mean {close[0]!r}?" if close else "keywords are arguments and the keys of docs/recipe.md"
    return Fault(key, f"unknown keyword (value {value!r})", remedy)


def _feedback(given: Feedback | None) -> tuple[dict[str, Any], dict[str, Callable[..., Any]]]:
    """The section `feedback` with a name in place of each function, and the functions by name."""
    section = dict(given) if isinstance(given, Mapping) else {} if given is None else {"sources": given}
    functions = {}
    if isinstance(sources := section.get("sources"), list | tuple):
        functions = {PREFIX + function_name(s): s for s in sources if callable(s)}
        section["sources"] = [PREFIX + function_name(s) if callable(s) else s for s in sources]
    return section, functions


def _task(
    raw: dict[str, Any],
    folder: Path,
    problems: Problems | None,
    held_out: Problems | None,
    verify: Callable[..., Any] | None,
) -> tuple[dict[str, str], list[Fault]]:
    """Put the section `task` of a verifier of Python into `raw`; returns the rows to be written, and the faults."""
    task, files, faults = raw.get("task") or {}, dict[str, str](), list[Fault]()
    if verify is not None:
        faults = arity_faults("verify", verify, "problem", "completion")
    elif problems is not None:
        faults = [Fault("verify", "missing", "give a function of (problem, completion) that returns a score in 0..1")]
    elif not task:
        faults = [Fault("problems", "missing", "give problems=[{'prompt': …}] and verify=, or task={'kind': …}")]
    if faults:
        raw["task"] = {"kind": "addition"}  # a valid one, so that nothing else is reported about it
    if faults or verify is None:
        return {}, faults
    if task.get("kind", "function") != "function":
        task = {}
    for name, rows, place in ((ROWS, problems, "problems"), (HELD_OUT, held_out, "held_out")):
        if rows is not None:
            files[name], more = _lines(place, rows, str(task.get("prompt", "prompt")))
            faults += more
    own = {"kind": "function", "function": function_name(verify), "fingerprint": fingerprint(verify)}
    if ROWS in files or (folder / ROWS).is_file():
        own["data"] = str(folder / ROWS)
    if HELD_OUT in files or (problems is None and (folder / HELD_OUT).is_file()):
        own["eval_data"] = str(folder / HELD_OUT)
    raw["task"] = {**task, **own}
    return files, faults


def _lines(place: str, problems: Any, column: str) -> tuple[str, list[Fault]]:
    """Problems as lines of JSON, up to the first one that is wrong."""
    remedy = "give a list of dicts with 'prompt', or of vpd.Problem objects"
    if not isinstance(problems, list | tuple):
        return "", [Fault(place, f"got {problems!r}, a {type(problems).__name__}", remedy)]
    if not problems:
        return "", [Fault(place, "is empty", "give at least one dict with 'prompt'")]
    lines = ""
    for n, problem in enumerate(problems):
        at, row = f"{place}[{n}]", _row(problem) if isinstance(problem, Problem) else problem
        if not isinstance(row, Mapping):
            return "", [Fault(at, f"got {row!r}, a {type(row).__name__}", remedy)]
        if column not in row:
            keys = ", ".join(map(str, row)) or "none"
            add = "add it, or name the key that holds it: task={'prompt': …}"
            return "", [Fault(at, f"has no {column!r} (keys: {keys})", add)]
        try:
            lines += json.dumps(dict(row)) + "\n"
        except (TypeError, ValueError) as error:
            return "", [Fault(at, f"cannot be written as JSON ({error})", "use text, numbers and lists")]
    return lines, []


def _row(problem: Problem) -> dict[str, Any]:
    texts = {"answer": problem.answer, "reference": problem.reference}
    given = {key: text for key, text in texts.items() if text is not None}
    return {**problem.data, "id": problem.id, "prompt": list(problem.messages), **given}


def resumed(where: str, folder: Path, recipe: Recipe, handed: Handed) -> Handed:
    """What a run is resumed with, once it is seen to be the run's own: its rows lie in its folder."""
    before = load_recipe(folder / RECIPE_FILE)
    old, new = (getattr(r.task, "fingerprint", None) for r in (before, recipe))
    if old != new:
        remedy = "resume with the run's own verifier, or start a new run"
        problem = f"another function than the run's (fingerprint {new}, not {old})"
        raise config_error("verify", problem, remedy, where)
    for name, text in handed.files.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            argument = "held_out" if name == HELD_OUT else "problems"
            raise config_error(argument, f"others than those in {path}", "leave them out, or start a new run", where)
    check_resume(folder, recipe, where)
    return Handed(handed.verify, handed.sources, handed.algorithm)
