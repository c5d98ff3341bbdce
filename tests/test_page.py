"""The page on which a person comments while a run trains: cards, what a comment counts for, who may ask, and what is kept."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from vpd_mlx.common.files import read_rows
from vpd_mlx.common.stats import Clock
from vpd_mlx.errors import ConfigError, RunError
from vpd_mlx.feedback import SOURCES
from vpd_mlx.feedback.base import Host, SourceParts
from vpd_mlx.feedback.page import Page
from vpd_mlx.feedback.page.board import MOST_WAITING, Board, Refused
from vpd_mlx.feedback.page.server import HEADERS, Server
from vpd_mlx.feedback.replay import Replay
from vpd_mlx.report.page import run_page
from vpd_mlx.run.commented import commented
from vpd_mlx.run.folder import LoggedRollout, load_run
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Progress
from vpd_mlx.run.step import Trainer, ask_again
from vpd_mlx.types import Group, Problem, Rollout, Verdict


def problem(name: str = "p1") -> Problem:
    return Problem(name, ({"role": "user", "content": f"question {name}"},), "right")


def wrong(text: str, verdict: str = "no") -> Rollout:
    return Rollout((), (), text, "stop").graded(Verdict(0.0, verdict), 1.0)


def group(*texts: str, name: str = "p1") -> Group:
    return Group(problem(name), (), tuple(wrong(t) for t in texts))


def all_of(*groups: Group) -> list[list[bool]]:
    return [[True] * len(g.rollouts) for g in groups]


def cards(board: Board) -> dict[str, dict]:
    return {card["completion"]: card for card in board.view(-1)["cards"]}


def test_answers_of_the_same_words_are_one_card():
    board = Board()
    for text in ("a", "b", "a", "a"):
        board.wait(problem(), wrong(text, "too low"))
    seen = board.view(-1)
    assert [(c["completion"], c["count"]) for c in seen["cards"]] == [("a", 3), ("b", 1)]  # the newest first
    assert seen["cards"][0] | {"number": 0, "step": 0} == {
        **{
            "number": 0,
            "problem": "p1",
            "prompt": "question p1",
            "completion": "a",
            "verdict": "too low",
            "score": 0.0,
        },
        **{
            "right": False,
            "cut_off": False,
            "expected": "right",
            "count": 3,
            "step": 0,
            "comment": None,
            "scope": None,
        },
    }
    assert "cards" not in board.view(seen["version"])  # nothing new
    for i in range(MOST_WAITING + 5):
        board.wait(problem(), wrong(str(i)))
    assert len(cards(board)) == MOST_WAITING
    with pytest.raises(Refused, match="no longer waits"):
        board.comment(1, "too late", "answer")


def test_the_nearest_comment_counts_and_a_later_one_replaces_it():
    kept: list[dict] = []
    board = Board(lambda row: kept.append(dict(row)))
    for name in ("p1", "p2"):
        board.wait(problem(name), wrong("a"))
    first, second = (c["number"] for c in reversed(board.view(-1)["cards"]))
    board.comment(first, " for all ", "task")
    assert board.text("p3", "x") == "for all"
    board.comment(second, "for p2", "problem")
    assert [board.text("p2", t) for t in ("a", "b")] == ["for p2", "for p2"]
    board.comment(first, "this one", "answer")  # what was given for all stays
    assert [board.text("p1", t) for t in ("a", "b")] == ["this one", "for all"]
    assert [(r["problem"], r["feedback"], r["scope"], r["how"]) for r in kept] == [
        *(("p1", "for all", "task", "page"), ("p2", "for p2", "problem", "page"), ("p1", "this one", "answer", "page"))
    ]
    again = Board()
    for row in kept:
        again.restore(row)
    assert [again.text(p, t) for p, t in (("p1", "a"), ("p1", "b"), ("p2", "z"))] == ["this one", "for all", "for p2"]
    for bad in (("", "task"), ("x" * 5000, "task"), (3, "task"), ("x", "everything"), ("x", None), ("x", ["task"])):
        with pytest.raises(Refused):
            board.comment(first, *bad)


def test_a_problem_with_a_comment_is_asked_again():
    board, given = Board(), [problem(f"p{i}") for i in range(5)]
    for p in given:
        board.wait(p, wrong("a"))
    for number, scope in ((1, "problem"), (1, "answer"), (2, "task"), (3, "answer"), (4, "problem")):
        board.comment(number, "x", scope)
    assert [p.id for p in board.again(2)] == ["p0", "p2"]
    assert [p.id for p in board.again(2)] == ["p3"]
    assert board.again(2) == []
    names = [
        [p.id for p in ask_again(given[:3], again)] for again in ([], given[3:], given[1:2], given[1:], [given[4]] * 1)
    ]
    assert names == [["p0", "p1", "p2"], ["p0", "p3", "p4"], ["p0", "p1", "p2"], ["p0", "p3", "p4"], ["p0", "p1", "p4"]]
    assert [p.id for p in ask_again(given[:1], given[3:4])] == ["p3"]


def test_a_comment_that_cannot_be_kept_does_not_count():
    def full(row: object) -> None:
        raise RunError("the disk is full")

    board = Board(full)
    board.wait(problem(), wrong("a"))
    with pytest.raises(RunError):
        board.comment(1, "x", "answer")
    assert (board.text("p1", "a"), board.given) == (None, 0)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Board, str]]:
    board = Board()
    board.wait(problem(), wrong('</script><b>"'))
    server = Server(board)
    yield board, server.address
    server.close()


def test_the_page_loads_nothing_from_elsewhere(served: tuple[Board, str]):
    _, address = served
    for name, kind in (("", "text/html"), ("page.js", "text/javascript"), ("page.css", "text/css")):
        got = httpx.get(address + name)
        assert (got.status_code, got.headers["content-type"].split(";")[0]) == (200, kind)
        assert {k: got.headers[k] for k in HEADERS} == HEADERS
        assert "http://" not in got.text
        assert "https://" not in got.text
    assert httpx.get(address + "board.py").status_code == 404
    assert httpx.get(address + "cards").json()["cards"][0]["completion"] == '</script><b>"'


@pytest.mark.parametrize(
    ("status", "headers", "token"),
    [
        (200, {}, None),
        (200, {"Origin": "own", "Sec-Fetch-Site": "same-origin"}, None),
        (404, {}, "wrong"),
        (404, {}, "%C3%A4"),
        (403, {"Origin": "http://evil.example"}, None),
        (403, {"Origin": "null"}, None),
        (403, {"Sec-Fetch-Site": "cross-site"}, None),
        (403, {"Sec-Fetch-Site": "none"}, None),
        (421, {"Host": "evil.example"}, None),
        (421, {"Host": "evil.example", "Origin": "http://evil.example"}, None),
    ],
)
def test_only_the_page_itself_may_ask(
    served: tuple[Board, str], status: int, headers: dict[str, str], token: str | None
):
    board, address = served
    origin, own = address.rstrip("/").rsplit("/", 1)
    address = f"{origin}/{token or own}/"
    headers = {k: origin if v == "own" else v for k, v in headers.items()}
    given, waiting = board.given, board.view(-1)["cards"][0]["number"]
    got = httpx.get(f"{address}cards", headers=headers)
    assert got.status_code == status
    comment = {"card": waiting, "text": "x", "scope": "answer"}
    got = httpx.post(f"{address}comment", json=comment, headers=headers)
    assert got.status_code == status
    assert board.given == given + (status == 200)


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (415, b'{"card": 1, "text": "x", "scope": "answer"}', "text/plain"),
        (400, b"{", "application/json"),
        (400, b"[1]", "application/json"),
        (400, b"[" * 60_000, "application/json"),
        (409, b'{"card": 99, "text": "x", "scope": "answer"}', "application/json"),
        (409, b'{"card": 1, "text": "", "scope": "answer"}', "application/json"),
        (413, b'"' + b"x" * 70_000 + b'"', "application/json"),
    ],
)
def test_what_is_no_comment_is_refused(served: tuple[Board, str], status: int, content: bytes, kind: str):
    board, address = served
    given = board.given
    got = httpx.post(f"{address}comment", content=content, headers={"Content-Type": kind})
    assert (got.status_code, board.given) == (status, given)


def test_it_listens_on_the_loopback_alone():
    server = Server(Board())
    assert server._socket.getsockname()[0] == "127.0.0.1"
    server.close()


def test_a_page_never_waits_and_comments_last(tmp_path: Path):
    notes: list[str] = []
    threads = threading.active_count()
    page = Page(False, Host(note=notes.append))
    page.ready()
    page.open(tmp_path)
    address = notes[0].split()[-1]
    asked = group("a", "a", "b")
    right = Rollout((), (), "c", "stop").graded(Verdict(1.0), 1.0)
    asked = Group(asked.problem, (), (*asked.rollouts, right))
    assert page([asked], all_of(asked)) == [[None] * 4]
    (a,) = (c for c in httpx.get(f"{address}cards").json()["cards"] if c["completion"] == "a")
    seen = httpx.post(f"{address}comment", json={"card": a["number"], "text": "carry", "scope": "problem"}).json()
    assert (seen["given"], seen["step"]) == (1, 1)
    assert page([asked], all_of(asked)) == [["carry", "carry", "carry", None]]
    assert page.figures() == {"human/comments": 1, "human/comments_in_all": 1}
    assert page.figures() == {"human/comments": 0, "human/comments_in_all": 1}
    assert page.for_evaluation([asked], all_of(asked)) == [["carry", "carry", "carry", None]]
    state = page.state()
    page.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)
    assert threading.active_count() == threads
    with (tmp_path / "human.jsonl").open("a") as f:
        f.write('{"problem": "p1", "compl')  # the process was killed here

    again = Page(False, Host(note=notes.append))
    again.open(tmp_path)
    again.restore(state)
    assert again([asked], all_of(asked)) == [["carry", "carry", "carry", None]]
    assert again.state() == {"step": 3}
    assert again.figures() == {"human/comments": 0, "human/comments_in_all": 1}
    assert notes[1].split()[-1] != address  # another token
    again.close()
    assert [r["feedback"] for r in read_rows(tmp_path / "human.jsonl")] == ["carry"]

    (tmp_path / "human.jsonl").write_text('{"problem": "p1", "completion": "a", "feedback": "x", "scope": "world"}\n')
    with pytest.raises(RunError, match="scope 'world'"):
        Page(False, Host()).open(tmp_path)


def test_comments_can_be_replayed(tmp_path: Path):
    def row(problem: str, completion: str, text: str, scope: str) -> str:
        return json.dumps({"problem": problem, "completion": completion, "feedback": text, "scope": scope}) + "\n"

    rows = [("p1", "a", "old", "problem"), ("p1", "a", "new", "problem"), ("p1", "b", "b alone", "answer")]
    path = tmp_path / "human.jsonl"
    path.write_text("".join(row(*r) for r in rows))
    asked = [group("a", "b", "c"), group("a", name="p2")]
    assert Replay(path, ["p1"])(asked, all_of(*asked)) == [["new", "b alone", "new"], [None]]
    path.write_text("".join(row(*r) for r in [*rows, ("p9", "x", "for all", "task")]))
    assert Replay(path, ["p2"])(asked, all_of(*asked)) == [["new", "b alone", "new"], ["for all"]]


def test_where_the_libraries_are_missing_the_error_names_the_extra(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(ConfigError, match=r"feedback.human: page needs starlette; pip install 'vpd-mlx\[page\]'"):
        train(small(feedback__sources=["human"], feedback__human="page"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"feedback.human: page means nothing without human"):
        small(feedback__human="page")


class Person(Progress):
    """Comments on the first card after the first step, as a browser would."""

    address = problem = ""

    def note(self, text: str) -> None:
        if text.startswith("comment on failures"):
            self.address = text.split()[-1]

    def step(self, step: int, *_: object) -> None:
        if step == 1:
            cards = httpx.get(f"{self.address}cards").json()["cards"]
            self.problem = cards[-1]["problem"]
            for card, scope in ((cards[0], "task"), (cards[-1], "problem")):
                comment = {"card": card["number"], "text": "ones right, tens too low", "scope": scope}
                assert httpx.post(f"{self.address}comment", json=comment).status_code == 200


def test_a_run_reads_what_was_given_while_it_trained(small, tmp_path: Path):
    person = Person()
    train(small(feedback__sources=["human"], feedback__human="page"), tmp_path / "run", progress=person)
    run = load_run(tmp_path / "run")
    assert [(r["human/comments"], r["human/comments_in_all"]) for r in run.metrics] == [(0, 0), (2, 2)]
    assert run.metrics[0]["contexts"] == {}
    assert run.metrics[1]["contexts"] == {"human": sum(not r.right for r in run.rollouts if r.step == 2)}
    assert [(c.step, c.scope, c.before[1], c.after[1]) for c in run.comments] == [
        (1, "task", 16, 16),
        (1, "problem", 4, 4),
    ]
    assert {r.problem for r in run.rollouts if r.step == 1} & {r.problem for r in run.rollouts if r.step == 2} == {
        person.problem  # asked again at once
    }
    assert "Comments, and what came after them" in run_page(run, 10)
    again = Trainer.build(small(feedback__sources=["replay"], feedback__replay=str(run.path), steps=1))
    _, groups = again.roll_out(1, Clock())
    assert {r.context.text for g in groups for r in g.rollouts if not r.success} == {"ones right, tens too low"}


def test_what_came_after_a_comment_is_counted_by_what_it_was_for():
    def row(problem: str, completion: str, text: str | None, scope: str, how: str = "page") -> dict:
        return {"problem": problem, "completion": completion, "feedback": text, "scope": scope, "how": how, "step": 2}

    rollouts = [
        LoggedRollout(0, s, p, s + (p == "p1") > 2, "none") for s in (1, 2, 3) for p in ("p1", "p2") for _ in "ab"
    ]
    rows = [row("p1", "a", "x", "problem"), row("p2", "a", "y", "task"), row("p2", "b", "z", "answer", how="line")]
    found = commented([*rows, row("p1", "a", "better", "problem")], rollouts)
    assert [(c.text, c.before, c.after) for c in found] == [("better", (2, 4), (2, 2)), ("y", (2, 8), (4, 4))]
    assert commented([], rollouts) == []


def test_the_recipe_says_where_a_person_is_asked(small):
    build = SOURCES["human"].build
    assert isinstance(build(SourceParts(small(feedback__sources=["human"], feedback__human="page").feedback)), Page)
    assert not isinstance(build(SourceParts(small(feedback__sources=["human"]).feedback)), Page)
