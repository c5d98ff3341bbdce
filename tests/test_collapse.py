"""What a run does about a collapse: back to the best adapter at half the rate, exact across a resume; or it stops, or warns."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from fakes import tiny_policy
from mlx.utils import tree_map
from test_train import Scripted, StopAfter, adapter, same_logs

from vpd_mlx.algos.base import reset_parts
from vpd_mlx.common.files import read_rows
from vpd_mlx.engine.learner import Learner
from vpd_mlx.engine.settings import LoraSettings, OptimizerSettings
from vpd_mlx.errors import RunError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.run import collapse as acting
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Silent, Stop
from vpd_mlx.run.state import find_checkpoint
from vpd_mlx.run.step import Trainer
from vpd_mlx.run.warnings import findings
from vpd_mlx.run.watch import Collapse


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def collapses(monkeypatch):
    """Let the watchdog see a collapse after the given steps."""

    def at(*steps: int) -> None:
        seen = Collapse("truncated", "nothing stops")
        monkeypatch.setattr(acting, "collapse", lambda rows: seen if rows[-1]["step"] in steps else None)

    return at


def test_a_revert_goes_back_to_the_best_adapter_at_half_the_rate(small, tmp_path: Path, monkeypatch, collapses):
    collapses(3)
    Scripted(monkeypatch, [0.1, 0.5, 0.4, 0.3, 0.2])
    view = Notes()
    recipe = small(
        steps=3,
        on_collapse="revert",
        evaluation__every=1,
        optimizer__warmup_steps=0,
        checkpoint__every=1,
        algorithm="vpd",
    )
    summary = train(recipe, tmp_path / "run", progress=view)
    train(small(steps=1, optimizer__warmup_steps=0), tmp_path / "one")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "one")
    assert summary["reverts"] == 1
    said = "step 3: collapse: nothing stops; back to the adapter of step 1, the learning rate is 0.5 of the recipe's"
    assert [n for n in view.notes if n.startswith(said)]
    last = load_run(tmp_path / "run").metrics[-1]
    assert {k: v for k, v in last.items() if k.startswith("watch/")} == {
        "watch/collapse": "nothing stops",
        "watch/cause": "truncated",
        "watch/reverted_to": 1,
        "watch/rate_factor": 0.5,
    }
    found, _ = find_checkpoint(tmp_path / "run" / "checkpoints")
    # The quickstart's teacher is an EMA: it is the adapter's copy again, and moments are nought.
    for name, array in found.arrays.items():
        part, _, key = name.removeprefix("algorithm.").partition(".")
        if part == "teacher":
            assert bool((array == found.arrays[f"adapter.{key}"]).all())
        elif part in ("m", "e"):
            assert not array.any()
    assert found.state["algorithm"]["m"] == {"updates": 0, "skipped": 0, "factor": 0.5, "since": 3}
    assert (found.state["algorithm"]["e"]["factor"], found.state["algorithm"]["e"]["since"]) == (0.5, 3)
    assert any("went back to an earlier adapter" in text for text in findings(load_run(tmp_path / "run")))
    after = train(small(**{"steps": 4, **overrides(recipe)}), tmp_path / "run", resume=True)
    assert after["reverts"] == 1
    assert load_run(tmp_path / "run").metrics[-1]["student/rate"] == 0.5 * recipe.optimizer.learning_rate


def overrides(recipe) -> dict:
    return {"on_collapse": recipe.on_collapse, "evaluation__every": 1, "optimizer__warmup_steps": 0}


@pytest.mark.parametrize(
    ("algorithm", "changes", "moment"),
    [
        ("vpd", {}, (2, None)),
        ("vpd", {"teacher__weights": "adapter", "e_step__delta": "ema"}, (3, "update")),
        ("grpo", {}, (3, "rollout")),
        ("reshape", {}, (2, "update")),
    ],
    ids=str,
)
def test_a_resume_across_a_revert_is_exact(small, tmp_path: Path, collapses, algorithm, changes, moment):
    collapses(2)
    recipe = small(steps=4, on_collapse="revert", algorithm=algorithm, evaluation__problems=2, **changes)
    train(recipe, tmp_path / "whole")
    stop = Stop()
    train(recipe, tmp_path / "run", progress=StopAfter(stop, *moment), stop=stop)
    train(recipe, tmp_path / "run", resume=True)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    same_logs(tmp_path / "run", tmp_path / "whole")


def test_after_three_reverts_the_run_stops_with_the_best_adapter(small, tmp_path: Path, collapses):
    collapses(1, 2, 3, 4)
    view = Notes()
    recipe = small(steps=9, on_collapse="revert", evaluation__problems=2)
    summary = train(recipe, tmp_path / "run", progress=view)
    assert (summary["steps"], summary["reverts"], summary["adapter_of_step"]) == (4, 3, 0)
    assert any("the run stops once more after 3 reverts and hands over its best adapter" in n for n in view.notes)
    assert [r["watch/rate_factor"] for r in load_run(tmp_path / "run").metrics[:3]] == [0.5, 0.25, 0.125]
    weights = mx.load(str(tmp_path / "run" / "adapters" / "adapters.safetensors"))
    assert not any(w.any() for k, w in weights.items() if k.endswith("lora_b"))
    before = adapter(tmp_path / "run")
    assert train(recipe, tmp_path / "run", resume=True)["steps"] == 4  # it stays stopped
    assert adapter(tmp_path / "run") == before


def test_stop_ends_at_once_and_warn_goes_on(small, tmp_path: Path, collapses):
    collapses(1)
    stopped = train(small(steps=3, on_collapse="stop", evaluation__problems=2), tmp_path / "stop")
    assert (stopped["steps"], stopped["adapter_of_step"]) == (1, 0)
    assert any(
        "the run stopped after step 1: nothing stops" in t.lower() for t in findings(load_run(tmp_path / "stop"))
    )
    warned = train(small(steps=3, on_collapse="warn", evaluation__problems=2), tmp_path / "warn")
    assert (warned["steps"], warned["reverts"]) == (3, 0)
    row = read_rows(tmp_path / "warn" / "metrics.jsonl")[0]
    assert row["watch/collapse"] == "nothing stops"
    assert not {"watch/reverted_to", "watch/stopped"} & set(row)
    going_on = small(steps=3, on_collapse="warn", evaluation__problems=2)
    assert train(going_on, tmp_path / "stop", resume=True)["steps"] == 3


def test_a_learner_that_is_reset_learns_as_a_new_one_at_the_lower_rate():
    def moved(learner: Learner, warm: bool) -> dict[str, mx.array]:
        policy = tiny_policy(lora=LoraSettings(rank=2))
        gradients = tree_map(mx.ones_like, policy.model.trainable_parameters())
        if warm:
            start = policy.adapter
            learner.apply(policy, gradients)
            policy.set_adapter(start)
            learner.reset(policy, 0.5)
        learner.apply(policy, gradients)
        return policy.adapter

    cfg = OptimizerSettings(learning_rate=1e-2, warmup_steps=2)
    again = moved(Learner(cfg), True)
    fresh = moved(Learner(cfg.model_copy(update={"learning_rate": 5e-3})), False)
    assert all(bool((again[k] == fresh[k]).all()) for k in fresh)


def test_a_part_that_cannot_be_reset_is_named():
    class Old:
        pass

    with pytest.raises(RunError, match="part memory of the algorithm cannot be reset; give it reset"):
        reset_parts({"memory": Old()}, None, 0.5)


def test_the_style_is_that_of_the_untrained_model_until_it_moves(small):
    trainer = Trainer.build(small())
    assert trainer.style.shift() == 0.0
    before = trainer.policy.adapter
    trainer.policy.set_adapter({k: v + 0.3 for k, v in before.items()})
    assert 0.1 < trainer.style.shift() <= 1.0
    trainer.policy.set_adapter(before)
    assert trainer.style.shift() == 0.0


def test_the_default_reverts_and_the_toys_only_warn():
    from vpd_mlx.recipe import Recipe, builtin_recipes

    assert Recipe.model_fields["on_collapse"].default == "revert"
    for name in ("quickstart", "lab/addition", "lab/spelling"):
        assert load_recipe(builtin_recipes()[name]).on_collapse == "warn"


# The failure of a pretrained model in small: a wording that says the problem again behind the feedback moves the style of the
# answer, and a live teacher follows its own student. Answers of two or three digits become endless ones.
FAILURE = {
    "steps": 22,
    "rollout__prompts": 8,
    "rollout__max_completion_tokens": 16,
    "optimizer__learning_rate": 5e-3,
    "optimizer__warmup_steps": 0,
    "e_step__every": 1000,
    "teacher__weights": "live",
    "templates__verifier": "{prompt}\nFeedback: {context}\n{prompt}",
    "templates__sibling": "{prompt}\nA correct answer: {context}\n{prompt}",
    "evaluation__problems": 40,
    "evaluation__samples": 1,
}
PLAIN = {
    "templates__verifier": "{prompt}\nFeedback: {context}",
    "templates__sibling": "{prompt}\nA correct answer: {context}",
}
KEPT = {"on_collapse": "revert", "evaluation__keep_best": True, "evaluation__selection_every": 5}


def test_a_live_teacher_whose_wording_moves_the_style_collapses_and_is_noticed_within_three_steps(
    small, tmp_path: Path
):
    summary = train(small(**FAILURE, on_collapse="warn", evaluation__keep_best=False), tmp_path / "run")
    rows = load_run(tmp_path / "run").metrics
    assert summary["after"]["student_greedy"] == 0.0
    assert all(r["truncated"] > 0.9 for r in rows[-3:])
    onset = next(r["step"] for r in rows if r["truncated"] > 0.1)
    seen = next(r["step"] for r in rows if "watch/collapse" in r)
    assert seen <= onset + 3


def test_the_same_with_the_defaults_of_now_ends_no_worse_than_it_began(small, tmp_path: Path):
    summary = train(small(**FAILURE, **KEPT), tmp_path / "run")
    assert summary["reverts"] > 0
    assert summary["after"]["student"] >= summary["before"]["student"]
    assert summary["after"]["student_greedy"] >= summary["before"]["student_greedy"]


def test_a_plain_wording_and_a_slow_teacher_learn_without_an_alarm(small, tmp_path: Path):
    summary = train(small(**{**FAILURE, **PLAIN, **KEPT, "teacher__weights": "ema"}), tmp_path / "run")
    assert summary["reverts"] == 0
    assert not [r for r in load_run(tmp_path / "run").metrics if "watch/collapse" in r]
    assert summary["after"]["student_greedy"] > summary["before"]["student_greedy"]
