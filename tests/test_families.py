"""Ten steps of training on tiny models of the families that people run: exports that mlx-lm loads, and a resume to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import QUICKSTART, SMALL
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import quantize_model

from vpd_mlx.engine.miniature import miniature
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.engine.shapes import build
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.run.loop import train
from vpd_mlx.tools import export

pytestmark = [pytest.mark.long, pytest.mark.exact]
CONFIGS = Path(__file__).parent / "data" / "configs"
FAMILIES = {
    "gemma-3-4b-it-4bit": {"lora.layers": 1},
    "gpt-oss-20b": {},
    "qwen3-30b-a3b-4bit": {"lora.experts": True},
}
CHANGES = {"steps": 10, "checkpoint.every": 5, "optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 0}


def tiny(folder: Path, name: str) -> Path:
    """A random model of this family, 4 bits, with the quickstart's tokenizer."""
    given = json.loads((CONFIGS / f"{name}.json").read_text())
    tokens = {"vocab_size": 352, "eos_token_id": 4}
    config = {**miniature(given), **tokens}
    if "text_config" in config:
        config["text_config"] |= tokens
    mx.random.seed(0)
    model, config = quantize_model(build(config), config, 32, 4)
    shutil.copytree(QUICKSTART.parent / "model", folder)
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def recipe(model: Path, **more: object) -> Recipe:
    return load_recipe(QUICKSTART, [*{**SMALL, **CHANGES, "model": str(model), **more}.items()])


@pytest.mark.parametrize("name", FAMILIES)
def test_ten_steps(tmp_path: Path, name: str):
    model = tiny(tmp_path / "model", name)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe(model, **FAMILIES[name]), whole)
    train(recipe(model, **FAMILIES[name], steps=5), parts)
    train(recipe(model, **FAMILIES[name]), parts, resume=True)
    weights = [(run / "adapters" / "adapters.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]
    adapter = mx.load(str(whole / "adapters" / "adapters.safetensors"))
    assert all(float(mx.abs(v).max()) > 0 for k, v in adapter.items() if k.endswith("lora_b"))
    assert any(v.ndim == 3 for v in adapter.values()) == bool(FAMILIES[name].get("lora.experts"))
    assert export.export_adapters(export.open_run(whole), tmp_path / "out").difference < 1e-4

    policy = Policy.load(str(model), recipe(model, **FAMILIES[name]).lora)
    policy.load_adapter(whole / "adapters")
    loaded, tokenizer = mlx_lm.load(str(model), adapter_path=str(tmp_path / "out"))
    prompts = [tuple(tokenizer.encode(f"{n}+{n}=")) for n in (12, 345)]
    ours = {p: r.tokens for p, _, r in generate(policy, prompts, 1, Sampling(0.0, 1.0, 12), 0)}
    for p, prompt in enumerate(prompts):
        theirs = mlx_lm.stream_generate(loaded, tokenizer, list(prompt), max_tokens=12, sampler=make_sampler(0.0))
        np.testing.assert_array_equal([part.token for part in theirs][: len(ours[p])], ours[p])
