"""Each check finds its own trouble, says so once, and finds nothing else."""

from __future__ import annotations

import pytest

from vpd_mlx.run.warnings import Warnings, warnings

HEALTHY = {
    "reward": 0.5,
    "length": 40.0,
    "truncated": 0.01,
    "groups_all_right": 0.2,
    "groups_all_wrong": 0.2,
    "contexts": {"verifier": 50},
    "contexts_none": 30,
    "contexts_cut": 0,
    "student/entropy": 0.8,
    "e_step/margin": 0.5,
}


def rows(count: int = 30, **late):
    """Steps of which the second half has other figures; a figure that is None there was never logged."""
    healthy = {k: v for k, v in HEALTHY.items() if late.get(k, v) is not None}
    return [{**healthy, **(late if i >= count // 2 else {})} for i in range(count)]


def test_a_healthy_run_is_left_in_peace():
    assert warnings(rows()) == {}
    assert warnings([]) == {}
    assert warnings(rows(3, **{"groups_all_wrong": 1.0, "e_step/margin": -1.0, "truncated": 1.0})) == {}


def test_rows_without_figures_are_no_trouble():
    assert warnings([{}, {"contexts": "text", "reward": "nan", "e_step/margin": None}] * 20, [{}, {"gap": "nan"}]) == {}


@pytest.mark.parametrize(
    ("late", "name", "words"),
    [
        ({"groups_all_right": 1.0}, "all right", "all completions are right in 100.0 % of the last groups"),
        ({"groups_all_right": 1.0}, "all right", "nothing is left to learn"),
        ({"groups_all_wrong": 1.0}, "all wrong", "all completions are wrong in 100.0 % of the last groups"),
        ({"groups_all_wrong": 1.0}, "all wrong", "only feedback teaches anything"),
        ({"groups_all_wrong": 1.0, "contexts": {}}, "all wrong", "without feedback nothing is learned"),
        ({"student/entropy": 0.01}, "collapse", "entropy has gone from 0.800 to 0.010 nats, and the reward has not"),
        ({"student/entropy": 0.01, "reward": 0.8}, "entropy", "entropy collapse: 0.800 -> 0.010"),
        (
            {"truncated": 0.9},
            "collapse",
            "90.0 % of completions are cut off at the limit, 1.0 % at first, and the reward",
        ),
        ({"reward": 0.1}, "collapse", "the reward has fallen from 0.50 to 0.10"),
        ({"style/first_token": 0.5}, "drift", "the first token is another in 50.0 % of answers"),
        (
            {"truncated": 0.9, "reward": 0.8},
            "truncated",
            "90% of completions are cut off at the limit: the model no longer stops",
        ),
        ({"truncated": 0.3}, "truncated", "30% of completions are cut off: the model learns from unfinished answers"),
        ({"length": 3.0}, "length", "length collapse: 40.0 -> 3.0"),
        ({"length": 90.0}, "length", "length growth: 40.0 -> 90.0"),
        ({"e_step/margin": -0.2}, "margin", "negative three times (last -0.20)"),
        ({"e_step/margin": None, "student/margin": -0.4}, "margin", "margin is negative (-0.40)"),
        ({"e_step/skipped": 1}, "skipped", "15 of 15 E-steps were skipped"),
        ({"contexts": {}, "student/divergence": None}, "no feedback", "of the last 5 steps got feedback"),
        ({"contexts_cut": 40}, "cut", "40.0 % of the feedback was cut"),
        ({"student/nonfinite": 2}, "nonfinite", "30 update(s) were left out"),
        ({"verifier_failures": 3}, "verifier", "the verifier failed on 45 completions"),
    ],
)
def test_each_trouble_is_named(late, name, words):
    found = warnings(rows(**late))
    assert list(found) == [name]
    assert words in found[name]


def test_certainty_is_no_collapse_when_the_answers_are_right():
    assert warnings(rows(**{"student/entropy": 0.01, "reward": 0.97})) == {}


def test_the_gap_that_is_gone():
    before = {"step": 0, "gap": 0.9, "teacher": 0.95, "student": 0.05, "student_there": 0.05}
    after = {"gap": 0.0, "teacher": 0.4, "student": 0.4, "student_there": 0.4}
    assert "feedback no longer helps" in warnings([], [before, after])["gap"]
    assert warnings([], [before, {**after, "student": 0.95}]) == {}
    assert warnings([], [before, before]) == {}


def test_a_student_that_gets_worse():
    problems = [f"p{i}" for i in range(40)]
    first = {"step": 0, "student_greedy": 1.0, "greedy_by_problem": dict.fromkeys(problems, 1.0)}
    last = {"step": 5, "student_greedy": 0.0, "greedy_by_problem": dict.fromkeys(problems, 0.0)}
    assert "greedy 100.0 % before, 0.0 % after" in warnings([], [first, last])["worse"]
    assert warnings([], [last, first]) == {}
    assert warnings([], [first]) == {}


def test_a_best_that_is_past():
    evaluations = [
        {"step": s, "student": v, "student_interval": (v - 0.1, v + 0.1)} for s, v in enumerate((0, 0.9, 0.5))
    ]
    assert "after step 1 (90.0 %), the last is at 50.0 %" in warnings([], evaluations)["past best"]
    assert warnings([], evaluations[:2]) == {}


def test_the_loop_says_at_once_what_fails_and_not_again():
    assert Warnings().new(rows(**{"student/nonfinite": 1, "verifier_failures": 1})) == []


def test_each_warning_is_said_once_until_it_comes_back():
    w = Warnings()
    bad, good = rows(**{"truncated": 0.9}), rows()
    assert len(w.new(bad)) == 1
    assert w.new(bad) == []
    assert w.new(good) == []
    assert len(w.new(bad)) == 1
