"""Timings that hold on a busy machine: alternating, in one process, compared as ratios of medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

__all__ = ["Timing", "peak", "side_by_side"]

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return f"{self.median:.3f} s ({min(self.seconds):.3f} to {max(self.seconds):.3f})"


def side_by_side(runs: Mapping[str, Run], repeats: int) -> dict[str, Timing]:
    """Each run once unmeasured, then all of them in turn, `repeats` times, every second time in reverse.

    If a run returns a float, that is its time, measured by the process that did the work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    order = list(runs)
    for i in range(repeats):
        for name in order if i % 2 == 0 else reversed(order):
            mx.clear_cache()
            start = time.perf_counter()
            own = runs[name]()
            took = time.perf_counter() - start
            seconds[name].append(own if isinstance(own, float) else took)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def peak(run: Run) -> int:
    """Peak bytes above those in use before. The lowest of three, because memory that mlx frees late counts too."""
    found = []
    for _ in range(3):
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        run()
        found.append(mx.get_peak_memory() - before)
    return min(found)
