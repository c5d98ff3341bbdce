"""`vpd-mlx doctor`: is this machine fit to train?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["doctor"]


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A model folder, a config.json or a hub id: say what a run would make of it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="List every check of the self-test, not only the failed ones.")
    ] = False,
) -> None:
    """Versions, memory, disk, sandbox and hub, and a self-test of the arithmetic on the default device; or a MODEL.

    Of a model: what of it is shared, fused and batched, what memory a token takes, its stop tokens and thinking, and whether
    student and teacher are rendered the same way. Its config.json is enough, no weights are read. Exit code 1 when something is
    wrong with it.

    Without a model, the self-test runs every loss, LoRA on quantised layers, the fused head, shared prompts and generation. It
    compares the default device with the CPU, and gradients with finite differences. Exit code 1 when a check fails.
    """
    if model is not None:
        _model(model, as_json)
        return
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
    _show(console, known)
    console.print(f"self-test: {len(checks) - len(bad)} of {len(checks)} checks pass ({seconds:.1f} s)")
    for check in checks if every else bad:
        mark = "ok" if check.ok else "WRONG"
        console.print(f"  {mark:5} {check.name}: off by {check.error:.1e}, allowed {check.allowed:.0e}", soft_wrap=True)
    if bad:
        console.print("Training on this device would go wrong. Update macOS and mlx, and report this output.")
        raise typer.Exit(1)


def _show(console: Console, known: Sequence[Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for fact in known:
        table.add_row(fact.name, Text(fact.value + (f"  -> {fact.remedy}" if fact.remedy else "")))
    console.print(table)


def _model(model: str, as_json: bool) -> None:
    from vpd_mlx.tools.checkup import checkup

    known = list(checkup(model))
    if as_json:
        typer.echo(json.dumps({"facts": list(map(asdict, known))}, indent=2))
    else:
        _show(Console(highlight=False), known)
    raise typer.Exit(1 if any(fact.remedy for fact in known) else 0)
