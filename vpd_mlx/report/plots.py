"""Plots of one run or several, as inline SVG in the page's own colours, so that they fit light and dark.

A plot appears if the run logged figures for it, whichever algorithm did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.common.text import number
from vpd_mlx.report.chart import (
    BLUE,
    CYCLE,
    DASHES,
    GREEN,
    GREY,
    NAMES,
    ORANGE,
    PURPLE,
    RED,
    Chart,
    Plot,
    drawn,
    fix,
    track,
)
from vpd_mlx.run.folder import NO_CONTEXT, Run

__all__ = ["comparison_plots", "legend_colors", "run_plots"]

MOST_POINTS = 300  # of a line; longer ones are averaged in bins, which keeps the page small
FEW_POINTS = 30  # or fewer: every point gets a mark, so that a run of one step shows
PHASES = {"rollout": "rollout (sampling)", "e_step": "E-step", "student": "student's update", "log": "logging"}

Series = tuple[Sequence[int], Sequence[float]]
Curve = tuple[str, str, str]  # metric, colour, label


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    if len(steps) <= MOST_POINTS:
        return [float(s) for s in steps], list(values)
    parts = np.array_split(np.arange(len(steps)), MOST_POINTS)
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    return [float(x[p].mean()) for p in parts], [float(y[p].mean()) for p in parts]


def _line(axis: Axes, data: Series, color: str, label: str, style: str = "-", few: int = FEW_POINTS) -> bool:
    """A line with marks if there are few points; else their running mean, and a thin line through the points themselves."""
    x, y = _thin(*data)
    if not x:
        return False
    track(axis, label, color, x, y)
    if len(x) <= few:
        axis.plot(x, y, color=color, label=label, marker="o", ms=3, lw=1.6, ls=style)
        return True
    width = min(len(x), max(3, len(x) // 12))
    padded = np.pad(np.asarray(y), (width // 2, width - 1 - width // 2), mode="edge")
    axis.plot(x, y, color=color, lw=0.8, alpha=0.35)
    axis.plot(x, np.convolve(padded, np.ones(width) / width, "valid"), color=color, label=label, lw=1.8, ls=style)
    return True


def _band(axis: Axes, run: Run, key: str, color: str, label: str, style: str = "-") -> bool:
    """An evaluation's figure in per cent with its 95 % interval as a band, or as a bar if there is only one point."""
    steps, values, bounds = run.evaluations(key)
    if not steps:
        return False
    low, high = (100 * np.array([b[i] for b in bounds]) for i in (0, 1))
    y = 100 * np.asarray(values)
    track(axis, label, color, steps, list(y), (list(low), list(high)))
    marker = "o" if len(steps) <= FEW_POINTS else ""
    axis.plot(steps, y, color=color, label=label, marker=marker, ms=3.5, lw=1.8, ls=style)
    if len(steps) == 1:
        axis.vlines(steps, low, high, color=color, lw=1.2, alpha=0.6)
    else:
        axis.fill_between(steps, low, high, color=color, alpha=0.16, lw=0)
    return True


def _finish(axis: Axes, *, y: str, x: str = "step", legend: bool = True, least: float = 0.0) -> None:
    """Labels, ticks and legend. A range of values below `least` is widened to it, so that noise does not look like a trend."""
    low, high = axis.get_ylim()
    if high - low < least:
        axis.set_ylim((low + high - least) / 2, (low + high + least) / 2)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    left, right = axis.get_xlim()
    if right - left < 1:  # a single step: whole numbers beside it, not hundredths of a step
        axis.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6))
    if legend and axis.get_legend_handles_labels()[1]:
        # Above the plot, so that it hides no curve.
        axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncol=4)


def _stack(axis: Axes, parts: Sequence[tuple[str, str, Series]], y: str) -> bool:
    """Shares that add up to 100 %, as areas, or as bars if there are few steps."""
    parts = [p for p in parts if p[2][0]]
    if not parts or len({tuple(steps) for _, _, (steps, _) in parts}) > 1:
        return False
    few = len(parts[0][2][0]) <= FEW_POINTS
    base: Any = 0.0
    for label, color, data in parts:
        x, heights = _thin(*data)
        track(axis, label, color, x, heights)
        top = base + np.asarray(heights)
        if few:
            axis.bar(x, heights, bottom=base, color=color, label=label, width=0.8, alpha=0.75, lw=0)
        else:
            axis.fill_between(x, base, top, color=color, label=label, alpha=0.75, lw=0, step="mid")
        base = top
    _finish(axis, y=y)
    axis.set_ylim(0, 100)
    fix(axis)
    return True


def _percents(data: Series) -> Series:
    return data[0], [100 * v for v in data[1]]


def _two_rows(figure: Chart, **options: Any) -> tuple[Axes, Axes]:
    figure.set_figheight(3.0)
    top, bottom = figure.subplots(2, 1, sharex=True, **options)
    return top, bottom


def _curves(
    axis: Axes,
    run: Run,
    y: str,
    *curves: Curve,
    x: str = "step",
    scale: int = 1,
    legend: bool = True,
    least: float = 0.0,
) -> bool:
    """A line for each metric, the second one dashed."""
    drawn = []
    for (key, color, label), style in zip(curves, DASHES, strict=False):
        steps, values = run.series(key)
        drawn.append(_line(axis, (steps, [scale * v for v in values]), color, label, style))
    _finish(axis, y=y, x=x, legend=legend, least=least)
    return any(drawn)


def _accuracies(axis: Axes, bands: Sequence[tuple[Run, str, str, str, str]], *, legend: bool) -> bool:
    """Held-out accuracies: (run, figure, colour, label, style) of each."""
    drawn = [_band(axis, *band) for band in bands]
    _finish(axis, y="held-out problems right, %", legend=legend)
    axis.set_ylim(-2, 102)
    return any(drawn)


def _accuracy(run: Run, figure: Chart) -> bool:
    samples = number(run.evals[-1].get("samples")) if run.evals else None
    sampled = "student" if samples is None else f"student, avg@{samples:.0f}"
    bands = [
        (run, "student", BLUE, sampled, "-"),
        (run, "student_greedy", GREEN, "student, greedy", "--"),
        (run, "teacher", ORANGE, "teacher", "-"),
    ]
    return _accuracies(figure.subplots(), bands, legend=True)


def _gap(run: Run, figure: Chart) -> bool:
    """With its own interval, paired by problem, which the two accuracies above do not show."""
    axis = figure.subplots()
    axis.axhline(0, color=GREY, lw=1)
    drawn = _band(axis, run, "gap", ORANGE, "teacher minus student")
    _finish(axis, y="percentage points", legend=False, least=10)
    return drawn


def _reward(run: Run, figure: Chart) -> bool:
    axis = figure.subplots()
    reward, success = run.series("reward"), run.series("success")
    drawn = [_line(axis, reward, BLUE, "mean score of a batch")]
    if success[1] != reward[1]:
        drawn.append(_line(axis, success, GREEN, "share right", "--"))
    _finish(axis, y="score, 0 to 1", legend=all(drawn) and len(drawn) > 1)
    axis.set_ylim(min(0.0, axis.get_ylim()[0]), max(0.1, axis.get_ylim()[1]))
    return any(drawn)


def _groups(run: Run, figure: Chart) -> bool:
    outcomes = (("all right", GREEN), ("mixed", BLUE), ("all wrong", RED))
    parts = [(name, c, _percents(run.series(f"groups_{name.replace(' ', '_')}"))) for name, c in outcomes]
    return _stack(figure.subplots(), parts, "groups, %")


def _contexts(run: Run, figure: Chart) -> bool:
    rows = [m for m in run.metrics if isinstance(m.get("contexts"), dict) and number(m.get("step")) is not None]
    kinds = sorted({str(k) for m in rows for k in m["contexts"]})
    algorithm = ALGORITHMS.get(run.algorithm)
    if not kinds or (algorithm is not None and not algorithm.contexts):
        return False
    steps = [int(m["step"]) for m in rows]
    counts = [[number(m["contexts"].get(k)) or 0.0 for m in rows] for k in kinds]
    counts.append([number(m.get("contexts_none")) or 0.0 for m in rows])
    total = np.maximum(1, np.sum(counts, axis=0))
    colors = [*(CYCLE[i % 5] for i in range(len(kinds))), GREY]
    parts = [
        (kind, color, (steps, list(100 * np.asarray(c) / total)))
        for kind, color, c in zip([*kinds, NO_CONTEXT], colors, counts, strict=True)
    ]
    return _stack(figure.subplots(), parts, "completions, %")


def _length(run: Run, figure: Chart) -> bool:
    top, bottom = _two_rows(figure, height_ratios=[3, 2])
    drawn = [
        _curves(top, run, "tokens", ("length", BLUE, "mean"), ("length_max", GREY, "longest"), x="", least=1),
        _curves(bottom, run, "cut off, %", ("truncated", RED, "cut off"), scale=100, legend=False),
    ]
    bottom.set_ylim(bottom=-0.2, top=max(5.0, bottom.get_ylim()[1]))
    return any(drawn)


def _updates(run: Run, figure: Chart) -> bool:
    """Gradient norms, on a scale of powers of ten where they span more than one, and learning rates."""
    top, bottom = _two_rows(figure)
    parts = (("student", BLUE, "student"), ("e_step", ORANGE, "E-step"))
    norms, rates = ([(f"{p}/{what}", c, name) for p, c, name in parts] for what in ("grad_norm", "rate"))
    logged = [v for key, *_ in norms for v in run.series(key)[1]]
    drawn = [
        _curves(top, run, "gradient norm", *norms, x=""),
        _curves(bottom, run, "learning rate", *rates, legend=False),
    ]
    if logged and min(logged) > 0 and max(logged) > 10 * min(logged):
        top.set_yscale("log")
    elif logged:
        top.set_ylim(0)
    bottom.set_ylim(0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
    return any(drawn)


def _margin(run: Run, figure: Chart) -> bool:
    """The E-step's margin if the run logged one, else that of the student's update."""
    top, bottom = _two_rows(figure)
    top.axhline(0, color=GREY, lw=1)
    bottom.axhline(0.5, color=GREY, lw=1)
    e_step = bool(run.series("e_step/margin")[0])
    curves = [("e_step/margin", BLUE, "before the E-step"), ("e_step/margin_after", ORANGE, "after it")]
    part = "e_step" if e_step else "student"
    drawn = [
        _curves(top, run, "margin", *(curves if e_step else [("student/margin", BLUE, "margin")]), x="", legend=e_step),
        _curves(bottom, run, "AUC", (f"{part}/auc", BLUE, "AUC"), legend=False),
    ]
    bottom.set_ylim(min(0.45, bottom.get_ylim()[0]), 1.03)
    return any(drawn)


def _divergence(run: Run, figure: Chart) -> bool:
    axis = figure.subplots()
    right = ("student/divergence_right", GREEN, "right completions")
    wrong = ("student/divergence_wrong", RED, "wrong completions")
    drawn = _curves(axis, run, "nats a token", right, wrong)
    axis.set_ylim(0, max(0.05, axis.get_ylim()[1]))
    return drawn


def _entropy(run: Run, figure: Chart) -> bool:
    axis = figure.subplots()
    student, teacher = ("student/entropy", BLUE, "student"), ("student/teacher_entropy", ORANGE, "teacher")
    drawn = _curves(axis, run, "nats a token", student, teacher)
    axis.set_ylim(0, max(0.05, axis.get_ylim()[1]))
    return drawn


def _seconds(run: Run, figure: Chart) -> bool:
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


def _memory(run: Run, figure: Chart) -> bool:
    top, bottom = _two_rows(figure)
    drawn = [
        _curves(top, run, "peak, MiB", ("peak_memory_mb", PURPLE, "peak"), x="", legend=False),
        _curves(bottom, run, "tokens/s", ("tokens_per_s", BLUE, "speed"), legend=False),
    ]
    top.set_ylim(bottom=0)
    bottom.set_ylim(bottom=0)
    return any(drawn)


def run_plots(run: Run) -> dict[str, Plot]:
    """All plots for which the run has figures, as SVG by name."""
    learning = (_accuracy, _gap, _reward, _groups, _margin, _length, _divergence, _entropy, _contexts, _updates)
    plots = (*learning, _seconds, _memory)
    return drawn({draw.__name__.removeprefix("_"): partial(draw, run) for draw in plots})


def comparison_plots(runs: Mapping[str, Run]) -> dict[str, Plot]:
    """Plots with a curve for every run, as SVG by name."""
    looks = [(CYCLE[i % 6], label, DASHES[i // 6 % 4]) for i, label in enumerate(runs)]

    def evaluation(key: str, figure: Chart) -> bool:
        bands = [(run, key, *look) for run, look in zip(runs.values(), looks, strict=True)]
        return _accuracies(figure.subplots(), bands, legend=False)

    def metric(key: str, y: str, least: float, figure: Chart) -> bool:
        axis = figure.subplots()
        lines = [run.series(key) for run in runs.values()]
        # All marked or all smoothed; a single point can only be marked.
        few = FEW_POINTS if max(len(x) for x, _ in lines) <= FEW_POINTS else 2
        found = [_line(axis, line, *look, few) for line, look in zip(lines, looks, strict=True)]
        _finish(axis, y=y, legend=False, least=least)
        return any(found)

    return drawn(
        {
            "student": partial(evaluation, "student"),
            "greedy": partial(evaluation, "student_greedy"),
            "teacher": partial(evaluation, "teacher"),
            "reward": partial(metric, "reward", "score, 0 to 1", 0.1),
            "entropy": partial(metric, "student/entropy", "nats a token", 0.05),
            "length": partial(metric, "length", "tokens", 1),
        }
    )


def legend_colors(count: int) -> list[str]:
    """The page's variables for the lines of a comparison, in order."""
    return [NAMES[CYCLE[i % len(CYCLE)]] for i in range(count)]
