"""A newcomer's way: new, verify, data check, train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vpd_mlx.cli import app
from vpd_mlx.config import load_recipe
from vpd_mlx.errors import ConfigError, DataError
from vpd_mlx.runlog import read_rows

RUNNER = CliRunner()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, ["new", "mine"])
    assert result.exit_code == 0, result.output
    assert "vpd-mlx train mine/mine.yaml" in result.output
    return tmp_path / "mine" / "mine.yaml"


def test_new_runs_as_it_is(mine: Path):
    result = RUNNER.invoke(app, ["train", str(mine), "--steps", "2", "--out", "run"])
    assert result.exit_code == 0, result.output
    rows = read_rows(Path("run/rollouts.jsonl"))
    assert {r["verdict"] for r in rows} >= {"hundreds missing"}
    again = RUNNER.invoke(app, ["new", "mine"])
    assert isinstance(again.exception, ConfigError)
    assert "holds something already" in str(again.exception)
    assert isinstance(RUNNER.invoke(app, ["new", "a b"]).exception, ConfigError)


def test_verify_prints_verdict_and_context(mine: Path, tmp_path: Path):
    good = json.loads(RUNNER.invoke(app, ["verify", "--recipe", str(mine)]).output)
    assert (good["score"], good["success"], good["context"]) == (1.0, True, None)
    row = read_rows(mine.parent / "rows.jsonl")[0]
    name = "rows.jsonl:1"
    bad = RUNNER.invoke(app, ["verify", "-r", str(mine), "--problem", name, "--completion", "-"], input="75")
    out = json.loads(bad.output)
    assert row["prompt"] == "47+38="
    assert out["score"] == 0.0
    assert out["context"] == {"kind": "verifier", "text": "tens too low"}
    (tmp_path / "answer.txt").write_text("85\n")
    right = RUNNER.invoke(app, ["verify", "-r", str(mine), "--problem", name, "--completion", "answer.txt"])
    assert json.loads(right.output)["success"]
    for arguments, words in ((["--problem", "x"], "no problem 'x'"), (["--completion", "nowhere"], "cannot be read")):
        refused = RUNNER.invoke(app, ["verify", "-r", str(mine), *arguments])
        assert isinstance(refused.exception, DataError)
        assert words in str(refused.exception)
    (mine.parent / "verifier.py").write_text("def verify(problem, completion): raise OSError('no checker here')\n")
    broken = RUNNER.invoke(app, ["verify", "-r", str(mine)])
    assert broken.exit_code == 1
    assert json.loads(broken.output)["score"] is None
    assert "no checker here" in json.loads(broken.output)["error"]


def test_data_check_counts_and_refuses(mine: Path):
    result = RUNNER.invoke(app, ["data", "check", str(mine)])
    assert result.exit_code == 0, result.output
    for words in ("rows: ", "references: 10 of 10", "prompt tokens: ", "limit 64", "duplicates: 0"):
        assert words in result.output
    rows = mine.parent / "rows.jsonl"
    whole = rows.read_text()
    rows.write_text(whole + '{"prompt": "' + "9" * 80 + '=", "answer": "1"}\n')
    long = RUNNER.invoke(app, ["data", "check", str(mine)])
    assert "rows.jsonl:11: its prompt is longer than rollout.max_prompt_tokens 64" in str(long.exception)
    rows.write_text(whole + '{"prompt": "1+1=", "answer": 2')
    assert "rows.jsonl:11: broken JSON" in str(RUNNER.invoke(app, ["data", "check", str(mine)]).exception)
    (mine.parent / "verifier.py").write_text("def verify(problem, completion): return 0.25\n")
    rows.write_text(whole)
    assert "scores 0.25, not 1" in str(RUNNER.invoke(app, ["data", "check", str(mine)]).exception)


def test_the_recipe_is_commented_and_sound(mine: Path):
    text = mine.read_text()
    assert text.count("#") > 12
    assert load_recipe(mine).task.kind == "python"
