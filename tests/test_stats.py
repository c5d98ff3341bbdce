"""Rates and intervals, with numbers worked out by hand or from a table."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from vpd_mlx.common.stats import bootstrap_interval, holm, majority, paired, paired_t, pass_at_k, powers


@pytest.mark.parametrize(
    ("t", "freedom", "p"),  # quantiles of tables
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (4.604, 4, 0.01), (2.042, 30, 0.05)],
)
def test_the_paired_t_test_has_students_tails(t, freedom, p):
    n = freedom + 1
    noise = np.arange(n) - (n - 1) / 2  # mean 0
    shift = t * noise.std(ddof=1) / math.sqrt(n)
    assert paired_t(noise + shift) == paired_t(-(noise + shift)) == pytest.approx(p, rel=2e-3)


def test_a_t_test_that_can_tell_nothing():
    assert [paired_t([]), paired_t([1.0]), paired_t([1.0, math.nan]), paired_t([0.0, 0.0])] == [1.0] * 4
    assert paired_t([1.0, 1.0]) == 0.0


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 0, 2) == 0.0
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)  # of the 6 pairs, one holds no right one
    assert pass_at_k(4, 3, 2) == 1.0
    with pytest.raises(ValueError, match="k is 5, more than the 4 samples"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(("n", "right", "k"), [(6, 2, 3), (5, 1, 4), (7, 3, 2)])
def test_pass_at_k_is_the_share_of_all_draws(n: int, right: int, k: int):
    draws = list(combinations([1] * right + [0] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_the_k_worth_telling():
    assert powers(1) == [1]
    assert powers(4) == [1, 2, 4]
    assert powers(6) == [1, 2, 4, 6]


def test_majority_by_hand():
    assert majority(["5", "5", "7"], [1.0, 1.0, 0.0]) == 1.0
    assert majority(["7", "7", "5"], [0.0, 0.0, 1.0]) == 0.0
    assert majority(["5", "7", "5", "7"], [1.0, 0.0, 1.0, 0.0]) == 0.5  # a tie is a draw by lot


def test_a_bootstrap_interval_is_near_the_normal_one():
    values = [0.0, 1.0] * 100  # a share of one half over 200: 1.96 * sqrt(0.25 / 200) = 0.0693
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(0.5 - 0.0693, abs=0.006)
    assert high == pytest.approx(0.5 + 0.0693, abs=0.006)
    assert bootstrap_interval(values) == (low, high)  # the same figures give the same interval
    assert bootstrap_interval([]) is None


@pytest.mark.parametrize("n", [1, 8, 200])
def test_where_all_agree_the_interval_is_wilsons(n: int):
    z = 1.959964
    for right in (0, n):
        p = right / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert bootstrap_interval([p] * n) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_200_of_200_by_the_table():
    low, high = bootstrap_interval([1.0] * 200)
    assert (round(low, 4), high) == (0.9812, 1.0)
    low, high = bootstrap_interval([0.0] * 200)
    assert (low, round(high, 4)) == (0.0, 0.0188)
    # Partial scores that agree may differ elsewhere, to either side.
    low, high = bootstrap_interval([0.5] * 200)
    assert (round(low, 4), round(high, 4)) == (0.4906, 0.5094)


def test_a_paired_difference_is_sharper_than_two_intervals():
    # Half of the problems are hard for both; the other side solves 10 of 100 more.
    base = {str(i): float(i < 50) for i in range(100)}
    other = {str(i): float(i < 60) for i in range(100)}
    p = paired(base, other)
    assert (p.difference, p.problems, p.better, p.worse, p.verdict) == (pytest.approx(0.1), 100, 10, 0, "better")
    # sd of the difference is sqrt(0.1 * 0.9 / 100) = 0.03
    assert p.low == pytest.approx(0.1 - 1.96 * 0.03, abs=0.011)
    assert p.high == pytest.approx(0.1 + 1.96 * 0.03, abs=0.011)
    assert bootstrap_interval(list(base.values()))[1] > bootstrap_interval(list(other.values()))[0]


def test_only_common_problems_are_paired_and_agreement_is_no_certainty():
    p = paired({"a": 1.0, "b": 0.0, "c": 0.0}, {"b": 1.0, "c": 0.0, "d": 1.0})
    assert (p.difference, p.problems, p.better, p.worse) == (0.5, 2, 1, 0)
    same = paired(dict.fromkeys("abcdefgh", 1.0), dict.fromkeys("abcdefgh", 1.0))
    # Eight problems without a difference: up to 1.96² / (8 + 1.96²) = 32.4 % of all may have one.
    assert (same.low, same.high) == (pytest.approx(-0.3244, abs=1e-4), pytest.approx(0.3244, abs=1e-4))
    assert same.verdict == "within noise"
    assert paired({"a": 1.0}, {"b": 1.0}) is None


def test_verdicts():
    no, yes = dict.fromkeys("abcdefgh", 0.0), dict.fromkeys("abcdefgh", 1.0)
    assert paired(no, yes).verdict == "better"
    assert paired(yes, no).verdict == "worse"
    # three of three proves little: a fair coin does it once in eight times
    assert paired({k: no[k] for k in "abc"}, yes).verdict == "within noise"
