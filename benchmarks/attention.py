"""Attention in blocks against whole, and recomputed blocks with and without a shared prompt."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks import models, work
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.settings import MemorySettings

__all__ = ["PARTS", "long_row", "recomputed", "weigh"]

Runs = Mapping[str, Callable[[], Any]]
SIZE = 2_048


def weigh(runs: Runs, repeats: int) -> tuple[dict[str, float], dict[str, int], dict[str, Any]]:
    """Median CPU seconds of the process, lowest peak of bytes above those before, and last result of each run, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[int]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for i in range(repeats):
        for name in runs if i % 2 == 0 else reversed(list(runs)):
            results.pop(name, None)
            gc.collect()
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            start = time.process_time()
            results[name] = runs[name]()
            seconds[name].append(time.process_time() - start)
            peaks[name].append(mx.get_peak_memory() - before)
    return {n: statistics.median(s) for n, s in seconds.items()}, {n: min(p) for n, p in peaks.items()}, results


def _set(policy: Policy, name: str, value: object, run: Callable[[], Any]) -> Callable[[], Any]:
    def run_with() -> Any:
        before = getattr(policy, name)
        setattr(policy, name, value)
        try:
            return run()
        finally:
            setattr(policy, name, before)

    return run_with


def long_row(folder: Path, tokens: int = 4_096) -> Runs:
    """Forward and backward of one row with its attention in blocks, and whole. One block of the network, 8 heads."""
    made = models.make(folder, SIZE, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4)
    policy = models.load(made)
    u = work.Updates(policy, work.Batch(SIZE, 1, 1, tokens * 3 // 4, tokens // 4))
    run = lambda: u.backward_of(u.student)  # noqa: E731
    return {"in blocks": run, "whole": _set(policy, "long", None, run)}


def recomputed(folder: Path, prompt: int = 512) -> Runs:
    """Forward and backward of 8 completions of 32 tokens, blocks recomputed, their prompt read once and for each."""
    policy = models.load(models.make(folder, SIZE), MemorySettings(gradient_checkpointing=True))
    u = work.Updates(policy, work.Batch(SIZE, 1, 8, prompt, 32))
    run = lambda: u.backward_of(u.student)  # noqa: E731
    return {"shared": run, "apart": _set(policy, "shares_prompts", False, run)}


PARTS: tuple[tuple[str, Callable[[Path], Runs], float, float], ...] = (
    ("One row of 4,096 tokens, a block of 8 heads", long_row, 1 / 8, 1.3),
    ("8 completions of 32 tokens behind 512, blocks recomputed", recomputed, 1.1, 1 / 3),
)
"""Title, runs, and what the first may take at most of the second's peak and time."""
