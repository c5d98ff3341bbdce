"""What a run begins with: an adapter of `mlx_lm.lora`, continued; demonstrations for a student that succeeds at nothing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import QUICKSTART
from mlx_lm import lora as mlx_lm_lora

from vpd_mlx.common.files import read_rows
from vpd_mlx.engine.models import lora_of
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ConfigError, DataError, ModelError, RunError
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.run.change import evaluate_change
from vpd_mlx.run.continued import continued
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Silent
from vpd_mlx.run.setup import load_policy

ROWS = "".join(json.dumps({"prompt": f"{a}+{b}=", "answer": "77"}) + "\n" for a in range(11, 19) for b in range(11, 15))
MODEL = str(QUICKSTART.parent / "model")


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in dict(mx.load(str(folder / "adapters.safetensors"))).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that the real `mlx_lm.lora` trained to say 77 to every sum."""
    folder = tmp_path_factory.mktemp("lora")
    sums = [{"prompt": f"{a}+{b}=", "completion": "77"} for a in range(21, 29) for b in range(11, 15)]
    for name, rows in (("train", sums), ("valid", sums[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "mlx_lm.lora",
        "--model",
        MODEL,
        "--train",
        "--data",
        str(folder),
        "--iters",
        "60",
        "--batch-size",
        "8",
        "--num-layers",
        "-1",
    ]
    command += [
        "--mask-prompt",
        "--learning-rate",
        "1e-3",
        "--adapter-path",
        str(folder / "adapters"),
        "--val-batches",
        "1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        mlx_lm_lora.main()
    return folder / "adapters"


@pytest.fixture
def recipe(own_task: Callable[..., Path], demonstrated: Path) -> Callable[..., Recipe]:
    def build(**changes: object) -> Recipe:
        keys = {"adapter": str(demonstrated), "steps": 2, "evaluation.keep_best": False, **changes}
        return load_recipe(own_task(ROWS), [(k.replace("__", "."), v) for k, v in keys.items()])

    return build


def test_an_adapter_of_mlx_lm_lora_is_continued_and_resumed_bit_exact(
    tmp_path: Path, recipe: Callable[..., Recipe], demonstrated: Path
):
    theirs = lora_of(demonstrated)
    assert (theirs.rank, theirs.scale, theirs.layers) == (8, 20.0, -1)
    own = tmp_path / "demonstrated"
    shutil.copytree(demonstrated, own)
    cfg = recipe(adapter=str(own), algorithm="grpo", grpo__kl=0.1)
    alone = evaluate_change(cfg.model_copy(update={"adapter": None}), own, None, "held-out")
    assert alone["student_greedy"] > alone["base"]["student_greedy"] == 0.0

    train(cfg, tmp_path / "whole")
    first = read_rows(tmp_path / "whole" / "evals.jsonl")[0]
    assert [first[k] for k in ("student", "student_greedy")] == [alone[k] for k in ("student", "student_greedy")]
    assert same(weights(tmp_path / "whole" / "start"), weights(own))
    assert not same(weights(tmp_path / "whole" / "adapters"), weights(own))
    kept = load_recipe(tmp_path / "whole" / "config.yaml")
    assert kept.lora == theirs

    train(cfg.model_copy(update={"steps": 1}), tmp_path / "parts")
    shutil.rmtree(own)  # the run folder has what it needs
    resumed = load_recipe(tmp_path / "parts" / "config.yaml", [("steps", 2)])
    train(resumed, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "parts" / "adapters"), weights(tmp_path / "whole" / "adapters"))


def test_the_initial_model_is_the_one_that_the_run_began_with(recipe: Callable[..., Recipe], demonstrated: Path):
    cfg = continued(recipe())
    policy = load_policy(cfg)
    fresh = policy.adapter
    x = mx.array([[5, 6, 7]])
    policy.load_adapter(demonstrated)
    policy.start = policy.adapter
    begun = np.array(policy.model(x))
    policy.set_adapter(fresh)
    base = np.array(policy.model(x))
    assert not np.allclose(base, begun)
    with policy.as_begun():
        assert np.array_equal(np.array(policy.model(x)), begun)
    assert np.array_equal(np.array(policy.model(x)), base)


def test_lora_keys_that_contradict_the_adapter_are_one_line(
    recipe: Callable[..., Recipe], demonstrated: Path, tmp_path: Path
):
    cfg = recipe()
    for given, words in (
        ({"rank": 4}, f"lora.rank: 4, and the adapter {demonstrated} has 8; leave lora.rank out, or give 8"),
        ({"scale": 1.0}, "lora.scale: 1.0, and the adapter"),
    ):
        with pytest.raises(ConfigError) as refused:
            continued(cfg.model_copy(update={"lora": LoraSettings(**given)}))
        assert words in str(refused.value)
    agreed = continued(cfg.model_copy(update={"lora": LoraSettings(rank=8, dropout=0.1)}))
    assert (agreed.lora.rank, agreed.lora.scale, agreed.lora.dropout) == (8, 20.0, 0.1)
    with pytest.raises(ModelError, match="give an adapter folder"):
        continued(cfg.model_copy(update={"adapter": str(tmp_path)}))


def test_a_student_that_succeeds_at_nothing_is_warmed_up_once(own_task: Callable[..., Path], tmp_path: Path):
    path = own_task(ROWS, "optimizer: {learning_rate: 3.0e-3, warmup_steps: 0}\nseed: 3\n")
    keys = [("warm_start.steps", 12), ("rollout.prompts", 4), ("steps", 2), ("evaluation.keep_best", False)]
    notes = Notes()
    cfg = load_recipe(path, keys)
    train(cfg, tmp_path / "whole", progress=notes)
    (said,) = [line for line in notes.lines if line.startswith("warm_start: ")]
    assert said.startswith("warm_start: the student was right in none of 64 answers, so 12 steps on ")
    first, last = (float(word) for word in re.findall(r"(?:loss|end) ([\d.]+)", said))
    assert last < first / 2
    assert read_rows(tmp_path / "whole" / "evals.jsonl")[0]["student_greedy"] == 1.0
    assert (tmp_path / "whole" / "start" / "adapters.safetensors").is_file()

    train(cfg.model_copy(update={"steps": 1}), tmp_path / "parts")
    train(cfg, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "parts" / "adapters"), weights(tmp_path / "whole" / "adapters"))


def test_a_warm_start_is_left_out_where_the_student_can_do_something(small: Callable[..., Recipe], tmp_path: Path):
    notes = Notes()
    train(small(warm_start__steps=3, steps=1, evaluation__keep_best=False), tmp_path / "run", progress=notes)
    assert [n for n in notes.lines if "warm_start: left out, since the student is right in " in n]
    assert not (tmp_path / "run" / "start").exists()


def test_a_run_that_would_stop_for_want_of_a_beginning_names_the_warm_start(
    own_task: Callable[..., Path], tmp_path: Path
):
    rows = ROWS.replace('"77"', '"none of these"')
    keys = [("on_no_gap", "stop"), ("evaluation.problems", 8), ("feedback.sources", ["verifier"])]
    keys += [("rollout.max_completion_tokens", 2), ("evaluation.keep_best", False)]
    with pytest.raises(RunError, match=r"let demonstrations make a beginning \(warm_start\), or set on_no_gap"):
        train(load_recipe(own_task(rows), keys), tmp_path / "run")


def test_demonstrations_are_checked(own_task: Callable[..., Path], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"warm_start.data: means nothing with warm_start.steps 0"):
        load_recipe(own_task(ROWS), [("warm_start.data", "rows.jsonl")])
    held = load_recipe(own_task(ROWS), [("warm_start.data", "rows.jsonl"), ("warm_start.steps", 1)])
    with pytest.raises(DataError, match="demonstrates the held-out row"):
        train(held, tmp_path / "run")
