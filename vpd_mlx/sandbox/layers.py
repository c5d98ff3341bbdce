"""Layers of isolation: which a machine can offer, the promises they keep, and the command line that applies them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vpd_mlx.sandbox import child, isolation
from vpd_mlx.sandbox.results import Limits

__all__ = ["GIVE_UP_ORDER", "PLATFORM", "Abilities", "child_command", "possible_layers", "python", "seatbelt_profile"]

PLATFORM = str(sys.platform)
CODE = (str(isolation.__file__), str(child.__file__))
# A script would be compiled at every start. This takes the byte code that our import cached, and leaves the import path alone.
START = """import sys, _frozen_importlib_external as e
def load(path):
    module = type(sys)("child")
    exec(e.SourceFileLoader("child", path).get_code("child"), module.__dict__)
    return module
isolation, child = map(load, sys.argv[1:3])
sys.exit(child.main(isolation.Spec(sys.argv[3:]), isolation.isolate))"""
PROMISES = {  # and what can happen if one is not kept
    "files": "programs could read and change files outside their own folder",
    "network": "programs could use the network",
    "processes": "programs could signal and inspect other processes of this user",
    "descendants": "processes that a program leaves behind could live on",
}
# Sets of layers that keep a promise: one of them is enough.
KEPT_BY: dict[str, tuple[set[str], ...]] = {
    "files": ({"namespaces"}, {"landlock"}, {"seatbelt"}),
    "network": ({"namespaces"}, {"seccomp"}, {"seatbelt"}),
    "processes": ({"namespaces"}, {"seccomp", "landlock"}, {"seatbelt", "lookups"}),
    "descendants": ({"namespaces"}, {"seccomp"}, {"seatbelt"}),
}
GIVE_UP_ORDER = ("lookups", "userid", "landlock", "namespaces", "seccomp", "seatbelt")

_numbers = itertools.count()


@dataclass(frozen=True)
class Abilities:
    """The layers of isolation in use on this machine, and why others are not."""

    layers: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """The promises that the layers do not keep."""
        return tuple(p for p, ways in KEPT_BY.items() if not any(way <= set(self.layers) for way in ways))

    def notice(self) -> str:
        """What programs could do for want of a layer, in one line; empty if every promise is kept."""
        if not self.missing:
            return ""
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"sandbox: {'; '.join(PROMISES[m] for m in self.missing)}{why}"


def possible_layers() -> list[str]:
    """The layers worth trying on this platform."""
    if PLATFORM == "linux":
        return ["namespaces", *(["userid"] if os.geteuid() == 0 else []), "landlock", "seccomp"]
    if PLATFORM == "darwin" and Path("/usr/bin/sandbox-exec").exists():
        return ["seatbelt", "lookups"]
    return []


def python() -> str:
    """The interpreter that runs programs."""
    # A virtual environment's interpreter is a link, which may lie in a folder that programs must not see.
    return str(getattr(sys, "_base_executable", "") or sys.executable)


def child_command(
    limits: Limits, layers: Sequence[str], packages: Sequence[str], mode: str, pipes: Sequence[int], tmp: str
) -> list[str]:
    """The command line of a child. `pipes` are its ends of the control and result pipes, `tmp` its folder."""
    # No other process has this user id: the kernel counts threads per user, and lets a user's processes signal one another.
    uid = 1_000_000_000 + os.getpid() % 2**22 * 256 + next(_numbers) % 256
    words = {"mode": mode, "layers": ",".join(layers), "ctl": pipes[0], "res": pipes[1], "tmp": tmp, "uid": uid}
    words |= {"cpu": limits.cpu_s, "memory": limits.memory_mb << 20}
    words |= {"file": limits.file_mb << 20, "threads": limits.threads}
    command = [python(), "-I", "-S", "-B", "-X", "utf8", "-c", START, *CODE, *(f"{k}={v}" for k, v in words.items())]
    command += [f"read={path}" for path in (*_library_folders(), *packages)]
    command += [f"path={path}" for path in packages]
    if "seatbelt" in layers:
        command[:0] = ["/usr/bin/sandbox-exec", "-p", seatbelt_profile(python(), tmp, packages, "lookups" in layers)]
    return command


def _library_folders() -> list[str]:
    own = [f"{prefix}/{lib}" for prefix in (sys.base_prefix, sys.base_exec_prefix) for lib in ("lib", "lib64")]
    system = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/nix/store"]
    return sorted({path for path in (*own, *system) if os.path.isdir(path)}, key=lambda path: (len(path), path))


def seatbelt_profile(python: str, tmp: str, packages: Sequence[str], lookups: bool) -> str:
    """The profile for macOS's `sandbox-exec`, where the last rule that matches decides.

    It allows one process to execute this Python and nothing else, to read it and the system's libraries, to write to its folder
    and to signal itself. `lookups` also denies system services, which could act on a program's behalf.
    """

    def folders(*paths: str) -> str:
        every = dict.fromkeys(path for p in paths for path in (p, os.path.realpath(p)))
        return " ".join(f"(subpath {json.dumps(path)})" for path in every)

    prefix = (sys.base_prefix, sys.base_exec_prefix, str(Path(python).parent))
    code = [path for source in CODE for path in (source, importlib.util.cache_from_source(source))]
    system = ["/System", "/usr/lib", "/usr/share", "/Library/Apple"]
    system += ["/Library/Frameworks", "/dev", "/private/var/db/dyld"]
    # Libraries that Homebrew's Python is linked with.
    system += [f"{brew}/{folder}" for brew in ("/opt/homebrew", "/usr/local") for folder in ("lib", "opt", "Cellar")]
    rules = [
        "(version 1)(allow default)",
        "(deny network*)(deny process-fork)(deny process-exec*)(deny signal)(allow signal (target self))",
        "(deny ipc-posix-shm*)(deny ipc-sysv*)",
        f"(allow process-exec* {folders(*prefix)})",
        f'(deny file-read-data)(allow file-read-data (literal "/") {folders(*system, *prefix, *packages, *code, tmp)})',
        f'(deny file-write*)(allow file-write* {folders(tmp)} (literal "/dev/null"))',
    ]
    if lookups:
        rules.append("(deny mach-lookup)(deny mach-register)(deny iokit-open)(deny appleevent-send)(deny job-creation)")
        rules.append("(deny lsopen)(deny process-info*)(allow process-info* (target self))")
    return "".join(rules)
