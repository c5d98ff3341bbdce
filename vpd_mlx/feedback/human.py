"""C = what a person at the terminal types about a failed completion; `page` is for those who would rather not be waited for.

Each text is kept at once in `human.jsonl` in the run folder: nobody is asked twice about the same completion of a problem, a
resumed run goes on where the person stopped, and a later one can replay it all.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

import click
from pydantic import Field

from vpd_mlx.common.files import file_errors, own_file, read_rows
from vpd_mlx.common.settings import Section
from vpd_mlx.common.text import one_line, visible, without_surrogates
from vpd_mlx.errors import Fault, RunError, config_error
from vpd_mlx.feedback.base import Answer, Host, Source, SourceEntry, SourceParts, answer_each
from vpd_mlx.feedback.outside import Outside
from vpd_mlx.feedback.page import Page
from vpd_mlx.types import Group, Problem, Rollout

__all__ = ["BELOW", "HUMAN", "Human", "Terminal"]

FILE = "human.jsonl"
BELOW = "------ Write above this line. What follows is for reading and is left out. ------"
LONG = 2000  # characters of a text that are shown; the editor has the whole


class Human(Outside):
    """Asks about each failed completion, one by one, in the order of the rollouts."""

    def __init__(self, on_success: bool, host: Host, person: Terminal | None = None) -> None:
        """A test passes its own `person`, which answers from a script."""
        super().__init__(on_success)
        self._host = host
        self._person = person
        self._known: dict[tuple[str, str], str | None] = {}
        self._last: str | None = None
        self._file: TextIO | None = None

    def ready(self) -> None:
        """Look for the terminal."""
        self._person = self._person or Terminal(self._host)

    def for_evaluation(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """No answers: an evaluation does not interrupt a person."""
        return [[None] * len(g.rollouts) for g in groups]

    def __call__(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """The person's texts, and None for what was skipped."""
        asked = {
            (g.problem.id, r.text): (g.problem, r)
            for g, wants in zip(groups, wanted, strict=True)
            for r, want in zip(g.rollouts, wants, strict=True)
            if want and self.asks(r)
        }
        new = {key: about for key, about in asked.items() if key not in self._known}
        if new:
            self.ready()
            with self._host.paused():
                self._dialogue(new)

        def typed(group: Group, rollout: Rollout) -> Answer:
            return self._known.get((group.problem.id, rollout.text)) if self.asks(rollout) else None

        return answer_each(groups, wanted, typed)

    def _dialogue(self, new: dict[tuple[str, str], tuple[Problem, Rollout]]) -> None:
        assert self._person is not None
        for number, (problem, rollout) in enumerate(new.values(), 1):
            self._host.on_progress(number - 1, len(new))
            self._person.show(_question(number, len(new), problem, rollout))
            how, text = self._choice(problem, rollout)
            if how == "stop":
                self._host.stop()
                return
            if how == "next":
                for left, other in list(new.values())[number - 1 :]:
                    self._note(left, other, None, "skip")
                return
            self._note(problem, rollout, text, how)

    def _choice(self, problem: Problem, rollout: Rollout) -> tuple[str, str | None]:
        assert self._person is not None
        again = "" if self._last is None else f"  r repeat {_short(self._last, 40)!r}"
        menu = f"[t type a line  e editor{again}  s skip  n skip the rest of this step  q stop, go on later] "
        while True:
            self._person.show(menu)
            match self._person.key():
                case "t" | "\r" | "\n":
                    how, text = "line", self._person.line()
                case "e":
                    how, text = "editor", self._person.edit(_question(1, 1, problem, rollout, whole=True))
                case "r" if self._last is not None:
                    return "repeat", self._last
                case "s":
                    return "skip", None
                case "n":
                    return "next", None
                case "q" | "\x03" | "\x04" | None:
                    return "stop", None
                case _:
                    continue
            if text is not None and text.strip():
                self._last = without_surrogates(text.strip())
                return how, self._last

    def _note(self, problem: Problem, rollout: Rollout, text: str | None, how: str) -> None:
        self._known[problem.id, rollout.text] = text
        if self._file is None:
            return
        assert rollout.verdict is not None  # see `asks`
        row = {
            "problem": problem.id,
            "prompt": problem.prompt,
            "completion": rollout.text,
            "score": rollout.verdict.score,
            "feedback": text,
            "how": how,
        }
        with file_errors(Path(self._file.name)):
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def open(self, folder: Path) -> None:
        """Read what was typed before, and append what is typed from now on."""
        path = folder / FILE
        try:
            for row in read_rows(path):
                self._known[str(row["problem"]), str(row["completion"])] = row["feedback"]
                self._last = row["feedback"] or self._last
            self._file = own_file(path, "a")
            text = path.read_bytes()
            self._file.truncate(text.rfind(b"\n") + 1)  # drops the unfinished line of a run that was killed
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise RunError(f"{path}: cannot be used ({what}); fix it, or move it away") from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Terminal:
    """The process's own terminal."""

    def __init__(self, host: Host) -> None:
        """Checks that there is one."""
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            what = "human needs a terminal, and standard input or output is none"
            remedy = "run it in a terminal, or use replay with feedback from an earlier run"
            raise config_error("feedback.sources", what, remedy)
        self._host = host

    def show(self, text: str) -> None:
        """Print the text, without a newline of its own."""
        click.echo(visible(text), nl=False)

    def key(self) -> str | None:
        """One key, unechoed, without waiting for the end of a line. None on Ctrl-C, Ctrl-D or a signal to the run."""
        with (
            _handled(signal.default_int_handler, signal.SIGINT, signal.SIGTERM),
            contextlib.suppress(KeyboardInterrupt, EOFError),
        ):
            while not self._host.stopping():
                got = click.getchar()
                if len(got) == 1:  # more is an arrow key, or something pasted
                    self.show("\n" if got in "\r\n" else f"{one_line(got)}\n")
                    return got
                if not got:
                    break
        return None

    def line(self) -> str | None:
        """One line, with the terminal's own editing."""
        self.show("> ")
        text = sys.stdin.readline()
        return text.rstrip("\n") if text else None

    def edit(self, below: str) -> str | None:
        """The text above `BELOW` in $VISUAL or $EDITOR."""
        try:
            # Ctrl-C belongs to the editor while it is open.
            with _handled(lambda *_: None, signal.SIGINT):
                text = click.edit(f"\n{BELOW}\n{below}", extension=".md")
        except (click.ClickException, ValueError) as error:  # ValueError: a saved text that is not UTF-8, for one
            self.show(f"{error}\n")
            return None
        return None if text is None else text.partition(BELOW)[0].strip()


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any], *signals: signal.Signals) -> Iterator[None]:
    """Have `handler` handle the signals within the block. The run's own handlers only set a flag, and a read goes on then."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _question(number: int, count: int, problem: Problem, rollout: Rollout, *, whole: bool = False) -> str:
    words = f": {rollout.verdict.text}" if rollout.verdict and rollout.verdict.text else ""
    parts = [
        ("prompt", problem.prompt),
        ("completion", rollout.text + (" [cut off]" if rollout.finish == "length" else "")),
        ("verdict", f"{'right' if rollout.success else 'wrong'}{words}"),
        ("right answer", problem.answer or ""),
        ("reference", problem.reference or ""),
    ]
    head = f"\n--- {number} of {count}  problem {one_line(problem.id)} ---\n"
    shown = [(name, text if whole else _short(text, LONG)) for name, text in parts if text]
    return head + "".join(f"{name}: {_visible(text)}\n" for name, text in shown)


def _visible(text: str) -> str:
    lines = [one_line(line) for line in text.split("\n")]
    return lines[0] if len(lines) == 1 else "\n" + "\n".join(f"    {line}" for line in lines)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


class HumanKeys(Section):
    """What `human` adds to the section `feedback`."""

    human: Literal["terminal", "page"] = Field(
        "terminal",
        description="Where source `human` asks: at the `terminal`, where the run waits for each answer, or on a local `page`, "
        "where failures wait and the run does not (`pip install 'vpd-mlx[page]'`).",
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A page is for a person."""
        if self.human == "page" and "human" not in self.sources:  # type: ignore[attr-defined]
            yield Fault("feedback.human", "page means nothing without human", "name human in feedback.sources")
        yield from super().faults(recipe)


def _build(parts: SourceParts) -> Source:
    if parts.cfg.human == "page":
        return Page(parts.cfg.on_success, parts.host)
    return Human(parts.cfg.on_success, parts.host)


HUMAN = SourceEntry(
    _build,
    keys=HumanKeys,
    on_success=True,
    single_rank=True,
    needs="a person",
)
