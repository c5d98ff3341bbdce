"""Answers before and after training: kept as they were evaluated, chosen by a rule that favours nobody, shown as text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import QUICKSTART, SMALL
from rich.console import Console
from typer.testing import CliRunner

from vpd_mlx.commands.app import app
from vpd_mlx.common.files import read_rows
from vpd_mlx.errors import ConfigError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.report.answers import print_answers
from vpd_mlx.report.page import run_page
from vpd_mlx.run.answers import CHANGES, Answered, choose, pairs, rule
from vpd_mlx.run.folder import Run, load_run
from vpd_mlx.run.loop import train
from vpd_mlx.tasks import expected
from vpd_mlx.types import Problem

HOSTILE = "</div><script>hacked()</script>[bold]x[/bold]\x1b[2J\u202eabc"


def row(problem: str, step: int, right: bool, **more: Any) -> dict[str, Any]:
    return {"step": step, "problem": problem, "prompt": f"{problem}?", "completion": "7", "success": right, **more}


def answered(problem: str, before: bool, after: bool) -> Answered:
    return Answered(row(problem, 0, before), row(problem, 5, after))


def some(gained: int = 0, lost: int = 0, wrong: int = 0, right: int = 0) -> list[Answered]:
    counts = dict(zip(CHANGES, (gained, lost, wrong, right), strict=True))
    return [answered(f"{CHANGES[c]} {i}", *c) for c, count in counts.items() for i in range(count)]


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"gained": 100, "lost": 1, "wrong": 20, "right": 3}, (2, 1, 1, 1)),
        ({"gained": 50, "lost": 50}, (3, 2, 0, 0)),
        ({"gained": 60, "wrong": 40}, (3, 0, 2, 0)),
        ({"wrong": 90, "right": 1}, (0, 0, 4, 1)),
        ({"wrong": 90}, (0, 0, 5, 0)),
        ({"gained": 1, "lost": 1}, (1, 1, 0, 0)),
        ({}, (0, 0, 0, 0)),
    ],
)
def test_problems_are_shown_in_proportion_and_every_kind_once(counts: dict[str, int], shown: tuple[int, ...]):
    answers = some(**counts)
    chosen = choose(answers)
    assert tuple(sum(a.change == c for a in chosen) for c in CHANGES.values()) == shown
    for change in CHANGES.values():  # the first ones, whatever they say
        own = [a.problem for a in answers if a.change == change]
        found = [a.problem for a in chosen if a.change == change]
        assert found == own[: len(found)]


def test_the_rule_names_every_kind_and_its_number():
    answers = some(gained=30, lost=2, wrong=8)
    text = rule(answers, choose(answers))
    assert text.startswith(
        "5 of 40 held-out problems: 3 of 30 wrong, then right, 1 of 2 right, then wrong, 1 of 8 wrong both"
    )
    assert "right both times" not in text


def test_only_problems_answered_both_times_are_paired():
    rows = [row("a", 0, False), row("b", 0, True), row("a", 2, True), row("a", 4, False), row("c", 4, True)]
    assert [(a.problem, a.change) for a in pairs(rows, 2)] == [("a", "wrong, then right")]
    assert [(a.problem, a.change) for a in pairs(rows, 4)] == [("a", "wrong both times")]
    assert pairs(rows, 3) == []


def test_what_the_teacher_read_is_that_of_before_if_there_was_any():
    early, late = row("a", 0, False, teacher_prompt="early"), row("a", 2, False, teacher_prompt="late")
    assert Answered(early, late).taught == "early"
    assert Answered({**early, "teacher_prompt": None}, late).taught == "late"
    assert Answered(row("a", 0, True), row("a", 2, True)).taught == ""


# --- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps at a rate that changes answers."""
    changes = {**SMALL, "steps": 3, "optimizer.learning_rate": 5e-3, "optimizer.warmup_steps": 0, "evaluation.every": 2}
    folder = tmp_path_factory.mktemp("answers") / "run"
    train(load_recipe(QUICKSTART, list(changes.items())), folder)
    return load_run(folder)


@pytest.fixture
def own(run: Run, tmp_path: Path) -> Path:
    """A copy of the run, for a test to change."""
    shutil.copytree(run.path, tmp_path / "run")
    return tmp_path / "run"


def test_answers_are_those_that_the_figures_count(run: Run):
    rows = read_rows(run.path / "answers.jsonl")
    for evaluation in run.evals:
        found = [r for r in rows if r["step"] == evaluation["step"]]
        assert {r["problem"]: r["score"] for r in found} == evaluation["greedy_by_problem"]
        assert sum(r["teacher_prompt"] is not None for r in found) == evaluation["teacher_problems"]
    for r in rows + (rollouts := read_rows(run.path / "rollouts.jsonl")):
        a, b = r["prompt"].removesuffix("=").split("+")
        assert r["expected"] == str(int(a) + int(b))
        assert r["success"] == (r["completion"].strip() == r["expected"])
    for r in rollouts:
        assert r["student_prompt"] == f"<|user|>{r['prompt']}<|end|><|assistant|>"
    for r in rows:
        assert (r["context"] is None) == (r["teacher_prompt"] is None)
        assert r["teacher_prompt"] is None or f"<|user|>{r['prompt']}" in r["teacher_prompt"]
        assert r["success"] == (r["score"] >= 0.5)
    assert [a.after["step"] for a in run.answers] == [3] * 8


def test_an_evaluation_leaves_no_more_answers_than_it_may(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vpd_mlx.run.evaluate.MOST_ANSWERS", 3)
    train(small(steps=1), tmp_path / "run")
    found = load_run(tmp_path / "run")
    assert [len(found.evals[0]["greedy_by_problem"]), len(found.answers)] == [8, 3]
    assert [a.problem for a in found.answers] == list(found.evals[0]["greedy_by_problem"])[:3]


def test_the_answers_are_those_of_the_adapter_that_is_handed_over(own: Path):
    summary = json.loads((own / "summary.json").read_text())
    for step, want in ((2, [2] * 8), (0, [])):  # as `evaluation.keep_best` has it; of the untrained one nothing is new
        (own / "summary.json").write_text(json.dumps({**summary, "adapter_of_step": step}))
        assert [a.after["step"] for a in load_run(own).answers] == want


def test_a_run_without_answers_shows_none(own: Path):
    (own / "answers.jsonl").unlink()
    assert load_run(own).answers == []
    assert 'id="answers"' not in run_page(load_run(own), 0)


def test_train_ends_with_answers_unless_it_is_to_be_quiet(tmp_path: Path):
    sets = [x for k, v in {**SMALL, "steps": 1}.items() for x in ("--set", f"{k}={json.dumps(v)}")]
    arguments = ["train", "quickstart", *sets, "--out"]
    loud = CliRunner().invoke(app, [*arguments, str(tmp_path / "loud")])
    assert "answers before and after" in loud.output
    found = load_run(tmp_path / "loud")
    assert rule(found.answers, choose(found.answers))[:30] in loud.output
    assert choose(found.answers)[0].before["verdict"] in loud.output
    assert re.search(rf"expected +{choose(found.answers)[0].expected} *\n", loud.output)
    quiet = CliRunner().invoke(app, [*arguments, str(tmp_path / "quiet"), "--quiet"])
    assert (quiet.exit_code, quiet.stdout) == (0, "")
    alone = CliRunner().invoke(app, [*arguments, str(tmp_path / "json"), "--json"])
    assert json.loads(alone.stdout)["steps"] == 1


def drawn(answers: list[Answered], width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    print_answers(console, answers)
    return console.export_text().splitlines()


def test_both_answers_stand_side_by_side_where_there_is_room():
    pair = [Answered(row("a", 0, False, completion="the first"), row("a", 5, True, completion="the second"))]
    assert any("the first" in line and "the second" in line for line in drawn(pair, 120))
    narrow = drawn(pair, 60)
    assert not any("the first" in line and "the second" in line for line in narrow)
    assert max(map(len, narrow)) <= 60


def test_what_a_model_wrote_moves_no_cursor_and_is_no_markup():
    texts = dict.fromkeys(("prompt", "completion", "verdict", "teacher_prompt", "problem"), HOSTILE)
    for width in (60, 140):
        text = "".join(drawn([Answered({**row("a", 0, False), **texts}, {**row("a", 5, True), **texts})], width))
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "[bold]x[/bold]" in text


def test_a_long_text_is_shown_by_its_two_ends():
    long = "begin " + "x" * 5000 + " end"
    text = "\n".join(drawn([Answered(row("a", 0, False, completion=long), row("a", 5, True))], 80))
    assert "begin" in text
    assert "end" in text
    assert "4,610 characters" in text
    assert len(text) < 2500


def test_the_page_shows_them_with_what_the_teacher_read(own: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vpd_mlx.report.page.run_plots", lambda run: {})
    rows = read_rows(own / "answers.jsonl")
    texts = dict.fromkeys(("completion", "verdict", "teacher_prompt", "context"), HOSTILE)
    broken = [{"step": step, "problem": "z", **dict.fromkeys(texts)} for step in (0, 3)]
    rows = [{"step": s, "problem": "h", **texts, "success": s == 3} for s in (0, 3)] + broken + rows
    (own / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = load_run(own)
    page = run_page(found, 0)
    shown = choose(found.answers)
    assert shown[0].problem == "h"
    assert rule(found.answers, shown) in page
    assert page.count('class="card rollout answered"') == len(shown) == 5
    assert page.count("<summary>what the teacher read before training") == sum(
        bool(a.before["teacher_prompt"]) for a in shown
    )
    assert "<script>hacked" not in page
    assert page.count("&lt;script&gt;hacked()") == 2 * 4
    assert page.count("\\u003cscript\\u003ehacked()") >= 2 * 2  # in the browser's data


def test_the_expected_answer_is_the_datas_or_a_right_completion_and_never_endless():
    task = SimpleNamespace(reference_completion=lambda problem: problem.reference and f"<b>{problem.reference}</b>")

    def of(answer: str | None, reference: str | None) -> str | None:
        return expected(task, Problem("p", ({"role": "user", "content": "?"},), answer, reference))  # type: ignore[arg-type]

    assert [of("7", "3+4=7"), of("", "7"), of(None, "7"), of(None, None)] == ["7", "", "<b>7</b>", None]
    long = of("x" * 10_000, None)
    assert long == "x" * 4000 + " …"


def shown(run: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["show", str(run), *options], env={"COLUMNS": "80", "NO_COLOR": "1"})
    return done.exit_code, done.output


def test_show_goes_through_held_out_problems_by_what_became_of_them(own: Path):
    rows = read_rows(own / "answers.jsonl")
    (names,) = {tuple(r["problem"] for r in rows if r["step"] == s) for s in (0, 2, 3)}
    for r in rows:  # before, after step 2 and at the end: gained, lost, still wrong, kept right …
        n = names.index(r["problem"]) % 4
        r["success"] = {0: r["step"] == 3, 1: r["step"] != 3, 2: False, 3: True}[n]
        r["completion"] = f"{r['problem']} after {r['step']} " + "x" * 3000
    (own / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for n, kind in enumerate(("gained", "lost", "still-wrong", "kept-right")):
        code, text = shown(own, "--answers", kind)
        assert (code, re.findall(r"problem (\S+)", text)) == (0, list(names[n::4]))
        assert f"2 of 2 {kind} of 8, in the order of evaluation." in text
        for step in (0, 3):
            assert re.search(rf"{re.escape(names[n])} after {step}\s", text)
        assert re.search(rf"expected +{rows[n]['expected']}\b", text)
    assert len(re.findall(r"problem \S+", shown(own, "--answers", "all", "--limit", "3")[1])) == 3
    assert shown(own, "--answers", "gained", "--step", "2")[1] == "None of 8 held-out problems is gained.\n"
    assert "characters" in shown(own, "--answers", "lost")[1]
    assert "characters" not in shown(own, "--answers", "lost", "--full")[1]
    for wrong, words in ((("--step", "1"), "give one of 2, 3"), (("--right",), "leave it out, or --answers")):
        refused = CliRunner().invoke(app, ["show", str(own), "--answers", "all", *wrong]).exception
        assert isinstance(refused, ConfigError)
        assert words in str(refused)
    (own / "answers.jsonl").unlink()
    assert "No held-out problem has been answered" in shown(own, "--answers", "all")[1]
