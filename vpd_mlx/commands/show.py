"""`vpd-mlx show RUN`: rollouts in the terminal, or the answers to held-out problems before and after training."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vpd_mlx.common.text import number, visible
from vpd_mlx.errors import ConfigError, Fault, wrong_option
from vpd_mlx.feedback import SOURCES
from vpd_mlx.report.answers import both_answers
from vpd_mlx.run.answers import CHANGES, pairs
from vpd_mlx.run.folder import NO_CONTEXT, LoggedRollout, Run, load_run

__all__ = ["show"]

NOTABLE = 0.5  # nats; a token whose shift is smaller is neither coloured nor listed
MOST_LISTED = 6  # tokens listed with their shift, the largest first
MOST_CHARACTERS = 1200  # of one text; both ends are kept


class Kind(StrEnum):
    """What became of a held-out problem."""

    ALL = "all"
    GAINED = "gained"
    LOST = "lost"
    STILL_WRONG = "still-wrong"
    KEPT_RIGHT = "kept-right"


BECAME = dict(zip(list(Kind)[1:], CHANGES.values(), strict=True))


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; the run may still be going on.")],
    step: Annotated[int | None, typer.Option(help="Only from this step.", show_default="all, newest first")] = None,
    right: Annotated[bool, typer.Option("--right", help="Only right ones.")] = False,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only wrong ones.")] = False,
    kind: Annotated[
        str | None, typer.Option(help=f"Only with this feedback: {', '.join(SOURCES)}, both or {NO_CONTEXT}.")
    ] = None,
    answers: Annotated[
        Kind | None,
        typer.Option(
            help="Held-out problems in place of rollouts: those of this kind, before training and after --step."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of rollouts, or of problems.")] = 5,
    full: Annotated[bool, typer.Option("--full", help="Show long texts in full instead of their two ends.")] = False,
) -> None:
    """Show rollouts of a run: prompt, completion, expected answer, verdict, and how the teacher rates each token."""
    if right and wrong:
        raise wrong_option("--right", "contradicts --wrong", "leave one out, or both for all")
    found = load_run(run)
    if answers is not None:
        if right or wrong or kind is not None:
            given = "--right" if right else "--wrong" if wrong else "--kind"
            raise wrong_option(given, "says nothing of held-out problems", "leave it out, or --answers")
        _answers(found, answers, step, limit, full)
        return
    entries = _chosen(found, step, right, wrong, kind)
    console = Console(highlight=False)
    for row in found.read(entries[:limit]):
        _rollout(console, row, full)
    if not entries:
        console.print("No rollout matches." if found.rollouts else "No rollout has been logged yet.")
    elif len(entries) > limit:
        console.print(Rule(style="dim"))
        console.print(f"{limit} of {len(entries):,} shown, newest first; --limit shows more.")


def _answers(run: Run, kind: Kind, step: int | None, limit: int, full: bool) -> None:
    steps = sorted({int(number(e.get("step")) or 0) for e in run.evals} - {0})
    if step is not None and step not in steps:
        remedy = f"give one of {', '.join(map(str, steps))}" if steps else "wait for the first evaluation after a step"
        raise wrong_option("--step", f"got {step}, after which nothing was evaluated", remedy)
    every = pairs(list(run.answer_rows()), run.evaluated if step is None else step) if run.evaluated or step else []
    found = [a for a in every if a.change == BECAME.get(kind, a.change)]
    console = Console(highlight=False)
    for answered in found[:limit]:
        shown = both_answers(answered, console.width, sys.maxsize if full else MOST_CHARACTERS)
        console.print(Rule(style="dim"), shown)
    if not every:
        console.print("No held-out problem has been answered before and after training yet.")
    elif not found:
        console.print(f"None of {len(every):,} held-out problems is {kind}.")
    else:
        console.print(Rule(style="dim"))
        of = f"{len(every):,} held-out problems" if kind is Kind.ALL else f"{len(found):,} {kind} of {len(every):,}"
        more = "; --limit shows more" if len(found) > limit else ""
        console.print(f"{min(limit, len(found))} of {of}, in the order of evaluation{more}.")


def _chosen(run: Run, step: int | None, right: bool, wrong: bool, kind: str | None) -> list[LoggedRollout]:
    faults = []
    steps, kinds = sorted({e.step for e in run.rollouts}), sorted({e.kind for e in run.rollouts})
    if step is not None and run.rollouts and step not in steps:
        remedy = f"give a step from {steps[0]} to {steps[-1]}"
        faults.append(Fault("--step", f"got {step}, for which the run has no rollouts", remedy))
    if kind is not None and run.rollouts and kind not in kinds:
        problem = f"got {kind!r}, which no rollout of this run has"
        faults.append(Fault("--kind", problem, f"give one of {', '.join(kinds)}"))
    if faults:
        raise ConfigError(faults, "command line")
    fitting = (e for e in run.rollouts if step in (None, e.step) and kind in (None, e.kind))
    chosen = [e for e in fitting if (e.right or not right) and not (e.right and wrong)]
    return sorted(chosen, key=lambda e: -e.step)  # stable: within a step they stay in logged order


def _rollout(console: Console, row: Mapping[str, Any], full: bool) -> None:
    right = bool(row.get("success"))
    context = row.get("context")
    kind = visible(context.get("kind")) if isinstance(context, Mapping) else NO_CONTEXT
    head = Text.assemble(
        ("right" if right else "WRONG", "bold green" if right else "bold red"),
        f"  step {row.get('step', '?')}  problem {visible(row.get('problem', '?'))}  feedback: {kind}",
        f"  {row.get('tokens', '?')} tokens{', cut off' if row.get('finish') == 'length' else ''}",
    )
    console.print(Rule(style="dim"), head)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", width=15, no_wrap=True)
    grid.add_column(overflow="fold")
    completion, shifts = _tokens(row)
    for name, text in (
        ("prompt", Text(visible(row.get("prompt")))),
        ("completion", completion),
        ("expected", Text(visible(row.get("expected")))),
        ("verdict", Text(visible(row.get("verdict")))),
        ("teacher prompt", Text(visible(row.get("teacher_prompt")))),
    ):
        if text or name in ("prompt", "completion"):
            grid.add_row(name, text if full else _shortened(text))
    if shifts:
        grid.add_row("teacher−student", shifts)
    console.print(grid)


def _tokens(row: Mapping[str, Any]) -> tuple[Text, Text | None]:
    """The completion coloured by shift; and, for terminals without colour, the tokens with the largest shifts."""
    pieces, shift = row.get("pieces"), row.get("shift")
    whole = visible(row.get("completion"))
    if not isinstance(pieces, list) or not isinstance(shift, list):
        return Text(whole), None
    text = Text()
    notable = []
    for piece, value in zip(pieces, [*shift, *[None] * len(pieces)], strict=False):
        nats, shown = number(value), visible(piece)
        if nats is None or abs(nats) < NOTABLE:
            text.append(shown)
        else:
            text.append(shown, style="black on cyan" if nats > 0 else "black on yellow")
            notable.append((nats, shown))
    # The pieces need not add up to the text, as when one letter takes two tokens.
    if whole.strip() not in text.plain:
        text = Text(whole)
    if not notable:
        return text, Text(f"all within {NOTABLE} nats")
    notable.sort(key=lambda n: -abs(n[0]))
    listed = Text()
    for nats, shown in notable[:MOST_LISTED]:
        label = shown.replace("\n", "⏎")
        listed.append(f"{label!r} {nats:+.1f}", style="cyan" if nats > 0 else "yellow").append("  ")
    if len(notable) > MOST_LISTED:
        listed.append(f"and {len(notable) - MOST_LISTED} more")
    return text, listed


def _shortened(text: Text) -> Text:
    """A long text's two ends."""
    half = MOST_CHARACTERS // 2
    if len(text) <= MOST_CHARACTERS:
        return text
    gap = f"\n… {len(text) - 2 * half:,} characters, --full shows them …\n"
    return Text.assemble(text[:half], (gap, "dim"), text[-half:])
