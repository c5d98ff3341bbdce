"""Rollouts that survive a lack of memory, the bound on rows decoded side by side, and what a long run costs beside decoding."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from fakes import tiny_policy
from mlx_lm.sample_utils import apply_top_p

from vpd_mlx.engine import nucleus as nuclei
from vpd_mlx.engine import sampling
from vpd_mlx.engine.live_rows import LiveRows
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.awake import awake
from vpd_mlx.run.loop import train
from vpd_mlx.run.step import Trainer

ROOM = 5  # rows that there is memory for, in one thread


@contextmanager
def watched(policy: Policy, monkeypatch: pytest.MonkeyPatch, room: int | None = None) -> Iterator[list[int]]:
    """The widths of all passes that decode; those wider than `room` fail as mlx does, from the third on."""
    kind, widths = type(policy.model), list[int]()
    real = kind.__call__

    def call(self: Any, inputs: mx.array, **kwargs: Any) -> mx.array:
        if inputs.shape[1] == 1 and kwargs.get("cache") is not None:
            widths.append(inputs.shape[0])
            if room is not None and inputs.shape[0] > room and len(widths) > 2:
                raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")
        return real(self, inputs, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", call)
        yield widths


def in_order(found: Any) -> list[Any]:
    return sorted(found, key=lambda at: at[:2])


@pytest.mark.parametrize("streams", [1, 2])
def test_on_lack_of_memory_the_rows_are_halved_and_sampled_again(monkeypatch: pytest.MonkeyPatch, streams: int):
    policy = tiny_policy()
    prompts = [(3, 4, 5), (6, 7), (8, 9, 10, 11), (12, 13)]
    with watched(policy, monkeypatch, ROOM) as widths:
        found = list(generate(policy, prompts, 4, Sampling(1.0, 1.0, 8, streams=streams), 3))
    rows = 8 if streams == 2 else 4
    assert policy.rollout_rows == rows
    assert f"memory.rollout_rows is {rows} from here on" in policy.notes[-1]
    assert max(widths) > ROOM
    assert widths[-1] <= ROOM
    again = in_order({at[:2]: at for at in found}.values())  # what comes last of a place holds
    policy.rollout_rows = None
    assert again == in_order(generate(policy, prompts, 4, Sampling(1.0, 1.0, 8, rows=rows, streams=streams), 3))


def test_without_rows_to_halve_and_for_other_faults_nothing_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    policy = tiny_policy()
    with watched(policy, monkeypatch, 0) as widths, pytest.raises(RuntimeError, match="Unable to allocate"):
        list(generate(policy, [(3, 4, 5), (6, 7)], 2, Sampling(1.0, 1.0, 8), 3))
    assert set(widths) == {4, 2, 1}
    policy.rollout_rows = None
    monkeypatch.setattr(sampling, "_read", lambda *_: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        list(generate(policy, [(3, 4, 5), (6, 7)], 2, Sampling(1.0, 1.0, 8), 3))
    assert policy.rollout_rows is None


def test_a_run_that_halves_ends_with_the_adapter_of_one_that_was_so_narrow_from_the_start(
    small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found, rows = {}, {"short": None, "narrow": 8}
    for name, given in rows.items():
        recipe = small(memory__rollout_rows=given, steps=1, evaluation__keep_best=False)
        with watched(Trainer.build(recipe).policy, monkeypatch, ROOM) as widths:
            train(recipe, tmp_path / name)
        found[name] = mx.load(str(tmp_path / name / "adapters" / "adapters.safetensors"))
        assert (max(widths) > ROOM) == (given is None)
    short, narrow = found.values()
    assert all(mx.array_equal(short[k], narrow[k]) for k in narrow)
    one, other = ((tmp_path / name / "rollouts.jsonl").read_text() for name in rows)
    assert one == other


def test_the_bound_holds_for_rollouts_critiques_and_evaluations(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    from vpd_mlx.common.stats import Clock

    room = {"feedback__max_prompt_tokens": 192}
    recipe = small(feedback__sources=["critique"], memory__rollout_rows=3, memory__rollout_streams=1, **room)
    trainer = Trainer.build(recipe)
    with watched(trainer.policy, monkeypatch) as widths:
        trainer.roll_out(1, Clock())
        trainer.evaluate(0)
    assert max(widths) == 3


def test_a_prompt_is_read_when_one_of_its_rows_gets_a_place(monkeypatch: pytest.MonkeyPatch):
    policy = tiny_policy()
    read: list[tuple[int, ...]] = []
    real = sampling._read
    monkeypatch.setattr(sampling, "_read", lambda policy, prompt: read.append(prompt) or real(policy, prompt))
    prompts = [(n, n + 1, n + 2) for n in range(3, 15)]
    seen = [len(read) for _ in generate(policy, prompts, 2, Sampling(0.0, 1.0, 5, rows=4), 0)]
    assert seen[0] <= 4  # two of the first rows, and what took the places of those that just finished
    assert seen[-1] == len(prompts)
    assert sorted(set(read)) == sorted(read)


class Layer:
    """Counts how often its rows are copied."""

    def __init__(self, rows: int) -> None:
        self.rows, self.copies = mx.arange(rows), 0

    def filter(self, keep: list[int]) -> None:
        self.rows, self.copies = self.rows[mx.array(keep)], self.copies + 1


def test_finished_rows_leave_the_cache_now_and_then():
    layer = Layer(64)
    rows, live = LiveRows([layer], [9] * 64), list(range(64))
    while len(live) > 1:
        out = (7 * len(live)) % len(live)
        rows.keep([i for i in range(len(live)) if i != out])
        del live[out]
        tokens = mx.array(live)
        assert rows.live(layer.rows).tolist() == live
        assert rows.live(rows.spread(tokens)).tolist() == live
        assert len(layer.rows) <= -(-len(live) * 8 // 7) + 1
    assert layer.copies < 30
    longer = LiveRows([layer := Layer(64)], [9] * 63 + [10])
    longer.keep(list(range(63)))  # without the one long prompt the cache is shorter
    assert layer.copies == 1


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_the_nucleus_is_mlx_lms_without_a_sort_of_the_vocabulary(spread: float, monkeypatch: pytest.MonkeyPatch):
    """A flat distribution's nucleus is wider than the likeliest tokens: then mlx-lm's own function finds it."""
    mx.random.seed(0)
    scores = spread * mx.random.normal((3, 8192))
    logps = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    asked: list[float] = []
    monkeypatch.setattr(nuclei, "apply_top_p", lambda x, p: asked.append(p) or apply_top_p(x, p))
    assert mx.array_equal(nuclei.nucleus(logps, 0.9), apply_top_p(logps, 0.9))
    assert asked == ([0.9] if spread == 1.0 else [])


def test_a_mac_is_kept_awake_for_as_long_as_a_run_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "caffeinate"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nexec sleep 60\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    started: list[Any] = []
    real = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    with awake():
        assert not started  # no Mac
    monkeypatch.setattr(sys, "platform", "darwin")
    with awake():
        while not (tmp_path / "said").exists() or not (tmp_path / "said").read_text():
            assert started[0].poll() is None
        assert (tmp_path / "said").read_text() == f"-i -w {os.getpid()}\n"
    assert started[0].poll() is not None
