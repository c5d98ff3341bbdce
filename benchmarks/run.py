"""Time and memory, side by side with other libraries, and the requirements on them.

    python -m benchmarks.run [--only PART ...] [--repeats N] [--peers PYTHON] [--real FOLDER] [--out FILE]

PART is rollouts, vocabulary, prompts, attention, hybrids, grpo, steps, real, phases, growth or launches. `--peers` is a Python
with mlx-lm-lora, mlx-tune, unsloth-zoo and inductive-mlxrl; without it their rows are left out, and the results say so. `--real`
is a model folder for the part of that name, which is measured alone (`make bench-real REAL=FOLDER`, benchmarks/REAL.md): its
timings depend on the model's size. `make bench` makes the peers' environment and writes benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks import attention, hybrids, launches, models, work
from benchmarks.measure import Timing, peak, side_by_side
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.settings import MemorySettings
from vpd_mlx.recipe import builtin_recipes, load_recipe
from vpd_mlx.run.loop import train

SMALL, LARGE = 2_048, 151_936
MB = 1e6


TWO_STREAMS = "vpd-mlx, rollout_streams 2"
ONE_ROW = "vpd-mlx, 1 at once"


class Peers:
    """The process that runs the peers' code, if their environment is given."""

    def __init__(self, python: str | None) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.peaks: dict[str, float] = {}
        if python is not None:
            script = str(Path(__file__).parent / "peers.py")
            self._process = subprocess.Popen(
                [python, script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            )

    @property
    def there(self) -> bool:
        """Whether there is such a process."""
        return self._process is not None

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One job's seconds, peak bytes above the model, and result."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peers' process ended at {do}; run benchmarks/peers.py by hand to see why")
        found: dict[str, Any] = json.loads(line)
        return found

    def timed(self, name: str, do: str, **arguments: Any) -> Callable[[], float]:
        """A run for `side_by_side`. `peaks[name]` becomes the lowest peak of its runs, as in `measure.peak`."""
        self.peaks.pop(name, None)

        def run() -> float:
            found = self.ask(do, **arguments)
            self.peaks[name] = min(self.peaks.get(name, found["peak"]), found["peak"])
            return float(found["seconds"])

        return run

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()


class Report:
    """Lines of Markdown, and the number of requirements missed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.missed = 0

    def say(self, text: str = "") -> None:
        """A line."""
        self.lines.append(text)
        print(text, flush=True)

    def table(self, head: str, rows: list[str]) -> None:
        """A table."""
        self.say(head)
        self.say("|" + "---|" * (head.count("|") - 1))
        for row in rows:
            self.say(row)
        self.say()

    def need(self, what: str, value: float, bound: float, *, least: bool, unit: str = "x") -> None:
        """A requirement: `value` at least, or at most, `bound`."""
        met = value >= bound if least else value <= bound
        self.missed += not met
        sign = "at least" if least else "at most"
        self.say(f"- {'**met**' if met else '**MISSED**'}: {what}: {value:.3g}{unit}, wanted {sign} {bound:g}{unit}")


def timings(report: Report, found: dict[str, Timing], reference: str) -> None:
    """A table of times, and of ratios to one of them."""
    base = found[reference].median
    rows = [f"| {name} | {t} | {base / t.median:.2f} |" for name, t in found.items()]
    report.table(f"| | median (least to most) | speed, {reference} = 1 |", rows)


def ahead(report: Report, what: str, found: dict[str, Timing]) -> None:
    """Quicker than every peer."""
    others = [t.median for n, t in found.items() if n != "BatchGenerator" and not n.startswith("vpd-mlx")]
    report.need(f"against {what}", min(others) / found["vpd-mlx"].median, 1.0, least=True)


def peers_rollouts(peers: Peers, policy: Policy, batch: work.Batch, tokens: int) -> dict[str, Callable[[], float]]:
    """Every peer's rollouts of the batch's prompts."""
    prompts = [list(g.prompt) for g in batch.groups]
    own: dict[str, Any] = {"folder": policy.path, "prompts": prompts, "samples": batch.samples, "tokens": tokens}
    names = {"mlx-tune": "tune", "unsloth-zoo": "unsloth", "inductive-mlxrl": "mlxrl"}
    name = "mlx-lm-lora, batch 4"
    runs = {name: peers.timed(name, "rollouts", peer="lora", batch=4, **own)}
    return runs | {n: peers.timed(n, "rollouts", peer=p, **own) for n, p in names.items()}


def peers_gradients(
    peers: Peers, policy: Policy, batch: work.Batch, chunks: Sequence[int]
) -> dict[str, Callable[[], float]]:
    """Every peer's GRPO gradient of the batch, so many rows at a time."""
    own = {
        "folder": policy.path,
        "prompts": [list(g.prompt) for g in batch.groups],
        "completions": [list(r.tokens) for g in batch.groups for r in g.rollouts],
    }
    runs = {}
    for title, peer in (("mlx-lm-lora", "lora"), ("unsloth-zoo", "unsloth"), ("inductive-mlxrl", "mlxrl")):
        for chunk in chunks:
            name = f"{title}, {chunk} at once"
            runs[name] = peers.timed(name, "grpo", peer=peer, chunk=chunk, **own)
    name = f"unsloth-zoo, fused, {chunks[-1]} at once"
    return runs | {name: peers.timed(name, "grpo", peer="unsloth", fused=True, chunk=chunks[-1], **own)}


def peers_steps(peers: Peers, policy: Policy, batch: work.Batch, chunk: int) -> dict[str, Callable[[], float]]:
    """Every peer's whole GRPO step."""
    prompts = [list(g.prompt) for g in batch.groups]
    own: dict[str, Any] = {"folder": policy.path, "prompts": prompts, "samples": batch.samples, "chunk": chunk}
    names = {"mlx-lm-lora": "lora", "unsloth-zoo": "unsloth", "inductive-mlxrl": "mlxrl"}
    return {n: peers.timed(n, "step", peer=p, tokens=batch.completion, **own) for n, p in names.items()}


def rollouts(report: Report, policy: Policy, peers: Peers, repeats: int) -> None:
    """Completions per second."""
    report.say("## Rollouts\n\n4 prompts x 8 completions, 64 tokens.\n")
    for length in (40, 512):
        batch = work.Batch(policy.vocabulary, 4, 8, length, 64)
        runs: dict[str, Callable[[], Any]] = {
            "vpd-mlx": work.rollouts(policy, batch.groups, 8, 64),
            "BatchGenerator": work.raw_rollouts(policy, batch.groups, 8, 64),
        }
        if peers.there:
            runs |= peers_rollouts(peers, policy, batch, 64)
        found = side_by_side(runs, repeats)
        report.say(f"Prompts of {length} tokens:\n")
        timings(report, found, "BatchGenerator")
        ours = found["vpd-mlx"].median
        raw = found["BatchGenerator"].median / ours
        report.need(f"against BatchGenerator, {length} tokens", raw, 1.0 if length == 40 else 3.0, least=True)
        if peers.there:
            theirs = found["mlx-lm-lora, batch 4"].median / ours
            report.need(f"against mlx-lm-lora at batch 4, {length} tokens", theirs, 1.6, least=True)
            ahead(report, f"the quickest other, {length} tokens", found)
        report.say()


def vocabulary(report: Report, policies: dict[int, Policy], repeats: int) -> None:
    """The divergence over a large vocabulary, fused against plain."""
    report.say("## Divergence over a vocabulary of 151,936\n\n8 sequences of 40 + 32 tokens, full Jensen-Shannon.\n")
    shape = {"prompts": 1, "samples": 8, "prompt": 40, "completion": 32}
    u = work.Updates(policies[LARGE], work.Batch(LARGE, **shape))
    found = side_by_side({"fused": u.fused, "plain": u.plain}, repeats)
    peaks = {"fused": peak(u.fused), "plain": peak(u.plain)}
    rows = [f"| {n} | {found[n]} | {peaks[n] / MB:,.0f} MB |" for n in found]
    report.table("| | median (least to most) | peak above the model |", rows)
    report.need("peak against plain", peaks["fused"] / peaks["plain"], 0.1, least=False)
    report.need("time against plain", found["fused"].median / found["plain"].median, 1.0, least=False)
    report.need("gradient's greatest difference", work.difference(u.fused(), u.plain()), 1e-5, least=False, unit="")
    twice = peak(work.Updates(policies[2 * LARGE], work.Batch(2 * LARGE, **shape)).fused)
    report.need("peak at twice the vocabulary", twice / peaks["fused"], 1.1, least=False)
    report.say()


def prompts(report: Report, policy: Policy, repeats: int) -> None:
    """A prompt read once for all its completions, against once for each."""
    report.say(
        "## Shared prompts in training\n\n512-token prompts, 32-token completions, 8 of them; one sibling's context.\n"
    )
    u = work.Updates(policy, work.Batch(policy.vocabulary, 1, 8, 512, 32))

    def apart(run: Callable[[], Any]) -> Callable[[], Any]:
        def separately() -> Any:
            policy.shares_prompts = False
            try:
                return run()
            finally:
                policy.shares_prompts = True

        return separately

    for name, run, bound in (
        ("student, forward and backward", lambda: u.backward_of(u.student), 4.0),
        ("teacher, forward", u.teacher_states, 3.0),
    ):
        found = side_by_side({"shared": run, "apart": apart(run)}, repeats)
        report.say(f"{name}: shared {found['shared']}, apart {found['apart']}\n")
        report.need(name, found["apart"].median / found["shared"].median, bound, least=True)
    shared, each = u.backward_of(u.student), apart(lambda: u.backward_of(u.student))()
    report.need("gradient's greatest difference", work.difference(shared, each), 1e-5, least=False, unit="")
    report.say()


def attention_and_recomputing(report: Report, folder: Path, repeats: int) -> None:
    """A long row's attention in blocks; and blocks recomputed although a prompt is shared."""
    report.say(
        "## Attention and recomputed blocks\n\nForward and backward of log-probabilities, in the process's CPU time.\n"
    )
    for title, make, most_peak, most_time in attention.PARTS:
        runs = make(folder / make.__name__)
        seconds, peaks, gradients = attention.weigh(runs, repeats)
        report.say(f"{title}:\n")
        report.table(
            "| | median | peak above the model |",
            [f"| {n} | {seconds[n]:.3f} s | {peaks[n] / MB:,.1f} MB |" for n in runs],
        )
        ours, theirs = runs
        report.need(f"peak, {ours} against {theirs}", peaks[ours] / peaks[theirs], most_peak, least=False)
        report.need(f"time, {ours} against {theirs}", seconds[ours] / seconds[theirs], most_time, least=False)
        apart = work.difference(gradients[ours], gradients[theirs])
        report.need("gradient's greatest difference", apart, 1e-5, least=False, unit="")
    report.say()


def recurrent_layers(report: Report, folder: Path, repeats: int) -> None:
    """A hybrid's update as it is, without sharing, and token by token."""
    report.say(
        "## Recurrent layers\n\nA random Qwen3.5, hidden size 96, 4 blocks, vocabulary 352, float32. Forward and backward of 8 "
        "completions of 128 tokens behind 512, in the process's CPU time.\n"
    )
    runs = hybrids.runs(models.load(models.make_hybrid(folder / "hybrid", 352)), 512, 128)
    seconds, peaks, gradients = attention.weigh(runs, repeats)
    slowest = seconds[hybrids.ONE_BY_ONE]
    rows = [f"| {n} | {s:.3f} s | {slowest / s:.2f} | {peaks[n] / MB:,.0f} MB |" for n, s in seconds.items()]
    report.table("| | median | speed, token by token = 1 | peak above the model |", rows)
    report.need("against token by token, apart", slowest / seconds[hybrids.SHARED], 4.0, least=True)
    report.need("shared against apart", seconds[hybrids.APART] / seconds[hybrids.SHARED], 3.0, least=True)
    for name in (hybrids.SHARED, hybrids.APART):
        apart = work.difference(gradients[name], gradients[hybrids.ONE_BY_ONE])
        report.need(f"gradient's greatest difference, {name}", apart, 1e-5, least=False, unit="")
    report.say()


def grpo(report: Report, policies: dict[int, Policy], peers: Peers, repeats: int) -> None:
    """A GRPO step, one forward and one backward on either side."""
    report.say("## GRPO step\n\n8 sequences of 40 + 32 tokens; one forward and one backward pass on either side.\n")
    recipe = work.recipe_of("grpo")
    for size in (SMALL, LARGE):
        policy = policies[size]
        batch = work.Batch(size, 1, 8, 40, 32)
        u = work.Updates(policy, batch)
        runs: dict[str, Callable[[], Any]] = {"vpd-mlx": lambda u=u: u.grpo(recipe)}  # type: ignore[misc]
        peaks = {"vpd-mlx": float(peak(runs["vpd-mlx"]))}
        if peers.there:
            runs |= peers_gradients(peers, policy, batch, (1, 8))
        found = side_by_side(runs, repeats)
        report.say(f"V = {size:,}:\n")
        against_gradients(report, found, peaks | peers.peaks)
        if size == LARGE and peers.there:
            least = min((n for n in peers.peaks if n in found), key=lambda n: peers.peaks[n])
            report.need(f"peak against {least}", peaks["vpd-mlx"] / peers.peaks[least], 0.5, least=False)
            quicker(report, found)
        report.say()


def against_gradients(report: Report, found: dict[str, Timing], peaks: dict[str, float]) -> None:
    """A table of times and peaks."""
    rows = [f"| {n} | {t} | {peaks[n] / MB:,.0f} MB |" for n, t in found.items()]
    report.table("| | median (least to most) | peak above the model |", rows)


def quicker(report: Report, found: dict[str, Timing]) -> None:
    """In no more than the quickest peer's time."""
    others = {n: t.median for n, t in found.items() if not n.startswith("vpd-mlx")}
    if others:
        quickest = min(others, key=lambda n: others[n])
        report.need(f"time against {quickest}", found["vpd-mlx"].median / others[quickest], 1.0, least=False)


def steps(report: Report, policy: Policy, peers: Peers, repeats: int) -> None:
    """Whole steps against the passes that they need, and against each other."""
    report.say("## Whole steps\n\n4 prompts x 8 completions, 128 + 64 tokens.\n")
    batch = work.Batch(policy.vocabulary, 4, 8, 128, 64)
    u = work.Updates(policy, batch)
    passes: dict[str, Callable[[], Any]] = {
        "E: student forward": u.student_forward,
        "E: teacher forward": u.teacher_forward,
        "E: teacher forward and backward": u.teacher_backward,
        "M: teacher forward": u.teacher_states,
        "M: student forward and backward": u.student_backward,
    }
    both = work.whole_step(work.recipe_of("vpd", every=1), policy, batch, sample=False)
    found = side_by_side({"E-step and M-step": both, **passes}, repeats)
    report.table("| | median (least to most) |", [f"| {n} | {t} |" for n, t in found.items()])
    total = sum(found[n].median for n in passes)
    report.need("a VPD update against its passes", found["E-step and M-step"].median / total, 1.15, least=False)
    report.say()
    # F = 5: five steps in a row hold one E-step
    runs: dict[str, Callable[[], Any]] = {}
    for name in ("grpo", "sdpo", "vpd"):
        step = work.whole_step(work.recipe_of(name), policy, batch, sample=True)
        runs[name] = lambda step=step: sum(step() for _ in range(5)) / 5  # type: ignore[misc]
    found = side_by_side(runs, repeats)
    report.say("A step with its rollouts, mean of five at F = 5:\n")
    timings(report, found, "sdpo")
    report.need("VPD against SDPO", found["vpd"].median / found["sdpo"].median, 1.2, least=False)
    report.say()
    if peers.there:
        report.say("A GRPO step with its rollouts, gradients 8 rows at a time elsewhere:\n")
        ours = {"vpd-mlx": work.whole_step(work.recipe_of("grpo"), policy, batch, sample=True)}
        found = side_by_side({**ours, **peers_steps(peers, policy, batch, 8)}, repeats)
        timings(report, found, "vpd-mlx")
        ahead(report, "the quickest other's step", found)
        report.say()


def real(report: Report, folder: Path, peers: Peers, repeats: int) -> None:
    """A pretrained model: rollouts, update and whole step."""
    policy = models.load(folder)
    batch = work.Batch(policy.vocabulary, 2, 4, 64, 32)
    row = models.load(folder, MemorySettings(micro_batch_tokens=batch.prompt + batch.completion))
    report.say(
        f"## A real model\n\n{Path(policy.path).name}, {policy.vocabulary:,} tokens; 2 prompts x 4 completions, "
        f"{batch.prompt} + {batch.completion} tokens; GRPO.\n"
    )
    u, recipe = work.Updates(policy, batch), work.recipe_of("grpo")
    runs: dict[str, Callable[[], Any]] = {
        "vpd-mlx": work.rollouts(policy, batch.groups, batch.samples, 32),
        TWO_STREAMS: work.rollouts(policy, batch.groups, batch.samples, 32, streams=2),
    }
    found = side_by_side({**runs, **(peers_rollouts(peers, policy, batch, 32) if peers.there else {})}, repeats)
    report.say("Rollouts:\n")
    timings(report, found, "vpd-mlx")
    if peers.there:
        ahead(report, "the quickest other's rollouts", found)
    report.say("\nUpdate:\n")
    alone = work.Updates(row, batch)
    runs = {"vpd-mlx": lambda: u.grpo(recipe), ONE_ROW: lambda: alone.grpo(recipe)}
    peaks = {name: float(peak(run)) for name, run in runs.items()}
    found = side_by_side({**runs, **(peers_gradients(peers, policy, batch, (1, 8)) if peers.there else {})}, repeats)
    against_gradients(report, found, peaks | peers.peaks)
    for ours, rows in (("vpd-mlx", 8), (ONE_ROW, 1)):
        theirs = {n: v for n, v in peers.peaks.items() if n in found and n.endswith(f" {rows} at once")}
        if theirs:
            least = min(theirs, key=lambda n: theirs[n])
            report.need(f"peak, {rows} rows, against {least}", peaks[ours] / theirs[least], 1.0, least=False)
    quicker(report, found)
    report.say("Whole step:\n")
    runs = {
        "vpd-mlx": work.whole_step(recipe, policy, batch, sample=True),
        TWO_STREAMS: work.whole_step(recipe, policy, batch, sample=True, streams=2),
    }
    found = side_by_side({**runs, **(peers_steps(peers, policy, batch, 8) if peers.there else {})}, repeats)
    timings(report, found, "vpd-mlx")
    if peers.there:
        ahead(report, "the quickest other's step", found)
    report.say()


def phases(report: Report, folder: Path) -> None:
    """How much of a run's wall time its phase timer accounts for."""
    report.say("## Phase timer\n\nThe quickstart's first ten steps.\n")
    recipe = load_recipe(builtin_recipes()["quickstart"], [("steps", 10), ("evaluation.problems", 10)])
    train(recipe, folder / "phases")
    rows = [json.loads(line)["seconds"] for line in (folder / "phases" / "metrics.jsonl").read_text().splitlines()]
    total = sum(r.pop("total") for r in rows)
    names = sorted({n for r in rows for n in r})
    report.table(
        "| phase | share |", [f"| {n} | {100 * sum(r.get(n, 0.0) for r in rows) / total:.1f} % |" for n in names]
    )
    share = 100 * sum(sum(r.values()) for r in rows) / total
    report.need("of the wall time is accounted for", share, 95, least=True, unit=" %")
    report.say()


def growth(report: Report, folders: dict[int, Path], repeats: int) -> None:
    """Seconds and peak of the M-step's passes as the batch grows in each direction."""
    report.say(
        "## Growth\n\nDivergence and gradient; from 8 sequences of 128 + 32 tokens, V = 2,048, in each direction.\n"
    )
    base = {"vocabulary": SMALL, "samples": 8, "prompt": 128, "completion": 32}
    rows = []
    for key, values in {
        "samples": (8, 16, 32),
        "prompt": (128, 256, 512),
        "completion": (32, 64, 128),
        "vocabulary": (SMALL, LARGE, 2 * LARGE),
    }.items():
        for value in values:
            shape = {**base, key: value}
            u = work.Updates(models.load(folders[shape["vocabulary"]]), work.Batch(prompts=1, **shape))
            found = side_by_side({"fused": u.fused}, repeats)["fused"]
            rows.append(f"| {key} {value:,} | {found} | {peak(u.fused) / MB:,.1f} MB |")
    report.table("| | median (least to most) | peak above the model |", rows)


def counts(report: Report, folder: Path) -> None:
    """Launches and kept bytes, with the adapter's layers and with mlx-lm's."""
    report.say(
        "## Launches and kept bytes\n\nThe model in bfloat16. Launches are counted in the graph, bytes by what stays allocated "
        "for a gradient (benchmarks/launches.py): the same on every machine, near enough.\n"
    )
    found: dict[str, tuple[float, int, float]] = {}
    for name in ("plain", "mlx-lm", "lean"):
        policy = models.half(folder, name)
        decoded = launches.per_decoded_token(policy)
        trained = (0, 0.0) if name == "plain" else (launches.of_an_update(policy), launches.kept_per_token(policy))
        found[name] = (decoded, *trained)
    names = {"plain": "without an adapter", "mlx-lm": "mlx-lm's LoRA", "lean": "vpd-mlx"}
    report.table(
        "| | launches a decoded token | launches of an update's gradient | bytes kept for a gradient, a token |",
        [f"| {names[n]} | {d:g} | {u or ''} | {f'{k:,.0f}' if k else ''} |" for n, (d, u, k) in found.items()],
    )
    (plain, _, _), theirs, ours = found.values()
    report.need("the adapter's launches, a decoded token", (ours[0] - plain) / (theirs[0] - plain), 0.45, least=False)
    report.need("all launches, a decoded token", ours[0] / theirs[0], 0.65, least=False)
    report.need("launches of an update's gradient", ours[1] / theirs[1], 1.0, least=False)
    report.need("bytes kept, a token", ours[2] / theirs[2], 0.8, least=False)
    # Both sides run the same rollouts and losses: what these launch is bounded in numbers.
    report.need("launches, a decoded token", ours[0], 100, least=False, unit="")
    report.need("launches of an update's gradient", ours[1], 320, least=False, unit="")
    report.say()


PARTS = (
    "rollouts",
    "vocabulary",
    "prompts",
    "attention",
    "hybrids",
    "grpo",
    "steps",
    "real",
    "phases",
    "growth",
    "launches",
)


def measure(parts: list[str], repeats: int, python: str | None, folder: Path | None) -> Report:
    """Measure the given parts."""
    report = Report()
    own = {n: importlib.metadata.version(n) for n in ("mlx", "mlx-lm", "numpy")}
    made_by = "bench-real" if parts == ["real"] else "bench"
    report.say(f"# Benchmarks\n\nMade by `make {made_by}`; nothing here is written by hand.\n")
    peers = Peers(python)
    try:
        theirs = peers.ask("versions") if peers.there else {}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = "GPU" if mx.default_device() == mx.Device(mx.gpu) else "CPU"
        preloaded = [Path(p).name for p in os.environ.get("LD_PRELOAD", "").split(":") if p]
        report.say(
            f"{platform.system()} {platform.machine()}, {cores} cores, {kind}, Python {platform.python_version()}; "
            + ", ".join(f"{n} {v}" for n, v in own.items())
            + ("; peers: " + ", ".join(f"{n} {v}" for n, v in theirs.items()) if theirs else "; **without peers**")
            + (f"; preloaded {', '.join(preloaded)}" if preloaded else "")
            + f". Medians of {repeats}, all of a table side by side in one run, alternating. Ratios count, not seconds.\n"
        )
        if parts != ["real"]:
            report.say("Models: random Qwen3, hidden size 64, 2 blocks, 4 bits, LoRA of rank 8.\n")
        with tempfile.TemporaryDirectory() as name:
            folders = {v: models.make(Path(name) / str(v), v) for v in (SMALL, LARGE, 2 * LARGE)}
            policies = {v: models.load(folder) for v, folder in folders.items()}
            small = policies[SMALL]
            jobs: dict[str, Callable[[], None]] = {
                "rollouts": lambda: rollouts(report, small, peers, repeats),
                "vocabulary": lambda: vocabulary(report, policies, repeats),
                "prompts": lambda: prompts(report, small, repeats),
                "attention": lambda: attention_and_recomputing(report, Path(name), repeats),
                "hybrids": lambda: recurrent_layers(report, Path(name), repeats),
                "grpo": lambda: grpo(report, policies, peers, repeats),
                "steps": lambda: steps(report, small, peers, repeats),
                "real": lambda: real(report, folder, peers, repeats),
                "phases": lambda: phases(report, Path(name)),
                "growth": lambda: growth(report, folders, repeats),
                "launches": lambda: counts(report, folders[SMALL]),
            }
            for part in parts:
                jobs[part]()
    finally:
        peers.close()
    report.say(f"{report.missed} requirements missed." if report.missed else "Every requirement is met.")
    return report


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="without it, all but `real`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", metavar="PYTHON")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--real", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    chosen = arguments.only or [part for part in PARTS if part != "real"]
    if "real" in chosen and arguments.real is None:
        parser.error("real needs a model: --real FOLDER")
    report = measure(chosen, arguments.repeats, arguments.peers, arguments.real)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(report.lines) + "\n", encoding="utf-8")
    sys.exit(1 if report.missed else 0)


if __name__ == "__main__":
    main()
