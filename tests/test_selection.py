"""The adapter that is handed over: chosen on problems of their own, evaluated on others."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_train import StopAfter, adapter, same_logs

from vpd_mlx import api
from vpd_mlx.common.files import read_rows
from vpd_mlx.errors import ConfigError
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.run import best
from vpd_mlx.run import collapse as acting
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Silent, Stop
from vpd_mlx.run.selection import apart
from vpd_mlx.run.step import Trainer
from vpd_mlx.run.watch import Collapse
from vpd_mlx.types import Problem

CHOOSE = {"evaluation__keep_best": True, "evaluation__selection_every": 1, "evaluation__selection": 4}


class Held:
    """A task with so many held-out problems."""

    train: tuple[Problem, ...] = ()

    def __init__(self, count: int) -> None:
        self.held_out = tuple(Problem(str(i), ({"role": "user", "content": f"{i}+1="},)) for i in range(count))


def recipe(**evaluation) -> Recipe:
    return Recipe(name="x", model="m", task={"kind": "addition"}, evaluation=evaluation)


def test_the_problems_to_choose_by_are_few_stable_and_no_others():
    task = Held(200)
    chosen, reported = apart(recipe(), task)
    assert len(chosen) == 32
    assert not {p.id for p in chosen} & {p.id for p in reported}
    assert len(chosen) + len(reported) == 200
    task.held_out = task.held_out[::-1]
    assert {p.id for p in apart(recipe(), task)[0]} == {p.id for p in chosen}
    assert len(apart(recipe(selection=5), task)[0]) == 5
    assert len(apart(recipe(), Held(20))[0]) == 5
    assert len(apart(recipe(), Held(8))[0]) == 2
    assert apart(recipe(), Held(7)) == ((), Held(7).held_out)
    assert apart(recipe(keep_best=False), task) == ((), task.held_out)


def test_one_prompt_is_never_on_both_sides():
    task = Held(40)
    task.held_out += task.held_out
    chosen, reported = apart(recipe(), task)
    assert {p.prompt for p in chosen}.isdisjoint(p.prompt for p in reported)
    task.held_out = (task.held_out[0],) * 40
    assert apart(recipe(), task) == ((), task.held_out)


def test_neither_a_run_nor_eval_reports_on_them(small):
    trainer = Trainer.build(small(evaluation__problems=20000, evaluation__samples=1, **CHOOSE))
    chosen, reported = apart(trainer.recipe, trainer.task)
    assert len(chosen) == 4
    trainer.task.held_out = (*chosen, *reported[:12])  # so that an evaluation takes a moment
    some, others = apart(trainer.recipe, trainer.task)
    row, _ = trainer.evaluate(0)
    assert set(row["greedy_by_problem"]) == {p.id for p in others}
    assert not {p.id for p in some} & set(row["greedy_by_problem"])


@pytest.fixture
def scored(monkeypatch):
    """Selections with given results, by step."""
    real = best.score

    def give(values: list[float]) -> None:
        monkeypatch.setattr(best, "score", lambda *args: {**real(*args), "student": values[args[-1]]})

    return give


def test_the_adapter_handed_over_is_evaluated_on_problems_that_did_not_choose_it(small, tmp_path: Path, scored):
    scored([0.1, 0.2, 0.6, 0.3])
    cfg = small(steps=3, **CHOOSE)
    summary = train(cfg, tmp_path / "run")
    assert (summary["adapter_of_step"], summary["selection"]) == (2, 4)
    train(small(steps=2), tmp_path / "two")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "two")
    evals, selections = (read_rows(tmp_path / "run" / f"{name}.jsonl") for name in ("evals", "selection"))
    assert [e["step"] for e in evals] == [0, 2, 3]
    assert [(s["step"], s["problems"]) for s in selections] == [(n, 4) for n in range(4)]
    assert (
        summary["after"]["student_greedy"]
        == evals[1]["student_greedy"]
        == load_run(tmp_path / "run").after.student_greedy
    )
    again = api.evaluate(tmp_path / "run", base=False)
    assert again["greedy_by_problem"] == evals[1]["greedy_by_problem"]
    assert read_rows(tmp_path / "two" / "selection.jsonl") == []


@pytest.mark.parametrize("moment", [(2, None), (1, "evaluation, selection")], ids=str)
def test_a_resume_chooses_the_same(small, tmp_path: Path, scored, moment):
    scored([0.1, 0.6, 0.2, 0.3])
    cfg = small(steps=3, **CHOOSE)
    train(cfg, tmp_path / "whole")
    stop = Stop()
    assert "interrupted" in train(cfg, tmp_path / "run", progress=StopAfter(stop, *moment), stop=stop)
    for _ in range(2):  # the second time the run has ended, and hands over the same again
        train(cfg, tmp_path / "run", resume=True)
        assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
        same_logs(tmp_path / "run", tmp_path / "whole")


def test_selections_come_every_so_many_steps_and_at_both_ends(small, tmp_path: Path):
    train(small(steps=5, **{**CHOOSE, "evaluation__selection_every": 2}), tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "selection.jsonl")
    assert [r["step"] for r in rows] == [0, 2, 4, 5]
    assert all(0 <= r["student"] <= 1 and r["length"] > 0 for r in rows)


def test_patience_counts_selections(small, tmp_path: Path, scored):
    scored([0.1, 0.6, 0.2, 0.3, 0.9])
    assert train(small(steps=4, evaluation__patience=2, **CHOOSE), tmp_path / "run")["steps"] == 3
    with pytest.raises(
        ConfigError, match=r"evaluation.patience: needs evaluations during training; set evaluation.every or"
    ):
        small(evaluation__patience=2)


def test_a_revert_goes_to_the_best_by_selection(small, tmp_path: Path, scored, monkeypatch):
    scored([0.1, 0.6, 0.2, 0.3])
    seen = Collapse("length", "it rambles")
    monkeypatch.setattr(acting, "collapse", lambda rows: seen if rows[-1]["step"] == 3 else None)
    summary = train(small(steps=3, on_collapse="revert", **CHOOSE), tmp_path / "run")
    assert load_run(tmp_path / "run").metrics[-1]["watch/reverted_to"] == 1
    assert (summary["adapter_of_step"], summary["reverts"]) == (1, 1)


def test_too_few_problems_are_said_and_the_last_adapter_is_handed_over(own_task, tmp_path: Path):
    class Notes(Silent):
        notes: list[str] = []  # noqa: RUF012

        def note(self, text):
            self.notes.append(text)

    rows = "".join(f'{{"prompt": "{a}+{b}=", "answer": "{a + b}"}}\n' for a in range(11, 15) for b in range(11, 14))
    task = "task: {kind: exact, data: rows.jsonl, held_out: 0.4}\n"
    path = own_task(rows, task=task)
    summary = train(load_recipe(path), tmp_path / "run", progress=Notes())
    assert summary["adapter_of_step"] == summary["steps"] == 1
    assert summary["selection"] == 0
    assert [n for n in Notes.notes if "too few to set some aside, so the run hands over its last adapter" in n]


def test_the_best_is_kept_by_default_and_not_by_the_toys():
    from vpd_mlx.recipe import builtin_recipes

    assert recipe().evaluation.keep_best
    for name in ("quickstart", "lab/addition", "lab/spelling"):
        assert not load_recipe(builtin_recipes()[name]).evaluation.keep_best
