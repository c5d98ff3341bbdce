"""Starts the processes that follow a run folder and send its figures to logging services, and ends them with the run.

Each service has a process of its own, which reads the run's files: `vpd_mlx.report.services`. So nothing that a service does
reaches the training: no prompt for a password, no line in `--json`, no signal handler, no crash, no wait. What a service prints
stands in `logging/<service>.log` of the run folder; if it fails, one note says so and the run goes on.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from vpd_mlx.errors import ConfigError, Fault
from vpd_mlx.recipe import LoggingSettings
from vpd_mlx.run.progress import Progress

__all__ = ["LIFETIME", "MODULES", "Followers"]

MODULES = {"wandb": "wandb", "swanlab": "swanlab", "trackio": "trackio", "tensorboard": "tensorboardX"}
PATIENCE = 10.0  # seconds for which the end of a run waits until everything is sent
LIFETIME = 600  # seconds for which a service may go on sending by itself after that


@dataclass
class _Follower:
    """One service's process. Its standard input carries nothing; that it closes says that the run is over."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    noted: bool = False

    def failure(self) -> str | None:
        """Why the process ended before its time, once."""
        code = self.process.poll()
        if code in (None, 0) or self.noted:
            return None
        self.noted = True
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {code}"


class Followers:
    """The processes of the services that a recipe names."""

    def __init__(self, settings: LoggingSettings, progress: Progress) -> None:
        """Nothing is started yet.

        Raises:
            ConfigError: a service's package is not installed.
        """
        faults = [
            Fault("logging.to", f"{name} needs the package {MODULES[name]}", f"pip install 'vpd-mlx[{name}]'")
            for name in settings.to
            if not _installed(MODULES[name])
        ]
        if faults:
            raise ConfigError(faults)
        self._settings = settings
        self._progress = progress
        self._followers: list[_Follower] = []

    def start(self, folder: Path) -> None:
        """Start a process for each service, once the run's logs are cut back to where the run stands."""
        if not self._settings.to:
            return
        try:
            logging = folder.resolve() / "logging"
            logging.mkdir(exist_ok=True)
            if not (logging / "id").exists():
                (logging / "id").write_text(uuid.uuid4().hex[:21], encoding="utf-8")  # the same after a resume
            for name in self._settings.to:
                self._followers.append(_start(name, folder.resolve(), logging / f"{name}.log"))
        except OSError as error:
            self._progress.note(f"logging.to: no more services can be started ({error}); the run goes on without them")

    def check(self) -> None:
        """Note each service that has failed, once."""
        for follower in self._followers:
            if (reason := follower.failure()) is not None:
                problem = f"{follower.name} gets no more figures ({reason})"
                self._progress.note(f"{problem}; the run goes on, see {follower.log}")

    def close(self) -> None:
        """The run is over: wait a little for the services, then leave the rest to them."""
        for follower in self._followers:
            if follower.process.stdin is not None:
                follower.process.stdin.close()
        deadline = time.monotonic() + PATIENCE
        while (
            sending := [f.name for f in self._followers if f.process.poll() is None]
        ) and time.monotonic() < deadline:
            self._progress.phase(f"sending to {', '.join(sending)}")
            time.sleep(0.05)
        self.check()
        for name in sending:
            self._progress.note(f"{name} is still sending; it ends by itself within {LIFETIME // 60} minutes")


def _installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a folder of that name, such as wandb makes, has no origin


def _start(name: str, folder: Path, log: Path) -> _Follower:
    with log.open("wb") as out:
        process = subprocess.Popen(
            # -P: nothing in the current folder passes for a package. A session of its own: Ctrl-C is not for it.
            [sys.executable, "-P", "-m", "vpd_mlx.report.services", str(folder), name],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            start_new_session=True,
        )
    return _Follower(name, process, log)
