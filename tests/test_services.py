"""Logging services follow the run folder: they get a run's numbers, and nothing that they do reaches the run."""

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
from vpd_mlx.report.services import SERVICES, follow, numbers
from vpd_mlx.run import followers as followers_module
from vpd_mlx.run.followers import MODULES, Followers
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Silent, Stop

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

    def note(self, text: str) -> None:
        self.notes.append(text)


class Written:
    """A run folder that a test writes, followed by services."""

    def __init__(self, tmp_path: Path, *to: str) -> None:
        self.folder = tmp_path / "run"
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.yaml").write_text("steps: 2\nlogging: {project: p}\n")
        self.watcher = Watcher()
        self.followers = Followers(LoggingSettings(to=list(to), project="p"), self.watcher)  # type: ignore[arg-type]
        self.followers.start(self.folder)

    @property
    def notes(self) -> list[str]:
        return self.watcher.notes

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as f:
            f.write(json.dumps(row) + "\n")
        self.followers.check()

    def step(self, step: int, **figures: Any) -> None:
        self._append("metrics.jsonl", {"step": step, **figures})

    def evaluation(self, step: int, **figures: Any) -> None:
        self._append("evals.jsonl", {"step": step, **figures})

    def close(self) -> None:
        self.followers.close()


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


def test_numbers_are_the_finite_ones_by_path():
    row = {
        "step": 3,
        "reward": 0.5,
        "student/kl": float("nan"),
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
    run = Written(tmp_path, name)
    run.evaluation(0, student=0.25, greedy_by_problem={"a": 1.0})
    run.step(1, reward=0.5, seconds={"rollout": 2.0})
    run.close()
    assert run.notes == []
    (kind, how), *logged, last = fake.calls(name)
    assert (kind, last) == ("init", ("finish", {}))
    values: dict[int, dict[str, float]] = {}
    for _, call in logged:
        values.setdefault(call["step"], {}).update(call["values"])
    assert values == {0: {"evaluation/student": 0.25}, 1: {"reward": 0.5, "seconds/rollout": 2.0}}
    if name == "tensorboard":
        assert how["folder"] == str(run.folder / "tensorboard")
    else:
        assert (how["project"], how["tty"]) == ("p", False)
        assert how["config"]["steps"] == 2
        assert how["name"].startswith("run")
        assert "a line that a service prints" in (run.folder / "logging" / f"{name}.log").read_text()


def steps_logged(fake, name: str) -> list[int]:
    return [v["step"] for what, v in fake.calls(name) if what == "log"]


def test_a_resumed_run_goes_on_under_its_id_and_sends_nothing_twice(fake, tmp_path: Path):
    fake("wandb")
    first = Written(tmp_path, "wandb")
    for step in (1, 2, 3):
        first.step(step, reward=0.5)
    first.close()
    metrics = first.folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))  # back to the checkpoint of step 1
    second = Written(tmp_path, "wandb")
    for step in (2, 3, 4):
        second.step(step, reward=0.5)
    second.close()
    starts = [call for what, call in fake.calls("wandb") if what == "init"]
    assert len({call["id"] for call in starts}) == 1
    assert [call["resume"] for call in starts] == ["allow", "allow"]
    assert steps_logged(fake, "wandb") == [1, 2, 3, 4]


def test_what_a_failed_service_missed_is_sent_after_a_resume(fake, tmp_path: Path):
    fake("wandb", "Run.log = lambda self, values, step: 1 / 0")
    first = Written(tmp_path, "wandb")
    first.step(1, reward=0.5)
    first.close()
    fake("wandb")
    second = Written(tmp_path, "wandb")
    second.step(2, reward=0.5)
    second.close()
    assert steps_logged(fake, "wandb") == [1, 2]


def test_rows_come_in_the_order_of_steps(tmp_path: Path):
    over = [False]
    found = follow(tmp_path, lambda: over[0])
    (tmp_path / "evals.jsonl").write_text('{"step": 0, "student": 0.1}\n{"step": 2, "student": 0.2}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "m_step/student_entropy": 0.5}\n{"step": 2, "rew')
    assert [next(found), next(found)] == [
        (0, "evals", {"evaluation/student": 0.1}),
        (1, "metrics", {"student/entropy": 0.5}),
    ]
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('ard": 1}\n')
    over[0] = True
    assert list(found) == [(2, "metrics", {"reward": 1.0}), (2, "evals", {"evaluation/student": 0.2})]


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
    run = Written(tmp_path, "wandb", "trackio")
    for step in range(1, 6):
        run.step(step, reward=0.5)
        time.sleep(0.05)
    run.close()
    assert len(run.notes) == 1
    assert run.notes[0].startswith("wandb gets no more figures")
    assert why in run.notes[0]
    assert "wandb.log" in run.notes[0]
    assert steps_logged(fake, "trackio") == [1, 2, 3, 4, 5]


def test_one_that_hangs_is_never_waited_for(fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(followers_module, "PATIENCE", 0.2)
    fake("wandb", "def init(**how): time.sleep(3600)")
    run = Written(tmp_path, "wandb")
    start = time.monotonic()
    for step in range(200):
        run.step(step, **{f"metric/{i}": 0.5 for i in range(100)})
    run.close()
    assert time.monotonic() - start < 3
    assert "wandb is still sending" in run.notes[0]
    process = run.followers._followers[0].process
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_flood_arrives_whole(fake, tmp_path: Path):
    fake("wandb", "_init = init\ndef init(**how):\n    time.sleep(0.5)\n    return _init(**how)")
    run = Written(tmp_path, "wandb")
    for step in range(200):
        run.step(step, **{f"metric/{i}": 0.5 for i in range(50)})
    run.close()
    assert run.notes == []
    assert steps_logged(fake, "wandb") == list(range(200))


def test_a_service_ends_with_a_run_that_is_killed(fake, tmp_path: Path):
    fake("wandb")
    run = Written(tmp_path, "wandb")
    run.step(1, reward=0.5)
    process = run.followers._followers[0].process
    assert process.stdin is not None
    process.stdin.close()  # as the system does when a process dies
    assert process.wait(timeout=20) == 0
    assert fake.calls("wandb")[-1] == ("finish", {})


def test_a_process_that_cannot_start_is_a_note(fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake("wandb")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(followers_module.subprocess, "Popen", refuse)
    run = Written(tmp_path, "wandb")
    run.step(1, reward=0.5)
    run.close()
    assert run.notes == [
        "logging.to: no more services can be started (Cannot allocate memory); the run goes on without them"
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
        Followers(LoggingSettings(to=["wandb"]), Silent())


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


def test_a_stopped_run_sends_each_step_once(small, fake, tmp_path: Path):
    fake("trackio")

    class StopAfterOne(Silent):
        def step(self, step: int, *_: Any) -> None:
            stop.signal = 15 if step == 1 else None

    stop, recipe = Stop(), small(steps=3, logging__to=["trackio"], evaluation__every=1)
    train(recipe, tmp_path / "run", progress=StopAfterOne(), stop=stop)
    train(recipe, tmp_path / "run", resume=True)
    logged = [v for what, v in fake.calls("trackio") if what == "log"]
    assert [v["step"] for v in logged if "reward" in v["values"]] == [1, 2, 3]
    assert [v["step"] for v in logged if "evaluation/student" in v["values"]] == [0, 1, 2, 3]


def test_a_service_named_twice_and_one_that_is_none(own_task):
    with pytest.raises(ConfigError, match="names a service twice"):
        load_recipe(own_task(extra="logging: {to: [wandb, wandb]}\n"))
    with pytest.raises(ConfigError, match="wandbb"):
        load_recipe(own_task(extra="logging: {to: [wandbb]}\n"))


def test_tensorboard_for_real(tmp_path: Path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    run = Written(tmp_path, "tensorboard")
    run.step(1, reward=0.25)
    run.step(2, reward=0.75)
    run.close()
    assert run.notes == []
    (path,) = (tmp_path / "run" / "tensorboard").glob("events*")
    data, found = path.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        size = struct.unpack("<Q", data[:8])[0]
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + size :]
    assert found == [(1, "reward", 0.25), (2, "reward", 0.75)]
    assert json.loads((tmp_path / "run" / "logging" / "id").read_text().join('""'))
