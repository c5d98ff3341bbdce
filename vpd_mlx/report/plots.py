"""Pictures of one run or several, each as inline SVG whose colours are the page's, so that light and dark both fit."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vpd_mlx.common.text import number
from vpd_mlx.run.folder import NO_CONTEXT, Run

__all__ = ["Plot", "comparison_plots", "legend_colors", "run_plots"]

# Stand-ins that matplotlib writes and `_svg` replaces by the page's variables.
INK, GRID = "#010203", "#010204"
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#010205", "#010206", "#010207", "#010208", "#010209", "#01020a"
NAMES = {
    **{INK: "ink", GRID: "grid", BLUE: "blue", ORANGE: "orange"},
    **{GREEN: "green", RED: "red", PURPLE: "purple", GREY: "grey"},
}
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
DASHES = ("-", "--", "-.", ":")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vpd-mlx",
    "text.parse_math": False,  # a `$` in a label is a dollar
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
MOST_POINTS = 300  # of a line; longer ones are averaged in bins, which keeps the page small
FEW_POINTS = 30  # up to here every point gets a mark, so that a run of one step shows
UPDATES = ("student",)
PHASES = {
    "rollout": "rollout (sampling)",
    "e_step": "E-step",
    "student": "student's update",
    "log": "logging",
}


@dataclass(frozen=True)
class Plot:
    """One picture: its name (letters and dashes), title, one sentence on how to read it, and the SVG."""

    name: str
    title: str
    sentence: str
    svg: Markup


Draw = Callable[[Figure], bool]


def _plot(name: str, title: str, sentence: str, draw: Draw, height: float = 2.5) -> Plot | None:
    """Draw, or None where `draw` says that there is nothing to see."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        if not draw(figure):
            return None
        return Plot(name, title, sentence, Markup(_svg(figure, name, title)))


def _svg(figure: Figure, name: str, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', text, count=1
    )
    # Several pictures stand in one page: each has its own names.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for stand_in, variable in NAMES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return text


# --- drawing


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    if len(steps) <= MOST_POINTS:
        return [float(s) for s in steps], list(values)
    parts = np.array_split(np.arange(len(steps)), MOST_POINTS)
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    return [float(x[p].mean()) for p in parts], [float(y[p].mean()) for p in parts]


def _line(
    axis: Axes,
    data: tuple[Sequence[int], Sequence[float]],
    color: str,
    label: str,
    style: str = "-",
    few: int = FEW_POINTS,
) -> bool:
    """A line with marks where there are few points; of more, their running mean, and thinly the points themselves."""
    x, y = _thin(*data)
    if not x:
        return False
    if len(x) <= few:
        axis.plot(x, y, color=color, label=label, marker="o", ms=3, lw=1.6, ls=style)
        return True
    width = min(len(x), max(3, len(x) // 12))
    padded = np.pad(np.asarray(y), (width // 2, width - 1 - width // 2), mode="edge")
    axis.plot(x, y, color=color, lw=0.8, alpha=0.35)
    axis.plot(x, np.convolve(padded, np.ones(width) / width, "valid"), color=color, label=label, lw=1.8, ls=style)
    return True


def _band(axis: Axes, run: Run, key: str, color: str, label: str, style: str = "-") -> bool:
    """An evaluation's figure in per cent with its 95 % interval as a band, and as a bar where there is one point."""
    steps, values, bounds = run.evaluations(key)
    if not steps:
        return False
    low, high = (100 * np.array([b[i] for b in bounds]) for i in (0, 1))
    y = 100 * np.asarray(values)
    marker = "o" if len(steps) <= FEW_POINTS else ""
    axis.plot(steps, y, color=color, label=label, marker=marker, ms=3.5, lw=1.8, ls=style)
    if len(steps) == 1:
        axis.vlines(steps, low, high, color=color, lw=1.2, alpha=0.6)
    else:
        axis.fill_between(steps, low, high, color=color, alpha=0.16, lw=0)
    return True


def _finish(axis: Axes, *, y: str, x: str = "step", legend: bool = True) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    left, right = axis.get_xlim()
    if right - left < 1:  # one step alone: whole numbers beside it, not hundredths of a step
        axis.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6))
    if legend and axis.get_legend_handles_labels()[1]:
        # Above the picture, where no curve can hide behind it.
        axis.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncol=4,
            borderaxespad=0.1,
            handlelength=1.6,
            columnspacing=1.2,
        )


def _per_cent(axis: Axes) -> None:
    axis.set_ylim(-2, 102)


def _either(name: str) -> tuple[str, ...]:
    return tuple(f"{u}/{name}" for u in UPDATES)


def _percents(data: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    return data[0], [100 * v for v in data[1]]


def run_plots(run: Run) -> list[Plot]:
    """All pictures for which the run has figures."""
    samples = number(run.evals[-1].get("samples")) if run.evals else None
    student = "student" if samples is None else f"student, avg@{samples:.0f}"

    def accuracy(figure: Figure) -> bool:
        axis = figure.subplots()
        drawn = [
            _band(axis, run, "student", BLUE, student),
            _band(axis, run, "student_greedy", GREEN, "student, greedy", "--"),
            _band(axis, run, "teacher", ORANGE, "teacher"),
        ]
        _finish(axis, y="held-out problems right, %")
        _per_cent(axis)
        return any(drawn)

    def gap(figure: Figure) -> bool:
        axis = figure.subplots()
        steps, values = _percents(run.evaluations("gap")[:2])
        axis.axhline(0, color=GREY, lw=1)
        drawn = _line(axis, (steps, values), ORANGE, "teacher less student")
        _finish(axis, y="percentage points", legend=False)
        return drawn

    def reward(figure: Figure) -> bool:
        axis = figure.subplots()
        drawn = _line(axis, run.series("reward"), BLUE, "mean score of a batch")
        success = run.series("success")
        if success[1] != run.series("reward")[1]:
            drawn = _line(axis, success, GREEN, "share right", "--") or drawn
        _finish(axis, y="score, 0 to 1", legend=len(axis.get_legend_handles_labels()[1]) > 1)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        return drawn

    def groups(figure: Figure) -> bool:
        axis = figure.subplots()
        parts = [
            ("groups_all_right", "all right", GREEN),
            ("groups_mixed", "mixed", BLUE),
            ("groups_all_wrong", "all wrong", RED),
        ]
        return _stack(axis, [(label, c, *_percents(run.series(k))) for k, label, c in parts], "groups, %")

    def contexts(figure: Figure) -> bool:
        rows = [m for m in run.metrics if isinstance(m.get("contexts"), dict) and number(m.get("step")) is not None]
        kinds = sorted({str(k) for m in rows for k in m["contexts"]})
        if not kinds or run.algorithm == "grpo":  # which learns from scores alone
            return False
        steps = [int(m["step"]) for m in rows]
        counts = [[number(m["contexts"].get(k)) or 0.0 for m in rows] for k in kinds]
        counts.append([number(m.get("contexts_none")) or 0.0 for m in rows])
        total = np.maximum(1, np.sum(counts, axis=0))
        colors = [*(CYCLE[i % 5] for i in range(len(kinds))), GREY]
        parts = [
            (kind, color, steps, list(100 * np.asarray(c) / total))
            for kind, color, c in zip([*kinds, NO_CONTEXT], colors, counts, strict=True)
        ]
        return _stack(figure.subplots(), parts, "completions, %")

    def length(figure: Figure) -> bool:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        drawn = [
            _line(top, run.series("length"), BLUE, "mean"),
            _line(top, run.series("length_max"), GREY, "longest", "--"),
            _line(bottom, _percents(run.series("truncated")), RED, "cut off"),
        ]
        _finish(top, y="tokens", x="")
        _finish(bottom, y="cut off, %", legend=False)
        bottom.set_ylim(bottom=-0.2, top=max(5.0, bottom.get_ylim()[1]))
        return any(drawn)

    def margin(figure: Figure) -> bool:
        top, bottom = figure.subplots(2, 1, sharex=True)
        top.axhline(0, color=GREY, lw=1)
        bottom.axhline(0.5, color=GREY, lw=1)
        e_step = bool(run.series("e_step/margin")[0])
        if e_step:
            drawn = [
                _line(top, run.series("e_step/margin"), BLUE, "before the E-step"),
                _line(top, run.series("e_step/margin_after"), ORANGE, "after it", "--"),
                _line(bottom, run.series("e_step/auc"), BLUE, "AUC"),
            ]
        else:
            drawn = [
                _line(top, run.series(*_either("margin")), BLUE, "margin"),
                _line(bottom, run.series(*_either("auc")), BLUE, "AUC"),
            ]
        _finish(top, y="margin", x="", legend=e_step)
        _finish(bottom, y="AUC", legend=False)
        bottom.set_ylim(min(0.45, bottom.get_ylim()[0]), 1.03)
        return any(drawn)

    def divergence(figure: Figure) -> bool:
        axis = figure.subplots()
        right = _line(axis, run.series(*_either("divergence_right")), GREEN, "right completions")
        wrong = _line(axis, run.series(*_either("divergence_wrong")), RED, "wrong completions", "--")
        _finish(axis, y="nats a token")
        return right or wrong

    def entropy(figure: Figure) -> bool:
        axis = figure.subplots()
        student = _line(axis, run.series(*_either("entropy")), BLUE, "student")
        teacher = _line(axis, run.series(*_either("teacher_entropy")), ORANGE, "teacher", "--")
        _finish(axis, y="nats a token")
        axis.set_ylim(bottom=0)
        return student or teacher

    def seconds(figure: Figure) -> bool:
        phases = [(p, s) for p, s in run.seconds.items() if s > 0]
        if not phases:
            return False
        axis = figure.subplots()
        total = sum(s for _, s in phases)
        unit, name = (60.0, "minutes") if total >= 180 else (1.0, "seconds")
        names = [PHASES.get(p, p.replace("_", " ")) for p, _ in phases][::-1]
        values = np.array([s for _, s in phases][::-1])
        bars = axis.barh(names, values / unit, color=BLUE, height=0.62)
        axis.bar_label(bars, [f" {v / unit:.1f} ({100 * v / total:.0f} %)" for v in values], padding=1, fontsize=8.5)
        axis.set_xlim(0, values.max() / unit * 1.32)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(name)
        return True

    def memory(figure: Figure) -> bool:
        top, bottom = figure.subplots(2, 1, sharex=True)
        drawn = [
            _line(top, run.series("peak_memory_mb"), PURPLE, "peak"),
            _line(bottom, run.series("tokens_per_s"), BLUE, "speed"),
        ]
        _finish(top, y="peak, MiB", x="", legend=False)
        _finish(bottom, y="tokens/s", legend=False)
        top.set_ylim(bottom=0)
        bottom.set_ylim(bottom=0)
        return any(drawn)

    e_step = bool(run.series("e_step/margin")[0])
    margin_text = (
        "How much likelier the feedback makes right completions than wrong ones, as the teacher scores them; below 0 (or AUC "
        "below 0.5, no better than chance) it teaches what is wrong."
    )
    drawn = [
        _plot(
            "accuracy",
            "Accuracy on held-out problems",
            "The student answers alone, the teacher is the same network with feedback in its prompt; bands are 95 % intervals.",
            accuracy,
        ),
        _plot(
            "gap",
            "Teacher's gap",
            "How many points better the network is with feedback than without it; at 0 there is nothing to distil.",
            gap,
        ),
        _plot(
            "reward",
            "Reward in training",
            "Mean score that the verifier gave the completions of each step; it should rise, jumping about is normal.",
            reward,
        ),
        _plot(
            "groups",
            "Groups by outcome",
            "Each problem is answered several times; mixed groups hold right and wrong answers side by side and teach the most.",
            groups,
        ),
        _plot(
            "margin",
            "E-step: does the teacher tell right from wrong?" if e_step else "Does the teacher tell right from wrong?",
            margin_text,
            margin,
            3.0,
        ),
        _plot(
            "length",
            "Length of completions",
            "Tokens per completion, and the share cut off at the limit; sudden jumps or many cut off mean trouble.",
            length,
            3.0,
        ),
        _plot(
            "divergence",
            "Divergence from the teacher",
            "How far the student's next-token choices are from the teacher's; right completions should need less correction.",
            divergence,
        ),
        _plot(
            "entropy",
            "Entropy",
            "How undecided each is about the next token; a fall to nearly 0 while the reward is low is collapse.",
            entropy,
        ),
        _plot(
            "contexts",
            "Where the feedback came from",
            "Share of completions by what was shown to the teacher about them; without feedback (none) a completion "
            "teaches nothing by itself.",
            contexts,
        ),
        _plot("seconds", "Where the time went", "Time in each phase, summed over all steps and evaluations.", seconds),
        _plot(
            "memory",
            "Memory and speed",
            "Peak memory of each step, and tokens per second while sampling; memory that keeps rising will run out.",
            memory,
            3.0,
        ),
    ]
    return [p for p in drawn if p is not None]


def _stack(axis: Axes, parts: Sequence[tuple[str, str, Sequence[int], Sequence[float]]], y: str) -> bool:
    """Shares that add up to 100 %, as areas; as bars where there are few steps."""
    parts = [p for p in parts if p[2]]
    if not parts or len({tuple(p[2]) for p in parts}) > 1:
        return False
    few = len(parts[0][2]) <= FEW_POINTS
    base: np.ndarray[Any, Any] | None = None
    for label, color, steps, values in parts:
        x, heights = (list(map(float, steps)), list(values)) if few else _thin(steps, values)
        h = np.asarray(heights)
        base = np.zeros_like(h) if base is None else base
        if few:
            axis.bar(x, h, bottom=base, color=color, label=label, width=0.8, alpha=0.75, lw=0)
        else:
            axis.fill_between(x, base, base + h, color=color, label=label, alpha=0.75, lw=0, step="mid")
        base = base + h
    _finish(axis, y=y)
    axis.set_ylim(0, 100)
    return True


def comparison_plots(runs: Mapping[str, Run]) -> list[Plot]:
    """Several runs in one picture each: held-out accuracy, greedy accuracy, teacher, reward, length."""

    def evaluation(key: str) -> Draw:
        def draw(figure: Figure) -> bool:
            axis = figure.subplots()
            drawn = [_band(axis, run, key, *look) for run, look in zip(runs.values(), looks, strict=True)]
            _finish(axis, y="held-out problems right, %", legend=False)
            _per_cent(axis)
            return any(drawn)

        return draw

    def metric(*keys: str, y: str) -> Draw:
        def draw(figure: Figure) -> bool:
            axis = figure.subplots()
            lines = [run.series(*keys) for run in runs.values()]
            # All alike, marked or smoothed; a single point can only be marked.
            few = FEW_POINTS if max(len(x) for x, _ in lines) <= FEW_POINTS else 2
            drawn = [_line(axis, line, *look, few) for line, look in zip(lines, looks, strict=True)]
            _finish(axis, y=y, legend=False)
            return any(drawn)

        return draw

    looks = [(CYCLE[i % 6], label, DASHES[i // 6 % 4]) for i, label in enumerate(runs)]
    bands = "bands are 95 % intervals, and where they overlap look at the paired difference above."
    drawn = [
        _plot(
            "student",
            "Student, sampled",
            f"Average over several sampled answers to each held-out problem; {bands}",
            evaluation("student"),
        ),
        _plot(
            "greedy",
            "Student, greedy",
            f"One answer to each held-out problem, the likeliest token each time; {bands}",
            evaluation("student_greedy"),
        ),
        _plot(
            "teacher",
            "Teacher",
            "The same network with feedback in its prompt: what there is to distil.",
            evaluation("teacher"),
        ),
        _plot(
            "reward",
            "Reward in training",
            "Mean score that the verifier gave each step's completions.",
            metric("reward", y="score, 0 to 1"),
        ),
        _plot(
            "entropy",
            "Student's entropy",
            "How undecided the student is about the next token; near 0 it repeats itself.",
            metric(*_either("entropy"), y="nats a token"),
        ),
        _plot(
            "length", "Length of completions", "Mean tokens per completion in training.", metric("length", y="tokens")
        ),
    ]
    return [p for p in drawn if p is not None]


def legend_colors(count: int) -> list[str]:
    """The page's variables for the lines of a comparison, in order."""
    return [NAMES[CYCLE[i % len(CYCLE)]] for i in range(count)]
