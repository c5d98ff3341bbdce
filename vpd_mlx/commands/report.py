"""`vpd-mlx report RUN`, a run as one HTML page, and `vpd-mlx compare RUN...`, several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vpd_mlx.common.text import figures, points, points_range, steps
from vpd_mlx.errors import wrong_option
from vpd_mlx.run.folder import Run, load_run, short_names
from vpd_mlx.run.pairing import pair_up, refuse_strangers

__all__ = ["compare", "report"]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; the run may still be going on.")],
    out: Annotated[Path | None, typer.Option(help="File of the page.", show_default="RUN/report.html")] = None,
    rollouts: Annotated[
        int, typer.Option(min=0, help="Maximum number of rollouts on the page, spread over the run.")
    ] = 400,
) -> None:
    """Write a run as one HTML page that opens from disk: result, curves, warnings, recipe and readable rollouts."""
    # Late: matplotlib takes a second to load.
    from vpd_mlx.report.page import run_page, save

    file = run / "report.html" if out is None else out
    typer.echo(f"written: {save(file, run_page(load_run(run), rollouts, file.parent))}")


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; the others are compared with the first.")
    ],
    out: Annotated[Path | None, typer.Option(help="Also write a page with curves to this file.")] = None,
) -> None:
    """Compare runs: held-out accuracy with 95 % intervals, and differences paired problem by problem."""
    if len(runs) < 2:
        remedy = "name two or more; for a single run use `vpd-mlx report`"
        raise wrong_option("RUN...", f"got {len(runs)} run, {runs[0]}", remedy)
    if len({r.resolve() for r in runs}) < len(runs):
        raise wrong_option("RUN...", "names a run twice", "name each once")
    found = dict(zip(short_names(runs), map(load_run, runs), strict=True))
    refuse_strangers(found)
    console = Console(highlight=False)
    console.print(_table(found))
    console.print(
        "Each run is judged by the evaluation of its final adapter, or by the newest one if it is unfinished. Difference: "
        "greedy, on the problems that both runs were evaluated on, known by their content. Second lines are 95 % intervals "
        "over problems; another seed of a recipe may differ by more."
    )
    if out is not None:
        from vpd_mlx.report.page import comparison_page, save

        typer.echo(f"written: {save(out, comparison_page(found, out.parent))}")


def _table(runs: dict[str, Run]) -> Table:
    base = next(iter(runs.values()))
    table = Table(pad_edge=False, show_lines=True)
    table.add_column("run", overflow="fold")
    for head in ("student", "greedy", "teacher", "difference"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, run in runs.items():
        cells = [Text("\n".join(figures(run.evaluation, key))) for key in ("student", "student_greedy", "teacher")]
        pairing = pair_up(base, run)
        p = None if run is base else pairing.difference
        difference = "-"
        if p is not None:
            paired_by = f"{p.problems} rows of a name" if pairing.by_name else f"{p.problems} shared problems"
            difference = f"{points(p.difference)} {p.verdict}\n{points_range(p.low, p.high)}\n{paired_by}"
        done = steps(run.done) if run.planned in (None, run.done) else f"{run.done} of {run.planned} steps"
        at = "" if not run.evals or run.evaluated == run.done else f"\nevaluated after {steps(run.evaluated)}"
        table.add_row(Text(f"{name}\n{run.algorithm}, {done}{at}"), *cells, Text(difference))
    return table
