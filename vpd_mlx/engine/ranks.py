"""Several processes as one trainer, on one machine or on several (`mlx.launch`).

Each rank samples and grades a part of a step's prompts. The rollouts are then exchanged, so that every rank has the whole
batch and computes weights, class means and the reward shift from it as a single process would. Only forward and backward
passes are divided, row by row; their figures are gathered and their gradients summed. So every rank makes the same update.
Meanwhile a `Heartbeat` notices when a rank is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.errors import RunError
from vpd_mlx.types import TokenRow

__all__ = ["ALONE", "Heartbeat", "Ranks"]

T = TypeVar("T")
# Set by `mlx.launch` for the ring, jaccl and NCCL backends, and by MPI.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one after which a rank counts as lost
JOIN = 30.0  # seconds for everyone to be connected
TOKEN = 16  # bytes that tell our own ranks from other callers


class Ranks:
    """This process's place among those that train together. Without a group it is alone, and nothing is ever sent.

    `index` is this rank, from 0, and `size` how many there are. Whatever sends something raises a RunError when another is gone.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group
        self.index = group.rank() if group is not None else 0
        self.size = group.size() if group is not None else 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """The ranks that `mlx.launch` started, or this process alone.

        Raises:
            RunError: the others cannot be reached.
        """
        if not any(name in environment for name in LAUNCHED):
            return ALONE
        try:
            group = mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            why = f"the other ranks cannot be reached ({error}); check the hosts given to mlx.launch"
            raise RunError(why) from None
        return cls(group) if group.size() > 1 else ALONE

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.index == 0

    def own_range(self, count: int) -> range:
        """This rank's contiguous part of `count` things; the parts differ by one at most."""
        return range(count * self.index // self.size, count * (self.index + 1) // self.size)

    def seed(self, seed: int) -> int:
        """A seed of this rank's own, so that no two draw the same, nor what another's stream draws; the first keeps the run's."""
        return phase_seed(seed, self.index, "rank") if self.index else seed

    def own_rows(self, rows: Sequence[TokenRow]) -> list[int]:
        """Indices of this rank's rows, in order; the same division on every rank.

        Rows with one prompt stay together, so that it is read once, unless there are fewer prompts than ranks. The
        heaviest goes to the rank that has the fewest tokens.
        """
        if self.size == 1:
            return list(range(len(rows)))
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            by_prompt.setdefault(row.prompt, []).append(i)
        units = list(by_prompt.values()) if len(by_prompt) >= self.size else [[i] for i in range(len(rows))]
        cost = [len(rows[u[0]].prompt) + sum(len(rows[i].completion) for i in u) for u in units]
        loads, mine = [0] * self.size, []
        for n in sorted(range(len(units)), key=lambda n: -cost[n]):
            least = loads.index(min(loads))
            loads[least] += cost[n]
            if least == self.index:
                mine += units[n]
        return sorted(mine)

    def gather(self, thing: T) -> list[T]:
        """Every rank's `thing`, by rank. Anything that pickles: only this program's own ranks send it."""
        if self.size == 1:
            return [thing]
        data = np.frombuffer(pickle.dumps(thing), np.uint8)
        counts = self._all(mx.distributed.all_gather, mx.array([len(data)], mx.int64))
        sizes = [int(n) for n in np.array(counts)]
        padded = np.zeros(max(sizes), np.uint8)
        padded[: len(data)] = data
        everyone = np.array(self._all(mx.distributed.all_gather, mx.array(padded)[None]))
        return [pickle.loads(everyone[i, :n].tobytes()) for i, n in enumerate(sizes)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, on all ranks."""
        if self.size == 1:
            return make()
        return cast(T, self.gather(make() if self.first else None)[0])

    def collect(self, own: Sequence[int], values: Sequence[T], count: int) -> list[T]:
        """All `count` values, where this rank has those at `own`."""
        if self.size == 1:
            return list(values)
        out: list[Any] = [None] * count
        for part in self.gather(dict(zip(own, values, strict=True))):
            for i, value in part.items():
                out[i] = value
        return out

    def sum(self, tree: Any) -> Any:
        """The sum of all ranks' trees of float32 arrays, as one message, the same to the bit on every rank."""
        if self.size == 1:
            return tree
        leaves = tree_flatten(tree)
        flat = mx.concatenate([leaf.astype(mx.float32).reshape(-1) for _, leaf in leaves])
        total = self._all(mx.distributed.all_sum, flat)
        ends = np.cumsum([leaf.size for _, leaf in leaves])[:-1].tolist()
        pairs = zip(leaves, mx.split(total, ends), strict=True)
        return tree_unflatten([(name, part.reshape(leaf.shape)) for (name, leaf), part in pairs])

    def agree(self, what: str, mine: str) -> None:
        """See that `mine` is the same on every rank, and raise a RunError when it is not."""
        said = self.gather(mine)
        for other, text in enumerate(said):
            if text != said[0]:
                apart = f"rank {other} differs from rank 0 in {what} ({text} against {said[0]})"
                raise RunError(f"{apart}; every machine needs the same versions, model and data")

    def _all(self, operation: Callable[..., mx.array], values: mx.array) -> mx.array:
        try:
            mx.eval(values)
            out = operation(values, group=self._group)
            mx.eval(out)
            return out
        except RuntimeError as error:
            lost = f"rank {self.index} has lost another rank ({error}); that one's last message says why"
            raise RunError(f"{lost}. Go on with --resume") from None


ALONE = Ranks()


class Heartbeat:
    """Connections between the first rank and the others, so that none waits for ever for one that is lost.

    When a rank's process ends, its connections break and mlx reports it. A rank that is frozen, asleep or cut off keeps them, and
    the others would wait without end. So both sides of each connection send a byte every `BEAT` seconds, and a process that
    receives none for `SILENCE` seconds ends with a message. Use it as a context manager, on all ranks at once; a single rank does
    nothing. Entering raises a RunError when a rank cannot be reached.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._lines: dict[int, socket.socket] = {}
        self._over = threading.Event()

    def __enter__(self) -> Heartbeat:
        if self._ranks.size > 1:
            self._connect()
            for rank, line in self._lines.items():
                for work in (self._say, self._hear):
                    threading.Thread(target=work, args=(rank, line), daemon=True, name=f"heartbeat-{rank}").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # the other side may be gone already, which no longer matters
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def _connect(self) -> None:
        ranks = self._ranks
        if ranks.first:
            with socket.create_server(("", 0), backlog=ranks.size) as server:
                token = secrets.token_bytes(TOKEN)
                ranks.gather((server.getsockname()[1], token, _addresses()))
                server.settimeout(JOIN)
                until = time.monotonic() + JOIN
                while len(self._lines) < ranks.size - 1 and time.monotonic() < until:
                    with contextlib.suppress(TimeoutError):
                        line, _ = server.accept()
                        self._admit(line, token)
        else:
            port, token, addresses = ranks.gather((0, b"", [""]))[0]
            if (dialled := _dial(addresses, port, token, ranks.index)) is not None:
                self._lines[0] = dialled
        there = ranks.gather(len(self._lines))
        if there[0] < ranks.size - 1:
            missing = " and ".join(str(r) for r in range(1, ranks.size) if not there[r])
            problem = f"rank {missing} cannot reach rank 0's machine on a port of its choice"
            raise RunError(f"{problem}; open the firewall between the machines for python")

    def _admit(self, line: socket.socket, token: bytes) -> None:
        line.settimeout(JOIN)
        said = _read(line, TOKEN + 1)
        if said[:TOKEN] == token and 0 < said[TOKEN] < self._ranks.size:
            self._lines[said[TOKEN]] = line
            line.sendall(b"+")
        else:
            line.close()

    def _say(self, _rank: int, line: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the thread that listens on this line notices too, and reports it
            while not self._over.wait(BEAT):
                line.sendall(b".")

    def _hear(self, rank: int, line: socket.socket) -> None:
        line.settimeout(SILENCE)
        why = f"has been silent for {SILENCE:.0f} seconds: it is frozen, asleep or cut off"
        try:
            while line.recv(64):
                pass
            return  # it has ended, and mlx reports that
        except ConnectionResetError:
            return  # the same, in the middle of a word
        except TimeoutError:
            pass
        except OSError as error:
            why = f"cannot be reached ({error})"
        if not self._over.is_set():
            # The main thread may be waiting inside mlx for that rank, where nothing can wake it. The last checkpoint is complete.
            text = f"rank {self._ranks.index} has lost rank {rank}, which {why}. Go on with --resume"
            sys.stderr.write(f"vpd-mlx: {text}\n")
            sys.stderr.flush()
            os._exit(RunError.exit_code)


def _addresses(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Where this machine may be reached: as the others' hosts file names it, by its own names, on this machine itself."""
    found: list[str] = []
    if (hosts := environment.get("MLX_HOSTFILE")) is not None:
        first = json.loads(Path(hosts).read_text(encoding="utf-8"))[0]
        found += [str(address).rsplit(":", 1)[0] for address in first]
    with contextlib.suppress(OSError):  # a machine whose own name resolves to nothing
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("10.255.255.255", 1))  # sends nothing: picks the address that such a packet would leave by
        found.append(outward.getsockname()[0])
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def _dial(addresses: list[str], port: int, token: bytes, index: int) -> socket.socket | None:
    for address in addresses:
        try:
            line = socket.create_connection((address, port), timeout=JOIN / 10)
            line.sendall(token + bytes([index]))
            if _read(line, 1) == b"+":
                return line
            line.close()
        except OSError:
            continue  # not by this address
    return None


def _read(line: socket.socket, count: int) -> bytes:
    out = b""
    while len(out) < count and (piece := line.recv(count - len(out))):
        out += piece
    return out.ljust(count, b"\0")
