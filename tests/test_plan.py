"""Predicted memory against measured memory, on the shapes at which a run is at its longest."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import QUICKSTART
from test_architectures import make
from typer.testing import CliRunner

from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.algos.base import Step
from vpd_mlx.commands.app import app
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.blueprint import Blueprint
from vpd_mlx.engine.settings import LoraSettings, MemorySettings
from vpd_mlx.errors import ConfigError, ModelError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.run.loop import train
from vpd_mlx.run.plan import plan
from vpd_mlx.run.step import Trainer
from vpd_mlx.types import Context, Group, Verdict

SHAPES = [
    ("llama", {"num_hidden_layers": 5}),
    ("qwen3", {"head_dim": 16, "num_hidden_layers": 3, "vocab_size": 4000, "tie_word_embeddings": True}),
    ("qwen2", {"num_hidden_layers": 4, "hidden_size": 96, "intermediate_size": 256, "vocab_size": 1000}),
]


def longest(groups: list[Group], every: int = 2) -> list[Group]:
    """The batch with both classes, one in `every` right, and a teacher's prompt of its own for each rollout."""
    return [
        replace(
            g,
            rollouts=tuple(
                replace(
                    r,
                    success=n % every == 0,
                    verdict=Verdict(float(n % every == 0)),
                    context=Context("verifier", "x"),
                    teacher_prompt=(
                        *(r.teacher_prompt or g.prompt)[:5],
                        20 + n + 16 * at,
                        *(r.teacher_prompt or g.prompt)[6:],
                    ),
                )
                for n, r in enumerate(g.rollouts)
            ),
        )
        for at, g in enumerate(groups)
    ]


def peaks(overrides: dict[str, object]) -> tuple[int, int, int, int]:
    """Peak bytes of a rollout and an update, and the longest prompt and teacher prompt in tokens.

    Not of the first step, when the optimizers hold no moments yet. How far mlx queues ahead differs: the highest of three counts.
    """
    recipe = load_recipe(QUICKSTART, list(overrides.items()))
    trainer = Trainer.build(recipe)
    # Random models hardly ever sample it: completions are at their longest.
    trainer.policy.tokenizer._eos_token_ids = {351}
    rollouts, updates = [], []
    for step in (1, 2, 3, 4):
        mx.clear_cache()
        mx.reset_peak_memory()
        _, groups = trainer.roll_out(step, Clock())
        rollouts.append(mx.get_peak_memory())
        # SRPO's fullest micro-batch is of a batch that is wrong but for a completion a group: its losses share none.
        groups = longest(groups, 10**6 if recipe.algorithm == "srpo" else 2)
        mx.clear_cache()
        mx.reset_peak_memory()
        trainer.algorithm(trainer.policy, groups, Step(step, 0, Clock()))
        updates.append(mx.get_peak_memory())
    prompt = max(len(g.prompt) for g in groups)
    teacher = max(len(r.teacher_prompt or ()) for g in groups for r in g.rollouts)
    return max(rollouts[1:]), max(updates[1:]), prompt, teacher


def overrides_of(model: Path, prompts: int, size: int, length: int, budget: int) -> dict[str, object]:
    return {
        "model": str(model),
        "teacher.weights": "live",
        "e_step.every": 1,
        "e_step.until_auc": None,
        "rollout.prompts": prompts,
        "rollout.group_size": size,
        "rollout.max_completion_tokens": length,
        "rollout.max_prompt_tokens": 128,
        "memory.micro_batch_tokens": budget,
        "feedback.sources": ["verifier"],
        "templates.student": "x" * 40 + "{prompt}",
        "templates.verifier": "x" * 40 + "{prompt} {context}",
    }


@pytest.mark.long
@pytest.mark.parametrize(("kind", "settings"), SHAPES, ids=lambda x: str(x)[:20])
@pytest.mark.parametrize(("prompts", "size", "length", "budget"), [(2, 4, 12, 4096), (3, 4, 24, 400)])
def test_the_plan_is_within_a_fifth_of_what_is_measured(tmp_path: Path, kind, settings, prompts, size, length, budget):
    overrides = overrides_of(make(tmp_path / "m", kind, settings, 4), prompts, size, length, budget)
    # In a process of its own: what earlier tests left behind would count, or be freed in the middle.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        rollout, update, prompt, teacher = pool.submit(peaks, overrides).result()
    recipe = load_recipe(QUICKSTART, list(overrides.items()))
    planned = plan(recipe, prompt=prompt, context=teacher - prompt)
    assert planned.phases["rollout"] == pytest.approx(rollout, rel=0.2)
    assert planned.phases["update"] == pytest.approx(update, rel=0.2)


def compared(overrides: dict[str, object]) -> tuple[list[int], list[int]]:
    """(planned, measured) peaks of rollout and update."""
    rollout, update, prompt, teacher = peaks(overrides)
    gc.collect()
    mx.clear_cache()
    planned = plan(load_recipe(QUICKSTART, list(overrides.items())), prompt=prompt, context=teacher - prompt)
    return [planned.phases["rollout"], planned.phases["update"]], [rollout, update]


@pytest.mark.long
def test_every_algorithm_is_planned_by_its_own_update(tmp_path: Path):
    """Within a fifth of the real updates, each with the teacher that it takes by default."""
    model = make(tmp_path / "m", *SHAPES[1], 4)
    jobs = {}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in ALGORITHMS:
            own = {"algorithm": name, "feedback.sources": [ALGORITHMS[name].source or "reference", "verifier"]}
            jobs[name] = pool.submit(compared, {**overrides_of(model, 3, 4, 24, 400), **own})
    for name, job in jobs.items():
        planned, measured = job.result()
        assert planned == pytest.approx(measured, rel=0.2), name


def test_what_cannot_fit_is_refused_with_the_key_to_lower(small, tmp_path: Path):
    update = plan(small()).phases["update"] / 2**30
    for limit, words in (
        (0.00005, "its weights take"),
        (0.9 * update, r"memory\.micro_batch_tokens: 8192: the update"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            train(small(memory__limit_gb=limit), tmp_path / "run")
        assert caught.value.exit_code == 2
        assert not (tmp_path / "run").exists()


CONFIGS = Path(__file__).parent / "data" / "configs"


def test_a_hub_model_is_checked_by_its_config_alone(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name))
        return str(CONFIGS / "qwen3-0.6b-4bit.json")

    monkeypatch.setattr("vpd_mlx.run.plan.hf_hub_download", download)
    recipe = small(model="some/Qwen3-0.6B-4bit", memory__limit_gb=0.35)
    with pytest.raises(ConfigError) as caught:
        train(recipe, tmp_path / "run")
    text = str(caught.value)
    for words in (
        "the update phase",
        "the rollout phase",
        "memory.gradient_checkpointing",
        "lora.rank",
        "rollout_rows",
    ):
        assert words in text
    assert set(asked) == {("some/Qwen3-0.6B-4bit", "config.json")}
    assert not (tmp_path / "run").exists()
    checkpointing = recipe.memory.model_copy(update={"gradient_checkpointing": True})
    spared = plan(recipe.model_copy(update={"memory": checkpointing}))
    assert spared.phases["update"] < plan(recipe).phases["update"]


def test_weights_and_keys_are_counted_from_a_published_config(small):
    """Against the sizes of the published files, without allocating any of it."""
    mx.clear_cache()
    mx.reset_peak_memory()
    planned = plan(small(model=str(CONFIGS / "gpt-oss-20b.json"), lora__keys=["self_attn.q_proj"]))
    assert planned.weights == pytest.approx(13.76e9, rel=0.02)
    assert planned.blocks == 24
    assert mx.get_peak_memory() < mx.get_active_memory() + 2**24
    layers = Blueprint.of(
        json.loads((CONFIGS / "gpt-oss-20b.json").read_text()),
        LoraSettings(keys=["self_attn.q_proj"]),
        MemorySettings(),
    ).layers()
    assert layers[:2] == [(2 * 8 * 64 * 2, 128), (2 * 8 * 64 * 2, math.inf)]  # window, full


def test_the_command(tmp_path: Path):
    result = CliRunner().invoke(app, ["plan", "--time", "--set", "rollout.prompts=2"])
    assert result.exit_code == 0, result.output
    for word in ("weights", "rollout", "update", "limit", "time"):
        assert word in result.output


def test_no_config_no_plan(small, tmp_path: Path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        plan(small(model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot be planned for"):
        plan(small(model=str(tmp_path)))


def test_limits_are_set(small):
    from vpd_mlx.run.setup import load_policy

    load_policy(small(memory__cache_limit_gb=0.25, memory__limit_gb=3.0))
    try:
        assert mx.set_cache_limit(1 << 30) == 1 << 28
        assert mx.set_memory_limit(1 << 34) == 3 << 30
    finally:
        mx.set_cache_limit(1 << 34)
        mx.set_memory_limit(1 << 34)


def test_the_buffer_cache_is_bounded(small, monkeypatch):
    from vpd_mlx.run.setup import load_policy

    def kept() -> int:
        """Bytes in MLX's cache after 32 MB were freed."""
        freed = [mx.zeros(1 << 20) for _ in range(8)]
        mx.eval(freed)
        del freed
        return mx.get_cache_memory()

    before = mx.set_cache_limit(1 << 34)
    try:
        load_policy(small())  # no GPU here, no bound
        assert kept() >= 8 << 22
        load_policy(small(memory__cache_limit_gb=2**-6))
        assert kept() <= 1 << 24
        monkeypatch.setattr(mx, "set_wired_limit", lambda _: None)
        for key in ("max_recommended_working_set_size", "total_memory"):  # Metal's and CUDA's
            monkeypatch.setattr(mx, "device_info", lambda key=key: {key: 1 << 26})
            load_policy(small())
            assert 0 < kept() <= 1 << 24
        load_policy(small(memory__cache_limit_gb=1.0))
        assert kept() >= 8 << 22
    finally:
        mx.set_cache_limit(before)


def test_the_wired_limit_is_set_where_there_is_one(small, monkeypatch):
    from vpd_mlx.run.setup import load_policy

    with pytest.raises(
        ConfigError, match=r"memory.wired_limit_gb: 8: Device\(cpu, 0\) has no wired memory; leave it null"
    ):
        load_policy(small(memory__wired_limit_gb=8.0))
    given: list[int] = []
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 << 30})
    monkeypatch.setattr(mx, "set_wired_limit", given.append)
    load_policy(small(memory__wired_limit_gb=8.0))
    load_policy(small())
    assert given[0] == 8 << 30  # mlx-lm's generator, with which the load tries to decode, sets and restores its own
    assert given[-1] == 12 << 30
    with pytest.raises(ConfigError, match=r"13 is more than this machine's 12\.0; lower it"):
        load_policy(small(memory__wired_limit_gb=13.0))
