"""The lab: intervals, verdicts, and a grid that is interrupted and goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vpd_mlx.commands.app import app
from vpd_mlx.errors import ConfigError, RunError
from vpd_mlx.recipe import builtin_recipes
from vpd_mlx.tools.findings import claim_results, curves, mean_interval, sweep_table, table
from vpd_mlx.tools.lab import (
    Cell,
    Result,
    _beyond,
    best_rates,
    check_recipe,
    load_grid,
    on_edge,
    results,
    run_grid,
    sweep,
)

ROOT = Path(__file__).parent.parent
GRID = """
name: tiny
recipe: {recipe}
seeds: [0, 1]
threshold: 0.5
overrides: {{steps: 2, rollout.prompts: 2, rollout.group_size: 2, evaluation.problems: 4, evaluation.every: 1, lora.rank: 4}}
tune: {{rates: [1e-4, 1e-3], seeds: [7, 8, 9], widen: 1}}
settings: {{plain: {{}}}}
methods:
  sdpo: {{algorithm: sdpo, evaluation.samples: 1}}
  fast: {{algorithm: sdpo, evaluation.samples: 1, teacher.ema_rate: 0.5}}
parts: [{{setting: plain, methods: [sdpo, fast]}}]
findings: [{{id: x, claim: "fast > slow", setting: plain, better: fast, worse: sdpo}}]
"""


def grid_file(tmp_path: Path, text: str = GRID) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(
        text.format(recipe=builtin_recipes()["quickstart"]).replace("1e-4", "0.0001").replace("1e-3", "0.001")
    )
    return path


def test_interval_is_students_t():
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert mean_interval([2.0]) == (2.0, math.inf)


def result(method: str, seed: int, final: float, curve=((0, 0.0), (1, 0.9)), margins=(1.0, 1.0)) -> Result:
    cell = Cell("plain", method, seed, 1e-3, False)
    return Result(cell, 0.0, final, 0.0, final, None, None, 0.0, tuple(curve), tuple(margins), None, None, 1.0)


@pytest.mark.parametrize(
    ("fast", "verdict"),
    [([0.8, 0.81], "reproduced"), ([0.2, 0.21], "not reproduced"), ([0.2, 0.9], "within noise")],
)
def test_verdicts(tmp_path: Path, fast, verdict):
    grid = load_grid(grid_file(tmp_path))
    found = [result("sdpo", s, 0.5) for s in (0, 1)] + [result("fast", s, fast[s]) for s in (0, 1)]
    assert claim_results(grid, found)[0].verdict == verdict
    open_ = claim_results(grid, found, {("plain", "fast")})[0].verdict
    assert open_ == "open: the best rate of fast is at the edge of the sweep"


def test_a_verdict_is_corrected_for_all_claims_of_the_grid(tmp_path: Path):
    more = "".join(f', {{{{id: x{i}, claim: "c", setting: plain, better: sdpo, worse: sdpo}}}}' for i in range(9))
    grid = load_grid(grid_file(tmp_path, GRID.replace("worse: sdpo}}]", "worse: sdpo}}" + more + "]")))
    found = [result("sdpo", s, 0.5) for s in (0, 1)] + [result("fast", s, 0.8 + 0.01 * s) for s in (0, 1)]
    first, *others = claim_results(grid, found)
    assert first.difference - first.half > 0  # alone its interval excludes 0
    assert (len(others), first.verdict) == (9, "within noise")
    assert first.p == pytest.approx(10 * claim_results(load_grid(grid_file(tmp_path)), found)[0].p)


def finished(out: Path, rate: float, final: float, method: str = "sdpo") -> None:
    """The tuning runs of one rate, as `vpd-mlx train` leaves them."""
    for seed in (7, 8, 9):
        folder = out / Cell("plain", method, seed, rate, True).folder
        folder.mkdir(parents=True)
        after = {"student": final, "student_greedy": final, "teacher": None}
        summary = {"before": after, "after": after, "seconds": {"wall": 1}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "evals.jsonl").write_text('{"step": 0, "student": 0.0}\n')


@pytest.mark.parametrize(
    ("scores", "more"),
    [
        ({1e-4: 0.5, 1e-3: 0.2}, 5e-5),
        ({1e-4: 0.2, 1e-3: 0.5}, 2e-3),
        ({1e-4: 0.0, 1e-3: 0.0}, 5e-5),  # a tie goes to the lower
        ({1e-4: 0.2, 1e-3: 0.5, 2e-3: 0.4}, None),
        ({1e-4: 0.2, 1e-3: 0.5, 2e-3: 0.6}, None),  # `widen` allows one: the claim stays open
    ],
)
def test_a_sweep_goes_on_until_its_best_rate_lies_inside(tmp_path: Path, scores, more):
    grid, out = load_grid(grid_file(tmp_path)), tmp_path / "out"
    for rate, final in scores.items():
        finished(out, rate, final)
    assert sweep(grid, out, ("plain", "sdpo")) == pytest.approx(scores)
    assert _beyond(grid, out, ("plain", "sdpo")) == (None if more is None else pytest.approx(more))
    finished(out, 1e-4, 0.5, "fast")
    best = max(sorted(scores), key=lambda r: scores[r])
    assert (("plain", "sdpo") in on_edge(grid, out)) == (best in (min(scores), max(scores)))
    assert best_rates(grid, out)["plain", "sdpo"] == best
    assert "| plain | fast |" in sweep_table(grid, out)


def test_measures_by_hand():
    r = result("sdpo", 0, 0.4, margins=[1.0] * 2 + [2.0] * 16 + [4.0] * 2)
    assert r.measure("final") == 0.4
    assert replace(r, greedy=0.6).measure("greedy") == 0.6
    assert r.measure("best") == 0.9
    assert r.measure("drop") == pytest.approx(0.5)
    assert r.measure("margin_change") == pytest.approx(3.0)
    assert math.isnan(result("sdpo", 0, 0.4, margins=[1.0]).measure("margin_change"))


def test_a_grid_with_one_rate_has_no_sweep(tmp_path: Path):
    grid = load_grid(grid_file(tmp_path, GRID.replace("[1e-4, 1e-3]", "[1e-3]")))
    assert grid.tuned == []
    assert set(best_rates(grid, tmp_path).values()) == {0.001}


@pytest.mark.long
def test_a_grid_runs_goes_on_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vpd_mlx.tools.lab.TUNING_SEEDS", 1)
    path = grid_file(tmp_path, GRID.replace("seeds: [7, 8, 9], widen: 1", "seeds: [9], widen: 0"))
    grid, recipe, out = load_grid(path), builtin_recipes()["quickstart"], tmp_path / "out"
    check_recipe(grid, recipe)
    said: list[str] = []
    run_grid(grid, recipe, out, jobs=2, say=said.append)
    found = results(grid, out)
    assert {(r.cell.method, r.cell.seed) for r in found} == {("sdpo", 0), ("sdpo", 1), ("fast", 0), ("fast", 1)}
    rates = best_rates(grid, out)
    assert rates.keys() == {("plain", "sdpo"), ("plain", "fast")}
    text = table(grid, found, rates)
    assert "| sdpo |" in text
    assert all(0 <= r.cut <= 1 and r.teacher_before is not None for r in found)
    row = next(line for line in text.splitlines() if line.startswith("| sdpo |")).split(" | ")
    start, end = (100 * np.mean([getattr(r, k) for r in found[:2]]) for k in ("teacher_before", "teacher"))
    assert row[6:8] == [f"{start:.0f} → {end:.0f}", f"{100 * np.mean([r.cut for r in found[:2]]):.0f}"]
    assert "fast > slow" in text
    assert "0.001" in sweep_table(grid, out)
    assert "runs, 0 minutes" in sweep_table(grid, out)
    curves(grid, found, out / "curves.png")
    assert (out / "curves.png").stat().st_size > 5000

    # An interrupted grid: one run lost its end, one is gone. Only these run again, to the same figures.
    (out / found[0].cell.folder / "summary.json").unlink()
    said.clear()
    run_grid(grid, recipe, out, jobs=1, say=said.append)
    assert any("3 of 4 runs are finished, 1 to go" in s for s in said)
    again = results(grid, out)
    assert [(r.final, r.curve, r.margins) for r in again] == [(r.final, r.curve, r.margins) for r in found]
    assert json.loads((out / "rates.json").read_text())["plain/fast"] == rates["plain", "fast"]

    # The grid was edited since: what is there is no run of it any more.
    other = grid.model_copy(update={"overrides": {**grid.overrides, "lora": {"rank": 2}}})
    with pytest.raises(
        RunError, match=r"seed9: was made with lora\.rank 4, and the grid has 2; delete that folder, or"
    ):
        run_grid(other, recipe, out, jobs=1, say=said.append)


def test_a_failing_run_is_named(tmp_path: Path):
    path = grid_file(
        tmp_path,
        GRID.replace("methods:\n", "methods:\n  broken: {{model: ./nowhere}}\n")
        .replace("[sdpo, fast]", "[broken]")
        .replace("better: fast, worse: sdpo", "better: broken, worse: broken"),
    )
    grid = load_grid(path)
    with pytest.raises(RunError, match=r"6 of 6 runs failed, first tune-0.0001/plain/broken/seed7: vpd-mlx: .*nowhere"):
        run_grid(grid, builtin_recipes()["quickstart"], tmp_path / "out", jobs=2, say=lambda _: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("methods: [sdpo, fast]", "methods: [sdpo, slow]"), "parts.0.methods: 'slow' is not defined"),
        (("worse: sdpo", "worse: grpo"), "findings.x: 'grpo' does not run in 'plain'"),
        (("seeds: [0, 1]", "seeds: []"), "seeds"),
        (("seeds: [7, 8, 9]", "seeds: [7, 8]"), "tune.seeds: [7, 8] is too few to choose rates for claims by"),
        (("seeds: [7, 8, 9]", "seeds: [1, 8, 9]"), "tune.seeds: [1] are among the seeds that claims are judged by"),
        (("setting: plain, methods", "setting: odd, methods"), "'odd' is not defined"),
    ],
)
def test_faults_of_a_grid(tmp_path: Path, change, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        load_grid(grid_file(tmp_path, GRID.replace(*change)))


def test_every_grid_that_ships_is_sound():
    files = sorted((ROOT / "recipes" / "lab" / "grids").glob("*.yaml"))
    assert files
    for path in files:
        grid = load_grid(path)
        check_recipe(grid, (path.parent / grid.recipe).resolve())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    done = CliRunner().invoke(app, ["lab", str(grid_file(tmp_path)), "--out", str(tmp_path / "file" / "runs")])
    assert isinstance(done.exception, RunError)
    assert "Not a directory" in str(done.exception)
