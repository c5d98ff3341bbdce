"""`vpd-mlx show RUN`: rollouts in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vpd_mlx.common.text import MOST, number, shortened, visible
from vpd_mlx.errors import ConfigError, Fault
from vpd_mlx.run.folder import NO_CONTEXT, Entry, Run, load_run

__all__ = ["show"]

FELT = 0.5  # nats from which on a token's shift is shown
NAMED = 6  # tokens named with their shift, the largest


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, of a run that ended or still goes on.")],
    step: Annotated[int | None, typer.Option(help="Only of this step.", show_default="all, newest first")] = None,
    right: Annotated[bool, typer.Option("--right", help="Only right ones.")] = False,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only wrong ones.")] = False,
    kind: Annotated[
        str | None, typer.Option(help="Only with this feedback: sibling, verifier, critique, reference, both or none.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rollouts at most.")] = 5,
    full: Annotated[bool, typer.Option("--full", help="Long texts whole, not their two ends.")] = False,
) -> None:
    """Rollouts of a run: prompt, completion, verdict, and how the teacher, who has read the feedback, sees each token."""
    if right and wrong:
        raise ConfigError([Fault("--right", "--wrong is given, too", "leave one out, or both for all")], "command line")
    found = load_run(run)
    entries = _chosen(found, step, right, wrong, kind)
    console = Console(highlight=False)
    for row in found.read(entries[:limit]):
        _rollout(console, row, full)
    rest = len(entries) - limit
    if not entries:
        console.print("No rollout has been logged yet." if not found.rollouts else "No rollout is like that.")
    elif rest > 0:
        console.print(Rule(style="dim"))
        console.print(f"{limit} of {len(entries):,} shown, newest first; --limit shows more.")


def _chosen(run: Run, step: int | None, right: bool, wrong: bool, kind: str | None) -> list[Entry]:
    faults = []
    steps, kinds = sorted({e.step for e in run.rollouts}), sorted({e.kind for e in run.rollouts})
    if step is not None and run.rollouts and step not in steps:
        there = f"give one from {steps[0]} to {steps[-1]}"
        faults.append(Fault("--step", f"got {step}, of which the run has no rollouts", there))
    if kind is not None and run.rollouts and kind not in kinds:
        faults.append(
            Fault("--kind", f"got {kind!r}, which no rollout of this run has", f"give one of {', '.join(kinds)}")
        )
    if faults:
        raise ConfigError(faults, "command line")
    chosen = [
        e
        for e in run.rollouts
        if (step is None or e.step == step)
        and (kind is None or e.kind == kind)
        and (not right or e.right)
        and (not wrong or not e.right)
    ]
    return sorted(chosen, key=lambda e: -e.step)  # stable: within a step as they were logged


def _rollout(console: Console, row: Mapping[str, Any], full: bool) -> None:
    right = bool(row.get("success"))
    context = row.get("context")
    context = context if isinstance(context, Mapping) else None
    head = Text.assemble(
        ("right" if right else "WRONG", "bold green" if right else "bold red"),
        f"  step {row.get('step', '?')}  problem {visible(row.get('problem', '?'))}",
        f"  feedback: {visible(context.get('kind')) if context else NO_CONTEXT}",
        f"  {row.get('tokens', '?')} tokens{', cut off' if row.get('finish') == 'length' else ''}",
    )
    console.print(Rule(style="dim"))
    console.print(head)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", width=15, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("prompt", Text(shortened(row.get("prompt"), full)))
    tokens, shifts = _tokens(row)
    grid.add_row("completion", _shortened(tokens, full))
    if row.get("verdict"):
        grid.add_row("verdict", Text(shortened(row["verdict"], full)))
    if row.get("teacher_prompt"):
        grid.add_row("teacher read", Text(shortened(row["teacher_prompt"], full)))
    if shifts:
        grid.add_row("teacher−student", shifts)
    console.print(grid)


def _tokens(row: Mapping[str, Any]) -> tuple[Text, Text | None]:
    """The completion, coloured by shift, and in words the tokens with the largest, for terminals without colour."""
    pieces, shift = row.get("pieces"), row.get("shift")
    if not isinstance(pieces, list) or not isinstance(shift, list):
        return Text(visible(row.get("completion"))), None
    text = Text()
    felt = []
    for piece, value in zip(pieces, [*shift, *[None] * len(pieces)], strict=False):
        s = number(value)
        shown = visible(piece)
        text.append(
            shown, style="" if s is None or abs(s) < FELT else ("black on cyan" if s > 0 else "black on yellow")
        )
        if s is not None and abs(s) >= FELT:
            felt.append((s, shown))
    # Pieces of one token each need not add up to the text, as when a letter takes two tokens.
    if visible(row.get("completion")).strip() not in text.plain:
        text = Text(visible(row.get("completion")))
    felt.sort(key=lambda f: -abs(f[0]))
    names = Text()
    for s, shown in felt[:NAMED]:
        label = shown.replace("\n", "⏎")
        names.append(f"{label!r} {s:+.1f}", style="cyan" if s > 0 else "yellow").append("  ")
    if len(felt) > NAMED:
        names.append(f"and {len(felt) - NAMED} more")
    return text, names if felt else Text(f"all within {FELT} nats")


def _shortened(text: Text, full: bool) -> Text:
    if full or len(text) <= MOST:
        return text
    half = math.floor(MOST / 2)
    return Text.assemble(
        text[:half], (f"\n… {len(text) - 2 * half:,} characters, --full shows them …\n", "dim"), text[-half:]
    )
