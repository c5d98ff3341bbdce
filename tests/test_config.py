"""Recipes: strict, all faults at once, precedence recipe < --set < flag."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.commands.options import overridden
from vpd_mlx.common.settings import kind_of, parse_set
from vpd_mlx.errors import ConfigError, Fault
from vpd_mlx.feedback import SOURCES
from vpd_mlx.recipe import Recipe, builtin_recipes, dump, load_recipe, model_fields, resolve_recipe_path
from vpd_mlx.tasks import TASKS

MINIMAL = "name: x\nmodel: ./m\ntask: {kind: addition}\n"


def write(path: Path, text: str) -> Path:
    file = path / "recipe.yaml"
    file.write_text(text)
    return file


def faults(path: Path, text: str, sets: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(path, text), parse_set(sets or []))
    return str(caught.value)


def test_every_builtin_recipe_loads():
    names = builtin_recipes()
    assert "quickstart" in names
    for path in names.values():
        assert load_recipe(path).description


def test_precedence_recipe_then_set_then_flag(tmp_path: Path):
    path = write(tmp_path, MINIMAL + "steps: 1\nseed: 1\n")
    assert load_recipe(path).steps == 1
    assert load_recipe(path, overridden(["steps=2"])).steps == 2
    assert load_recipe(path, overridden(["steps=2"], steps=3)).steps == 3
    assert load_recipe(path, overridden(["steps=2"], steps=None)).steps == 2
    assert load_recipe(path, overridden(["seed=7", "seed=8"], seed=None)).seed == 8


def test_all_faults_at_once_with_path_value_and_remedy(tmp_path: Path):
    text = faults(
        tmp_path,
        "name: x\nmodel: ./m\ntask: {kind: addition, digit: 2}\nrollout: {group_size: 1, prompts: many}\nlora: {rnk: 4}\n",
    )
    assert "task.digit: unknown key (value 2); did you mean 'digits'?" in text
    assert "rollout.prompts: got 'many'; needs a whole number" in text
    assert "lora.rnk: unknown key (value 4); did you mean 'rank'?" in text
    assert "rollout.group_size: 1 leaves no sibling" in text
    assert "4 faults" in text


@pytest.mark.parametrize(
    ("extra", "place"),
    [
        ("rollout: {group_size: 1}\nfeedback: {sources: [sibling]}", "rollout.group_size"),
        ("rollout: {group_size: 1}\nfeedback: {sources: [attempts, verifier]}", "rollout.group_size"),
        ("feedback: {sources: [sibling, attempts]}", "feedback.sources"),
        ("algorithm: grpo\nrollout: {group_size: 1}", "rollout.group_size"),
        ("feedback: {sources: [verifier, verifier]}", "feedback.sources"),
        ("algorithm: opsd", "feedback.sources"),
        ("feedback: {sources: [sibling], with_solution: true}", "feedback.with_solution"),
        ("feedback: {max_tokens: 4000}", "feedback.max_tokens"),
        ("e_step: {minibatch_prompts: 99}", "e_step.minibatch_prompts"),
        ("m_step: {minibatch_prompts: 99}", "m_step.minibatch_prompts"),
        ("grpo: {minibatch_prompts: 99}", "grpo.minibatch_prompts"),
        ("algorithm: joint\nhybrid: {distill: 0.0, reward: 0.0}", "hybrid.distill"),
        ("algorithm: srpo\nhybrid: {distill: 0.0, reward: 0.0}", "hybrid.distill"),
        ("algorithm: srpo\nfeedback: {sources: [server], on_success: true}", "feedback.on_success"),
        ("algorithm: sdpo\nteacher: {weights: adapter}", "teacher.weights"),
        ("memory: {micro_batch_tokens: 100}", "memory.micro_batch_tokens"),
        ("templates: {sibling: 'look: {context}'}", "templates.sibling"),
        ("templates: {verifier: '{prompt} {contxt} {context}'}", "templates.verifier"),
        ("templates: {verifier: '{prompt} {context} {answer}'}", "templates.verifier"),
        ("version: 99", "version"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, extra: str, place: str):
    assert f"{place}: " in faults(tmp_path, MINIMAL + extra)


def test_braces_of_other_tongues_stay_in_templates(tmp_path: Path):
    text = r"templates: {verifier: 'In \boxed{answer}: {prompt} {x} {context}'}"
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL + text)
    assert r"\boxed{answer}" in (load_recipe(path).templates.verifier or "")


def test_an_override_is_not_blamed_on_the_file(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    for key, value, words in (
        ("steps", 0, "as overridden: steps: got 0"),
        ("rollout", 3, "as overridden: rollout: got 3; needs keys of its own, e.g. rollout.prompts"),
        ("feedback.sources", [], "feedback.sources: got []; needs at least 1 of them"),
        ("name", "a/b", "name: got 'a/b'; needs letters, digits"),
        ("feedback", {"sources": ["server"], "server": {"url": "nowhere"}}, "feedback.server.url: got 'nowhere'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)) as refused:
            load_recipe(path, [(key, value)])
        assert len(refused.value.faults) == 1


LAUGHS = "a0: &a0 lol\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


def test_every_number_is_finite(tmp_path: Path):
    found = dict(model_fields())
    floats = [key for key, field in found.items() if "float" in str(field.annotation)]
    assert len(floats) > 20
    for value in (".inf", "-.inf", ".nan"):
        overrides = parse_set([f"{key}={value}" for key in floats])
        with pytest.raises(ConfigError) as refused:
            load_recipe(builtin_recipes()["quickstart"], overrides)
        assert {fault.path for fault in refused.value.faults} >= set(floats), value
    inside = parse_set(["task={kind: reasoning_gym, name: x, settings: {a: [.inf]}}"])
    with pytest.raises(ConfigError, match=r"task.settings: got .*needs finite numbers"):
        load_recipe(builtin_recipes()["quickstart"], inside)


def test_an_error_survives_pickling():
    error = ConfigError([Fault("steps", "got 0", "use 1"), Fault("seed", "got -1", "use 0")], "mine.yaml")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.faults, again.where) == (str(error), error.faults, error.where)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the recipe is empty"),
        ("- a\n", "the recipe is a list"),
        ("name: [\n", "not valid YAML"),
        ("name: x\nname: y\n", "given twice"),
        (MINIMAL + "seed: true\n", "seed: got True"),
        (MINIMAL + "steps: 0\n", "steps: got 0; needs at least 1"),
        ("name: a/b\nmodel: ./m\ntask: {kind: addition}\n", "name: got 'a/b'"),
        ("name: x\nmodel: ./m\ntask: {kind: chess}\n", "'chess' is not a kind of task"),
        ("name: x\nmodel: ./m\n", "task: is required and missing"),
        ("name: " + "[" * 2000, "nested too deeply, or in itself"),
        ("name: &a [*a]\n", "nested too deeply, or in itself"),
        ("? [a, b]\n: c\n", "a key is no plain word"),
        (LAUGHS, "more than 10,000 values, aliases counted"),
        ("a0: &a0 {k: 1}\n" + MERGES, "more than 10,000 values, aliases counted"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, words: str):
    assert words in faults(tmp_path, text)


def test_set_reads_yaml_and_refuses_what_is_no_pair(tmp_path: Path):
    cfg = load_recipe(
        write(tmp_path, MINIMAL),
        parse_set(["optimizer.learning_rate=1e-5", "feedback.sources=[verifier]", "m_step.top_k=null"]),
    )
    assert cfg.optimizer.learning_rate == 1e-5
    assert cfg.feedback.sources == ["verifier"]
    for item in ("steps", "=3", "a..b=1"):
        with pytest.raises(ConfigError, match="not of the form key=value"):
            parse_set([item])
    assert "steps.deep" in faults(tmp_path, MINIMAL + "steps: 3\n", ["steps.deep=1"])


def test_resolved_config_reads_back_the_same(tmp_path: Path):
    cfg = load_recipe(builtin_recipes()["quickstart"], [("steps", 7)])
    assert load_recipe(write(tmp_path, dump(cfg))) == cfg


def test_paths_are_relative_to_the_recipe(tmp_path: Path):
    text = "name: x\nmodel: ./m\ntask: {kind: exact, data: rows.jsonl}\n"
    cfg = load_recipe(write(tmp_path, text))
    assert cfg.model == str(tmp_path / "m")
    assert cfg.task.data == str(tmp_path / "rows.jsonl")  # type: ignore[union-attr]
    assert load_recipe(write(tmp_path, text.replace("./m", "owner/name"))).model == "owner/name"


def test_unknown_recipe_names_a_near_one():
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        resolve_recipe_path("quickstrat")


def test_every_key_is_described():
    for path, info in model_fields(Recipe):
        assert info.description or path in ("version", "task"), path


keys = st.sampled_from([p for p, _ in model_fields(Recipe)] + ["nonsense", "lora.nonsense", "task.kind", "task.digits"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=4,
)


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(keys, values), min_size=1, max_size=4))
@example([("model", "\0")])
def test_any_override_gives_a_recipe_or_named_faults(tmp_path_factory, overrides):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(MINIMAL)
    try:
        cfg = load_recipe(path, overrides)
    except ConfigError as error:
        found = error
    else:
        assert yaml.safe_load(dump(cfg))["name"]
        return
    assert found.exit_code == 2
    assert all(f.path and f.problem and f.remedy for f in found.faults)


@settings(max_examples=250, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_a_recipe_or_named_faults(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert caught.value.faults


def test_the_json_schema_follows_from_the_lists():
    schema = Recipe.model_json_schema()
    kinds = set(schema["properties"]["task"]["discriminator"]["mapping"])
    assert kinds == {kind_of(settings) for settings, _ in TASKS}
    assert set(schema["properties"]["algorithm"]["enum"]) == set(ALGORITHMS)
    assert set(ALGORITHMS["joint"].sections) <= set(schema["properties"])
    feedback = schema["$defs"]["FeedbackSettings"]["properties"]
    assert set(feedback["sources"]["items"]["enum"]) == set(SOURCES)
    assert {"command", "server", "replay", "critique_tokens"} <= set(feedback)
