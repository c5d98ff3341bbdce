"""`vpd-mlx report RUN`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, of a run that ended or still goes on.")],
    out: Annotated[Path | None, typer.Option(help="The page's file.", show_default="RUN/report.html")] = None,
    rollouts: Annotated[int, typer.Option(min=0, help="Rollouts in the page at most, spread over the run.")] = 400,
) -> None:
    """Write a run as one HTML page that opens from disk: result, curves, warnings, recipe, and its rollouts to read."""
    # Late: matplotlib takes a second to load.
    from vpd_mlx.report.page import run_page, save
    from vpd_mlx.run.folder import load_run

    found = load_run(run)
    target = out if out is not None else run / "report.html"
    save(target, run_page(found, rollouts))
    typer.echo(f"written: {target} ({target.stat().st_size / 1000:,.0f} kB)")
