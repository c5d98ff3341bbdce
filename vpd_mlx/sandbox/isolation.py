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
OLD = "/.vpd-old"  # where the machine's own root stays while the new one is made

# System calls that programs do without: name, number on x86_64, number on aarch64 (-1: none). In turn: other processes, their
# priorities, memory that RLIMIT_AS does not count and what the kernel has only so many of, objects that processes of one user
# share, sockets but for pairs, and parts of the kernel that programs have no business with.
DENIED = """
    fork 57 -1                vfork 58 -1                execve 59 221              execveat 322 281
    tkill 200 130             rt_sigqueueinfo 129 138    rt_tgsigqueueinfo 297 240  pidfd_open 434 434
    pidfd_getfd 438 438       pidfd_send_signal 424 424  ptrace 101 117             process_vm_readv 310 270
    process_vm_writev 311 271 process_madvise 440 440    process_mrelease 448 448   kcmp 312 272
    get_robust_list 274 100   migrate_pages 256 238      move_pages 279 239

    setpriority 141 140       sched_setaffinity 203 122  sched_setparam 142 118     sched_setscheduler 144 119
    sched_setattr 314 274     ioprio_set 251 30

    memfd_create 319 279      memfd_secret 447 447       shmget 29 194              msgget 68 186
    semget 64 190             mq_open 240 180            io_setup 206 0             inotify_init 253 -1
    inotify_init1 294 26

    shmat 30 196              shmctl 31 195              msgsnd 69 189              msgrcv 70 188
    msgctl 71 187             semop 65 193               semctl 66 191              semtimedop 220 192
    mq_unlink 241 181         add_key 248 217            request_key 249 218        keyctl 250 219

    socket 41 198             bind 49 200                connect 42 203             listen 50 201

    bpf 321 280               perf_event_open 298 241    userfaultfd 323 282        io_uring_setup 425 425
    io_uring_enter 426 426    io_uring_register 427 427  unshare 272 97             setns 308 268
    mount 165 40              umount2 166 39             pivot_root 155 41          chroot 161 51
    open_tree 428 428         move_mount 429 429         fsopen 430 430             fsconfig 431 431
    fsmount 432 432           fspick 433 433             mount_setattr 442 442      statmount 457 457
    listmount 458 458         open_tree_attr 467 467     open_by_handle_at 304 265  name_to_handle_at 303 264
    fanotify_init 300 262     quotactl 179 60            quotactl_fd 443 443        syslog 103 116
    seccomp 317 277           personality 135 92         modify_ldt 154 -1          sync 162 81
    syncfs 306 267
"""
# The same where namespaces do not hide the files of others: Landlock leaves owner, rights, times and attributes of files alone,
# and its first versions leave truncation alone.
DENIED_OUTSIDE = """
    chmod 90 -1               fchmod 91 52               fchmodat 268 53            fchmodat2 452 452
    chown 92 -1               fchown 93 55               lchown 94 -1               fchownat 260 54
    utime 132 -1              utimes 235 -1              futimesat 261 -1           utimensat 280 88
    setxattr 188 5            lsetxattr 189 6            fsetxattr 190 7            setxattrat 463 463
    getxattr 191 8            lgetxattr 192 9            fgetxattr 193 10           getxattrat 464 464
    listxattr 194 11          llistxattr 195 12          flistxattr 196 13          listxattrat 465 465
    removexattr 197 14        lremovexattr 198 15        fremovexattr 199 16        removexattrat 466 466
    file_setattr 469 469      truncate 76 45             openat2 437 437
"""
NEWEST = 469  # the kernel may know calls beyond this table: they are refused
CLONE, CLONE3 = (56, 220), (435, 435)
EPERM, EINVAL, ENOTTY, ENOSYS = 1, 22, 25, 38
# Calls with one argument of which only some values pass: numbers, which argument, the values ("self": this process), error.
# fcntl: no F_SETOWN, F_SETSIG, leases and notices, which send signals. ioctl: what isatty and set_blocking use. prctl: no
# PR_SET_PDEATHSIG. socketpair: streams alone, because a datagram socket reaches any socket that it names.
ONLY: tuple[tuple[tuple[int, int], int, tuple[int | str, ...], int], ...] = (
    ((62, 129), 0, ("self",), EPERM),  # kill
    ((234, 131), 0, ("self",), EPERM),  # tgkill
    ((302, 261), 0, (0, "self"), EPERM),  # prlimit64
    ((72, 25), 1, (*range(8), 9, 11, 36, 37, 38, 1030, 1032), EINVAL),  # fcntl
    ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A), ENOTTY),  # ioctl
    ((157, 167), 0, (2, 3, 15, 16, 21, 30, 39, 0x53564D41), EPERM),  # prctl
    ((53, 199), 0, (1,), EPERM),  # socketpair: AF_UNIX
    ((53, 199), 1, (1, 0x801, 0x80001, 0x80801), EPERM),  # and SOCK_STREAM, with or without NONBLOCK and CLOEXEC
)


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
        self.ctl, self.res = 3, 4
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
            for fd in range(5):
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
    os.mkdir("/tmp" + OLD)
    kernel("namespaces", "syscall", 155 if os.uname().machine == "x86_64" else 41, b"/tmp", ("/tmp" + OLD).encode())
    os.chdir("/")
    for link, to in links:
        os.symlink(to, link)
    # The program's folder comes before the libraries, which may lie under /tmp, /dev or /etc themselves.
    os.mkdir("/tmp", 0o755)
    kernel.mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV | NOEXEC, f"size={spec.file},nr_inodes=1k,mode=1777")
    for path, source in sources:
        if os.path.lexists(path) or not os.path.isdir(OLD + source):
            continue
        os.makedirs(path, 0o755)
        kernel.mount(OLD + source, path, None, BIND | REC)
        # A user namespace may not remove flags of the source's own mount.
        kept = os.statvfs(path).f_flag & (RDONLY | NOSUID | NODEV | NOEXEC)
        kernel.mount("none", path, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | kept)
    os.makedirs("/dev", 0o755, exist_ok=True)
    for device in DEVICES:
        os.close(os.open(device, os.O_CREAT | os.O_WRONLY))
        kernel.mount(OLD + device, device, None, BIND)
        # Writing to a device needs no writable mount; changing its rights does.
        kept = os.statvfs(device).f_flag & (NOSUID | NODEV | NOEXEC)
        kernel.mount("none", device, None, REMOUNT | BIND | RDONLY | kept)
    os.makedirs("/etc", 0o755, exist_ok=True)
    if os.path.exists(OLD + "/etc/ld.so.cache"):
        with open(OLD + "/etc/ld.so.cache", "rb") as old, open("/etc/ld.so.cache", "wb") as new:
            new.write(old.read())
    kernel("namespaces", "umount2", OLD.encode(), 2)
    os.rmdir(OLD)
    kernel.mount("none", "/", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    spec.tmp = "/tmp"


def set_limits(spec: Spec) -> None:
    """Set resource limits. macOS refuses some; there the parent watches memory."""
    import resource

    limits = {"CPU": spec.cpu, "AS": spec.memory, "FSIZE": spec.file, "NOFILE": 64}
    limits |= dict.fromkeys(("CORE", "MEMLOCK", "MSGQUEUE"), 0)
    limits["SIGPENDING"] = 64  # the kernel counts those of all processes of a user
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
    """Restrict files: libraries may be read, the temporary folder written, nothing else opened.

    Where the kernel can, also no TCP ports (version 4), no ioctl on devices (5), and no abstract sockets of other processes and
    no signals to them (6).
    """
    version = kernel("landlock", "syscall", 444, None, 0, 1)
    every = (1 << 13) - 1
    for since, right in ((2, 13), (3, 14), (5, 15)):
        every |= (version >= since) << right
    words = [every] + [3] * (version >= 4) + [3] * (version >= 6)
    attributes = (kernel.c.c_uint64 * len(words))(*words)
    read = (1 << 2) | (1 << 3)
    special = 1 | (1 << 6) | (1 << 9) | (1 << 10) | (1 << 11) | (1 << 15)  # execute, make devices and sockets, ioctl
    rules = [(path, read) for path in spec.read]
    rules += [(spec.tmp, every & ~special), *((d, (1 << 1) | (1 << 2)) for d in DEVICES), ("/etc/ld.so.cache", 1 << 2)]
    ruleset = kernel("landlock", "syscall", 444, kernel.c.byref(attributes), 8 * len(words), 0)
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


def apply_seccomp(kernel: Kernel, spec: Spec) -> None:
    """Filter system calls: threads, but no new process, network, signals to others, or uncounted memory."""
    machines = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
    machine = os.uname().machine
    if machine not in machines or sys.maxsize < 2**32:
        raise LayerError(f"seccomp: no table of system calls for {machine}")
    code = _filter(*machines[machine], os.getpid(), "namespaces" not in spec.layers)
    order = sys.byteorder
    packed = b"".join(c.to_bytes(2, order) + bytes((t, f)) + k.to_bytes(4, order) for c, t, f, k in code)
    buffer = kernel.c.create_string_buffer(packed, len(packed))
    program = len(code).to_bytes(8, order) + kernel.c.addressof(buffer).to_bytes(8, order)
    kernel("seccomp", "prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _filter(column: int, architecture: int, pid: int, outside: bool) -> list[tuple[int, int, int, int]]:
    """The filter in the kernel's classic BPF: operation, steps to skip if true, if false, operand."""
    load, equal, at_least, any_bit, mask, give = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050000, 0x80000000  # the error's number is added to deny
    number = (load, 0, 0, 0)

    def argument(index: int) -> tuple[int, int, int, int]:
        return load, 0, 0, 16 + 8 * index  # its lower half: all arguments here are ints

    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), number]
    # x86_64's x32 calls are numbers far beyond.
    code += [(at_least, 0, 1, NEWEST + 1), (give, 0, 0, deny + ENOSYS)]
    # Without clone3 libc falls back to clone, whose flags can be checked.
    code += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, deny + ENOSYS)]
    code += [(equal, 0, 5, CLONE[column]), argument(0)]
    code += [(any_bit, 1, 0, 0x7E020000), (any_bit, 1, 0, 0x00010000), (give, 0, 0, deny + EPERM), (give, 0, 0, allow)]
    for call, index, values, error in ONLY:
        few = [pid if v == "self" else int(v) for v in values]
        checks = [(equal, len(few) - i, 0, v) for i, v in enumerate(few)]
        code += [(equal, 0, len(few) + 3, call[column]), argument(index), *checks, (give, 0, 0, deny + error), number]
    if outside:
        for opening, index in (((2, -1), 1), ((257, 56), 2)):  # open, openat: O_TRUNC without O_WRONLY or O_RDWR
            if opening[column] >= 0:
                check = [(mask, 0, 0, 0x203), (equal, 0, 1, 0x200), (give, 0, 0, deny + EPERM), number]
                code += [(equal, 0, 5, opening[column]), argument(index), *check]
    for denied in map(int, (DENIED + DENIED_OUTSIDE * outside).split()[1 + column :: 3]):
        if denied >= 0:
            code += [(equal, 0, 1, denied), (give, 0, 0, deny + EPERM)]
    return [*code, (give, 0, 0, allow)]


def isolate(spec: Spec) -> str:
    """Apply all layers, the outermost first. Returns `layer: reason` of the first that failed, or nothing."""
    try:
        _apply_layers(spec)
        return ""
    except LayerError as error:
        return str(error)
    except (OSError, ValueError, ImportError) as error:
        return f"limits: {error}"


def _close_others() -> None:
    """Close what was inherited by accident. Only standard files and our two pipes, 0 to 4, are meant for this process."""
    import resource

    try:
        numbers = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        numbers = list(range(most if 0 < most < 1 << 16 else 1 << 16))
    for number in numbers:
        if number > 4:
            os.closerange(number, number + 1)  # among them the listing's own, closed by now


def _apply_layers(spec: Spec) -> None:
    _close_others()
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
        apply_seccomp(kernel, spec)
