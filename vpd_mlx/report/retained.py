"""What training cost, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from vpd_mlx.run.forgetting import Retained, cost

__all__ = ["print_retained"]


def print_retained(console: Console, found: Sequence[Retained]) -> None:
    """The general checks before and after, and the sentence that they come to; nothing without `retain`."""
    if not found:
        return
    heads = (Column(name, justify="right") for name in ("before", "after", "change", ""))
    table = Table("", *heads, title="general checks (retain)", title_justify="left")
    for r in found:
        table.add_row(f"{r.check} ({r.items})", *r.words, r.verdict)
    console.print(table)
    console.print(cost(found))
