"""Several ranks: real processes on loopback, through mlx's ring."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from command import within

from vpd_mlx.common.files import read_rows
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.ranks import ALONE, Ranks, _addresses, _dial
from vpd_mlx.errors import ConfigError, RunError
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.setup import check_ranks
from vpd_mlx.run.state import find_checkpoint
from vpd_mlx.run.step import Trainer
from vpd_mlx.types import TokenRow, Verdict

pytestmark = pytest.mark.exact  # bits are compared

ALGORITHMS = ("vpd", "sdpo", "grpo", "joint", "reshape", "reweight", "srpo", "rlcsd")
PROMPTS, GROUP = 6, 4
SMALL = (
    f"rollout.prompts={PROMPTS}",
    f"rollout.group_size={GROUP}",
    "evaluation.problems=7",
    "evaluation.samples=1",
    "checkpoint.every=2",
    "on_no_gap=warn",
)


class Pretended(Ranks):
    """Rank `index` of `size` that exchanges nothing: for what is decided without asking."""

    def __init__(self, index: int, size: int) -> None:
        super().__init__()
        self.index, self.size = index, size


def start(arguments: list[str], folder: Path, count: int = 2) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` as ranks of one ring; one alone is no ring."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
    for s in sockets:
        s.close()
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if count > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def end(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each."""
    try:
        found = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, found, strict=True)]


def training(folder: Path, *more: str, out: str = "run") -> list[str]:
    """Arguments of a quickstart of `PROMPTS` times `GROUP` completions a step."""
    sets = [word for key in SMALL for word in ("--set", key)]
    return ["-m", "vpd_mlx", "train", "quickstart", "--out", str(folder / out), "-q", *sets, *more]


def resumed(run: Path, steps: int) -> list[str]:
    return ["-m", "vpd_mlx", "train", "--resume", str(run), "--steps", str(steps), "-q"]


def weights(run: Path) -> dict[str, Any]:
    loaded: Any = mx.load(str(run / "adapters" / "adapters.safetensors"))
    return {k: np.array(v) for k, v in loaded.items()}


# --- the update


LEARN = """
import pickle, sys
from pathlib import Path
import numpy as np
from mlx.utils import tree_flatten
from vpd_mlx.algos.base import Step
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.ranks import Ranks
from vpd_mlx.run.step import Trainer
from vpd_mlx.engine import learner

ranks, found = Ranks.of_environment(), {}
applied = learner.Learner.apply
def apply(self, policy, gradients):
    own = sum(float(np.abs(np.array(g)).sum()) for _, g in tree_flatten(gradients))
    summed = policy.ranks.sum(gradients)
    found[name].append((own, {k: np.array(v) for k, v in tree_flatten(summed)}))
    return applied(self, policy, gradients)
learner.Learner.apply = apply
for name, recipe, groups in pickle.loads(Path(sys.argv[1]).read_bytes()):
    found[name] = []
    trainer = Trainer.build(recipe, ranks=ranks)
    metrics = [trainer.algorithm(trainer.policy, groups, Step(i + 1, 0, Clock())) for i in range(2)]
    found[name] = (found[name], {k: np.array(v) for k, v in trainer.policy.adapter.items()}, metrics)
Path(f"{sys.argv[2]}-{ranks.index}").write_bytes(pickle.dumps(found))
"""


def test_two_ranks_make_the_update_of_one_on_the_union_batch(small: Callable[..., Recipe], tmp_path: Path):
    """Gradients to 1e-6 of the largest, after an update too, for every algorithm; in minibatches; and both ranks the same."""
    jobs = []
    for name in ALGORITHMS:
        recipe = small(algorithm=name, e_step__every=1, m_step__minibatch_prompts=3, grpo__minibatch_prompts=3)
        jobs.append((name, recipe))
    trainer = Trainer.build(jobs[0][1])
    _, sampled = trainer.roll_out(1, Clock())
    groups = [  # a third right in every group, so that no rank's share is without a signal
        replace(g, rollouts=tuple(r.graded(Verdict(float(i % 3 == 0)), 1.0) for i, r in enumerate(g.rollouts)))
        for g in sampled
    ]
    batch = tmp_path / "batch"
    batch.write_bytes(pickle.dumps([(name, recipe, groups) for name, recipe in jobs]))
    script = tmp_path / "learn.py"
    script.write_text(LEARN)
    subprocess.run([sys.executable, str(script), str(batch), str(tmp_path / "alone")], check=True, timeout=300)
    for code, _, error in end(start([str(script), str(batch), str(tmp_path / "two")], tmp_path), 300):
        assert code == 0, error
    alone = pickle.loads((tmp_path / "alone-0").read_bytes())
    two = [pickle.loads((tmp_path / f"two-{rank}").read_bytes()) for rank in range(2)]
    for name in ALGORITHMS:
        updates, adapter, metrics = alone[name]
        for rank, found in enumerate(two):
            theirs, _, their_metrics = found[name]
            assert len(theirs) == len(updates) >= 2
            assert any(own > 0 for own, _ in theirs), f"{name}: rank {rank} had nothing to do"
            for (_, mine), (_, summed) in zip(updates, theirs, strict=True):
                largest = max(float(np.abs(g).max()) for g in mine.values())
                for k, g in mine.items():
                    assert np.abs(summed[k] - g).max() <= 1e-6 * max(1.0, largest), (name, rank, k)
            for a, b in zip(metrics, their_metrics, strict=True):
                assert [k for k in a if a[k] is None] == [k for k in b if b[k] is None], name
                numbers = {k: v for k, v in a.items() if v is not None}
                assert numbers == pytest.approx({k: b[k] for k in numbers}, rel=1e-3, abs=1e-4), name
        assert all(np.array_equal(two[0][name][1][k], two[1][name][1][k]) for k in adapter), name
        assert max(float(np.abs(two[0][name][1][k] - v).max()) for k, v in adapter.items()) <= 1e-6, name


# --- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    for code, out, error in end(start(training(folder, "--steps", "4", out="whole"), folder)):
        assert (code, out, error) == (0, "", "")
    return folder / "whole"


def test_two_ranks_train_and_go_on_as_if_never_stopped(whole: Path, tmp_path: Path):
    """One writer, every prompt once, and a resume to the same bits."""
    rows = read_rows(whole / "rollouts.jsonl")
    recipe_rows = [r for r in rows if r["step"] == 1]
    assert len(recipe_rows) == PROMPTS * GROUP  # the recipe's prompts and completions, divided, not doubled
    assert len({(r["problem"], r["sample"]) for r in recipe_rows}) == len(recipe_rows)
    half = len(recipe_rows) // 2
    halves = [[r["pieces"] for r in recipe_rows[i : i + half]] for i in (0, half)]
    assert halves[0] != halves[1]  # each rank draws by a seed of its own
    assert [r["step"] for r in read_rows(whole / "metrics.jsonl")] == [1, 2, 3, 4]
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["ranks"], summary["problems"]) == (2, 7)
    assert not (whole / "rank-1").exists()
    end(start(training(tmp_path, "--steps", "2", out="parts"), tmp_path))
    for code, _, error in end(start(resumed(tmp_path / "parts", 4), tmp_path)):
        assert code == 0, error
    expected, found = weights(whole), weights(tmp_path / "parts")
    assert all(np.array_equal(expected[k], found[k]) for k in expected)


COLLAPSE = """
from vpd_mlx.__main__ import main
from vpd_mlx.run import collapse
from vpd_mlx.run.watch import Collapse
collapse.collapse = lambda rows: Collapse("length", "it rambles") if rows[-1]["step"] == 2 else None
main()
"""


def test_two_ranks_choose_the_same_adapter_and_go_back_together(tmp_path: Path):
    chosen = (
        "evaluation.keep_best=true",
        "evaluation.selection=3",
        "evaluation.selection_every=1",
        "on_collapse=revert",
    )
    sets = [word for key in chosen for word in ("--set", key)]
    done = end(start(["-c", COLLAPSE, *training(tmp_path, "--steps", "3", *sets)[2:]], tmp_path))
    assert [code for code, *_ in done] == [0, 0], done
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [("watch/reverted_to" in row) for row in rows] == [False, True, False]
    assert [(s["step"], s["problems"]) for s in read_rows(tmp_path / "run" / "selection.jsonl")] == [
        (n, 3) for n in range(4)
    ]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["reverts"], summary["selection"]) == (1, 3)


def test_the_number_of_ranks_may_change_on_resume(whole: Path, tmp_path: Path):
    """From two to one, and from one to two."""
    fewer = shutil.copytree(whole, tmp_path / "fewer")
    assert within(*resumed(fewer, 5)[2:], cwd=tmp_path).returncode == 0
    assert within(*training(tmp_path, "--steps", "1", out="more")[2:], cwd=tmp_path).returncode == 0
    for code, _, error in end(start(resumed(tmp_path / "more", 2), tmp_path)):
        assert code == 0, error
    for run, steps, ranks in ((fewer, 5, 1), (tmp_path / "more", 2, 2)):
        rows = read_rows(run / "rollouts.jsonl")
        assert [sum(r["step"] == step + 1 for r in rows) for step in range(steps)] == [PROMPTS * GROUP] * steps
        assert json.loads((run / "summary.json").read_text())["ranks"] == ranks


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 60
    while len(read_rows(run / "metrics.jsonl")) < step:
        ended = [p.communicate() for p in processes if p.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other_with_an_error_and_a_checkpoint(tmp_path: Path, victim: int):
    processes = start(training(tmp_path, "--steps", "500"), tmp_path)
    wait_for_step(tmp_path / "run", 3, processes)
    processes[victim].kill()
    killed = time.monotonic()
    code, _, error = end(processes, 30)[1 - victim]
    assert time.monotonic() - killed < 30
    assert code == RunError.exit_code
    assert f"vpd-mlx: rank {1 - victim} has lost another rank" in error
    assert "--resume" in error
    found, notes = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert not notes
    if victim == 1:
        assert found.step == len(read_rows(tmp_path / "run" / "metrics.jsonl"))  # the last whole step is not lost
    assert [code for code, *_ in end(start(resumed(tmp_path / "run", found.step + 1), tmp_path))] == [0, 0]


IMPATIENT = """
from vpd_mlx.__main__ import main
from vpd_mlx.engine import ranks
assert ranks.SILENCE == 20
ranks.SILENCE = 10.0
main()
"""


@pytest.mark.long
def test_a_frozen_rank_is_noticed(tmp_path: Path):
    processes = start(["-c", IMPATIENT, *training(tmp_path, "--steps", "500")[2:]], tmp_path)
    wait_for_step(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    processes[0].wait(60)
    assert time.monotonic() - frozen < 20
    processes[1].send_signal(signal.SIGCONT)  # the machine wakes up
    (code, _, error), (other, *_) = end(processes)
    assert (code, other) == (RunError.exit_code, RunError.exit_code)
    assert "rank 0 has lost rank 1, which has been silent for 10 seconds" in error


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(tmp_path: Path):
    processes = start(training(tmp_path, "--steps", "500"), tmp_path)
    wait_for_step(tmp_path / "run", 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert [code for code, *_ in end(processes)] == [143, 143]
    found, _ = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.step == len(read_rows(tmp_path / "run" / "metrics.jsonl"))


def test_a_failing_source_on_one_rank_is_told_by_both(tmp_path: Path):
    critic = tmp_path / "critic.py"
    critic.write_text("import os, sys\nsys.exit('no ink' if os.environ['MLX_RANK'] == '1' else 'no paper')\n")
    command = f'feedback.command=["{sys.executable}", "{critic}"]'
    only = ["--set", "feedback.sources=[command]", "--set", command, "--set", "feedback.max_failures=3"]
    for code, _, error in end(start(training(tmp_path, "--steps", "5", *only), tmp_path)):
        assert code == 3
        assert "feedback source command failed 3 times in a row" in error
        assert "Traceback" not in error


# --- what is decided without asking


def test_shares_are_whole_and_balanced():
    rows = [TokenRow((p,) * 30, tuple(range(n))) for p in range(5) for n in (3, 9, 4)]
    shares = [Pretended(i, 2).own_rows(rows) for i in range(2)]
    assert sorted(i for share in shares for i in share) == list(range(len(rows)))
    prompts = [{rows[i].prompt for i in share} for share in shares]
    assert not prompts[0] & prompts[1]  # a prompt is read by one rank only
    few = [Pretended(i, 3).own_rows(rows[:6]) for i in range(3)]  # two prompts for three ranks: row by row
    assert sorted(i for share in few for i in share) == list(range(6))
    assert all(few)
    assert [list(Pretended(i, 3).own_range(7)) for i in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert ALONE.own_rows(rows) == list(range(len(rows)))


def test_a_recipe_that_is_not_for_so_many_is_refused(small: Callable[..., Recipe]):
    recipe = small(rollout__prompts=4, feedback__sources=["human", "verifier"])
    policy: Any = type("Policy", (), {"ranks": Pretended(0, 5)})
    with pytest.raises(ConfigError, match=r"rollout.prompts: 4 for 5 ranks(.|\n)*feedback.sources: human cannot serve"):
        check_ranks(recipe, policy, Trainer.build(small()).task)


def test_what_differs_between_ranks_is_named(monkeypatch: pytest.MonkeyPatch):
    ranks = Pretended(0, 2)
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, "mlx 0.1"])
    with pytest.raises(RunError, match="rank 1 differs from rank 0 in versions"):
        ranks.agree("versions", "mlx 0.2")


def test_the_heartbeat_admits_nobody_without_the_token(tmp_path: Path):
    assert "127.0.0.1" in _addresses({})
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["192.0.2.7:5000"], ["192.0.2.8:5000"]]')
    assert _addresses({"MLX_HOSTFILE": str(hosts)})[0] == "192.0.2.7"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def turn_away() -> None:
            line, _ = server.accept()
            line.close()

        thread = threading.Thread(target=turn_away)
        thread.start()
        assert _dial(["127.0.0.1"], port, b"x" * 16, 1) is None
        thread.join()
