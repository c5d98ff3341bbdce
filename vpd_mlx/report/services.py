"""Figures to wandb, swanlab, trackio or tensorboard: off by default, and never able to stop or slow a run.

Each service lives in a process of its own, fed with JSON lines through a pipe that is never waited for. So nothing that a
service does reaches the training: no prompt for a password, no line in `--json`, no signal handler, no crash, no hang. What it
prints stands in `logging/<service>.log` of the run folder; where it fails, one note says so and the run goes on.

The loop does not know of it: `Told` stands between the loop and whoever watches, and hears what they hear. Only numbers are
sent, and the recipe; prompts, completions and feedback stay in the run folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vpd_mlx.errors import ConfigError, Fault
from vpd_mlx.recipe import LoggingSettings
from vpd_mlx.run.progress import Progress
from vpd_mlx.types import Rollout

__all__ = ["MODULES", "SERVICES", "Told", "main", "numbers"]

MODULES = {"wandb": "wandb", "swanlab": "swanlab", "trackio": "trackio", "tensorboard": "tensorboardX"}
PATIENCE = 10.0  # seconds that the end of a run waits for what is still to be sent
LIFETIME = 600  # seconds that a service may go on sending by itself after that

Log = Callable[[int, Mapping[str, float]], object]
Service = tuple[Log, Callable[[], object]]
"""(log values at a step, finish)."""


def numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a row of metrics, nested ones by path; the step itself, lists and texts are left out."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            if not key.endswith("_by_problem"):
                yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and key != "step":
            yield f"{prefix}{key}", float(value)


# --- in the run's process


class Told(Progress):
    """Passes a run's events on to who watches it, and its figures to the services that the recipe names."""

    def __init__(self, progress: Progress, cfg: LoggingSettings) -> None:
        """Nothing is started yet.

        Raises:
            ConfigError: a service's package is not installed.
        """
        missing = [name for name in cfg.to if not _installed(MODULES[name])]
        if missing:
            raise ConfigError(
                [
                    Fault("logging.to", f"{n} needs the package {MODULES[n]}", f"pip install 'vpd-mlx[{n}]'")
                    for n in missing
                ]
            )
        self._progress = progress
        self._cfg = cfg
        self._pipes: list[_Pipe] = []

    def open(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """The run folder is there: start the services."""
        if not self._cfg.to:
            return
        try:
            about = {**self._about(folder), "config": recipe}
            for name in self._cfg.to:
                self._pipes.append(_Pipe(name, about, folder / "logging" / f"{name}.log"))
        except OSError as error:
            self.note(f"logging.to: no more services can be started ({error}); the run goes on without")

    def _about(self, folder: Path) -> dict[str, Any]:
        mark = folder / "logging" / "id"
        mark.parent.mkdir(exist_ok=True)
        if not mark.exists():
            mark.write_text(uuid.uuid4().hex[:21], encoding="utf-8")  # a resumed run goes on under the same id
        known = {"project": self._cfg.project, "name": folder.resolve().name, "folder": str(folder.resolve())}
        return {**known, "id": mark.read_text(encoding="utf-8")}

    def close(self) -> None:
        """The run is over: wait a little for the services, then leave them to it."""
        for pipe in self._pipes:
            pipe.end()
        deadline = time.monotonic() + PATIENCE
        while any(p.going for p in self._pipes) and time.monotonic() < deadline:
            self._progress.phase(f"sending to {', '.join(p.name for p in self._pipes if p.going)}")
            time.sleep(0.05)
        for pipe in self._pipes:
            if pipe.going:
                self.note(f"{pipe.name} is still sending; it ends by itself within {LIFETIME // 60} minutes")
            else:
                self._say_failure(pipe)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        for pipe in self._pipes:
            pipe.send({"step": step, "values": values})
            self._say_failure(pipe)

    def _say_failure(self, pipe: _Pipe) -> None:
        why = pipe.failure()
        if why is not None:
            self.note(f"{pipe.name} gets no more figures ({why}); the run goes on, see {pipe.log}")

    def note(self, text: str) -> None:
        """Passed on."""
        self._progress.note(text)

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Passed on."""
        self._progress.phase(name, done, total)

    def step(self, step: int, steps: int, metrics: Mapping[str, Any], seconds_left: float) -> None:
        """Passed on, and sent."""
        self._progress.step(step, steps, metrics, seconds_left)
        self._send(step, dict(numbers(metrics)))

    def sample(self, prompt: str, rollout: Rollout) -> None:
        """Passed on; texts go to no service."""
        self._progress.sample(prompt, rollout)

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Passed on, and sent."""
        self._progress.evaluation(step, result)
        self._send(step, dict(numbers(result, "evaluation/")))

    def paused(self) -> AbstractContextManager[None]:
        """Passed on."""
        return self._progress.paused()


def _installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder of that name, such as wandb makes, has no origin


class _Pipe:
    """One service's process, and the lines that it has not taken yet."""

    def __init__(self, name: str, about: Mapping[str, Any], log: Path) -> None:
        self.name = name
        self.log = log
        self._said = False
        self._waiting = b""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                # -P: nothing in the current folder passes for a package.  A session of its own: Ctrl-C is not for it.
                [sys.executable, "-P", "-c", "from vpd_mlx.report.services import main; main()"],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        os.set_blocking(self._stdin.fileno(), False)
        self.send({"service": name, **about})

    @property
    def going(self) -> bool:
        """Whether the process is there; what waits for it is sent on."""
        self._flush()
        return self._process.poll() is None

    def send(self, row: Mapping[str, Any]) -> None:
        """Put a line on its way, without waiting for anybody."""
        self._waiting += json.dumps(row, default=str).encode() + b"\n"
        self._flush()

    def end(self) -> None:
        """No more lines come once those that wait are taken."""
        self._ending = True
        self._flush()

    _ending = False

    def _flush(self) -> None:
        if self._stdin.closed:
            return
        try:
            while self._waiting:
                taken = os.write(self._stdin.fileno(), self._waiting)
                self._waiting = self._waiting[taken:]
        except BlockingIOError:
            return  # the pipe is full: the rest goes with the next line
        except BrokenPipeError:
            self._waiting = b""  # the process has ended; `failure` says why
        if self._ending:
            self._stdin.close()

    def failure(self) -> str | None:
        """Why the process ended before its time, once."""
        code = self._process.poll()
        if code in (None, 0) or self._said:
            return None
        self._said = True
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        lines = text.strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {code}"


# --- in a service's process


def _wandb(about: Mapping[str, Any]) -> Service:
    wandb: Any = importlib.import_module("wandb")
    run = wandb.init(**_named(about), id=about["id"], resume="allow", dir=about["folder"])
    return lambda step, values: run.log(dict(values), step=step), run.finish


def _swanlab(about: Mapping[str, Any]) -> Service:
    swanlab: Any = importlib.import_module("swanlab")
    folder = Path(about["folder"]) / "swanlab"
    folder.mkdir(exist_ok=True)
    swanlab.init(**_named(about), id=about["id"], resume="allow", log_dir=str(folder))
    return lambda step, values: swanlab.log(dict(values), step=step), swanlab.finish


def _trackio(about: Mapping[str, Any]) -> Service:
    trackio: Any = importlib.import_module("trackio")
    own = {**_named(about), "name": f"{about['name']}-{about['id'][:6]}"}  # it knows runs by name alone
    trackio.init(**own, resume="allow", auto_log_cpu=False, auto_log_gpu=False)
    return lambda step, values: trackio.log(dict(values), step=step), trackio.finish


def _tensorboard(about: Mapping[str, Any]) -> Service:
    writer = importlib.import_module("tensorboardX").SummaryWriter(str(Path(about["folder"]) / "tensorboard"))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _named(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: about[key] for key in ("project", "name", "config")}


SERVICES: Mapping[str, Callable[[Mapping[str, Any]], Service]] = {
    "wandb": _wandb,
    "swanlab": _swanlab,
    "trackio": _trackio,
    "tensorboard": _tensorboard,
}


def main() -> None:
    """Read from standard input what the run is about, then its figures line by line until it ends."""
    about = json.loads(sys.stdin.readline())
    log, finish = SERVICES[about["service"]](about)
    for line in sys.stdin:
        row = json.loads(line)
        log(row["step"], row["values"])
    signal.alarm(LIFETIME)  # nobody waits any more: do not hang about for ever
    finish()
