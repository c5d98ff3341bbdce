"""Presets: the paper's table, for every algorithm, under the keys that a recipe gives itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vpd_mlx as vpd
from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.algos.presets import PRESETS
from vpd_mlx.algos.settings import TeacherSettings
from vpd_mlx.commands.options import overridden
from vpd_mlx.errors import ConfigError
from vpd_mlx.recipe import Recipe, dump, load_recipe
from vpd_mlx.run.folder import by_dotted_key

MINIMAL = "name: x\nmodel: ./m\ntask: {kind: addition}\n"

# arXiv 2605.15113's table by column: rate (ten times, for LoRA), alpha, top-k, problems an update, EMA rate, k of avg@k.
TABLE = {
    "paper-code": (1e-5, 1.0, 20, 1, 0.01, 4),
    "paper-science": (1e-4, 0.5, 100, None, 0.05, 16),
    "paper-math": (5e-5, 0.0, None, None, 0.05, 4),
}
# The same in all columns.
COMMON: dict[str, Any] = {
    "rollout.prompts": 32,
    "rollout.group_size": 8,
    "rollout.max_prompt_tokens": 2048,
    "rollout.max_completion_tokens": 8192,
    "rollout.temperature": 1.0,
    "e_step.every": 5,
    "e_step.beta": 0.1,
    "e_step.prior": "dynamic",
    "e_step.delta": "fresh",
    "e_step.contexts": "own",
    "e_step.anchor": 0.0,
    "e_step.learning_rate_ratio": 1.0,
    "e_step.epochs": 1,
    "feedback.max_prompt_tokens": 10240,
    "m_step.tail": True,
    "m_step.weighting": "sequence",
    "m_step.importance_clip": None,
    "optimizer.warmup_steps": 10,
    "optimizer.weight_decay": 0.01,
    "optimizer.grad_clip": 1.0,
    "grpo.scale": "none",
    "grpo.clip_low": 0.2,
    "grpo.clip_high": 0.28,
    "grpo.dual_clip": 3.0,
    "grpo.weighting": "token",
    "grpo.kl": 0.0,
    "grpo.drop_uniform_groups": False,
    "evaluation.temperature": 0.6,
    "evaluation.top_p": 0.95,
    "evaluation.keep_best": False,
    "templates.style": "sdpo",
}
TEACHER = {
    "vpd": "live",
    "sdpo": "ema",
    "opsd": "ema",
    "joint": "ema",
    "reshape": "ema",
    "reweight": "ema",
    "srpo": "ema",
    "rlcsd": "ema",
}


def recipe_of(folder: Path, extra: str = "", *sets: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(MINIMAL + extra)
    return load_recipe(path, overridden(list(sets)))


def flat(recipe: Recipe) -> dict[str, Any]:
    return by_dotted_key(recipe.model_dump(mode="json"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", [n for n in PRESETS if n != "default"])
def test_the_papers_table(tmp_path: Path, name: str, algorithm: str):
    values = flat(recipe_of(tmp_path, f"preset: {name}\nalgorithm: {algorithm}\n"))
    rate, alpha, top_k, minibatch, ema_rate, samples = TABLE["paper-science" if name == "paper" else name]
    assert values["optimizer.learning_rate"] == rate
    assert (values["m_step.alpha"], values["m_step.top_k"]) == (alpha, top_k)
    assert values["m_step.minibatch_prompts"] == values["grpo.minibatch_prompts"] == minibatch
    assert values["e_step.minibatch_prompts"] is None
    assert values["teacher.ema_rate"] == ema_rate
    assert values["evaluation.samples"] == samples
    assert {key: values[key] for key in COMMON} == COMMON
    assert values["teacher.weights"] == TEACHER.get(algorithm)
    words = ["sibling", "verifier"] if name == "paper-code" else ["sibling"]
    assert values["feedback.sources"] == (["reference"] if algorithm == "opsd" else words)


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "default"])
def test_a_preset_of_the_paper_leaves_no_key_of_an_update_to_our_defaults(name: str):
    """So that a default that changes, or a key that is added, changes no published setting."""
    for algorithm, entry in ALGORITHMS.items():
        values = PRESETS[name].values_for(algorithm)
        for section, kind in {"rollout": Recipe.model_fields["rollout"].annotation, **entry.sections}.items():
            assert set(values[section]) == set(kind.model_fields), section  # type: ignore[union-attr]
        assert set(values["optimizer"]) == set(Recipe.model_fields["optimizer"].annotation.model_fields)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_is_one_of_the_recipe(name: str):
    known = set(by_dotted_key(Recipe(name="x", model="m", task={"kind": "addition"}).model_dump(mode="json")))
    preset = PRESETS[name]
    for values in (preset.values, *preset.of.values()):
        assert set(by_dotted_key(values)) <= known
    assert set(preset.of) in (set(), set(ALGORITHMS))


def test_without_a_preset_nothing_changes(tmp_path: Path):
    plain = recipe_of(tmp_path)
    assert plain == recipe_of(tmp_path, "preset: default\n")
    assert flat(plain) == flat(Recipe(name="x", model=plain.model, task={"kind": "addition"}))


def test_precedence_preset_then_recipe_then_set(tmp_path: Path):
    given = "preset: paper\nrollout: {prompts: 8}\ntemplates: before\nm_step: {top_k: null}\n"
    values = flat(recipe_of(tmp_path, given))
    assert (values["rollout.prompts"], values["rollout.group_size"]) == (8, 8)
    assert (values["templates.style"], values["m_step.top_k"]) == ("before", None)
    values = flat(recipe_of(tmp_path, given, "rollout.prompts=4", "templates=after", "m_step.alpha=0.25"))
    assert (values["rollout.prompts"], values["templates.style"], values["m_step.alpha"]) == (4, "after", 0.25)
    assert recipe_of(tmp_path, given, "preset=paper-code").m_step.alpha == 1.0
    assert recipe_of(tmp_path, given, "preset=default").m_step.alpha == recipe_of(tmp_path).m_step.alpha
    own = recipe_of(tmp_path, "", "preset=paper").templates
    assert own.style == "sdpo"


def test_a_baseline_has_its_own_settings_in_two_words(tmp_path: Path):
    mine = "e_step: {every: 2}\nrollout: {prompts: 8}\n"
    sdpo = recipe_of(tmp_path, mine, "algorithm=sdpo", "preset=paper-code")
    assert (sdpo.teacher.weights, sdpo.teacher.ema_rate) == ("ema", 0.01)
    grpo = recipe_of(tmp_path, mine, "algorithm=grpo", "preset=paper")
    assert (grpo.algorithm, grpo.optimizer.learning_rate, grpo.rollout.prompts) == ("grpo", 1e-4, 8)


def test_a_preset_that_is_unknown_or_comes_too_late_is_refused(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"preset: got 'papr'; did you mean 'paper'\? There is also default, paper-code, "
    ):
        recipe_of(tmp_path, "preset: papr\n")
    run = tmp_path / "config.yaml"
    run.write_text(dump(recipe_of(tmp_path)))
    with pytest.raises(ConfigError, match="preset: 'paper' changes nothing: the recipe gives every key that it has"):
        load_recipe(run, [("preset", "paper")])
    with pytest.raises(ConfigError, match="preset: 'paper' changes nothing"):
        vpd.train(recipe_of(tmp_path), preset="paper")
    resolved = recipe_of(tmp_path, "preset: paper\n")
    run.write_text(dump(resolved))
    assert load_recipe(run) == resolved


def test_a_preset_from_python(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    assert vpd.load_recipe(path, preset="paper-math", algorithm="sdpo").m_step.alpha == 0.0


def test_the_page_lists_every_preset():
    page = (Path(__file__).parent.parent / "docs" / "recipe.md").read_text()
    assert all(f"- `{name}`: {preset.what}" in page for name, preset in PRESETS.items())


def test_recipes_of_earlier_versions_warm_up_by_updates(tmp_path: Path):
    for version, by in ((1, "updates"), (2, "updates"), (3, "steps"), (4, "steps")):
        assert recipe_of(tmp_path, f"version: {version}\n").optimizer.warmup_by == by
    assert recipe_of(tmp_path, "version: 2\noptimizer: {warmup_by: steps}\n").optimizer.warmup_by == "steps"


def test_the_default_teacher_has_an_adapter_of_its_own_where_an_e_step_trains_it(tmp_path: Path):
    names = set(TEACHER) - {"opsd", "rlcsd"}  # which ask for sources of their own
    own = {name: TeacherSettings.of(recipe_of(tmp_path, "", f"algorithm={name}")).weights for name in names}
    assert own == {**dict.fromkeys(own, "ema"), "vpd": "adapter"}
    # Named, it is refused where a teacher has no E-step, and means nothing where there is no teacher.
    with pytest.raises(
        ConfigError, match=r"teacher\.weights: `adapter` is trained by the E-step, which sdpo does not have"
    ):
        recipe_of(tmp_path, "teacher: {weights: adapter}\n", "algorithm=sdpo")
    assert recipe_of(tmp_path, "teacher: {weights: adapter}\n", "algorithm=grpo").algorithm == "grpo"
    # A run's folder holds what it did, and another algorithm may go on from it.
    (tmp_path / "config.yaml").write_text(dump(recipe_of(tmp_path)))
    assert TeacherSettings.of(load_recipe(tmp_path / "config.yaml", [("algorithm", "sdpo")])).weights == "ema"


def test_recipes_before_version_4_train_an_ema_teacher_every_fifth_step(tmp_path: Path):
    for version, expected in {
        1: (5, None, "live"),
        2: (5, None, "ema"),
        3: (5, None, "ema"),
        4: (1, 0.9, None),
    }.items():
        r = recipe_of(tmp_path, f"version: {version}\n")
        assert (r.e_step.every, r.e_step.until_auc, r.teacher.weights) == expected
    given = "version: 3\ne_step: {every: 2, until_auc: 0.8}\nteacher: {weights: adapter}\n"
    r = recipe_of(tmp_path, given)
    assert (r.e_step.every, r.e_step.until_auc, r.teacher.weights) == (2, 0.8, "adapter")


def test_a_recipe_of_version_1_keeps_the_teacher_of_then(tmp_path: Path):
    for algorithm, kind in {**dict.fromkeys(ALGORITHMS, "live"), "sdpo": "ema", "opsd": "ema"}.items():
        sources = "feedback: {sources: [reference]}\n" if algorithm == "opsd" else ""
        for null in ("", "teacher: {weights: null}\n"):
            old = recipe_of(tmp_path, f"version: 1\nalgorithm: {algorithm}\n{sources}{null}")
            assert old.teacher.weights == kind
    given = recipe_of(tmp_path, "version: 1\nteacher: {weights: frozen}\ntemplates: {style: before}\n")
    assert (given.teacher.weights, given.templates.style) == ("frozen", "before")
    assert (given.on_collapse, recipe_of(tmp_path).on_collapse) == ("warn", "revert")
    assert recipe_of(tmp_path, "preset: paper\n").on_collapse == "warn"
