"""`vpd-mlx report RUN`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


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
    from vpd_mlx.run.folder import load_run

    page = run_page(load_run(run), rollouts)
    typer.echo(f"written: {save(run / 'report.html' if out is None else out, page)}")
