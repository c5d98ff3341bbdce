"""What hostile programs are let loose on, and how one tells what they did."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attacks import HELP, QUESTIONS, QUICK

from vpd_mlx.sandbox import Limits, Result, Sandbox, Value
from vpd_mlx.sandbox.layers import PROMISES

LIMITS = Limits(wall_s=1.5, cpu_s=1, memory_mb=256, output_kb=64, file_mb=4, threads=8)
SECRET = 918273645546372819
LINUX = sys.platform == "linux"


@dataclass
class Arena:
    """Files, sockets, shared memory and a process of this user. `words` are what the programs' braces stand for."""

    words: dict[str, object]
    victim: subprocess.Popen[bytes]
    files: list[Path]
    datagrams: list[socket.socket]
    segment: int

    def state(self) -> dict[str, Any]:
        """All that a program must not change."""
        found: dict[str, Any] = {
            "victim": self.victim.poll(),
            "canary's folder": sorted(os.listdir(self.files[0].parent)),
        }
        for path in self.files:
            status = path.stat()
            found[path.name] = path.read_bytes(), status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns
            if LINUX:
                found[f"{path.name}, attributes"] = {n: os.getxattr(path, n) for n in os.listxattr(path)}
        for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
            found[device] = os.stat(device).st_mode, os.stat(device).st_uid
        for number, listener in enumerate(self.datagrams):
            with contextlib.suppress(BlockingIOError):
                found[f"datagram {number}"] = listener.recv(99)
        if LINUX:
            pid, libc = self.victim.pid, ctypes.CDLL(None)
            found["priority"] = (
                os.getpriority(os.PRIO_PROCESS, pid),
                os.sched_getscheduler(pid),
                os.sched_getaffinity(pid),
            )
            found["disk"] = libc.syscall(252 if os.uname().machine == "x86_64" else 31, 1, pid)
            found["limits"] = [resource.prlimit(pid, n) for n in range(16)]
            found["score"] = Path(f"/proc/{pid}/oom_score_adj").read_text()
            found["own priority"] = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
            found["shared memory"] = ctypes.string_at(self.segment, 8)
            for kind, name in (("shm", "shm"), ("msg", "queue"), ("sem", "semaphore")):
                rows = [line.split()[:5] for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()]
                found[name] = [row for row in rows if row[1] == str(self.words[name])]
        return found


@contextlib.contextmanager
def arena() -> Iterator[Arena]:
    """An arena with everything in place."""
    with contextlib.ExitStack() as stack:
        # Beside the tests' own temporary folder, where nothing but rights keeps a program off it.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vpd-canary-")))
        library = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vpd-library-")))
        library.chmod(0o755)
        files = [folder / "canary", folder / "key", library / "lib.py"]
        for path, rights in zip(files, (0o666, 0o600, 0o644), strict=True):
            path.write_text(str(SECRET))
            path.chmod(rights)
        folder.chmod(0o777)
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))]
        port = listeners[0].getsockname()[1]
        datagrams = []
        for kind, name in ((socket.SOCK_STREAM, "socket"), (socket.SOCK_DGRAM, "dgram")):
            own = "canary" if name == "socket" else name
            for address in (f"{folder}/{name}", *([f"\0vpd-{own}-{port}"] if LINUX else [])):
                listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
                listener.bind(address)
                if kind == socket.SOCK_STREAM:
                    listener.listen()
                else:
                    listener.setblocking(False)
                    datagrams.append(listener)
        os.environ["VPD_CANARY"] = "x"
        stack.callback(os.environ.pop, "VPD_CANARY")
        victim = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        words = {"canary": files[0], "key": files[1], "lib": files[2], "port": port, "socket": f"{folder}/socket"}
        words |= {"dgram": f"{folder}/dgram", "pid": os.getpid(), "victim": victim.pid, "home": Path.home()}
        segment = 0
        if LINUX:
            os.setxattr(files[0], "user.secret", b"x")
            segment = _shared(stack, words)
        yield Arena(words, victim, files, datagrams, segment)


def _shared(stack: contextlib.ExitStack, words: dict[str, object]) -> int:
    """System V objects of this user, which other processes of the user reach by number. Returns the segment's address."""
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    words["shm"] = shm = libc.shmget(0, 4096, 0o1600)
    words["queue"] = queue = libc.msgget(0, 0o1600)
    words["semaphore"] = semaphore = libc.semget(0, 1, 0o1600)
    libc.msgsnd(queue, (1).to_bytes(8, sys.byteorder) + b"original", 8, 0)
    address = libc.shmat(shm, None, 0)
    ctypes.memset(address, 79, 8)
    stack.callback(libc.shmctl, shm, 0, None)
    stack.callback(libc.shmdt, ctypes.c_void_p(address))
    stack.callback(libc.msgctl, queue, 0, None)
    stack.callback(libc.semctl, semaphore, 0, 0, 0)
    return int(address)


def fill(program: str, words: Mapping[str, object]) -> str:
    return re.sub(r"\{([a-z]+)\}", lambda m: str(words.get(m[1], m[0])), program)


def one(name: str, source: str) -> str:
    """A short attack as a program of its own."""
    return f"{HELP}NAME={name!r}\n{source}"


def batch(programs: Mapping[str, str]) -> str:
    """Many short attacks as one program, which prints END when it has tried them all."""
    loop = (
        "for NAME, source in {}.items():\n    try: exec(source)\n    except (OSError, ValueError): pass\nprint('END')"
    )
    return HELP + loop.replace("{}", repr(dict(programs)))


def kept(sandbox: Sandbox) -> list[str]:
    """The promises that these layers keep."""
    return [promise for promise in PROMISES if promise not in sandbox.abilities.missing]


def patient(sandbox: Sandbox) -> Sandbox:
    """The same with time enough for a busy machine."""
    other = copy.copy(sandbox)
    other.limits = replace(sandbox.limits, wall_s=60, cpu_s=10)
    return other


@dataclass(frozen=True)
class Attack:
    """How one program ended."""

    name: str
    result: Result
    seconds: float

    @property
    def harmed(self) -> bool:
        return "HARM" in self.result.stdout


def attack(sandbox: Sandbox, programs: Mapping[str, str], words: Mapping[str, object]) -> list[Attack]:
    """Run programs one by one, several at a time."""

    def run(item: tuple[str, str]) -> Attack:
        start = time.monotonic()
        result = sandbox.run(fill(item[1], words), "3\n")
        return Attack(item[0], result, time.monotonic() - start)

    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(run, programs.items()))


def attack_at_once(sandbox: Sandbox, promises: list[str], words: Mapping[str, object]) -> list[str]:
    """Run all short attacks on these promises in one program; returns what got through."""
    programs = {f"{promise}: {name}": code for promise in promises for name, code in QUICK.get(promise, {}).items()}
    result = patient(sandbox).run(fill(batch(programs), words))
    assert result.stdout.endswith("END\n"), result
    return [line for line in result.stdout.splitlines() if line.startswith("HARM")]


def forge(sandbox: Sandbox, words: Mapping[str, object], forgeries: Mapping[str, str]) -> dict[str, list[bool]]:
    """Whether programs score, in every way in which they can be asked."""
    # Put together in the program, so that it does not find itself.
    hint = str(SECRET)[:9]
    words = {"pattern": f"('{hint[:4]}'+'{hint[4:]}'+r'\\d{{9}}')", **words}
    tests = [question.format(answer=SECRET) for question in QUESTIONS]

    def ask(item: tuple[str, str]) -> tuple[str, list[bool]]:
        program = fill(item[1], words)
        with sandbox.open(program) as loaded:
            got = loaded.call("answer", [3])
            scores = [isinstance(got, Value) and got.equals(SECRET)]
        with sandbox.open(program) as loaded:
            outcomes = sandbox.judge(loaded, tests, {"answer": "answer"}, most_failures=len(tests))
            scores += [outcome.passed for outcome in outcomes]
        result = sandbox.run(program + "\nprint(answer(int(input())))", "3\n")
        return item[0], [*scores, result.stdout.strip() == str(SECRET)]

    with ThreadPoolExecutor(4) as pool:
        return dict(pool.map(ask, forgeries.items()))
