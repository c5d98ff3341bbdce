"""The shipped recipes: they say what the paper says, their scripts make the rows that they read, and they train."""

from __future__ import annotations

import base64
import importlib.util
import json
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlx.core import load as mx_load

from vpd_mlx.algos.settings import TeacherSettings
from vpd_mlx.common.files import read_rows
from vpd_mlx.recipe import Recipe, builtin_recipes, load_recipe
from vpd_mlx.run.loop import train
from vpd_mlx.tasks import build_task
from vpd_mlx.tools.lab import check_recipe, load_grid

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
ROWS = ROOT / "tests" / "data" / "sciknoweval.json"

# What the tiny model can bear, and words on every failure: it gets none of these right, so that no sibling speaks.
TINY: dict[str, Any] = {
    "model": str(RECIPES / "quickstart" / "model"),
    "model_revision": None,
    "steps": 2,
    "feedback.sources": ["sibling", "verifier"],
    "rollout.prompts": 2,
    "rollout.group_size": 2,
    "rollout.max_completion_tokens": 6,
    "evaluation.problems": 2,
    "evaluation.samples": 1,
    "evaluation.keep_best": False,  # else nothing may be handed over: it learns nothing in two steps
    "e_step.every": 1,
    "e_step.minibatch_prompts": 2,
    "m_step.minibatch_prompts": 1,
}
# From the paper's table of hyperparameters: rate (ten times, for LoRA), alpha, top-k, prompts in an M minibatch (32 is all).
PAPER = {
    "sciknoweval": (1e-4, 0.5, 100, None),
    "livecodebench": (1e-5, 1.0, 20, 1),
    "dapo_math": (5e-5, 0.0, None, None),
    "gsm8k": (5e-5, 0.0, None, None),
}


def recipe(name: str, **changes: Any) -> Recipe:
    return load_recipe(builtin_recipes()[name], list(changes.items()))


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def run_script(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(RECIPES / name / "prepare.py"), *map(str, arguments)], check=True)


def gsm8k(folder: Path) -> dict[str, Any]:
    def row(a: int, b: int) -> dict[str, Any]:
        return {"question": f"Ann has {a} pens, buys {b}.", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>\n#### {a + b}"}

    return {
        "task.data": lines(folder / "train.jsonl", [row(a, 3) for a in range(1, 9)]),
        "task.eval_data": lines(folder / "test.jsonl", [row(a, 4) for a in range(1, 4)]),
    }


def sciknoweval(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    # The tiny model reads letter by letter; tests/test_tasks.py reads the rows as they are.
    rows = [{**row, "system": row["system"][:60], "prompt": row["prompt"][-90:]} for row in rows]
    folder.mkdir()
    train, test = folder / "train.json", folder / "test.json"
    train.write_text(json.dumps(rows[:9]), encoding="utf-8")
    test.write_text(json.dumps(rows[9:]), encoding="utf-8")
    return {"task.data": str(train), "task.eval_data": str(test)}


def livecodebench(folder: Path) -> dict[str, Any]:
    def packed(tests: list[dict[str, str]]) -> str:
        return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()

    def row(i: int) -> dict[str, Any]:
        by_call = i % 2
        test = (
            {"input": "[1, 2]", "output": "2", "testtype": "functional"}
            if by_call
            else {"input": f"{i}\n", "output": f"{i + 1}\n", "testtype": "stdin"}
        )
        return {
            "question_id": f"q{i}",
            "question_content": f"Add one to it, {i}.",
            "starter_code": "class Solution:\n    def last(self, a):\n        " if by_call else "",
            "public_test_cases": json.dumps([test]),
            "private_test_cases": packed([test, test]),
            "metadata": json.dumps({"func_name": "last"} if by_call else {}),
            "contest_date": "2025-01-01T00:00:00" if i == 0 else "2025-03-01T00:00:00",
            "platform": "leetcode",
            "difficulty": "easy",
        }

    source = lines(folder / "test6.jsonl", [row(i) for i in range(12)])
    run_script("livecodebench", source, folder / "rows.jsonl", "--since", "2025-02-01")
    assert len(read_rows(folder / "rows.jsonl")) == 11
    return {"task.data": str(folder / "rows.jsonl"), "task.held_out": 0.4}


def dapo_math(folder: Path) -> dict[str, Any]:
    dapo = lines(folder / "dapo.jsonl", [{"prompt": f"What is {i} + 1?", "solution": str(i + 1)} for i in range(9)])
    held = [{"problem": f"What is ${i}$ halves?", "answer": f"\\frac{{{i}}}{{2}}"} for i in range(3)]
    held.append({"problem": "What is  8 + 1?", "answer": "9"})  # stands in both
    run_script("dapo_math", dapo, lines(folder / "math500.jsonl", held), folder)
    assert len(read_rows(folder / "train.jsonl")) == 8
    return {"task.data": str(folder / "train.jsonl"), "task.eval_data": str(folder / "test.jsonl")}


def own_task(folder: Path) -> dict[str, Any]:
    return {}  # its rows are shipped


def smollm2(task: str, folder: Path) -> dict[str, Any]:
    script = RECIPES / "smollm2" / "make_data.py"
    subprocess.run([sys.executable, str(script), "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return {"task.data": str(folder / f"{task}-train.jsonl"), "task.eval_data": str(folder / f"{task}-test.jsonl")}


SMOLLM2 = {f"smollm2/{task}": partial(smollm2, task) for task in ("dates", "orders", "sentences", "totals")}
MAKERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "gsm8k": gsm8k,
    "sciknoweval": sciknoweval,
    "livecodebench": livecodebench,
    "dapo_math": dapo_math,
    "own_task": own_task,
    **SMOLLM2,
}


def test_every_recipe_is_here():
    assert {p.parent.name for p in RECIPES.glob("*/*.yaml")} - {"quickstart", "lab"} == {
        n.split("/")[0] for n in MAKERS
    }


def estimates() -> Any:
    spec = importlib.util.spec_from_file_location("make_estimates", ROOT / "docs" / "make_estimates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SMOLLM2)
def test_what_the_references_of_smollm2_are_worth(name: str, tmp_path: Path):
    """Every reference is right, a changed one is not; all tasks share one recipe but for lengths."""
    r = recipe(name, **SMOLLM2[name](tmp_path))
    task = build_task(r)
    assert (len(task.train), len(task.held_out)) == (256, 48)
    for problem in task.held_out:
        right = problem.reference or ""
        assert task.verify(problem, right).score == 1.0
        assert task.verify(problem, right.replace(".", ", so.") if "sentence" in name else right + "1").score == 0.0
    same = recipe("smollm2/dates")
    for section in ("optimizer", "feedback", "teacher", "templates", "e_step", "m_step", "lora", "evaluation"):
        assert getattr(r, section) == getattr(same, section)
    assert (TeacherSettings.of(r).weights, r.templates.style) == ("adapter", "after")


@pytest.mark.parametrize("grid", sorted((RECIPES / "smollm2" / "grids").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_grids_of_smollm2_load(grid: Path):
    spec = load_grid(grid)
    check_recipe(spec, (grid.parent / spec.recipe).resolve())


@pytest.mark.parametrize("name", PAPER)
def test_a_macs_size_by_default_settings_ends_within_an_hour(name: str):
    r = recipe(f"{name}/mac")
    found = estimates()
    assert r.model == "mlx-community/Qwen3-0.6B-4bit"
    assert r.steps >= 20
    assert r.rollout.prompts >= 6
    assert (r.rollout.group_size, r.rollout.max_completion_tokens) == (8, 512)
    (m2_pro,) = (m for m in found.MACS if m.name == "M2 Pro, 32 GB")
    assert found.whole(r, found.MODELS[0], m2_pro) < 60
    assert found.memory(r, found.MODELS[0]) < 0.7 * m2_pro.memory
    # What is learned, and how, is left to the defaults.
    plain = Recipe(name="x", model="m", task=r.task)
    for section in ("optimizer", "e_step", "m_step", "teacher", "feedback", "lora"):
        assert getattr(r, section) == getattr(plain, section)
    assert (r.preset, r.algorithm, r.templates.style) == ("default", plain.algorithm, plain.templates.style)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_hyperparameters(name: str):
    r = recipe(name)
    found = (r.optimizer.learning_rate, r.m_step.alpha, r.m_step.top_k, r.m_step.minibatch_prompts)
    assert found == PAPER[name]
    assert (r.algorithm, r.e_step.every, r.e_step.beta, r.teacher.weights) == ("vpd", 5, 0.1, "live")
    assert r.templates.style == "sdpo"
    assert r.rollout.max_completion_tokens == (2048 if name == "gsm8k" else 8192)
    assert (r.evaluation.temperature, r.evaluation.top_p, r.evaluation.keep_best) == (0.6, 0.95, False)
    assert (r.rollout.prompts, r.rollout.group_size, r.rollout.temperature) == (32, 8, 1.0)
    assert (r.optimizer.warmup_steps, r.optimizer.weight_decay, r.optimizer.grad_clip) == (10, 0.01, 1.0)


@pytest.mark.parametrize("name", [*MAKERS, *(f"{name}/mac" for name in PAPER)])
def test_two_steps_on_rows_of_the_same_form(name: str, tmp_path: Path):
    changed = recipe(name, **{**TINY, **MAKERS[name.removesuffix("/mac")](tmp_path / "rows")})
    train(changed, tmp_path / "run")
    metrics = read_rows(tmp_path / "run" / "metrics.jsonl")
    rows = read_rows(tmp_path / "run" / "rollouts.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    assert [m["verifier_failures"] for m in metrics] == [0, 0]
    assert len(rows) == 2 * 2 * 2
    told = [r["context"] for r in rows if not r["success"]]
    assert told
    assert all(c and c["text"].strip() for c in told)
    adapter = mx_load(str(tmp_path / "run" / "adapters" / "adapters.safetensors"))
    assert any(abs(v).max().item() > 0 for k, v in adapter.items() if k.endswith("lora_b"))  # it begins at zero
