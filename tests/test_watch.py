"""Watchdogs on rows: harm is seen within three steps, noise and learning are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vpd_mlx.run.warnings import Warnings, warnings
from vpd_mlx.run.watch import WINDOW, collapse, drift, lineage, moves_right

CALM = {"reward": 0.0, "truncated": 0.03, "length_median": 40.0, "style": 0.05, "student/entropy": 0.5}


def row(step: int, **figures: Any) -> dict[str, Any]:
    """A step of 8 problems x 4 completions; `style` is short for the figure's name."""
    found = {**CALM, **figures}
    style = found.pop("style")
    return {
        "step": step,
        "groups": 8,
        "contexts": {"verifier": 32},
        "contexts_none": 0,
        "style/first_token": style,
        **found,
    }


def run(onset: int = 9, steps: int = 20, **harmed: Any) -> list[dict[str, Any]]:
    """A run with other figures from a step on."""
    return [row(s, **(harmed if s >= onset else {})) for s in range(1, steps + 1)]


def first_alarm(rows: list[dict[str, Any]]) -> tuple[int, str] | None:
    for n in range(1, len(rows) + 1):
        if (found := collapse(rows[:n])) is not None:
            return n, found.cause
    return None


@pytest.mark.parametrize(
    ("harmed", "cause"),
    [
        ({"truncated": 0.7}, "truncated"),
        ({"truncated": 0.4, "style": 0.9}, "style"),
        ({"length_median": 200.0, "style": 0.6}, "length"),
        ({"student/entropy": 0.01}, "entropy"),
        ({"student/entropy": 0.9, "style": 0.8}, "style"),
    ],
)
def test_harm_is_seen_within_three_steps(harmed, cause):
    at, seen = first_alarm(run(**harmed))
    assert at <= 9 + WINDOW - 1
    assert seen == cause


def test_a_reward_that_falls_is_seen_within_three_steps():
    rows = [row(s, reward=0.5 if s < 15 else 0.05) for s in range(1, 25)]
    assert first_alarm(rows) == (17, "reward")


def test_the_first_steps_are_compared_as_soon_as_there_are_five():
    """What the issue's run did: in eight steps from a format to chatter, at a reward of 0 throughout."""
    cut = [0.03, 0.03, 0.1, 0.3, 0.5, 0.7, 0.85, 1.0]
    rows = [row(s, truncated=t, style=min(0.9, 0.15 * s)) for s, t in enumerate(cut, 1)]
    at, _ = first_alarm(rows)
    assert at <= 6


@pytest.mark.parametrize(
    "figures",
    [
        {"style": 0.95},  # a format is learned, or the answer's first token
        {"style": 0.95, "reward": 0.4, "truncated": 0.5, "length_median": 200.0},  # the reward pays
        {"length_median": 200.0},  # longer, in the same style
        {"truncated": 0.12},
        {"style": None, "truncated": None, "length_median": None, "student/entropy": None, "reward": None},
    ],
)
def test_a_change_that_harms_nothing_is_no_collapse(figures):
    assert first_alarm(run(**figures)) is None


# (reward, cut-off share, median length, entropy, share of first tokens that are others) by step, of SmolLM2-135M-Instruct.
GONE = [  # orders to JSON, a live teacher, the closing instruction behind the context: learning was over by step 5
    *(
        (0.0, 0.78, 28, 0.89, 0.0),
        (0.0, 0.66, 28, 0.79, 0.08),
        (0.03, 0.75, 28, 0.93, 0.48),
        (0.0, 0.91, 28, 0.78, 0.86),
    ),
    *((0.06, 1.0, 28, 1.16, 0.94), (0.0, 1.0, 28, 1.35, 0.97), (0.0, 1.0, 28, 1.49, 1.0), (0.0, 0.94, 28, 1.83, 0.97)),
]
LEARNT = [  # dates as YYYY-MM-DD, an EMA teacher: 0 to 87.5 % greedy in 16 steps
    *(
        (0.0, 0.38, 16, 1.46, 0.0),
        (0.03, 0.22, 16, 1.29, 0.2),
        (0.0, 0.41, 17.5, 1.22, 0.31),
        (0.0, 0.38, 16, 1.34, 0.31),
    ),
    *(
        (0.06, 0.16, 14.5, 1.05, 0.61),
        (0.28, 0.12, 11, 1.19, 0.83),
        (0.28, 0.22, 11, 1.16, 0.66),
        (0.25, 0.22, 11, 1.3, 0.83),
    ),
    *(
        (0.38, 0.34, 13.5, 1.06, 0.73),
        (0.34, 0.19, 11, 0.99, 0.73),
        (0.53, 0.16, 11, 0.92, 0.81),
        (0.56, 0.19, 11, 0.94, 0.86),
    ),
    *(
        (0.38, 0.22, 11, 1.07, 0.84),
        (0.69, 0.06, 11, 0.72, 0.88),
        (0.72, 0.12, 11, 0.65, 0.94),
        (0.81, 0.09, 11, 0.57, 0.88),
    ),
]


def real(steps: list[tuple[float, ...]]) -> list[dict[str, Any]]:
    names = ("reward", "truncated", "length_median", "student/entropy", "style")
    return [row(n, **dict(zip(names, figures, strict=True))) for n, figures in enumerate(steps, 1)]


def test_a_pretrained_model_that_lost_its_format_and_one_that_learnt_another():
    at, cause = first_alarm(real(GONE))
    assert at <= 5 + WINDOW - 1
    assert cause == "style"
    learnt = real(LEARNT)
    assert first_alarm(learnt) is None
    assert all(drift(learnt[:n]) is None for n in range(1, len(learnt) + 1))


def test_style_that_moves_without_a_gain_is_a_warning_of_its_own():
    assert "90.0 % of answers" in drift(run(style=0.9))
    assert drift(run(style=0.9, reward=0.4)) is None
    assert drift(run(style=0.2)) is None
    assert list(warnings(run(style=0.9))) == ["drift"]


def noisy(rng: np.random.Generator, right: float, cut: float, alike: float, steps: int = 60) -> list[dict[str, Any]]:
    """Steps of one and the same model on problems of different difficulty: 8 x 4 draws each."""
    k = (1 - alike) / alike
    out = []
    for step in range(1, steps + 1):
        shares = [rng.beta(p * k, (1 - p) * k, 8) for p in (right, cut)]
        reward, truncated = (float((rng.random((8, 4)) < s[:, None]).mean()) for s in shares)
        median = float(np.median(rng.lognormal(np.log(40), 0.8, 32)))
        out.append(row(step, reward=reward, truncated=truncated, length_median=median, style=0.3))
    return out


@pytest.mark.parametrize("right", [0.02, 0.1, 0.3, 0.6])
def test_noise_is_no_collapse(right):
    rng = np.random.default_rng(0)
    runs = [noisy(rng, right, cut, alike) for cut in (0.02, 0.3) for alike in (0.3, 0.7) for _ in range(5)]
    assert [at for rows in runs if (at := first_alarm(rows))] == []


def test_after_a_revert_the_steps_that_it_undid_do_not_count():
    rows = run(truncated=0.9, steps=11)
    rows[-1] |= {"watch/reverted_to": 4, "watch/collapse": "too long"}
    assert [r["step"] for r in lineage(rows)[0]] == [1, 2, 3, 4]
    rows += [row(s) for s in range(12, 20)]
    assert first_alarm(rows[11:]) is None
    assert all(collapse(rows[:n]) is None for n in range(11, 20))
    assert [r["step"] for r in lineage(rows)[0]] == [1, 2, 3, 4, *range(12, 20)]
    assert "after step 11 to step 4 (too long)" in warnings(rows)["reverted"]
    rows += [row(s, truncated=0.9) for s in range(20, 23)]
    assert collapse(rows).cause == "truncated"


def test_the_loop_leaves_what_it_has_said_itself_to_the_report():
    rows = run(truncated=0.9, steps=11)
    rows[-1] |= {"watch/stopped": 1, "watch/collapse": "too long"}
    assert "the run stopped after step 11: too long" in warnings(rows)["stopped"]
    assert Warnings().new(rows) == []


def test_a_collapse_that_was_only_seen_is_in_the_report_when_it_is_over():
    rows = [row(s, **({"watch/collapse": "too long"} if 5 <= s < 8 else {})) for s in range(1, 20)]
    assert warnings(rows)["collapsed"] == "a collapse was seen after step 5: too long"


def test_a_teacher_that_moves_right_answers_as_much_as_wrong_ones():
    apart = {"success": 0.3, "student/divergence_right": 0.4, "student/divergence_wrong": 0.3}
    assert "0.40 nats" in moves_right(run(**apart))
    assert moves_right(run(**{**apart, "student/divergence_right": 0.1})) is None
    assert moves_right(run(**{**apart, "success": 0.02})) is None  # too few for a mean


def test_held_out_completions_that_no_longer_stop():
    first, last = ({"step": s, "problems": 24, "truncated": t} for s, t in ((0, 0.05), (10, 0.6)))
    assert (
        "60.0 % of held-out completions are cut off at the limit, 5.0 % before"
        in warnings([], [first, last])["stops less"]
    )
    assert warnings([], [first, {**last, "truncated": 0.15}]) == {}
