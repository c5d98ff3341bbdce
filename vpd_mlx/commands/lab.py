"""`vpd-mlx lab`: a grid of methods and seeds, as tables with intervals and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["lab"]


def lab(
    grid: Annotated[Path, typer.Argument(help="A grid's .yaml file, e.g. recipes/lab/grids/teacher.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the grid's runs.", show_default="lab-runs/<name>")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")] = 2,
) -> None:
    """Run a grid {setting x method x seed}, each method at its best rate from the same sweep, widened until the best is inside.

    You can interrupt it at any time: give the command again, and finished runs are kept and interrupted ones go on from their
    checkpoint. Writes results.md, rates.json and curves.png into the grid's folder.
    """
    from vpd_mlx.common.files import file_errors, write_atomic
    from vpd_mlx.tools.findings import curves, sweep_table, table
    from vpd_mlx.tools.lab import best_rates, check_recipe, load_grid, on_edge, results, run_grid

    spec = load_grid(grid)
    recipe = (grid.parent / spec.recipe).resolve()
    check_recipe(spec, recipe)
    folder = out if out is not None else Path("lab-runs") / spec.name
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    run_grid(spec, recipe, folder, jobs=jobs, say=typer.echo)
    found = results(spec, folder)
    text = table(spec, found, best_rates(spec, folder), on_edge(spec, folder))
    if spec.tuned:
        text += f"\n### The sweep\n\n{sweep_table(spec, folder)}"
    write_atomic(folder / "results.md", text)
    curves(spec, found, folder / "curves.png")
    typer.echo(text)
    typer.echo(f"written: {folder / 'results.md'}, {folder / 'curves.png'}")
