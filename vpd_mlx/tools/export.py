"""Exports of a run's adapter in the formats of other tools, each loaded back and compared with the trained model."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from huggingface_hub import HfApi
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

from vpd_mlx import __version__, losses
from vpd_mlx.common.text import figures, mlx_lm_command
from vpd_mlx.engine.policy import Policy
from vpd_mlx.errors import ModelError, RunError
from vpd_mlx.recipe import Recipe, dump, load_recipe
from vpd_mlx.run.folder import Run, load_run
from vpd_mlx.run.log import RECIPE_FILE
from vpd_mlx.run.setup import build_prompter, load_policy

__all__ = [
    "check_empty",
    "export_adapters",
    "export_fused",
    "export_peft",
    "halve_rotary",
    "model_card",
    "open_run",
    "reserve",
    "upload",
]

PROMPTS = 16  # prompts on which an export is compared with the trained model


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the trained model: largest difference of logits, KL in nats per token.

    `asked` says how its answers compare in another program.
    """

    folder: Path
    difference: float
    kl: float
    commands: tuple[str, ...]
    warning: str = ""
    asked: str = ""


@dataclass(frozen=True)
class TrainedRun:
    """A run with its policy, trained adapter loaded; prompts of its own rollouts, as text and ids, and logits (T, V) on each."""

    folder: Run
    recipe: Recipe
    policy: Policy
    texts: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    trained: tuple[mx.array, ...]


def open_run(path: Path) -> TrainedRun:
    """Load a run's model and adapter.

    Raises:
        ConfigError: there is no run.
        ModelError: it has no adapter yet.
        RunError: it has no rollouts yet, or its adapter is not finite.
    """
    folder = load_run(path)
    recipe = load_recipe(path / RECIPE_FILE)
    policy = load_policy(recipe)
    policy.load_adapter(path / "adapters")
    for name, value in policy.adapter.items():
        if not bool(mx.isfinite(value).all()):
            where = f"{path / 'adapters'}: {name} has values that are not finite"
            raise RunError(
                f"{where}; such an adapter is worth nothing, train anew with a lower optimizer.learning_rate"
            )
    texts = list(dict.fromkeys(row["prompt"] for row in folder.read(folder.rollouts)))[:PROMPTS]
    if not texts:
        raise RunError(f"{path}: has no rollouts to compare an export on; train at least one step")
    prompter = build_prompter(recipe, policy.tokenizer)
    prompts = tuple(prompter.encode([{"role": "user", "content": t}]) for t in texts)
    return TrainedRun(folder, recipe, policy, tuple(texts), prompts, tuple(_logits(policy.model, prompts)))


def _logits(model: Any, prompts: Sequence[tuple[int, ...]]) -> list[mx.array]:
    out = []
    for prompt in prompts:
        logits = model(mx.array([prompt]))[0].astype(mx.float32)
        mx.eval(logits)
        out.append(logits)
    return out


def _kl(a: Sequence[mx.array], b: Sequence[mx.array]) -> float:
    """KL(a|b) per token."""
    return float(mx.concatenate([losses.divergence(y, x, alpha=0.0) for x, y in zip(a, b, strict=True)]).mean())


def _difference(a: Sequence[mx.array], b: Sequence[mx.array]) -> float:
    apart = [float(mx.abs(x - y).max()) for x, y in zip(a, b, strict=True)]
    return max(apart, key=lambda x: math.inf if math.isnan(x) else x)  # NaN is the largest


def check_empty(out: Path) -> None:
    """See that an export may be written here; asked before a model is loaded.

    Raises:
        RunError: it is a file, or holds something.
    """
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise RunError(f"{out}: is {'a file' if out.is_file() else 'not empty'}; give another --out")


def _new_folder(out: Path, run: TrainedRun, what: str) -> None:
    """An empty folder, but for the model card."""
    check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(model_card(run, what), encoding="utf-8")


def _compared(run: TrainedRun, loaded: Sequence[mx.array], out: Path) -> tuple[float, float]:
    """(largest difference, KL) of the logits that were loaded back; too large a difference is an error."""
    difference = _difference(run.trained, loaded)
    half = any(v.dtype in (mx.float16, mx.bfloat16) for _, v in tree_flatten(run.policy.model.parameters()))
    allowed = (5e-2 if half else 1e-3) * max(float(mx.abs(x).max()) for x in run.trained)
    if not difference <= allowed:  # NaN is no export either
        raise RunError(
            f"{out}: loaded back, its logits differ by {difference:.2g} from the trained model's (allowed {allowed:.2g}); "
            "it is not a faithful export, use the run's own adapters"
        )
    return difference, _kl(run.trained, loaded)


def export_adapters(run: TrainedRun, out: Path) -> Export:
    """mlx-lm's adapter folder with a model card.

    Raises:
        RunError: `out` is not empty, or what was written does not give the trained model's logits.
    """
    _new_folder(out, run, "mlx-lm adapter")
    for name in ("adapters.safetensors", "adapter_config.json"):
        shutil.copyfile(run.folder.path / "adapters" / name, out / name)
    model = mlx_lm.load(run.recipe.model, adapter_path=str(out))[0]
    difference, kl = _compared(run, _logits(model, run.prompts), out)
    return Export(out, difference, kl, _commands(run.recipe.model, out))


def export_fused(run: TrainedRun, out: Path, *, bits: int | None = None, group_size: int = 64) -> Export:
    """The base model with the adapter in its weights, dequantised; with `bits` quantised again, which can lose what was learned.

    Raises:
        RunError: `out` is not empty, or the dequantised model does not give the trained model's logits.
    """
    _new_folder(out, run, "fused model")
    adapters = str(run.folder.path / "adapters")
    loaded: Any = mlx_lm.load(run.recipe.model, adapter_path=adapters, return_config=True)
    model, tokenizer, config = loaded
    fused = [(n, m.fuse(dequantize=True)) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    model = dequantize_model(model)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    halve_rotary(model, config)
    if bits is not None:
        model, config = quantize_model(model, config, group_size, bits)
    save_model(out, model)
    save_config(config, config_path=out / "config.json")
    tokenizer.save_pretrained(out)
    back = _logits(mlx_lm.load(str(out))[0], run.prompts)
    if bits is None:
        return Export(out, *_compared(run, back, out), _commands(str(out)))
    kl, warning = _kl(run.trained, back), ""
    if not math.isfinite(kl):
        raise RunError(
            f"{out}: quantised to {bits} bits its logits are not finite; export it without --bits, or with more"
        )
    with run.policy.adapter_off():
        learned = _kl(run.trained, _logits(run.policy.model, run.prompts))
    if kl > 0.1 * learned:
        warning = (
            f"quantising to {bits} bits moved the model by {kl:.3g} nats a token, against {learned:.3g} that training moved it: "
            "part of what was learned is lost; export adapters, or fuse without --bits"
        )
    return Export(out, _difference(run.trained, back), kl, _commands(str(out)), warning)


def halve_rotary(model: Any, config: dict[str, Any]) -> None:
    """Put the queries' and keys' rows in the order that transformers and converters expect, where they are in mlx-lm's other one.

    `rope_traditional: true` turns pairs of neighbours. Only mlx-lm reads that key; others turn the two halves of a head and would
    take such weights for nonsense. A model in the new order, without the key, has the same logits.
    """
    if not config.get("rope_traditional") or config.get("model_type") != "llama":
        return
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for name, module in model.named_modules():
        if name.endswith(("self_attn.q_proj", "self_attn.k_proj")):
            for key, value in module.parameters().items():  # weight (heads * head, in), and a bias
                module[key] = value.reshape(-1, head // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    config["rope_traditional"] = False


def export_peft(run: TrainedRun, out: Path) -> Export:
    """PEFT's LoRA format, for transformers: `lora_A` (r, in), `lora_B` (out, r), alpha = scale * r.

    Loaded back, the two matrices must give the same update as mlx-lm's adapter.

    Raises:
        RunError: `out` is not empty, or what was written is not the adapter.
    """
    _new_folder(out, run, "PEFT adapter")
    lora = run.recipe.lora
    tensors: dict[str, mx.array] = {}
    for name, value in run.policy.adapter.items():
        path, _, part = name.rpartition(".")
        tensors[f"base_model.model.{path}.lora_{part[-1].upper()}.weight"] = mx.contiguous(value.T)
    mx.save_safetensors(str(out / "adapter_model.safetensors"), tensors, metadata={"format": "pt"})
    modules = sorted({n.split(".")[-2] for n in run.policy.adapter})
    layers = sorted({int(n.split(".layers.")[1].split(".")[0]) for n in run.policy.adapter if ".layers." in n})
    alpha = lora.scale * lora.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": run.recipe.model,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "layers_to_transform": layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    back: Any = mx.load(str(out / "adapter_model.safetensors"))
    worst = 0.0
    for name, a in run.policy.adapter.items():
        if name.endswith("lora_a"):
            path = name.removesuffix(".lora_a")
            b = run.policy.adapter[f"{path}.lora_b"]
            key = f"base_model.model.{path}"
            update = alpha / lora.rank * (back[f"{key}.lora_B.weight"] @ back[f"{key}.lora_A.weight"])
            worst = max(worst, float(np.abs(np.array(update) - np.array((lora.scale * (a @ b)).T)).max()))
    if worst > 1e-5:
        raise RunError(f"{out}: the update loaded back differs by {worst:.2g}; use the run's own adapters")
    return Export(out, worst, 0.0, _peft_commands(run, out))


def _peft_commands(run: TrainedRun, out: Path) -> tuple[str, ...]:
    """How transformers loads it; weights that MLX quantised, which it cannot read, are dequantised first."""
    base, steps = run.recipe.model, []
    if any(hasattr(m, "bits") for m in run.policy.model.modules()):
        base = f"{out}-base"
        convert = ("--hf-path", run.recipe.model, "--mlx-path", base, "-d")
        steps.append(shlex.join(["python", "-m", "mlx_lm", "convert", *convert]))
    load = (
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({json.dumps(base)}), {json.dumps(str(out))})"
    )
    code = f"from peft import PeftModel; from transformers import AutoModelForCausalLM; print({load})"
    return (*steps, shlex.join(["python", "-c", code]))


def reserve(repo: str, *, private: bool, api: HfApi | None = None) -> None:
    """Create the repository on the hub unless it exists, so that a wrong name or login shows before anything is exported.

    Raises:
        ModelError: the hub refuses or cannot be reached.
    """
    with _hub_errors(repo):
        (api or HfApi()).create_repo(repo, private=private, exist_ok=True)


def upload(folder: Path, repo: str, *, api: HfApi | None = None) -> str:
    """Put an exported folder into its repository on the hub; returns its address.

    Raises:
        ModelError: the hub refuses or cannot be reached.
    """
    with _hub_errors(repo):
        (api or HfApi()).upload_folder(repo_id=repo, folder_path=str(folder))
    return f"https://huggingface.co/{repo}"


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client passes on whatever its HTTP library raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"--repo: {repo!r} cannot be written ({first}); log in with `hf auth login`, check the name and the network"
        ) from error


def _commands(model: str, adapters: Path | None = None) -> tuple[str, ...]:
    options = {"generate": ("--prompt", "…"), "chat": (), "server": ()}
    return tuple(mlx_lm_command(program, model, adapters, *more) for program, more in options.items())


def _public(recipe: Recipe) -> Recipe:
    """The recipe without what concerns nobody else: which server was asked, by which key, and where its answers lie."""
    private = {"url": None, "api_key_env": None, "cache_dir": None}
    server = recipe.feedback.server.model_copy(update=private)
    return recipe.model_copy(update={"feedback": recipe.feedback.model_copy(update={"server": server})})


def model_card(run: TrainedRun, what: str) -> str:
    """A model card: what it is, how it was made, what it scored."""
    recipe, folder = run.recipe, run.folder
    steps, best = folder.summary.get("steps", "?"), folder.summary.get("adapter_of_step")
    trained = f"{steps} steps" if best in (None, steps) else f"the best of {steps} steps, number {best}"
    lines = [
        "---",
        "library_name: mlx",
        f"base_model: {recipe.model}",
        "tags: [vpd-mlx, lora, language-feedback]",
        "---",
        f"# {recipe.name}: {what}",
        "",
        f"Trained by vpd-mlx {__version__} with `{recipe.algorithm}`, {trained}, seed {recipe.seed}, on the "
        f"base model `{recipe.model}`; task `{recipe.task.kind}`, feedback from {', '.join(recipe.feedback.sources)}. The "
        "base model's licence applies.",
        "",
        "| held-out problems | before | after |",
        "|---|---|---|",
    ]
    if folder.evals:
        for key in ("student", "student_greedy", "teacher"):
            both = (figures(evaluation, key) for evaluation in (folder.evals[0], folder.evaluation))
            before, after = (f"{value} ({bounds})" if bounds else value for value, bounds in both)
            lines.append(f"| {key} | {before} | {after} |")
    text = dump(_public(recipe)).rstrip()
    return "\n".join([*lines, "", "## Recipe", "", "```yaml", text, "```", ""])
