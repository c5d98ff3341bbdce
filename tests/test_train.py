"""Whole runs of a real, tiny model: what is written, that it repeats, that it can stop and go on."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import signal
import time
from pathlib import Path
from typing import get_type_hints

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.commands.train import _report
from vpd_mlx.common.files import read_rows
from vpd_mlx.common.stats import Clock
from vpd_mlx.errors import DataError, ModelError, RunError, SourceError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.run import best
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Silent, Stop
from vpd_mlx.run.records import AnswerRow, EvaluationRow, MetricsRow, RolloutRow, Summary
from vpd_mlx.run.state import find_checkpoint
from vpd_mlx.run.step import Trainer, problems_of_step
from vpd_mlx.types import Problem

pytestmark = pytest.mark.exact  # bits are compared


def adapter(run: Path) -> bytes:
    return (run / "adapters" / "adapters.safetensors").read_bytes()


def strip(rows: list[dict]) -> list[dict]:
    """Rows without what a clock says."""
    clocks = ("seconds", "tokens_per_s", "peak_memory_mb")
    return [{k: v for k, v in r.items() if k not in clocks} for r in rows]


def same_logs(a: Path, b: Path) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl", "evals.jsonl", "selection.jsonl", "answers.jsonl"):
        assert strip(read_rows(a / name)) == strip(read_rows(b / name)), name


def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(small, tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(small(seed=seed), tmp_path / name)
    assert adapter(tmp_path / "a") == adapter(tmp_path / "b")
    same_logs(tmp_path / "a", tmp_path / "b")
    assert adapter(tmp_path / "a") != adapter(tmp_path / "c")


def test_a_run_writes_what_it_promises(small, tmp_path: Path, monkeypatch):
    # By the processor's time: on a busy machine much of the other passes between two phases.
    monkeypatch.setattr("vpd_mlx.run.step.Clock", lambda: Clock(time.process_time))
    recipe = small(e_step__every=1, evaluation__every=1)
    summary = train(recipe, tmp_path / "run")
    run = tmp_path / "run"
    metrics = load_run(run).metrics
    rollouts, evals = (read_rows(run / f"{n}.jsonl") for n in ("rollouts", "evals"))
    assert [m["step"] for m in metrics] == [1, 2]
    assert len(rollouts) == 2 * 4 * 4
    assert [e["step"] for e in evals] == [0, 1, 2]
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["before"]["student"] == evals[0]["student"]
    assert summary["after"]["student_greedy"] == evals[-1]["student_greedy"]
    assert load_recipe(run / "config.yaml") == recipe
    for row in metrics:
        phases = sum(v for k, v in row["seconds"].items() if k != "total")
        assert phases >= 0.95 * row["seconds"]["total"], row["seconds"]
        for key in ("reward", "truncated", "groups_mixed", "contexts", "overlap", "student/divergence", "student/mass"):
            assert key in row
    for r in rollouts:
        assert set(r) >= {"prompt", "completion", "score", "success", "context", "tokens", "finish", "verdict"}
        assert r["success"] == (r["score"] >= 0.5)
        assert len(r["pieces"]) == r["tokens"]
        assert ("shift" in r) == (r["context"] is not None)
        assert "shift" not in r or len(r["shift"]) == r["tokens"]


def test_held_out_problems_are_never_trained_on(undisturbed):
    whole, recipe = undisturbed("vpd", {})
    trainer = Trainer.build(recipe)
    train_ids = {p.id for p in trainer.task.train}
    assert not train_ids & {p.id for p in trainer.task.held_out}
    assert {r["problem"] for r in read_rows(whole / "rollouts.jsonl")} <= train_ids


def test_mlx_lm_loads_the_adapter_and_scores_alike(small, tmp_path: Path):
    recipe = small(optimizer__learning_rate=1e-2, optimizer__warmup_steps=0, evaluation__problems=16, steps=4)
    summary = train(recipe, tmp_path / "run")
    answers = {a.problem: a.after["completion"] for a in load_run(tmp_path / "run").answers}
    model, tokenizer = mlx_lm.load(recipe.model, adapter_path=str(tmp_path / "run" / "adapters"))
    trainer = Trainer.build(recipe)
    right = 0
    problems = trainer.task.held_out[:16]
    for p in problems:
        prompt = tokenizer.apply_chat_template(list(p.messages), add_generation_prompt=True, enable_thinking=False)
        text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=6, sampler=make_sampler(temp=0.0))
        assert text == answers[p.id]
        right += text == p.answer
    assert right / len(problems) == summary["after"]["student_greedy"]
    # the adapter did change something: the comparison above is not one of two untrained models
    start, _ = mlx_lm.load(recipe.model)
    ids = mx.array([tokenizer.apply_chat_template([{"role": "user", "content": "47+38="}], add_generation_prompt=True)])
    assert float(mx.abs(start(ids) - model(ids)).max()) > 0.1


class StopAfter(Silent):
    """Asks the run to stop at a chosen moment."""

    def __init__(self, stop: Stop, step: int, phase: str | None = None) -> None:
        self.stop, self.at, self.in_phase, self.now = stop, step, phase, 0

    def step(self, step, steps, metrics, seconds_left):
        self.now = step
        if self.in_phase is None and step == self.at:
            self.stop.signal = signal.SIGTERM

    def phase(self, name, done=0, total=None):
        if self.in_phase is not None and self.now == self.at and name.startswith(self.in_phase):
            self.stop.signal = signal.SIGINT


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Whole runs to compare with, one per algorithm."""
    from conftest import QUICKSTART, SMALL

    done: dict[str, Path] = {}

    def run(algorithm: str, overrides: dict) -> tuple[Path, dict]:
        key = f"{algorithm}{overrides}"
        often = {"steps": 4, "checkpoint.every": 2, "e_step.every": 2, "evaluation.problems": 4}
        settings = {**SMALL, **often, "algorithm": algorithm, **overrides}
        recipe = load_recipe(QUICKSTART, list(settings.items()))
        if key not in done:
            done[key] = tmp_path_factory.mktemp(algorithm) / "whole"
            train(recipe, done[key])
        return done[key], recipe

    return run


LOOKED_AT = {"e_step.until_auc": 0.9, "e_step.every": 1, "rollout.prompts": 8}
CASES = [
    *((name, {}) for name in ALGORITHMS if name != "opsd"),
    ("vpd", {"teacher.weights": "adapter", "e_step.delta": "ema", "e_step.every": 1}),
    ("vpd", LOOKED_AT),
    ("vpd", {"lora.dropout": 0.1, "m_step.minibatch_prompts": 2}),
    ("vpd", {"teacher.weights": "gated", "task.eval_only": None, "seed": 2}),
]


MOMENTS = [(3, None), (1, "rollout"), (2, "update")]
# Every algorithm is stopped once, at one moment or another, and VPD at each.
STOPS = [
    *((*case, MOMENTS[i % len(MOMENTS)]) for i, case in enumerate(CASES)),
    *(("vpd", {}, moment) for moment in MOMENTS[1:]),
]


def test_the_end_of_a_run_says_how_often_its_teacher_was_trained(undisturbed, capsys):
    folder, recipe = undisturbed("vpd", LOOKED_AT)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    looked = [row["e_step/needless"] for row in rows if "e_step/needless" in row]
    assert sum(looked) > 0, "the quickstart's teacher is left alone"
    _report(recipe, folder, json.loads((folder / "summary.json").read_text()))
    said = f"trained in {looked.count(0)} of 4 steps, in {looked.count(1)} it told right from wrong as it was"
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("algorithm", "overrides", "moment"), STOPS, ids=str)
def test_a_stopped_run_goes_on_to_the_same_adapter(undisturbed, tmp_path: Path, algorithm, overrides, moment):
    whole, recipe = undisturbed(algorithm, overrides)
    stop = Stop()
    out = train(recipe, tmp_path / "run", progress=StopAfter(stop, *moment), stop=stop)
    assert out["interrupted"] in (signal.SIGTERM, signal.SIGINT)
    assert out["steps"] < recipe.steps
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "adapters" / "adapters.safetensors").exists()
    train(recipe, tmp_path / "run", resume=True)
    assert adapter(tmp_path / "run") == adapter(whole)
    same_logs(tmp_path / "run", whole)


def test_a_resume_cuts_off_what_came_after_the_checkpoint(undisturbed, tmp_path: Path):
    whole, recipe = undisturbed("vpd", {})
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "half a li')
    train(recipe, run, resume=True)
    assert adapter(run) == adapter(whole)
    same_logs(run, whole)


def declared(key: str, table: type) -> bool:
    names = (re.escape(name).replace("KIND", "[a-z_]+").replace("@K", r"@\d+") for name in get_type_hints(table))
    return any(re.fullmatch(name, key) for name in names)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "opsd"])
def test_every_field_that_is_written_is_declared(undisturbed, algorithm):
    whole, _ = undisturbed(algorithm, {})
    run = load_run(whole)
    rollouts, evaluations, answers = (read_rows(whole / f"{name}.jsonl") for name in ("rollouts", "evals", "answers"))
    summary = json.loads((whole / "summary.json").read_text())
    tables = {MetricsRow: run.metrics, RolloutRow: rollouts, EvaluationRow: evaluations, AnswerRow: answers}
    for table, rows in {**tables, Summary: [summary]}.items():
        assert rows
        assert not [key for row in rows for key in row if not declared(key, table)], table
        always = {k for k in get_type_hints(table) if "/" not in k and "@" not in k}
        always -= {"shift", "source_errors", "interrupted"}
        assert not [key for row in rows for key in always if key not in row], table
    assert summary["format"] == 2


OLD_RUN = Path(__file__).parent / "data" / "old-run"


def test_a_run_of_format_1_is_read_and_resumed(tmp_path: Path):
    """A checkpoint after step 2 of 3, written before metrics had one name whatever the algorithm."""
    from conftest import QUICKSTART

    run = tmp_path / "run"
    shutil.copytree(OLD_RUN, run)
    config = (run / "config.yaml").read_text().replace("MODEL", str(QUICKSTART.parent / "model"))
    (run / "config.yaml").write_text(config)
    old = load_run(run)
    assert "m_step/divergence" in read_rows(run / "metrics.jsonl")[0]
    summary = train(load_recipe(run / "config.yaml"), run, resume=True)
    found = load_run(run)
    assert found.metrics[:2] == old.metrics[:2]
    for row in found.metrics:
        assert {"student/divergence", "student/entropy"} <= set(row)
        assert "student" in row["seconds"]
        assert not any("m_step" in key for key in (*row, *row["seconds"]))
    assert "student" in summary["seconds"]
    assert "m_step" not in summary["seconds"]
    made = json.loads((OLD_RUN / "adapter.json").read_text())
    if (mx.__version__, platform.machine(), str(mx.default_device())) == (made["mlx"], made["machine"], made["device"]):
        assert hashlib.sha256(adapter(run)).hexdigest() == made["sha256"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path: Path, damage: str):
    whole, recipe = undisturbed("vpd", {})
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / "step-000004"
    arrays = newest / "arrays.safetensors"
    if damage == "truncate":
        arrays.write_bytes(arrays.read_bytes()[:-100])
    elif damage == "flip":
        data = bytearray(arrays.read_bytes())
        data[-50] ^= 1
        arrays.write_bytes(bytes(data))
    elif damage == "delete":
        arrays.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    found, notes = find_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert "step-000004" in notes[0]
    train(recipe, run, resume=True)
    assert adapter(run) == adapter(whole)
    shutil.rmtree(run / "checkpoints" / "step-000002", ignore_errors=True)
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(RunError, match="no whole checkpoint"):
        train(recipe, run, resume=True)


def test_two_trainers_on_one_folder(undisturbed, tmp_path: Path):
    from vpd_mlx.run.log import RunLog

    whole, recipe = undisturbed("vpd", {})
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    log = RunLog.reopen(run)
    with pytest.raises(RunError, match=r"another process trains here \(process \d+\)"):
        train(recipe, run, resume=True)
    log.close()


def test_problems_of_a_step_cover_each_epoch_and_depend_on_nothing_else():
    problems = [Problem(str(i), ({"role": "user", "content": str(i)},)) for i in range(10)]
    stream = [p.id for step in range(1, 6) for p in problems_of_step(problems, step, 4, seed=0)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == [str(i) for i in range(10)]
    assert stream[:10] != stream[10:]
    assert [p.id for p in problems_of_step(problems, 3, 4, seed=0)] == stream[8:12]
    assert stream != [p.id for step in range(1, 6) for p in problems_of_step(problems, step, 4, seed=1)]
    assert len(problems_of_step(problems, 1, 25, seed=0)) == 25


VERIFIER = """
def verify(problem, completion):
    {body}
"""


def own(own_task, tmp_path: Path, body: str, rows: str | None = None):
    (tmp_path / "judge.py").write_text(VERIFIER.format(body=body))
    return own_task(rows, task="task: {kind: python, data: rows.jsonl, held_out: 0.25, verifier: judge.py}\n")


def test_a_verifier_of_ones_own_trains(own_task, tmp_path: Path):
    body = "return (1.0, '') if completion == problem.answer else (0.0, 'ones right, tens too low')"
    recipe = load_recipe(own(own_task, tmp_path, body), [("rollout.prompts", 8), ("rollout.group_size", 4)])
    train(recipe, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "rollouts.jsonl")
    assert {r["verdict"] for r in rows if not r["success"]} == {"ones right, tens too low"}


def test_a_verifier_that_fails_costs_the_rollout_never_its_score(own_task, tmp_path: Path):
    body = (
        "if hash_of(completion) % 2 and completion != problem.answer: raise OSError('disk on fire')\n"
        "    return completion == problem.answer"
    )
    (tmp_path / "judge.py").write_text("def hash_of(s): return sum(map(ord, s))\n" + VERIFIER.format(body=body))
    recipe = load_recipe(own_task(task="task: {kind: python, data: rows.jsonl, held_out: 0.25, verifier: judge.py}\n"))
    recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"prompts": 16, "group_size": 4})})
    train(recipe, tmp_path / "run")
    metrics = read_rows(tmp_path / "run" / "metrics.jsonl")[0]
    rollouts = read_rows(tmp_path / "run" / "rollouts.jsonl")
    assert metrics["verifier_failures"] > 0
    assert len(rollouts) + metrics["verifier_failures"] == 64


def test_a_verifier_that_always_fails_stops_the_run_with_its_words(own_task, tmp_path: Path):
    body = "if completion != problem.answer: raise OSError('disk on fire')\n    return 1.0"
    never_right = "".join(f'{{"prompt": "{a}+11=", "answer": "{a + 7000}"}}\n' for a in range(11, 40))
    with pytest.raises(SourceError, match="disk on fire"):
        train(load_recipe(own(own_task, tmp_path, body, never_right)), tmp_path / "run")


def test_a_reference_answer_must_score_one(own_task, tmp_path: Path):
    with pytest.raises(DataError, match=r"the reference answer '\d+' scores 0.5, not 1"):
        train(load_recipe(own(own_task, tmp_path, "return 0.5")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_updates_that_are_never_finite_stop_the_run_with_a_checkpoint(small, tmp_path: Path, monkeypatch):
    recipe = small(steps=20, checkpoint__every=50)
    real = Trainer.step

    def poisoned(self, number):
        if number == 2:
            a = self.policy.adapter
            name = sorted(a)[1]
            self.policy.set_adapter({**a, name: a[name] * float("nan")})
        return real(self, number)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(RunError, match=r"not finite"):
        train(recipe, tmp_path / "run")
    found, _ = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    # the completions of a step whose update was left out are kept: they may show the reason
    dumped = sorted((tmp_path / "run" / "nonfinite").iterdir())
    assert next(p.name for p in dumped) == "step-000002.jsonl"
    assert len(dumped[0].read_text().splitlines()) == 16
    steps = [r["step"] for r in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert found.step == steps[-1]


def test_a_base_model_without_chat_template_trains(small, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(small().model, model)
    (model / "chat_template.jinja").unlink()
    recipe = small(model=str(model))
    assert train(recipe, tmp_path / "run")["steps"] == 2
    trainer = Trainer.build(recipe)
    assert "<|user|>" not in trainer.policy.tokenizer.decode(list(trainer.prompter.student(trainer.task.train[0])))


def test_the_adapter_off_is_the_initial_model(small):
    trainer = Trainer.build(small())
    policy = trainer.policy
    ids = mx.array([[5, 6, 7, 8]])
    start, _ = mlx_lm.load(small().model)
    before = policy.adapter
    policy.set_adapter({k: v + 0.1 for k, v in before.items()})
    assert float(mx.abs(policy.model(ids) - start(ids)).max()) > 0.1
    with policy.adapter_off():
        np.testing.assert_array_equal(np.array(policy.model(ids)), np.array(start(ids)))
    assert float(mx.abs(policy.model(ids) - start(ids)).max()) > 0.1


def test_one_gradient_that_is_not_finite_is_left_out_and_the_run_goes_on(small, tmp_path: Path, monkeypatch):
    from vpd_mlx.engine import learner

    real, calls = learner.accumulate, []

    def poisoned(*args, **kwargs):
        done = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            done.gradients = learner.tree_map(lambda g: g * float("inf"), done.gradients)
        return done

    monkeypatch.setattr("vpd_mlx.algos.m_step.accumulate", poisoned)
    summary = train(small(steps=4, algorithm="sdpo"), tmp_path / "run")
    assert summary["nonfinite_updates"] == 1
    weights = mx.load(str(tmp_path / "run" / "adapters" / "adapters.safetensors"))
    assert all(bool(mx.isfinite(w).all()) for w in weights.values())
    assert [p.name for p in (tmp_path / "run" / "nonfinite").iterdir()] == ["step-000002.jsonl"]


def test_a_short_run_without_one_finite_update_is_no_success(small, tmp_path: Path, monkeypatch):
    from vpd_mlx.engine import learner

    real = learner.accumulate

    def poisoned(*args, **kwargs):
        done = real(*args, **kwargs)
        done.gradients = learner.tree_map(lambda g: g * float("nan"), done.gradients)
        return done

    monkeypatch.setattr("vpd_mlx.algos.m_step.accumulate", poisoned)
    with pytest.raises(RunError, match=r"none of the run's 2 updates was finite; start a new run with a lower"):
        train(small(steps=2, algorithm="sdpo"), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


def test_a_model_without_tokenizer_is_one_line(small, tmp_path: Path):
    model = Path(shutil.copytree(small().model, tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    with pytest.raises(ModelError, match="has no tokenizer; put its files"):
        Trainer.build(small(model=str(model)))


class Scripted:
    """Evaluations and selections with given student accuracies, each otherwise as it was."""

    def __init__(self, monkeypatch, values: list[float]) -> None:
        real = Trainer.evaluate

        def evaluate(trainer, step):
            row, answers = real(trainer, step)
            return {**row, "student": values[step]}, answers

        score = best.score
        monkeypatch.setattr(Trainer, "evaluate", evaluate)
        monkeypatch.setattr(best, "score", lambda *args: {**score(*args), "student": values[args[-1]]})


CHOOSE = {"evaluation__keep_best": True, "evaluation__selection_every": 1, "evaluation__selection": 4}


def test_patience_stops_early_and_the_best_adapter_is_kept(small, tmp_path: Path, monkeypatch):
    Scripted(monkeypatch, [0.1, 0.5, 0.4, 0.3, 0.9, 0.0])
    recipe = small(steps=5, evaluation__every=1, evaluation__patience=2, **CHOOSE)
    summary = train(recipe, tmp_path / "run")
    assert summary["steps"] == 3
    assert summary["adapter_of_step"] == 1
    assert summary["after"]["student"] == 0.5
    one = small(steps=1, evaluation__every=1)
    train(one, tmp_path / "one")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "one")
    last = small(steps=5, evaluation__every=1, evaluation__patience=2)
    assert train(last, tmp_path / "last")["adapter_of_step"] == 3
    assert adapter(tmp_path / "last") != adapter(tmp_path / "run")


def test_the_best_survives_a_resume(small, tmp_path: Path, monkeypatch):
    Scripted(monkeypatch, [0.1, 0.5, 0.4, 0.3, 0.2])
    recipe = small(steps=4, evaluation__every=1, checkpoint__every=1, **CHOOSE)
    whole = train(recipe, tmp_path / "whole")
    stop = Stop()
    train(recipe, tmp_path / "run", progress=StopAfter(stop, 3), stop=stop)
    assert train(recipe, tmp_path / "run", resume=True)["adapter_of_step"] == whole["adapter_of_step"] == 1
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


@pytest.mark.parametrize("algorithm", ["grpo", "joint", "reshape", "reweight", "srpo"])
def test_every_policy_gradient_logs_its_entropy(undisturbed, algorithm):
    whole, _ = undisturbed(algorithm, {})
    for row in load_run(whole).metrics:
        assert row["student/entropy"] > 0


def test_logits_that_are_not_numbers_cost_one_update(small, tmp_path: Path, monkeypatch):
    real = Trainer.step

    def poisoned(self, number):
        head = self.policy.head
        if number == 2:
            self.policy.head = lambda h: head(h) * float("nan")
        try:
            return real(self, number)
        finally:
            self.policy.head = head

    monkeypatch.setattr(Trainer, "step", poisoned)
    summary = train(small(steps=4, algorithm="sdpo"), tmp_path / "run")
    assert summary["nonfinite_updates"] == 1
    weights = mx.load(str(tmp_path / "run" / "adapters" / "adapters.safetensors"))
    assert all(bool(mx.isfinite(w).all()) for w in weights.values())
    assert (tmp_path / "run" / "nonfinite" / "step-000002.jsonl").exists()
