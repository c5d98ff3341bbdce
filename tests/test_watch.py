"""Each watchdog barks at its own trouble, once, and at nothing else."""

from __future__ import annotations

import pytest

from vpd_mlx.run.warnings import Warnings, warnings

HEALTHY = {
    "reward": 0.5,
    "length": 40.0,
    "truncated": 0.01,
    "groups_all_right": 0.2,
    "groups_all_wrong": 0.2,
    "contexts": {"verifier": 5},
    "contexts_none": 3,
    "m_step/student_entropy": 0.8,
    "e_step/margin": 0.5,
}


def rows(count: int = 30, **late):
    return [{**HEALTHY, **(late if i >= count // 2 else {})} for i in range(count)]


def test_a_healthy_run_is_left_in_peace():
    assert warnings(rows()) == {}
    assert warnings([]) == {}
    assert warnings(rows(3, **{"groups_all_wrong": 1.0, "e_step/margin": -1.0, "truncated": 1.0})) == {}


@pytest.mark.parametrize(
    ("late", "name", "words"),
    [
        ({"groups_all_right": 1.0}, "all right", "nothing left to learn"),
        ({"groups_all_wrong": 1.0}, "all wrong", "feedback is all there is"),
        ({"groups_all_wrong": 1.0, "contexts": {}}, "all wrong", "nothing is learned"),
        ({"m_step/student_entropy": 0.01}, "entropy", "entropy collapse: 0.800 -> 0.010"),
        ({"truncated": 0.9}, "length", "90% of completions are cut off"),
        ({"length": 3.0}, "length", "length collapse: 40.0 -> 3.0"),
        ({"e_step/margin": -0.2}, "margin", "negative three times"),
        ({"contexts": {}, "m_step/sequences": 0}, "unheard", "no completion of the last 5 steps got feedback"),
    ],
)
def test_each_trouble_is_named(late, name, words):
    found = warnings(rows(**late))
    assert list(found) == [name]
    assert words in found[name]


def test_certainty_is_no_collapse_when_the_answers_are_right():
    assert warnings(rows(**{"m_step/student_entropy": 0.01, "reward": 0.97})) == {}


def test_the_gap_that_is_gone():
    before = {"gap": 0.9, "teacher": 0.95, "student": 0.05, "student_there": 0.05}
    after = {"gap": 0.0, "teacher": 0.4, "student": 0.4, "student_there": 0.4}
    assert "feedback no longer helps" in warnings([], [before, after])["gap"]
    assert warnings([], [before, {**after, "student": 0.95}]) == {}
    assert warnings([], [before, before]) == {}


def test_each_warning_is_said_once_until_it_comes_back():
    w = Warnings()
    bad, good = rows(**{"truncated": 0.9}), rows()
    assert len(w.new(bad)) == 1
    assert w.new(bad) == []
    assert w.new(good) == []
    assert len(w.new(bad)) == 1
