"""The lab: a grid of settings, methods and seeds, tuned alike, and what it says about each claim.

A grid is one YAML file. Every method first gets the same sweep of learning rates on a seed of its own; then it runs on all seeds
at its best rate. A run is a run folder, made by `vpd-mlx train` in a process of its own: what is finished is not run again, what
was interrupted goes on.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpd_mlx.common.files import read_rows, write_atomic
from vpd_mlx.errors import ConfigError, Fault, RunError
from vpd_mlx.recipe import load_recipe

__all__ = [
    "Cell",
    "Grid",
    "Result",
    "best_rates",
    "check_recipe",
    "curves",
    "interval",
    "load_grid",
    "results",
    "run_grid",
    "sweep_table",
    "table",
    "verdicts",
]

mpl.use("Agg")

# Two-sided 95 % quantiles of Student's t by degrees of freedom (1 to 30); beyond, the normal's.
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Measure = Literal["final", "best", "drop", "margin_change"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Tune(_Strict):
    """The sweep that every method gets."""

    rates: list[float] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)


class Part(_Strict):
    """One setting with the methods that run in it."""

    setting: str
    methods: list[str] = Field(min_length=1)


class Finding(_Strict):
    """A claim: `better` beats `worse` in `setting` by `measure`."""

    id: str
    claim: str
    setting: str
    better: str
    worse: str
    measure: Measure = "final"


class Grid(_Strict):
    """All that decides a grid."""

    name: str
    recipe: str
    seeds: list[int] = Field(min_length=1)
    threshold: float = Field(0.5, gt=0, lt=1)
    overrides: dict[str, Any] = {}
    tune: Tune
    settings: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    same_rate: dict[str, str] = {}
    parts: list[Part]
    findings: list[Finding] = []


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    setting: str
    method: str
    seed: int
    rate: float
    tuning: bool

    @property
    def folder(self) -> str:
        """Where it lies within the grid's folder."""
        part = f"tune-{self.rate:g}" if self.tuning else "runs"
        return f"{part}/{self.setting}/{self.method}/seed{self.seed}"


@dataclass(frozen=True)
class Result:
    """One finished run's figures: accuracies in 0..1, `curve` of (step, student's avg@k)."""

    cell: Cell
    before: float
    final: float
    greedy: float
    teacher: float | None
    curve: tuple[tuple[int, float], ...]
    margins: tuple[float, ...]
    steps_to: int | None
    tokens_to: int | None
    seconds: float

    @property
    def best(self) -> float:
        """The best evaluation of the run."""
        return max(v for _, v in self.curve)

    def measure(self, name: Measure) -> float:
        """A figure by its name; larger is better for all but `drop`.

        `drop` is best less final; `margin_change` is the mean of the last tenth of the margins, r~ of right less r~ of wrong
        completions over beta, less that of the first tenth.
        """
        if name == "final":
            return self.final
        if name == "best":
            return self.best
        if name == "drop":
            return self.best - self.final
        if len(self.margins) < 2:
            return math.nan
        n = max(1, len(self.margins) // 10)
        return float(np.mean(self.margins[-n:]) - np.mean(self.margins[:n]))


def load_grid(path: Path) -> Grid:
    """Read and check a grid.

    Raises:
        ConfigError: it cannot be read, or names a setting or method that it does not define.
    """
    try:
        grid = Grid.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(
            [Fault(str(path), f"cannot be read ({error.strerror})", "give a grid's .yaml file")]
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError([Fault("text", f"not valid YAML ({error})", "mend it")], str(path)) from None
    except ValidationError as error:
        faults = [
            Fault(".".join(map(str, e["loc"])) or "grid", e["msg"], "see recipes/lab/README.md") for e in error.errors()
        ]
        raise ConfigError(faults, str(path)) from None
    faults = []
    for i, part in enumerate(grid.parts):
        if part.setting not in grid.settings:
            faults.append(Fault(f"parts.{i}.setting", f"{part.setting!r} is not defined", "add it to settings"))
        faults += [
            Fault(f"parts.{i}.methods", f"{m!r} is not defined", "add it to methods")
            for m in part.methods
            if m not in grid.methods
        ]
    ran = {(p.setting, m) for p in grid.parts for m in p.methods}
    for f in grid.findings:
        faults += [
            Fault(f"findings.{f.id}", f"{m!r} does not run in {f.setting!r}", "add it to that part")
            for m in (f.better, f.worse)
            if (f.setting, m) not in ran
        ]
    if faults:
        raise ConfigError(faults, str(path))
    return grid


def _pairs(grid: Grid) -> Iterator[tuple[str, str]]:
    for part in grid.parts:
        for method in part.methods:
            yield part.setting, method


def run_grid(grid: Grid, recipe: Path, out: Path, *, jobs: int, say: Any) -> None:
    """Run all cells that are not finished, `jobs` at a time: the sweep first, then the seeds at each method's best rate.

    Raises:
        RunError: a run failed; the others are finished first, and the next call tries it again.
    """
    tuning = [
        Cell(s, m, seed, rate, True)
        for s, m in _pairs(grid)
        if m not in grid.same_rate
        for rate in grid.tune.rates
        for seed in grid.tune.seeds
    ]
    _run_all(grid, recipe, out, tuning, jobs, say, "sweep")
    rates = best_rates(grid, out)
    write_atomic(out / "rates.json", json.dumps({f"{s}/{m}": r for (s, m), r in rates.items()}, indent=1))
    cells = [Cell(s, m, seed, rates[s, m], False) for seed in grid.seeds for s, m in _pairs(grid)]
    _run_all(grid, recipe, out, cells, jobs, say, "seeds")


def best_rates(grid: Grid, out: Path) -> dict[tuple[str, str], float]:
    """Each method's best rate in each setting, by the mean final accuracy of its sweep; ties go to the lower rate."""
    rates: dict[tuple[str, str], float] = {}
    for s, m in _pairs(grid):
        if m in grid.same_rate:
            continue
        scores = {
            rate: float(np.mean([_result(out, Cell(s, m, seed, rate, True), grid).final for seed in grid.tune.seeds]))
            for rate in grid.tune.rates
        }
        rates[s, m] = max(sorted(scores), key=lambda r: scores[r])
    for s, m in _pairs(grid):
        if m in grid.same_rate:
            rates[s, m] = rates[s, grid.same_rate[m]]
    return rates


def _run_all(grid: Grid, recipe: Path, out: Path, cells: Sequence[Cell], jobs: int, say: Any, title: str) -> None:
    waiting = [c for c in cells if not (out / c.folder / "summary.json").exists()]
    say(f"{title}: {len(cells) - len(waiting)} of {len(cells)} runs are there, {len(waiting)} to go")
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        for i, (cell, error) in enumerate(pool.map(lambda c: (c, _run_one(grid, recipe, out, c)), waiting), 1):
            say(f"{title}: {i}/{len(waiting)} {cell.folder}{f' FAILED: {error}' if error else ''}")
            if error:
                failed.append(f"{cell.folder}: {error}")
    if failed:
        raise RunError(f"{len(failed)} of {len(waiting)} runs failed, first {failed[0]}")


def _run_one(grid: Grid, recipe: Path, out: Path, cell: Cell) -> str | None:
    folder = out / cell.folder
    command = [sys.executable, "-m", "vpd_mlx", "train"]
    if (folder / "checkpoints").exists():
        command += ["--resume", str(folder)]
    else:
        command += [str(recipe), "--out", str(folder), "--overwrite", "--seed", str(cell.seed)]
        overrides = {
            **grid.overrides,
            **grid.settings[cell.setting],
            **grid.methods[cell.method],
            "optimizer.learning_rate": cell.rate,
        }
        for key, value in overrides.items():
            text = (
                str((recipe.parent / value).resolve())
                if key == "model" and value.startswith(".")
                else json.dumps(value)
            )
            command += ["--set", f"{key}={text}"]
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def _result(out: Path, cell: Cell, grid: Grid) -> Result:
    folder = out / cell.folder
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    curve = tuple((int(e["step"]), float(e["student"])) for e in read_rows(folder / "evals.jsonl"))
    metrics = read_rows(folder / "metrics.jsonl")
    tokens = np.cumsum([m["length"] * _rollouts(m) for m in metrics])
    reached = next((step for step, value in curve if value >= grid.threshold), None)
    return Result(
        cell=cell,
        before=summary["before"]["student"],
        final=summary["after"]["student"],
        greedy=summary["after"]["student_greedy"],
        teacher=summary["after"]["teacher"],
        curve=curve,
        margins=tuple(m["m_step/margin"] for m in metrics if m.get("m_step/margin") is not None),
        steps_to=reached,
        tokens_to=None if reached is None else int(tokens[reached - 1]) if reached else 0,
        seconds=summary["seconds"]["wall"],
    )


def _rollouts(metrics: Mapping[str, Any]) -> int:
    return int(sum(metrics["contexts"].values()) + metrics["contexts_none"])


def results(grid: Grid, out: Path) -> list[Result]:
    """The figures of every finished run."""
    rates = best_rates(grid, out)
    return [_result(out, Cell(s, m, seed, rates[s, m], False), grid) for s, m in _pairs(grid) for seed in grid.seeds]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t; the half width of one value is infinite."""
    data = np.asarray(values, np.float64)
    if len(data) < 2:
        return float(data.mean()), math.inf
    quantile = T95[len(data) - 2] if len(data) - 1 <= len(T95) else 1.96
    return float(data.mean()), float(quantile * data.std(ddof=1) / math.sqrt(len(data)))


def verdicts(grid: Grid, found: Sequence[Result]) -> list[dict[str, Any]]:
    """What the runs say of each claim, by the difference paired by seed: reproduced, not reproduced, or within noise."""
    by = {(r.cell.setting, r.cell.method, r.cell.seed): r for r in found}
    out = []
    for f in grid.findings:
        pairs = [
            (by[f.setting, f.better, s].measure(f.measure), by[f.setting, f.worse, s].measure(f.measure))
            for s in grid.seeds
        ]
        differences = [a - b for a, b in pairs]
        mean, half = interval(differences)
        if mean - half > 0:
            verdict = "reproduced"
        elif mean + half < 0:
            verdict = "not reproduced"
        else:
            verdict = "within noise"
        out.append(
            {
                "id": f.id,
                "claim": f.claim,
                "difference": mean,
                "half": half,
                "seeds": len(pairs),
                "verdict": verdict,
                "unit": 1 if f.measure == "margin_change" else 100,
            }
        )
    return out


def table(grid: Grid, found: Sequence[Result], rates: Mapping[tuple[str, str], float]) -> str:
    """Everything in Markdown: methods by setting, the claims, the sweep's choices."""

    def pm(values: Sequence[float], scale: float = 100) -> str:
        mean, half = interval(values)
        return f"{scale * mean:.1f} ± {scale * half:.1f}"

    lines = [f"{len(grid.seeds)} seeds; mean ± 95 % interval (Student's t over seeds); accuracies in %.", ""]
    for part in grid.parts:
        lines += [
            f"### {part.setting}",
            "",
            f"| method | rate | before | after | greedy | best | drop from best | steps to {grid.threshold:.0%} | tokens to it |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for m in part.methods:
            runs = [r for r in found if (r.cell.setting, r.cell.method) == (part.setting, m)]
            reached = [r for r in runs if r.steps_to is not None]
            steps = f"{np.median([r.steps_to for r in reached]):.0f}" if reached else "-"
            tokens = f"{np.median([r.tokens_to for r in reached]):,.0f}" if reached else "-"
            share = f" ({len(reached)} of {len(runs)})" if len(reached) < len(runs) else ""
            before = 100 * np.mean([r.before for r in runs])
            lines.append(
                f"| {m} | {rates[part.setting, m]:g} | {before:.1f} | {pm([r.final for r in runs])} "
                f"| {pm([r.greedy for r in runs])} | {pm([r.best for r in runs])} | {pm([r.best - r.final for r in runs])} "
                f"| {steps}{share} | {tokens} |"
            )
        lines.append("")
    if grid.findings:
        lines += ["### Claims", "", "| | claim | difference, paired by seed | verdict |", "|---|---|---|---|"]
        for v in verdicts(grid, found):
            unit = v["unit"]
            lines.append(
                f"| {v['id']} | {v['claim']} | {unit * v['difference']:+.2f} ± {unit * v['half']:.2f} | **{v['verdict']}** |"
            )
        lines.append("")
    minutes = sum(r.seconds for r in found) / 60
    lines.append(f"{len(found)} runs, {minutes:.0f} minutes of one process each, one after another.")
    return "\n".join(lines) + "\n"


def sweep_table(grid: Grid, out: Path) -> str:
    """The sweep in Markdown: final accuracy at each rate."""
    head = " | ".join(f"{r:g}" for r in grid.tune.rates)
    lines = [f"| setting | method | {head} |", "|---|---|" + "---|" * len(grid.tune.rates)]
    for s, m in _pairs(grid):
        if m in grid.same_rate:
            continue
        row = [
            f"{100 * np.mean([_result(out, Cell(s, m, seed, rate, True), grid).final for seed in grid.tune.seeds]):.1f}"
            for rate in grid.tune.rates
        ]
        lines.append(f"| {s} | {m} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def check_recipe(grid: Grid, recipe: Path) -> None:
    """Every cell's recipe is loaded once before the first run starts.

    Raises:
        ConfigError: a setting or a method does not fit the recipe.
    """
    for s, m in _pairs(grid):
        load_recipe(recipe, list({**grid.overrides, **grid.settings[s], **grid.methods[m]}.items()))


def curves(grid: Grid, found: Sequence[Result], path: Path) -> None:
    """The student's accuracy over steps, mean and 95 % band over seeds, a panel a setting, as a PNG or SVG file."""
    figure, axes = plt.subplots(1, len(grid.parts), figsize=(4.6 * len(grid.parts), 3.6), sharey=True, squeeze=False)
    for axis, part in zip(axes[0], grid.parts, strict=True):
        for method in part.methods:
            number = list(grid.methods).index(method)  # a method's colour is the same in every panel
            runs = [r.curve for r in found if (r.cell.setting, r.cell.method) == (part.setting, method)]
            steps = [s for s, _ in runs[0]]
            bands = [interval([dict(curve)[s] for curve in runs]) for s in steps]
            means = np.array([m for m, _ in bands])
            half = np.array([h if math.isfinite(h) else 0.0 for _, h in bands])
            color = f"C{number % 10}"
            axis.plot(steps, 100 * means, color=color, label=method, lw=1.6, ls="-" if number < 10 else "--")
            axis.fill_between(steps, 100 * (means - half), 100 * (means + half), color=color, alpha=0.13, lw=0)
        axis.set(title=part.setting, xlabel="step", ylim=(0, 100))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("student on held-out problems, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
