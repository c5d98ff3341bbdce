"""Make docs/architectures.md: what is found on a tiny random model of every architecture that the installed mlx-lm has.

    python docs/make_architectures.py            # all, and write the page
    python docs/make_architectures.py llama ...  # these alone, printed

Each model is made from its own arguments (`mlx_lm.models.NAME.ModelArgs`): their defaults, what is required by name or type, and
a small table of exceptions. Each runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx_lm

from vpd_mlx.common.text import one_line
from vpd_mlx.engine.miniature import text_arguments
from vpd_mlx.errors import ModelError

SECONDS = 600
WRONG = 1e-3  # a gradient that is off by more, over its largest entry; samples whose scores are, in nats
PAGE = Path(__file__).parent / "architectures.md"
COUNTED = (
    (3, "share prompts,"),
    (2, "have their head fused with the loss,"),
    (4, "keep no whole scores of long rows,"),
    (5, "decode in batches."),
)
TEXT = """# Architectures

What is found on a tiny random model of every architecture in mlx-lm {version}, made from the architecture's own arguments, in
float32 on a CPU. `vpd-mlx doctor MODEL` tries the same on any model folder, config.json or hub id, with its own settings.

    make architectures    # writes this page

Of {all} architectures {trained} train. Of these,
{counts}

- **trains**: it loads, and its gradient is that of a plain pass for each row, within 1e-3 of the largest entry (most are within
  1e-6), and completions are scored as they were drawn.
- **head**: body and head run apart, so that no loss holds whole logits. **shares**: a prompt is read once for all its completions
  in an update. **attention**: no whole scores of long rows under a gradient. **batches**: completions are decoded side by side.
  A *no* costs time or memory and changes no number; a note at the start of a run says so.

| architecture | trains | head | shares | attention | batches | why not |
|---|---|---|---|---|---|---|
{table}
"""

# What is required, by name.
GIVEN: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "hidden_dim", "model_dim", "d_model", "n_embd", "block_dim", "dim_model_base"), 64),
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("num_heads", "n_heads", "n_head"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("n_positions", "n_ctx", "block_size"), 512),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "intermediate_size_mlp", "n_inner"), 128),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 8),
    "swa_num_attention_heads": 4,
    **{"index_head_dim": 16, "index_n_heads": 4, "index_topk": 8},
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "zero_expert_type": "identity",
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 256),
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "conv_kernel": 4,
    "mamba_d_conv": 4,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
BY_TYPE: dict[str, Any] = {"list": [], "dict": {}, "str": "auto", "bool": False, "int": 2, "float": 1.0}
# What neither tells, by architecture.
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = {"layer_types": [SLIDING, FULL]}
YARN = {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
BY_KIND = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
LINEAR = {"num_heads": 4, "head_dim": 16, "kda_layers": [1], "full_attn_layers": [2], "short_conv_kernel_size": 4}
MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 8, "mamba_d_ssm": 128, "mamba_d_state": 16, "mamba_n_groups": 1}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "afm7": {"num_layers": 4, "num_kv_heads": 2},
    "afmoe": MIXED,
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v2": {**ROUTED, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "exaone_moe": {**MIXED, "is_moe_layer": [False, True]},
    "falcon_h1": MAMBA,
    "gear": MIXED,
    "gemma3n": {
        "text_config": {
            **{"layer_types": [SLIDING, FULL] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
            **{"activation_sparsity_pattern": [0.5] * 4, "altup_num_inputs": 4, "altup_active_idx": 0},
            **{"hidden_size_per_layer_input": 16, "laurel_rank": 8, "final_logit_softcapping": 30.0},
        },
    },
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        **EXPERTS,
        **MAMBA,
        "num_local_experts": 4,
        "shared_intermediate_size": 64,
        "mamba_d_conv": 4,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    },
    "hunyuan": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}, "cla_share_factor": 2},
    "kimi_k25": {"text_config": ROUTED},
    "kimi_k3": {"text_config": {"linear_attn_config": LINEAR, **EXPERTS, **MLA}},
    "kimi_linear": {"linear_attn_config": LINEAR, **MLA},
    "kimi_vl": {"text_config": ROUTED},
    "lfm2": {"layer_types": ["conv", FULL], "block_ff_dim": 128},
    "lfm2-vl": {"text_config": {"layer_types": ["conv", FULL], "block_ff_dim": 128}},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "llama4": {"text_config": {"num_experts_per_tok": 1, "num_hidden_layers": 4}},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mamba2": {"time_step_limit": [0.0, 10.0]},
    "mellum": {**MIXED, "rope_parameters": {FULL: BY_KIND, SLIDING: BY_KIND}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "n_shared_experts": None,
        "partial_rotary_factor": 0.5,
    },
    "minicpm3": {
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "original_max_position_embeddings": 128}
    },
    "minimax_m3_vl": {"text_config": {}},
    "ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    "mistral4": {**ROUTED, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    "muse_spark": {"text_config": {**MIXED, "layer_rope_theta": [1e4, 0]}},
    "nemotron-nas": {"block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * 2},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-"], "num_hidden_layers": 3},
    "olmo3": MIXED,
    "openelm": {
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.0],
        "ffn_dim_divisor": 16,
        "num_transformer_layers": 2,
    },
    "phi3small": {"vocab_size": 100352},
    "phixtral": {"rotary_dim": 8},
    "qwen3": {"rope_theta": 1e4},
    "qwen3_vl": {"text_config": {"rope_theta": 1e4}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "spark2_5": {**MIXED, "rope_parameters": {FULL: BY_KIND, SLIDING: BY_KIND}},
}


def architectures() -> list[str]:
    """The files of the installed mlx-lm that define a model."""
    folder = Path(mlx_lm.__file__).parent / "models"
    return sorted(p.stem for p in folder.glob("*.py") if "\nclass Model(" in p.read_text(encoding="utf-8"))


def config_of(name: str) -> dict[str, Any]:
    """A config.json of this architecture, made from its own arguments."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    arguments = module.ModelArgs
    own = EXCEPTIONS.get(name, {})
    config = {**_required(arguments), **own, "model_type": name}
    if any(f.name == "text_config" for f in dataclasses.fields(arguments)):
        text = own.get("text_config", {})
        config["text_config"] = {**_required(text_arguments(module.Model, text)), **text}
    return config


def _required(arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            kind = str(getattr(field.type, "__name__", field.type)).lower()
            by_type = next((v for k, v in BY_TYPE.items() if k in kind), None)
            found[field.name] = GIVEN.get(field.name, by_type)
    return found


def _one(name: str, out: Connection) -> None:
    from vpd_mlx.engine.miniature import miniature
    from vpd_mlx.tools.trial import trial

    try:
        out.send(trial(miniature(config_of(name))))
    except ModelError as error:
        out.send(str(error).removeprefix("model: ").rpartition("; ")[0])
    except SystemExit:
        out.send("mlx-lm's file of it exits: it needs a package that is not installed")
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is one line of the table
        out.send(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")


def tried(name: str) -> Any:
    """What a trial found, or why there is none."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_one, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else f"no end within {SECONDS} s"
    except EOFError:
        process.join()
        return f"the process died ({process.exitcode})"
    finally:
        process.kill()


def row(name: str, found: Any) -> tuple[str, ...]:
    """The cells of an architecture's line."""
    if isinstance(found, str):
        return (name, "no", "", "", "", "", one_line(found).replace("|", "/"))
    decoding = next((m[1] for note in found.notes if (m := re.search(r"in batches \((.*)\), so", note))), "")
    why = [f"batches: {decoding}"] if decoding else []
    why += [] if found.shares else [f"shares: caches are {', '.join(found.caches)}"]
    if not found.gradient_error <= WRONG:
        why.append(f"the gradient is off by {found.gradient_error:.1g}")
    if not found.score_error <= WRONG:
        why.append(f"mlx-lm decodes by other scores than it computes, from its window on (by {found.score_error:.2g})")
    right = found.gradient_error <= WRONG and found.score_error <= WRONG
    ways = (right, found.splits, found.shares, found.bounded, found.batches)
    return (name, *("yes" if way else "no" for way in ways), "; ".join(why).replace("|", "/"))


def page(rows: Sequence[tuple[str, ...]]) -> str:
    """The page of these lines."""
    trained = [r for r in rows if r[1] == "yes"]
    counts = " ".join(f"{sum(r[at] == 'yes' for r in trained)} {what}" for at, what in COUNTED)
    table = "\n".join(f"| {' | '.join(cell.strip() for cell in r)} |" for r in rows)
    return TEXT.format(version=version("mlx-lm"), all=len(rows), trained=len(trained), counts=counts, table=table)


if __name__ == "__main__":
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vpd_mlx.tools.trial"])
    rows = []
    for name in sys.argv[1:] or architectures():
        rows.append(row(name, tried(name)))
        print(" | ".join(rows[-1]), flush=True)
    if len(sys.argv) == 1:
        PAGE.write_text(page(rows), encoding="utf-8")
