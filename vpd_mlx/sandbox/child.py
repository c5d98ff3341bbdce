"""The other side of `sandbox`: shut ourselves in, then run a program that nobody trusts.

Started by `sandbox` with `main(SPEC)`, alone, without the package. Only the standard library is used, and of that as little
as the way to the program needs, since start-up is most of a small program's time. The parent's side imports `encode`, too.

Every layer of isolation that SPEC names is put on or the process ends with an `S` frame that names it: `sandbox` decides
what to do without it. Frames to the parent are 4 bytes of length, one letter and a body:
`R` ready, `S` a layer failed, `E` the program raised, `V` a call's value, `X` a call raised, `C` the judge asks for a
call, `T` one test's outcome.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing itself would take as long as a small program
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = ["decode", "encode"]

FILE = "<completion>"  # what the program's own lines are called in tracebacks
DEEPEST = 100  # levels of nesting of a value
NAMESPACES = 0x00020000 | 0x20000000 | 0x08000000 | 0x40000000 | 0x04000000  # mount, pid, ipc, net, uts
USER_NAMESPACE = 0x10000000
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# System calls that no program of ours needs: number on x86_64, number on aarch64 (-1: has none).
DENIED = {
    "socket": (41, 198),  # no network; a local pair of sockets is another call
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "chroot": (161, 51),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),  # memory that RLIMIT_AS does not count, as the four below
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "personality": (135, 92),
}
CLONE, CLONE3, KILL, TGKILL, PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)


class LayerError(Exception):
    """A layer of isolation cannot be had: `name: reason`."""


# --- plain values, both ways


def encode(value: Any, depth: int = 0) -> Any:
    """A plain value as JSON that keeps its type: lists are arrays, all else that JSON lacks is `{tag: ...}`.

    Raises:
        TypeError: the value, or something in it, is not plain data.
    """
    if depth > DEEPEST:
        raise TypeError("a value nested too deeply")
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value) if -(2**53) < value < 2**53 else {"i": hex(value)}
    if isinstance(value, float):
        return float(value) if value - value == 0 else {"f": repr(float(value))}
    if isinstance(value, list):
        return [encode(v, depth + 1) for v in value]
    if isinstance(value, dict):
        return {"d": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    for kind, tag in ((tuple, "t"), (set, "s"), (frozenset, "z")):
        if isinstance(value, kind):
            return {tag: [encode(v, depth + 1) for v in value]}
    if isinstance(value, bytes | bytearray):
        return {"b": value.hex()}
    if isinstance(value, complex):
        return {"c": [encode(value.real), encode(value.imag)]}
    raise TypeError(f"a {type(value).__name__}, which is not plain data")


def decode(obj: Any, depth: int = 0) -> Any:
    """The value that `encode` wrote; only built-in types ever come out.

    Raises:
        ValueError: nothing that `encode` writes.
    """
    if depth > DEEPEST:
        raise ValueError("nested too deeply")
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    if isinstance(obj, list):
        return [decode(v, depth + 1) for v in obj]
    if not isinstance(obj, dict) or len(obj) != 1:
        raise ValueError("not an encoded value")
    ((tag, body),) = obj.items()
    try:
        if tag == "i":
            return int(body, 16)
        if tag == "f":
            return float(body)
        if tag == "b":
            return bytes.fromhex(body)
        items = [decode(v, depth + 1) for v in body]
        if tag == "c":
            return complex(*items)
        if tag == "d":
            return dict(items)
        return {"t": tuple, "s": set, "z": frozenset}[tag](items)
    except (KeyError, TypeError) as error:
        raise ValueError("not an encoded value") from error


# --- shutting in


class Spec:
    """The command line: `key=value` words; `read` and `path` may come several times."""

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
    """libc through ctypes; a failure is a LayerError."""

    def __init__(self) -> None:
        import ctypes

        self.c = ctypes
        self.lib = ctypes.CDLL(None, use_errno=True)
        self.lib.syscall.restype = ctypes.c_long

    def __call__(self, layer: str, name: str, *args: Any) -> int:
        # Bare numbers would be passed as 32-bit ints.
        words = [self.c.c_long(a) if isinstance(a, int) else a for a in args]
        result = int(getattr(self.lib, name)(*words))
        if result == -1:
            raise LayerError(f"{layer}: {name}: {os.strerror(self.c.get_errno())}")
        return result

    def mount(self, source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
        """mount(2)."""
        word = kind.encode() if kind else None
        self("namespaces", "mount", source.encode(), target.encode(), word, flags, data.encode())


def enter_namespaces(kernel: Kernel, spec: Spec) -> None:
    """Return in a process whose machine is bare: own root, no network, and all in it dies with its first process.

    Three processes: the parent's child waits outside, the new namespace's first process waits within and takes all others
    with it, and the one that returns runs the program.
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
                os.close(fd)  # so that the parent sees the ends of its pipes when the program ends
            _wait_and_exit(child)
        if outer:
            die_with_parent(kernel)
            _new_root(kernel, spec)


def _wait_and_exit(child: int) -> None:
    status = 1
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            break
        if pid == child:
            break
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _new_root(kernel: Kernel, spec: Spec) -> None:
    """A root of nothing but the libraries Python needs, read-only, and an empty /tmp of limited size."""
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
        # Flags that the source's own mount carries may not be taken off in a user namespace.
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
    """Resource limits; on macOS the kernel refuses some, and `sandbox` watches memory instead."""
    import resource

    limits = {
        "CPU": (spec.cpu, spec.cpu + 1),
        "AS": (spec.memory, spec.memory),
        "FSIZE": (spec.file, spec.file),
        "NOFILE": (64, 64),
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
    }
    if sys.platform == "linux":
        # Counted per user, and without a user id of our own others' threads count as well.
        others = 0 if {"namespaces", "userid"} & spec.layers else _threads_of(os.geteuid())
        limits["NPROC"] = (others + spec.threads, others + spec.threads)
    for name, (soft, hard) in limits.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is None:
            continue
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
    """A user id that owns nothing and that no other process has."""
    try:
        os.setgroups([])
        os.setresgid(spec.uid, spec.uid, spec.uid)
        os.setresuid(spec.uid, spec.uid, spec.uid)
    except OSError as error:
        raise LayerError(f"userid: {error}") from error


def die_with_parent(kernel: Kernel) -> None:
    """No process of ours outlives the run. Changing the user id undoes this."""
    kernel("privileges", "prctl", 1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG


def drop_powers(kernel: Kernel) -> None:
    """No capabilities, and none to be had from any program."""
    kernel("privileges", "prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header = (kernel.c.c_uint32 * 2)(0x20080522, 0)
    kernel("privileges", "capset", kernel.c.byref(header), kernel.c.byref((kernel.c.c_uint32 * 6)()))


def put_on_landlock(kernel: Kernel, spec: Spec) -> None:
    """Files: the libraries may be read, the temporary folder written, all else is shut."""
    version = kernel("landlock", "syscall", 444, None, 0, 1)
    every = (1 << 13) - 1 | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    read, special = (
        (1 << 2) | (1 << 3),
        1 | (1 << 6) | (1 << 9) | (1 << 10) | (1 << 11),
    )  # run, make devices and sockets
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


def put_on_seccomp(kernel: Kernel) -> None:
    """One process, threads allowed, that cannot call out, signal others or take memory that is not counted."""
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
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, deny)]  # x86_64's second table
    code += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, unknown)]  # then libc takes clone, whose flags can be seen
    code += [(equal, 0, 5, CLONE[column]), (load, 0, 0, 16)]
    code += [(any_bit, 1, 0, 0x7E020000), (any_bit, 1, 0, 0x00010000), (give, 0, 0, deny), (give, 0, 0, allow)]
    for call, free in ((KILL, pid), (TGKILL, pid), (PRLIMIT, 0)):
        code += [(equal, 0, 4, call[column]), (load, 0, 0, 16)]
        code += [(equal, 1, 0, free), (give, 0, 0, deny), (give, 0, 0, allow)]
    for numbers in DENIED.values():
        if numbers[column] >= 0:
            code += [(equal, 0, 1, numbers[column]), (give, 0, 0, deny)]
    code.append((give, 0, 0, allow))

    packed = b"".join(
        c.to_bytes(2, sys.byteorder) + bytes((t, f)) + k.to_bytes(4, sys.byteorder) for c, t, f, k in code
    )
    buffer = kernel.c.create_string_buffer(packed, len(packed))
    program = len(code).to_bytes(8, sys.byteorder) + kernel.c.addressof(buffer).to_bytes(8, sys.byteorder)
    kernel("seccomp", "prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def shut_in(spec: Spec) -> None:
    """All layers, the outermost first.

    Raises:
        LayerError: one of them cannot be had.
    """
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
    drop_powers(kernel)
    if "landlock" in spec.layers:
        put_on_landlock(kernel, spec)
    if "seccomp" in spec.layers:
        put_on_seccomp(kernel)


# --- talking


def send(fd: int, letter: bytes, body: bytes = b"") -> None:
    """One frame."""
    data = (len(body) + 1).to_bytes(4, "big") + letter + body
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> bytes:
    """One block; ends the process where the parent is gone."""
    return _exactly(fd, int.from_bytes(_exactly(fd, 4), "big"))


def _exactly(fd: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 16))
        if not part:
            os._exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def describe(error: BaseException) -> bytes:
    """`type \\0 line \\0 message` of an error, the line being the last one of the program itself, or 0."""
    try:
        message = str(error)
    except BaseException:  # noqa: BLE001 - the program's own __str__
        message = ""
    line = 0
    if isinstance(error, SyntaxError) and error.filename == FILE:
        line, message = error.lineno or 0, error.msg
    else:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == FILE:
                line = trace.tb_lineno
            trace = trace.tb_next
    return f"{type(error).__name__}\0{line}\0{message[:4000]}".encode("utf-8", "backslashreplace")


# --- running


def load(name: str, prelude: str, source: str) -> dict[str, Any]:
    """Run a program as the module `name`; its names."""
    module = type(sys)(name)
    sys.modules[name] = module
    if prelude:
        exec(compile(prelude, "<prelude>", "exec"), module.__dict__)
    exec(compile(source, FILE, "exec"), module.__dict__)
    return module.__dict__


def run(spec: Spec, prelude: str, source: str) -> int:
    """A whole program: standard input to standard output."""
    try:
        load("__main__", prelude, source)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever the program raises is reported
        send(spec.res, b"E", describe(error))
        own = error.__traceback__
        while own is not None and own.tb_frame.f_code.co_filename != FILE:
            own = own.tb_next
        sys.__excepthook__(type(error), error.with_traceback(own), own)
        return 1
    return 0


def serve(spec: Spec, prelude: str, source: str) -> int:
    """Load a program, then answer calls of its functions until the parent has no more."""
    import json

    try:
        names = load("completion", prelude, source)
    except BaseException as error:  # noqa: BLE001
        send(spec.res, b"E", describe(error))
        return 1
    send(spec.res, b"V", b"null")
    while True:
        name, args, kwargs = json.loads(receive(spec.ctl))
        try:
            function = names[name] if name in names else getattr(names["Solution"](), name)
            value = function(*[decode(a) for a in args], **{k: decode(v) for k, v in kwargs.items()})
            try:
                body = json.dumps(encode(value)).encode()
            except TypeError as error:
                raise TypeError(f"the call returned {error}") from None
        except BaseException as error:  # noqa: BLE001
            send(spec.res, b"X", describe(error))
        else:
            send(spec.res, b"V", body)


class CallFailed(Exception):
    """The program under test raised; the parent knows what."""


def judge(spec: Spec, prelude: str, source: str) -> int:
    """Run tests whose calls of the program under test are carried out elsewhere: here stand the expected values."""
    import builtins
    import json

    plan = json.loads(source)
    calls = 0

    def proxy(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            words = [name, [encode(a) for a in args], {k: encode(v) for k, v in kwargs.items()}]
            send(spec.res, b"C", json.dumps(words).encode())
            calls += 1
            answer = receive(spec.ctl)
            if answer[:1] != b"V":
                # A test may well expect an exception.
                kind = getattr(builtins, answer[1:].decode(), None)
                raise kind() if isinstance(kind, type) and issubclass(kind, Exception) else CallFailed()
            return decode(json.loads(answer[1:]))

        return call

    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(prelude, "<prelude>", "exec"), names)
    exec(compile(plan["setup"], "<setup>", "exec"), names)
    for alias, name in plan["names"].items():
        names[alias] = proxy(name)
    for test in plan["tests"]:
        calls = 0
        outcome: dict[str, Any] = {"ok": True}
        try:
            exec(compile(test, "<test>", "exec"), names)
        except Exception as error:  # noqa: BLE001 - the test's verdict, or its own fault
            outcome = {"ok": False, "why": describe(error).decode(), "called": calls > 0, "at": _test_line(error)}
        send(spec.res, b"T", json.dumps(outcome).encode())
    return 0


def _test_line(error: BaseException) -> list[Any]:
    """[`<setup>` or `<test>`, line] of the last line of the tests themselves."""
    place: list[Any] = ["", 0]
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name in ("<setup>", "<test>"):
            place = [name, trace.tb_lineno]
        trace = trace.tb_next
    return place


def main(words: Iterable[str]) -> int:
    """Shut in, fetch the program, run it."""
    spec = Spec(list(words))
    try:
        shut_in(spec)
    except (LayerError, OSError, ValueError, ImportError) as error:
        text = str(error) if isinstance(error, LayerError) else f"limits: {error}"
        send(spec.res, b"S", text.encode())
        return 70
    prelude, source = receive(spec.ctl).decode(), receive(spec.ctl).decode()
    sys.path += spec.path
    sys.argv = ["completion.py"]
    sys.set_int_max_str_digits(50_000)
    send(spec.res, b"R")
    return {"run": run, "serve": serve, "judge": judge}[spec.mode](spec, prelude, source)
