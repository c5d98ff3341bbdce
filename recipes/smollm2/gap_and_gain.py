"""Does the gap that `vpd-mlx probe` finds before training foretell the gain? Prints a table, draws a picture.

    python gap_and_gain.py benchmarks/smollm2 --out gap.png

The folder has what `vpd-mlx probe --json` printed in probes/<task>.json, and the run of each source alone in
others/<task>-<source>. The gap is the teacher's accuracy less the student's, both sampled, on training problems; the gain is that
of the student's greedy accuracy on held-out problems.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

import vpd_mlx as vpd

mpl.use("Agg")
import matplotlib.pyplot as plt

DRAWS = 10_000


def pairs(folder: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """(task-source, student, teacher, evaluations of the run) of every source that was probed and trained with."""
    for file in sorted((folder / "probes").glob("*.json")):
        found = json.loads(file.read_text())
        for teacher in found["teachers"]:
            run = folder / "others" / f"{file.stem}-{teacher['source']}"
            if run.is_dir():
                yield run.name, found["student"], teacher, vpd.load_run(run).evals


def correlation(gaps: np.ndarray, gains: np.ndarray) -> tuple[float, float, float]:
    """Pearson's r and a 95 % bootstrap interval over pairs."""
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
    parser.add_argument("folder", type=Path, help="folder with probes/ and others/")
    parser.add_argument("--out", type=Path, default=Path("gap.png"))
    given = parser.parse_args()
    print("| pair | student | teacher | gap | its interval | greedy before | greedy after | gain |")
    print("|---|---|---|---|---|---|---|---|")
    gaps, gains = [], []
    figure, axis = plt.subplots(figsize=(5.2, 3.8))
    for name, student, teacher, evaluations in pairs(given.folder):
        gap, before, after = teacher["gap"], evaluations[0]["student_greedy"], evaluations[-1]["student_greedy"]
        x, y = 100 * gap["difference"], 100 * (after - before)
        sampled = f"{100 * student['sampled']:.0f} | {100 * teacher['sampled']:.0f} | {x:.0f}"
        between = f"{100 * gap['low']:.0f} to {100 * gap['high']:.0f}"
        print(f"| {name} | {sampled} | {between} | {100 * before:.0f} | {100 * after:.0f} | {y:.0f} |")
        axis.errorbar(x, y, xerr=[[x - 100 * gap["low"]], [100 * gap["high"] - x]], fmt="o", color="C0", lw=0.8)
        crowded = any(abs(x - a) < 5 and abs(y - b) < 5 for a, b in zip(gaps, gains, strict=True))
        axis.annotate(name, (x, y), fontsize=6, xytext=(3, -8 if crowded else 3), textcoords="offset points")
        gaps, gains = [*gaps, x], [*gains, y]
    axis.set(xlabel="gap before training: teacher - student, points", ylabel="gain in greedy accuracy, points")
    axis.grid(alpha=0.3)
    if len(gaps) > 2:
        r, low, high = correlation(np.array(gaps), np.array(gains))
        print(f"\nr = {r:.2f} (95 % interval {low:.2f} to {high:.2f}, {len(gaps)} pairs)")
        axis.set_title(f"r = {r:.2f} ({low:.2f} to {high:.2f})", fontsize=9)
    figure.tight_layout()
    figure.savefig(given.out, dpi=110)
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
