"""`vpd-mlx verify`, `data` and `new`: bring a task of one's own, and see that it is sound before training on it."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vpd_mlx.common.settings import parse_set
from vpd_mlx.errors import DataError
from vpd_mlx.recipe import load_recipe, resolve_recipe_path

__all__ = ["data", "verify"]

RecipeArgument = Annotated[str, typer.Argument(help="A built-in recipe's name or a .yaml file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the recipe.")
]


def verify(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A built-in recipe's name or a .yaml file.")],
    problem: Annotated[str | None, typer.Option(help="Id of a problem.", show_default="the first one")] = None,
    completion: Annotated[
        str | None,
        typer.Option(help="File with the completion, - for standard input.", show_default="the reference answer"),
    ] = None,
    sets: SetOption = None,
) -> None:
    """Grade one completion and print verdict and context as JSON. Exit code 1 when the verifier itself fails."""
    from vpd_mlx.tasks import build_task, examine

    cfg = load_recipe(resolve_recipe_path(recipe), parse_set(sets or []))
    with contextlib.redirect_stdout(sys.stderr):  # what the user's own verifier prints is no part of the JSON
        task = build_task(cfg)
    everyone = {p.id: p for p in (*task.train, *task.held_out)}
    chosen = task.train[0] if problem is None else everyone.get(problem)
    if chosen is None:
        some = ", ".join(list(everyone)[:3])
        raise DataError(f"--problem: there is no problem {problem!r}; the first ones are {some}")
    if completion is None:
        text = task.reference_completion(chosen)
        if text is None:
            raise DataError(f"row {chosen.id}: has no reference answer to grade; give --completion FILE")
    elif completion == "-":
        text = sys.stdin.read()
    else:
        try:
            text = Path(completion).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--completion: {completion} cannot be read ({error}); give a UTF-8 text file") from None
    held = chosen in task.held_out
    with contextlib.redirect_stdout(sys.stderr):
        verdict = examine(task, chosen, text) if held else task.verify(chosen, text)
    success = verdict.error is None and verdict.score >= cfg.rollout.success_threshold
    out: dict[str, Any] = {
        "problem": chosen.id,
        "split": "held-out" if held else "train",
        "completion": text,
        "score": None if verdict.error else verdict.score,
        "success": success,
        "text": verdict.text,
        "error": verdict.error,
        # what the teacher would be shown of this completion alone: siblings and critiques need a group and a model
        "context": _context(cfg.feedback.sources, chosen.reference, verdict.text, success),
    }
    typer.echo(json.dumps(out, indent=2, ensure_ascii=False))
    if verdict.error:
        raise typer.Exit(1)


def _context(sources: list[Any], reference: str | None, text: str, success: bool) -> dict[str, str] | None:
    for name in sources:
        if name == "verifier" and not success and text.strip():
            return {"kind": "verifier", "text": text}
        if name == "reference" and reference:
            return {"kind": "reference", "text": reference}
    return None


data = typer.Typer(help="Look at a recipe's data before training on it.", no_args_is_help=True)


@data.command("check")
def check(recipe: RecipeArgument, sets: SetOption = None) -> None:
    """Read every row, run every reference through the verifier, and count: lengths against the limits, duplicates, leaks.

    Exit code 2 with the place and the remedy when a row is unusable.
    """
    import numpy as np

    from vpd_mlx.run.setup import build_prompter, load_policy
    from vpd_mlx.tasks import build_task, prove

    cfg = load_recipe(resolve_recipe_path(recipe), parse_set(sets or []))
    task = build_task(cfg)  # refuses broken rows and prompts that stand on both sides of the split
    rows = (*task.train, *task.held_out)
    prove(task, rows=len(rows))
    prompter = build_prompter(cfg, load_policy(cfg))
    lengths = np.array([len(prompter.student(p)) for p in rows])
    answers = [len(prompter.tokenizer.encode(a)) for p in rows if (a := task.reference_completion(p)) is not None]
    prompts = [json.dumps([m["content"] for m in p.messages]) for p in rows]
    typer.echo(f"rows: {len(task.train)} to train on, {len(task.held_out)} held out, none on both sides")
    typer.echo(f"reference answers: {len(answers)} of {len(rows)} rows have one, each scores 1")
    solutions = sum(bool(p.reference) for p in rows)
    typer.echo(f"reference solutions, for the feedback source of that name: {solutions} of {len(rows)} rows have one")
    _quantiles("prompt tokens", lengths, cfg.rollout.max_prompt_tokens)
    if answers:
        _quantiles("reference tokens", np.array(answers), cfg.rollout.max_completion_tokens)
    typer.echo(f"duplicates: {len(prompts) - len(set(prompts))} rows repeat another row's prompt")
    first: dict[str, Any] = {}
    for prompt, p in zip(prompts, rows, strict=True):
        other = first.setdefault(prompt, p)
        if other.answer != p.answer:
            raise DataError(
                f"row {p.id}: answer {p.answer!r}, and row {other.id} has the same prompt with {other.answer!r}; mend one of them"
            )
    over = [p.id for p, n in zip(rows, lengths, strict=True) if n > cfg.rollout.max_prompt_tokens]
    if over:
        raise DataError(
            f"row {over[0]}: its prompt is longer than rollout.max_prompt_tokens {cfg.rollout.max_prompt_tokens}, as are "
            f"{len(over) - 1} more; raise the limit or take them out"
        )


def _quantiles(name: str, values: Any, limit: int) -> None:
    import numpy as np

    low, half, high, most = (int(np.quantile(values, q)) for q in (0.05, 0.5, 0.95, 1.0))
    typer.echo(f"{name}: 5 % {low}, median {half}, 95 % {high}, longest {most}; limit {limit}")
