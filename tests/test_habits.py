"""What people bring with them from other trainers: flags, a first recipe, names, and two runs at once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command import within
from conftest import QUICKSTART
from jsonschema import Draft202012Validator

from vpd_mlx.commands.draft import KINDS, Size, draft, size_of
from vpd_mlx.commands.short import asked_recipe
from vpd_mlx.common.settings import parse_set, parse_yaml, to_yaml
from vpd_mlx.engine.policy import Policy
from vpd_mlx.errors import ConfigError
from vpd_mlx.recipe import json_schema, load_recipe
from vpd_mlx.run.log import RunLog, claimed_folder
from vpd_mlx.tasks.data import read_split

MODEL = str(QUICKSTART.parent / "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --learning-rate 1e-3", "--learning-rate: vpd-mlx train has no such option; write --lr 1e-3"),
        ("train --num-generations 8", "write --set rollout.group_size=8"),
        ("train --batch_size=8", "write --set rollout.prompts=8"),
        ("train --warmup 3", "write --set optimizer.warmup_steps=3"),
        ("train --lora-alpha 4", "write --set lora.scale=4"),
        ("train --step 5", "did you mean --steps?"),
        ("train --config mine.yaml", "write the file alone: mine.yaml"),
        ("train --mask-prompt", "leave it out"),
        ("plan --iters 5", "write --set steps=5"),
        ("train --zzz", "see vpd-mlx train --help"),
        ("trian", "trian: is no command; did you mean 'train'?"),
        ("data chek", "chek: is no command; did you mean 'check'?"),
        ("train --steps x", "--steps: got 'x'; needs a whole number"),
        ("train --steps", "--steps: lacks its value"),
        ("train --quiet=3", "--quiet: takes no value"),
        ("eval", "RUN|RECIPE|MODEL: is missing; see vpd-mlx eval --help"),
        ("eval x --samples 0", "--samples: got '0'; needs at least 1"),
        ("export runs/x --to ggml", "--to: got 'ggml'; needs one of 'adapters'"),
        ("train a b", "b: is more than vpd-mlx train takes"),
    ],
)
def test_a_command_line_that_is_not_understood_is_one_line_with_what_was_meant(
    tmp_path: Path, arguments: str, words: str
):
    found = within(*arguments.split(), cwd=tmp_path)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert words in found.stderr
    assert not found.stdout


def test_short_forms_set_keys_and_faults_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    flags = {"model": "m", "algorithm": "grpo", "lr": 3e-4, "name": "no", "steps": 7, "seed": 5, "data": None}
    cfg = asked_recipe(None, ["steps=9", "model=elsewhere"], flags)
    assert (cfg.model, cfg.algorithm, cfg.optimizer.learning_rate) == (str(tmp_path / "m"), "grpo", 3e-4)
    assert (cfg.name, cfg.steps, cfg.seed, cfg.task.kind) == ("no", 7, 5, "addition")
    assert load_recipe(_written(tmp_path / "again.yaml", to_yaml(cfg.model_dump(mode="json")))) == cfg
    for wrong, words in (
        ({"lr": 0.0}, "command line: --lr: got 0.0; needs more than 0"),
        ({"data": "rows.jsonl"}, "--model: is missing, and --data without a RECIPE needs it"),
        ({"algorithm": "vdp", "steps": 0}, "--steps: got 0; needs at least 1"),
    ):
        with pytest.raises(ConfigError) as refused:
            asked_recipe(None, [], wrong)
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match="--data: the task of quickstart, addition, makes its own problems"):
        asked_recipe("quickstart", [], {"data": "rows.jsonl", "lr": 1.0})


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_rows_and_a_model_alone_make_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    flags = {"model": MODEL, "data": "my rows.jsonl", "verifier": "judge.py"}
    cfg = asked_recipe(None, ["task.held_out=0.25"], flags)
    assert (cfg.name, cfg.task.kind, cfg.model) == ("my-rows", "python", MODEL)
    assert (cfg.task.data, cfg.task.verifier) == (str(tmp_path / "my rows.jsonl"), str(tmp_path / "judge.py"))
    assert cfg.rollout.max_prompt_tokens == 1024  # half of the model's positions
    assert cfg.templates.style == "after"
    assert asked_recipe(None, [], {**flags, "verifier": None, "name": "x"}).task.kind == "exact"


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    return Draft202012Validator(json_schema())


@pytest.mark.parametrize("kind", KINDS)
def test_new_writes_a_recipe_for_a_model_and_a_kind(tmp_path: Path, schema: Draft202012Validator, kind: str):
    made = within("new", "123", "--model", MODEL, "--task", kind, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    text = (tmp_path / "123" / "123.yaml").read_text()
    assert not [*schema.iter_errors(parse_yaml(text, ""))]
    cfg = load_recipe(tmp_path / "123" / "123.yaml")
    assert (cfg.name, cfg.task.kind, cfg.model, cfg.rollout.group_size) == ("123", kind, MODEL, 8)
    if kind != "reasoning_gym":
        train, held = read_split(cfg.task)
        assert len(train) > len(held) > 1


def test_new_refuses_before_it_writes(tmp_path: Path):
    for arguments, words in (
        (["--task", "chess"], "--task: got 'chess'; use one of python, exact"),
        (["--task", "math"], "--model: is missing, and the tiny model knows sums alone"),
        (["--model", "./nowhere"], "--model: there is no folder ./nowhere"),
        (["--model", str(tmp_path)], "no config.json"),
    ):
        found = within("new", "mine", *arguments, cwd=tmp_path)
        assert found.returncode == 2
        assert words in found.stderr
    assert not [*tmp_path.iterdir()]


def test_limits_and_rate_follow_from_the_models_config():
    small = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "max_position_embeddings": 512}
    large = {"text_config": {**small, "hidden_size": 4096, "max_position_embeddings": 10**6}}

    def drafted(config: dict) -> dict:
        return parse_yaml(draft("x", "m", "math", size_of(config), task={}), "")

    assert 1e8 < (size_of(small).parameters or 0) < 2e8
    assert drafted(small)["rollout"]["max_prompt_tokens"] == 256
    assert drafted(small)["rollout"]["max_completion_tokens"] == 128
    assert [drafted(c)["optimizer"]["learning_rate"] for c in (small, large)] == [5e-4, 1e-4]
    assert drafted(large)["rollout"]["max_prompt_tokens"] == 2048
    assert size_of({}) == Size()


def test_a_models_place_is_relative_where_both_lie_together(tmp_path: Path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"max_position_embeddings": 100}))
    assert within("new", "mine", "--model", "m", cwd=tmp_path).returncode == 0
    assert "\nmodel: ../m " in (tmp_path / "mine" / "mine.yaml").read_text()
    assert load_recipe(tmp_path / "mine" / "mine.yaml").model == str(tmp_path / "m")


@pytest.mark.parametrize("name", ["no", "123", "1e5", "2020-01-01", "null-hypothesis"])
def test_any_word_may_name_a_run(name: str):
    text = f"name: {name}\nmodel_revision: {name}\ntask: {{kind: addition}}\nmodel: ./m\n"
    assert parse_yaml(text, "")["name"] == parse_yaml(text, "")["model_revision"] == name
    assert parse_set([f"name={name}"]) == [("name", name)]
    assert parse_yaml(to_yaml({"name": name, "x": name}), "") == {"name": name, "x": name}
    assert parse_yaml("name: null", "")["name"] is None


def test_two_runs_that_begin_together_take_two_folders(tmp_path: Path):
    def claim(_: int) -> tuple[str, bool]:
        with claimed_folder(tmp_path / "runs" / "mine") as folder:
            (folder / "here").touch()
            return folder.name, (folder / "here").exists()

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(claim, range(8))]
    assert sorted(found) == sorted([("mine", True), *((f"mine-{n}", True) for n in range(2, 9))])
    with claimed_folder(tmp_path / "other" / "mine") as folder:
        log = RunLog.create(folder, "a: 1\n", overwrite=False)
        log.close()
    with claimed_folder(tmp_path / "none" / "mine") as folder:
        assert folder.is_dir()
    assert (tmp_path / "other" / "mine" / "config.yaml").exists()
    assert not (tmp_path / "none").exists()


def test_a_taken_folder_is_refused_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Policy, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").touch()
    for out, words in (
        ("file", "file: is a file, and a run needs a folder; give another --out"),
        ("file/run", "is a file; give another --out"),
        ("taken", "taken: holds a run already"),
    ):
        found = within("train", "--out", out, cwd=tmp_path)
        assert found.returncode == 3
        assert words in found.stderr
        assert len(found.stderr.splitlines()) == 1
