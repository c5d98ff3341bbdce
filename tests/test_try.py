"""`vpd-mlx try`: both models' answers, worded and decoded as in training, to one prompt or in a chat."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICKSTART, SMALL
from typer.testing import CliRunner

from vpd_mlx.commands.app import app
from vpd_mlx.engine.sampling import Reply, Sampling, generate, stream
from vpd_mlx.errors import ConfigError, ModelError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.run.dialogue import Dialogue, Pair
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/small: three steps at a rate that changes answers."""
    changes = {**SMALL, "steps": 3, "optimizer.learning_rate": 5e-3, "optimizer.warmup_steps": 0}
    folder = tmp_path_factory.mktemp("try") / "runs" / "small"
    train(load_recipe(QUICKSTART, list(changes.items())), folder)
    return folder


@pytest.fixture(scope="module")
def pair(run: Path) -> Pair:
    return Pair.load(run)


def ask(*arguments: str, **more: Any) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["try", *arguments, "--json"], **more)
    assert done.exit_code == 0, (done.output, done.exception)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def last(replies: Iterator[Any]) -> Any:
    *_, end = replies
    return end


def test_the_answers_are_those_of_the_evaluations(run: Path):
    changed = [a for a in load_run(run).answers if a.before["completion"] != a.after["completion"]]
    assert changed
    for answered in changed[:2]:
        found = ask(str(run), answered.before["prompt"])
        assert found["base"]["answer"] == answered.before["completion"]
        assert found["trained"]["answer"] == answered.after["completion"]
        assert (found["temperature"], found["seed"], found["system"], found["max_tokens"]) == (0.0, None, None, 6)


def test_a_run_is_found_by_its_name_and_a_pipe_is_a_prompt(run: Path, monkeypatch: pytest.MonkeyPatch):
    want = ask(str(run), "47+38=")
    monkeypatch.chdir(run.parent.parent)
    found = ask("small", input="47+38=\n")
    assert found == {**want, "run": "runs/small"}


def test_what_is_decoded_token_by_token_is_what_is_decoded_in_batches(pair: Pair):
    prompt = pair.prompter.encode([{"role": "user", "content": "47+38="}])
    for most in (1, 6):
        how = Sampling(0.0, 1.0, most)
        ((_, _, rollout),) = generate(pair.policy, [prompt], 1, how, 0)
        replies = list(stream(pair.policy, prompt, how, 0))
        assert replies[-1] == Reply(rollout.text, len(rollout.tokens), rollout.finish)
        assert [r.tokens for r in replies[:-1]] == list(range(1, len(rollout.tokens)))
        assert all(r.finish is None and rollout.text.startswith(r.text) for r in replies[:-1])


def test_temperature_seed_and_limit_do_something(run: Path):
    hot = ["--temperature", "3"]
    found = [ask(str(run), "47+38=", *hot, "--seed", str(seed)) for seed in (1, 1, 2, 3)]
    assert found[0] == found[1]
    assert len({json.dumps([f["base"], f["trained"]]) for f in found}) > 1
    assert ask(str(run), "47+38=", *hot)["seed"] == 0  # the recipe's
    short = ask(str(run), "47+38=", "--max-tokens", "1")
    assert (short["base"]["tokens"], short["base"]["finish"]) == (1, "length")
    shown = CliRunner().invoke(app, ["try", str(run), "47+38=", "--max-tokens", "1"])
    assert "cut off at --max-tokens 1" in shown.stdout


def test_the_prompt_is_worded_as_in_training(small, tmp_path: Path):
    """A template that puts a sum in place of the prompt: whatever is asked, that is what the models read."""
    train(small(steps=1, templates__student="12+13={prompt}"), tmp_path / "run")
    pair, plain = Pair.load(tmp_path / "run"), small()
    found = pair.prompter.encode([{"role": "user", "content": "12+13=x"}])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vpd_mlx.run.dialogue.stream", lambda policy, prompt, *rest: seen.append(prompt) or iter(()))
        list(pair.stream("trained", [{"role": "user", "content": "x"}], Sampling(0.0, 1.0, 1), 0))
    assert seen == [found]
    assert pair.recipe.thinking == plain.thinking == pair.prompter.thinking


def test_the_tasks_system_message_holds_unless_another_is_given(run: Path, own_task, tmp_path: Path):
    rows = "".join(
        json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b), "system": "Add."}) + "\n"
        for a in range(11, 19)
        for b in range(11, 15)
    )
    train(load_recipe(own_task(rows), []), tmp_path / "run")
    target = str(tmp_path / "run")
    assert ask(target, "11+11=")["system"] == "Add."
    assert ask(target, "11+11=", "--system", "Sum.")["system"] == "Sum."
    answers = tmp_path / "run" / "answers.jsonl"
    answers.write_text(answers.read_text().replace("Add.", "Sum up.", 1))
    done = CliRunner().invoke(app, ["try", target, "11+11=", "--json"])
    assert json.loads(done.stdout)["system"] is None
    assert "2 different system messages" in done.stderr
    answers.unlink()
    assert "has no answers.jsonl" in CliRunner().invoke(app, ["try", target, "11+11="]).stderr


def test_both_models_read_the_system_message_and_their_own_answers(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    read: list[tuple[str, list[str]]] = []

    def spoken(self: Pair, name: str, messages: list[dict[str, str]], how: Sampling, seed: int) -> Iterator[Reply]:
        read.append((name, [m["content"] for m in messages]))
        yield Reply(f"{name} {seed}", 1, "stop")

    monkeypatch.setattr(Pair, "stream", spoken)
    dialogue = Dialogue(pair, Sampling(0.0, 1.0, 6), 7, "Be brief.")
    last(dialogue.ask("one"))
    last(dialogue.ask("two"))
    assert read[:2] == [("base", ["Be brief.", "one"]), ("trained", ["Be brief.", "one"])]
    assert read[2:] == [(name, ["Be brief.", "one", f"{name} 7", "two"]) for name in ("base", "trained")]
    next(dialogue.ask("three"))  # stopped on the way
    dialogue.reset()
    read.clear()
    last(dialogue.ask("four"))
    assert read == [(name, ["Be brief.", "four"]) for name in ("base", "trained")]


def test_without_a_chat_template_each_prompt_stands_alone(run: Path, monkeypatch: pytest.MonkeyPatch):
    alone = Pair.load(run)
    monkeypatch.setattr(type(alone), "remembers", False)
    dialogue = Dialogue(alone, Sampling(0.0, 1.0, 6), 0)
    first = last(dialogue.ask("47+38="))
    last(dialogue.ask("11+11="))
    assert last(dialogue.ask("47+38=")) == first


def test_a_chat_template_that_refuses_a_system_message(run: Path, monkeypatch: pytest.MonkeyPatch):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    pair = Pair.load(run)
    monkeypatch.setattr(pair.policy.tokenizer._tokenizer, "chat_template", strict)
    with pytest.raises(ConfigError, match=r"--system: .*refuses a system message \(no system here\); leave it out"):
        Dialogue(pair, Sampling(0.0, 1.0, 6), 0, "Be brief.").check_system()
    Dialogue(pair, Sampling(0.0, 1.0, 6), 0).check_system()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["RUN", "x", "--seed", "3"], ConfigError, "--seed: 3 means nothing at temperature 0"),
        (["RUN", " "], ConfigError, "PROMPT: is empty"),
        (["RUN"], ConfigError, "PROMPT: is empty"),  # nothing on standard input
        (["nothing-here", "x"], ConfigError, "RUN: nothing-here does not exist, so holds no run"),
        (["BARE", "x"], ModelError, "has no adapter yet"),
        (["MOVED", "x"], ModelError, "there is no folder /nowhere/at/all"),
    ],
)
def test_what_cannot_be_tried(run: Path, tmp_path: Path, arguments: list[str], error: type, words: str):
    config = (run / "config.yaml").read_text()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text(config)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "adapters").symlink_to(run / "adapters")
    model = f"model: {load_recipe(run / 'config.yaml').model}\n"
    assert model in config
    (tmp_path / "moved" / "config.yaml").write_text(config.replace(model, "model: /nowhere/at/all\n"))
    places = {"RUN": run, "BARE": tmp_path / "bare", "MOVED": tmp_path / "moved"}
    done = CliRunner().invoke(app, ["try", *(str(places.get(a, a)) for a in arguments)])
    assert isinstance(done.exception, error)
    assert words in str(done.exception)


# --- at a terminal


class Terminal:
    """A pseudo-terminal in place of standard input and output, with somebody who types."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, self.theirs = pty.openpty()
        self.screen = bytearray()
        self.wrong: list[str] = []
        self._streams = [os.fdopen(os.dup(self.theirs), mode) for mode in ("r", "w")]
        monkeypatch.setattr(sys, "stdin", self._streams[0])
        monkeypatch.setattr(sys, "stdout", self._streams[1])
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("TERM", "xterm")
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(self.ours, 4096):
                self.screen.extend(chunk)

    def text(self) -> str:
        return self.screen.decode(errors="replace")

    def type(self, *lines: tuple[str, str]) -> threading.Thread:
        """Type each line once its text is there, in a thread."""

        def work() -> None:
            for awaited, line in lines:
                until = time.monotonic() + 120
                while awaited not in self.text():
                    if time.monotonic() > until:
                        self.wrong.append(f"never saw {awaited!r} in {self.text()!r}")
                        os.write(self.ours, b"\x04")  # leaves the chat
                        return
                    time.sleep(0.01)
                os.write(self.ours, line.encode())

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        for end in self._streams:
            end.close()
        os.close(self.theirs)
        self._listener.join(5)  # or it would read from whatever gets this number next
        os.close(self.ours)


@pytest.mark.parametrize("leave", ["/exit\n", "\x04"], ids=["exit", "ctrl-d"])
def test_a_chat_at_a_terminal(run: Path, monkeypatch: pytest.MonkeyPatch, leave: str):
    monkeypatch.setattr(Pair, "stream", says)
    terminal = Terminal(monkeypatch)
    typist = terminal.type(
        ("Ctrl-D leaves", "first\n"),
        ("trained heard 1", "second\n"),
        ("trained heard 3", "/reset\n"),
        ("forgotten", "third\n"),
        ("base heard third", leave),
    )
    with pytest.raises(SystemExit) as ended:
        app(["try", str(run)])
    typist.join(5)
    monkeypatch.undo()
    assert ended.value.code == 0
    assert not terminal.wrong
    assert "\x1b[2J" not in terminal.text()  # an answer clears no screen
    assert "\\x1b[2J" in terminal.text()
    terminal.close()


def says(self: Pair, name: str, messages: list[dict[str, str]], how: Sampling, seed: int) -> Iterator[Reply]:
    """A model that tells how much it read, and would clear the screen."""
    words = f"heard {len(messages)}" if len(messages) > 1 or messages[-1]["content"] != "third" else "heard third"
    yield Reply(name, 1, None)
    yield Reply(f"\x1b[2J{name} {words}", 2, "stop")


def test_ctrl_c_ends_an_answer_and_the_turn_is_forgotten(run: Path, monkeypatch: pytest.MonkeyPatch):
    def endless(self: Pair, name: str, messages: list[dict[str, str]], how: Sampling, seed: int) -> Iterator[Reply]:
        if messages[-1]["content"] == "stop me":
            raise KeyboardInterrupt
        yield Reply(f"{name} heard {len(messages)}", 1, "stop")

    monkeypatch.setattr(Pair, "stream", endless)
    terminal = Terminal(monkeypatch)
    typist = terminal.type(
        ("Ctrl-D leaves", "stop me\n"), ("this turn is forgotten", "go\n"), ("trained heard 1", "/exit\n")
    )
    with pytest.raises(SystemExit) as ended:
        app(["try", str(run)])
    typist.join(5)
    monkeypatch.undo()
    assert ended.value.code == 0
    assert not terminal.wrong
    terminal.close()


def test_json_is_for_one_prompt(run: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal(monkeypatch)
    with pytest.raises(ConfigError, match="--json: is for one prompt"):
        app(["try", str(run), "--json"], standalone_mode=False)
    monkeypatch.undo()
    terminal.close()
