"""Does the gap before training foretell the gain? Reads finished runs, prints a table, draws a picture.

    python gap_and_gain.py RUN... --out gap.png

The gap is the accuracy of the teacher less that of the student, both sampled, before the first step; the gain is that of the
student's greedy accuracy on the same held-out problems.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np

import vpd_mlx as vpd

mpl.use("Agg")
import matplotlib.pyplot as plt

DRAWS = 10_000


def correlation(gaps: np.ndarray, gains: np.ndarray) -> tuple[float, float, float]:
    """Pearson's r and a 95 % bootstrap interval over runs."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        at = draw.integers(0, len(gaps), len(gaps))
        if gaps[at].std() > 0 and gains[at].std() > 0:
            found.append(np.corrcoef(gaps[at], gains[at])[0, 1])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(np.corrcoef(gaps, gains)[0, 1]), float(low), float(high)


def main() -> None:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description="Does the gap before training foretell the gain?")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path("gap.png"))
    given = parser.parse_args()
    names, gaps, gains = [], [], []
    print(
        "| run | student before | teacher before | gap | greedy before | greedy after | gain |\n|---|---|---|---|---|---|---|"
    )
    for path in given.runs:
        evaluations = vpd.load_run(path).evals
        first, last = evaluations[0], evaluations[-1]
        gap, gain = first["gap"], last["student_greedy"] - first["student_greedy"]
        names, gaps, gains = [*names, path.name], [*gaps, gap], [*gains, gain]
        figures = (first["student"], first["teacher"], gap, first["student_greedy"], last["student_greedy"], gain)
        print(f"| {path.name} | {' | '.join(f'{100 * x:.0f}' for x in figures)} |")
    figure, axis = plt.subplots(figsize=(5.2, 3.8))
    axis.scatter(100 * np.array(gaps), 100 * np.array(gains))
    for name, x, y in zip(names, gaps, gains, strict=True):
        axis.annotate(name, (100 * x, 100 * y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set(xlabel="gap before training: teacher - student, points", ylabel="gain in greedy accuracy, points")
    axis.grid(alpha=0.3)
    if len(gaps) > 2:
        r, low, high = correlation(np.array(gaps), np.array(gains))
        print(f"\nr = {r:.2f} (95 % interval {low:.2f} to {high:.2f}, {len(gaps)} runs)")
        axis.set_title(f"r = {r:.2f} ({low:.2f} to {high:.2f})", fontsize=9)
    figure.tight_layout()
    figure.savefig(given.out, dpi=110)
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
