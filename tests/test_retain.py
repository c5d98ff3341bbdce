"""What training cost: the judges of the general checks, perplexity by hand, and a run that is checked before and after."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import QUICKSTART
from fakes import tiny_policy
from rich.console import Console

from vpd_mlx.common.files import read_rows
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ConfigError, DataError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.report.page import run_page
from vpd_mlx.report.retained import print_retained
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.forgetting import cost, retained
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Progress
from vpd_mlx.run.retain import general_row
from vpd_mlx.run.setup import Parts
from vpd_mlx.run.warnings import findings
from vpd_mlx.tasks.general import CHECKS, TEXT, passages

RIGHT = {
    "instructions": [
        *("MANGO.", "hello, how are you?", "Paris.", "Cold, grey, and far too long.", "Red, green, blue"),
        *("The salt dried on his skin.", "What a storm!", "Indeed, water is a liquid.", "The train leaves at noon."),
        *("hello hello hello", '"Mars"', "Yes, since it shines by its own light."),
    ],
    "arithmetic": ["5", "7 + 5 = 12.", "5", "12", "**30**", "8", "30", "42", "70", "6", "6", "100"],
    "format": [
        *('Sure:\n```json\n{"name": "Ada", "age": 36}\n```', '["red", "green", "blue"]', "1. cat\n2. dog\n3. cow"),
        *("- Rome\n- Oslo", "Yes.", "2021-03-05", "1, 2, 3, 4, 5", "## Results"),
    ],
}
WRONG = {
    "instructions": ["Mango", "Hello", "It is Paris", "", "Red", "The sea", "Rain.", "Water", "The train", "hello"],
    "arithmetic": ["six", "12 + 7 = 19", "-", "34"],
    "format": ['{"name": "Ada"', '["red"]', "cat, dog, cow", "Rome, Oslo", "No", "5 March 2021", "12345", "# Results"],
}


@pytest.mark.parametrize("name", RIGHT)
def test_judges_tell_right_answers_from_wrong_ones(name: str):
    check = CHECKS[name]
    assert [check.right(p, f"<think>no</think>{a}") for p, a in zip(check.prompts, RIGHT[name], strict=True)] == [
        True
    ] * len(check.prompts)
    assert not any(check.right(p, a) for p, a in zip(check.prompts, WRONG[name], strict=False))
    assert not any(check.right(p, "") for p in check.prompts)


def test_perplexity_is_that_of_the_text_at_temperature_1(tmp_path: Path):
    policy = tiny_policy(lora=LoraSettings(rank=2, layers=1, keys=None))
    policy.temper(0.5)  # that of the rollouts
    text = tmp_path / "own.txt"
    text.write_text("a few words\n\n\nand more\nof them\n \nx\n")  # a passage of one token has nothing to predict
    parts = SimpleNamespace(
        policy=policy, progress=Progress(), recipe=SimpleNamespace(retain=SimpleNamespace(text=str(text)))
    )
    row = general_row(parts, TEXT, 3)  # type: ignore[arg-type]
    by_hand = []
    for passage in ("a few words", "and more\nof them"):
        ids = list(passage.encode())
        logits = np.array(policy.model(mx.array([ids]))[0].astype(mx.float32), np.float64)[:-1]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        by_hand.append(logps[np.arange(len(ids) - 1), ids[1:]])
    assert list(row["by_item"].values()) == pytest.approx([p.mean() for p in by_hand], abs=1e-5)
    assert row["value"] == pytest.approx(math.exp(-np.concatenate(by_hand).mean()), rel=1e-5)
    assert policy.temperature == 0.5


def rows(value: float, **by_item: float) -> dict:
    return {
        "check": "format",
        "value": value,
        "by_item": by_item,
        "answers": {p: f"answer {s}" for p, s in by_item.items()},
    }


def test_a_loss_is_told_from_chance():
    names = [f"p{i}" for i in range(10)]
    before, after = rows(1.0, **dict.fromkeys(names, 1.0)), rows(0.3, **{n: float(i < 3) for i, n in enumerate(names)})
    (found,) = retained([before, after])
    assert found.verdict == "worse"
    assert found.lost[0] == ("p3", "answer 1.0", "answer 0.0")
    assert found.words == ("100.0 %", "30.0 %", "7 lost, 0 gained")
    assert cost([found]) == "training cost general abilities: format 100.0 % before, 30.0 % after"
    (found,) = retained([before, rows(0.9, **{n: float(i > 0) for i, n in enumerate(names)})])
    assert found.verdict == "within noise"
    assert cost([found]) == "training cost nothing that these checks can tell (format)"
    assert retained([before]) == []
    assert cost([]) == ""


@pytest.mark.parametrize(("ratio", "verdict"), [(1.05, "within noise"), (1.3, "worse"), (0.8, "better")])
def test_perplexity_is_worse_from_a_tenth_on(ratio: float, verdict: str):
    def row(value: float) -> dict:
        return {"check": TEXT, "value": value, "by_item": {str(i): -math.log(value) - i for i in range(8)}}

    (found,) = retained([row(20.0), row(20.0 * ratio)])
    assert found.verdict == verdict
    assert found.words == ("20.0", f"{20 * ratio:.1f}", f"{ratio:.2f} times")
    assert found.lost == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("retain") / "run"
    keys = {"retain": ["format", "perplexity"], "steps": 1, "on_no_gap": "warn", "evaluation.problems": 8}
    keys |= {"rollout.prompts": 2, "evaluation.samples": 1, "evaluation.selection": 2, "optimizer.learning_rate": 0.05}
    train(load_recipe(QUICKSTART, [*keys.items(), ("optimizer.warmup_steps", 0)]), out)
    return out


def test_a_run_is_checked_before_and_after(run: Path):
    found, summary = list(read_rows(run / "general.jsonl")), json.loads((run / "summary.json").read_text())
    step = summary["adapter_of_step"]
    assert [(r["check"], r["step"]) for r in found] == [(c, s) for s in (0, step) for c in ("format", "perplexity")]
    assert summary["general"] == {
        r["check"]: {"before": r["value"], "after": later["value"]}
        for r, later in zip(found[:2], found[2:], strict=True)
    }
    loaded = load_run(run)
    assert [r.items for r in loaded.retained] == [8, len(passages(None))]
    assert "What training cost" in run_page(loaded, 10)
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    print_retained(console, loaded.retained)
    assert "perplexity (8)" in console.export_text()


def test_a_resume_may_ask_for_more_checks_and_measures_the_untrained_adapter(run: Path):
    recipe = load_recipe(run / "config.yaml", [("steps", 2), ("retain.checks", ["perplexity", "arithmetic"])])
    before = list(read_rows(run / "general.jsonl"))
    train(recipe, run, resume=True)
    after = list(read_rows(run / "general.jsonl"))
    assert after[:2] == before[:2]
    assert [(r["check"], r["step"] > 0) for r in after[2:4]] == [("arithmetic", False), ("perplexity", True)]


def test_a_loss_is_a_warning_of_the_report(run: Path):
    loaded = load_run(run)
    worse = [{"check": TEXT, "value": v, "by_item": {str(i): -math.log(v) for i in range(8)}} for v in (2.0, 9.0)]
    loaded.__dict__["retained"] = retained(worse)
    assert "Training cost general abilities: perplexity 2.0 before, 9.0 after." in findings(loaded)


def test_what_is_wrong_with_the_text_is_said_before_anything_runs(small, tmp_path: Path):
    with pytest.raises(DataError, match=r"retain.text: .*none.txt cannot be read .*give a text file"):
        Parts.build(small(retain__checks=["perplexity"], retain__text=str(tmp_path / "none.txt")))
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="is empty"):
        passages(str(tmp_path / "empty.txt"))
    with pytest.raises(ConfigError, match=r"retain.text: means nothing without perplexity"):
        small(retain=["format"], retain__text="x")
    with pytest.raises(ConfigError, match=r"retain.checks: .*names a check twice"):
        small(retain=["format", "format"])
    with pytest.raises(ConfigError, match=r"needs one of 'instructions', 'arithmetic', 'format' or 'perplexity'"):
        small(retain=["speed"])
