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
from vpd_mlx.sandbox.folders import FIRST_UID
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
    "processes": "programs could signal, slow down and inspect other processes of this user",
    "descendants": "processes that a program leaves behind could live on",
    "resources": "programs could take more memory, and start more processes, than they may",
    "kernel": "programs could reach keyrings and parts of the kernel that often have holes",
}
# Sets of layers that keep a promise: one of them is enough. Landlock alone leaves rights, times and attributes of files to a
# program. A network namespace leaves sockets to the host of a virtual machine. Shared memory escapes a limit on address space,
# and root one on processes.
KEPT_BY: dict[str, tuple[set[str], ...]] = {
    "files": ({"namespaces"}, {"landlock", "seccomp"}, {"seatbelt"}),
    "network": ({"seccomp"}, {"seatbelt"}),
    "processes": ({"namespaces"}, {"landlock", "seccomp"}, {"seatbelt", "lookups"}),
    "descendants": ({"namespaces"}, {"seccomp"}, {"seatbelt"}),
    "resources": ({"seccomp"}, {"seatbelt"}),
    "kernel": ({"seccomp"}, {"seatbelt", "lookups"}),
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
        """Which layers failed and what programs could do without them, in one line; empty if none failed and none is missing."""
        if not self.missing and not self.reasons:
            return ""
        what = "; ".join(PROMISES[m] for m in self.missing) or "every promise is kept, but by fewer layers"
        return f"sandbox: {what}" + (f" ({'; '.join(self.reasons)})" if self.reasons else "")


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


def child_command(limits: Limits, layers: Sequence[str], packages: Sequence[str], mode: str, tmp: str) -> list[str]:
    """The command line of a child; `tmp` is its folder."""
    # No other process has this user id: the kernel counts threads per user, and lets a user's processes signal one another.
    uid = FIRST_UID + os.getpid() % 2**22 * 256 + next(_numbers) % 256
    words = {"mode": mode, "layers": ",".join(layers), "tmp": tmp, "uid": uid}
    words |= {"cpu": limits.cpu_s, "memory": limits.memory_mb << 20}
    words |= {"file": limits.file_mb << 20, "threads": limits.threads}
    command = [python(), "-I", "-S", "-B", "-X", "utf8", "-c", START, *CODE, *(f"{k}={v}" for k, v in words.items())]
    command += [f"read={path}" for path in (*_library_folders(), *packages)]
    command += [f"path={path}" for path in packages]
    if "seatbelt" in layers:
        prefixes = (sys.base_prefix, sys.base_exec_prefix)
        code = [path for source in CODE for path in (source, importlib.util.cache_from_source(source))]
        profile = seatbelt_profile(python(), prefixes, tmp, packages, code, "lookups" in layers)
        command[:0] = ["/usr/bin/sandbox-exec", "-p", profile]
    return command


def _library_folders() -> list[str]:
    own = [f"{prefix}/{lib}" for prefix in (sys.base_prefix, sys.base_exec_prefix) for lib in ("lib", "lib64")]
    system = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/nix/store"]
    return sorted({path for path in (*own, *system) if os.path.isdir(path)}, key=lambda path: (len(path), path))


# What an interpreter on macOS is made of, besides its own prefix: the system (since macOS 13 partly in Cryptexes), python.org's
# frameworks, and the libraries of Homebrew (Apple silicon and Intel), MacPorts and Nix. uv's, conda's and pyenv's interpreters
# bring theirs in the prefix.
MAC_LIBRARIES = (
    *("/System", "/usr/lib", "/usr/share", "/Library/Apple", "/Library/Frameworks"),
    *("/private/preboot/Cryptexes", "/private/var/db/dyld"),
    *(
        f"{brew}/{folder}"
        for brew in ("/opt/homebrew", "/usr/local")
        for folder in ("lib", "opt", "Cellar", "Frameworks")
    ),
    *("/opt/local/lib", "/opt/local/libexec", "/opt/local/Library/Frameworks"),
    "/nix/store",
)
MAC_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/autofs_nowait", "/dev/dtracehelper")


def seatbelt_profile(
    python: str, prefixes: Sequence[str], tmp: str, packages: Sequence[str], code: Sequence[str], lookups: bool
) -> str:
    """The profile for macOS's `sandbox-exec`, where the last rule that matches decides.

    It allows one process to execute this Python and nothing else, to read it and the system's libraries, to write to its folder
    and to signal itself. `lookups` also denies system services, which could act on a program's behalf. `prefixes` are the
    interpreter's folders, `code` our own files.
    """

    def paths(kind: str, *names: str) -> str:
        # The kernel compares real paths, and an interpreter is often a chain of links.
        every = dict.fromkeys(path for name in names for path in (name, os.path.realpath(name)))
        return " ".join(f"({kind} {json.dumps(path, ensure_ascii=False)})" for path in every)

    own = (*prefixes, os.path.dirname(python), os.path.dirname(os.path.realpath(python)))
    readable = paths("subpath", *MAC_LIBRARIES, *own, *packages, tmp, "/dev/fd")  # and its own pipes, by number
    rules = [
        "(version 1)(allow default)",
        "(deny network*)(deny process-fork)(deny process-exec*)(deny signal)(allow signal (target self))",
        "(deny ipc-posix-shm*)(deny ipc-sysv*)",
        f"(allow process-exec* {paths('subpath', *own)})",
        f"(deny file-read-data)(allow file-read-data {paths('literal', '/', *code, *MAC_DEVICES)} {readable})",
        f'(deny file-write*)(allow file-write* {paths("subpath", tmp)} (literal "/dev/null"))',
    ]
    if lookups:
        rules.append("(deny mach-lookup)(deny mach-register)(deny iokit-open)(deny appleevent-send)(deny job-creation)")
        rules.append("(deny lsopen)(deny process-info*)(allow process-info* (target self))")
    return "".join(rules)
