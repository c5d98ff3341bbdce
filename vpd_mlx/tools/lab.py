"""The lab: a grid of settings, methods and seeds, all tuned alike, and which claims its runs support.

A grid is one YAML file. Every method first gets the same sweep of learning rates, on seeds kept for that; where its best rate
is the sweep's lowest or highest, the sweep goes on beyond it. Then it runs on all seeds at its best rate. A grid with one rate
has no sweep. Each run is a run folder, made by `vpd-mlx train` in a process of its own: finished runs are not repeated, and
interrupted ones go on from their checkpoint. A folder that holds a run of other values than the grid's is refused.

A claim compares arms that were tuned alike: no method can have a rate without a sweep. Its p is that of a paired t test over
seeds, adjusted for all claims of the grid by Holm's method (Scand. J. Statist. 6, 1979).
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

import numpy as np
from pydantic import Field, ValidationError

from vpd_mlx.common.files import read_rows, write_atomic
from vpd_mlx.common.settings import Section, parse_yaml
from vpd_mlx.errors import ConfigError, Fault, RunError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.run.folder import by_dotted_key
from vpd_mlx.run.log import RECIPE_FILE
from vpd_mlx.run.records import upgraded

__all__ = [
    "best_rates",
    "check_recipe",
    "load_grid",
    "on_edge",
    "results",
    "run_grid",
    "sweep",
    "sweep_runs",
]

TUNING_SEEDS = 3

Measure = Literal["final", "greedy", "best", "drop", "margin_change"]


class Tune(Section):
    """The sweep that every method gets, and by how many rates, each half or double the last, it may go on at either end."""

    rates: list[float] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    widen: int = Field(3, ge=0)


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
    parts: list[Part]
    findings: list[Claim] = Field([])

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(setting, method) of everything that runs."""
        return [(part.setting, method) for part in self.parts for method in part.methods]

    @property
    def tuned(self) -> list[tuple[str, str]]:
        """The pairs that have a sweep: all, or none where there is a single rate."""
        return self.pairs if len(self.tune.rates) > 1 else []

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
    """One finished run's figures: accuracies in 0..1, `curve` of (step, student's avg@k).

    `teacher_before` and `teacher` are the teacher's accuracy under feedback, None where nothing had any; `cut` is the share of
    completions that reached the length limit, over the last tenth of the steps.
    """

    cell: Cell
    before: float
    final: float
    greedy_before: float
    greedy: float
    teacher_before: float | None
    teacher: float | None
    cut: float
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

        `final` and `best` are sampled, avg@k, `greedy` is the likeliest completion's; `drop` is best minus final. `margin_change`
        is the mean margin of the last tenth of the steps minus that of the first tenth; a margin is r~ of right minus r~ of wrong
        completions, over beta.
        """
        if name != "margin_change":
            return {"final": self.final, "greedy": self.greedy, "best": self.best, "drop": self.best - self.final}[name]
        if len(self.margins) < 2:
            return math.nan
        n = _tenth(self.margins)
        return float(np.mean(self.margins[-n:]) - np.mean(self.margins[:n]))


def _tenth(values: Sequence[float]) -> int:
    return max(1, len(values) // 10)


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
    if both := sorted({*grid.seeds} & {*grid.tune.seeds}) if grid.tuned and grid.findings else []:
        yield Fault("tune.seeds", f"{both} are among the seeds that claims are judged by", "tune on others")
    if grid.tuned and grid.findings and len(grid.tune.seeds) < TUNING_SEEDS:
        problem = f"{grid.tune.seeds} is too few to choose rates for claims by"
        yield Fault("tune.seeds", problem, f"give at least {TUNING_SEEDS}")
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
        RunError: a run failed; the others are finished first, and the next call tries it again. Or a folder holds a run of other
            values than the grid's.
    """

    def finish(cells: Sequence[Cell], title: str) -> None:
        for cell in cells:
            _refuse_other_run(grid, recipe, out, cell)
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

    more = [(pair, rate) for pair in grid.tuned for rate in grid.tune.rates]
    while more:
        finish([cell for pair, rate in more for cell in grid.sweep(*pair, rate)], "sweep")
        more = [(pair, rate) for pair in grid.tuned if (rate := _beyond(grid, out, pair)) is not None]
    rates = best_rates(grid, out)
    write_atomic(out / "rates.json", json.dumps({f"{s}/{m}": r for (s, m), r in rates.items()}, indent=1))
    finish([Cell(*pair, seed, rates[pair], False) for seed in grid.seeds for pair in grid.pairs], "seeds")


def _refuse_other_run(grid: Grid, recipe: Path, out: Path, cell: Cell) -> None:
    """A grid may have been edited since: a run that is there must have the values that the grid names."""
    file = out / cell.folder / RECIPE_FILE
    if not file.exists():
        return
    given = {**_overrides(grid, cell), "seed": cell.seed}
    asked, made = load_recipe(recipe, list(given.items())), load_recipe(file)
    wanted, found = (by_dotted_key(r.model_dump(mode="json")) for r in (asked, made))
    for key, value in wanted.items():
        named = any(key == g or key.startswith(f"{g}.") for g in given)
        if named and key not in {"model", *asked.path_keys()} and found.get(key) != value:
            what = f"was made with {key} {found.get(key)!r}, and the grid has {value!r}"
            raise RunError(f"{file.parent}: {what}; delete that folder, or give another --out")


def _overrides(grid: Grid, cell: Cell) -> dict[str, Any]:
    """What a run changes in the recipe, but for its seed."""
    return {**grid.recipe_overrides(cell.setting, cell.method), "optimizer.learning_rate": cell.rate}


def _run_one(grid: Grid, recipe: Path, out: Path, cell: Cell) -> str | None:
    """Train one run in a process of its own; returns the last line of its error."""
    folder = out / cell.folder
    command = [sys.executable, "-m", "vpd_mlx", "train", "--quiet"]
    if (folder / "checkpoints").exists():
        command += ["--resume", str(folder)]
    else:
        command += [str(recipe), "--out", str(folder), "--overwrite", "--seed", str(cell.seed)]
        for key, value in _overrides(grid, cell).items():
            is_folder = key == "model" and value.startswith(".")
            text = str((recipe.parent / value).resolve()) if is_folder else json.dumps(value)
            command += ["--set", f"{key}={text}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def best_rates(grid: Grid, out: Path) -> dict[tuple[str, str], float]:
    """Each pair's best rate, by the mean final accuracy of its sweep; ties go to the lower rate."""
    if not grid.tuned:
        return dict.fromkeys(grid.pairs, grid.tune.rates[0])
    return {pair: _best(sweep(grid, out, pair)) for pair in grid.pairs}


def _best(scores: Mapping[float, float]) -> float:
    return max(sorted(scores), key=lambda rate: scores[rate])


def _wider(grid: Grid) -> list[float]:
    """The sweep's rates and those that it may go on to, rising."""
    low, high = min(grid.tune.rates), max(grid.tune.rates)
    factors = [2.0**n for n in range(1, grid.tune.widen + 1)]
    return sorted({*grid.tune.rates, *(low / f for f in factors), *(high * f for f in factors)})


def sweep(grid: Grid, out: Path, pair: tuple[str, str]) -> dict[float, float]:
    """Mean final accuracy, 0..1, at each rate whose runs are finished, rising rates."""
    return {rate: float(np.mean([r.final for r in runs])) for rate, runs in sweep_runs(grid, out, pair).items()}


def sweep_runs(grid: Grid, out: Path, pair: tuple[str, str]) -> dict[float, list[Result]]:
    """A pair's runs at each rate whose runs are all finished, rising rates."""
    found = {}
    for rate in _wider(grid):
        cells = grid.sweep(*pair, rate)
        if all((out / cell.folder / "summary.json").exists() for cell in cells):
            found[rate] = [_result(out, cell, grid) for cell in cells]
    return found


def _beyond(grid: Grid, out: Path, pair: tuple[str, str]) -> float | None:
    """The next rate of a sweep whose best one is its lowest or highest; None once it lies inside, or where the grid ends."""
    scores, wider = sweep(grid, out, pair), _wider(grid)
    best = _best(scores)
    at = wider.index(best) + {min(scores): -1, max(scores): 1}.get(best, len(wider))
    return wider[at] if 0 <= at < len(wider) else None


def on_edge(grid: Grid, out: Path) -> set[tuple[str, str]]:
    """The pairs whose best rate is the lowest or the highest of their sweep: a better one may lie beyond."""
    found = {pair: sweep(grid, out, pair) for pair in grid.tuned}
    return {pair for pair, scores in found.items() if _best(scores) in (min(scores), max(scores))}


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
    cut = [m["truncated"] for m in metrics]
    reached = next((step for step, value in curve if value >= grid.threshold), None)
    return Result(
        cell=cell,
        before=summary["before"]["student"],
        final=summary["after"]["student"],
        greedy_before=summary["before"]["student_greedy"],
        greedy=summary["after"]["student_greedy"],
        teacher_before=summary["before"]["teacher"],
        teacher=summary["after"]["teacher"],
        cut=float(np.mean(cut[-_tenth(cut) :])) if cut else 0.0,
        curve=curve,
        margins=tuple(m["student/margin"] for m in metrics if m.get("student/margin") is not None),
        steps_to=reached,
        tokens_to=None if reached is None else int(tokens[reached - 1]) if reached else 0,
        seconds=summary["seconds"]["wall"],
    )
