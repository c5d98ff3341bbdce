"""`vpd-mlx probe` and the check before the first step: is there a gap to learn from, and what does the teacher's prompt move?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICKSTART
from typer.testing import CliRunner

from vpd_mlx.commands.app import app
from vpd_mlx.common.settings import parse_set
from vpd_mlx.common.stats import Paired
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ConfigError, RunError, SourceError
from vpd_mlx.feedback.prompts import Templates
from vpd_mlx.feedback.wordings import STYLES
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.run.advice import Advice, Contexts, Student, Style, Teacher, gap_line, recommend, worth
from vpd_mlx.run.loop import train
from vpd_mlx.run.probe import probe, refuses, wordings
from vpd_mlx.run.progress import Silent
from vpd_mlx.run.shift import Scored, Scorer, style_of
from vpd_mlx.run.warnings import no_gap
from vpd_mlx.types import TokenRow

STUDENT = Student(
    problems=24,
    samples=8,
    temperature=0.8,
    sampled=0.04,
    sampled_interval=(0.0, 0.1),
    success=0.04,
    greedy=0.08,
    greedy_interval=(0.0, 0.2),
    groups_mixed=0.05,
    groups_all_right=0.0,
    groups_all_wrong=0.95,
    length=40.0,
    truncated=0.0,
    refusals=0.0,
    verifier_failures=0,
)


def teacher(source: str, templates: str, gap: float, low: float, high: float, **changes: Any) -> Teacher:
    problems = changes.pop("problems", 24)
    return Teacher(
        source=source,
        templates=templates,
        problems=problems,
        sampled=0.04 + gap,
        sampled_interval=None,
        greedy=changes.pop("greedy", 0.04 + gap),
        student_there=0.04,
        gap=Paired(gap, low, high, problems, 10, 1),
        greedy_gap=changes.pop("greedy_gap", None),
        length_ratio=1.0,
        truncated=0.0,
        refusals=0.0,
        overlap=0.0,
        contexts=changes.pop("contexts", Contexts(192, 192, 0, 0, 184, 0)),
        style=changes.pop("style", Style()),
    )


CHOICES = {"recipe": None, "before": "before", "after": "after"}


def advise(teachers: list[Teacher], student: Student = STUDENT, **names: str | None) -> Any:
    return recommend(student, teachers, templates=CHOICES, **{"without": "grpo", **names})


# --- the recommendation


def test_of_two_wordings_with_like_gaps_the_one_that_leaves_the_style_alone():
    moves = teacher("reference", "recipe", 0.40, 0.2, 0.6, style=Style(first_token=-1.0, stop_token=-0.1))
    leaves = teacher("reference", "before", 0.35, 0.2, 0.5, style=Style(first_token=-0.2, stop_token=0.3))
    found = advise([moves, leaves])
    assert (found.helps, found.source, found.templates) == (True, "reference", "before")
    assert found.keys == {"feedback.sources": ["reference"], "templates": "before"}
    assert found.sets == ["feedback.sources=[reference]", "templates=before"]
    assert "+35.0 points" in found.verdict
    # Where it is the only one that helps, it is taken with a warning; the recipe's own wording needs no key.
    alone = advise([moves])
    assert "templates" not in alone.keys
    assert "first token -1.0 and stop token -0.1 nats" in " ".join(alone.reasons)


def test_harm_counts_only_what_is_taken_away():
    assert Style(first_token=0.7, stop_token=-0.25).harm == 0.25
    assert Style().harm == 0.0
    half = teacher("sibling", "recipe", 0.4, 0.2, 0.6, problems=12)
    assert worth(half, 24) == pytest.approx(0.2)
    assert worth(replace(half, style=Style(first_token=-np.log(2))), 24) == pytest.approx(0.1)


def test_a_source_that_reaches_few_problems_is_backed_by_the_others():
    few = teacher("sibling", "after", 0.8, 0.6, 0.9, problems=16, contexts=Contexts(192, 100, 0, 0, 184, 84))
    text = teacher("verifier", "after", 0.2, 0.1, 0.3)
    other = teacher("reference", "before", 0.1, 0.05, 0.2)
    assert advise([few, text, other]).keys["feedback.sources"] == ["sibling", "verifier"]
    same = teacher("attempts", "after", 0.7, 0.6, 0.9, problems=16)  # would never be asked behind sibling
    assert advise([few, same, text]).keys["feedback.sources"] == ["sibling", "verifier"]
    found = advise([few])
    assert found.keys["feedback.sources"] == ["sibling"]
    assert "nothing on 84 of 184 wrong completions" in " ".join(found.reasons)


def test_no_gap_is_said_plainly_with_what_to_try():
    none = [teacher("reference", "after", 0.0, -0.1, 0.1), teacher("verifier", "after", -0.1, -0.2, 0.0)]
    found = advise(none)
    assert found.helps is False
    assert found.verdict.startswith("feedback does not help this model on this task")
    assert found.keys == {}
    assert "reference, verifier" in " ".join(found.reasons)
    mixed = advise(none, replace(STUDENT, groups_mixed=0.3))
    assert mixed.keys == {"algorithm": "grpo"}
    assert "30.0 % of the groups" in " ".join(mixed.reasons)
    assert advise(none, replace(STUDENT, groups_mixed=0.3), without=None).keys == {}


def test_an_uncertain_gap_asks_for_more_problems():
    found = advise([teacher("reference", "after", 0.15, -0.05, 0.35)])
    assert found.helps is None
    assert "--problems 48" in " ".join(found.reasons)


def test_a_small_gap_that_is_certain_is_none():
    assert advise([teacher("reference", "after", 0.03, 0.01, 0.05)]).helps is False


def test_where_sampling_loses_what_the_model_knows_a_lower_temperature_is_named():
    lost = teacher("reference", "after", 0.0, -0.1, 0.1, greedy=0.9, greedy_gap=Paired(0.8, 0.6, 0.9, 24, 20, 0))
    found = advise([lost])
    assert (found.helps, found.temperature, found.keys) == (None, 0.4, {"rollout.temperature": 0.4})
    assert "greedily the teacher from reference, wording after is right in 90.0 %" in found.verdict
    assert "--set rollout.temperature=0.4" in found.reasons[-1]
    student = replace(STUDENT, sampled=0.0, greedy=0.5)
    helped = advise([teacher("reference", "after", 0.3, 0.2, 0.4)], student)
    assert helped.helps
    assert helped.keys["rollout.temperature"] == 0.4
    assert "the student is right in 0.0 %, greedily in 50.0 %" in helped.reasons[0]


def test_too_few_problems_tell_nothing():
    small = advise([teacher("reference", "after", 1.0, 0.9, 1.0, problems=4)], replace(STUDENT, problems=4))
    assert (small.helps, "--problems" in small.reasons[0]) == (None, True)
    rare = advise([teacher("sibling", "after", 1.0, 0.9, 1.0, problems=4)])
    assert "only 4 of 24 problems" in rare.verdict
    assert "only 0 of 24 problems" in advise([]).verdict


def test_a_solved_task_and_what_the_student_does_wrong():
    assert advise([], replace(STUDENT, sampled=0.95)).verdict.startswith("the student is right already")
    bad = replace(STUDENT, truncated=0.5, refusals=0.3)
    cut = Contexts(192, 192, 96, 2, 184, 0)
    said = " ".join(advise([teacher("reference", "after", 0.5, 0.3, 0.7, contexts=cut)], bad).reasons)
    for words in ("rollout.max_completion_tokens", "as a refusal", "feedback.max_tokens", "failed on 2 of 192"):
        assert words in said


def test_an_algorithm_that_reads_no_feedback_is_told_so():
    found = advise([teacher("reference", "after", 0.5, 0.3, 0.7)], reads="vpd", without=None)
    assert found.keys["algorithm"] == "vpd"


def test_refusals():
    for text in ("I'm sorry, but I can't", "I cannot help", " As an AI language model", "Sorry, no", "I’m unable to"):
        assert refuses(text)
    for text in ("I cannoli", "42", "It is sorry work", "{}", ""):
        assert not refuses(text)


# --- style


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(str(QUICKSTART.parent / "model"), LoraSettings(rank=4))


def test_scores_are_log_ratios_of_the_same_tokens(policy: Policy):
    a, b, text = (tuple(policy.tokenizer.encode(t)) for t in ("12+34=", "12+34=\nA correct answer: 46", "46"))
    rows = [Scored(a, b, text, True, True, True), Scored(a, a, text, True, True, True)]
    changed, same = Scorer(policy)(rows)
    student, shown = policy.logps([TokenRow(a, text), TokenRow(b, text)])
    np.testing.assert_allclose(changed["shift"], shown - student, atol=1e-4)
    assert changed["loss"].min() > 0
    assert changed["loss"].max() <= np.log(2) + 1e-6
    for figure in ("loss", "kl", "shift"):
        np.testing.assert_allclose(same[figure], 0.0, atol=1e-5)
    assert Scorer(policy)([]) == []


def test_style_by_hand():
    def scored(right: bool, *, sampled: bool = True, stops: bool = True, teacher: tuple[int, ...] = (2,)) -> Scored:
        return Scored((1,), teacher, (5, 6, 7), stops, right, sampled)

    def figures(shift: list[float], loss: list[float], kl: float) -> dict[str, Any]:
        return {"shift": np.array(shift), "loss": np.array(loss), "kl": np.array([kl, 9.0, 9.0])}

    rows = [scored(True), scored(False), scored(True, sampled=False, stops=False, teacher=(3,))]
    found = style_of(
        rows,
        [
            figures([-1.0, 0.5, -0.5], [0.1, 0.1, 0.1], 0.4),
            figures([3.0, 3.0, 3.0], [0.1, 0.4, 0.4], 0.4),
            figures([-2.0, 1.0, 3.0], [0.3, 0.6, 0.6], 0.8),
        ],
    )
    assert found.first_token == -1.5
    assert found.stop_token == -0.5
    assert found.rest == pytest.approx((0.5 + 1.0 + 3.0) / 3)
    assert (found.first_kl, found.first_js) == (pytest.approx(0.6), pytest.approx(0.2))
    assert found.divergence_right == pytest.approx(0.1)
    assert found.divergence_wrong == pytest.approx(0.3)
    assert found.right_share == pytest.approx(0.3 / 1.2)
    assert found.auc == 0.0  # the sampled right one loses a nat, the wrong one gains nine
    ties = [figures([0.0, 0.0, shift], [0.1] * 3, 0.1) for shift in (1.0, 1.0, 0.5)]
    assert style_of([scored(True), scored(False), scored(False)], ties).auc == 0.75
    other = [replace(row, student=(9,)) for row in (scored(True), scored(False))]
    apart = style_of([scored(True), *other], [ties[2], ties[0], ties[1]])
    assert apart.auc == 0.5  # a problem without a wrong one says nothing
    assert style_of([], []) == Style()


# --- wordings


def test_every_set_is_compared_and_a_value_chooses_it():
    plain = wordings(Templates(style="before"))
    assert list(plain) == ["before", *(name for name in STYLES if name != "before")]
    assert plain["before"].value is None
    assert plain["sdpo"].value == "sdpo"
    own = wordings(Templates(style="after", sibling="{prompt} {context}", student="Hm: {prompt}"), ["recipe", "before"])
    assert list(own) == ["recipe", "before"]
    assert own["recipe"].value is None
    # Choosing a set drops the recipe's own words for the teacher, and keeps those for the student.
    assert own["before"].value == {"style": "before", "student": "Hm: {prompt}"}
    assert own["before"].templates == Templates(style="before", student="Hm: {prompt}")
    with pytest.raises(ConfigError, match=r"--templates: 'befor' is no set"):
        wordings(Templates(), ["befor"])


def test_the_pasted_keys_are_a_recipe():
    keys = {"feedback.sources": ["sibling", "verifier"], "rollout.temperature": 0.4}
    value = {"style": "before", "student": "Hm: {prompt}"}
    for templates in ("sdpo", value):
        advice = Advice(True, "", keys={**keys, "templates": templates})
        recipe = load_recipe(QUICKSTART, parse_set(advice.sets))
        assert recipe.feedback.sources == ["sibling", "verifier"]
        assert recipe.rollout.temperature == 0.4
        assert recipe.templates == Templates(**({"style": "sdpo"} if templates == "sdpo" else value))


# --- the command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["probe", *arguments])


def test_the_quickstart_is_measured_and_recommended():
    done = invoke("quickstart", "--json", "--problems", "12", "--samples", "4", "--set", "seed=1")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    student, teachers = found["student"], {(t["source"], t["templates"]): t for t in found["teachers"]}
    assert (student["problems"], student["samples"], found["seed"]) == (12, 4, 1)
    assert student["sampled"] < 0.3
    shares = [student[f"groups_{kind}"] for kind in ("mixed", "all_right", "all_wrong")]
    assert sum(shares) == pytest.approx(1.0)
    verifier = teachers["verifier", "recipe"]
    assert verifier["sampled"] > 0.7
    assert verifier["gap"]["verdict"] == "better"
    assert verifier["contexts"]["given"] == verifier["contexts"]["wrong"]
    assert verifier["contexts"]["missing"] == 0
    assert verifier["style"]["first_token"] > 0
    assert verifier["style"]["right_share"] == 0.0  # successes have no verifier's text
    assert set(found["silent"]) == {
        "reference",
        *(f"{name}, closing" for name in ("sibling", "verifier")),
    } | {f"{name}, {wording}" for name in ("verifier",) for wording in ("before", "sdpo")}
    assert "max_prompt_tokens" in found["silent"]["verifier, closing"]
    assert found["advice"]["helps"] is True
    assert "feedback.sources=[verifier]" in found["advice"]["sets"][0]


def test_a_person_reads_tables_and_a_command_to_paste(small: Callable[..., Recipe]):
    done = invoke("quickstart", "--problems", "8", "--samples", "2", "--set", "algorithm=grpo")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "8 training problems. Student:" in done.output
    assert "Their style:" in done.output
    assert "Feedback helps, best from verifier" in done.output
    assert "The recipe's algorithm reads no feedback; vpd does." in done.output
    command = next(line for line in done.output.splitlines() if line.startswith("Try: "))
    assert command.endswith("--set algorithm=grpo --set algorithm=vpd --set 'feedback.sources=[verifier]'")
    assert invoke("quickstart", "--set", "steps=-1").exit_code != 0
    assert invoke("quickstart", "--problems", "0").exit_code == 2


def test_reference_solutions_are_tried_where_rows_have_them(own_task: Callable[..., Path]):
    rows = [{"prompt": f"{a}+15=", "answer": f"{a + 15}", "reference": f"{a + 15}"} for a in range(11, 35)]
    wording = 'templates: {reference: "{prompt}\\nA correct answer: {context}"}\n'
    path = own_task("".join(json.dumps(row) + "\n" for row in rows), wording)
    done = invoke(str(path), "--json", "--problems", "9", "--templates", "recipe", "--set", "feedback.max_tokens=1")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    teacher = next(t for t in found["teachers"] if t["source"] == "reference")
    assert teacher["problems"] == 9
    assert teacher["contexts"]["given"] == teacher["contexts"]["completions"] == teacher["contexts"]["cut"] == 18
    assert teacher["style"]["stop_token"] is not None  # of the rows' own answers, since the student has no right one


def test_a_verifier_that_fails_throughout_is_an_error(own_task: Callable[..., Path], tmp_path: Path):
    answer = "    if completion == problem.answer:\n        return 1.0\n"
    (tmp_path / "judge.py").write_text(f"def verify(problem, completion):\n{answer}    raise ValueError('broken')\n")
    sums = [(a, b) for a in (17, 18, 27, 28, 37, 38) for b in (15, 16, 25, 26)]  # all carry: the model gets them wrong
    rows = "".join(f'{{"prompt": "{a}+{b}=", "answer": "{a + b}"}}\n' for a, b in sums)
    path = own_task(rows, task="task: {kind: python, data: rows.jsonl, verifier: judge.py, held_out: 0.25}\n")
    done = invoke(str(path), "--problems", "2")
    assert isinstance(done.exception, SourceError)
    assert "broken" in str(done.exception)


def test_progress_ends_where_it_said(small: Callable[..., Recipe]):
    seen: list[tuple[int, int | None]] = []

    class View(Silent):
        def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
            if name == "probe":
                seen.append((done, total))

    found = probe(small(), problems=3, samples=2, teacher_samples=1, progress=View())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] <= (seen[-1][1] or 0)
    assert found.student.problems == 3


# --- before the first step


def test_the_evaluation_before_the_first_step_in_a_line():
    row = {"student": 0.04, "student_there": 0.05, "teacher": 0.25, "gap": 0.2, "teacher_problems": 24}
    assert (
        gap_line(row) == "feedback helps: teacher 25.0 %, student 5.0 % on 24 problems with feedback (gap +20.0 points)"
    )
    assert gap_line({"gap": None}) is None
    assert not no_gap(row)
    worse = {**row, "teacher": 0.05, "gap": 0.0}
    assert (gap_line(worse) or "").startswith("feedback does not help: ")
    assert no_gap(worse)
    assert not no_gap({**worse, "teacher_problems": 7})
    assert not no_gap({**worse, "student": 0.9})
    assert not no_gap({"gap": None, "student": 0.0})


ANOTHER = "{prompt}{context}\n10+11="  # the teacher answers another problem
BLIND = {"templates__verifier": ANOTHER, "templates__sibling": ANOTHER}


def test_a_teacher_no_better_than_the_student_stops_the_run(small: Callable[..., Recipe], tmp_path: Path):
    with pytest.raises(RunError) as stopped:
        train(small(on_no_gap="stop", **BLIND), tmp_path / "run")
    text = str(stopped.value)
    for part in (
        "teacher 0.0 %, student",
        "on 8 problems",
        "on_no_gap",
        f"vpd-mlx probe {tmp_path / 'run' / 'config.yaml'}",
    ):
        assert part in text
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    # A resume changes nothing about it, unless it is told to.
    with pytest.raises(RunError, match="on_no_gap"):
        train(small(on_no_gap="stop", **BLIND), tmp_path / "run", resume=True)
    summary = train(small(on_no_gap="warn", **BLIND), tmp_path / "run", resume=True)
    assert summary["steps"] == 2


def test_unless_it_is_told_to_warn_or_reads_no_feedback(small: Callable[..., Recipe], tmp_path: Path):
    notes: list[str] = []

    class View(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    assert train(small(on_no_gap="warn", steps=1, **BLIND), tmp_path / "warned", progress=View())["steps"] == 1
    assert any("feedback does not help" in note for note in notes)
    few = small(on_no_gap="stop", steps=1, evaluation__problems=7, **BLIND)
    assert train(few, tmp_path / "few")["steps"] == 1
    assert load_recipe(QUICKSTART).on_no_gap == "stop"
    for key, value in (("preset", "paper"), ("version", 1)):  # the algorithm as published, and the program as it was
        assert load_recipe(QUICKSTART, [(key, value)]).on_no_gap == "warn"
    grpo = small(on_no_gap="stop", steps=1, algorithm="grpo", **BLIND)
    assert train(grpo, tmp_path / "grpo")["steps"] == 1
