"""The lab: a grid of settings, methods and seeds, all tuned alike, and which claims its runs support.

A grid is one YAML file. Every method first gets the same sweep of learning rates, on a seed kept for that; then it runs on all
seeds at its best rate. A grid with one rate has no sweep. Each run is a run folder, made by `vpd-mlx train` in a process of its
own: finished runs are not repeated, and interrupted ones go on from their checkpoint.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from pydantic import Field, ValidationError

from vpd_mlx.common.files import read_rows, write_atomic
from vpd_mlx.common.settings import Section, parse_yaml
from vpd_mlx.errors import ConfigError, Fault, RunError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.run.records import upgraded

__all__ = ["best_rates", "check_recipe", "curves", "load_grid", "results", "run_grid", "sweep_table", "table"]

mpl.use("Agg")

# Two-sided 95 % quantiles of Student's t by degrees of freedom (1 to 30); beyond, the normal's.
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Measure = Literal["final", "best", "drop", "margin_change"]


class Tune(Section):
    """The sweep that every method gets."""

    rates: list[float] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)


class Part(Section):
    """One setting with the methods that run in it."""

    setting: str
    methods: list[str] = Field(min_length=1)


class Claim(Section):
    """`better` beats `worse` in `setting` by `measure`."""

    id: str
    claim: str
    setting: str
    better: str
    worse: str
    measure: Measure = "final"


class Grid(Section):
    """Everything that decides a grid."""

    name: str
    recipe: str
    seeds: list[int] = Field(min_length=1)
    threshold: float = Field(0.5, gt=0, lt=1)
    overrides: dict[str, Any] = Field({})
    tune: Tune
    settings: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    same_rate: dict[str, str] = Field({})
    parts: list[Part]
    findings: list[Claim] = Field([])

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(setting, method) of everything that runs."""
        return [(part.setting, method) for part in self.parts for method in part.methods]

    @property
    def tuned(self) -> list[tuple[str, str]]:
        """The pairs that have a sweep; the others take the rate of the method that `same_rate` names, or the only one."""
        if len(self.tune.rates) == 1:
            return []
        return [(setting, method) for setting, method in self.pairs if method not in self.same_rate]

    def sweep(self, setting: str, method: str, rate: float) -> list[Cell]:
        """The runs of a sweep at one rate."""
        return [Cell(setting, method, seed, rate, True) for seed in self.tune.seeds]

    def recipe_overrides(self, setting: str, method: str) -> dict[str, Any]:
        """What a setting and a method change in the recipe."""
        return {**self.overrides, **self.settings[setting], **self.methods[method]}


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
        """Where the run lies within the grid's folder."""
        part = f"tune-{self.rate:g}" if self.tuning else "runs"
        return f"{part}/{self.setting}/{self.method}/seed{self.seed}"


@dataclass(frozen=True)
class Result:
    """One finished run's figures: accuracies in 0..1, `curve` of (step, student's avg@k)."""

    cell: Cell
    before: float
    final: float
    greedy_before: float
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
        """A figure by its name; larger is better except for `drop`.

        `drop` is best minus final. `margin_change` is the mean margin of the last tenth of the steps minus that of the first
        tenth; a margin is r~ of right minus r~ of wrong completions, over beta.
        """
        if name != "margin_change":
            return {"final": self.final, "best": self.best, "drop": self.best - self.final}[name]
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
        grid = Grid.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except OSError as error:
        fault = Fault(str(path), f"cannot be read ({error.strerror})", "give a grid's .yaml file")
        raise ConfigError([fault]) from None
    except ValidationError as error:
        places = [(".".join(map(str, e["loc"])) or "grid", e["msg"]) for e in error.errors()]
        raise ConfigError([Fault(*p, "see recipes/lab/README.md") for p in places], str(path)) from None
    if faults := list(_undefined(grid)):
        raise ConfigError(faults, str(path))
    return grid


def _undefined(grid: Grid) -> Iterator[Fault]:
    for i, part in enumerate(grid.parts):
        if part.setting not in grid.settings:
            yield Fault(f"parts.{i}.setting", f"{part.setting!r} is not defined", "add it to settings")
        for method in part.methods:
            if method not in grid.methods:
                yield Fault(f"parts.{i}.methods", f"{method!r} is not defined", "add it to methods")
    for claim in grid.findings:
        for method in (claim.better, claim.worse):
            if (claim.setting, method) not in grid.pairs:
                problem = f"{method!r} does not run in {claim.setting!r}"
                yield Fault(f"findings.{claim.id}", problem, "add it to that part")


def check_recipe(grid: Grid, recipe: Path) -> None:
    """Load every pair's recipe once, before the first run starts.

    Raises:
        ConfigError: a setting or a method does not fit the recipe.
    """
    for pair in grid.pairs:
        load_recipe(recipe, list(grid.recipe_overrides(*pair).items()))


def run_grid(grid: Grid, recipe: Path, out: Path, *, jobs: int, say: Callable[[str], None]) -> None:
    """Run everything that is not finished, `jobs` at a time: first the sweeps, then all seeds at each method's best rate.

    Raises:
        RunError: a run failed; the others are finished first, and the next call tries it again.
    """

    def finish(cells: Sequence[Cell], title: str) -> None:
        waiting = [c for c in cells if not (out / c.folder / "summary.json").exists()]
        say(f"{title}: {len(cells) - len(waiting)} of {len(cells)} runs are finished, {len(waiting)} to go")
        failed = []
        with ThreadPoolExecutor(jobs) as pool:
            for i, (cell, error) in enumerate(pool.map(lambda c: (c, _run_one(grid, recipe, out, c)), waiting), 1):
                say(f"{title}: {i}/{len(waiting)} {cell.folder}{f' FAILED: {error}' if error else ''}")
                if error:
                    failed.append(f"{cell.folder}: {error}")
        if failed:
            raise RunError(f"{len(failed)} of {len(waiting)} runs failed, first {failed[0]}")

    finish([cell for pair in grid.tuned for rate in grid.tune.rates for cell in grid.sweep(*pair, rate)], "sweep")
    rates = best_rates(grid, out)
    write_atomic(out / "rates.json", json.dumps({f"{s}/{m}": r for (s, m), r in rates.items()}, indent=1))
    finish([Cell(*pair, seed, rates[pair], False) for seed in grid.seeds for pair in grid.pairs], "seeds")


def _run_one(grid: Grid, recipe: Path, out: Path, cell: Cell) -> str | None:
    """Train one run in a process of its own; returns the last line of its error."""
    folder = out / cell.folder
    command = [sys.executable, "-m", "vpd_mlx", "train", "--quiet"]
    if (folder / "checkpoints").exists():
        command += ["--resume", str(folder)]
    else:
        command += [str(recipe), "--out", str(folder), "--overwrite", "--seed", str(cell.seed)]
        overrides = {**grid.recipe_overrides(cell.setting, cell.method), "optimizer.learning_rate": cell.rate}
        for key, value in overrides.items():
            is_folder = key == "model" and value.startswith(".")
            text = str((recipe.parent / value).resolve()) if is_folder else json.dumps(value)
            command += ["--set", f"{key}={text}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def best_rates(grid: Grid, out: Path) -> dict[tuple[str, str], float]:
    """Each pair's best rate, by the mean final accuracy of its sweep; ties go to the lower rate."""
    rates: dict[tuple[str, str], float] = {}
    if len(grid.tune.rates) == 1:
        return dict.fromkeys(grid.pairs, grid.tune.rates[0])
    for pair in grid.tuned:
        scores = {rate: _swept(grid, out, *pair, rate) for rate in grid.tune.rates}
        rates[pair] = max(sorted(scores), key=lambda r: scores[r])
    for setting, method in grid.pairs:
        if method in grid.same_rate:
            rates[setting, method] = rates[setting, grid.same_rate[method]]
    return rates


def _swept(grid: Grid, out: Path, setting: str, method: str, rate: float) -> float:
    """Mean final accuracy of a sweep's runs at one rate."""
    return float(np.mean([_result(out, cell, grid).final for cell in grid.sweep(setting, method, rate)]))


def results(grid: Grid, out: Path) -> list[Result]:
    """The figures of every finished run."""
    rates = best_rates(grid, out)
    return [_result(out, Cell(*pair, seed, rates[pair], False), grid) for pair in grid.pairs for seed in grid.seeds]


def _result(out: Path, cell: Cell, grid: Grid) -> Result:
    folder = out / cell.folder
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    curve = tuple((int(e["step"]), float(e["student"])) for e in read_rows(folder / "evals.jsonl"))
    metrics = [upgraded(row) for row in read_rows(folder / "metrics.jsonl")]
    tokens = np.cumsum([m["length"] * (sum(m["contexts"].values()) + m["contexts_none"]) for m in metrics])
    reached = next((step for step, value in curve if value >= grid.threshold), None)
    return Result(
        cell=cell,
        before=summary["before"]["student"],
        final=summary["after"]["student"],
        greedy_before=summary["before"]["student_greedy"],
        greedy=summary["after"]["student_greedy"],
        teacher=summary["after"]["teacher"],
        curve=curve,
        margins=tuple(m["student/margin"] for m in metrics if m.get("student/margin") is not None),
        steps_to=reached,
        tokens_to=None if reached is None else int(tokens[reached - 1]) if reached else 0,
        seconds=summary["seconds"]["wall"],
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
    """A claim with the mean difference that the runs show, paired by seed, and the half width of its 95 % interval."""

    claim: Claim
    difference: float
    half: float

    @property
    def verdict(self) -> str:
        """`reproduced`, `not reproduced`, or `within noise` if the interval holds 0."""
        if self.difference - self.half > 0:
            return "reproduced"
        return "not reproduced" if self.difference + self.half < 0 else "within noise"


def claim_results(grid: Grid, found: Sequence[Result]) -> list[ClaimResult]:
    """What the runs say about each claim."""
    by = {(r.cell.setting, r.cell.method, r.cell.seed): r for r in found}

    def difference(c: Claim, seed: int) -> float:
        better, worse = (by[c.setting, method, seed].measure(c.measure) for method in (c.better, c.worse))
        return better - worse

    return [ClaimResult(c, *mean_interval([difference(c, seed) for seed in grid.seeds])) for c in grid.findings]


def _markdown(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines, an empty one after it."""
    return [head, "|" + "---|" * (head.count("|") - 1), *(f"| {' | '.join(row)} |" for row in rows), ""]


def _per_cent(values: Sequence[float]) -> str:
    mean, half = mean_interval(values)
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


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
        *(_per_cent([r.best for r in runs]), _per_cent([r.measure("drop") for r in runs])),
        steps + of,
        f"{np.median([r.tokens_to for r in reached]):,.0f}" if reached else "-",
    ]


def table(grid: Grid, found: Sequence[Result], rates: Mapping[tuple[str, str], float]) -> str:
    """The methods by setting and the claims, in Markdown."""
    lines = [f"{len(grid.seeds)} seeds; mean ± 95 % interval (Student's t over seeds); accuracies in %.", ""]
    to = f"steps to {grid.threshold:.0%} | tokens to it"
    for part in grid.parts:
        of = {m: [r for r in found if (r.cell.setting, r.cell.method) == (part.setting, m)] for m in part.methods}
        rows = [_method_row(m, rates[part.setting, m], runs) for m, runs in of.items()]
        head = f"| method | rate | before | after | greedy before | greedy after (by seed) | best | drop from best | {to} |"
        lines += [f"### {part.setting}", "", *_markdown(head, rows)]
    if grid.findings:
        claims = []
        for tested in claim_results(grid, found):
            unit = 1 if tested.claim.measure == "margin_change" else 100
            difference = f"{unit * tested.difference:+.2f} ± {unit * tested.half:.2f}"
            claims.append([tested.claim.id, tested.claim.claim, difference, f"**{tested.verdict}**"])
        lines += ["### Claims", "", *_markdown("| | claim | difference, paired by seed | verdict |", claims)]
    minutes = sum(r.seconds for r in found) / 60
    lines.append(f"{len(found)} runs, {minutes:.0f} minutes of one process each, one after another.")
    return "\n".join(lines) + "\n"


def sweep_table(grid: Grid, out: Path) -> str:
    """The sweep in Markdown: final accuracy at each rate."""
    rows = [
        [*pair, *(f"{100 * _swept(grid, out, *pair, rate):.1f}" for rate in grid.tune.rates)] for pair in grid.tuned
    ]
    return "\n".join(_markdown(f"| setting | method | {' | '.join(f'{r:g}' for r in grid.tune.rates)} |", rows))


def curves(grid: Grid, found: Sequence[Result], path: Path) -> None:
    """Plot the student's accuracy over steps, mean and 95 % band over seeds, one panel per setting, as a PNG or SVG file."""
    figure, axes = plt.subplots(1, len(grid.parts), figsize=(4.6 * len(grid.parts), 3.6), sharey=True, squeeze=False)
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
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("student on held-out problems, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
