"""Programs that nobody trusts: none does harm, scores, hangs or crashes us, and honest ones run.

The hostile ones are in `attacks`, what they attack in `arena`. Here they meet three sets of layers, the short ones all sets;
`make hostile-test` has every program alone under every set.
"""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from arena import LIMITS, SECRET, Arena, arena, attack, attack_at_once, forge, kept, patient
from attacks import ALONE, FORGED, FRAMED, QUICK

from vpd_mlx.errors import SourceError
from vpd_mlx.sandbox import Failure, Limits, Sandbox, Value, isolation, layers
from vpd_mlx.sandbox.folders import Folder, sweep
from vpd_mlx.sandbox.layers import MAC_DEVICES, seatbelt_profile
from vpd_mlx.sandbox.spawn import Child

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a layer of Linux")
WITHOUT = {
    "all layers": (),
    "no namespaces": ("namespaces",),
    "namespaces alone": ("landlock", "seccomp"),
}
HANG = ("endless loop", "sleep", "waits for input", "endless exit handler", "closes everything", "stops itself")
# Which limit these exceed, where they are given the time.
EXCEED = {
    "memory bomb": "memory",
    "slow memory bomb": "memory",
    "infinite output": "output",
    "infinite errors": "output",
    "one endless line": "output",
    "frame of 4 GB": "output",
    "endless frames": "output",
}


@pytest.fixture(scope="module", params=WITHOUT)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return Sandbox(LIMITS, without=WITHOUT[request.param])


@pytest.fixture(scope="module")
def world() -> Iterator[Arena]:
    with arena() as place:
        yield place


def test_nothing_is_harmed(sandbox: Sandbox, world: Arena) -> None:
    before, folders = world.state(), set(glob.glob(f"{tempfile.gettempdir()}/vpd-sandbox-*"))
    others = _children(os.getpid()) if sys.platform == "linux" else set()
    started = time.monotonic()
    # Limits depend on no layer, so that two sets of them are enough.
    groups = kept(sandbox) + ["limits"] * ("seccomp" in sandbox.abilities.layers)
    programs = {name: text for promise in groups for name, text in ALONE.get(promise, {}).items()}
    quick = {name: programs.pop(name) for name in EXCEED if name in programs}
    attacks = attack(sandbox, programs, world.words) + attack(patient(sandbox), quick, world.words)
    assert not [a for a in attacks if a.harmed]
    assert max(a.seconds for a in attacks) < 15
    assert all(len(a.result.stdout) + len(a.result.stderr) <= 64 * 1024 + 2 * 65536 for a in attacks)
    ended = {a.name: a.result.ended for a in attacks}
    assert {name: ended[name] for name in HANG if name in ended} == dict.fromkeys(
        HANG if "limits" in groups else (), "timeout"
    )
    assert {name: ended[name] for name in quick} == {name: EXCEED[name] for name in quick}
    time.sleep(max(0, started + 4.5 - time.monotonic()))  # when a daemon would have struck
    assert world.state() == before
    assert set(glob.glob(f"{tempfile.gettempdir()}/vpd-sandbox-*")) <= folders
    if sys.platform == "linux":
        assert not _children(os.getpid()) - others


@LINUX
@pytest.mark.parametrize(
    "without",
    [(), ("namespaces",), ("userid",), ("landlock",), ("seccomp",), ("namespaces", "userid"), ("landlock", "seccomp")],
    ids=lambda names: "no " + " ".join(names),
)
def test_no_short_attack_gets_through(without: tuple[str, ...], world: Arena) -> None:
    box = Sandbox(LIMITS, without=without, packages=[str(world.files[2].parent)])
    before = world.state()
    assert attack_at_once(box, kept(box), world.words) == []
    assert world.state() == before


def test_nothing_forged_scores(sandbox: Sandbox, world: Arena) -> None:
    if "seccomp" not in sandbox.abilities.layers:
        pytest.skip("what is out of a program's reach depends on no layer; two sets of them are enough")
    assert not {name: scores for name, scores in forge(sandbox, world.words, FORGED).items() if any(scores)}
    assert not Path(str(world.words["canary"]) + ".pwned").exists()


def test_no_frame_scores(box: Sandbox, world: Arena) -> None:
    # Every one of them is parsed in test_frames; these go all the way.
    some = ("complex of text", "huge number", "nested lists", "not UTF-8", "no letter", "the judge's report")
    scores = forge(box, world.words, {name: FRAMED[f"frame: {name}"] for name in some})
    assert not any(map(any, scores.values()))


@LINUX
def test_the_page_says_which_layers_keep_which_promise() -> None:
    page = (Path(__file__).parents[1] / "docs" / "sandbox.md").read_text()
    for promise, ways in layers.KEPT_BY.items():
        said = re.search(rf"(?m)^\| {promise} \| {layers.PROMISES[promise]}.*\| (.*) \|$", page)
        assert said is not None, promise
        assert tuple({*way.split(" and ")} for way in said[1].split("; or ")) == ways
    table = page.split("<!-- table by make hostile-test -->\n")[1].split("<!-- end of table -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert head[1:-2] == list(layers.PROMISES)
    assert len(rows) >= 7
    for names, *cells in rows:
        missing = layers.Abilities(tuple(names.split(", ")), ()).missing
        assert [cell.startswith("yes: 0 of ") for cell in cells[:-2]] == [p not in missing for p in layers.PROMISES]
        for promise, cell in zip(layers.PROMISES, cells[:-2], strict=True):
            if promise not in missing:
                assert int(cell.split()[-1]) == len(ALONE.get(promise, {})) + len(QUICK.get(promise, {})), promise


def test_an_honest_program_passes_all_three_ways(sandbox: Sandbox) -> None:
    sandbox = patient(sandbox)
    program = f"def answer(x):\n    return x + {SECRET - 3}\n"
    with sandbox.open(program) as session:
        assert isinstance(got := session.call("answer", [3]), Value)
        assert got.equals(SECRET)
        assert not got.equals(SECRET + 1)
    with sandbox.open(program) as session:
        assert sandbox.judge(session, [f"assert answer(3) == {SECRET}"], {"answer": "answer"})[0].passed
    result = sandbox.run(program + "if __name__ == '__main__':\n    print(answer(int(input())))", "3\n")
    assert (result.ended, result.stdout) == ("ok", f"{SECRET}\n")


def test_what_programs_may_do(sandbox: Sandbox) -> None:
    program = (
        "import asyncio, threading, sys, os, random, hashlib, decimal, datetime, tempfile\n"
        "open('a.txt', 'w').write('kept'); print(open('a.txt').read())\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "asyncio.run(asyncio.sleep(0)); print(len(os.urandom(4)), tempfile.TemporaryFile() is not None)\n"
        "print(sys.stdin.read(), 'é', sys.argv, __name__, 10**20000 > 0)\n"
    )
    result = patient(sandbox).run(program, "línea")
    assert result.failure is None, result.stderr
    assert result.stdout == "kept\nthread\n4 True\nlínea é ['completion.py'] __main__ True\n"


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return patient(Sandbox(LIMITS))


@pytest.mark.parametrize(
    ("program", "ended", "kind", "line"),
    [
        ("x = 1\n1 / 0", "error", "ZeroDivisionError", 2),
        ("def f():\n  return {}['k']\n\nf()", "error", "KeyError", 2),
        ("x = (", "error", "SyntaxError", 1),
        ("import json\n\njson.loads('{')", "error", "JSONDecodeError", 3),
        ("import sys\nsys.exit(3)", "error", "SystemExit", 0),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "error", "Killed", 0),
        ("import sys\nsys.exit(163)", "error", "SystemExit", 0),
        ("import os\nos.kill(os.getpid(), 35)", "error", "SystemExit", 0),
        ("x = [0]\nwhile True: x *= 2", "memory", "MemoryError", 2),
        ("import sys\nsys.exit()", "ok", None, 0),
        ("", "ok", None, 0),
    ],
)
def test_failures_name_the_line(box: Sandbox, program: str, ended: str, kind: str | None, line: int) -> None:
    result = box.run(program)
    assert result.ended == ended
    assert (result.failure and result.failure.kind) == kind
    assert (result.failure.line if result.failure else 0) == line


def test_prelude_does_not_move_lines(box: Sandbox) -> None:
    result = box.run("print(math.pi)\n1/0", prelude="import math\n\n\n")
    assert result.stdout.startswith("3.14")
    assert result.failure == Failure("ZeroDivisionError", "division by zero", 2)


PLAIN = [
    None, True, 0, -1, 2**53, -(10**50), 1.5, -0.0, math.inf, "", "é\ud800\x00", b"\x00\xff", 1 + 2j, [], [1, [2]], (), (1,),
    (1, (2, [3])), {1, "a", (1, 2)}, set(), frozenset({1}), frozenset(), {}, {1: 2, "k": [None], (1, 2): {3}},
    {frozenset({1}): {"n": -math.inf}},
]  # fmt: skip


def test_values_come_back_as_they_were(box: Sandbox) -> None:
    with box.open("def same(x, *, k=None):\n    return x if k is None else k") as session:
        for value in PLAIN:
            got = session.call("same", [value])
            assert isinstance(got, Value), value
            assert got.equals(value), value
            assert eval(str(got), {"inf": math.inf}) == value
            assert [other for other in PLAIN if got.equals(other)] == [other for other in PLAIN if value == other]
        assert str(session.call("same", [1], {"k": "two"})) == "'two'"
        assert isinstance(session.call("same", [(1, [2])]), Value)


def test_tuples_may_stand_for_lists(box: Sandbox) -> None:
    with box.open("def f(): return (1, [(2,)])") as session:
        got = session.call("f")
    assert isinstance(got, Value)
    assert got.equals([1, [[2]]], tuples_as_lists=True)
    assert not got.equals([1, [[2]]])


def test_judge_reports_the_statement_and_the_call(box: Sandbox) -> None:
    setup = (
        "import math\ndef check(candidate):\n    assert candidate(1) == 2\n    assert math.isclose(candidate(2), 9)\n"
    )
    with box.open("def f(x):\n    return x + 1") as session:
        (outcome,) = box.judge(session, ["check(candidate)"], {"candidate": "f"}, setup)
    assert not outcome.passed
    assert outcome.source == "assert math.isclose(candidate(2), 9)"
    assert outcome.call == ("f", "2", "3")
    with box.open("def f(x):\n    return [][x]") as session:
        tests = ["try:\n  f(1)\n  assert False\nexcept IndexError:\n  pass", "assert f(1) == 1", "assert f(2) == 1"]
        caught, failed = box.judge(session, tests, {"f": "f"})
    assert caught.passed
    assert failed.failure == Failure("IndexError", "list index out of range", 2)


def test_of_an_object_only_its_truth_reaches_the_tests(box: Sandbox) -> None:
    program = "import re\ndef f(x): return re.match('a', x)\ndef same(x): return x"
    good = ["assert f('a')", "assert not f('b')", "assert f('a') is not None"]
    bad = [
        "assert f('b')",
        "assert not f('a')",
        "assert f('a') == True",
        "assert f('a').group() == 'a'",
        "assert same(f('a'))",
    ]
    with box.open(program) as session:
        outcomes = box.judge(session, [*good, *bad], {"f": "f", "same": "same"}, most_failures=9)
        assert [o.passed for o in outcomes] == [True] * len(good) + [False] * len(bad)
        assert outcomes[5].failure is not None
        assert outcomes[5].failure.message == "a Match, which is not plain data"
        assert str(session.call("f", ["a"])) == "TypeError: the call returned a Match, which is not plain data"


def test_a_broken_test_is_not_the_programs_fault(box: Sandbox) -> None:
    for tests, setup in (
        (["assert undefined == 1"], ""),
        (["assert f(1) =="], ""),
        (["assert f(1)"], "import nowhere"),
    ):
        with box.open("def f(x): return 1") as session, pytest.raises(SourceError, match="fix the row's tests"):
            box.judge(session, tests, {"f": "f"}, setup)
    for frame in ("Tnull", 'T{"ok": 1}', 'C["f"]', 'C["f", [{"q": 1}], {}]', "Zx", ""):
        write = f"import os\nos.write(4, {len(frame).to_bytes(4, 'big') + frame.encode()!r})"
        with (
            box.open("def f(x): return 1") as session,
            pytest.raises(SourceError, match=r"sandbox's pipe.*fix the row"),
        ):
            box.judge(session, [write], {"f": "f"})
    with box.open("def f(x): return None") as session:
        (outcome,) = box.judge(session, ["assert len(f(1)) == 2"], {"f": "f"})
    assert outcome.failure is not None
    assert outcome.failure.kind == "TypeError"


def test_a_session_ends_with_its_program() -> None:
    box = Sandbox(Limits(wall_s=60, cpu_s=1))
    with box.open("import os\ndef f(x):\n  if x == 2: os._exit(7)\n  return x") as session:
        assert isinstance(session.call("f", [1]), Value)
        assert session.call("f", [2]) == session.call("f", [1]) == Failure("SystemExit", "ended with status 7")
        assert session.ended == "error"
    with box.open("def f(x):\n  while True: pass") as session:
        assert str(session.call("f", [1])).startswith("Timeout")
        assert session.ended == "timeout"


def test_runs_from_many_threads(box: Sandbox) -> None:
    threads = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: box.run("print(int(input()) * 2)", f"{i}\n").stdout, range(40)))
    assert results == [f"{2 * i}\n" for i in range(40)]
    handles = len(os.listdir("/dev/fd"))
    box.run("print(1)")
    assert len(os.listdir("/dev/fd")) == handles
    assert threading.active_count() <= threads


def test_what_is_missing_is_said_and_refused() -> None:
    every = ("namespaces", "userid", "landlock", "seccomp", "seatbelt", "lookups")
    with pytest.raises(SourceError, match=r"could use the network.*unisolated"):
        Sandbox(LIMITS, without=every)
    box = Sandbox(LIMITS, without=every, unisolated=True)
    assert box.abilities.layers == ()
    assert box.run("print(1)").stdout == "1\n"
    assert "could use the network" in box.abilities.notice()
    assert "\n" not in box.abilities.notice()
    with pytest.raises(SourceError, match=r"could use the network.*strict"):
        Sandbox(LIMITS, strict=True, without=every, unisolated=True)
    with pytest.raises(SourceError, match="not even an empty program runs"):
        Sandbox(Limits(memory_mb=1))


@LINUX
@pytest.mark.parametrize(
    ("without", "missing"),
    [
        (("namespaces",), set()),
        (("landlock",), set()),
        (("seccomp",), {"network", "resources", "kernel"}),
        (("namespaces", "landlock"), {"files", "processes"}),
        (("namespaces", "seccomp"), {"files", "network", "processes", "descendants", "resources", "kernel"}),
    ],
)
def test_a_layer_alone_is_not_taken_for_more_than_it_is(without: tuple[str, ...], missing: set[str]) -> None:
    box = Sandbox(LIMITS, without=without)
    assert set(box.abilities.missing) == missing
    assert all(layers.PROMISES[promise] in box.abilities.notice() for promise in missing)
    if missing:
        with pytest.raises(SourceError, match="strict"):
            Sandbox(LIMITS, strict=True, without=without)


@LINUX
def test_no_layer_vanishes_without_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "isolation.py"
    source = Path(isolation.__file__).read_text()
    broken.write_text(source.replace('kernel("namespaces", "unshare", NAMESPACES', 'kernel("namespaces", "unshare", 1'))
    monkeypatch.setattr(layers, "CODE", (str(broken), layers.CODE[1]))
    box = Sandbox(LIMITS)
    assert "namespaces" not in box.abilities.layers
    assert box.abilities.missing == ()
    assert "(namespaces: unshare: Invalid argument" in box.abilities.notice()
    assert "\n" not in box.abilities.notice()


@LINUX
@pytest.mark.parametrize("version", [1, 3, 5])
def test_older_kernels(version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: Arena) -> None:
    older = tmp_path / "isolation.py"
    call = 'version = kernel("landlock", "syscall", 444, None, 0, 1)'
    source = Path(isolation.__file__).read_text()
    assert call in source
    older.write_text(source.replace(call, f"version = {version}"))
    monkeypatch.setattr(layers, "CODE", (str(older), layers.CODE[1]))
    box = Sandbox(LIMITS, without=("namespaces", "userid"), packages=[str(world.files[2].parent)])
    before = world.state()
    assert box.abilities.layers == ("landlock", "seccomp")
    assert attack_at_once(box, kept(box), world.words) == []
    assert world.state() == before


@LINUX
@pytest.mark.parametrize("without", [(), ("namespaces", "userid")], ids=["all layers", "no namespaces"])
def test_libraries_may_lie_anywhere(without: tuple[str, ...]) -> None:
    places = [tempfile.mkdtemp(dir=folder, prefix="vpd-library-") for folder in ("/tmp", "/dev/shm")]
    try:
        for number, place in enumerate(places):
            Path(place).chmod(0o755)
            Path(place, f"lib{number}.py").write_text(f"x = {number}")
        box = Sandbox(LIMITS, packages=places, without=without)
        assert box.abilities.notice() == ""
        assert ("namespaces" in box.abilities.layers) == (not without)
        result = box.run("import lib0, lib1, tempfile\ntempfile.TemporaryFile()\nprint(lib0.x, lib1.x)")
        assert result.stdout == "0 1\n", result.stderr
    finally:
        for place in places:
            shutil.rmtree(place)


def test_folders_of_the_dead_are_swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = Folder()
    dead, foreign = tmp_path / "vpd-sandbox-locked-dead", tmp_path / "vpd-sandbox-locked-link"
    (dead / "a").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    foreign.symlink_to(tmp_path / "kept")
    file = tmp_path / "vpd-sandbox-locked-file"
    file.write_text("x")
    (tmp_path / "vpd-sandbox-old").mkdir()
    sweep()
    assert (tmp_path / "vpd-sandbox-old").is_dir()
    assert not dead.exists()
    assert Path(mine.path).is_dir()
    assert foreign.is_symlink()
    assert (tmp_path / "kept").is_dir()
    assert file.exists()
    dead.mkdir()
    busy = os.open(dead, os.O_RDONLY)
    fcntl.flock(busy, fcntl.LOCK_EX)  # as its owner does
    sweep()
    assert dead.is_dir()
    os.close(busy)
    Sandbox(LIMITS)
    assert not dead.exists()
    mine.remove()
    assert not Path(mine.path).exists()


@LINUX
def test_a_killed_run_leaves_no_folder(tmp_path: Path) -> None:
    code = (
        "from vpd_mlx.sandbox import *; s = Sandbox(without=('namespaces', 'userid')); print('up', flush=True)\n"
        "s.run('import time; time.sleep(60)', prelude='')"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        deadline = time.monotonic() + 20
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        parent.kill()
    assert list(tmp_path.iterdir())
    subprocess.run([sys.executable, "-c", "from vpd_mlx.sandbox.folders import sweep; sweep()"], env=env, check=True)
    assert not list(tmp_path.iterdir())


def test_it_runs_without_standard_files_and_forks_nothing(tmp_path: Path) -> None:
    code = (
        "import os\nos.closerange(0, 3)\nfrom vpd_mlx.sandbox import Sandbox\n"
        "def fork(): raise AssertionError('forks')\nos.fork = fork\nimport _posixsubprocess as p\np.fork_exec = None\n"
        "out = Sandbox().run('import sys; print(input()); print(2, file=sys.stderr)', stdin='1')\n"
        f"open({str(tmp_path / 'out')!r}, 'w').write(repr((out.stdout, out.stderr)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert (tmp_path / "out").read_text() == repr(("1\n", "2\n"))


def test_processes_are_started_waited_for_and_ended() -> None:
    read, write = os.pipe()
    child = Child([sys.executable, "-c", "import os; os.write(1, b'x'); os._exit(7)"], [read, write])
    assert child.wait(60) == child.wait() == 7
    assert os.read(read, 9) == b"x"
    child.kill()  # does nothing: the number may be another's
    sleeper = Child([sys.executable, "-c", "import time; time.sleep(60)"], [read, write, write])
    assert sleeper.wait(0.01) is None
    sleeper.kill()
    assert sleeper.wait(60) == -signal.SIGKILL
    os.close(read)
    os.close(write)
    with pytest.raises(FileNotFoundError):
        Child(["/nowhere"], [0, 1, 2])


@LINUX
def test_a_child_gets_no_file_of_ours(box: Sandbox) -> None:
    leaked = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(leaked, True)
    program = "import os\nn=0\nfor fd in range(256):\n  try: os.fstat(fd); n+=1\n  except OSError: pass\nprint(n)"
    assert box.run(program).stdout == "5\n"
    os.close(leaked)


@LINUX
@pytest.mark.parametrize("without", [(), ("namespaces", "userid")], ids=["all layers", "no namespaces"])
def test_programs_do_not_outlive_us(without: tuple[str, ...]) -> None:
    program = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); time.sleep(30)"
    code = f"from vpd_mlx.sandbox import *; s = Sandbox(without={without}); print('up', flush=True); s.run({program!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        deadline = time.monotonic() + 10
        while not (started := _children(parent.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        started |= _children(parent.pid)
        parent.send_signal(signal.SIGKILL)
    assert started
    while (alive := {p for p in started if Path(f"/proc/{p}").exists()}) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive


def _children(pid: int) -> set[int]:
    """All living descendants of a process."""
    parents: dict[int, int] = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            fields = Path(path).read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(path.split("/")[2])] = int(fields[1])
    found: set[int] = set()
    while more := {p for p, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


INTERPRETERS = {  # on macOS: where its prefix is, and a library that it needs
    "python.org": ("/Library/Frameworks/Python.framework/Versions/3.12", "/Library/Frameworks/Tcl.framework/Tcl"),
    "Homebrew": ("/opt/homebrew/Cellar/python@3.12/3.12.1/Frameworks", "/opt/homebrew/opt/openssl@3/lib/libssl.dylib"),
    "MacPorts": (
        "/opt/local/Library/Frameworks/Python.framework/Versions/3.12",
        "/opt/local/libexec/openssl3/lib/libssl.dylib",
    ),
    "Nix": ("/nix/store/abc-python3-3.12", "/nix/store/def-openssl/lib/libssl.dylib"),
    "uv": (
        "/Users/x/.local/share/uv/python/cpython-3.12",
        "/Users/x/.local/share/uv/python/cpython-3.12/lib/libpython.dylib",
    ),
    "pyenv": ("/Users/x/.pyenv/versions/3.12.1", "/private/preboot/Cryptexes/OS/usr/lib/libSystem.B.dylib"),
}


def _readable(profile: str) -> tuple[list[str], list[str]]:
    """Folders and single files that a profile lets programs read."""
    rule = profile[profile.index("(allow file-read-data") : profile.index("(deny file-write*)")]
    return re.findall(r'\(subpath "([^"]+)"\)', rule), re.findall(r'\(literal "([^"]+)"\)', rule)


@pytest.mark.parametrize("name", INTERPRETERS)
def test_seatbelt_knows_the_interpreters(name: str) -> None:
    prefix, library = INTERPRETERS[name]
    profile = seatbelt_profile(f"{prefix}/bin/python3", [prefix], "/private/tmp/x", [], ["/pkg/child.py"], True)
    folders, files = _readable(profile)
    for path in (f"{prefix}/lib/os.py", library, "/System/Library/x", "/private/tmp/x/a.txt"):
        assert any(path.startswith(f"{folder}/") for folder in folders), path
    assert "/pkg/child.py" in files
    for path in (
        "/Users/x/.ssh/id_ed25519",
        "/dev/tty",
        "/dev/disk0",
        "/etc/passwd",
        "/opt/local/etc/x",
        "/private/tmp/y",
    ):
        assert not any(path.startswith(f"{folder}/") for folder in folders), path
        assert path not in files
    assert [f for f in files if f.startswith("/dev")] == list(MAC_DEVICES)
    assert profile[profile.index("(allow process-exec*") :].startswith(f'(allow process-exec* (subpath "{prefix}")')


def test_seatbelt_profile_is_balanced_and_shut() -> None:
    odd = '/Users/x/a "quoted" \\ folder é'
    profile = seatbelt_profile("/opt/py/bin/python3", [odd], "/private/tmp/x", [], [], True)
    assert json.dumps(odd, ensure_ascii=False) in profile
    assert profile.count("(") == profile.count(")")
    for rule in (
        "(deny network*)",
        "(deny process-fork)",
        "(deny file-read-data)",
        '(deny file-write*)(allow file-write* (subpath "/private/tmp/x") (literal "/dev/null"))',
        "(deny mach-lookup)",
    ):
        assert rule in profile
    assert "mach-lookup" not in seatbelt_profile("/opt/py/bin/python3", [odd], "/private/tmp/x", [], [], False)


def test_a_session_may_stay_and_import(tmp_path: Path) -> None:
    (tmp_path / "mylib.py").write_text("def double(x): return 2 * x\n")
    tmp_path.chmod(0o755)
    stays = Sandbox(Limits(wall_s=0.6, output_kb=1), packages=[str(tmp_path)])
    # Loading takes longer than any call may: a library read from a cold disk.
    program = (
        "import mylib, time\ntime.sleep(0.8)\n"
        "def f(x, wait=0):\n  time.sleep(wait)\n  print('x' * 300)\n  return mylib.double(x)"
    )
    with stays.open(program, per_call=True) as session:
        for i in range(4):
            got = session.call("f", [i], {"wait": 0.2})
            assert isinstance(got, Value)
            assert got.equals(2 * i)
        assert str(session.call("f", [1], {"wait": 5})) == "Timeout: took longer than 0.6 s"


def test_a_value_that_chokes_the_tests_is_the_programs_fault() -> None:
    quick = Sandbox(Limits(wall_s=1.0, cpu_s=1))
    with quick.open("def f(x): return x") as session:
        passed, choked = quick.judge(
            session, ["assert f(1) == 1", "x = f(2)\nwhile x: pass"], {"f": "f"}, most_failures=2
        )
    assert passed.passed
    assert not choked.passed
    assert str(choked.failure) == "ValueError: returned a value on which the tests hang or exceed a limit"
