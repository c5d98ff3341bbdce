"""`vpd-mlx doctor`: is this machine fit to train?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="List every check of the self-test, not only the failed ones.")
    ] = False,
) -> None:
    """Versions, memory, disk, sandbox and hub, and a self-test of the arithmetic on the default device.

    The self-test runs every loss, LoRA on quantised layers, the fused head, shared prompts and generation. It compares the
    default device with the CPU, and gradients with finite differences. Exit code 1 when a check fails.
    """
    from vpd_mlx.tools.doctor import facts, self_test

    known = list(facts())
    checks, seconds = self_test()
    bad = [c for c in checks if not c.ok]
    if as_json:
        rows = [{**asdict(c), "ok": c.ok} for c in checks]
        typer.echo(
            json.dumps({"facts": list(map(asdict, known)), "checks": rows, "seconds": round(seconds, 2)}, indent=2)
        )
        raise typer.Exit(1 if bad else 0)
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    for fact in known:
        table.add_row(fact.name, fact.value + (f"  -> {fact.remedy}" if fact.remedy else ""))
    console.print(table)
    console.print(f"self-test: {len(checks) - len(bad)} of {len(checks)} checks pass ({seconds:.1f} s)")
    for check in checks if every else bad:
        mark = "ok" if check.ok else "WRONG"
        console.print(f"  {mark:5} {check.name}: off by {check.error:.1e}, allowed {check.allowed:.0e}", soft_wrap=True)
    if bad:
        console.print("Training on this device would go wrong. Update macOS and mlx, and report this output.")
        raise typer.Exit(1)
