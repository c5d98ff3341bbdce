"""`vpd-mlx data check`: look at a recipe's rows before training on them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vpd_mlx.commands.options import SetOption
from vpd_mlx.common.settings import parse_set
from vpd_mlx.common.text import one_line
from vpd_mlx.errors import DataError
from vpd_mlx.recipe import load_recipe, resolve_recipe_path

__all__ = ["data"]

data = typer.Typer(help="Look at a recipe's data before training on it.", no_args_is_help=True)


@data.command("check")
def check(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name or a .yaml file.")], sets: SetOption = None
) -> None:
    """Read every row, run every reference through the verifier, and count: lengths against the limits, duplicates, leaks.

    Lists every row whose reference does not score 1, and warns of what would waste a run: answers longer than the limit, unknown
    tokens, a verifier that takes nonsense, lopsided classes. Loads the tokenizer, not the model. Exit code 2 with the place and
    the remedy when a row is unusable.
    """
    import numpy as np

    from vpd_mlx.engine.models import load_tokenizer
    from vpd_mlx.run.collect import check_prompt_lengths
    from vpd_mlx.run.rows import lengths_of, seconds_a_verdict, warnings_of
    from vpd_mlx.run.setup import build_prompter
    from vpd_mlx.tasks import build_task, faulty_rows

    cfg = load_recipe(resolve_recipe_path(recipe), parse_set(sets or []))
    task = build_task(cfg)  # refuses broken rows and prompts on both sides of the split
    rows = (*task.train, *task.held_out)
    faults = 0
    for fault in faulty_rows(task, rows):
        typer.echo(one_line(fault))  # at once: grading all of them may take long
        faults += 1
    if faults:
        raise DataError(f"{recipe}: {faults} of {len(rows)} rows fail, as listed; fix the rows or the verifier")
    seconds = seconds_a_verdict(task, rows)
    found = lengths_of(build_prompter(cfg, load_tokenizer(cfg.model, cfg.model_revision)), task, rows)
    lengths, answers = found.prompts, [n for n in found.references if n is not None]
    prompts = [json.dumps([m["content"] for m in p.messages]) for p in rows]
    typer.echo(f"rows: {len(task.train)} to train on, {len(task.held_out)} held out, none on both sides")
    typer.echo(f"reference answers: {len(answers)} of {len(rows)} rows have one, each scores 1")
    solutions = sum(bool(p.reference) for p in rows)
    typer.echo(f"reference solutions, for the feedback source `reference`: {solutions} of {len(rows)} rows have one")
    _quantiles("prompt tokens", lengths, cfg.rollout.max_prompt_tokens)
    if answers:
        _quantiles("reference tokens", np.array(answers), cfg.rollout.max_completion_tokens)
    typer.echo(f"duplicates: {len(prompts) - len(set(prompts))} rows repeat another row's prompt")
    first: dict[str, Any] = {}
    for prompt, p in zip(prompts, rows, strict=True):
        other = first.setdefault(prompt, p)
        if other.answer != p.answer:
            raise DataError(
                f"row {p.id}: answer {p.answer!r}, and row {other.id} has the same prompt with {other.answer!r}; fix one of them"
            )
    typer.echo(f"verifier: {1000 * seconds:.1f} ms for an answer")
    check_prompt_lengths(rows, lengths, cfg.rollout.max_prompt_tokens)
    for warning in warnings_of(cfg, task, rows, found, seconds):
        typer.echo(f"warning: {one_line(warning)}")


def _quantiles(name: str, values: Any, limit: int) -> None:
    import numpy as np

    low, half, high, most = (int(np.quantile(values, q)) for q in (0.05, 0.5, 0.95, 1.0))
    typer.echo(f"{name}: 5 % {low}, median {half}, 95 % {high}, longest {most}; limit {limit}")
