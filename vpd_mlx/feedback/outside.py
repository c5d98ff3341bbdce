"""What all sources outside this process have in common: they may be slow, and they may fail.

One request a rollout, in worker threads, which start while the generator still decodes other rows where the recipe's order
of sources allows it. A request that fails costs its rollout this source's context and nothing else; so many failures in a
row that the source must be broken end the run, with a checkpoint.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vpd_mlx.common.text import clean
from vpd_mlx.errors import SourceError
from vpd_mlx.feedback.settings import FeedbackSettings
from vpd_mlx.types import Group, Problem, Rollout

__all__ = ["Answer", "Asking", "Backend", "Failed", "Host", "Outside", "eligible"]

POLL = 0.1  # seconds between looks at whether the run is to stop


@dataclass(frozen=True)
class Failed:
    """In place of an answer: the source failed, and why."""

    why: str


Answer = str | Failed | None
"""A text; nothing to say; or a failure."""


@dataclass(frozen=True)
class Host:
    """What a source may ask of the run that it serves.

    `moved` hears how many of how many rollouts are answered, often, and may raise to break off; `stopping` says whether the
    run is to stop; `stop` asks it to; `paused` keeps the terminal free within it.
    """

    moved: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda text: None
    stopping: Callable[[], bool] = lambda: False
    stop: Callable[[], None] = lambda: None
    paused: Callable[[], AbstractContextManager[None]] = nullcontext


def eligible(rollout: Rollout, on_success: bool) -> bool:
    """Whether a rollout is one that a source outside is asked about."""
    return rollout.verdict is not None and (on_success or not rollout.success)


class Outside:
    """A source outside this process. What most of them do not need does nothing here."""

    def __call__(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """An answer for each rollout that wants one."""
        raise NotImplementedError

    def sparing(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """The same for an evaluation, which needs one context a group: one rollout is asked about, where none has one."""
        few = []
        for group, wants in zip(groups, wanted, strict=True):
            first = next((i for i, r in enumerate(group.rollouts) if self.asks(r)), None)
            few.append([all(wants) and i == first for i in range(len(wants))])
        return self(groups, few)

    def asks(self, rollout: Rollout) -> bool:
        """Whether it is asked about such a rollout at all."""
        return not rollout.success

    def early(self, problem: Problem, rollout: Rollout) -> None:
        """A rollout is graded, others are still being decoded: begin with it if that is possible."""

    def ready(self) -> None:
        """A run is about to begin, and nothing is written yet.

        Raises:
            ConfigError: it cannot work here.
        """

    def open(self, folder: Path) -> None:
        """The run folder is there."""

    def close(self) -> None:
        """The run is over: let go of everything, at once."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""


class Backend(Protocol):
    """Answers one request at a time, from several threads at once."""

    def ask(self, problem: Problem, rollout: Rollout) -> str | None:
        """Words on a graded rollout, None where there is nothing to say.

        Raises:
            SourceError: it failed.
        """

    def open(self, folder: Path) -> None:
        """The run folder is there."""

    def close(self) -> None:
        """Break off what is under way."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""


class Asking(Outside):
    """A backend, asked by `workers` threads. Never touches the model."""

    def __init__(self, name: str, backend: Backend, cfg: FeedbackSettings, workers: int, host: Host) -> None:
        self._name = name
        self._backend = backend
        self._cfg = cfg
        self._host = host
        self._pool = _Pool(workers, name)
        self._begun: dict[tuple[str, ...], list[Future[Answer]]] = defaultdict(list)
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._broken: str | None = None

    def asks(self, rollout: Rollout) -> bool:
        """Failures, and successes where the recipe says so."""
        return eligible(rollout, self._cfg.on_success)

    def early(self, problem: Problem, rollout: Rollout) -> None:
        """Send the request now; the answer is fetched when its turn comes."""
        if self.asks(rollout):
            future = self._pool.submit(lambda: self._answer(problem, rollout))
            with self._lock:
                self._begun[_key(problem, rollout)].append(future)

    def __call__(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """Answers for all rollouts that want one and may have one.

        Raises:
            SourceError: the source failed `feedback.max_failures` times in a row.
        """
        out: list[list[Answer]] = [[None] * len(g.rollouts) for g in groups]
        pending: list[tuple[int, int, Future[Answer]]] = []
        for g, (group, wants) in enumerate(zip(groups, wanted, strict=True)):
            for i, (rollout, want) in enumerate(zip(group.rollouts, wants, strict=True)):
                if want and self.asks(rollout):
                    with self._lock:
                        begun = self._begun[_key(group.problem, rollout)]
                        future = begun.pop(0) if begun else None
                    pending.append((g, i, future or self._submit(group.problem, rollout)))
        try:
            for done, (g, i, future) in enumerate(pending):
                self._host.moved(done, len(pending))
                while not wait([future], timeout=POLL).done:
                    self._host.moved(done, len(pending))
                out[g][i] = future.result()
        finally:
            for _, _, future in pending:
                future.cancel()
            with self._lock:
                left, self._begun = self._begun, defaultdict(list)
            for future in (f for futures in left.values() for f in futures):
                future.cancel()
        if self._broken is not None:
            raise SourceError(
                f"feedback source {self._name} failed {self._cfg.max_failures} times in a row, last: {self._broken}; mend it, "
                "then go on with --resume (feedback.max_failures says how many are too many)"
            )
        return out

    def _submit(self, problem: Problem, rollout: Rollout) -> Future[Answer]:
        return self._pool.submit(lambda: self._answer(problem, rollout))

    def _answer(self, problem: Problem, rollout: Rollout) -> Answer:
        if self._broken is not None:
            return Failed("not asked, the source has failed too often")
        try:
            text = self._backend.ask(problem, rollout)
        except SourceError as error:
            with self._lock:
                self._in_a_row += 1
                if self._in_a_row >= self._cfg.max_failures:
                    self._broken = str(error)
            return Failed(str(error))
        with self._lock:
            self._in_a_row = 0
        return None if text is None else clean(text)

    def open(self, folder: Path) -> None:
        """Tell the backend."""
        self._backend.open(folder)

    def close(self) -> None:
        """Break off what is under way; nothing waits."""
        self._pool.close()
        self._backend.close()

    def state(self) -> dict[str, Any]:
        """The backend's."""
        return self._backend.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """The backend's."""
        self._backend.restore(state)


def _key(problem: Problem, rollout: Rollout) -> tuple[str, ...]:
    # Rollouts that are alike in these are alike in what is asked of them, so that their answers may change places.
    return (problem.id, problem.prompt, rollout.text)


class _Pool:
    """Threads that work off a queue. Unlike an executor's they are daemons: one that hangs on a source outside does not keep
    the process from ending."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._tasks: queue.SimpleQueue[tuple[Future[Answer], Callable[[], Answer]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def submit(self, task: Callable[[], Answer]) -> Future[Answer]:
        """Queue a task."""
        future: Future[Answer] = Future()
        self._tasks.put((future, task))
        with self._lock:
            if len(self._threads) < self._size:
                thread = threading.Thread(target=self._work, name=f"feedback-{self._name}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            future, task = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
                    future.set_exception(error)

    def close(self) -> None:
        """Forget what waits, and let the threads end."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._tasks.get_nowait()
                if item is not None:
                    item[0].cancel()
        with self._lock:
            for _ in self._threads:
                self._tasks.put(None)
            self._threads = []
