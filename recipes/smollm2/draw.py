"""Greedy accuracy before and after training, by task and method, from a grid's runs: a table, and a picture with a dot a seed.

    python draw.py lab-runs/smollm2-defaults --out before-after.png

The grid's folder has a run in runs/<task>/<method>/seed<n>. Unlike `vpd-mlx lab` this takes a grid that is not complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

import vpd_mlx as vpd
from vpd_mlx.run.watch import collapse
from vpd_mlx.tools.findings import mean_interval

mpl.use("Agg")
import matplotlib.pyplot as plt


def row(task: str, method: str, runs: Sequence[vpd.Run]) -> str:
    """One line of the table; intervals are Student's t over seeds."""

    def over(key: str, at: int) -> str:
        values = [100 * run.evals[at][key] for run in runs]
        mean, half = mean_interval(values)
        return f"{mean:.0f}" if len(values) < 2 else f"{mean:.0f} ± {half:.0f}"

    greedy = [[100 * e["student_greedy"] for e in run.evals] for run in runs]
    seeds = " ".join(f"{g[-1]:.0f}" for g in greedy)
    kept = min(g[-1] / max(g) if max(g) else 0.0 for g in greedy)
    fell = sum(any(collapse(run.metrics[:n]) for n in range(1, len(run.metrics) + 1)) for run in runs)
    minutes = np.median([run.summary["seconds"]["wall"] for run in runs]) / 60
    rate = f"{runs[0].config['optimizer']['learning_rate']:g}"
    cells = (
        *(task, method, rate, f"{over('student', 0)} → {over('student', -1)}"),
        *(f"{over('student_greedy', 0)} → {over('student_greedy', -1)}", seeds, f"{kept:.2f}"),
        *(f"{over('truncated', 0)} → {over('truncated', -1)}", str(fell), f"{minutes:.0f}"),
    )
    return f"| {' | '.join(cells)} |"


def rates(grid: Path) -> None:
    """The table of the sweep: greedy accuracy at the end by rate, seeds 0, 1, 2 in order, of the grid's runs and of those in
    tune/<rate>/<task>/<method>/."""
    found: dict[tuple[str, str], dict[float, str]] = {}
    for path in sorted(
        [*(grid / "runs").glob("*/*/seed*"), *(grid / "tune").glob("*/*/*/seed*")], key=lambda p: p.parts[-3:]
    ):
        task, method = path.parts[-3:-1]
        run = vpd.load_run(path)
        rate = run.config["optimizer"]["learning_rate"]
        cells = found.setdefault((task, method), {})
        cells[rate] = " ".join(filter(None, [cells.get(rate), f"{100 * run.evals[-1]['student_greedy']:.0f}"]))
    columns = sorted({rate for cells in found.values() for rate in cells})
    print(f"| task | method | {' | '.join(f'{rate:g}' for rate in columns)} |")
    print("|" + "---|" * (2 + len(columns)))
    for (task, method), cells in sorted(found.items()):
        print(f"| {task} | {method} | {' | '.join(cells.get(rate, '') for rate in columns)} |")


def main() -> None:
    """Draw every finished run."""
    parser = argparse.ArgumentParser(description="Draw greedy accuracy before and after training.")
    parser.add_argument("grid", type=Path, help="folder of the grid's runs")
    parser.add_argument("--out", type=Path, default=Path("before-after.png"))
    given = parser.parse_args()
    tasks = sorted(p for p in (given.grid / "runs").iterdir() if p.is_dir())
    methods = [m for m in ("vpd", "vpd-ema", "sdpo", "grpo") if any((task / m).is_dir() for task in tasks)]
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    width = 0.8 / (len(methods) + 1)
    print(
        "| task | method | rate | sampled, % | greedy, % | by seed | least of end / best | cut off, % | collapses | minutes |"
    )
    print("|" + "---|" * 10)
    greedy: dict[tuple[str, str], list[float]] = {}
    for i, task in enumerate(tasks):
        before: list[float] = []
        for j, method in enumerate(methods):
            runs = [vpd.load_run(p) for p in sorted((task / method).glob("seed*"))]
            before += [run.evals[0]["student_greedy"] for run in runs]
            after = [100 * run.evals[-1]["student_greedy"] for run in runs]
            at = i + (j + 1) * width
            greedy[task.name, method] = after
            if after:
                print(row(task.name, method, runs))
                axis.bar(at, np.mean(after), 0.9 * width, color=f"C{j}", label=None if i else method)
                axis.scatter([at] * len(after), after, color="black", s=9, zorder=3)
        axis.bar(i, 100 * np.mean(before), 0.9 * width, color="0.6", label=None if i else "before")
        axis.text(i, 100 * np.mean(before) + 1, f"{100 * np.mean(before):.0f}", ha="center", fontsize=8, color="0.4")
    axis.set(ylabel="right, greedy, %", ylim=(0, 104))
    axis.set_xticks([i + width * len(methods) / 2 for i in range(len(tasks))], [task.name for task in tasks])
    axis.legend(ncols=len(methods) + 1, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.16), frameon=False)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(given.out, dpi=120)
    print(f"written: {given.out}")
    for task in tasks:
        for other in methods[1:]:
            apart = [a - b for a, b in zip(greedy[task.name, "vpd"], greedy[task.name, other], strict=True)]
            mean, half = mean_interval(apart)
            print(f"{task.name}: vpd less {other}, greedy, paired by seed: {mean:+.0f} ± {half:.0f}")
    rates(given.grid)


if __name__ == "__main__":
    main()
