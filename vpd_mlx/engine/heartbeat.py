"""A heartbeat between ranks, so that none waits for ever for one that is lost.

When a rank's process ends, its connections break and mlx reports it. A rank that is frozen, asleep or cut off keeps them, and
the others would wait without end. So every rank keeps a connection to the first; both sides send a byte every `BEAT` seconds,
and a rank that receives none for `SILENCE` seconds ends with an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from vpd_mlx.engine.ranks import Ranks
from vpd_mlx.errors import RunError

__all__ = ["Heartbeat"]

BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one after which a rank counts as lost
JOIN = 30.0  # seconds for everyone to be connected
TOKEN = 16  # bytes that tell our own ranks from other callers


class Heartbeat:
    """Connections between the first rank and the others. Use it as a context manager, on all ranks at once.

    Args:
        ranks: those that train together; a single rank does nothing. When one falls silent, the process ends with a message.

    Raises:
        RunError: on entry, a rank cannot be reached.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._lines: dict[int, socket.socket] = {}
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Heartbeat:
        if self._ranks.size > 1:
            self._connect()
            for rank, line in self._lines.items():
                for work in (self._say, self._hear):
                    thread = threading.Thread(target=work, args=(rank, line), daemon=True, name=f"heartbeat-{rank}")
                    thread.start()
                    self._threads.append(thread)
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
            dialled = _dial(addresses, port, token, ranks.index)
            if dialled is not None:
                self._lines[0] = dialled
        there = ranks.gather(len(self._lines))
        if there[0] < ranks.size - 1:
            missing = [str(r) for r in range(1, ranks.size) if not there[r]]
            raise RunError(
                f"rank {' and '.join(missing)} cannot reach rank 0's machine on a port of its choice; open the firewall between "
                "the machines for python"
            )

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
            _end(f"rank {self._ranks.index} has lost rank {rank}, which {why}. Go on with --resume")


def _end(text: str) -> None:
    # The main thread may be waiting inside mlx for that rank, and nothing can wake it there. The last checkpoint is complete.
    sys.stderr.write(f"vpd-mlx: {text}\n")
    sys.stderr.flush()
    os._exit(RunError.exit_code)


def _addresses(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Where this machine may be reached: as the others' hosts file names it, by its own names, on this machine itself."""
    found: list[str] = []
    hosts = environment.get("MLX_HOSTFILE")
    if hosts is not None:
        first = json.loads(Path(hosts).read_text(encoding="utf-8"))[0]
        found += [str(address).rsplit(":", 1)[0] for address in first]
    with contextlib.suppress(OSError):  # a machine whose own name resolves to nothing
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(
            ("10.255.255.255", 1)
        )  # sends nothing; only picks the address that such a packet would leave by
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
