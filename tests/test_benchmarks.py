"""The benchmarks run, and what they compare does the same work."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import attention, hybrids, launches, models, work
from benchmarks.measure import peak, side_by_side
from benchmarks.run import Report, counts


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory):
    return models.load(models.make(tmp_path_factory.mktemp("models") / "m", 512))


def test_both_sides_do_the_same_work(policy):
    batch = work.Batch(512, 2, 2, 9, 5)
    assert work.rollouts(policy, batch.groups, 2, 5)() == work.raw_rollouts(policy, batch.groups, 2, 5)() == 20
    u = work.Updates(policy, batch)
    assert work.difference(u.fused(), u.plain()) < 1e-5
    assert work.difference(u.student_backward(), u.fused()) == 0
    assert work.difference(u.fused(), u.backward_of(u.student)) > 1e-2
    assert peak(u.fused) > 0


def test_a_whole_step_trains(policy):
    batch = work.Batch(512, 2, 2, 9, 5)
    before = policy.adapter
    seconds = work.whole_step(work.recipe_of("vpd", every=1), policy, batch, sample=True)()
    assert seconds > 0
    assert any((policy.adapter[k] != before[k]).any() for k in before)


@pytest.mark.parametrize(("make", "size", "most"), [(attention.long_row, 1024, 0.3), (attention.recomputed, 96, 1.0)])
def test_attention_and_recomputing_take_less_to_the_same_gradient(tmp_path: Path, make, size: int, most: float):
    runs = make(tmp_path / "m", size)
    seconds, peaks, gradients = attention.weigh(runs, 1)
    ours, theirs = runs
    assert work.difference(gradients[ours], gradients[theirs]) < 1e-5
    assert peaks[ours] < most * peaks[theirs]
    assert all(s > 0 for s in seconds.values())


def test_a_hybrids_update_is_the_same_in_chunks_and_token_by_token(tmp_path: Path):
    runs = hybrids.runs(models.load(models.make_hybrid(tmp_path / "m", 352)), 30, 5)
    gradients = {name: run() for name, run in runs.items()}
    assert work.difference(gradients[hybrids.SHARED], gradients[hybrids.ONE_BY_ONE]) < 1e-5
    apart = work.difference(gradients[hybrids.APART], gradients[hybrids.ONE_BY_ONE])
    assert 0 < apart < 1e-5  # not the same function


def test_runs_take_turns_and_a_number_is_believed():
    order: list[str] = []

    def run(name: str) -> float | None:
        order.append(name)
        return 2.5 if name == "b" else None

    found = side_by_side({"a": lambda: run("a"), "b": lambda: run("b")}, 2)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert found["b"].seconds == (2.5, 2.5)
    assert found["a"].median < 1


def test_a_requirement_that_is_missed_is_counted(capsys: pytest.CaptureFixture[str]):
    report = Report()
    report.need("speed", 1.2, 1.0, least=True)
    assert report.missed == 0
    report.need("memory", 1.2, 1.0, least=False)
    assert report.missed == 1
    assert "MISSED" in capsys.readouterr().out


def test_launches_are_operations_that_are_no_views():
    a, b = mx.ones((4, 8)), mx.ones((8, 6))
    mx.eval(a, b)
    out = mx.concatenate([(a @ b).T.reshape(2, 12), mx.ones((1, 12))]) + 1
    assert launches.kernels(out) == {"Matmul": 1, "Concatenate": 2, "Add": 1, "Full": 1}
    mx.eval(out)
    assert launches.kernels(out).total() == 0
    with launches.counting() as found:
        mx.eval({"x": [a @ b]}, None)
    assert found == {"Matmul": 1}


def test_the_adapter_launches_and_keeps_less_than_mlx_lms(policy, capsys: pytest.CaptureFixture[str]):
    report = Report()
    counts(report, Path(policy.path))
    assert report.missed == 0, capsys.readouterr().out
