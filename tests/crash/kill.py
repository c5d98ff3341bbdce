"""Kill runs at random moments, resume them, and compare with an undisturbed run bit for bit.

    python tests/crash/kill.py [--kills 50] [--seed 0]

Prints the seed and each kill. A run is killed with SIGKILL and resumed until it ends by itself. Then its adapter and all its
logs must equal those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    *("steps=6", "rollout.prompts=4", "rollout.group_size=4", "evaluation.problems=8", "evaluation.samples=1"),
    *("evaluation.every=2", "checkpoint.every=2", "lora.rank=4", "e_step.every=2"),
]
CASES = {
    "vpd": [],
    "vpd-adapter": ["algorithm=vpd", "teacher.weights=adapter", "e_step.delta=ema"],
    "sdpo": ["algorithm=sdpo"],
    "grpo": ["algorithm=grpo", "grpo.epochs=2"],
    "joint": ["algorithm=joint"],
    "reshape": ["algorithm=reshape"],
    "reweight": ["algorithm=reweight", "hybrid.mix_decay_steps=5"],
}
CLOCKS = ("seconds", "tokens_per_s", "peak_memory_mb")


def command(case: str, folder: Path) -> list[str]:
    """The command that starts the run, or resumes it if it has begun."""
    base = [sys.executable, "-m", "vpd_mlx", "train", "--quiet"]
    if (folder / "config.yaml").exists():
        return [*base, "--resume", str(folder)]
    sets = [part for item in (*SMALL, *CASES[case]) for part in ("--set", item)]
    # A kill before config.yaml leaves at most a lock file behind.
    return [*base, "quickstart", "--out", str(folder), *sets]


def start(case: str, folder: Path) -> subprocess.Popen[str]:
    if folder.exists() and not (folder / "config.yaml").exists():
        for item in folder.iterdir():
            item.unlink()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command(case, folder), env=env, stderr=subprocess.PIPE, text=True)


def phase_of(folder: Path) -> str:
    """Roughly how far the run was, judged by its files."""
    rows = [
        len((folder / f"{n}.jsonl").read_text().splitlines()) if (folder / f"{n}.jsonl").exists() else 0
        for n in ("evals", "metrics")
    ]
    partial = list((folder / "checkpoints").glob(".partial*")) if (folder / "checkpoints").exists() else []
    return f"{rows[0]} evaluations, {rows[1]} steps logged{', within a checkpoint' if partial else ''}"


def figures(folder: Path) -> tuple[bytes, list[object]]:
    """The adapter, and every log row without its timings."""
    rows = []
    for name in ("metrics", "rollouts", "evals"):
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            rows.append({k: v for k, v in json.loads(line).items() if k not in CLOCKS})
    return (folder / "adapters" / "adapters.safetensors").read_bytes(), rows


def disturbed(case: str, folder: Path, rng: random.Random, seconds: float, most: int) -> int:
    """Run to the end with up to `most` kills; returns their number.

    Raises:
        AssertionError: the run ended with an error of its own.
    """
    kills = 0
    while True:
        process = start(case, folder)
        if kills < most:
            delay = rng.uniform(0.3, 1.0) * seconds if rng.random() < 0.7 else rng.uniform(0.6, 1.0) * seconds
            try:
                process.wait(timeout=delay)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                print(f"  {case}: killed after {delay:.2f} s ({phase_of(folder)})", flush=True)
                continue
        _, errors = process.communicate()
        assert process.returncode == 0, f"{case}: exit {process.returncode}: {errors}"
        return kills


def main() -> None:
    """Run the cases in turn until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    print(f"seed {arguments.seed}")
    wanted: dict[str, tuple[bytes, list[object]]] = {}
    lasted: dict[str, float] = {}
    kills = runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        while kills < arguments.kills:
            case = arguments.cases[runs % len(arguments.cases)]
            if case not in wanted:
                begin = time.perf_counter()
                whole = Path(temporary) / f"{case}-whole"
                disturbed(case, whole, rng, 0, 0)
                lasted[case], wanted[case] = time.perf_counter() - begin, figures(whole)
            folder = Path(temporary) / f"{case}-{runs}"
            n = disturbed(case, folder, rng, lasted[case], min(4, arguments.kills - kills))
            assert figures(folder) == wanted[case], f"{case}: differs from the undisturbed run after {n} kills"
            kills, runs = kills + n, runs + 1
            print(f"{case}: the same after {n} kills; {kills} kills in all", flush=True)
    print(f"{kills} kills over {runs} runs of {len(wanted)} algorithms: every one ended bit for bit as undisturbed")


if __name__ == "__main__":
    main()
