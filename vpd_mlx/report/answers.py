"""Answers in the terminal: the base model's and the trained model's, side by side where there is room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vpd_mlx.common.text import visible
from vpd_mlx.run.answers import Answered, choose, rule

__all__ = ["LABEL", "WIDE", "both_answers", "print_answers", "shortened", "side_by_side"]

WIDE = 100  # columns from which two answers stand side by side
LABEL = 14  # columns of what stands left of the texts
MOST_CHARACTERS = 400  # of one text; both ends are kept
MARKS = {True: ("✓ right", "green"), False: ("✗ wrong", "red")}


def shortened(text: str, most: int = MOST_CHARACTERS) -> Text:
    """A text without what could move the cursor; of a long one its two ends."""
    shown, half = visible(text).strip("\n"), most // 2
    if len(shown) <= most:
        return Text(shown)
    return Text.assemble(shown[:half], (f" … {len(shown) - 2 * half:,} characters … ", "dim"), shown[-half:])


def side_by_side(width: int, columns: Sequence[tuple[Text, RenderableType]]) -> RenderableType:
    """Titles with what belongs to them: in columns of equal width, or one under the other where `width` is small."""
    if width < WIDE:
        return _labelled(columns)
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in columns:
        grid.add_column(ratio=1, overflow="fold")
    grid.add_row(*(title for title, _ in columns))
    grid.add_row(*(below for _, below in columns))
    return grid


def print_answers(console: Console, answers: Sequence[Answered]) -> None:
    """A few held-out problems with both answers, their verdicts and what the teacher read, and the rule that chose them."""
    chosen = choose(answers)
    if not chosen:
        return
    console.print(Text("\nanswers before and after", style="bold"))
    read = " What the teacher read is feedback on a sampled answer." if any(a.taught for a in chosen) else ""
    console.print(Text(rule(answers, chosen) + read, style="dim"))
    for answered in chosen:
        console.print(Rule(style="dim"), both_answers(answered, console.width))
    console.print(Rule(style="dim"))


def both_answers(answered: Answered, width: int, most: int = MOST_CHARACTERS) -> RenderableType:
    """One held-out problem: prompt, expected answer, both answers, what the teacher read; of each at most `most` characters."""
    head = Text.assemble((answered.change, "bold"), f"  problem {visible(answered.problem)}")
    prompt = [(Text("prompt"), shortened(answered.before.get("prompt") or "", most))]
    if answered.expected:
        prompt.append((Text("expected"), shortened(answered.expected, most)))
    answers = [_answer("base", answered.before, most), _answer("trained", answered.after, most)]
    read = [(Text("teacher read"), shortened(answered.taught, most))] if answered.taught else []
    return Group(head, _labelled(prompt), side_by_side(width, answers), _labelled(read))


def _answer(name: str, row: Mapping[str, Any], most: int) -> tuple[Text, RenderableType]:
    mark, colour = MARKS[bool(row.get("success"))]
    cut = ", cut off at the limit" if row.get("finish") == "length" else ""
    verdict = Text.assemble((mark, colour), cut)
    if row.get("verdict"):
        verdict.append(": ").append_text(shortened(row["verdict"], most))
    return Text(name, style="dim"), Group(shortened(row.get("completion") or "", most), verdict)


def _labelled(rows: Sequence[tuple[Text, RenderableType]]) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", width=LABEL, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, content in rows:
        grid.add_row(label, content)
    return grid
