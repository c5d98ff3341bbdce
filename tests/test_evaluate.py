"""Evaluation: figures by problem, and `vpd-mlx eval` on runs, recipes, adapters and data of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import QUICKSTART, SMALL
from typer.testing import CliRunner

from vpd_mlx.commands.app import app
from vpd_mlx.common.files import read_rows
from vpd_mlx.engine.models import lora_of
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ConfigError, DataError, ModelError
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.run import evaluate as evaluation
from vpd_mlx.run.evaluate import Measured, compared, names, sampled_figures, summed
from vpd_mlx.run.loop import train
from vpd_mlx.run.setup import Parts
from vpd_mlx.tasks import answer_of
from vpd_mlx.tasks.mcq import Mcq, McqSettings
from vpd_mlx.types import Group, Problem, Rollout, Verdict


def problem(name: str) -> Problem:
    return Problem(name, ({"role": "user", "content": name},))


def group(name: str, *answers: tuple[str, float]) -> Group:
    rollouts = [Rollout((1,), (0.0,), text, "stop").graded(Verdict(score), 0.5) for text, score in answers]
    return Group(problem(name), (1,), tuple(rollouts))


def test_figures_by_hand():
    named = {
        "a": group("a", ("5", 1.0), ("5", 1.0), ("7", 0.0), ("8", 0.0)),
        "b": group("b", ("1", 0.0), ("1", 0.0), ("2", 1.0), ("3", 0.0)),
        "one verdict failed": group("c", ("1", 1.0), ("1", 1.0), ("2", 1.0)),
        "all verdicts failed": group("d"),
    }
    found = sampled_figures(object(), named, 4)  # type: ignore[arg-type]
    assert found["student"] == {"a": 0.5, "b": 0.25, "one verdict failed": 1.0}
    assert found["pass@1"] == {"a": 0.5, "b": 0.25}
    assert found["pass@2"] == {"a": pytest.approx(1 - 1 / 6), "b": pytest.approx(0.5)}
    assert found["pass@4"] == {"a": 1.0, "b": 1.0}
    assert found["maj@4"] == {"a": 1.0, "b": 0.0}


def test_partial_scores_count_in_avg_and_the_threshold_in_pass():
    found = sampled_figures(object(), {"a": group("a", ("x", 0.4), ("y", 0.6))}, 2)  # type: ignore[arg-type]
    assert found["student"] == {"a": pytest.approx(0.5)}
    assert found["pass@1"] == {"a": 0.5}
    assert found["maj@2"] == {"a": pytest.approx(0.5)}


def test_the_answer_votes_and_not_its_words(tmp_path: Path):
    rows = [{"prompt": f"{n}?", "answer": "B"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = Mcq(McqSettings(kind="mcq", data=str(tmp_path / "rows.jsonl"), held_out=0.5))
    texts = ["So it is <answer>B</answer>", "<answer>(b).</answer>", "<answer>A</answer>", "B, I think"]
    assert [answer_of(task, t) for t in texts] == ["B", "B", "A", None]
    graded = [(t, task.verify(task.train[0], t).score) for t in texts]
    assert sampled_figures(task, {"a": group("a", *graded)}, 4)["maj@4"] == {"a": 1.0}
    assert answer_of(object(), "<think>hm</think> 7 ") == "7"  # type: ignore[arg-type]


def test_problems_of_one_name_stay_apart():
    assert names([problem("a"), problem("b"), problem("a")]) == ["a", "b", "a (2)"]


@pytest.mark.parametrize(
    ("algorithm", "weights", "own"),
    [
        ("sdpo", "ema", True),
        ("vpd", "adapter", True),
        ("sdpo", "gated", True),
        ("sdpo", "live", False),
        ("grpo", "ema", False),
    ],
)
def test_a_runs_teacher_is_the_one_that_its_m_step_reads(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, algorithm: str, weights: str, own: bool
):
    parts = Parts.build(small(algorithm=algorithm, teacher__weights=weights))
    begun = parts.policy.adapter
    moved = {k: v + 1 for k, v in begun.items()}
    parts.policy.set_adapter(moved)
    seen: list[Any] = []
    monkeypatch.setattr(evaluation, "_teacher", lambda parts, *_: seen.append(parts.policy.adapter) or {})
    evaluation.evaluate(parts, parts.task.held_out[:2], 0)
    evaluation.measure(parts, parts.task.held_out[:2])  # `vpd-mlx eval`: an adapter by itself has no teacher of its own
    for found, want in zip(seen, (begun if own else moved, moved), strict=True):
        assert all(mx.array_equal(found[k], v) for k, v in want.items())
    assert all(mx.array_equal(parts.policy.adapter[k], v) for k, v in moved.items())


def test_sums_and_differences():
    base = Measured(3, 2, {"student": {"a": 0.0, "b": 0.5}, "teacher": {}}, {"gap": None})
    other = Measured(3, 2, {"student": {"a": 1.0, "b": 0.5, "c": 1.0}, "teacher": {"a": 1.0}}, {"gap": 0.25})
    assert summed(base)["student"] == 0.25
    assert (summed(base)["teacher"], summed(base)["teacher_interval"]) == (None, None)
    assert summed(other)["gap"] == 0.25
    assert set(summed(other, at=["student"])) == {"problems", "samples", "student", "student_interval", "gap"}
    differences = compared(base, other)
    assert set(differences) == {"student"}  # the teachers have no problem in common
    assert (differences["student"].difference, differences["student"].problems) == (0.5, 2)


# --- the command


def eval_json(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["eval", *arguments, "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps at a rate that changes the model."""
    changes = {**SMALL, "steps": 3, "optimizer.learning_rate": 5e-3, "optimizer.warmup_steps": 0}
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    train(load_recipe(QUICKSTART, list(changes.items())), folder)
    return folder


def test_a_run_is_evaluated_as_in_training_and_paired_with_its_base(run: Path):
    rows = read_rows(run / "evals.jsonl")
    found = eval_json(str(run))
    for key in (
        "student",
        "student_greedy",
        "teacher",
        "pass@2",
        "maj@2",
        "gap",
        "greedy_by_problem",
        "student_interval",
    ):
        assert found[key] == rows[-1][key], key
        assert found["base"][key] == rows[0][key], key
    change = found["difference"]["student"]
    assert change["difference"] == pytest.approx(found["student"] - found["base"]["student"])
    assert change["low"] <= change["difference"] <= change["high"]
    assert change["problems"] == 8
    assert rows[0]["student_greedy"] == 0.0
    assert rows[0]["student_greedy_interval"] == [0.0, pytest.approx(3.8415 / 11.8415, abs=1e-4)]


def test_split_limit_samples_temperature(run: Path):
    held = eval_json(str(run), "--no-base")
    other = eval_json(
        str(run), "--no-base", "--split", "train", "--limit", "5", "--samples", "4", "--temperature", "1.5"
    )
    assert (other["problems"], other["samples"], other["temperature"], other["split"]) == (5, 4, 1.5, "train")
    assert "pass@4" in other
    assert "base" not in other
    assert not set(other["greedy_by_problem"]) & set(held["greedy_by_problem"])
    trained_on = {r["problem"] for r in read_rows(run / "rollouts.jsonl")}
    assert not trained_on & set(held["greedy_by_problem"])


def test_greedy_samples_nothing(run: Path):
    found = eval_json(str(run), "--greedy")
    assert found["student_greedy"] == read_rows(run / "evals.jsonl")[-1]["student_greedy"]
    assert found["temperature"] == 0.0
    assert not {"student", "maj@2"} & set(found)
    assert set(found["difference"]) == {"student_greedy", "teacher"}


def test_an_adapter_on_a_recipe_or_a_model_is_the_run(run: Path):
    want = eval_json(str(run), "--no-base", "--greedy", "--limit", "8")
    for target in ("quickstart", str(QUICKSTART.parent / "model")):
        found = eval_json(target, "--adapter", str(run / "adapters"), "--no-base", "--greedy", "--limit", "8")
        assert found["greedy_by_problem"] == want["greedy_by_problem"]
        plain = eval_json(target, "--greedy", "--limit", "8")
        assert plain["adapter"] is None
        assert plain["greedy_by_problem"] == read_rows(run / "evals.jsonl")[0]["greedy_by_problem"]


def test_rows_of_ones_own_on_the_runs_model(run: Path, own_task, tmp_path: Path):
    recipe = own_task()
    (tmp_path / "new.jsonl").write_text('{"prompt": "50+49=", "answer": "99"}\n{"prompt": "10+10=", "answer": "20"}\n')
    arguments = (str(run), "--recipe", str(recipe), "--data", str(tmp_path / "new.jsonl"))
    found = eval_json(*arguments, "--samples", "2")
    assert list(found["greedy_by_problem"]) == ["new.jsonl:1", "new.jsonl:2"]
    assert found["base"]["student_greedy"] == 1.0  # no carry: the base can do these
    table = CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "80"})
    assert "difference" in table.output
    assert "2 rows of" in table.output
    assert max(map(len, table.output.splitlines())) <= 80
    (tmp_path / "leak.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    leak = CliRunner().invoke(app, ["eval", str(run), "--recipe", str(recipe), "--data", str(tmp_path / "leak.jsonl")])
    assert isinstance(leak.exception, DataError)
    assert "the same prompt as the training row" in str(leak.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--greedy", "--samples", "2"], "--samples: 2 means nothing with --greedy"),
        (["--temperature", "0"], "use --greedy"),
        (["--data", "x.jsonl"], "task addition makes its own problems"),
        (["--data", "x.jsonl", "--split", "train"], "leave --split train out"),
        (["--recipe", "quickstart"], "is a recipe already"),
    ],
)
def test_flags_that_make_no_sense(arguments: list[str], words: str):
    done = CliRunner().invoke(app, ["eval", "quickstart", *arguments])
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)


def test_lora_of_an_adapter_folder(run: Path, tmp_path: Path):
    assert lora_of(run / "adapters") == LoraSettings(rank=4, scale=2.0, layers=2)
    with pytest.raises(ModelError, match="give an adapter folder"):
        lora_of(tmp_path)
    for config, words in (
        ({"fine_tune_type": "dora", "lora_parameters": {}}, "only LoRA"),
        ({"num_layers": 2}, "KeyError"),
        ({"num_layers": 2, "lora_parameters": {"rank": 0, "scale": 1.0}}, "export it again"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=words):
            lora_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="JSONDecodeError"):
        lora_of(tmp_path)


def test_an_adapter_of_another_shape_is_refused(run: Path, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text((run / "adapters" / "adapter_config.json").read_text())
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"model.layers.9.x.lora_a": mx.zeros((2, 2))})
    done = CliRunner().invoke(app, ["eval", "quickstart", "--adapter", str(tmp_path)])
    assert isinstance(done.exception, ModelError)
    assert "does not fit the model" in str(done.exception)
