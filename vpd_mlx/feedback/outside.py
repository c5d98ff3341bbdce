"""What all sources outside this process have in common: they may be slow, and they may fail.

Each rollout is one request, answered in a worker thread. Requests start while the generator still decodes other rows if the
order of sources allows it. A request that fails costs its rollout this source's context and nothing else; after
`feedback.max_failures` in a row the source counts as broken and the run ends with a checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from vpd_mlx.common.functions import PREFIX, failure, not_handed_over
from vpd_mlx.common.text import without_surrogates
from vpd_mlx.errors import SourceError
from vpd_mlx.feedback.base import Answer, CommonKeys, Failed, Host, Source, SourceEntry, SourceParts, answer_each
from vpd_mlx.types import Group, Problem, Rollout

__all__ = ["Asking", "Function", "Outside", "function_entry"]

POLL = 0.1  # seconds between looks at whether the run is to stop


class Outside:
    """A source outside this process. The methods that most of them do not need do nothing here."""

    def __init__(self, on_success: bool) -> None:
        self._on_success = on_success

    def __call__(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """An answer for each rollout that wants one."""
        raise NotImplementedError

    def asks(self, rollout: Rollout) -> bool:
        """Whether the source is asked about such a rollout at all: a failure, or with `feedback.on_success` any."""
        return rollout.verdict is not None and (self._on_success or not rollout.success)

    def for_evaluation(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """As `__call__`, with one request a group at most: an evaluation needs no more than one context for each problem."""
        few = []
        for group, wants in zip(groups, wanted, strict=True):
            first = next((i for i, r in enumerate(group.rollouts) if self.asks(r)), None)
            few.append([all(wants) and i == first for i in range(len(wants))])
        return self(groups, few)

    def prefetch(self, problem: Problem, rollout: Rollout) -> None:
        """Begin with a rollout that is graded while others are still decoded, if the source can."""

    def ready(self) -> None:
        """Check that the source can work here; called before a run writes anything.

        Raises:
            ConfigError: it cannot.
        """

    def open(self, folder: Path) -> None:
        """Take the run folder, once it exists."""

    def close(self) -> None:
        """Let go of everything, at once: the run is over."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""

    def again(self, most: int) -> list[Problem]:
        """Problems to be asked again in the next step, `most` at most."""
        return []

    def figures(self) -> dict[str, float]:
        """What a row of `metrics.jsonl` says of it, since the last call."""
        return {}


class Asking(Outside):
    """A source that answers one request at a time (`ask`), from `workers` threads. Never touches the model."""

    def __init__(self, name: str, cfg: CommonKeys, workers: int, host: Host) -> None:
        super().__init__(cfg.on_success)
        self._name = name
        self._most_failures = cfg.max_failures
        self._host = host
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._requests: queue.SimpleQueue[tuple[Future[Answer], Problem, Rollout] | None] = queue.SimpleQueue()
        self._begun: dict[tuple[str, ...], list[Future[Answer]]] = defaultdict(list)
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._broken: str | None = None

    def ask(self, problem: Problem, rollout: Rollout) -> str | None:
        """Feedback on a graded rollout, or None if there is none. Called from several threads at once.

        Raises:
            SourceError: the source failed.
        """
        raise NotImplementedError

    def prefetch(self, problem: Problem, rollout: Rollout) -> None:
        """Send the request now; `__call__` collects the answer."""
        if self.asks(rollout):
            future = self._submit(problem, rollout)
            with self._lock:
                self._begun[_key(problem, rollout)].append(future)

    def __call__(self, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
        """Answers for all rollouts that want one and that the source is asked about.

        Raises:
            SourceError: the source failed `feedback.max_failures` times in a row.
        """

        def request(group: Group, rollout: Rollout) -> Future[Answer] | None:
            if not self.asks(rollout):
                return None
            with self._lock:
                begun = self._begun[_key(group.problem, rollout)]
                future = begun.pop(0) if begun else None
            return future or self._submit(group.problem, rollout)

        futures = answer_each(groups, wanted, request)
        pending = [future for row in futures for future in row if future is not None]
        try:
            for done, future in enumerate(pending):
                self._host.on_progress(done, len(pending))
                while not wait([future], timeout=POLL).done:
                    self._host.on_progress(done, len(pending))
            out = [[None if future is None else future.result() for future in row] for row in futures]
        finally:
            with self._lock:
                left, self._begun = self._begun, defaultdict(list)
            for future in itertools.chain(pending, *left.values()):
                future.cancel()
        if self._broken is not None:
            what = f"feedback source {self._name} failed {self._most_failures} times in a row, last: {self._broken}"
            raise SourceError(f"{what}; fix it, then resume the run (feedback.max_failures sets the limit)")
        return out

    def _submit(self, problem: Problem, rollout: Rollout) -> Future[Answer]:
        future: Future[Answer] = Future()
        self._requests.put((future, problem, rollout))
        with self._lock:
            if len(self._threads) < self._workers:
                # Unlike an executor's threads they are daemons: one that waits for ever does not keep the process from ending.
                thread = threading.Thread(target=self._work, name=f"feedback-{self._name}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            future, problem, rollout = request
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._answer(problem, rollout))
                except BaseException as error:  # noqa: BLE001 - future.result() raises it
                    future.set_exception(error)

    def _answer(self, problem: Problem, rollout: Rollout) -> Answer:
        if self._broken is not None:
            return Failed("not asked: the source has failed too often")
        try:
            text = self.ask(problem, rollout)
        except SourceError as error:
            with self._lock:
                self._in_a_row += 1
                if self._in_a_row >= self._most_failures:
                    self._broken = str(error)
            return Failed(str(error))
        with self._lock:
            self._in_a_row = 0
        return None if text is None else without_surrogates(text)

    def close(self) -> None:
        """Drop the requests that have not begun, and let the threads end, without waiting."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._requests.get_nowait()
        with self._lock:
            for _ in self._threads:
                self._requests.put(None)
            self._threads = []


def _key(problem: Problem, rollout: Rollout) -> tuple[str, ...]:
    # Rollouts with the same key make the same request, so their answers are interchangeable.
    return (problem.id, problem.prompt, rollout.text)


class Function(Asking):
    """Asks a function of a Python program, `vpd.train(..., feedback=[words])`, about one rollout at a time, in a thread."""

    def __init__(self, name: str, words: Callable[[Problem, Rollout], str | None], parts: SourceParts) -> None:
        super().__init__(name, parts.cfg, 1, parts.host)
        self._words = words

    def ask(self, problem: Problem, rollout: Rollout) -> str | None:
        """The function's text, or the error that it raised, or returned something else."""
        try:
            text = self._words(problem, rollout)
        except (Exception, SystemExit) as error:
            raise SourceError(failure(error)) from error
        if not isinstance(text, str | None):
            raise SourceError(f"returned {text!r}; needs a text, or None for no feedback")
        return text


def function_entry(name: str) -> SourceEntry:
    """The entry of the source `function:NAME`."""

    def build(parts: SourceParts) -> Source:
        if name not in parts.functions:
            raise not_handed_over("feedback.sources", f"the source {name.removeprefix(PREFIX)!r}")
        return Function(name, parts.functions[name], parts)

    return SourceEntry(build, on_success=True)
