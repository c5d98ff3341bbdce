"""The front door: what docs/python.md prints runs as printed; wrong arguments are errors of one line; runs repeat and resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from command import within

import vpd_mlx as vpd
from vpd_mlx.common.functions import fingerprint
from vpd_mlx.recipe import builtin_recipes
from vpd_mlx.run.loop import train as train_recipe

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
MODEL = str(builtin_recipes()["quickstart"].parent / "model")
SPELLER = str(ROOT / "recipes" / "lab" / "speller")
HUB = "mlx-community/Qwen3-0.6B-4bit"
SUMS = [(a, b) for a in range(11, 19) for b in range(21, 25)]
PROBLEMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in SUMS]
SMALL = {
    "steps": 2,
    "rollout": {"prompts": 2, "group_size": 2, "max_prompt_tokens": 256, "max_completion_tokens": 6},
    "evaluation": {"problems": 4, "samples": 1},
    "lora": {"rank": 4},
    "e_step": {"every": 2},
}
LIMITS = {"max_tokens": 32}


def verify(problem, completion):
    ok = completion.strip() == problem.answer
    return float(ok), "" if ok else "wrong"


def other(problem, completion):
    return 0.5


def small(**changed):
    given = {
        "problems": PROBLEMS,
        "verify": verify,
        "feedback": {"sources": ["sibling", "verifier"], **LIMITS},
        **SMALL,
    }
    return vpd.train(**{"model": MODEL, "quiet": True, **given, **changed})


def adapter(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "adapters.safetensors"))


def same(a: Path, b: Path) -> bool:
    one, two = adapter(a), adapter(b)
    return one.keys() == two.keys() and all(np.array_equal(np.array(one[k]), np.array(two[k])) for k in one)


# --- what the page prints


def test_the_ten_lines_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = next(b for b in BLOCKS if HUB in b)
    assert len([line for line in lines.splitlines() if line]) <= 10
    names: dict = {}
    # The speller rambles up to the default limit of 1,024 tokens: here every token but a, e and t ends its answer.
    model = shutil.copytree(SPELLER, tmp_path / "speller")
    config = json.loads((model / "config.json").read_text())
    letters = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    stops = [i for letter, i in letters.items() if letter not in ("a", "e", "t")]
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": stops}))
    exec(lines.replace(HUB, str(model)), names)
    run = names["run"]
    assert (tmp_path / "runs" / "speller" / "report.html").is_file()
    assert len(run.metrics) == 60
    assert all(row["groups_mixed"] <= 1 for row in run.metrics)
    assert run.adapters == Path("runs/speller/adapters")
    assert adapter(run.adapters)
    printed = capsys.readouterr()
    assert str(run.adapters) in printed.out
    assert "evaluation is on the training problems" in printed.out + printed.err


def test_the_session_loop_runs_as_printed_and_learns_as_train_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    loop = next(b for b in BLOCKS if "Session.load" in b)
    cfg = {"rollout": {"prompts": 4}, "evaluation": {"problems": 8, "samples": 1}}
    monkeypatch.setattr(vpd.Session, "load", classmethod(_shortened(vpd.Session.load.__func__, cfg)))
    exec(loop, {"vpd": vpd})
    train_recipe(vpd.load_recipe("quickstart", steps=3, **cfg), tmp_path / "run")
    assert same(tmp_path / "adapters", tmp_path / "run" / "adapters")


def _shortened(load, cfg):
    return lambda cls, recipe, **keys: load(cls, recipe, **cfg, **keys)


def test_both_functions_of_the_page(tmp_path: Path):
    names: dict = {}
    exec(next(b for b in BLOCKS if "def hint" in b), names)
    run = small(feedback={"sources": [names["hint"]], **LIMITS}, algorithm=names["learn"], out=tmp_path / "a")
    assert run.config["feedback"]["sources"] == ["function:hint"]
    assert run.config["algorithm"] == "function:learn"
    assert all("mine/right" in row for row in run.metrics)
    rows = list(run.read(run.rollouts))
    failed = [r for r in rows if not r["success"]]
    assert failed
    assert all(r["context"]["text"].startswith("It begins with") for r in failed)
    assert all(r["context"] is None for r in rows if r["success"])
    assert not any(np.array(v).any() for k, v in adapter(run.adapters).items() if "lora_b" in k), "nothing was learned"
    assert run.report().stat().st_size > 10_000


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = (ROOT / "recipes" / "notebook" / "addition.py").read_text()
    assert script.count("\n# %% ") >= 3
    short = script.replace("STEPS = 40", "STEPS = 2").replace('{"problems": 40}', '{"problems": 4, "samples": 1}')
    exec(short, {"__name__": "__main__"})
    assert "adapters in runs/notebook/adapters" in capsys.readouterr().out
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


# --- a feedback function that fails


def test_a_feedback_function_that_raises_costs_its_completion_the_context(tmp_path: Path):
    def broken(problem, rollout):
        raise ValueError("no idea")

    run = small(feedback={"sources": [broken, "verifier"], **LIMITS}, steps=1, out=tmp_path / "a")
    row = next(r for r in run.read(run.rollouts) if not r["success"])
    assert "no idea" in row["source_errors"]["function:broken"]
    assert "test_api.py" in row["source_errors"]["function:broken"]
    assert row["context"]["kind"] == "verifier"


# --- problems


def test_problems_may_be_objects_and_held_out_ones_given(tmp_path: Path):
    rows = [
        vpd.Problem(f"p{a}", ({"role": "user", "content": f"{a}+22="},), str(a + 22), data={"a": a}) for a in (11, 12)
    ]
    seen = []

    def checks(problem, completion):
        seen.append((problem.id, problem.data["a"]))
        return completion.strip() == problem.answer

    run = small(problems=rows[:1], held_out=rows[1:], verify=checks, out=tmp_path / "a", steps=1)
    assert {("p11", 11), ("p12", 12)} == set(seen)
    assert [*run.before["greedy_by_problem"]] == ["p12"]
    assert (run.path / "held_out.jsonl").is_file()


def test_a_recipe_may_stand_for_the_model(tmp_path: Path):
    run = small(model=vpd.load_recipe("quickstart", rollout={"group_size": 2}), steps=1, out=tmp_path / "a")
    assert (run.name, run.config["task"]["kind"]) == ("quickstart", "function")
    assert run.config["templates"]["verifier"] == "{prompt}\nFeedback: {context}"


# --- resume


def test_resume_is_bit_identical_and_evaluates(tmp_path: Path):
    whole = small(steps=4, out=tmp_path / "whole")
    small(steps=2, out=tmp_path / "parts")
    moved = (tmp_path / "parts").rename(tmp_path / "moved")  # its rows move with it
    parts = small(steps=4, out=moved, resume=True, problems=None)
    assert same(whole.adapters, parts.adapters)
    assert [r["reward"] for r in whole.metrics] == [r["reward"] for r in parts.metrics]

    found = vpd.evaluate(parts, verify=verify, greedy=True)
    assert found["student_greedy"] == parts.after.student_greedy
    assert {"base", "difference"} <= found.keys()
    with pytest.raises(vpd.VpdError, match="'verify' is a function of a Python program"):
        vpd.evaluate(parts)

    with pytest.raises(vpd.VpdError, match=r"verify: another function than the run's .*; resume with the run's own"):
        small(steps=5, out=parts.path, resume=True, verify=other)
    with pytest.raises(vpd.VpdError, match=r"problems: others than those in .*; leave them out"):
        small(steps=5, out=parts.path, resume=True, problems=PROBLEMS[1:])
    with pytest.raises(vpd.VpdError, match=r"rollout.group_size: differs from the run's recipe"):
        small(steps=5, out=parts.path, resume=True, rollout={**SMALL["rollout"], "group_size": 4})
    done = within("train", "--resume", str(parts.path), "--steps", "5", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "vpd.train(..., resume=True)" in done.stderr


def test_fingerprints_tell_functions_apart():
    def again(problem, completion):
        return 0.5

    assert fingerprint(verify) == fingerprint(verify)
    assert len({fingerprint(f) for f in (verify, other, again, lambda p, c: 1.0, lambda p, c: 0.0)}) == 5
    codes = [compile(f"def f(p, c): return {n}", "<nowhere>", "exec") for n in (1, 1, 2)]
    made = []
    for code in codes:
        names: dict = {}
        exec(code, names)
        made.append(fingerprint(names["f"]))
    assert made[0] == made[1] != made[2]


# --- wrong arguments


WRONG = {
    "keyword": ({"problmes": []}, "problmes: unknown keyword", "did you mean 'problems'?"),
    "recipe keyword": ({"optimiser": {}}, "optimiser: unknown keyword", "did you mean 'optimizer'?"),
    "nested key": ({"rollout": {"group_sise": 4}}, "rollout.group_sise: unknown key (value 4)", "did you mean 'group_size'?"),
    "no verifier": ({"verify": None}, "verify: missing", "give a function"),
    "not callable": ({"verify": "exact"}, "verify: got 'exact', a str", "give a function of (problem, completion)"),
    "arity": ({"verify": lambda completion: 1}, "verify: lambda(completion) does not take", "a function of (problem"),
    "no problems": ({"problems": []}, "problems: is empty", "give at least one"),
    "not a list": ({"problems": "47+38="}, "problems: got '47+38=', a str", "give a list of dicts"),
    "no prompt": ({"problems": [{"question": "?"}]}, "problems[0]: has no 'prompt' (keys: question)", "task={'prompt': …}"),
    "not JSON": ({"problems": [{"prompt": "?", "x": {1, 2}}]}, "problems[0]: cannot be written as JSON", "use text, numbers"),
    "source": ({"feedback": ["siblin"]}, "feedback.sources.0: got 'siblin'", "did you mean 'sibling'?"),
    "feedback arity": ({"feedback": {"sources": [lambda p: ""], **LIMITS}}, "feedback: lambda(p)", "(problem, rollout)"),
    "algorithm": ({"algorithm": "vdp"}, "algorithm: got 'vdp'", "did you mean 'vpd'?"),
    "steps": ({"steps": 0}, "steps: got 0", "needs at least 1"),
    "resume": ({"resume": True}, "holds no run", "leave resume out"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_one_line(case: str, tmp_path: Path):
    changed, *words = WRONG[case]
    with pytest.raises(vpd.VpdError) as caught:
        small(**{"feedback": {"sources": ["verifier"], **LIMITS}, "out": tmp_path / "run", **changed})
    text = str(caught.value)
    assert text.startswith("vpd.train: ")
    assert len(text.splitlines()) == 1, text
    for word in words:
        assert word in text
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_safe(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: mine\n")
    with pytest.raises(vpd.VpdError, match=r"vpd.train: out: '.*' holds a run already; name another folder, or"):
        small(out=tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "name: mine\n"


def test_learn_without_rollouts():
    session = vpd.Session.load("quickstart", steps=1)
    with pytest.raises(vpd.VpdError, match="no rollouts yet"):
        session.learn([])


# --- the import


def test_every_name_is_there_and_the_import_is_light():
    assert {name for name in vpd.__all__ if getattr(vpd, name) is not None} == set(vpd.__all__)
    assert set(vpd.__all__) <= set(dir(vpd))
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        vpd.tarin  # noqa: B018
    code = "import sys; before = set(sys.modules); import vpd_mlx; print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    assert not {"mlx", "mlx_lm", "pydantic", "numpy", "yaml"} & set(python(code, ROOT).stdout.split())


def test_the_import_costs_a_fifth_of_the_command_lines_libraries():
    def seconds(statement: str) -> float:
        code = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
        return statistics.median(float(python(code, ROOT).stdout) for _ in range(3))

    assert seconds("import vpd_mlx") <= seconds("import typer, rich") / 5
