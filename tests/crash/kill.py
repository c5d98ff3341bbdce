"""End runs at random moments and in every way, resume them, and compare with an undisturbed run bit for bit.

    python tests/crash/kill.py [--kills 50] [--seed 0] [--cases vpd grpo …]

Prints the seed and each kill. A run dies of SIGKILL, of SIGSTOP and SIGKILL (a lid closed on a battery that ran out), or stops at
SIGHUP (a closed terminal); when the reader of its output leaves, with SIGPIPE, it goes on. It is resumed until it ends by itself.
Then its adapter and all its logs must equal those of the undisturbed run: bit for bit, no row missing, none twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    *("steps=6", "rollout.prompts=4", "rollout.group_size=4", "evaluation.problems=8", "evaluation.samples=1"),
    *("evaluation.every=2", "checkpoint.every=2", "lora.rank=4", "e_step.every=2", "e_step.until_auc=null"),
]
CASES = {
    "vpd": [],
    "vpd-adapter": ["algorithm=vpd", "teacher.weights=adapter", "e_step.delta=ema"],
    "vpd-gated": ["algorithm=vpd", "teacher.weights=gated"],
    "vpd-best": ["evaluation.keep_best=true", "evaluation.selection_every=1"],
    "sdpo": ["algorithm=sdpo"],
    "opsd": ["algorithm=opsd", "feedback.sources=[reference]", "feedback.max_prompt_tokens=192", "on_no_gap=warn"],
    "grpo": ["algorithm=grpo", "grpo.epochs=2"],
    "joint": ["algorithm=joint"],
    "reshape": ["algorithm=reshape"],
    "reweight": ["algorithm=reweight", "hybrid.mix_decay_steps=5"],
    "srpo": ["algorithm=srpo"],
    "rlcsd": ["algorithm=rlcsd"],
    "two-ranks": [],
    "two-ranks-grpo": ["algorithm=grpo", "grpo.epochs=2"],
}
WAYS = ("SIGKILL", "SIGHUP", "SIGPIPE", "SIGSTOP")
CLOCKS = ("seconds", "tokens_per_s", "peak_memory_mb")
LOGS = ("metrics", "rollouts", "evals", "answers", "selection")
NOTICED = 60.0  # seconds for a rank to notice that another is lost


def command(case: str, folder: Path) -> list[str]:
    """The command that starts the run, or resumes it if it has begun."""
    base = [sys.executable, "-m", "vpd_mlx", "train"]
    if (folder / "config.yaml").exists():
        return [*base, "--resume", str(folder)]
    recipe = str(with_references(folder.parent)) if case == "opsd" else "quickstart"
    sets = [part for item in (*SMALL, *CASES[case]) for part in ("--set", item)]
    # A kill before config.yaml leaves at most a lock file behind.
    return [*base, recipe, "--out", str(folder), *sets]


def with_references(folder: Path) -> Path:
    """The quickstart on rows that have reference solutions."""
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b), "reference": str(a + b)}
        for a in range(15, 30)
        for b in range(11, 20)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (ROOT / "recipes" / "quickstart" / "quickstart.yaml").read_text()
    head, _, tail = text.partition("task:")
    head = head.replace("./model", str(ROOT / "recipes" / "quickstart" / "model"))
    recipe = folder / "references.yaml"
    recipe.write_text(
        f"{head}task: {{kind: exact, data: rows.jsonl, held_out: 0.25}}\n{tail[tail.index('feedback:') :]}"
    )
    return recipe


def start(case: str, folder: Path) -> list[subprocess.Popen[str]]:
    """The run's process, or processes where it is one of several ranks."""
    if folder.exists() and not (folder / "config.yaml").exists():
        for item in folder.iterdir():
            item.unlink()
    ranks = [{}]
    if case.startswith("two-ranks"):
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        hosts = folder.parent / f"{folder.name}.hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]))
        for s in sockets:
            s.close()
        ranks = [{"MLX_RANK": str(n), "MLX_HOSTFILE": str(hosts)} for n in range(2)]
    arguments, pipe = command(case, folder), subprocess.PIPE
    return [
        subprocess.Popen(
            arguments, env={**os.environ, "PYTHONPATH": str(ROOT), **rank}, stdout=pipe, stderr=pipe, text=True
        )
        for rank in ranks
    ]


def lines(folder: Path) -> list[int]:
    """How many lines each log has."""
    files = [folder / f"{name}.jsonl" for name in LOGS]
    return [f.read_bytes().count(b"\n") if f.exists() else 0 for f in files]


def phase_of(folder: Path) -> str:
    """Roughly how far the run was, judged by its files."""
    counts = dict(zip(LOGS, lines(folder), strict=True))
    partial = list((folder / "checkpoints").glob(".partial*")) if (folder / "checkpoints").exists() else []
    within = ", within a checkpoint" if partial else ""
    return f"{counts['evals']} evaluations, {counts['metrics']} steps logged{within}"


def figures(folder: Path) -> tuple[bytes, list[object]]:
    """The adapter, and every log row without its timings."""
    rows = []
    for name in LOGS:
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            rows.append({k: v for k, v in json.loads(line).items() if k not in CLOCKS})
    return (folder / "adapters" / "adapters.safetensors").read_bytes(), rows


def over(processes: list[subprocess.Popen[str]], timeout: float) -> bool:
    """Whether all processes end within so many seconds."""
    try:
        for process in processes:
            process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        return False
    return True


def wait_for_moment(processes: list[subprocess.Popen[str]], folder: Path, rng: random.Random, seconds: float) -> bool:
    """Wait for a random moment: at times any, mostly one in which the run works. False if the run has ended by then."""
    before = lines(folder)
    if rng.random() < 0.75:
        while lines(folder) == before:
            if over(processes, 0.05):
                return False
        return not over(processes, rng.uniform(0.0, 0.6) * seconds)
    return not over(processes, rng.uniform(0.1, 1.0) * seconds)


def hurt(processes: list[subprocess.Popen[str]], way: str, rng: random.Random) -> None:
    """End the run, or one of its ranks, in this way; SIGPIPE takes its reader away."""
    victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
    for process in victims:
        if way == "SIGPIPE":
            assert process.stdout is not None
            process.stdout.close()
            process.stdout = None
        process.send_signal(getattr(signal, way))
    if way == "SIGSTOP":
        time.sleep(rng.uniform(0.0, 1.0))
        for process in victims:
            process.kill()


def disturbed(case: str, folder: Path, rng: random.Random, seconds: float, most: int, died: Counter[str]) -> int:
    """Run to the end with up to `most` kills, counted by their way in `died`; returns their number.

    Raises:
        AssertionError: the run ended with an error of its own.
    """
    kills = 0
    while True:
        processes, ways = start(case, folder), []
        while kills < most and wait_for_moment(processes, folder, rng, seconds):
            ways.append(rng.choice([w for w in WAYS if w != "SIGPIPE" or w not in ways]))  # a reader leaves once
            hurt(processes, ways[-1], rng)
            kills, died[ways[-1]] = kills + 1, died[ways[-1]] + 1
            print(f"  {case}: {ways[-1]} ({phase_of(folder)})", flush=True)
            if ways[-1] != "SIGPIPE":
                break  # that one it survives
        ended = set(ways) - {"SIGPIPE"}
        if ended and not over(processes, NOTICED):
            for process in processes:  # a rank that waits for one which was lost while both were loading
                process.kill()
        found = [process.communicate(timeout=3600) for process in processes]
        codes = {process.returncode for process in processes}
        allowed = {0}
        if ended:
            allowed |= {-signal.SIGKILL, -signal.SIGHUP, 128 + signal.SIGHUP}
            allowed |= {3} if len(processes) > 1 else set()  # a rank that has lost the other
        errors = " / ".join(error for _, error in found)
        assert codes <= allowed, f"{case}: exit {codes} after {ways}: {errors}"
        assert "Traceback" not in errors or ended, f"{case}: {errors}"
        if codes == {0}:
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
    died: Counter[str] = Counter()
    kills = runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        while kills < arguments.kills:
            case = arguments.cases[runs % len(arguments.cases)]
            if case not in wanted:
                begin = time.perf_counter()
                whole = Path(temporary) / f"{case}-whole"
                disturbed(case, whole, rng, 0, 0, died)
                lasted[case], wanted[case] = time.perf_counter() - begin, figures(whole)
            folder = Path(temporary) / f"{case}-{runs}"
            n = disturbed(case, folder, rng, lasted[case], min(4, arguments.kills - kills), died)
            assert figures(folder) == wanted[case], f"{case}: differs from the undisturbed run after {n} kills"
            kills, runs = kills + n, runs + 1
            print(f"{case}: the same after {n} kills; {kills} kills in all", flush=True)
    ways = ", ".join(f"{count} by {way}" for way, count in sorted(died.items()))
    print(f"{kills} kills ({ways}) over {runs} runs of {len(wanted)} cases: every one ended bit for bit as undisturbed")


if __name__ == "__main__":
    main()
