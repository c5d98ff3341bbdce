"""`vpd-mlx plan`: a run's memory before it starts, and on request its time and memory as measured."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vpd_mlx.commands.options import SetOption, overridden
from vpd_mlx.common.text import duration, size
from vpd_mlx.recipe import load_recipe, resolve_recipe_path

__all__ = ["plan"]


def plan(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name or a .yaml file.")] = "quickstart",
    sets: SetOption = None,
    probe_time: Annotated[bool, typer.Option("--time", help="Also load the model and measure two steps.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict peak memory per phase from the model's config.json alone; with --time, measure duration and memory of two steps.

    `model` may be a folder, a config.json or a hub id, of which only this file is fetched. The figures are for prompts and
    completions as long as the recipe allows. Exit code 2 if the run cannot fit.
    """
    from vpd_mlx.run.plan import check_fits, memory_limit
    from vpd_mlx.run.plan import plan as make

    cfg = load_recipe(resolve_recipe_path(recipe), overridden(sets))
    planned, limit = make(cfg), memory_limit(cfg)
    out = {
        "weights_bytes": planned.weights,
        "adapter_bytes": planned.adapter,
        "peak_bytes": planned.phases,
        "limit_bytes": limit,
        "blocks": planned.blocks,
        "rows": planned.rows,
        "tokens": {key: getattr(planned, key) for key in ("prompt", "teacher_prompt", "completion")},
    }
    if probe_time:
        from vpd_mlx.run.step import Trainer

        trainer = Trainer.build(cfg)
        rows = [trainer.step(n)[0] for n in (1, 2)]
        seconds, measured = rows[-1]["seconds"]["total"], int(rows[-1]["peak_memory_mb"] * 2**20)
        out |= {"seconds_per_step": seconds, "seconds": seconds * cfg.steps, "measured_bytes": measured}
    if as_json:
        typer.echo(json.dumps(out, indent=2))
    else:
        typer.echo(
            f"{planned.rows} sequences a step, prompts to {planned.prompt} tokens (teacher's to {planned.teacher_prompt}), "
            f"completions to {planned.completion}"
        )
        typer.echo(f"weights    {size(planned.weights)}   adapter  {size(planned.adapter)}")
        for phase, peak in planned.phases.items():
            typer.echo(f"{phase:10} {size(peak)} at most")
        typer.echo(f"limit      {size(limit)}")
        if probe_time:
            time = duration(float(seconds) * cfg.steps)
            typer.echo(
                f"time       {time} for {cfg.steps} steps, without evaluations; {size(measured)} measured in the second"
            )
    check_fits(cfg, planned, limit)
