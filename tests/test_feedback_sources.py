"""Feedback from outside: a program, a server, a person, what was said before. Real processes, a real server, a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from vpd_mlx.common.files import read_rows
from vpd_mlx.common.stats import Clock
from vpd_mlx.errors import ConfigError, DataError, SourceError
from vpd_mlx.feedback import SOURCES, Answer, Failed, FeedbackSettings, Host, SourceEntry
from vpd_mlx.feedback import server as server_module
from vpd_mlx.feedback.base import answer_each
from vpd_mlx.feedback.command import Command
from vpd_mlx.feedback.human import BELOW, Human, Terminal
from vpd_mlx.feedback.outside import Asking
from vpd_mlx.feedback.replay import Replay
from vpd_mlx.feedback.server import Server
from vpd_mlx.feedback.server import ServerSettings as Settings
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Silent
from vpd_mlx.run.state import find_checkpoint
from vpd_mlx.run.step import Trainer
from vpd_mlx.types import Group, Problem, Rollout, Verdict

PROBLEM = Problem("p1", ({"role": "user", "content": "1+1="},), answer="2")

# What it does is in the completion: a test says by it how the program is to fail.
PROGRAM = """
import json, os, sys, time
for line in sys.stdin:
    q = json.loads(line)
    what = q["completion"]
    if what == "die":
        print("no more ink", file=sys.stderr); sys.exit(3)
    if what == "kill":
        os.kill(os.getpid(), 9)
    if what == "rubbish":
        print("well, let me think"); sys.stdout.flush(); continue
    if what == "hang":
        time.sleep(60)
    if what == "flood":
        sys.stdout.write("x" * (3 << 20)); sys.stdout.flush(); time.sleep(60)
    if what == "twice":
        print(json.dumps({"id": q["id"], "feedback": "once"}))
    text = {"nothing": None, "number": 7}.get(what, f"{os.getpid()} of {q['problem']}: {what}")
    print(json.dumps({"id": q["id"], "feedback": text, "more": "is left aside"})); sys.stdout.flush()
"""


def rollout(text: str, score: float = 0.0) -> Rollout:
    return Rollout((1,), (-1.0,), text, "stop", Verdict(score, "too low"), success=score >= 0.5)


def group(*texts: str) -> Group:
    return Group(PROBLEM, (1, 2), tuple(rollout(t) for t in texts))


class Heard(Silent):
    """Keeps what a run says, and does something after a step."""

    def __init__(self, after: Callable[[int], None] = lambda step: None) -> None:
        self.notes: list[str] = []
        self._after = after

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: int, steps: int, metrics: Mapping[str, Any], seconds_left: float) -> None:
        self._after(step)


# --- command


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "critic.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


def command_of(program: list[str], timeout: float = 20, **settings: Any) -> Command:
    return Command(FeedbackSettings(command=program, command_timeout=timeout, **settings), Host())


def test_a_program_is_kept_alive_between_requests(program: list[str]):
    command = command_of(program)
    said = [command.ask(PROBLEM, rollout(t)) for t in ("a", "b", "ü\n\ud800")]
    command.close()
    pids = {str(s).split()[0] for s in said}
    assert len(pids) == 1
    assert str(said[1]).endswith("of p1: b")
    assert not alive(int(pids.pop()))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ("die", "exited with code 3: no more ink"),
        ("kill", "was killed by SIGKILL"),
        ("rubbish", "'well, let me think', which is not JSON"),
        ("hang", r"no answer within 1 s \(feedback.command_timeout\)"),
        ("flood", "more than 1 MB in one line"),
        ("number", "feedback must be text or null"),
    ],
)
def test_a_program_that_fails_is_named_and_started_again(program: list[str], completion: str, words: str):
    command = command_of(program)
    first = str(command.ask(PROBLEM, rollout("a"))).split()[0]
    command._programs[0]._timeout = 1.0
    with pytest.raises(SourceError, match=words):
        command.ask(PROBLEM, rollout(completion))
    command._programs[0]._timeout = 20.0
    assert not alive(int(first))
    assert str(command.ask(PROBLEM, rollout("b"))).split()[0] != first
    assert command.ask(PROBLEM, rollout("nothing")) is None
    command.close()


def test_an_answer_too_many_is_found_out(program: list[str]):
    command = command_of(program)
    assert command.ask(PROBLEM, rollout("twice")) == "once"
    with pytest.raises(SourceError, match="answered request '1' when '2' was asked"):
        command.ask(PROBLEM, rollout("a"))
    command.close()


def test_no_such_program():
    with pytest.raises(ConfigError, match=r"feedback\.command: 'no-such-critic' is not a program"):
        command_of(["no-such-critic"])


def test_copies_work_side_by_side(tmp_path: Path):
    path = tmp_path / "slow.py"
    path.write_text(PROGRAM.replace("    text =", "    time.sleep(0.5)\n    text ="))
    asking = command_of([sys.executable, str(path)], command_workers=4)
    asking([group("warm", "them", "up", "all")], [[True] * 4])
    start = time.monotonic()
    (answers,) = asking([group("a", "b", "c", "d")], [[True] * 4])
    assert time.monotonic() - start < 1.5  # one after another: two seconds
    assert len({str(a).split()[0] for a in answers}) == 4
    asking.close()


def test_a_failure_costs_its_rollout_the_context_and_too_many_end_the_run(program: list[str]):
    asking = command_of(program, max_failures=3)
    (answers,) = asking([group("a", "die", "b", "rubbish", "c")], [[True, True, True, True, False]])
    assert [type(a) for a in answers] == [str, Failed, str, Failed, type(None)]
    with pytest.raises(
        SourceError, match=r"source command failed 3 times in a row, last: .*no more ink.*resume the run"
    ):
        asking([group("die", "die", "a")], [[True] * 3])
    asking.close()


def test_closing_breaks_off_what_is_under_way(program: list[str]):
    command = command_of(program, 60)
    pid = int(str(command.ask(PROBLEM, rollout("a"))).split()[0])
    failed: list[str] = []

    def ask() -> None:
        try:
            command.ask(PROBLEM, rollout("hang"))
        except SourceError as error:
            failed.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    command.close()
    thread.join(10)
    assert failed == ["the program was killed by SIGKILL"]
    assert not alive(pid)


WORDS = """
import json, os, sys
from pathlib import Path
for line in sys.stdin:
    q = json.loads(line)
    if {broken} and int(q["id"]) > 6:
        print("the dog ate it", file=sys.stderr); sys.exit(1)
    print(json.dumps({{"id": q["id"], "feedback": q["verdict"]}})); sys.stdout.flush()
"""


def test_a_program_that_dies_for_good_stops_the_run_which_goes_on_when_it_is_mended(
    small: Callable[..., Recipe], tmp_path: Path
):
    critic = tmp_path / "critic.py"
    recipe = small(
        feedback__sources=["command"],
        feedback__command=[sys.executable, str(critic)],
        feedback__max_failures=4,
        rollout__group_size=2,
        evaluation__samples=1,
        steps=3,
        checkpoint__every=1,
    )
    critic.write_text(WORDS.format(broken=False))
    train(recipe, tmp_path / "whole")
    critic.write_text(WORDS.format(broken=True))
    heard = Heard()
    with pytest.raises(SourceError, match=r"command failed 4 times in a row.*the dog ate it") as caught:
        train(recipe, tmp_path / "run", progress=heard)
    assert caught.value.exit_code == 3
    checkpoint = find_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    critic.write_text(WORDS.format(broken=False))
    train(recipe, tmp_path / "run", resume=True)
    name = "adapters/adapters.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, run = (read_rows(tmp_path / n / "rollouts.jsonl") for n in ("whole", "run"))
    assert run == whole
    assert {r["context"]["kind"] for r in whole if r["context"]} == {"command"}


def test_failures_are_counted_and_named_and_no_score_is_lost(small: Callable[..., Recipe], tmp_path: Path):
    critic = tmp_path / "critic.py"
    critic.write_text(WORDS.format(broken=False).replace("    if False", "    if int(q['id']) % 2 == 0"))
    recipe = small(feedback__sources=["command", "verifier"], feedback__command=[sys.executable, str(critic)], steps=1)
    heard = Heard()
    train(recipe, tmp_path / "run", progress=heard)
    (metrics,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    rows = read_rows(tmp_path / "run" / "rollouts.jsonl")
    assert len(rows) == 16  # none has left the batch
    assert metrics["contexts_failed"] > 0
    assert metrics["contexts"]["verifier"] > 0  # the next source is asked instead
    assert any(n.startswith("command failed on") and "the dog ate it" in n for n in heard.notes)


# --- server


class Answers(httpx.MockTransport):
    """Answers with these replies in order; the last for ever. Keeps what it was asked."""

    def __init__(self, *replies: httpx.Response | Exception) -> None:
        super().__init__(self._answer)
        self.replies = list(replies)
        self.asked: list[tuple[str, httpx.Headers, dict[str, Any]]] = []

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((str(request.url), request.headers, json.loads(request.content)))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)


def said(text: str) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def reply(status: int, body: bytes, wait: int | None = None) -> httpx.Response:
    return httpx.Response(status, content=body, headers={} if wait is None else {"Retry-After": str(wait)})


@pytest.fixture
def ask_server(small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "PAUSES", (0.01, 0.02))
    prompter = Trainer.build(small()).prompter

    def build(transport: httpx.BaseTransport | None, note: Callable[[str], None] = print, **settings: Any) -> Server:
        cfg = FeedbackSettings(server=Settings(**{"url": "http://127.0.0.1:9/v1", **settings}))
        return Server(cfg, prompter, Host(note=note), transport)

    return build


def test_a_request_is_an_openai_one(ask_server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CRITIC_KEY", "s3cret")
    answers = Answers(said("<think>hm</think> Carry the one."))
    text = ask_server(answers, api_key_env="CRITIC_KEY", model="m", max_tokens=9).ask(PROBLEM, rollout("3"))
    assert text == "Carry the one."
    ((url, headers, body),) = answers.asked
    assert url == "http://127.0.0.1:9/v1/chat/completions"
    assert headers["Authorization"] == "Bearer s3cret"
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 9, 0.0, False)
    (message,) = body["messages"]
    for words in ("1+1=", "3", "2", "too low"):
        assert words in message["content"]


def test_a_key_that_is_not_there(ask_server):
    with pytest.raises(ConfigError, match="'NO_SUCH_KEY' is not set"):
        ask_server(Answers(said("")), api_key_env="NO_SUCH_KEY")


@pytest.mark.parametrize(
    "trouble", [reply(500, b"oops"), reply(429, b"", 0), httpx.ReadTimeout(""), httpx.ConnectError("refused")]
)
def test_trouble_that_passes_is_waited_out(ask_server, trouble):
    answers = Answers(trouble, trouble, said("Carry."))
    assert ask_server(answers, retries=2).ask(PROBLEM, rollout("3")) == "Carry."
    assert len(answers.asked) == 3
    with pytest.raises(SourceError, match=r"http://127\.0\.0\.1:9/v1/chat/completions: "):
        ask_server(Answers(trouble), retries=2).ask(PROBLEM, rollout("3"))


def test_pauses_grow_and_the_servers_wish_is_heard(ask_server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "PAUSES", (0.5, 3.0))
    server = ask_server(Answers(*[reply(503, b"")] * 4, reply(429, b"", 2), said("x")), retries=5)
    waits: list[float] = []
    monkeypatch.setattr(server._closed, "wait", lambda seconds: waits.append(seconds))
    assert server.ask(PROBLEM, rollout("3")) == "x"
    assert waits == [0.5, 1.0, 2.0, 3.0, 2.0]


def test_what_will_not_pass_is_not_tried_again(ask_server):
    for answer, words in (
        (reply(401, b"bad key"), r"status 401 \(bad key\)"),
        (httpx.Response(302, headers={"Location": "http://127.0.0.1:9/elsewhere"}), "status 302"),
        (reply(200, b"<html>"), "not a chat completion"),
        (reply(200, b'{"choices": [{"message": {"content": 3}}]}'), "content of the answer is not text"),
    ):
        answers = Answers(answer)
        with pytest.raises(SourceError, match=words):
            ask_server(answers, retries=5).ask(PROBLEM, rollout("3"))
        assert len(answers.asked) == 1


def test_the_cache_answers_the_same_request(ask_server, tmp_path: Path):
    first = Answers(said("Carry."))
    server = ask_server(first)
    server.open(tmp_path)
    assert [server.ask(PROBLEM, rollout(t)) for t in ("3", "3", "4")] == ["Carry."] * 3
    assert len(first.asked) == 2
    again = Answers(said("other words"))
    server = ask_server(again)
    server.open(tmp_path)
    assert server.ask(PROBLEM, rollout("3")) == "Carry."
    assert not again.asked
    assert ask_server(again, model="another", cache_dir=str(tmp_path)).ask(PROBLEM, rollout("3")) == "other words"
    for file in (tmp_path / server_module.CACHE).rglob("*.json"):
        file.write_text('{"answer": ')  # damaged: asked again
    server.ask(PROBLEM, rollout("3"))
    assert len(again.asked) == 2


def test_the_budget_counts_attempts_and_goes_into_the_checkpoint(ask_server):
    notes: list[str] = []
    answers = Answers(said("Carry."))
    server = ask_server(answers, notes.append, budget_requests=2)
    assert [server.ask(PROBLEM, rollout(t)) for t in "abcd"] == ["Carry.", "Carry.", None, None]
    assert len(answers.asked) == 2
    assert len(notes) == 1
    assert "budget of 2 requests is spent" in notes[0]
    later = ask_server(answers, notes.append, budget_requests=2)
    later.restore(server.state())
    assert later.ask(PROBLEM, rollout("e")) is None


class Trickle(httpx.SyncByteStream):
    """An answer that never ends."""

    def __init__(self, pause: float, size: int) -> None:
        self._pause, self._size = pause, size

    def __iter__(self) -> Iterator[bytes]:
        while True:
            time.sleep(self._pause)
            yield b" " * self._size


@pytest.mark.parametrize(
    ("pause", "size", "words"),
    [(0.05, 1, r"no answer within 0.2 s \(feedback.server.timeout\)"), (0.0, 1 << 20, "an answer of more than 4 MB")],
)
def test_an_answer_that_does_not_end_is_given_up(ask_server, pause: float, size: int, words: str):
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Trickle(pause, size)))
    with pytest.raises(SourceError, match=words):
        ask_server(transport, timeout=0.2 if pause else 20, retries=0).ask(PROBLEM, rollout("3"))


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that answers one connection after another as it likes; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "body"])
def test_what_drips_does_not_stretch_the_deadline(ask_server, head: bytes):
    ended = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        while not ended.wait(0.05):
            connection.sendall(b"X")

    with raw_server(drip) as url:
        began = time.monotonic()
        with pytest.raises(SourceError, match=r"no answer within 0.4 s \(feedback.server.timeout\)"):
            ask_server(None, url=url, timeout=0.4, retries=0).ask(PROBLEM, rollout("3"))
        assert time.monotonic() - began < 30  # it would drip for ever
        ended.set()


def test_a_key_that_a_server_echoes_is_kept_nowhere(ask_server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    key = "sk-correct-horse"
    monkeypatch.setenv("CRITIC_KEY", key)
    escaped = json.dumps({"choices": [{"message": {"content": f"Your key is {key}."}}]}).replace("sk-", "sk\\u002d")
    told = {
        "status 401": reply(401, f"no such key: {key}".encode()),
        "not a chat completion": reply(200, f"<html>{key}".encode()),
        "refused": httpx.ConnectError(f"refused {key}"),
    }
    for words, answer in told.items():
        with pytest.raises(SourceError, match=words) as refused:
            ask_server(Answers(answer), api_key_env="CRITIC_KEY", retries=0).ask(PROBLEM, rollout("3"))
        assert key not in str(refused.value)
        assert "[key]" in str(refused.value)
    server = ask_server(Answers(reply(200, escaped.encode())), api_key_env="CRITIC_KEY", cache_dir=str(tmp_path))
    assert server.ask(PROBLEM, rollout("3")) == "Your key is [key]."
    assert not [f for f in tmp_path.rglob("*.json") if key in f.read_text()]


def test_a_wish_to_wait_that_is_no_number_is_none(ask_server):
    odd = httpx.Response(429, headers=[(b"Retry-After", "²".encode())])
    assert ask_server(Answers(odd, said("x")), retries=1).ask(PROBLEM, rollout("3")) == "x"


def test_no_proxy_stands_between_us_and_this_machine(ask_server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALL_PROXY", "socks9://nowhere")
    ask_server(None)
    with pytest.raises(ConfigError, match=r"feedback\.server\.url: a proxy of the environment cannot be used"):
        ask_server(None, url="http://critic.example/v1")


def test_no_more_than_the_concurrency_at_once(ask_server):
    now, most, lock = [0], [0], threading.Lock()

    def slow(_: httpx.Request) -> httpx.Response:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return said("x")

    asking = ask_server(httpx.MockTransport(slow), concurrency=3)
    asking([group(*"abcdefghi")], [[True] * 9])
    asking.close()
    assert most == [3]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def mlx_server(model: str, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real mlx_lm.server on loopback."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_lm", "server", "--model", model, "--port", str(port), "--host", "127.0.0.1"],
            stdout=out,
            stderr=out,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait(timeout=20)


def served(small: Callable[..., Recipe], port: int, **more: Any) -> Recipe:
    settings = {
        "feedback__sources": ["server"],
        "feedback__server__url": f"http://127.0.0.1:{port}/v1",
        "feedback__server__max_tokens": 8,
        "feedback__server__retries": 0,
        "feedback__server__concurrency": 2,
        "rollout__group_size": 2,
        "evaluation__samples": 1,
        "evaluation__problems": 4,
    }
    return small(**{**settings, **more})


@pytest.mark.long
def test_a_run_hears_a_real_server_and_a_second_one_the_cache(small: Callable[..., Recipe], tmp_path: Path):
    port = free_port()
    recipe = served(small, port, feedback__server__cache_dir=str(tmp_path / "cache"))
    with mlx_server(recipe.model, port, tmp_path / "server.log"):
        train(recipe, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "rollouts.jsonl")
    metrics = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [m["contexts_failed"] for m in metrics] == [0, 0]
    assert {r["context"]["kind"] for r in rows if r["context"]} == {"server"}
    assert all(r["context"]["text"].strip() for r in rows if r["context"])
    train(recipe, tmp_path / "again")  # nobody listens any more
    assert read_rows(tmp_path / "again" / "rollouts.jsonl") == rows
    name = "adapters/adapters.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.long
def test_a_server_that_dies_mid_run_costs_contexts_then_stops_the_run_which_goes_on_when_it_is_back(
    small: Callable[..., Recipe], tmp_path: Path
):
    port = free_port()
    recipe = served(small, port, steps=4, checkpoint__every=1, feedback__max_failures=10)
    run = tmp_path / "run"
    with mlx_server(recipe.model, port, tmp_path / "server.log") as process:

        def kill(step: int) -> None:
            if step == 1:
                process.kill()
                process.wait()

        heard = Heard(after=kill)
        with pytest.raises(
            SourceError, match=r"server failed 10 times in a row, last: .*127\.0\.0\.1.*resume the run"
        ) as e:
            train(recipe, run, progress=heard)
    assert e.value.exit_code == 3
    # Step 2 lost its contexts and nothing else: fewer than ten failures.
    metrics = read_rows(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    assert metrics[0]["contexts_failed"] == 0
    assert metrics[1]["contexts_failed"] > 0
    assert metrics[1]["contexts_none"] == metrics[1]["contexts_failed"] + 8 * metrics[1]["success"]
    assert any(n.startswith("server failed on") for n in heard.notes)
    assert find_checkpoint(run) is not None
    with mlx_server(recipe.model, port, tmp_path / "server.log"):
        train(recipe, run, resume=True)
    metrics = read_rows(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert [m["contexts_failed"] for m in metrics[2:]] == [0, 0]
    assert len(read_rows(run / "rollouts.jsonl")) == 4 * 4 * 2


# --- human and replay


class Script:
    """A person who has made up their mind: keys and lines."""

    def __init__(self, *acts: str) -> None:
        self.acts = list(acts)
        self.shown = ""

    def show(self, text: str) -> None:
        self.shown += text

    def key(self) -> str | None:
        return self.acts.pop(0)

    def line(self) -> str | None:
        return self.acts.pop(0)

    def edit(self, below: str) -> str | None:
        self.shown += below
        return self.acts.pop(0)


def test_a_persons_keys(tmp_path: Path):
    stops: list[bool] = []
    person = Script("t", "carry the one", "?", "s", "r", "e", "several\nlines", "t", "  ", "q")
    human = Human(False, Host(stop=lambda: stops.append(True)), person)
    human.open(tmp_path)
    (answers,) = human([group("a", "b", "c", "d", "e")], [[True] * 5])
    assert answers == ["carry the one", None, "carry the one", "several\nlines", None]
    assert stops == [True]
    assert "r repeat 'carry the one'" in person.shown
    human.close()
    assert [r["how"] for r in read_rows(tmp_path / "human.jsonl")] == ["line", "skip", "repeat", "editor"]

    person = Script("n")
    human = Human(False, Host(), person)
    human.open(tmp_path)
    (answers,) = human([group("a", "b", "c", "d", "e", "f")], [[True] * 6])
    assert answers == ["carry the one", None, "carry the one", "several\nlines", None, None]
    assert "1 of 2" in person.shown  # only e and f are new
    human.close()

    replay = Replay(tmp_path, ["p1"])
    assert replay([group("c", "b", "d", "new")], [[True] * 4]) == [
        ["carry the one", None, "several\nlines", "carry the one"]
    ]
    with pytest.raises(DataError, match="none of these is a problem of this task"):
        Replay(tmp_path, ["other"])


@pytest.mark.parametrize("last", [b"q", b"\x03", b"\x04", b""], ids=["q", "ctrl-c", "ctrl-d", "signal"])
def test_a_real_terminal(last: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    editor = tmp_path / "editor.sh"
    editor.write_text(f'#!/bin/sh\ngrep -qe "{BELOW}" "$1" && printf "from the editor\\n%s\\n" "{BELOW}" > "$1"\n')
    editor.chmod(0o755)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", str(editor))
    ours, theirs = pty.openpty()
    screen, wrong = bytearray(), list[str]()

    def listen() -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                screen.extend(chunk)

    threading.Thread(target=listen, daemon=True).start()

    def wait_for(text: str) -> None:
        until = time.monotonic() + 60
        while text not in screen.decode(errors="replace"):
            assert time.monotonic() < until, screen.decode(errors="replace")
            time.sleep(0.01)

    def press(key: bytes, question: str) -> None:
        wait_for(question)
        until = time.monotonic() + 60
        while termios.tcgetattr(theirs)[3] & termios.ICANON:  # what is typed before a key is awaited is lost
            assert time.monotonic() < until
            time.sleep(0.01)
        if key:
            os.write(ours, key)
        else:
            time.sleep(0.3)  # one that comes between the change of the terminal and the read would wait for a key
            os.kill(os.getpid(), signal.SIGTERM)

    def type_it() -> None:
        try:
            press(b"t", "1 of 4")
            wait_for("> ")
            os.write(ours, b"carry tge\x7f\x7fhe one\n")  # the terminal's own editing
            press(b"e", "2 of 4")
            press(b"s", "3 of 4")
            press(last, "4 of 4")
        except AssertionError as error:
            wrong.append(str(error))
            os.write(ours, b"\nq")  # ends a line as well as a choice

    stops: list[bool] = []
    with os.fdopen(theirs, "r", closefd=False) as reads, os.fdopen(theirs, "w", closefd=False) as writes:
        monkeypatch.setattr(sys, "stdin", reads)
        monkeypatch.setattr(sys, "stdout", writes)
        typist = threading.Thread(target=type_it)
        typist.start()
        host = Host(stop=lambda: stops.append(True))
        human = Human(False, host, Terminal(host))
        (answers,) = human([group("a\x1b[2J", "b", "c", "d")], [[True] * 4])
        typist.join()
        monkeypatch.undo()
    assert not wrong
    assert answers == ["carry the one", "from the editor", None, None]
    assert stops == [True]
    assert b"\x1b[2J" not in screen  # a completion moves no cursor
    os.close(ours)
    os.close(theirs)


def test_no_terminal_no_person(small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    with pytest.raises(ConfigError, match="human needs a terminal"):
        train(small(feedback__sources=["human"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_was_typed_in_a_run_can_be_replayed_in_another(small: Callable[..., Recipe], tmp_path: Path):
    recipe = small(feedback__sources=["human"], steps=1)
    trainer = Trainer.build(recipe)
    trainer.sources["human"] = Human(False, Host(), Script(*["t", "tens too low"] * 16))
    trainer.sources.open(tmp_path)
    _, groups = trainer.roll_out(1, Clock())
    trainer.sources.close()
    typed = {(g.problem.id, r.text): r.context.text for g in groups for r in g.rollouts if r.context}
    assert set(typed.values()) == {"tens too low"}
    again = Trainer.build(small(feedback__sources=["replay"], feedback__replay=str(tmp_path), steps=1))
    _, groups = again.roll_out(1, Clock())
    assert {(g.problem.id, r.text): r.context.text for g in groups for r in g.rollouts if r.context} == typed
    assert {r.context.kind for g in groups for r in g.rollouts if r.context} == {"replay"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"feedback": "x"}', ":1: not a row of feedback"),
        ('{"problem": "p1", "feedback": 3}', ":1: `feedback` is a int"),
        ("{", ":1:|line 1"),
    ],
)
def test_a_bad_row_of_replay_is_named(tmp_path: Path, line: str, words: str):
    (tmp_path / "said.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=words):
        Replay(tmp_path / "said.jsonl")


def test_a_source_is_one_entry(small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def last_digit(groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        return answer_each(groups, wanted, lambda g, r: None if r.success else f"ends in {g.problem.answer[-1]}")

    monkeypatch.setitem(SOURCES, "last_digit", SourceEntry(lambda parts: last_digit))
    train(small(feedback__sources=["last_digit"], steps=1), tmp_path / "run")
    contexts = [r["context"] for r in read_rows(tmp_path / "run" / "rollouts.jsonl") if r["context"]]
    assert {c["kind"] for c in contexts} == {"last_digit"}
    assert {c["text"][:-1] for c in contexts} == {"ends in "}


# --- side by side


def test_grading_and_asking_go_on_while_others_are_decoded(small: Callable[..., Recipe], program: list[str]):
    recipe = small(
        feedback__sources=["command", "verifier"],
        feedback__command=program,
        rollout__prompts=8,
        rollout__max_completion_tokens=40,
        memory__rollout_rows=4,  # eight batches, one after another
    )
    trainer = Trainer.build(recipe)
    graded, asked = threading.Semaphore(0), threading.Semaphore(0)
    verify = trainer.task.verify

    def grade(problem: Problem, completion: str) -> Verdict:
        verdict = verify(problem, completion)
        graded.release()
        return verdict

    asking = trainer.sources["command"]
    assert isinstance(asking, Asking)
    ask = asking.ask

    def answer(problem: Problem, r: Rollout) -> str | None:
        text = ask(problem, r)
        asked.release()
        return text

    trainer.task.verify = grade  # type: ignore[method-assign]
    asking.ask = answer  # type: ignore[method-assign]
    seen: list[str] = []

    class Holds(Silent):
        """Holds the decoding up, four batches before its end, until five were graded and asked about: others' work."""

        def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
            if name == "rollout" and total is not None and done == total - 16:
                for kind, semaphore in (("graded", graded), ("asked", asked)):
                    seen.extend(kind for _ in range(5) if semaphore.acquire(timeout=60))

    trainer.progress = Holds()
    trainer.roll_out(1, Clock())
    trainer.sources.close()
    assert seen == ["graded"] * 5 + ["asked"] * 5


# --- the protocol page


def examples() -> dict[str, str]:
    page = (Path(__file__).parent.parent / "docs" / "feedback-command.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^```(python|bash)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("language", ["python", "bash"])
def test_the_examples_of_the_protocol_page_work_as_printed(language: str, tmp_path: Path):
    text = examples()[language]
    assert len(text.splitlines()) <= 20
    path = tmp_path / "critic"
    path.write_text(text, encoding="utf-8")
    command = command_of([sys.executable if language == "python" else "sh", str(path)])
    problem = Problem("p", ({"role": "user", "content": "47+38="},), answer="85")
    said = [command.ask(problem, rollout(t)) for t in ("75", " 85\n", "8", "eighty", "")]
    command.close()
    if language == "python":
        assert said == [
            "Wrong at digit 1.",
            None,
            "The answer is too short.",
            "Answer with digits alone.",
            "The answer is too short.",
        ]
    else:
        digits = "Go through the digits again."
        assert said == [
            digits,
            "Answer with digits alone.",
            digits,
            "Answer with digits alone.",
            "There is no answer at all.",
        ]


# --- room


def test_a_context_that_has_no_room_is_a_failed_source_not_a_teacher_without_words(small: Callable[..., Recipe]):
    recipe = small(feedback__sources=["verifier"], templates__verifier="{prompt} " + "x" * 50 + " {context}")
    trainer = Trainer.build(recipe)
    _, groups = trainer.roll_out(1, Clock())
    failures = [r for g in groups for r in g.rollouts if not r.success]
    assert failures
    for rollout in failures:
        assert rollout.context is None
        assert rollout.teacher_prompt is None
        assert "take 6" in rollout.source_errors["verifier"]
        assert "of the teacher's 64; raise feedback.max_prompt_tokens" in rollout.source_errors["verifier"]
    fits = Trainer.build(
        small(feedback__sources=["verifier"], templates__verifier="{prompt} " + "x" * 30 + " {context}")
    )
    _, groups = fits.roll_out(1, Clock())
    heard = [r for g in groups for r in g.rollouts if r.context is not None]
    assert {r.context.cut for r in heard if r.context} <= {True, False}
    assert all(len(r.teacher_prompt or ()) <= 64 for r in heard)
    assert heard


def test_a_critic_that_has_no_room_for_any_attempt_stops_the_run(small: Callable[..., Recipe]):
    wordings = {"templates__critic": "{prompt} " + "x" * 60 + " {attempt}", "templates__critique": "{prompt} {context}"}
    cfg = small(feedback__sources=["critique"], **wordings)
    with pytest.raises(
        ConfigError, match=r"templates.critic: fits no problem, as .* tokens of the teacher's 64; raise"
    ):
        Trainer.build(cfg)
