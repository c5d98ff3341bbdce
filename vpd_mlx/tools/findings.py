"""What a grid's runs say: tables in Markdown, claims with their verdicts, curves."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from vpd_mlx.common.stats import holm, paired_t
from vpd_mlx.tools.lab import Claim, Grid, Result, sweep_runs

__all__ = ["ClaimResult", "claim_results", "curves", "mean_interval", "sweep_table", "table"]

mpl.use("Agg")

LEVEL = 0.05  # of all claims of a grid together

# Two-sided 95 % quantiles of Student's t by degrees of freedom (1 to 30); beyond, the normal's.
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t; the half width for one value is infinite."""
    data = np.asarray(values, np.float64)
    if len(data) < 2:
        return float(data.mean()), math.inf
    quantile = T95[len(data) - 2] if len(data) - 1 <= len(T95) else 1.96
    return float(data.mean()), float(quantile * data.std(ddof=1) / math.sqrt(len(data)))


@dataclass(frozen=True)
class ClaimResult:
    """A claim with the mean difference that the runs show, paired by seed, and the half width of its 95 % interval.

    `p` is adjusted for all claims of the grid. `untuned` are its arms whose best rate lies at the edge of the sweep.
    """

    claim: Claim
    difference: float
    half: float
    p: float
    untuned: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """`reproduced` or `not reproduced`, after the correction; `within noise`; or `open` where an arm is not tuned."""
        if self.untuned:
            return f"open: the best rate of {' and '.join(self.untuned)} is at the edge of the sweep"
        if not self.p < LEVEL:
            return "within noise"
        return "reproduced" if self.difference > 0 else "not reproduced"


def claim_results(grid: Grid, found: Sequence[Result], edge: Collection[tuple[str, str]] = ()) -> list[ClaimResult]:
    """What the runs say about each claim; `edge` has the pairs (`on_edge`) that are not tuned."""
    by = {(r.cell.setting, r.cell.method, r.cell.seed): r for r in found}

    def difference(c: Claim, seed: int) -> float:
        better, worse = (by[c.setting, method, seed].measure(c.measure) for method in (c.better, c.worse))
        return better - worse

    differences = [[difference(c, seed) for seed in grid.seeds] for c in grid.findings]
    adjusted = holm([paired_t(values) for values in differences])
    return [
        ClaimResult(c, *mean_interval(values), p, tuple(m for m in (c.better, c.worse) if (c.setting, m) in edge))
        for c, values, p in zip(grid.findings, differences, adjusted, strict=True)
    ]


def _markdown(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines, an empty one after it."""
    return [head, "|" + "---|" * (head.count("|") - 1), *(f"| {' | '.join(row)} |" for row in rows), ""]


def _per_cent(values: Sequence[float]) -> str:
    mean, half = mean_interval(values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def _teacher(runs: Sequence[Result]) -> str:
    """The teacher's accuracy before and after, mean over the runs that have both."""
    both = [(r.teacher_before, r.teacher) for r in runs if r.teacher_before is not None and r.teacher is not None]
    return " → ".join(f"{100 * mean:.0f}" for mean in np.mean(both, axis=0)) if both else "-"


def _method_row(method: str, rate: float, runs: Sequence[Result]) -> list[str]:
    reached = [r for r in runs if r.steps_to is not None]
    steps = f"{np.median([r.steps_to for r in reached]):.0f}" if reached else "-"
    of = f" ({len(reached)} of {len(runs)})" if len(reached) < len(runs) else ""
    return [
        method,
        f"{rate:g}",
        f"{100 * np.mean([r.before for r in runs]):.1f}",
        _per_cent([r.final for r in runs]),
        f"{100 * np.mean([r.greedy_before for r in runs]):.1f}",
        f"{_per_cent([r.greedy for r in runs])} ({' '.join(f'{100 * r.greedy:.0f}' for r in runs)})",
        _teacher(runs),
        f"{100 * np.mean([r.cut for r in runs]):.0f}",
        *(_per_cent([r.best for r in runs]), _per_cent([r.measure("drop") for r in runs])),
        steps + of,
        f"{np.median([r.tokens_to for r in reached]):,.0f}" if reached else "-",
    ]


def table(
    grid: Grid,
    found: Sequence[Result],
    rates: Mapping[tuple[str, str], float],
    edge: Collection[tuple[str, str]] = (),
) -> str:
    """The methods by setting and the claims, in Markdown."""
    lines = [f"{len(grid.seeds)} seeds; mean ± 95 % interval (Student's t over seeds); accuracies in %.", ""]
    ends = "before | after | greedy before | greedy after (by seed) | teacher | cut off | best | drop from best"
    head = f"| method | rate | {ends} | steps to {grid.threshold:.0%} | tokens to it |"
    for part in grid.parts:
        of = {m: [r for r in found if (r.cell.setting, r.cell.method) == (part.setting, m)] for m in part.methods}
        rows = [_method_row(m, rates[part.setting, m], runs) for m, runs in of.items()]
        lines += [f"### {part.setting}", "", *_markdown(head, rows)]
    if grid.findings:
        claims = []
        for tested in claim_results(grid, found, edge):
            unit = 1 if tested.claim.measure == "margin_change" else 100
            difference = f"{unit * tested.difference:+.2f} ± {unit * tested.half:.2f}"
            claims.append([tested.claim.id, tested.claim.claim, difference, f"{tested.p:.2g}", f"**{tested.verdict}**"])
        head = f"| | claim | difference, paired by seed | p, adjusted for {len(claims)} | verdict |"
        lines += ["### Claims", "", *_markdown(head, claims)]
    lines.append(_spent(found))
    return "\n".join(lines) + "\n"


def sweep_table(grid: Grid, out: Path) -> str:
    """The sweep in Markdown: mean final accuracy at each rate, empty where a pair had no need of it, and what the sweep took."""
    found = {pair: sweep_runs(grid, out, pair) for pair in grid.tuned}
    rates = sorted({rate for runs in found.values() for rate in runs})
    rows = [
        [*pair, *(f"{100 * np.mean([r.final for r in runs[rate]]):.1f}" if rate in runs else "" for rate in rates)]
        for pair, runs in found.items()
    ]
    lines = _markdown(f"| setting | method | {' | '.join(f'{r:g}' for r in rates)} |", rows)
    return "\n".join([*lines, _spent([r for runs in found.values() for at in runs.values() for r in at]), ""])


def _spent(runs: Sequence[Result]) -> str:
    return f"{len(runs)} runs, {sum(r.seconds for r in runs) / 60:.0f} minutes of one process each, one after another."


def curves(grid: Grid, found: Sequence[Result], path: Path) -> None:
    """Plot the student's accuracy over steps, mean and 95 % band over seeds, one panel per setting, as a PNG or SVG file."""
    figure, axes = plt.subplots(1, len(grid.parts), figsize=(5.8 * len(grid.parts), 3.6), sharey=True, squeeze=False)
    for axis, part in zip(axes[0], grid.parts, strict=True):
        for method in part.methods:
            index = list(grid.methods).index(method)  # a method's colour is the same in every panel
            runs = [r.curve for r in found if (r.cell.setting, r.cell.method) == (part.setting, method)]
            steps = [s for s, _ in runs[0]]
            means, half = np.array([mean_interval([dict(curve)[s] for curve in runs]) for s in steps]).T
            half = np.where(np.isfinite(half), half, 0.0)
            color = f"C{index % 10}"
            axis.plot(steps, 100 * means, color=color, label=method, lw=1.6, ls="-" if index < 10 else "--")
            axis.fill_between(steps, 100 * (means - half), 100 * (means + half), color=color, alpha=0.13, lw=0)
        axis.set(title=part.setting, xlabel="step", ylim=(0, 100))
        axis.grid(alpha=0.3)
        # Beside the curves, not over them.
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)
    axes[0][0].set_ylabel("student on held-out problems, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
