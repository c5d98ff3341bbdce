"""Messages that name the right thing, and what `data check` warns of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from command import within
from conftest import QUICKSTART
from fakes import ByteTokenizer
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

from vpd_mlx.common import hub
from vpd_mlx.errors import ConfigError, DataError, SourceError
from vpd_mlx.feedback.server import check_reachable
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.run.rows import Lengths, lengths_of, warnings_of
from vpd_mlx.run.setup import build_prompter, check_room
from vpd_mlx.tasks.exact import Exact, ExactSettings
from vpd_mlx.tasks.own_process import _load, as_verdict
from vpd_mlx.types import Problem, Verdict


def recipe(**changes: object) -> Recipe:
    return load_recipe(QUICKSTART, [(k.replace("__", "."), v) for k, v in changes.items()])


def test_a_run_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path: Path):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").touch()
    for target, words in (
        ("runs/nope", "there is no runs/nope here, neither run, recipe nor model; runs/ holds first"),
        ("runs/frist", "did you mean runs/first?"),
        ("quickstrat", "did you mean quickstart?"),
        ("./nowhere", "there is no ./nowhere here"),
    ):
        found = within("eval", target, cwd=tmp_path)
        assert found.returncode == 2
        assert words in found.stderr
        assert "hub" not in found.stderr


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a"] * 20, "20 rows with one prompt; add rows with other prompts"),
        (["a"], "1 row, and training and evaluation need one each"),
        (["a", "b"], "no row of 2 for evaluation (task.held_out is 0.001); add rows, set task.held_out="),
    ],
)
def test_rows_that_cannot_be_split(tmp_path: Path, rows: list[str], words: str):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "answer": "x"}) + "\n" for p in rows))
    cfg = ExactSettings(kind="exact", data=str(file), held_out=0.001)
    with pytest.raises(DataError) as refused:
        Exact(cfg)
    assert words in str(refused.value)
    if "set task.held_out=" in words:
        share = float(str(refused.value).partition("held_out=")[2].partition(",")[0])
        task = Exact(cfg.model_copy(update={"held_out": share}))
        assert len(task.train) == len(task.held_out) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def verify(completion): return 1.0", "verify(completion) does not take (problem, completion)"),
        ("async def verify(problem, completion): return 1.0", "`verify` is async"),
        ("def verfy(problem, completion): return 1.0", "rename 'verfy'"),
    ],
)
def test_a_verifier_that_cannot_be_called_is_told_by_its_own_signature(tmp_path: Path, source: str, words: str):
    verify, fault = _load(tmp_path / "judge.py", source.encode())
    assert verify is None
    assert fault is not None
    assert words in fault[0] + fault[1]
    assert "define `def verify(problem, completion): ...` in it" in fault[1] or "define it with" in fault[1]


def test_a_verdict_may_have_no_words():
    assert as_verdict((0.5, None)) == Verdict(0.5)
    assert as_verdict((0.5, 3)).error is not None


def test_a_dead_server_is_told_before_anything_is_loaded(tmp_path: Path):
    sets = ["--set", "feedback.sources=[server]", "--set", "feedback.server.url=http://127.0.0.1:9/v1"]
    found = within("train", "--model", "./no-model-is-looked-for", *sets, cwd=tmp_path)
    assert found.returncode == 3
    assert "feedback.server.url: http://127.0.0.1:9/v1/chat/completions cannot be reached" in found.stderr
    assert not [*tmp_path.iterdir()]
    cfg = recipe(feedback__sources=["server"], feedback__server__url="http://critic/v1").feedback
    asked = []

    def answer(status: int) -> httpx.MockTransport:
        return httpx.MockTransport(lambda request: asked.append(str(request.url)) or httpx.Response(status))

    check_reachable(cfg, answer(200))
    check_reachable(cfg, answer(404))  # a server without a list of models
    assert asked == ["http://critic/v1/models"] * 2
    with pytest.raises(SourceError, match=r"refuses us \(status 401\)"):
        check_reachable(cfg, answer(401))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"templates__verifier": "x" * 200 + "{prompt} {context}"}, "templates.verifier: fits no problem, as"),
        (
            {
                "templates__critic": "x" * 200 + "{prompt} {attempt}",
                "templates__critique": "{prompt} {context}",
                "feedback__sources": ["critique"],
            },
            "templates.critic: fits no problem, as the prompt and the text around it take ",
        ),
        ({}, ""),
    ],
)
def test_a_wording_that_never_fits_stops_the_run_at_its_start(changes: dict, words: str):
    cfg = recipe(**changes)
    prompter, problems = build_prompter(cfg, ByteTokenizer()), [Problem("1", ({"role": "user", "content": "1+1="},))]
    if not words:
        check_room(cfg, prompter, problems)
        return
    with pytest.raises(ConfigError) as refused:
        check_room(cfg, prompter, problems)
    assert words in str(refused.value)
    assert str(refused.value).endswith("raise feedback.max_prompt_tokens or shorten the template")


class Lenient:
    """A task whose verifier takes whatever it is told to take."""

    def __init__(self, rows: list[Problem], takes: object) -> None:
        self.train, self.held_out, self._takes = tuple(rows), (), takes

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return Verdict(float(self._takes(problem, completion)))

    def reference_completion(self, problem: Problem) -> str | None:
        return problem.answer


class Unknown(ByteTokenizer):
    unk_token_id = ord("?")


def test_data_check_warns_of_what_would_waste_a_run():
    rows = [Problem(f"r{n}", ({"role": "user", "content": f"{n}+0="},), answer=str(n)) for n in range(10)]

    def of(takes: object, changed: list[Problem] = rows, seconds: float = 0.0, **changes: object) -> list[str]:
        cfg, task = recipe(**changes), Lenient(changed, takes)
        lengths = lengths_of(build_prompter(cfg, Unknown()), task, changed)
        return [*warnings_of(cfg, task, changed, lengths, seconds)]

    def right(problem: Problem, text: str) -> bool:
        return text == problem.answer

    assert of(right) == []
    long = [replace(rows[0], answer="1234567"), *rows[1:]]
    assert (
        "1 of 10 reference answers are longer than rollout.max_completion_tokens 6, longest 8 (row r0)"
        in of(right, long)[0]
    )
    assert (
        "no answer could be right; raise it to 8 or more" in of(right, [replace(r, answer="1234567") for r in rows])[0]
    )
    assert "1 rows hold characters" in of(right, [replace(rows[0], answer="?"), *rows[1:]])[0]
    assert "an empty answer 1.0 on 8 of 8 rows, first r0" in of(lambda p, text: right(p, text) or not text)[0]
    everything = of(lambda p, text: True)
    assert [w.split(" 1.0")[0] for w in everything[:2]] == [
        "the verifier gives an empty answer",
        "the verifier gives the answer 'purple zebra 31337 !!'",
    ]
    assert "the answer to another row 1.0 on 8 of 8 rows" in everything[2]
    classes = [replace(r, answer="A" if n else "B") for n, r in enumerate(rows)]
    assert "the answer 'A' is right in 9 of 10 rows" in of(right, classes)[0]
    assert (
        "the verifier takes 3.0 s for an answer, so the 128 of a step take about 1 min 36 s"
        in of(right, seconds=3.0)[0]
    )
    assert (
        "10 prompts take more than 95% of rollout.max_prompt_tokens 5"
        in of(right, rollout__max_prompt_tokens=5, feedback__max_tokens=1)[0]
    )
    assert "leave the teacher less room than feedback.max_tokens" in of(right, feedback__max_tokens=60)[0]
    assert isinstance(lengths_of(build_prompter(recipe(), ByteTokenizer()), Lenient(rows, right), rows), Lengths)


def test_data_check_prints_them_and_loads_no_model(own_task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vpd_mlx.engine.models.mlx_lm.load", lambda *_, **__: pytest.fail("the model was loaded"))
    path = own_task(extra="")
    found = within("data", "check", str(path), "--set", "rollout.max_completion_tokens=2", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "warning: 32 of 32 reference answers are longer than rollout.max_completion_tokens 2" in found.stdout
    assert " ms for an answer" in found.stdout
    told = within("verify", "-r", str(path), "--text", "22", cwd=tmp_path)
    assert json.loads(told.stdout)["completion"] == "22"
    both = within("verify", "-r", str(path), "--text", "22", "--completion", "-", cwd=tmp_path)
    assert "--text: is given beside --completion" in both.stderr


def test_an_export_that_has_no_place_is_refused_before_a_model_is_loaded(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for out, words in (
        ("file", "file: is a file; give another --out"),
        ("full", "full: is not empty; give another --out"),
    ):
        found = within("export", "runs/no-run-is-looked-for", "--to", "adapters", "--out", out, cwd=tmp_path)
        assert found.returncode == 3
        assert words in found.stderr


def test_downloads_are_quiet_where_there_is_no_terminal_and_offline_is_told_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    for terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        for there in (True, False):
            monkeypatch.setattr(hub, "_reachable", lambda _, there=there: there)
            with hub.reaching_hub():
                assert are_progress_bars_disabled() is not terminal
                assert constants.HF_HUB_OFFLINE is not there
            assert not are_progress_bars_disabled()
            assert not constants.HF_HUB_OFFLINE
