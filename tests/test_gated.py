"""`teacher.weights: gated`: when the teacher is renewed, and that a run logs it and goes on from a checkpoint as it stood."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from vpd_mlx.algos.base import restore_parts, save_parts
from vpd_mlx.algos.samples import Sample
from vpd_mlx.algos.settings import TeacherSettings
from vpd_mlx.algos.teacher import Gate, Teacher
from vpd_mlx.common.files import read_rows
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.loop import train
from vpd_mlx.types import Rollout, TokenRow, Verdict


def test_it_opens_where_the_mean_of_three_batches_exceeds_the_last_bar():
    gate = Gate()
    rewards = [0.3, 0.2, 0.4, 0.6, 0.2, 0.3, 0.5]
    # Means: 0.3 (the bar), 0.25, 0.3 (no more than it), 0.4, 0.4, 1.1 / 3, 1 / 3
    assert [gate.opens(r, 10.0, 0.0) for r in rewards] == [False, False, False, True, False, False, False]
    assert gate.bar == pytest.approx(0.4)
    assert gate.opens(0.9, 10.0, 0.0)  # 1.7 / 3
    assert gate.bar == pytest.approx(1.7 / 3)


@pytest.mark.parametrize(
    ("length", "truncated", "opens"),
    [
        (10.0, 0.2, True),
        (20.0, 0.3, True),
        (5.0, 0.0, True),
        (20.1, 0.2, False),
        (4.9, 0.2, False),
        (10.0, 0.31, False),
    ],
)
def test_lengths_must_be_sane(length: float, truncated: float, opens: bool):
    gate = Gate()
    assert not gate.opens(0.1, 10.0, 0.2)
    assert gate.opens(0.5, length, truncated) == opens
    assert gate.bar == (0.3 if opens else 0.1)  # what was refused may be made up for later
    assert gate.opens(0.9, 10.0, 0.2)


class Network:
    """All of a policy that the teacher looks at."""

    def __init__(self, value: float) -> None:
        self.adapter = {"a": mx.array([value])}


def batch(reward: float, *lengths: int, cut: int = 0) -> list[Sample]:
    """A completion for each length, the first of them cut off, all of one score."""
    return [
        Sample(
            0,
            TokenRow((1,), (2,) * n),
            None,
            Rollout((2,) * n, (0.0,) * n, "", "length" if i < cut else "stop", Verdict(reward), reward >= 0.5),
        )
        for i, n in enumerate(lengths)
    ]


def value(teacher: Teacher) -> float:
    return float((teacher.weights or {})["a"].item())


def test_the_teacher_stands_still_until_then():
    teacher = Teacher(TeacherSettings(weights="gated"), Network(0.0))  # type: ignore[arg-type]
    seen = []
    for step, samples in enumerate(
        (
            batch(0.2, 4, 6),
            batch(0.1, 4, 6),
            batch(0.9, 4, 6, cut=1),  # half of them are cut off
            batch(0.9, 4, 18),  # more than twice as long
            batch(0.3, 4, 6),
            batch(0.3, 4, 6),
        ),
        start=1,
    ):
        logged = teacher.end_batch(Network(float(step)), samples)  # type: ignore[arg-type]
        seen.append((logged["teacher/refreshed"], value(teacher)))
    assert seen == [(0, 0.0), (0, 0.0), (0, 0.0), (0, 0.0), (1, 5.0), (0, 5.0)]
    assert teacher.end_batch(Network(7.0), []) == {"teacher/refreshed": 0}  # type: ignore[arg-type]
    # Back to another adapter: the next batch sets a new bar, and lengths are compared with the first batch's.
    teacher.reset(Network(8.0), 0.5)  # type: ignore[arg-type]
    assert value(teacher) == 8.0
    for step, (samples, want) in enumerate(
        ((batch(0.1, 4, 6), 0), (batch(0.9, 22, 22), 0), (batch(0.2, 4, 6), 1)), start=9
    ):
        assert teacher.end_batch(Network(float(step)), samples) == {"teacher/refreshed": want}  # type: ignore[arg-type]
    assert value(teacher) == 11.0


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_checkpoint_holds_weights_and_gate(after: int):
    batches = [batch(1 / 3, 4, 6), batch(0.1, 4, 7, cut=1), batch(0.7, 3, 6), batch(0.8, 4, 6), batch(0.9, 5, 6)]
    whole = Teacher(TeacherSettings(weights="gated"), Network(0.0))  # type: ignore[arg-type]
    resumed = Teacher(TeacherSettings(weights="gated"), Network(9.0))  # type: ignore[arg-type]
    for step, samples in enumerate(batches, start=1):
        want = whole.end_batch(Network(float(step)), samples)  # type: ignore[arg-type]
        if step > after:
            assert resumed.end_batch(Network(float(step)), samples) == want  # type: ignore[arg-type]
        elif step == after:
            arrays, scalars = save_parts({"teacher": whole})
            restore_parts({"teacher": resumed}, arrays, json.loads(json.dumps(scalars)))
    assert resumed.gate == whole.gate
    assert value(resumed) == value(whole) > 0


@pytest.mark.parametrize("algorithm", ["vpd", "srpo"])
def test_a_run_logs_when_it_was_renewed(small: Callable[..., Recipe], tmp_path: Path, algorithm: str):
    recipe = small(algorithm=algorithm, teacher__weights="gated", steps=3, seed=2, task__eval_only=None)
    train(recipe, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    gate = Gate()
    assert [row["teacher/refreshed"] for row in rows] == [
        int(gate.opens(row["reward"], row["length"], row["truncated"])) for row in rows
    ]
    assert {row["teacher/refreshed"] for row in rows} == {0, 1}
