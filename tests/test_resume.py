"""What a resume refuses, what it passes over, and what nobody may write through."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from vpd_mlx.common.files import read_rows
from vpd_mlx.errors import ConfigError, DataError, RunError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.run.checkpoint import find_checkpoint
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.log import RunLog
from vpd_mlx.run.loop import train
from vpd_mlx.run.resume import check_resume

pytestmark = pytest.mark.exact  # bits are compared


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints after the second and the fourth."""
    from conftest import QUICKSTART, SMALL

    run = tmp_path_factory.mktemp("resume") / "whole"
    train(load_recipe(QUICKSTART, list({**SMALL, "steps": 4, "checkpoint.every": 2}.items())), run)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def adapter(run: Path) -> bytes:
    return (run / "adapters" / "adapters.safetensors").read_bytes()


def damage_log(run: Path, how: str) -> None:
    log = run / "rollouts.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    half = b"".join(lines[: len(lines) // 2])
    if how == "short":
        log.write_bytes(half)
    elif how == "missing":
        log.unlink()
    else:  # one row is a byte longer than it was
        log.write_bytes(b" " + b"".join(lines))


def test_a_short_log_takes_the_run_back_to_the_checkpoint_that_it_covers(whole: Path, run: Path):
    damage_log(run, "short")
    found, notes = find_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert "step-000004: rollouts.jsonl has" in notes[0]
    train(load_recipe(run / "config.yaml"), run, resume=True)
    assert adapter(run) == adapter(whole)
    assert read_rows(run / "rollouts.jsonl") == read_rows(whole / "rollouts.jsonl")
    assert b"\0" not in (run / "rollouts.jsonl").read_bytes()
    assert load_run(run).finished


@pytest.mark.parametrize(
    ("how", "words"), [("missing", "has 0 bytes, and had"), ("edited", "has been changed: no row ends at")]
)
def test_a_log_that_no_checkpoint_fits_is_named(run: Path, how: str, words: str):
    damage_log(run, how)
    before = {p.name: p.read_bytes() for p in run.glob("*.jsonl") if p.stat().st_size}
    with pytest.raises(RunError, match=f"rollouts.jsonl {words}"):
        train(load_recipe(run / "config.yaml"), run, resume=True)
    assert {p.name: p.read_bytes() for p in run.glob("*.jsonl") if p.stat().st_size} == before


def test_garbage_behind_the_checkpoint_is_cut_off(whole: Path, run: Path):
    for name in ("metrics.jsonl", "rollouts.jsonl", "evals.jsonl"):
        with (run / name).open("ab") as log:
            log.write(b"\xff\xfe\x00 no UTF-8\n{half a li")
    check_resume(run, load_recipe(run / "config.yaml"), "--resume")
    train(load_recipe(run / "config.yaml"), run, resume=True)
    assert read_rows(run / "metrics.jsonl") == read_rows(whole / "metrics.jsonl")
    with (run / "metrics.jsonl").open("ab") as log:
        log.write(b"\xff\xfe\n")
    with pytest.raises(DataError, match=r"metrics.jsonl:5: broken JSON .*remove the line"):
        read_rows(run / "metrics.jsonl")


@pytest.mark.parametrize("hashes", [{}, {"state.json": "0"}, None])
def test_a_manifest_must_have_every_hash(run: Path, hashes: object):
    for folder in (run / "checkpoints").iterdir():
        (folder / "manifest.json").write_text(json.dumps({"version": 1, "sha256": hashes}))
    with pytest.raises(RunError, match="no whole checkpoint"):
        find_checkpoint(run / "checkpoints")


@pytest.mark.parametrize("name", ["rollouts.jsonl", "run.lock", ".config.yaml.partial"])
def test_nothing_is_written_through_a_link(run: Path, tmp_path: Path, name: str):
    target = tmp_path / "thesis.txt"
    target.write_text("years of work")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)

    def write() -> None:
        RunLog.reopen(run).write("config.yaml", "name: mine\n")

    with pytest.raises(RunError, match=f"{name}: is a link"):
        write()
    assert target.read_text() == "years of work"


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 7), ("optimizer.learning_rate", 1e-2), ("rollout.prompts", 8), ("task.digits", 3)]
)
def test_an_edited_recipe_is_refused_by_name(run: Path, key: str, value: object):
    config = yaml.safe_load((run / "config.yaml").read_text())
    section, _, last = key.rpartition(".")
    (config[section] if section else config)[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = rf"{key}: differs from the run's recipe \({value!r}, not .*only these may change: steps, "
    with pytest.raises(ConfigError, match=words):
        check_resume(run, load_recipe(run / "config.yaml"), "--resume")


def test_what_may_change_may_be_edited(run: Path):
    may = {"steps": 9, "on_collapse": "stop", "on_no_gap": "stop", "evaluation.every": 3, "checkpoint.keep": 5}
    check_resume(run, load_recipe(run / "config.yaml", list(may.items())), "--resume")


def test_a_model_and_rows_that_have_moved_may_be_named_anew(run: Path, tmp_path: Path):
    recipe = load_recipe(run / "config.yaml")
    copy = str(shutil.copytree(recipe.model, tmp_path / "copy"))
    moved = recipe.model_copy(update={"model": copy})
    with pytest.raises(ConfigError, match="model: differs from the run's recipe"):
        check_resume(run, moved, "--resume")  # the old one is there still: this may be another
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text(state.read_text().replace(recipe.model, str(tmp_path / "gone")))
        manifest = state.with_name("manifest.json")
        hashes = json.loads(manifest.read_text())
        hashes["sha256"]["state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(hashes))
    check_resume(run, moved, "--resume")


def test_done_is_what_the_checkpoint_says_whatever_is_asked_for(run: Path):
    shutil.rmtree(run / "checkpoints" / "step-000004")  # a run that was killed after its fourth step was logged
    recipe = load_recipe(run / "config.yaml")
    for steps in (2, 3, 110):
        check_resume(run, recipe.model_copy(update={"steps": steps}), "--resume")
    with pytest.raises(ConfigError, match="steps: 1, and 2 are done"):
        check_resume(run, recipe.model_copy(update={"steps": 1}), "--resume")
    assert train(recipe.model_copy(update={"steps": 3}), run, resume=True)["steps"] == 3
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3]


def test_a_removed_lock_lets_no_second_writer_in(run: Path):
    log = RunLog.reopen(run)
    (run / "run.lock").unlink()
    with pytest.raises(RunError, match="another process trains here"):
        RunLog.reopen(run)
    with pytest.raises(RunError, match="another process trains here"):
        RunLog.create(run, "name: mine\n", overwrite=True)
    assert (run / "metrics.jsonl").stat().st_size
    log.close()
    RunLog.reopen(run).close()
    assert os.listdir(run)
