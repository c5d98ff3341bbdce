"""Statistics: rates with intervals, rank statistics, seconds per phase. Only numpy is needed."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt

__all__ = [
    "Clock",
    "Paired",
    "auc",
    "bootstrap_interval",
    "correlation",
    "holm",
    "majority",
    "mean",
    "overlap",
    "paired",
    "paired_t",
    "pass_at_k",
    "powers",
]

Floats = Sequence[float] | npt.NDArray[np.floating]
Z95 = 1.959964  # the normal distribution's 97.5 % quantile


class Clock:
    """Seconds spent in each phase. Work on the device counts for the phase in which it is evaluated."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}
        self.phase = ""

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's seconds under `phase`. A phase within a phase counts only for the inner one."""
        outer, self.phase = self.phase, phase
        start = self.now()
        inner = sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - inner
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - start - inside
            self.phase = outer


def mean(values: Floats) -> float | None:
    """The mean, or None if there are no values: a missing figure is not zero."""
    return float(np.mean(np.asarray(values, np.float64))) if len(values) else None


def auc(positive: Floats, negative: Floats) -> float | None:
    """Probability that a success outranks a failure, ties counting half; None if a class is empty."""
    if not len(positive) or not len(negative):
        return None
    difference = np.asarray(positive, np.float64)[:, None] - np.asarray(negative, np.float64)[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def correlation(x: Floats, y: Floats) -> float | None:
    """Pearson's correlation; None if one side is constant."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that at least one of k completions is right, estimated without bias from `samples` (arXiv 2107.03374).

    Raises:
        ValueError: k exceeds `samples`.
    """
    if k > samples:
        raise ValueError(f"k is {k}, more than the {samples} samples")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def majority(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """maj@k: the score of the most common answer, or the mean score of several that are equally common.

    None is no vote, and without votes the result is the mean of all scores. An answer's score is the mean over its completions.
    """
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return float(np.mean(scores))
    top = max(votes.values())
    by_answer = [[s for a, s in zip(answers, scores, strict=True) if a == w] for w in votes if votes[w] == top]
    return float(np.mean([np.mean(s) for s in by_answer]))


def powers(most: int) -> list[int]:
    """1, 2, 4 … and `most` itself: the k for which pass@k of `most` samples is reported."""
    return sorted({most, *(2**i for i in range(most.bit_length()))})


def bootstrap_interval(
    values: Floats, *, bounds: tuple[float, float] = (0.0, 1.0), draws: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of the mean, resampling problems: (low, high), or None if there are no values.

    If all n values are equal, resampling gives a width of zero. Then Wilson's interval is used: with 95 % confidence, at most a
    share w = z² / (n + z²) of all problems has another value, which lies within `bounds`.
    """
    if not len(values):
        return None
    data = np.asarray(values, np.float64)
    if data.min() == data.max():
        value, rest = float(data[0]), Z95**2 / (len(data) + Z95**2)
        return value - rest * (value - bounds[0]), value + rest * (bounds[1] - value)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (draws, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Mean difference over the problems of both sides, with its 95 % bootstrap interval. Scores in 0..1."""

    difference: float
    low: float
    high: float
    problems: int
    better: int
    worse: int

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `within noise` if the interval contains 0."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "within noise"


def paired(base: Mapping[str, float], other: Mapping[str, float]) -> Paired | None:
    """`other` minus `base`, problem by problem; None if they have no problem in common.

    It resamples differences, so that the spread of difficulty between problems does not widen the interval.
    """
    differences = [other[p] - base[p] for p in base if p in other]
    between = bootstrap_interval(differences, bounds=(-1.0, 1.0))
    if between is None:
        return None
    d = np.asarray(differences)
    return Paired(float(d.mean()), *between, len(d), int((d > 0).sum()), int((d < 0).sum()))


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p of a t test that the mean of paired differences is 0; 1 for fewer than two, and where one is no number."""
    d, n = np.asarray(differences, np.float64), len(differences)
    if n < 2 or not np.isfinite(d).all():
        return 1.0
    spread = d.std(ddof=1) / math.sqrt(n)
    if spread == 0:
        return 0.0 if d.mean() else 1.0
    return _t_tails(float(d.mean() / spread), n - 1)


def _t_tails(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine, odd = math.sin(angle), math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for being so many: below 0.05 of these, the chance of any false finding is at most 5 %.

    S. Holm, Scandinavian Journal of Statistics 6 (1979), 65-70. Raises nothing; no p gives none.
    """
    adjusted, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = least
    return adjusted


def overlap(text: str, source: str, n: int = 4) -> float:
    """Share of the n-word runs of `text` that occur verbatim in `source`: 0..1. A shorter text counts as one run."""
    words, other = text.split(), source.split()
    n = min(n, len(words))
    if n == 0:
        return 0.0
    known = {tuple(other[i : i + n]) for i in range(len(other) - n + 1)}
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return sum(r in known for r in runs) / len(runs)
