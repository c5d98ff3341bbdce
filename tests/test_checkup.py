"""What is said of a model from its config alone, and that each architecture is refused or trained, never crashed."""

from __future__ import annotations

import json
import re
import runpy
from itertools import takewhile
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import QUICKSTART
from fakes import ByteTokenizer, tiny_policy
from mlx_lm.utils import load_adapters, load_tokenizer
from typer.testing import CliRunner

from vpd_mlx.commands.app import app
from vpd_mlx.engine.decoding import probe_batches
from vpd_mlx.engine.experts import watched
from vpd_mlx.engine.keys import chosen_keys, experts_of, routers_of
from vpd_mlx.engine.miniature import miniature
from vpd_mlx.engine.models import load_model, lora_of
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.engine.shapes import build
from vpd_mlx.errors import ModelError
from vpd_mlx.tools import checkup as checkups
from vpd_mlx.tools.checkup import checkup
from vpd_mlx.tools.trial import trial

CONFIGS = Path(__file__).parent / "data" / "configs"
# Published configs: KB of keys and values a token, from their shapes by hand, and whether all keys stay in a window.
HUB = {
    "gemma-3-4b-it-4bit": 5 * 2 * 4 * 256 * 2 / 1024,
    "gpt-oss-20b": 12 * 2 * 8 * 64 * 2 / 1024,
    "granite-4.0-h-tiny": 4 * 2 * 4 * 128 * 2 / 1024,
    "lfm2-1.2b": 6 * 2 * 8 * 64 * 2 / 1024,
    "llama-3.2-3b-instruct": 28 * 2 * 8 * 128 * 2 / 1024,
    "qwen3-0.6b-4bit": 28 * 2 * 8 * 128 * 2 / 1024,
    "qwen3-8b-4bit": 36 * 2 * 8 * 128 * 2 / 1024,
    "qwen3-30b-a3b-4bit": 48 * 2 * 4 * 128 * 2 / 1024,
    "qwen3-next-80b-a3b": 12 * 2 * 2 * 256 * 2 / 1024,
    "smollm3-3b": 36 * 2 * 4 * 128 * 2 / 1024,
}
QUICK = ["gpt-oss-20b", "lfm2-1.2b"]


def of(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def said(name: str, *, until: str = "") -> dict[str, str]:
    facts = takewhile(lambda fact: fact.name != until, checkup(str(CONFIGS / f"{name}.json"), tried=trial))
    return {fact.name: f"{fact.value}{fact.remedy}" for fact in facts}


@pytest.mark.parametrize("name", QUICK)
def test_the_memory_of_a_token_is_counted_by_hand(name: str):
    facts = said(name, until="memory in an update")
    assert facts["memory in decoding"].startswith(f"{HUB[name]:.0f} KB a token")
    assert ("a row in states" in facts["memory in decoding"]) == (name != "gpt-oss-20b")
    assert ("a row in windows" in facts["memory in decoding"]) == (name == "gpt-oss-20b")
    if name == "gpt-oss-20b":
        assert facts["experts"].startswith("32, 4 a token; the router (mlp.router) stays frozen")


@pytest.mark.long
@pytest.mark.parametrize("name", HUB)
def test_ten_published_configs(name: str):
    facts = said(name)
    assert facts["memory in decoding"].startswith(f"{HUB[name]:.0f} KB a token")
    assert facts["prompts"] == "read once for all their completions"
    assert facts["head"].startswith("fused")
    assert facts["decoding"] == "in batches"
    assert "take another" not in " ".join(facts.values())
    assert "MB a token" in facts["memory in an update"]
    assert str(of(name)["eos_token_id"]) in facts["stop tokens"]
    assert ("vision" in facts["architecture"]) == name.startswith("gemma-3")
    assert ("experts" in facts) == any(part in name for part in ("gpt-oss", "a3b", "granite"))


def test_a_miniature_has_each_kind_of_layer_once():
    small = miniature(of("granite-4.0-h-tiny"))
    assert small["layer_types"] == ["mamba", "attention"]
    assert small["num_hidden_layers"] == 2
    assert miniature(of("lfm2-1.2b"))["full_attn_idxs"] == [1]
    assert miniature(of("gemma-3-4b-it-4bit"))["text_config"]["sliding_window_pattern"] == 2
    longrope = {"model_type": "phi3", "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 48}}
    assert len(miniature(longrope)["rope_scaling"]["long_factor"]) == 8
    with pytest.raises(ValueError, match="not supported"):
        miniature({"model_type": "nothing"})


def test_the_command_says_how_a_folder_speaks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkups, "apart", trial)
    monkeypatch.setattr(checkups.checkup, "__defaults__", (None, trial))
    done = CliRunner().invoke(app, ["doctor", "recipes/quickstart/model"])
    assert done.exit_code == 0, done.output
    for words in ("qwen3, 2 blocks", "<|end|> (4)", "no switch", "both end in '<|end|><|assistant|>'"):
        assert words in done.output
    facts = json.loads(CliRunner().invoke(app, ["doctor", "recipes/quickstart/model", "--json"]).output)["facts"]
    assert {"weights", "gradient", "samples"} <= {fact["name"] for fact in facts}


def test_an_answer_must_end_in_a_stop_token():
    tokenizer = load_tokenizer(QUICKSTART.parent / "model", eos_token_ids=[4])
    ask = [{"role": "user", "content": "2+2?"}]
    (fact,) = checkups._ending(tokenizer, ask)
    assert (fact.value, fact.remedy) == ("<|end|> (4)", "")
    tokenizer._eos_token_ids = {5}
    (fact,) = checkups._ending(tokenizer, ask)
    assert "it is no stop token" in fact.remedy


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "nothing"}, "mlx-lm cannot build it (ValueError: Model type nothing not supported.)"),
        ({"model_type": "olmo"}, "mlx-lm cannot build it (SystemExit: its file exits)"),
        ({"model_type": "bitnet"}, "mlx-lm cannot build it"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_a_line(tmp_path: Path, config: dict, words: str):
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert done.exit_code == 1
    assert words in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_the_page_lists_the_architectures_of_the_installed_mlx_lm():
    """Where this fails mlx-lm has moved: `make architectures` makes the page anew."""
    docs = Path(__file__).parent.parent / "docs"
    listed = re.findall(r"^\| ([\w-]+) \| (?:yes|no) \|", (docs / "architectures.md").read_text(), re.M)
    assert listed == runpy.run_path(str(docs / "make_architectures.py"))["architectures"]()


def test_loading_never_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def exits(*_: object, **__: object) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(mlx_lm, "load", exits)
    with pytest.raises(ModelError, match="its architecture exits"):
        load_model(str(tmp_path), None)


def broken(kind: str, change: object) -> Policy:
    """A policy of an architecture whose forward pass is wrapped."""
    model = tiny_policy(kind).model
    own = type(model)

    def call(self: object, ids: mx.array, cache: object = None) -> mx.array:
        return change(lambda x: own.__call__(self, x, cache=cache), ids, cache)

    model.__class__ = type("Broken", (own,), {"__module__": own.__module__, "__call__": call})
    return Policy(model, ByteTokenizer(), "tiny")


def test_an_architecture_that_looks_ahead_or_scores_otherwise_is_refused():
    with pytest.raises(ModelError, match="lets tokens see later ones"):
        broken("llama", lambda run, ids, _: run(ids) + run(ids).mean(axis=1, keepdims=True))
    with pytest.raises(ModelError, match="gives other scores than it decodes by"):
        broken("llama", lambda run, ids, cache: run(ids) * (1.0 if cache is None else 2.0))

    def fails(*_: object) -> mx.array:
        raise IndexError("no such layer")

    with pytest.raises(ModelError, match=r"cannot be run on .*IndexError: no such layer"):
        broken("llama", fails)


def test_an_architecture_without_a_gradient_is_refused():
    def picked(x: mx.array) -> mx.array:  # indices that are no constants: mlx has no gradient of these
        return mx.take_along_axis(x, mx.argsort(x, axis=-1), axis=-1)

    policy = broken("llama", lambda run, ids, _: picked(run(ids)))
    with pytest.raises(ModelError, match="has no gradient in mlx"):
        policy.adapt(LoraSettings(rank=2), 0)


def test_batches_whose_samples_are_off_are_not_taken(monkeypatch: pytest.MonkeyPatch):
    policy = tiny_policy()
    probe_batches(policy)
    assert policy.widest is None
    real = policy.logps
    monkeypatch.setattr(policy, "logps", lambda rows: [x + (policy.widest is None) for x in real(rows)])
    probe_batches(policy)
    assert policy.widest == 1
    assert "not those of their scores, by 1" in policy.notes[-1]
    monkeypatch.setattr(policy, "logps", lambda rows: [x + 1 for x in real(rows)])
    with pytest.raises(ModelError, match="generator cannot decode"):
        probe_batches(policy)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "qwen3-30b-a3b-4bit", "granite-4.0-h-tiny"])
def test_routers_stay_frozen_and_experts_are_a_choice(name: str):
    model = build(miniature(of(name)))
    block = model.layers[-1]
    routers, experts = routers_of(block), set(experts_of(block))
    assert len(routers) == 1
    assert len(experts) >= 2
    keys = set(chosen_keys(model, LoraSettings()) or ())
    assert "self_attn.q_proj" in keys
    assert not keys & (routers | experts)
    assert set(chosen_keys(model, LoraSettings(experts=True)) or ()) == keys | experts
    assert chosen_keys(model, LoraSettings(keys=[*routers])) == [*routers]  # by name, whoever wants it


def test_experts_are_trained_exported_and_loaded(tmp_path: Path):
    config = miniature(of("qwen3-30b-a3b-4bit"))
    policies = []
    for _ in range(2):
        mx.random.seed(0)
        policies.append(Policy(build(config), ByteTokenizer(), "tiny"))
    policy, plain = policies
    policy.adapt(LoraSettings(rank=2, experts=True), 0)
    assert any(v.ndim == 3 for v in policy.adapter.values())
    policy.set_adapter({k: v + 0.1 for k, v in policy.adapter.items()})
    policy.save_adapter(tmp_path)
    ids = mx.array([[1, 2, 3, 4]])
    wanted = np.array(policy.model(ids))
    found = np.array(load_adapters(plain.model, str(tmp_path))(ids))
    np.testing.assert_array_equal(found, wanted)
    given = json.loads((tmp_path / "adapter_config.json").read_text())
    keys = given["lora_parameters"].pop("keys")
    (tmp_path / "adapter_config.json").write_text(json.dumps(given))
    assert lora_of(tmp_path).keys == keys  # another program names none: its tensors tell


def test_the_load_of_experts_is_seen():
    policy = Policy(build(miniature(of("qwen3-30b-a3b-4bit"))), ByteTokenizer(), "tiny")
    policy.adapt(LoraSettings(rank=2, experts=True), 0)
    with watched(policy.model) as load:
        policy.model(mx.array([[1, 2]]))
        policy.model(mx.array([[7, 8, 9]]))
    (first, experts), (second, _) = load.taken.values()  # two blocks, and of each its last pass
    assert (first.size, second.size, experts) == (6, 6, 4)
    policy.model(mx.array([[1, 2]]))
    assert load.taken[0][0] is first
    load.taken = {0: (mx.array([[[0, 1]], [[0, 2]]]), 4)}
    assert load.figures() == {"experts/busiest": 2.0, "experts/idle": 0.25}
    with watched(tiny_policy().model) as load:
        pass
    assert load.figures() == {}
