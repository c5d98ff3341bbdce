"""What the terminal shows of a run: a live table, or plain lines if the output is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vpd_mlx.common.text import duration, percent, visible
from vpd_mlx.run.advice import gap_line
from vpd_mlx.run.progress import Progress
from vpd_mlx.types import Rollout

__all__ = ["LiveView", "PlainView", "QuietView", "make_view", "step_line"]

PLAIN_EVERY = 10.0  # seconds between two lines in a pipe
WORTH_SAYING = 3.0  # seconds: a shorter phase gets no remaining time
SAMPLE_LINES = 14
RANGES = 56  # columns of a terminal from which curves have room for their range
BARS = "▁▂▃▄▅▆▇█"
CURVES = {"reward": "reward", "divergence": "student/divergence", "margin": "e_step/margin", "length": "length"}


def spark(values: list[float], width: int) -> tuple[str, str]:
    """The last `width` values as a line of bars, scaled to their own range; and this range in figures."""
    shown = values[-width:]
    if not shown:
        return "", ""
    low, high = min(shown), max(shown)
    if high == low:
        return BARS[0] * len(shown), f"{_short(low)}"
    bars = "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1))] for v in shown)
    return bars, f"{_short(low)} … {_short(high)}"


def _short(value: float) -> str:
    """Three significant digits, without a power of ten where it can be."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _number(value: Any, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def step_line(step: int, steps: int, metrics: Mapping[str, Any], seconds_left: float) -> str:
    """One step in one line."""
    shown = {"reward": _number(metrics.get("reward")), "length": _number(metrics.get("length"), 1)}
    if metrics.get("student/divergence") is not None:
        shown["divergence"] = _number(metrics["student/divergence"])
    if metrics.get("e_step/margin") is not None:
        shown["margin"] = _number(metrics["e_step/margin"], 2)
    shown["tokens/s"] = f"{metrics.get('tokens_per_s', 0):,.0f}"
    figures = "  ".join(f"{name} {value}" for name, value in shown.items())
    return f"step {step}/{steps}  {figures}  {duration(seconds_left)} left"


def evaluation_lines(step: int, result: Mapping[str, Any]) -> list[str]:
    """One evaluation in one line; that before the first step has a second one, on what feedback is worth."""
    line = (
        f"evaluation after step {step}, {result['problems']} held-out problems: student {percent(result['student'])} "
        f"(avg@{result['samples']}), greedy {percent(result['student_greedy'])}, "
        f"teacher under feedback {percent(result['teacher'])}"
    )
    worth = gap_line(result) if step == 0 else None
    return [line] if worth is None else [line, worth]


def selection_line(step: int, result: Mapping[str, Any], best: bool) -> str:
    """One selection in one line."""
    found = f"selection after step {step}, {result['problems']} other held-out problems: {percent(result['student'])}"
    return f"{found}, the best so far" if best else found


def _note(text: str) -> str:
    """A note in one line that can do nothing to the terminal: it may quote a verifier or a server."""
    return visible(text).replace("\n", "\\n")


class QuietView(Progress):
    """Warnings only, on standard error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def note(self, text: str) -> None:
        """A line on standard error."""
        print(_note(text), file=sys.stderr, flush=True)


class PlainView(QuietView):
    """Lines for pipes and logs: every evaluation, and a step now and then."""

    def __init__(self, every: float = PLAIN_EVERY) -> None:
        self._every = every
        self._last = -every

    def note(self, text: str) -> None:
        """A line."""
        print(_note(text), flush=True)

    def step(self, step: int, steps: int, metrics: Mapping[str, Any], seconds_left: float) -> None:
        """A line, unless there was one a moment ago."""
        if step in (1, steps) or time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            print(step_line(step, steps, metrics, seconds_left), flush=True)

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """A line or two."""
        print(*evaluation_lines(step, result), sep="\n", flush=True)

    def selection(self, step: int, result: Mapping[str, Any], *, best: bool) -> None:
        """A line."""
        print(selection_line(step, result, best), flush=True)


class LiveView(Progress):
    """A few lines at the foot of the terminal, redrawn in place; notes and evaluations scroll above them."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = visible(title)
        self._phase: tuple[str, int, int | None] = ("loading", 0, None)
        self._began = time.monotonic()
        self._took: dict[str, float] = {}  # seconds that each phase took when it was last through
        self._sample: tuple[str, Rollout, str | None] | None = None
        self._step: tuple[int, int, Mapping[str, Any]] | None = None
        self._left: tuple[float, float] | None = None  # seconds, and when they were these
        self._curves: dict[str, list[float]] = {}
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def note(self, text: str) -> None:
        """A line above the table."""
        self._console.print(Text(_note(text), style="yellow"))

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """What is going on."""
        before = self._phase[0]
        if name != before:
            now = time.monotonic()
            self._took[before] = now - self._began
            self._began = now
        self._phase = (name, done, total)

    def left(self, seconds: float) -> None:
        """The time left, which runs down until the next step says better."""
        self._left = (seconds, time.monotonic())

    def _left_text(self) -> str:
        if self._left is None:
            return ""
        seconds, at = self._left
        return f"{duration(max(0.0, seconds - (time.monotonic() - at)))} left"

    def sample(self, prompt: str, rollout: Rollout, expected: str | None) -> None:
        """What is shown below the curves until the next one comes."""
        self._sample = (prompt, rollout, expected)

    def step(self, step: int, steps: int, metrics: Mapping[str, Any], seconds_left: float) -> None:
        """New figures."""
        self._step = (step, steps, metrics)
        self.left(seconds_left)
        for name, key in CURVES.items():
            if metrics.get(key) is not None:
                self._curves.setdefault(name, []).append(float(metrics[key]))

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """A line above the table; the teacher's gap becomes a curve."""
        self._console.print(Text("\n".join(evaluation_lines(step, result))))
        if result.get("gap") is not None:
            self._curves.setdefault("teacher gap", []).append(float(result["gap"]))

    def selection(self, step: int, result: Mapping[str, Any], *, best: bool) -> None:
        """A line above the table."""
        self._console.print(Text(selection_line(step, result, best)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The table is taken away for a while."""
        self._live.stop()
        try:
            yield
        finally:
            self._live.start(refresh=True)

    def _phase_text(self) -> str:
        """The phase, how far it is, and the time left if the phase is long."""
        name, done, total = self._phase
        spent = time.monotonic() - self._began
        text, left = name, None
        if total:
            text += f" {done}/{total}"
            left = spent / done * (total - done) if done else None
        if left is None and name in self._took:
            left = max(0.0, self._took[name] - spent)
        return text if left is None or spent + left < WORTH_SAYING else f"{text}, {duration(left)} left"

    def _draw(self) -> RenderableType:
        width = self._console.width
        if self._step is None:
            first = Text(f"{self._title}  {self._phase_text()}", style="bold", overflow="ellipsis", no_wrap=True)
            return first if self._left is None else Group(first, Text(f"about {self._left_text()}", style="dim"))
        step, steps, metrics = self._step
        head = Text(overflow="ellipsis", no_wrap=True)
        head.append(f"{self._title}  step {step}/{steps}", style="bold").append(f"  {self._phase_text()}")
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=steps, completed=step, width=max(10, width - 24)), self._left_text())
        table = Table.grid(padding=(0, 2))
        ranges = width >= RANGES
        for curve, values in self._curves.items():
            bars, scale = spark(values, max(8, width - (46 if ranges else 30)))
            table.add_row(curve, f"{values[-1]:.3f}", bars, *([Text(scale, style="dim")] if ranges else []))
        tokens, memory = (f"{metrics.get(key, 0):,.0f}" for key in ("tokens_per_s", "peak_memory_mb"))
        speed = Text(f"{tokens} tokens/s, peak memory {memory} MB", style="dim")
        sample = self._draw_sample(width, self._console.height - len(self._curves) - 5)
        return Group(head, bar, table, speed, *sample)

    def _draw_sample(self, width: int, height: int) -> list[RenderableType]:
        """A completion, its prompt, verdict, expected answer and feedback in at most `height` lines; nothing without room."""
        if self._sample is None or height < 4:
            return []
        prompt, rollout, expected = self._sample
        if rollout.verdict is None or rollout.verdict.error is not None:
            verdict = "none: the verifier failed"
        else:
            verdict = f"{'right' if rollout.success else 'wrong'}, score {rollout.verdict.score:.2f}"
        colour = "green" if rollout.success else "red"
        parts = [("prompt", prompt, "dim"), ("completion", rollout.text, ""), ("verdict", verdict, colour)]
        if expected is not None:
            parts.append(("expected", expected, "green"))
        if rollout.context is not None:
            parts.append(("feedback", f"{rollout.context.kind}: {rollout.context.text}", "cyan"))
        parts = parts[: height - 1]  # the feedback is the first to go
        most = max(1, (min(height, SAMPLE_LINES) - 2) // (len(parts) - 1))
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True, min_width=len("teacher gap"))
        table.add_column()
        for name, text, style in parts:
            table.add_row(name, Text("\n".join(self._cut(text, width - 15, most)), style=style))
        return [Text(), table]

    def _cut(self, text: str, width: int, lines: int) -> list[str]:
        """The first `lines` lines of the text, wrapped; the last one ends in an ellipsis if lines are missing."""
        whole = [str(line).rstrip() for line in Text(visible(text).strip()).wrap(self._console, max(8, width))]
        if len(whole) <= lines:
            return whole
        return [*whole[: lines - 1], f"{whole[lines - 1][: max(7, width - 1)]}…"]


def make_view(title: str, *, quiet: bool) -> QuietView | PlainView | LiveView:
    """The view that suits the output: a terminal, a pipe, or quiet."""
    if quiet:
        return QuietView()
    console = Console(highlight=False)
    return LiveView(console, title) if console.is_terminal else PlainView()
