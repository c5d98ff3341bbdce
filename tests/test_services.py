"""Services outside: they get a run's numbers, and nothing that they do reaches the run."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from vpd_mlx.common.files import read_rows
from vpd_mlx.errors import ConfigError
from vpd_mlx.recipe import LoggingSettings, load_recipe
from vpd_mlx.report import services as loggers
from vpd_mlx.report.services import MODULES, SERVICES, Told, numbers
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Silent

# Each service's module, as far as it is used, written by its own documentation: what is called lands in a file.
FAKE = """
import json, os, sys, time

def tell(what, **values):
    with open(os.environ["FAKE_LOG"], "a") as f:
        f.write(json.dumps([NAME, what, values]) + "\\n")

class Run:
    def log(self, values, step):
        tell("log", step=step, values=values)
    def finish(self):
        tell("finish")

def init(**how):
    print("a line that a service prints")
    tell("init", **how, tty=sys.stdin.isatty())
    return Run()

log, finish = Run().log, Run().finish

class SummaryWriter:
    def __init__(self, folder):
        tell("init", folder=folder)
    def add_scalar(self, name, value, step):
        tell("log", step=step, values={name: value})
    def flush(self):
        pass
    def close(self):
        tell("finish")
"""


class Watcher(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: int, *_: Any) -> None:
        self.steps.append(step)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a module in the place of a service's, with lines of one's own behind it; returns what was called."""
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls.jsonl"))

    def write(name: str, extra: str = "") -> None:
        module = MODULES[name]
        (tmp_path / "modules" / f"{module}.py").write_text(f"NAME = {name!r}\n{FAKE}\n{extra}\n")

    def calls(name: str) -> list[tuple[str, dict[str, Any]]]:
        return [(what, values) for who, what, values in read_rows(tmp_path / "calls.jsonl") if who == name]

    write.calls = calls
    return write


def told(tmp_path: Path, *to: str) -> tuple[Told, Watcher]:
    watcher = Watcher()
    found = Told(watcher, LoggingSettings(to=list(to), project="p"))  # type: ignore[arg-type]
    (tmp_path / "run").mkdir(exist_ok=True)
    found.open(tmp_path / "run", {"steps": 2})
    return found, watcher


def test_numbers_are_the_finite_ones_by_path():
    row = {
        "step": 3,
        "reward": 0.5,
        "m_step/kl": float("nan"),
        "contexts": {"sibling": 2},
        "student_interval": (0.1, 0.2),
        "greedy_by_problem": {"47+38": 1.0},
        "on": True,
        "none": None,
    }
    assert dict(numbers(row)) == {"reward": 0.5, "contexts/sibling": 2.0}
    assert dict(numbers({"gap": 1}, "evaluation/")) == {"evaluation/gap": 1.0}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gets_recipe_steps_and_evaluations(name: str, fake, tmp_path: Path):
    fake(name)
    it, watcher = told(tmp_path, name)
    it.evaluation(0, {"student": 0.25, "greedy_by_problem": {"a": 1.0}})
    it.step(1, 2, {"step": 1, "reward": 0.5, "seconds": {"rollout": 2.0}}, 1.0)
    it.close()
    assert watcher.notes == []
    assert watcher.steps == [1]
    (kind, how), *logged, last = fake.calls(name)
    assert (kind, last) == ("init", ("finish", {}))
    values: dict[int, dict[str, float]] = {}
    for _, call in logged:
        values.setdefault(call["step"], {}).update(call["values"])
    assert values == {0: {"evaluation/student": 0.25}, 1: {"reward": 0.5, "seconds/rollout": 2.0}}
    if name == "tensorboard":
        assert how["folder"] == str(tmp_path / "run" / "tensorboard")
    else:
        assert (how["project"], how["config"], how["tty"]) == ("p", {"steps": 2}, False)
        assert how["name"].startswith("run")
        assert "a line that a service prints" in (tmp_path / "run" / "logging" / f"{name}.log").read_text()


def test_a_resumed_run_goes_on_under_its_id(fake, tmp_path: Path):
    fake("wandb")
    for _ in range(2):
        told(tmp_path, "wandb")[0].close()
    ids = [call["id"] for what, call in fake.calls("wandb") if what == "init"]
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert [call["resume"] for what, call in fake.calls("wandb") if what == "init"] == ["allow", "allow"]


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ("def init(**how): raise RuntimeError('no API key configured')", "RuntimeError: no API key configured"),
        ("def init(**how): sys.exit('log in first')", "log in first"),
        ("def init(**how): os.abort()", "exit code -6"),
        ("Run.log = lambda self, values, step: 1 / 0", "ZeroDivisionError"),
        ("Run.finish = lambda self: [][0]", "IndexError"),
    ],
    ids=["init", "exit", "crash", "log", "finish"],
)
def test_a_failure_is_one_note(extra: str, why: str, fake, tmp_path: Path):
    fake("wandb", extra)
    fake("trackio")
    it, watcher = told(tmp_path, "wandb", "trackio")
    for step in range(1, 6):
        it.step(step, 5, {"reward": 0.5}, 1.0)
        time.sleep(0.05)
    it.close()
    assert len(watcher.notes) == 1
    assert watcher.notes[0].startswith("wandb gets no more figures")
    assert why in watcher.notes[0]
    assert "wandb.log" in watcher.notes[0]
    assert watcher.steps == [1, 2, 3, 4, 5]
    assert [v["step"] for what, v in fake.calls("trackio") if what == "log"] == [1, 2, 3, 4, 5]


def test_one_that_hangs_is_never_waited_for(fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loggers, "PATIENCE", 0.2)
    fake("wandb", "def init(**how): time.sleep(3600)")
    it, watcher = told(tmp_path, "wandb")
    start = time.monotonic()
    for step in range(200):  # far more than a pipe holds
        it.step(step, 200, {f"metric/{i}": 0.5 for i in range(100)}, 1.0)
    it.close()
    assert time.monotonic() - start < 3
    assert "wandb is still sending" in watcher.notes[0]
    process = it._pipes[0]._process
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_flood_arrives_whole(fake, tmp_path: Path):
    fake("wandb", "_init = init\ndef init(**how):\n    time.sleep(0.5)\n    return _init(**how)")
    it, watcher = told(tmp_path, "wandb")
    for step in range(200):
        it.step(step, 200, {f"metric/{i}": 0.5 for i in range(50)}, 1.0)
    it.close()
    assert watcher.notes == []
    assert [v["step"] for what, v in fake.calls("wandb") if what == "log"] == list(range(200))


def test_a_process_that_cannot_be_had_is_a_note(fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake("wandb")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(loggers.subprocess, "Popen", refuse)
    it, watcher = told(tmp_path, "wandb")
    it.step(1, 2, {"reward": 0.5}, 1.0)
    it.close()
    assert watcher.notes == [
        "logging.to: no more services can be started (Cannot allocate memory); the run goes on without"
    ]


def test_a_missing_package_is_told_before_anything_is_written(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODULES, "wandb", "no_such_module_here")
    with pytest.raises(ConfigError, match=r"logging.to: wandb needs .*; pip install 'vpd-mlx\[wandb\]'"):
        train(small(logging__to=["wandb"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "folder_not_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(MODULES, "wandb", "folder_not_package")
    with pytest.raises(ConfigError):
        Told(Silent(), LoggingSettings(to=["wandb"]))


def test_a_run_learns_the_same_with_and_without(small, fake, tmp_path: Path):
    fake("wandb", "Run.log = lambda self, values, step: os._exit(3)")
    fake("trackio")
    train(small(), tmp_path / "a")
    train(small(logging__to=["wandb", "trackio"]), tmp_path / "b")
    adapters = [(tmp_path / n / "adapters" / "adapters.safetensors").read_bytes() for n in "ab"]
    assert adapters[0] == adapters[1]
    logged = {v["step"]: v["values"] for what, v in fake.calls("trackio") if what == "log"}
    rows = read_rows(tmp_path / "b" / "metrics.jsonl")
    assert logged[1]["reward"] == rows[0]["reward"]
    config = next(v["config"] for what, v in fake.calls("trackio") if what == "init")
    assert config["steps"] == 2
    assert not (tmp_path / "a" / "logging").exists()


def test_a_service_named_twice_and_one_that_is_none(own_task):
    with pytest.raises(ConfigError, match="names a service twice"):
        load_recipe(own_task(extra="logging: {to: [wandb, wandb]}\n"))
    with pytest.raises(ConfigError, match="wandbb"):
        load_recipe(own_task(extra="logging: {to: [wandbb]}\n"))


def test_tensorboard_for_real(tmp_path: Path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    it, watcher = told(tmp_path, "tensorboard")
    it.step(1, 2, {"reward": 0.25}, 1.0)
    it.step(2, 2, {"reward": 0.75}, 1.0)
    it.close()
    assert watcher.notes == []
    (path,) = (tmp_path / "run" / "tensorboard").glob("events*")
    data, found = path.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        size = struct.unpack("<Q", data[:8])[0]
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + size :]
    assert found == [(1, "reward", 0.25), (2, "reward", 0.75)]
    assert json.loads((tmp_path / "run" / "logging" / "id").read_text().join('""'))
