"""The command line as a user meets it: one-line errors, exit codes, nothing written, old runs safe."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from command import apart, within

TINY = [
    *("--steps", "1", "--set", "rollout.prompts=2", "--set", "rollout.group_size=2"),
    *("--set", "evaluation.problems=4", "--set", "evaluation.samples=1", "--set", "lora.rank=4"),
]


def refused(result: subprocess.CompletedProcess[str], folder: Path, *words: str, left: set[str] = frozenset()) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert {p.name for p in folder.iterdir()} == set(left), "something was written"


def test_unknown_key(tmp_path: Path):
    result = apart("train", "--set", "rollout.promts=3", cwd=tmp_path)
    refused(result, tmp_path, "rollout.promts: unknown key", "did you mean 'prompts'?")


def test_wrong_type(tmp_path: Path):
    refused(within("train", "--set", "steps=many", cwd=tmp_path), tmp_path, "steps: got 'many'")


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nobody/no-such-model"])
def test_no_such_model(tmp_path: Path, model: str):
    refused(within("train", "--set", f"model={model}", cwd=tmp_path), tmp_path, "model:", model.lstrip("."))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all"])
def test_no_such_folder_to_plan_for(tmp_path: Path, model: str):
    result = within("plan", "quickstart", "--set", f"model={model}", cwd=tmp_path)
    refused(result, tmp_path, "model: there is no folder", model.lstrip("."))


def test_no_such_recipe(tmp_path: Path):
    refused(within("train", "quickstrat", cwd=tmp_path), tmp_path, "did you mean 'quickstart'?")


def test_lora_keys_that_match_nothing(tmp_path: Path):
    result = apart("train", "--set", "lora.keys=[self_attn.query]", cwd=tmp_path)
    refused(result, tmp_path, "lora.keys", "'self_attn.query' matches no linear layer", "self_attn.q_proj")


def test_group_of_one_with_sibling_feedback(tmp_path: Path):
    result = within("train", "--set", "rollout.group_size=1", "--set", "feedback.sources=[sibling]", cwd=tmp_path)
    refused(result, tmp_path, "rollout.group_size: 1 leaves no sibling")


def test_prompt_longer_than_the_limit(tmp_path: Path):
    sets = ["--set", "rollout.max_prompt_tokens=8", "--set", "feedback.max_tokens=4"]
    refused(within("train", *sets, cwd=tmp_path), tmp_path, "tokens, more than rollout.max_prompt_tokens 8")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", ["rows.jsonl", "no rows"]),
        ('{"prompt": "1+1=", "answer": "2"}\n{"prompt": \n', ["rows.jsonl:2", "broken JSON"]),
        ('{"question": "1+1=", "answer": "2"}\n', ["rows.jsonl:1", "no column 'prompt'", "question"]),
    ],
    ids=["empty", "broken", "column"],
)
def test_unusable_data(tmp_path: Path, own_task, rows: str, words: list[str]):
    recipe = own_task(rows)
    refused(within("train", str(recipe), cwd=tmp_path), tmp_path, *words, left={"rows.jsonl", "mine.yaml"})


def test_train_eval_and_an_old_run_is_safe(tmp_path: Path):
    first = apart("train", *TINY, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "quickstart"
    for part in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "evals.jsonl", "summary.json", "adapters"):
        assert (run / part).exists(), part
    summary = json.loads((run / "summary.json").read_text())
    for side in ("before", "after"):
        assert set(summary[side]) == {"student", "student_greedy", "teacher"}
        assert all(0 <= v <= 1 for v in summary[side].values())
    assert "mlx_lm generate --model" in first.stdout
    assert "before" in first.stdout
    assert "\x1b[" not in first.stdout  # plain lines where there is no terminal
    old = (run / "summary.json").read_bytes()

    again = within("train", *TINY, cwd=tmp_path)
    assert again.returncode == 0
    assert (tmp_path / "runs" / "quickstart-2" / "summary.json").exists()
    same = within("train", *TINY, "--out", str(run), cwd=tmp_path)
    assert same.returncode == 3
    assert "holds a run already" in same.stderr
    assert (run / "summary.json").read_bytes() == old
    told = within("train", *TINY, "--out", str(run), "--overwrite", "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["steps"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    kept = within("train", *TINY, "--out", "mine", "--overwrite", cwd=tmp_path)
    assert kept.returncode == 3
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"

    result = within("eval", str(run), "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["student_greedy"] == json.loads(told.stdout)["after"]["student_greedy"]


def test_version_and_recipes(tmp_path: Path):
    assert apart("--version", cwd=tmp_path).stdout.startswith("vpd-mlx 0.")
    assert "quickstart" in within("recipes", cwd=tmp_path).stdout


def test_resume_refuses_another_recipe_and_lists_the_keys(tmp_path: Path):
    assert within("train", *TINY, "--quiet", cwd=tmp_path).returncode == 0
    run = tmp_path / "runs" / "quickstart"
    before = (run / "metrics.jsonl").read_bytes()
    changed = within("train", "--resume", str(run), "--set", "lora.rank=8", "--seed", "5", cwd=tmp_path)
    assert changed.returncode == 2
    for words in (
        "2 faults",
        "lora.rank: differs from the run's recipe",
        "seed: differs",
        "only these may change: steps, ",
        "evaluation.every",
    ):
        assert words in changed.stderr
    assert (run / "metrics.jsonl").read_bytes() == before
    for arguments in (["quickstart2"], ["--out", "x"], ["--overwrite"]):
        mixed = within("train", *arguments, "--resume", str(run), cwd=tmp_path)
        assert mixed.returncode == 2
        assert "leave RECIPE, --out and --overwrite out" in mixed.stderr
    assert within("train", "--resume", str(tmp_path), cwd=tmp_path).returncode == 2
    longer = within("train", "--resume", str(run), "--steps", "2", "--json", cwd=tmp_path)
    assert longer.returncode == 0, longer.stderr
    assert json.loads(longer.stdout)["steps"] == 2
    assert (run / "metrics.jsonl").read_bytes().startswith(before)
