"""Numbers about numbers: rates with intervals, rank statistics, seconds per phase. Pure Python and numpy."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import comb

import numpy as np
import numpy.typing as npt

__all__ = ["Clock", "auc", "bootstrap_interval", "correlation", "majority", "mean", "overlap", "pass_at_k"]

Floats = Sequence[float] | npt.NDArray[np.floating]


class Clock:
    """Seconds spent in each phase. What runs on the device must be evaluated within its phase to count there."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.seconds: dict[str, float] = {}
        self.phase = ""

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's seconds under `phase`; a phase within a phase counts for the inner one alone."""
        outer, self.phase = self.phase, phase
        start = self._now()
        inner = sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - inner
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - start - inside
            self.phase = outer


def mean(values: Floats) -> float | None:
    """The mean, or None of nothing: a missing figure is not a zero."""
    return float(np.mean(np.asarray(values, np.float64))) if len(values) else None


def auc(positive: Floats, negative: Floats) -> float | None:
    """Probability that a success outranks a failure, ties counting half; None where a class is empty."""
    if not len(positive) or not len(negative):
        return None
    difference = np.asarray(positive, np.float64)[:, None] - np.asarray(negative, np.float64)[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def correlation(x: Floats, y: Floats) -> float | None:
    """Pearson's correlation; None where a side does not vary."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that k of `samples` completions hold a right one, unbiased (arXiv 2107.03374).

    Raises:
        ValueError: k is more than `samples`.
    """
    if k > samples:
        raise ValueError(f"k is {k}, more than the {samples} samples")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def majority(texts: Sequence[str], scores: Sequence[float]) -> float:
    """maj@k: the score of the commonest answer; of equally common ones, their mean."""
    counts = Counter(texts)
    top = max(counts.values())
    winners = [t for t in counts if counts[t] == top]
    return float(np.mean([np.mean([s for t, s in zip(texts, scores, strict=True) if t == w]) for w in winners]))


def bootstrap_interval(
    values: Floats, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of the mean, resampling problems: (low, high), or None of nothing."""
    if not len(values):
        return None
    rng = np.random.default_rng(seed)
    data = np.asarray(values, np.float64)
    means = data[rng.integers(0, len(data), (draws, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def overlap(text: str, source: str, n: int = 4) -> float:
    """Share of the n-word runs of `text` that stand verbatim in `source`: 0..1. A shorter text counts as one run."""
    words, other = text.split(), source.split()
    n = min(n, len(words))
    if n == 0:
        return 0.0
    known = {tuple(other[i : i + n]) for i in range(len(other) - n + 1)}
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return sum(r in known for r in runs) / len(runs)
