"""A run's adapter in the forms that other tools read, each loaded back and compared before it is called done."""

from __future__ import annotations

import contextlib
import json
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
from vpd_mlx.common.files import read_rows
from vpd_mlx.engine.policy import Policy
from vpd_mlx.errors import ConfigError, Fault, ModelError, RunError
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.run.log import MARK
from vpd_mlx.run.setup import build_prompter, load_policy

__all__ = ["Export", "export_adapters", "export_fused", "export_peft", "open_run", "reserve", "upload"]

PROMPTS = 16  # prompts that an export is compared on


@dataclass(frozen=True)
class Export:
    """What was written, and how far it is from the trained model: greatest difference of logits, KL in nats per token."""

    folder: Path
    difference: float
    kl: float
    commands: tuple[str, ...]
    warning: str = ""


@dataclass(frozen=True)
class Run:
    """A finished run, its policy with the trained adapter, prompts of its own rollouts, and their trained logits."""

    folder: Path
    recipe: Recipe
    policy: Policy
    prompts: tuple[tuple[int, ...], ...]
    trained: tuple[mx.array, ...]
    base: tuple[mx.array, ...]


def open_run(folder: Path) -> Run:
    """Load a run's model and adapter.

    Raises:
        ConfigError: there is no run.
        ModelError: it has no adapter yet.
        RunError: it has no rollouts yet.
    """
    if not (folder / MARK).is_file():
        fault = Fault("RUN", f"{folder} holds no run ({MARK} is missing)", "give the folder of a run")
        raise ConfigError([fault], "command line")
    recipe = load_recipe(folder / MARK)
    policy = load_policy(recipe)
    policy.load_adapter(folder / "adapters")
    rows = read_rows(folder / "rollouts.jsonl")
    texts = list(dict.fromkeys(r["prompt"] for r in rows))[:PROMPTS]
    if not texts:
        raise RunError(f"{folder}: has no rollouts to compare an export on; train at least a step")
    prompter = build_prompter(recipe, policy)
    prompts = tuple(prompter.encode([{"role": "user", "content": t}]) for t in texts)
    trained = tuple(_logits(policy.model, prompts))
    with policy.adapter_off():
        base = tuple(_logits(policy.model, prompts))
    return Run(folder, recipe, policy, prompts, trained, base)


def _logits(model: Any, prompts: Sequence[tuple[int, ...]]) -> list[mx.array]:
    out = []
    for prompt in prompts:
        logits = model(mx.array([prompt]))[0].astype(mx.float32)
        mx.eval(logits)
        out.append(logits)
    return out


def _kl(a: Sequence[mx.array], b: Sequence[mx.array]) -> float:
    """KL(a|b) per token."""
    values = [losses.divergence(y, x, alpha=0.0) for x, y in zip(a, b, strict=True)]
    return float(mx.concatenate(values).mean())


def _apart(a: Sequence[mx.array], b: Sequence[mx.array]) -> float:
    return max(float(mx.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def _tolerance(run: Run) -> float:
    half = any(v.dtype in (mx.float16, mx.bfloat16) for _, v in tree_flatten(run.policy.model.parameters()))
    scale = max(float(mx.abs(x).max()) for x in run.trained)
    return (5e-2 if half else 1e-3) * scale


def _fresh(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: holds something already; give another --out")
    out.mkdir(parents=True, exist_ok=True)


def _hold(run: Run, got: Sequence[mx.array], out: Path) -> tuple[float, float]:
    difference = _apart(run.trained, got)
    if difference > _tolerance(run):
        raise RunError(
            f"{out}: loaded back, its logits differ by {difference:.2g} from the trained model's (allowed "
            f"{_tolerance(run):.2g}); it is not a faithful export, keep to the run's own adapters"
        )
    return difference, _kl(run.trained, got)


def export_adapters(run: Run, out: Path) -> Export:
    """mlx-lm's adapter folder with a model card.

    Raises:
        RunError: `out` is taken, or what was written does not give the trained model's logits.
    """
    _fresh(out)
    for name in ("adapters.safetensors", "adapter_config.json"):
        shutil.copyfile(run.folder / "adapters" / name, out / name)
    (out / "README.md").write_text(card(run, "mlx-lm adapter"), encoding="utf-8")
    model = mlx_lm.load(run.recipe.model, adapter_path=str(out))[0]
    difference, kl = _hold(run, _logits(model, run.prompts), out)
    base = f"--model {run.recipe.model} --adapter-path {out}"
    return Export(out, difference, kl, _commands(base))


def export_fused(run: Run, out: Path, *, bits: int | None = None, group_size: int = 64) -> Export:
    """The base with the adapter in its weights, dequantised; with `bits` quantised again, which can lose what was learned.

    Raises:
        RunError: `out` is taken, or the dequantised model does not give the trained model's logits.
    """
    _fresh(out)
    loaded: Any = mlx_lm.load(run.recipe.model, adapter_path=str(run.folder / "adapters"), return_config=True)
    model, tokenizer, config = loaded
    fused = [(n, m.fuse(dequantize=True)) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    model = dequantize_model(model)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    warning = ""
    if bits is None:
        # what is held to the trained model is what was written
        save_model(out, model)
    else:
        model, config = quantize_model(model, config, group_size, bits)
        save_model(out, model)
    save_config(config, config_path=out / "config.json")
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card(run, "fused model"), encoding="utf-8")
    got = _logits(mlx_lm.load(str(out))[0], run.prompts)
    if bits is None:
        difference, kl = _hold(run, got, out)
    else:
        difference, kl = _apart(run.trained, got), _kl(run.trained, got)
        learned = _kl(run.trained, run.base)
        if kl > 0.1 * learned:
            warning = (
                f"quantising to {bits} bits moved the model by {kl:.3g} nats a token, against {learned:.3g} that training "
                "moved it: part of what was learned is lost; export adapters, or fuse without --bits"
            )
    return Export(out, difference, kl, _commands(f"--model {out}"), warning)


def export_peft(run: Run, out: Path) -> Export:
    """PEFT's LoRA format, for transformers: `lora_A` (r, in), `lora_B` (out, r), alpha = scale * r.

    Read back, the two matrices must give the very update that mlx-lm's adapter makes.

    Raises:
        RunError: `out` is taken, or what was written is not the adapter.
    """
    _fresh(out)
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
    (out / "README.md").write_text(card(run, "PEFT adapter"), encoding="utf-8")
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
        raise RunError(f"{out}: the update read back differs by {worst:.2g}; keep to the run's own adapters")
    return Export(out, worst, 0.0, _peft_commands(run, out))


def _peft_commands(run: Run, out: Path) -> tuple[str, ...]:
    """How transformers loads it. It cannot read weights that MLX quantised: those are dequantised first."""
    base, steps = run.recipe.model, []
    if any(hasattr(m, "bits") for m in run.policy.model.modules()):
        steps.append(
            f"python -m mlx_lm convert --hf-path {shlex.quote(base)} --mlx-path {shlex.quote(f'{out}-base')} -d"
        )
        base = f"{out}-base"
    code = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{out}")'
    return (*steps, code)


def reserve(repo: str, *, private: bool, api: HfApi | None = None) -> None:
    """Make the repository on the hub, if it is not there: what is wrong with it shows before anything is exported.

    Raises:
        ModelError: the hub refuses, or cannot be had.
    """
    with _hub_errors(repo):
        (api or HfApi()).create_repo(repo, private=private, exist_ok=True)


def upload(folder: Path, repo: str, *, api: HfApi | None = None) -> str:
    """Put an exported folder into its repository on the hub; returns its address.

    Raises:
        ModelError: the hub refuses, or cannot be had.
    """
    with _hub_errors(repo):
        (api or HfApi()).upload_folder(repo_id=repo, folder_path=str(folder))
    return f"https://huggingface.co/{repo}"


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client lets through whatever the HTTP library of its day raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"--repo: {repo!r} cannot be written ({first}); log in with `hf auth login`, check name and network"
        ) from error


def _commands(model: str) -> tuple[str, ...]:
    return (
        f"python -m mlx_lm generate {model} --prompt '…'",
        f"python -m mlx_lm chat {model}",
        f"python -m mlx_lm server {model}",
    )


def card(run: Run, what: str) -> str:
    """A model card: what it is, how it was made, what it scored."""
    path = run.folder / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    evaluations = read_rows(run.folder / "evals.jsonl")
    recipe = run.recipe
    lines = [
        "---",
        "library_name: mlx",
        f"base_model: {recipe.model}",
        "tags: [vpd-mlx, lora, language-feedback]",
        "---",
        f"# {recipe.name}: {what}",
        "",
        f"Trained by vpd-mlx {__version__} with `{recipe.algorithm}`, {_trained(summary)}, seed {recipe.seed}, on "
        f"the base `{recipe.model}`; task `{recipe.task.kind}`, feedback from {', '.join(recipe.feedback.sources)}. The base's "
        "licence applies.",
        "",
        "| held-out problems | before | after |",
        "|---|---|---|",
    ]
    if evaluations:
        first = evaluations[0]
        last = next((e for e in evaluations if e["step"] == summary.get("adapter_of_step")), evaluations[-1])
        for key in ("student", "student_greedy", "teacher"):
            lines.append(f"| {key} | {_with_interval(first, key)} | {_with_interval(last, key)} |")
    lines += ["", "## Recipe", "", "```yaml", (run.folder / MARK).read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(lines)


def _trained(summary: dict[str, Any]) -> str:
    done, of = summary.get("steps", "?"), summary.get("adapter_of_step")
    return f"{done} steps" if of in (None, done) else f"the best of {done} steps, number {of}"


def _with_interval(row: dict[str, Any], key: str) -> str:
    value, interval = row.get(key), row.get(f"{key}_interval")
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" + ("" if not interval else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})")
