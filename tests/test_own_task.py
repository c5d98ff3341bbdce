"""A newcomer's way: new, verify, data check, train."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

import vpd_mlx
from vpd_mlx.commands.app import app
from vpd_mlx.common.files import read_rows
from vpd_mlx.common.settings import parse_yaml
from vpd_mlx.errors import ConfigError, DataError
from vpd_mlx.recipe import builtin_recipes, json_schema, load_recipe
from vpd_mlx.tasks import build_task
from vpd_mlx.tasks.python_file import Function, FunctionSettings
from vpd_mlx.types import MOST_TEXT, Verdict

RUNNER = CliRunner()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, ["new", "mine"])
    assert result.exit_code == 0, result.output
    assert "vpd-mlx train mine/mine.yaml" in result.output
    return tmp_path / "mine" / "mine.yaml"


def test_new_runs_as_it_is(mine: Path):
    result = RUNNER.invoke(app, ["train", str(mine), "--steps", "2", "--out", "run"])
    assert result.exit_code == 0, result.output
    rows = read_rows(Path("run/rollouts.jsonl"))
    assert {r["verdict"] for r in rows} >= {"hundreds missing"}
    again = RUNNER.invoke(app, ["new", "mine"])
    assert isinstance(again.exception, ConfigError)
    assert "holds something already" in str(again.exception)
    assert isinstance(RUNNER.invoke(app, ["new", "a b"]).exception, ConfigError)


def test_the_recipe_names_a_schema_by_which_an_editor_checks_it(mine: Path):
    first, text = mine.read_text().splitlines()[0], mine.read_text()
    named = mine.parent / first.removeprefix("# yaml-language-server: $schema=")
    check = Draft202012Validator(json.loads(named.read_text()))
    assert not [*check.iter_errors(parse_yaml(text, ""))]
    for wrong in ("steps: 20", "group_size: 4", "kind: python"):
        broken = parse_yaml(text.replace(wrong, f"{wrong}x"), "")
        assert [*check.iter_errors(broken)], wrong
    assert [*check.iter_errors(parse_yaml(text.replace("optimizer:", "optimiser:"), ""))]


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_that_ships_fits_the_schema(name: str):
    check = Draft202012Validator(json_schema())
    assert not [*check.iter_errors(parse_yaml(builtin_recipes()[name].read_text(), name))]


def test_verify_prints_verdict_and_context(mine: Path, tmp_path: Path):
    good = json.loads(RUNNER.invoke(app, ["verify", "--recipe", str(mine)]).output)
    assert (good["score"], good["success"], good["context"]) == (1.0, True, None)
    row = read_rows(mine.parent / "rows.jsonl")[0]
    name = "rows.jsonl:1"
    bad = RUNNER.invoke(app, ["verify", "-r", str(mine), "--problem", name, "--completion", "-"], input="75")
    out = json.loads(bad.output)
    assert row["prompt"] == "47+38="
    assert (out["score"], out["completion"], out["expected"]) == (0.0, "75", "85")
    assert out["context"] == {"kind": "verifier", "text": "tens too low"}
    assert out["left_out"] == {"sibling": "needs the other completions of the group"}
    (tmp_path / "answer.txt").write_text("85\n")
    right = RUNNER.invoke(app, ["verify", "-r", str(mine), "--problem", name, "--completion", "answer.txt"])
    assert json.loads(right.output)["success"]
    for arguments, words in ((["--problem", "x"], "no problem 'x'"), (["--completion", "nowhere"], "cannot be read")):
        refused = RUNNER.invoke(app, ["verify", "-r", str(mine), *arguments])
        assert isinstance(refused.exception, DataError)
        assert words in str(refused.exception)
    (mine.parent / "verifier.py").write_text("def verify(problem, completion): raise OSError('no checker here')\n")
    broken = RUNNER.invoke(app, ["verify", "-r", str(mine)])
    assert broken.exit_code == 1
    assert json.loads(broken.output)["score"] is None
    assert "no checker here" in json.loads(broken.output)["error"]


def test_verify_chooses_the_context_as_training_does(mine: Path, tmp_path: Path):
    critic, said = tmp_path / "critic.py", tmp_path / "said.jsonl"
    wrong = [*["verify", "--problem", "rows.jsonl:1", "--completion", "-", "--recipe"], str(mine), "--set"]

    def feedback(sources: str) -> dict:
        result = RUNNER.invoke(app, [*wrong, f"feedback={{sources: {sources}, max_tokens: 32}}"], input="75")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    critic.write_text(
        "import json\nq = json.loads(input())\nprint(json.dumps({'id': q['id'], 'feedback': q['answer']}))\n"
    )
    program = f"[command, verifier], command: [{sys.executable}, {critic}]"
    assert feedback(program)["context"] == {"kind": "command", "text": "85"}
    critic.write_text("print('what?')\n")
    failed = feedback(program)
    assert failed["context"] == {"kind": "verifier", "text": "tens too low"}
    assert "not JSON" in failed["failed"]["command"]
    said.write_text('{"problem": "rows.jsonl:1", "feedback": "carry"}\n')
    assert feedback(f"[reference, replay], replay: {said}")["context"] == {"kind": "replay", "text": "carry"}
    others = feedback("[server, critique, human], server: {url: 'http://127.0.0.1:9'}")
    assert others["context"] is None
    assert list(others["left_out"]) == ["server", "critique", "human"]


def test_data_check_counts_and_refuses(mine: Path):
    result = RUNNER.invoke(app, ["data", "check", str(mine)])
    assert result.exit_code == 0, result.output
    for words in (
        "rows: ",
        "reference answers: 10 of 10",
        "feedback source `reference`: 0 of 10",
        "prompt tokens: ",
        "limit 64",
        "duplicates: 0",
    ):
        assert words in result.output
    rows = mine.parent / "rows.jsonl"
    whole = rows.read_text()
    rows.write_text(whole + '{"prompt": "' + "9" * 80 + '=", "answer": "1"}\n')
    long = RUNNER.invoke(app, ["data", "check", str(mine)])
    assert re.search(
        r"rows.jsonl:11: its prompt has \d+ tokens, more than rollout.max_prompt_tokens 64", str(long.exception)
    )
    rows.write_text(whole + '{"prompt": "1+1=", "answer": 2')
    assert "rows.jsonl:11: broken JSON" in str(RUNNER.invoke(app, ["data", "check", str(mine)]).exception)
    rows.write_text(whole + '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+1=", "answer": "3"}\n')
    twice = str(RUNNER.invoke(app, ["data", "check", str(mine)]).exception)
    assert "has the same prompt with" in twice
    assert "'2'" in twice
    assert "'3'" in twice
    for value, words in (("NaN", "is nan; it must be text or a finite number"), ("true", "is a bool")):
        rows.write_text(whole + f'{{"prompt": "1+1=", "answer": {value}}}\n')
        assert words in str(RUNNER.invoke(app, ["data", "check", str(mine)]).exception)
    (mine.parent / "verifier.py").write_text("def verify(problem, completion): return 0.25\n")
    rows.write_text(whole)
    every = RUNNER.invoke(app, ["data", "check", str(mine)])
    assert sorted(int(line.split(":")[1]) for line in every.output.splitlines()) == list(range(1, 11))
    assert every.output.count("scores 0.25, not 1") == 10
    assert "10 of 10 rows fail, as listed; fix the rows or the verifier" in str(every.exception)


def test_the_recipe_is_commented_and_sound(mine: Path):
    text = mine.read_text()
    assert text.count("#") > 12
    assert load_recipe(mine).task.kind == "python"


def test_a_verifier_that_leaves_is_a_verifier_that_failed(mine: Path):
    verifier = mine.parent / "verifier.py"
    verifier.write_text("import sys\ndef verify(problem, completion): sys.exit(0)\n")
    left = RUNNER.invoke(app, ["verify", "-r", str(mine)])
    assert left.exit_code == 1
    assert "SystemExit: 0 (verifier.py:2)" in json.loads(left.output)["error"]
    assert "the verifier failed" in str(RUNNER.invoke(app, ["train", str(mine)]).exception)
    verifier.write_text("raise SystemExit(0)\n")
    assert "cannot be imported (SystemExit" in str(RUNNER.invoke(app, ["verify", "-r", str(mine)]).exception)


def test_a_verifier_may_import_what_lies_beside_it_and_print(mine: Path):
    (mine.parent / "beside_the_verifier.py").write_text("def same(a, b): return a == b\n")
    (mine.parent / "verifier.py").write_text(
        "import beside_the_verifier\n"
        "def verify(problem, completion):\n"
        "    print('looking')\n"
        "    return beside_the_verifier.same(completion.strip(), problem.answer)\n"
    )
    found = RUNNER.invoke(app, ["verify", "-r", str(mine)])
    assert json.loads(found.stdout)["score"] == 1.0
    assert "looking" in found.stderr
    trained = RUNNER.invoke(app, ["train", str(mine), "--steps", "1", "--out", "run", "--json"])
    assert json.loads(trained.stdout)["steps"] == 1
    assert json.loads(RUNNER.invoke(app, ["eval", "run", "--json", "--greedy"]).stdout)["problems"] > 0


HANGS = """
import time
def verify(problem, completion):
    if completion.strip() != problem.answer and problem.id in open("rows").read().split():
        open("hangs", "w").close()
        time.sleep(600)
    return 1.0
"""


ENV = {**os.environ, "PYTHONPATH": str(Path(vpd_mlx.__file__).parents[1])}


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_ends_a_run_though_the_verifier_hangs(mine: Path, signals: int):
    (mine.parent / "verifier.py").write_text(HANGS)
    Path("rows").write_text(
        " ".join(p.id for p in build_task(load_recipe(mine)).train)
    )  # an evaluation is never cut short
    command = [sys.executable, "-m", "vpd_mlx", "train", str(mine), "--out", "run", "-q"]
    with subprocess.Popen(command, env=ENV) as process:
        wait_for(lambda: Path("hangs").exists() or process.poll() is not None)
        assert process.poll() is None
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        try:
            assert process.wait(30) == 128 + signal.SIGINT
        finally:
            process.kill()


SLOW = """
import ctypes, os, time
answers = []
def verify(problem, completion):
    answers.append(completion)
    match completion:
        case "sleeps": time.sleep(60)
        case "holds": ctypes.PyDLL(None).sleep(60)  # a C function that keeps all of Python waiting
        case "dies": os._exit(7)
        case "beside": time.sleep(1)
        case "long": return 0.5, "\\ud800" + "x" * 5_000_000
        case "count": return 1.0, str(len(answers))
    return 1.0
"""


def test_a_verifier_has_a_time_limit_that_holds_against_c_code(mine: Path):
    (mine.parent / "verifier.py").write_text(SLOW)
    task = build_task(load_recipe(mine, [("task.timeout", 1.5)]))
    problem = task.train[0]
    (mine.parent / "verifier.py").write_text("raise OSError")  # read once
    assert task.verify(problem, "count") == Verdict(1.0, "1")
    with ThreadPoolExecutor(2) as pool:
        for name in ("sleeps", "holds"):
            start = time.monotonic()
            hangs = pool.submit(task.verify, problem, name)
            time.sleep(0.8)
            beside = pool.submit(task.verify, problem, "beside")
            assert hangs.result().error == "took longer than 1.5 s; mend it, or raise task.timeout"
            assert beside.result() == Verdict(1.0)  # asked again of the next process
            assert time.monotonic() - start < 15
    assert task.verify(problem, "dies").error == "its process ended with status 7"
    verdict = task.verify(problem, "long")
    assert (verdict.score, len(verdict.text), verdict.text[:2]) == (0.5, MOST_TEXT, "?x")
    assert [task.verify(problem, "count").text for _ in range(2)] == ["2", "3"]  # one process keeps its state


def test_a_verifiers_process_does_not_outlive_a_run_that_is_killed(mine: Path):
    (mine.parent / "verifier.py").write_text(
        "import os, sys, time\nsys.stdout.fileno(), sys.stderr.encoding\n"
        "def verify(problem, completion):\n    open('pid', 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
    )
    code = (
        "from pathlib import Path; from vpd_mlx.recipe import load_recipe; from vpd_mlx.tasks import build_task, prove; "
        f"prove(build_task(load_recipe(Path({str(mine)!r}))))"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=ENV) as process:
        wait_for(lambda: Path("pid").exists() and Path("pid").read_text() != "")
        process.kill()
    pid = int(Path("pid").read_text())
    wait_for(lambda: subprocess.run(["ps", "-p", str(pid)], stdout=subprocess.DEVNULL, check=False).returncode != 0)


def test_a_function_has_a_time_limit(mine: Path):
    cfg = FunctionSettings(
        kind="function", function="f", fingerprint="", data=str(mine.parent / "rows.jsonl"), timeout=0.3
    )
    task = Function(cfg, lambda problem, completion: time.sleep(float(completion)) or 1.0)
    assert task.verify(task.train[0], "0") == Verdict(1.0)
    assert task.verify(task.train[0], "5").error == "took longer than 0.3 s; mend it, or raise task.timeout"


def test_a_hanging_verifier_is_an_error_with_row_and_seconds(mine: Path):
    (mine.parent / "verifier.py").write_text("import time\ndef verify(problem, completion): time.sleep(60)\n")
    found = RUNNER.invoke(app, ["train", str(mine), "--set", "task.timeout=0.5"])
    assert re.fullmatch(
        r"row rows.jsonl:\d+: the verifier failed on the reference answer '\d+': took longer than 0.5 s; mend it, or raise "
        "task.timeout; fix the row or the verifier",
        str(found.exception),
    )


def test_nothing_to_learn_from_is_told_before_training(mine: Path):
    alone = ["--set", "feedback.sources=[reference]"]
    refused = RUNNER.invoke(app, ["train", str(mine), *alone])
    assert "no row has a reference solution in its column 'reference'" in str(refused.exception)


def test_rows_that_changed_are_told_on_resume_and_trained_ones_refused(mine: Path):
    assert RUNNER.invoke(app, ["train", str(mine), "--steps", "2", "--out", "run", "-q"]).exit_code == 0
    resume = ["train", "--resume", "run", "--steps", "3"]
    rows = mine.parent / "rows.jsonl"
    trained = json.loads(Path("run/rollouts.jsonl").read_text().splitlines()[0])["prompt"]
    left = [line for line in rows.read_text().splitlines() if json.loads(line)["prompt"] != trained]
    rows.write_text("\n".join(left) + "\n")
    Path("held.jsonl").write_text(json.dumps({"prompt": trained, "answer": "1"}) + "\n")
    leak = RUNNER.invoke(app, ["eval", "run", "--data", "held.jsonl"])
    assert "row held.jsonl:1: run was trained on this prompt" in str(leak.exception)
    found = RUNNER.invoke(app, resume)
    assert found.exit_code == 0
    assert "the task's rows or its verifier have changed" in found.output


def test_overwrite_without_out_replaces_the_run_of_that_name(mine: Path):
    for more in ([], ["--overwrite"]):
        assert RUNNER.invoke(app, ["train", str(mine), "--steps", "1", "-q", *more]).exit_code == 0
    assert [p.name for p in Path("runs").iterdir()] == ["mine"]
    assert RUNNER.invoke(app, ["train", str(mine), "--steps", "1", "-q"]).exit_code == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["mine", "mine-2"]
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    taken = RUNNER.invoke(app, ["train", str(mine), "--out", "other"])
    assert str(taken.exception) == "other: holds other files already; give another --out"
    fewer = RUNNER.invoke(app, ["train", "--resume", "runs/mine", "--steps", "2"])
    assert fewer.exit_code == 0
    assert "steps: 1, and 2 are done" in str(
        RUNNER.invoke(app, ["train", "--resume", "runs/mine", "--steps", "1"]).exception
    )
    named = RUNNER.invoke(app, ["train", "quickstart", "--resume", "runs/mine"])
    assert "a resumed run has its own recipe" in str(named.exception)
