"""One child process: its pipes, its limits, its end, and the removal of its folder."""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence

from vpd_mlx.errors import SourceError
from vpd_mlx.sandbox.folders import Folder
from vpd_mlx.sandbox.layers import PLATFORM, child_command
from vpd_mlx.sandbox.results import Ended, Failure, Limits, Result
from vpd_mlx.sandbox.spawn import Child

__all__ = ["Process"]

SETUP_SECONDS = 30.0  # for the child's own part, on a machine that is busy training
TICK = 0.05  # seconds between checks of limits that the kernel does not enforce
READ = ("out", "err", "res")  # pipes that we read; we write to "in" and "ctl"


class Process:
    """A child in `mode` run, serve or judge. `close` leaves nothing behind."""

    def __init__(
        self,
        limits: Limits,
        layers: Sequence[str],
        packages: Sequence[str],
        mode: str,
        program: str,
        prelude: str = "",
        stdin: str = "",
    ) -> None:
        self.limits = limits
        self.granted_s = limits.wall_s
        self._ready = False
        self._forced: Ended | None = None
        self._failure: Failure | None = None
        self._setup_fault = ""
        self._frames: list[tuple[bytes, bytes]] = []
        self._frame_buffer = bytearray()
        self._frame_total = 0
        self._text = {"out": bytearray(), "err": bytearray()}
        self._exit: int | None = None
        self._deadline = time.monotonic() + SETUP_SECONDS
        self._folder = None if "namespaces" in layers else Folder()
        self._selector = selectors.DefaultSelector()
        self._open: dict[str, int] = {}
        self._pending = {"in": bytearray(stdin.encode("utf-8", "replace")), "ctl": bytearray()}
        self._child = self._spawn(layers, packages, mode)
        self.write_ctl(prelude.encode("utf-8", "replace"))
        self.write_ctl(program.encode("utf-8", "replace"))
        if stdin:
            self._selector.register(self._open["in"], selectors.EVENT_WRITE, "in")
        else:
            self._close("in")

    def _spawn(self, layers: Sequence[str], packages: Sequence[str], mode: str) -> Child:
        theirs: dict[str, int] = {}
        try:
            for name in ("in", "ctl", *READ):
                read, write = os.pipe()
                self._open[name], theirs[name] = (read, write) if name in READ else (write, read)
                os.set_blocking(self._open[name], False)
                if name in READ:
                    self._selector.register(read, selectors.EVENT_READ, name)
            command = child_command(self.limits, layers, packages, mode, self._folder.path if self._folder else "/tmp")
            return Child(command, [theirs[name] for name in ("in", "out", "err", "ctl", "res")])
        except OSError as error:
            self._release()
            raise SourceError(f"sandbox: cannot start a process ({error}); free memory or file handles") from error
        finally:
            for fd in theirs.values():
                os.close(fd)

    def write_ctl(self, body: bytes) -> None:
        """Queue one block for the child."""
        if "ctl" not in self._open:
            return
        if not self._pending["ctl"]:
            self._selector.register(self._open["ctl"], selectors.EVENT_WRITE, "ctl")
        self._pending["ctl"] += len(body).to_bytes(4, "big") + body

    def renew(self) -> None:
        """Count time and output from here."""
        self._frame_total = 0
        for text in self._text.values():
            text.clear()
        if self._ready:
            self.granted_s = self.limits.wall_s
            self._deadline = time.monotonic() + self.limits.wall_s

    def next_frame(self) -> tuple[bytes, bytes] | None:
        """The next frame, or None if the child has ended."""
        self.pump(lambda: bool(self._frames))
        return self._frames.pop(0) if self._frames else None

    def pump(self, until: Callable[[], bool] = lambda: False) -> None:
        """Move bytes until `until()` holds or the child ends, and kill it beyond a limit. SourceError: it is not isolated."""
        next_look = time.monotonic() + TICK
        while not until() and self._exit is None:
            now = time.monotonic()
            if now >= self._deadline:
                self._force("timeout")
                break
            if not any(name in self._open for name in READ):
                self._wait(self._deadline - now)
                continue
            for key, _ in self._selector.select(min(self._deadline - now, TICK)):
                self._move(key.data)
            if self._forced is not None:
                break
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + TICK
                self._check_limits()
                # Processes that the child left behind may hold the pipes open: stop when it ends itself.
                if self._child.wait() is not None:
                    self._drain()
                    self._wait(0)
        if not self._ready:
            self.kill()
            why = self._setup_fault or self._text["err"].decode("utf-8", "replace").strip()[-300:] or "it ended early"
            raise SourceError(f"sandbox: a process could not isolate itself: {why}")

    def result(self) -> Result:
        """How it ended. Kills it if it has not."""
        self.kill()
        out, err = (bytes(self._text[name]).decode("utf-8", "replace") for name in ("out", "err"))
        ended, failure = self._verdict(err)
        return Result(ended, out, err, failure)

    def _verdict(self, err: str) -> tuple[Ended, Failure | None]:
        limits, code = self.limits, self._exit
        if code is not None and code < 0:
            code = 128 - code
        if self._forced == "timeout":
            return "timeout", Failure("Timeout", f"took longer than {self.granted_s:g} s")
        if self._forced is None and code == 128 + signal.SIGXCPU:
            return "timeout", Failure("Timeout", f"took more than {limits.cpu_s} s of processor time")
        if self._forced == "output":
            return "output", Failure("OutputLimit", f"wrote more than {limits.output_kb} kB")
        if self._forced == "disk":
            return "disk", Failure("DiskLimit", f"wrote more than {limits.file_mb} MB of files")
        error = self._failure
        last_line = err.rstrip().rpartition("\n")[2]
        no_memory = error.kind == "MemoryError" if error else code != 0 and last_line.startswith("MemoryError")
        if self._forced == "memory" or no_memory:
            return "memory", Failure("MemoryError", f"took more than {limits.memory_mb} MB", error.line if error else 0)
        if error is not None:
            return "error", error
        if code == 0:
            return "ok", None
        # Real-time signals have numbers without a name.
        if killed_by := {128 + s: s.name for s in signal.Signals}.get(code or 0):
            return "error", Failure("Killed", f"ended by signal {killed_by}")
        return "error", Failure("SystemExit", f"ended with status {code}")

    def _move(self, name: str) -> None:
        fd = self._open[name]
        if name in self._pending:
            try:
                del self._pending[name][: os.write(fd, self._pending[name][:65536])]
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._pending[name].clear()
            if not self._pending[name]:
                self._selector.unregister(fd)
                if name == "in":
                    self._close(name)
            return
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        if not data:
            self._close(name)
        elif name == "res":
            self._frame_buffer += data
            self._frame_total += len(data)
            self._cut_frames()
        else:
            self._text[name] += data
        if self._received() > self.limits.output_kb * 1024:
            self._force("output")

    def _received(self) -> int:
        # Frames carry returned values, and count like printed text.
        return len(self._text["out"]) + len(self._text["err"]) + self._frame_total

    def _cut_frames(self) -> None:
        buffer = self._frame_buffer
        while len(buffer) >= 5:
            size = int.from_bytes(buffer[:4], "big")
            if size > self.limits.output_kb * 1024:
                self._force("output")
            if len(buffer) < 4 + size:
                return
            letter, body = bytes(buffer[4:5]), bytes(buffer[5 : 4 + size])
            del buffer[: 4 + size]
            if not self._ready:
                if letter == b"R":
                    self._ready = True
                    self._deadline = time.monotonic() + self.granted_s
                else:
                    self._setup_fault = body.decode("utf-8", "replace")
            elif letter == b"E":
                self._failure = Failure.parse(body)
            else:
                self._frames.append((letter, body))

    def _drain(self) -> None:
        for name in READ:
            before = -1
            while name in self._open and self._forced is None and before != self._received():
                before = self._received()
                self._move(name)

    def _check_limits(self) -> None:
        if self._folder is not None and self._folder.size() > self.limits.file_mb << 20:
            self._force("disk")
        elif PLATFORM == "darwin" and _footprint(self._child.pid) > self.limits.memory_mb << 20:
            self._force("memory")

    def _force(self, why: Ended) -> None:
        self._forced = self._forced or why
        self.kill()

    def _wait(self, seconds: float) -> None:
        self._exit = self._child.wait(max(seconds, 0))

    def kill(self) -> None:
        """End it and everything it started."""
        if self._exit is None:
            self._child.kill()
            self._wait(SETUP_SECONDS)

    def close(self) -> None:
        """Kill, close the pipes, and remove the folder."""
        self.kill()
        self._release()

    def _close(self, name: str) -> None:
        fd = self._open.pop(name)
        if fd in self._selector.get_map():
            self._selector.unregister(fd)
        os.close(fd)

    def _release(self) -> None:
        for name in list(self._open):
            self._close(name)
        self._selector.close()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None


def _footprint(pid: int) -> int:
    """Memory of a process on macOS, which does not enforce RLIMIT_AS: `ri_phys_footprint` of proc_pid_rusage."""
    buffer = ctypes.create_string_buffer(512)
    if ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage(pid, 0, ctypes.byref(buffer)) != 0:
        return 0
    return int.from_bytes(buffer.raw[72:80], sys.byteorder)
