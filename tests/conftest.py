"""Fixtures: the embedded model and small recipes of it. Tests train for real."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vpd_mlx.recipe import Recipe, builtin_recipes, load_recipe

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Each worker has a temporary folder of its own, so that none finds another's files.
    own = tempfile.mkdtemp(prefix=f"vpd-tests-{worker}-")
    os.chmod(own, 0o711)  # sandboxed programs run under other user ids, and pass through it
    os.environ["TMPDIR"] = tempfile.tempdir = own
    atexit.register(shutil.rmtree, own, ignore_errors=True)

QUICKSTART = builtin_recipes()["quickstart"]
SMALL = {
    "steps": 2,
    "on_no_gap": "warn",
    "rollout.prompts": 4,
    "rollout.group_size": 4,
    "evaluation.problems": 8,
    "evaluation.samples": 2,
    "lora.rank": 4,
    "e_step.every": 2,
    "e_step.until_auc": None,  # the quickstart's teacher tells right from wrong: its E-steps would all be left out
}


@pytest.fixture
def small() -> Callable[..., Recipe]:
    """A quickstart of two small steps. Overrides are dotted keys, with `__` for the dot."""

    def build(**overrides: Any) -> Recipe:
        changed = {**SMALL, **{k.replace("__", "."): v for k, v in overrides.items()}}
        return load_recipe(QUICKSTART, list(changed.items()))

    return build


@pytest.fixture
def own_task(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe and its data file; returns the recipe's path."""

    def build(rows: str | None = None, extra: str = "", task: str | None = None) -> Path:
        if rows is None:
            rows = "".join(
                f'{{"prompt": "{a}+{b}=", "answer": "{a + b}"}}\n' for a in range(11, 19) for b in range(11, 15)
            )
        (tmp_path / "rows.jsonl").write_text(rows)
        model = QUICKSTART.parent / "model"
        path = tmp_path / "mine.yaml"
        path.write_text(
            f"name: mine\nmodel: {model}\n"
            + (task or "task: {kind: exact, data: rows.jsonl, held_out: 0.25}\n")
            + "steps: 1\non_no_gap: warn\nrollout: {prompts: 2, group_size: 2, max_prompt_tokens: 64, max_completion_tokens: 6}\n"
            + "feedback: {max_tokens: 32}\nevaluation: {problems: 4, samples: 1}\n"
            + extra
        )
        return path

    return build
