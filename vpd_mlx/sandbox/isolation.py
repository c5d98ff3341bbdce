"""Isolation: what a child process does to itself before it receives the program.

It runs in the child, like `child`, so only the standard library is used and the package is out of reach. `isolate` applies every
layer that the command line names, or says which one failed; the parent decides whether to go on without it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # importing typing would take as long as a small program
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Spec", "isolate"]

NAMESPACES = 0x00020000 | 0x20000000 | 0x08000000 | 0x40000000 | 0x04000000  # mount, pid, ipc, net, uts
USER_NAMESPACE = 0x10000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# System calls that programs do without: name, number on x86_64, number on aarch64 (-1: none). `socketpair` is another call than
# `socket` and stays allowed. From `memfd_create` to `mq_open`: memory that RLIMIT_AS does not count.
DENIED = """
    socket 41 198             fork 57 -1                 vfork 58 -1                execve 59 221
    execveat 322 281          tkill 200 130              rt_sigqueueinfo 129 138    rt_tgsigqueueinfo 297 240
    pidfd_open 434 434        pidfd_getfd 438 438        pidfd_send_signal 424 424  ptrace 101 117
    process_vm_readv 310 270  process_vm_writev 311 271  process_madvise 440 440    kcmp 312 272
    unshare 272 97            setns 308 268              mount 165 40               chroot 161 51
    add_key 248 217           request_key 249 218        keyctl 250 219             bpf 321 280
    perf_event_open 298 241   userfaultfd 323 282        io_uring_setup 425 425     memfd_create 319 279
    memfd_secret 447 447      shmget 29 194              msgget 68 186              semget 64 190
    mq_open 240 180           personality 135 92
"""
CLONE, CLONE3, KILL, TGKILL, PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)


class LayerError(Exception):
    """A layer of isolation failed: `name: reason`."""


class Spec:
    """The command line: words `key=value`, of which `read` and `path` may occur several times."""

    def __init__(self, words: list[str]) -> None:
        pairs = [w.partition("=")[::2] for w in words]
        self.read = [v for k, v in pairs if k == "read"]
        self.path = [v for k, v in pairs if k == "path"]
        one = dict(pairs)
        self.mode, self.tmp = one["mode"], one["tmp"]
        self.layers = set(one["layers"].split(","))
        self.ctl, self.res = int(one["ctl"]), int(one["res"])
        self.cpu, self.memory, self.file = int(one["cpu"]), int(one["memory"]), int(one["file"])
        self.threads, self.uid = int(one["threads"]), int(one["uid"])


class Kernel:
    """Calls libc through ctypes and turns failures into LayerError."""

    def __init__(self) -> None:
        import ctypes

        self.c = ctypes
        self.lib = ctypes.CDLL(None, use_errno=True)
        self.lib.syscall.restype = ctypes.c_long

    def __call__(self, layer: str, name: str, *args: Any) -> int:
        # ctypes would pass plain ints as 32 bits.
        words = [self.c.c_long(a) if isinstance(a, int) else a for a in args]
        result = int(getattr(self.lib, name)(*words))
        if result == -1:
            raise LayerError(f"{layer}: {name}: {os.strerror(self.c.get_errno())}")
        return result

    def mount(self, source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
        """mount(2)."""
        self("namespaces", "mount", source.encode(), target.encode(), kind and kind.encode(), flags, data.encode())


def enter_namespaces(kernel: Kernel, spec: Spec) -> None:
    """Return in a process that sees an empty machine: its own root, no network, no other processes.

    Three processes take part. The parent's child waits outside. The first process of the new namespace waits inside, and when it
    dies the kernel kills all others there. The one that returns runs the program.
    """
    root = os.geteuid() == 0
    uid, gid = os.geteuid(), os.getegid()
    kernel("namespaces", "unshare", NAMESPACES | (0 if root else USER_NAMESPACE))
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    for outer in (True, False):
        child = os.fork()
        if child:
            for fd in (0, 1, 2, spec.ctl, spec.res):
                os.close(fd)  # so that the parent's pipes close when the program ends
            _wait_and_exit(child)
        if outer:
            die_with_parent(kernel)
            _new_root(kernel, spec)


def _wait_and_exit(child: int) -> None:
    pid, status = 0, 1
    try:
        while pid != child:
            pid, status = os.wait()
    except ChildProcessError:
        pass
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _new_root(kernel: Kernel, spec: Spec) -> None:
    """Make a root that holds only the libraries Python needs, read-only, and an empty /tmp of limited size."""
    sources = [(path, os.path.realpath(path)) for path in spec.read]
    links = [(p, os.readlink(p)) for p in ("/lib", "/lib32", "/lib64") if os.path.islink(p)]
    kernel.mount("none", "/", None, REC | PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    kernel("namespaces", "syscall", 155 if os.uname().machine == "x86_64" else 41, b"/tmp", b"/tmp/old")
    os.chdir("/")
    for link, to in links:
        os.symlink(to, link)
    for path, source in sources:
        if os.path.lexists(path) or not os.path.isdir("/old" + source):
            continue
        os.makedirs(path, 0o755)
        kernel.mount("/old" + source, path, None, BIND | REC)
        # A user namespace may not remove flags of the source's own mount.
        kept = os.statvfs(path).f_flag & (RDONLY | NOSUID | NODEV | NOEXEC)
        kernel.mount("none", path, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | kept)
    os.mkdir("/dev", 0o755)
    for device in DEVICES:
        os.close(os.open(device, os.O_CREAT | os.O_WRONLY))
        kernel.mount("/old" + device, device, None, BIND)
    os.mkdir("/etc", 0o755)
    if os.path.exists("/old/etc/ld.so.cache"):
        with open("/old/etc/ld.so.cache", "rb") as old, open("/etc/ld.so.cache", "wb") as new:
            new.write(old.read())
    os.mkdir("/tmp", 0o755)
    kernel.mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV | NOEXEC, f"size={spec.file},nr_inodes=1k,mode=1777")
    kernel("namespaces", "umount2", b"/old", 2)
    os.rmdir("/old")
    kernel.mount("none", "/", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    spec.tmp = "/tmp"


def set_limits(spec: Spec) -> None:
    """Set resource limits. macOS refuses some; there the parent watches memory."""
    import resource

    limits = {"CPU": spec.cpu, "AS": spec.memory, "FSIZE": spec.file, "NOFILE": 64}
    limits |= dict.fromkeys(("CORE", "MEMLOCK", "MSGQUEUE"), 0)
    if sys.platform == "linux":
        # The kernel counts threads per user: without a user id of our own, other processes' threads count too.
        others = 0 if {"namespaces", "userid"} & spec.layers else _threads_of(os.geteuid())
        limits["NPROC"] = others + spec.threads
    for name, soft in limits.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is None:
            continue
        hard = soft + (name == "CPU")  # a second between SIGXCPU, which names the reason, and SIGKILL
        try:
            ceiling = resource.getrlimit(which)[1]
            if ceiling != resource.RLIM_INFINITY:
                soft, hard = min(soft, ceiling), min(hard, ceiling)
            resource.setrlimit(which, (soft, hard))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise


def _threads_of(uid: int) -> int:
    count = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:
            continue
    return count


def drop_user(spec: Spec) -> None:
    """Change to a user id that owns nothing and that no other process has."""
    try:
        os.setgroups([])
        os.setresgid(spec.uid, spec.uid, spec.uid)
        os.setresuid(spec.uid, spec.uid, spec.uid)
    except OSError as error:
        raise LayerError(f"userid: {error}") from error


def die_with_parent(kernel: Kernel) -> None:
    """Have the kernel kill this process when its parent dies. Changing the user id undoes this."""
    kernel("privileges", "prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG


def drop_capabilities(kernel: Kernel) -> None:
    """Give up all capabilities, and the ways to gain any by executing a program."""
    kernel("privileges", "prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header = (kernel.c.c_uint32 * 2)(0x20080522, 0)
    kernel("privileges", "capset", kernel.c.byref(header), kernel.c.byref((kernel.c.c_uint32 * 6)()))


def apply_landlock(kernel: Kernel, spec: Spec) -> None:
    """Restrict files: libraries may be read, the temporary folder written, nothing else opened."""
    version = kernel("landlock", "syscall", 444, None, 0, 1)
    every = (1 << 13) - 1 | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    read = (1 << 2) | (1 << 3)
    special = 1 | (1 << 6) | (1 << 9) | (1 << 10) | (1 << 11)  # execute, make devices and sockets
    rules = [(path, read) for path in spec.read]
    rules += [(spec.tmp, every & ~special), *((d, (1 << 1) | (1 << 2)) for d in DEVICES), ("/etc/ld.so.cache", 1 << 2)]
    ruleset = kernel("landlock", "syscall", 444, kernel.c.byref(kernel.c.c_uint64(every)), 8, 0)
    for path, rights in rules:
        try:
            fd = os.open(path, getattr(os, "O_PATH", 0))
        except FileNotFoundError:
            continue
        rule = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
        kernel("landlock", "syscall", 445, ruleset, 1, rule, 0)
        os.close(fd)
    kernel("landlock", "syscall", 446, ruleset, 0)
    os.close(ruleset)


def apply_seccomp(kernel: Kernel) -> None:
    """Filter system calls: threads, but no new process, network, signals to others, or uncounted memory."""
    machines = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
    machine = os.uname().machine
    if machine not in machines or sys.maxsize < 2**32:
        raise LayerError(f"seccomp: no table of system calls for {machine}")
    column, architecture = machines[machine]
    pid = os.getpid()
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, kill, unknown = 0x7FFF0000, 0x00050001, 0x80000000, 0x00050026  # errno 1 EPERM, 38 ENOSYS

    code: list[tuple[int, int, int, int]] = []
    code += [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, deny)]  # x86_64's x32 calls
    # Without clone3 libc falls back to clone, whose flags can be checked.
    code += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, unknown)]
    code += [(equal, 0, 5, CLONE[column]), (load, 0, 0, 16)]
    code += [(any_bit, 1, 0, 0x7E020000), (any_bit, 1, 0, 0x00010000), (give, 0, 0, deny), (give, 0, 0, allow)]
    for call, free in ((KILL, pid), (TGKILL, pid), (PRLIMIT, 0)):
        code += [(equal, 0, 4, call[column]), (load, 0, 0, 16)]
        code += [(equal, 1, 0, free), (give, 0, 0, deny), (give, 0, 0, allow)]
    for number in map(int, DENIED.split()[1 + column :: 3]):
        if number >= 0:
            code += [(equal, 0, 1, number), (give, 0, 0, deny)]
    code.append((give, 0, 0, allow))

    order = sys.byteorder
    packed = b"".join(c.to_bytes(2, order) + bytes((t, f)) + k.to_bytes(4, order) for c, t, f, k in code)
    buffer = kernel.c.create_string_buffer(packed, len(packed))
    program = len(code).to_bytes(8, order) + kernel.c.addressof(buffer).to_bytes(8, order)
    kernel("seccomp", "prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def isolate(spec: Spec) -> str:
    """Apply all layers, the outermost first. Returns `layer: reason` of the first that failed, or nothing."""
    try:
        _apply_layers(spec)
        return ""
    except LayerError as error:
        return str(error)
    except (OSError, ValueError, ImportError) as error:
        return f"limits: {error}"


def _apply_layers(spec: Spec) -> None:
    if sys.platform != "linux":
        os.chdir(spec.tmp)
        set_limits(spec)
        return
    kernel = Kernel()
    die_with_parent(kernel)
    if "namespaces" in spec.layers:
        try:
            enter_namespaces(kernel, spec)
        except OSError as error:
            raise LayerError(f"namespaces: {error}") from error
    os.chdir(spec.tmp)
    if "userid" in spec.layers:
        if "namespaces" not in spec.layers:
            os.chown(spec.tmp, spec.uid, spec.uid)
        drop_user(spec)
        die_with_parent(kernel)
    set_limits(spec)
    drop_capabilities(kernel)
    if "landlock" in spec.layers:
        apply_landlock(kernel, spec)
    if "seccomp" in spec.layers:
        apply_seccomp(kernel)
