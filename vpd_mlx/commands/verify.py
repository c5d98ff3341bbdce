"""`vpd-mlx verify`: grade one completion, and see the feedback on it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vpd_mlx.commands.options import SetOption
from vpd_mlx.common.settings import parse_set
from vpd_mlx.common.text import json_text
from vpd_mlx.errors import DataError, wrong_option
from vpd_mlx.feedback import SOURCES, build_sources, choose_contexts
from vpd_mlx.recipe import Recipe, load_recipe, resolve_recipe_path
from vpd_mlx.tasks import build_task, examine, expected
from vpd_mlx.types import Group, Problem, Rollout

__all__ = ["verify"]


def verify(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A built-in recipe's name or a .yaml file.")],
    problem: Annotated[str | None, typer.Option(help="Id of a problem.", show_default="the first one")] = None,
    completion: Annotated[
        str | None,
        typer.Option(help="File with the completion, - for standard input.", show_default="the reference answer"),
    ] = None,
    text: Annotated[str | None, typer.Option(help="The completion itself, in place of a file.")] = None,
    sets: SetOption = None,
) -> None:
    """Grade one completion; print the verdict and the feedback on it as JSON. Exit code 1 when the verifier itself fails.

    Feedback sources that need more than the completion, such as the model or a server, are named and left out.
    """
    if text is not None and completion is not None:
        raise wrong_option("--text", "is given beside --completion", "give one of the two")
    cfg = load_recipe(resolve_recipe_path(recipe), parse_set(sets or []))
    with contextlib.redirect_stdout(sys.stderr):  # the output of the user's own verifier is not part of the JSON
        task = build_task(cfg)
        problems = {p.id: p for p in (*task.train, *task.held_out)}
        chosen = task.train[0] if problem is None else problems.get(problem)
        if chosen is None:
            some = ", ".join(list(problems)[:3])
            raise DataError(f"--problem: there is no problem {problem!r}; the first ones are {some}")
        if completion is not None:
            text = _read(completion)
        elif text is None and (text := task.reference_completion(chosen)) is None:
            raise DataError(f"row {chosen.id}: has no reference answer to grade; give --text or --completion FILE")
        held = chosen in task.held_out
        verdict = examine(task, chosen, text) if held else task.verify(chosen, text)
    rollout = Rollout((), (), text, "stop").graded(verdict, cfg.rollout.success_threshold)
    out: dict[str, Any] = {
        "problem": chosen.id,
        "split": "held-out" if held else "train",
        "completion": text,
        "expected": expected(task, chosen),
        "score": None if verdict.error else verdict.score,
        "success": rollout.success,
        "text": verdict.text,
        "error": verdict.error,
        **_feedback(cfg, chosen, rollout, set(problems)),
    }
    typer.echo(json_text(out))
    if verdict.error:
        raise typer.Exit(1)


def _read(completion: str) -> str:
    try:
        if completion == "-":
            return sys.stdin.read()
        return Path(completion).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"--completion: {completion} cannot be read ({why}); give a UTF-8 text file") from None


def _feedback(cfg: Recipe, problem: Problem, rollout: Rollout, problems: set[str]) -> dict[str, Any]:
    """The context of this completion alone, the sources that failed on it, and those that were left out."""
    left_out = {name: f"needs {needs}" for name in cfg.feedback.sources if (needs := SOURCES[name].needs)}
    if rollout.verdict is None or rollout.verdict.error:
        return {"context": None, "failed": {}, "left_out": left_out}
    sources = build_sources(cfg.feedback, problems=problems)
    try:
        ((choice,),) = choose_contexts(sources, [Group(problem, (), (rollout,))], cfg.feedback)
    finally:
        sources.close()
    context = None if choice.kind is None else {"kind": choice.kind, "text": choice.text}
    return {"context": context, "failed": dict(choice.errors), "left_out": left_out}
