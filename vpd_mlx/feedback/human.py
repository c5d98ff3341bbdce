"""C = what a person at the terminal says of a failed completion.

What was typed is kept at once, in `human.jsonl` in the run folder: nobody is asked twice about the same completion of a
problem, a resumed run goes on where the person stopped, and a later one can replay it all.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from vpd_mlx.common.files import read_rows
from vpd_mlx.common.text import clean, one_line
from vpd_mlx.errors import ConfigError, Fault, RunError
from vpd_mlx.feedback.outside import POLL, Answer, Host, Outside, eligible
from vpd_mlx.feedback.settings import FeedbackSettings
from vpd_mlx.types import Group, Problem, Rollout

__all__ = ["Human", "Person", "Terminal"]

FILE = "human.jsonl"
MARK = "------ What stands below this line is for reading and is left out. ------"
LONG = 2000  # characters of a text that are shown; the editor has the whole


class Person(Protocol):
    """Whoever answers."""

    def show(self, text: str) -> None:
        """Something to read."""

    def key(self) -> str | None:
        """One key; None when nothing more will come."""

    def line(self) -> str | None:
        """One line; None when it was given up."""

    def edit(self, below: str) -> str | None:
        """A text from an editor, with `below` to look at; None when the editor failed."""


class Human(Outside):
    """Asks about each failed completion, one by one, in the order of the rollouts."""

    def __init__(self, cfg: FeedbackSettings, host: Host, person: Person | None = None) -> None:
        """`person` is the terminal, unless given."""
        self._cfg = cfg
        self._host = host
        self._person = person
        self._known: dict[tuple[str, str], str | None] = {}
        self._last: str | None = None
        self._file: TextIO | None = None

    def ready(self) -> None:
        """Look for the terminal.

        Raises:
            ConfigError: there is none.
        """
        self._person = self._person or Terminal.own(self._host)

    def asks(self, rollout: Rollout) -> bool:
        """Failures, and successes where the recipe says so."""
        return eligible(rollout, self._cfg.on_success)

    def sparing(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """Nothing: a person is not asked for the sake of a measurement."""
        return [[None] * len(g.rollouts) for g in groups]

    def __call__(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """The person's words, and None for what was skipped."""
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
        return [
            [
                self._known.get((g.problem.id, r.text)) if want and self.asks(r) else None
                for r, want in zip(g.rollouts, wants, strict=True)
            ]
            for g, wants in zip(groups, wanted, strict=True)
        ]

    def _dialogue(self, new: dict[tuple[str, str], tuple[Problem, Rollout]]) -> None:
        assert self._person is not None
        for number, (problem, rollout) in enumerate(new.values(), 1):
            self._host.moved(number - 1, len(new))
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
        """(what was chosen, the words where there are some)."""
        assert self._person is not None
        again = "" if self._last is None else f"  r repeat {_short(self._last, 40)!r}"
        menu = f"[t type a line  e editor{again}  s skip  n skip the rest of this step  q stop, go on later] "
        while True:
            self._person.show(menu)
            match self._person.key():
                case "t" | "\r" | "\n":
                    text = self._person.line()
                    how = "line"
                case "e":
                    text = self._person.edit(_question(1, 1, problem, rollout, whole=True))
                    how = "editor"
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
                self._last = clean(text.strip())
                return how, self._last

    def _note(self, problem: Problem, rollout: Rollout, text: str | None, how: str) -> None:
        self._known[problem.id, rollout.text] = text
        if self._file is None:
            return
        score = rollout.verdict.score if rollout.verdict is not None else None
        row = {
            "problem": problem.id,
            "prompt": problem.prompt,
            "completion": rollout.text,
            "score": score,
            "feedback": text,
            "how": how,
        }
        try:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{self._file.name}: {error.strerror or error}; free space, then go on with --resume"
            ) from None

    def open(self, folder: Path) -> None:
        """Read what was typed before, and keep what is typed from now on."""
        path = folder / FILE
        try:
            for row in read_rows(path):
                self._known[str(row["problem"]), str(row["completion"])] = row["feedback"]
                self._last = row["feedback"] or self._last
            self._file = path.open("a", encoding="utf-8")
            text = path.read_bytes()
            self._file.truncate(text.rfind(b"\n") + 1)  # an unfinished line of a run that was killed
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}: cannot be used ({type(error).__name__}: {error}); mend it, or move it away"
            ) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Terminal:
    """A real terminal, by its two streams."""

    def __init__(self, host: Host, reads: TextIO, writes: TextIO) -> None:
        self._host = host
        self._reads = reads
        self._writes = writes

    @classmethod
    def own(cls, host: Host) -> Terminal:
        """The process's own.

        Raises:
            ConfigError: standard input or output is none.
        """
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ConfigError(
                [
                    Fault(
                        "feedback.sources",
                        "human needs a terminal, and there is none here",
                        "run it in a terminal, or take replay with what was typed before",
                    )
                ]
            )
        return cls(host, sys.stdin, sys.stdout)

    def show(self, text: str) -> None:
        """Written as it is, what would move the cursor aside."""
        self._writes.write(text)
        self._writes.flush()

    def key(self) -> str | None:
        """One key, unechoed, without waiting for the end of a line."""
        fd = self._reads.fileno()
        before = termios.tcgetattr(fd)
        try:
            tty.setcbreak(fd, termios.TCSADRAIN)  # what was typed ahead stays
            while not self._host.stopping():  # Ctrl-C sets a flag only
                if select.select([fd], [], [], POLL)[0]:
                    got = os.read(fd, 64).decode(errors="replace")
                    if not got:
                        return None
                    if len(got) == 1:  # more is an arrow key, or something pasted
                        self.show("\n" if got in "\r\n" else f"{one_line(got)}\n")
                        return got
            return None
        finally:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)

    def line(self) -> str | None:
        """One line, with the terminal's own editing."""
        self.show("> ")
        text = self._reads.readline()
        return text.rstrip("\n") if text else None

    def edit(self, below: str) -> str | None:
        """What was written above the mark, in $VISUAL or $EDITOR."""
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
        if not editor:
            self.show("$EDITOR is not set; type a line instead\n")
            return None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "feedback.md"
            file.write_text(f"\n{MARK}\n{below}", encoding="utf-8")
            try:
                with _no_interrupt():
                    done = subprocess.run([*shlex.split(editor), str(file)], stdin=self._reads, stdout=self._writes)
                if done.returncode == 0:
                    return file.read_text(encoding="utf-8", errors="replace").partition(MARK)[0].strip()
                self.show(f"{editor} ended with code {done.returncode}\n")
            except (OSError, ValueError) as error:
                self.show(f"{editor} cannot be run ({error})\n")
        return None


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C is the editor's while it is open."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _question(number: int, count: int, problem: Problem, rollout: Rollout, *, whole: bool = False) -> str:
    verdict = rollout.verdict
    words = f": {verdict.text}" if verdict is not None and verdict.text else ""
    parts = [
        ("prompt", problem.prompt),
        ("completion", rollout.text + (" [cut off]" if rollout.finish == "length" else "")),
        ("verdict", f"{'right' if rollout.success else 'wrong'}{words}"),
        ("right answer", problem.answer or ""),
        ("reference", problem.reference or ""),
    ]
    head = f"\n--- {number} of {count}  problem {one_line(problem.id)} ---\n"
    return head + "".join(
        f"{name}: {_visible(text if whole else _short(text, LONG))}\n" for name, text in parts if text
    )


def _visible(text: str) -> str:
    lines = [one_line(line) for line in text.split("\n")]
    return lines[0] if len(lines) == 1 else "\n" + "\n".join(f"    {line}" for line in lines)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
