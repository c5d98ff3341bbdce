"""Sends a run's figures to wandb, swanlab, trackio or tensorboard, in a process of its own that follows the run folder.

    python -m vpd_mlx.report.services FOLDER SERVICE

`run/followers.py` starts it with a run that names the service. It sends the recipe and numbers only: prompts, completions and
feedback stay in the run folder. `logging/<service>.sent` keeps how far it is, so that a resumed run sends no step twice and the
rows that a failed service missed are sent then. It ends when its standard input closes, or its parent is gone.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from vpd_mlx.run.followers import LIFETIME
from vpd_mlx.run.log import RECIPE_FILE
from vpd_mlx.run.records import upgraded

__all__ = ["SERVICES", "follow", "main", "numbers", "send"]

POLL = 0.2  # seconds between two looks at the files

Log = Callable[[int, Mapping[str, float]], object]
Service = tuple[Log, Callable[[], object]]
"""(log values at a step, finish)."""


def numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a row, nested ones by path, without the step itself; lists and texts are left out."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            if not key.endswith("_by_problem"):
                yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and key != "step":
            yield f"{prefix}{key}", float(value)


def _tail(path: Path) -> Iterator[list[dict[str, Any]]]:
    """A log as it grows: each time, the whole rows since the last time."""
    offset = 0
    while True:
        data = b""
        if path.exists():
            with path.open("rb") as f:
                f.seek(offset)
                data = f.read()
        end = data.rfind(b"\n") + 1
        offset += end
        yield [json.loads(line) for line in data[:end].split(b"\n") if line]


def follow(folder: Path, over: Callable[[], bool]) -> Iterator[tuple[int, str, dict[str, float]]]:
    """(step, log, figures) of a run's steps and evaluations in the order of steps, until `over` and all is read."""
    metrics, evaluations = _tail(folder / "metrics.jsonl"), _tail(folder / "evals.jsonl")
    step, waiting, ended = 0, list[dict[str, Any]](), False
    while not ended:
        ended = over()
        # Evaluations second: those before the newest step are there once its row is. Later ones wait for their step.
        new = [(row["step"], "metrics", dict(numbers(upgraded(row)))) for row in next(metrics)]
        waiting += next(evaluations)
        step = max([step, *(s for s, *_ in new)])
        ready = [row for row in waiting if ended or row["step"] <= step]
        waiting = [row for row in waiting if row not in ready]
        new += [(row["step"], "evals", dict(numbers(row, "evaluation/"))) for row in ready]
        yield from sorted(new, key=lambda row: row[0])


def send(folder: Path, log: Log, sent: TextIO, over: Callable[[], bool]) -> None:
    """Log all rows of a run that `sent` does not name yet, and name them there."""
    sent.seek(0)
    last = {"metrics": -1, "evals": -1}
    for line in sent.read().splitlines():
        name, _, step = line.partition(" ")
        last[name] = int(step)
    for number, name, values in follow(folder, over):
        if number > last[name]:
            log(number, values)
            sent.write(f"{name} {number}\n")
            sent.flush()


def _wandb(folder: Path, run_id: str, about: Mapping[str, Any]) -> Service:
    wandb: Any = importlib.import_module("wandb")
    run = wandb.init(**about, id=run_id, resume="allow", dir=str(folder))
    return lambda step, values: run.log(dict(values), step=step), run.finish


def _swanlab(folder: Path, run_id: str, about: Mapping[str, Any]) -> Service:
    swanlab: Any = importlib.import_module("swanlab")
    logs = folder / "swanlab"
    logs.mkdir(exist_ok=True)
    swanlab.init(**about, id=run_id, resume="allow", log_dir=str(logs))
    return lambda step, values: swanlab.log(dict(values), step=step), swanlab.finish


def _trackio(folder: Path, run_id: str, about: Mapping[str, Any]) -> Service:
    trackio: Any = importlib.import_module("trackio")
    own = {**about, "name": f"{folder.name}-{run_id[:6]}"}  # it knows runs by name alone
    trackio.init(**own, resume="allow", auto_log_cpu=False, auto_log_gpu=False)
    return lambda step, values: trackio.log(dict(values), step=step), trackio.finish


def _tensorboard(folder: Path, run_id: str, about: Mapping[str, Any]) -> Service:
    writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


SERVICES = {"wandb": _wandb, "swanlab": _swanlab, "trackio": _trackio, "tensorboard": _tensorboard}


def _until_the_end() -> Callable[[], bool]:
    """Whether the run is over, each time after a short wait. A service that hangs does not outlive it for long."""
    over, parent = threading.Event(), os.getppid()

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock this thread would hold when the process ends
        over.set()
        time.sleep(LIFETIME)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return lambda: over.wait(POLL) or os.getppid() != parent


def main(folder: Path, service: str) -> None:
    """Send a run's figures to a service until the run is over."""
    over = _until_the_end()
    config = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    run_id = (folder / "logging" / "id").read_text(encoding="utf-8")
    about = {"project": config["logging"]["project"], "name": folder.name, "config": config}
    with (folder / "logging" / f"{service}.sent").open("a+", encoding="utf-8") as sent:
        fcntl.flock(sent, fcntl.LOCK_EX)  # the process of a run that was killed may still be sending
        log, finish = SERVICES[service](folder, run_id, about)
        send(folder, log, sent, over)
        finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
