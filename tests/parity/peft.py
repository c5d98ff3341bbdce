"""The PEFT export must give the same greedy answers in transformers + peft as in mlx-lm, on held-out sums.

    python tests/parity/peft.py [--run RUN] [--problems 200]

Makes an environment in build/peft-venv (torch, transformers, peft: a few minutes the first time), trains the quickstart unless
RUN is given, exports it with `vpd-mlx export --to peft`, and fails if an answer differs or if the adapter changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = ROOT / "build" / "peft-venv"
PACKAGES = ("torch==2.13.0", "transformers>=5", "peft>=0.21")
MOST_TOKENS = 6

# Runs in the other environment, which has no mlx: messages in, answers out.
ANSWERS = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

asked = json.load(sys.stdin)
base = AutoModelForCausalLM.from_pretrained(asked["base"], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(asked["base"])
model = PeftModel.from_pretrained(base, asked["adapter"]).eval()

def answers():
    out = []
    for messages in asked["messages"]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            made = model.generate(**ids, do_sample=False, max_new_tokens=asked["most"], pad_token_id=0)
        out.append(tokenizer.decode(made[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
    return out

trained = answers()
with model.disable_adapter():
    plain = answers()
json.dump({"trained": trained, "plain": plain}, sys.stdout)
"""


def other_python() -> Path:
    """The interpreter of the environment with torch, which is made if it is missing."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / ".installed"
    if not done.exists() or done.read_text() != " ".join(PACKAGES):
        print(f"making {ENVIRONMENT.relative_to(ROOT)} with {', '.join(PACKAGES)} …", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        done.write_text(" ".join(PACKAGES))
    return python


def command(*arguments: str | Path) -> None:
    """Run a module in this environment."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True, env=env)


def mlx_answers(model: str, adapter: Path, problems: list[list[dict[str, str]]]) -> list[str]:
    """mlx-lm's greedy answers."""
    import mlx_lm

    loaded: Any = mlx_lm.load(model, adapter_path=str(adapter))
    out = []
    for messages in problems:
        prompt = loaded[1].apply_chat_template(messages, add_generation_prompt=True)
        out.append(mlx_lm.generate(loaded[0], loaded[1], prompt, max_tokens=MOST_TOKENS))
    return out


def check(run: Path, folder: Path, count: int) -> None:
    """Compare the two on the first `count` held-out sums of a run."""
    from vpd_mlx.recipe import load_recipe
    from vpd_mlx.tasks import build_task

    recipe = load_recipe(run / "config.yaml")
    problems = build_task(recipe).held_out[:count]
    messages = [list(p.messages) for p in problems]
    python = other_python()
    command("vpd_mlx", "export", run, "--to", "peft", "--out", folder / "peft")
    # transformers cannot read MLX's quantised weights: dequantise the base, as the export advises
    command("mlx_lm", "convert", "--hf-path", recipe.model, "--mlx-path", folder / "base", "-d")
    asked = {"base": str(folder / "base"), "adapter": str(folder / "peft"), "messages": messages, "most": MOST_TOKENS}
    done = subprocess.run(
        [python, "-P", "-c", ANSWERS], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"transformers + peft failed:\n{done.stderr[-3000:]}")
    theirs = json.loads(done.stdout)
    ours = mlx_answers(recipe.model, run / "adapters", messages)
    same = sum(a == b for a, b in zip(ours, theirs["trained"], strict=True))

    def right(answers: list[str]) -> int:
        return sum(a == p.answer for a, p in zip(answers, problems, strict=True))

    print(f"{len(problems)} held-out sums, greedy: {same} answers alike")
    print(
        f"right: mlx-lm {right(ours)}, peft {right(theirs['trained'])}, peft without the adapter {right(theirs['plain'])}"
    )
    for problem, a, b in zip(problems, ours, theirs["trained"], strict=True):
        if a != b:
            print(f"  {problem.prompt} mlx-lm {a!r}, peft {b!r}")
    if same < len(problems):
        raise SystemExit(f"{len(problems) - same} answers differ")
    if theirs["plain"] == theirs["trained"]:
        raise SystemExit("the adapter changes no answer, so this run proves nothing")


def main() -> None:
    """Train or take a run, and check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run of the quickstart's task")
    parser.add_argument("--problems", type=int, default=200)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        run = arguments.run
        if run is None:
            run = Path(name) / "run"
            command("vpd_mlx", "train", "--out", run)
        check(run, Path(name), arguments.problems)


if __name__ == "__main__":
    main()
