"""Hostile programs: none does harm, scores or hangs.

A program prints HARM if it got something that it must not get; otherwise it may end in any way. All of them run with every
layer that this machine offers, and again without some layers, as on machines that offer fewer.
"""

from __future__ import annotations

import glob
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vpd_mlx.errors import SourceError
from vpd_mlx.sandbox import Failure, Limits, Result, Sandbox, Value
from vpd_mlx.sandbox.layers import seatbelt_profile

LIMITS = Limits(wall_s=1.5, cpu_s=1, memory_mb=256, output_kb=64, file_mb=4, threads=8)
SECRET = 918273645546372819
WITHOUT = {
    "all layers": (),
    "no namespaces": ("namespaces",),
    "namespaces alone": ("landlock", "seccomp"),
}

# What a program tries -> the program. `{canary}`, `{port}` and `{socket}` are filled in.
HOSTILE = {
    # --- taking too much
    "fork bomb": "import os\nwhile True:\n  os.fork()",
    "thread bomb": "import threading,time\nwhile True: threading.Thread(target=time.sleep,args=(99,)).start()",
    "memory bomb": "x=bytearray(10**11)",
    "slow memory bomb": "a=[]\nwhile True: a.append('x'*10**6+str(len(a)))",
    "memory bomb in a handler": "a=[]\nwhile True:\n  try:\n    while True: a.append(bytearray(10**6))\n"
    "  except MemoryError: pass",
    "uncounted memory": "import os\nfor i in range(200):\n  f=os.memfd_create('x')\n  os.write(f,b'x'*10**6)\nprint('HARM')",
    "shared memory": "import ctypes\nc=ctypes.CDLL(None)\nfor i in range(64):\n  s=c.shmget(0,1<<26,0o1600)\n"
    "  if s>=0: c.shmat.restype=ctypes.c_void_p; p=c.shmat(s,None,0); p not in(None,2**64-1) and ctypes.memset(p,1,1<<26)"
    " and c.shmdt(ctypes.c_void_p(p))",
    "disk filler": "f=open('x','wb')\nwhile True: f.write(b'x'*10**6)",
    "many files": "i=0\nwhile True:\n  i+=1\n  open(f'f{i}','wb').write(b'x'*65536)",
    "deep folders": "import os\nwhile True:\n  os.mkdir('d'); os.chdir('d')",
    "infinite output": "while True: print('x'*1000)",
    "infinite errors": "import os\nwhile True: os.write(2,b'x'*1000)",
    "one endless line": "import sys\nsys.stdout.write('x'*10**8)",
    "endless loop": "while True: pass",
    "endless C": "10**10**8 % 7",
    "sleep": "import time\ntime.sleep(1000)",
    "waits for input": "import sys,time\nsys.stdin.read(); time.sleep(1000)",
    "ignores signals": "import signal\nfor s in signal.valid_signals():\n  try: signal.signal(s,signal.SIG_IGN)\n"
    "  except (OSError,ValueError): pass\nwhile True: pass",
    "endless finaliser": "class A:\n  def __del__(self):\n    while True: pass\na=A()",
    "endless exit handler": "import atexit,time\natexit.register(time.sleep,1000)",
    "threads that stay": "import threading,time\nthreading.Thread(target=time.sleep,args=(1000,)).start()",
    "crash": "import ctypes\nctypes.string_at(0)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return [f()]\nrepr(f())",
    "closes everything": "import os,time\nos.closerange(0,256); time.sleep(1000)",
    # --- other processes
    "kills the parent": "import os,signal\nos.kill(os.getppid(),signal.SIGKILL)",
    "kills everyone": "import os,signal\nos.kill(-1,signal.SIGKILL)",
    "kills the group": "import os,signal\nos.killpg(os.getpgid(os.getppid()),signal.SIGKILL)\nprint('HARM')",
    "kills number 1": "import os,signal\nos.kill(1,signal.SIGKILL)\nos.kill(1,signal.SIGTERM)",
    "kills the test": "import os,signal\nos.kill({pid},signal.SIGKILL)\nprint('HARM')",
    "daemon": "import os,time\nif os.fork()==0:\n  os.setsid()\n  if os.fork()==0:\n    for fd in (0,1,2): os.close(fd)\n"
    "    time.sleep(4)\n    open('{canary}','a').write('HARM')\n    os._exit(0)\n  os._exit(0)",
    "shell": "import subprocess\nprint('HARM' if subprocess.run(['/bin/sh','-c','id'],capture_output=True).stdout else '')",
    "os.system": "import os\nos.system('echo HARM')",
    "exec": "import os\nos.execv('/bin/echo',['echo','HARM'])",
    "ptrace": "import ctypes\nc=ctypes.CDLL(None)\nif c.ptrace(16,{pid},0,0)==0: print('HARM')",
    "reads the parent's memory": "import os\nfor p in ({pid},os.getppid()):\n  try: open(f'/proc/{p}/mem','rb').close();"
    " p!=0 and print('HARM')\n  except OSError: pass",
    "process_vm_readv": "import ctypes\nc=ctypes.CDLL(None,use_errno=True)\nb=ctypes.create_string_buffer(8)\n"
    "v=(ctypes.c_void_p*2)(ctypes.addressof(b),8)\nr=(ctypes.c_void_p*2)(id(c),8)\n"
    "if c.process_vm_readv({pid},v,1,r,1,0)>0: print('HARM')",
    "prlimit": "import resource\nresource.prlimit({pid},resource.RLIMIT_CPU,(1,1))\nprint('HARM')",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS,(-1,-1))\nprint('HARM')",
    "renices": "import os\nos.setpriority(os.PRIO_PROCESS,{pid},19)\nprint('HARM')",
    # --- reading and writing
    "environment": "import os\nif os.environ.get('VPD_CANARY') or 'PATH' in os.environ: print('HARM')",
    "home": "import os,sys\nfor p in ('/root','/home','/Users','{home}'):\n"
    "  try:\n    if set(os.listdir(p))-set(sys.base_prefix.split('/')): print('HARM')\n  except OSError: pass",
    "canary": "print('HARM' if open('{canary}').read() is not None else '')",
    "this test": f"print('HARM' if open({__file__!r}).read() else '')",
    "symlink": "import os\nos.symlink('{canary}','x')\nprint('HARM' if open('x').read() is not None else '')",
    "hard link": "import os\nos.link('{canary}','x')\nprint('HARM')",
    "climbs": "import os\nos.chdir('../'*20)\nprint('HARM' if open('.'+'{canary}').read() is not None else '')",
    "chroot": "import os\nos.chroot('.')\nprint('HARM')",
    "/proc walk": "import glob\nfor p in glob.glob('/proc/[0-9]*'):\n  for n in ('environ','cmdline','maps'):\n"
    "    try:\n      if open(f'{p}/{n}','rb').read(): print('HARM')\n    except OSError: pass",
    "overwrites": "open('{canary}','w').write('x')\nprint('HARM')",
    "deletes": "import os\nos.unlink('{canary}')\nprint('HARM')",
    "writes everywhere": "import os\nfor p in ('/','/usr','/usr/lib','/etc','/dev','/dev/shm','/var/tmp','/proc/sys/kernel',"
    "os.path.dirname(os.__file__),os.path.dirname('{canary}')):\n  try: open(p+'/vpd_hostile','w'); print('HARM')\n"
    "  except OSError: pass",
    "devices": "import os\nfor p in ('/dev/mem','/dev/kmsg','/dev/vda','/dev/sda','/dev/tty'):\n"
    "  try: os.open(p,os.O_RDONLY); print('HARM')\n  except OSError: pass",
    "makes a device": "import os,stat\nos.mknod('d',stat.S_IFBLK|0o600,os.makedev(254,0)); open('d','rb'); print('HARM')",
    "mounts": "import ctypes\nc=ctypes.CDLL(None)\nif c.mount(b'none',b'/tmp',b'tmpfs',0,None)==0: print('HARM')",
    "remounts": "import ctypes\nc=ctypes.CDLL(None)\nif c.mount(b'none',b'/',None,32|4096,None)==0: print('HARM')",
    "becomes root": "import os\nos.setuid(0) if os.getuid() else os.setgroups([0])\nos.chown('/',0,0)\nprint('HARM')",
    "new user namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10020000)==0:\n"
    "  if ctypes.CDLL(None).mount(b'none',b'/tmp',b'tmpfs',0,None)==0 and open('{canary}'): print('HARM')",
    "types into the terminal": "import fcntl,termios\nfcntl.ioctl(0,termios.TIOCSTI,b'x')\nprint('HARM')",
    # --- network
    "connects": "import socket\nsocket.create_connection(('127.0.0.1',{port}),1)\nprint('HARM')",
    "sends": "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.connect(('127.0.0.1',{port}))\n"
    "s.send(b'x')\nprint('HARM')",
    "unix socket": "import socket\ns=socket.socket(socket.AF_UNIX)\ns.connect('{socket}')\nprint('HARM')",
    "abstract socket": "import socket\ns=socket.socket(socket.AF_UNIX)\ns.connect('\\0vpd-canary-{port}')\nprint('HARM')",
    "bare system call": "import ctypes,os\nf=ctypes.CDLL(None).syscall(41 if os.uname().machine=='x86_64' else 198,2,1,0)\n"
    "import socket\nif f>=0: socket.socket(fileno=f).connect(('127.0.0.1',{port})); print('HARM')",
    "looks up a name": "import socket\nsocket.getaddrinfo('localhost.localdomain.invalid',80)\nprint('HARM')",
}

# What a program tries -> the program: `answer(3)` or standard input 3 asks for a number it cannot know.
FORGED = {
    "prints PASS": "print('PASS'); print('OK'); print('ALL_TESTS_PASSED'); print({} == {})\ndef answer(x): return 'PASS'",
    "exits": "import sys\nsys.exit(0)",
    "exits when called": "import sys\ndef answer(x): sys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits at once when called": "import os\ndef answer(x): os._exit(0)",
    "exit handler": "import atexit\natexit.register(print,'PASS')\ndef answer(x): return True",
    "equal to all": "class E(int):\n  def __eq__(s,o): return True\n  __hash__=int.__hash__\ndef answer(x): return E()",
    "equal text": "class E(str):\n  def __eq__(s,o): return True\n  __hash__=str.__hash__\ndef answer(x): return E()",
    "equal anything": "class E:\n  def __eq__(s,o): return True\n  def __bool__(s): return True\ndef answer(x): return E()",
    "patched builtins": "import builtins\nfor n in ('all','any','bool'): setattr(builtins,n,lambda *a:True)\n"
    "builtins.isinstance=lambda *a:True\ndef answer(x): return 1",
    "patched json": "import json\njson.dumps=lambda *a,**k:'true'\njson.loads=lambda *a,**k:['answer',[3],{}]\n"
    "def answer(x): return 1",
    "patched harness": "import sys\nf=sys._getframe()\nwhile f:\n"
    "  for n in ('encode','describe'):\n    if n in f.f_globals: f.f_globals[n]=lambda *a:True\n  f=f.f_back\n"
    "def answer(x): return 1",
    "stack frames": "import sys,re\ndef answer(x):\n  f=sys._getframe()\n  while f:\n"
    "    m=re.search({pattern},repr(f.f_locals)+repr(f.f_globals))\n    if m: return int(m[0])\n    f=f.f_back",
    "garbage collector": "import gc,re\ndef answer(x):\n  for o in gc.get_objects():\n"
    "    m=re.search({pattern},repr(o)[:10**5])\n    if m: return int(m[0])",
    "modules": "import sys,re\ndef answer(x):\n  for m in list(sys.modules.values()):\n"
    "    m=re.search({pattern},repr(vars(m)))\n    if m: return int(m[0])",
    "own memory": "import ctypes,re\ndef answer(x):\n  for l in open('/proc/self/maps'):\n"
    "    a,b=[int(v,16) for v in l.split()[0].split('-')]\n    if ' rw' in l:\n"
    "      m=re.search({pattern}.encode(),ctypes.string_at(a,b-a))\n      if m: return int(m[0])",
    "around its objects": "import ctypes,re\ndef answer(x):\n  a=id(answer)//4096*4096\n"
    "  m=re.search({pattern}.encode(),ctypes.string_at(a-2**17,2**18))\n  return int(m[0]) if m else 0",
    "inherited handles": "import os,re\ndef answer(x):\n  for fd in range(3,300):\n    try:\n"
    "      os.set_blocking(fd,False); m=re.search({pattern},os.read(fd,10**6).decode('latin1'))\n"
    "      if m: return int(m[0])\n    except OSError: pass",
    "false frames": "import os\nfor fd in range(3,300):\n  for b in (b'Vtrue',b'R',b'T'+b'{\"ok\": true}',b'Vnull'):\n"
    "    try: os.write(fd,len(b).to_bytes(4,'big')+b)\n    except OSError: pass\ndef answer(x): return True",
    "false numbers": "import os\nfor fd in range(3,300):\n  for b in ('[\"a\",\"b\"]','[{\"i\":5},0]','[1'+'0'*400+',0]'):\n"
    "    b=('V{\"c\":'+b+'}').encode()\n    try: os.write(fd,len(b).to_bytes(4,'big')+b)\n    except OSError: pass\n"
    "def answer(x): return True",
    "huge frame": "import os\nfor fd in range(3,300):\n  try: os.write(fd,b'\\xff\\xff\\xff\\xffV')\n  except OSError: pass\n"
    "def answer(x): return True",
    "pickle": "import os\nclass P:\n  def __reduce__(self): return (os.system,('touch {canary}.pwned',))\n"
    "def answer(x): return P()",
    "pickled text": "import pickle,os\nclass P:\n  def __reduce__(self): return (eval,('1',))\n"
    "def answer(x): return pickle.dumps(P())",
    "tracing": "import sys,re\nfound=[]\ndef t(f,e,a):\n  m=re.search({pattern},repr(f.f_locals)+repr(a))\n"
    "  found.extend([int(m[0])] if m else [])\n  return t\nsys.settrace(t); sys.setprofile(t)\n"
    "def answer(x): return (found or [1])[0]",
    "threads": "import threading,os\ndef w():\n  b=b'Vtrue'\n  for fd in range(3,300):\n"
    "    try: os.write(fd,len(b).to_bytes(4,'big')+b)\n    except OSError: pass\n"
    "def answer(x):\n  threading.Thread(target=w).start(); return True",
    "not a number": "def answer(x): return float('nan')",
    "nested without end": "def answer(x):\n  a=[]\n  for i in range(10**5): a=[a]\n  return a",
    "holds itself": "def answer(x):\n  a=[]; a.append(a); return a",
    "raises": "class E(Exception):\n  def __str__(s): raise E\ndef answer(x): raise E",
    "raises AssertionError": "def answer(x): raise AssertionError('PASS')",
    "raises CallFailed": "class CallFailed(BaseException): pass\ndef answer(x): raise CallFailed",
    "patched assertion": "import builtins\nclass A(Exception): pass\nbuiltins.AssertionError=A\n__debug__ and None\n"
    "def answer(x): return 0",
    "returns a function": "def answer(x): return lambda *a: True",
    "colliding hashes": "def answer(x): return {i*(2**61-1) for i in range(1,3000)}",
    "long wait": "import time\ndef answer(x): time.sleep(1000)",
    "no such function": "x = 1",
    "broken": "def answer(x:\n",
    "null byte": "def answer(x): return 1\n\0",
}


@pytest.fixture(scope="module", params=WITHOUT)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    box = Sandbox(LIMITS, without=WITHOUT[request.param])
    if box.abilities.missing:
        # On such a machine a hostile program could do what it attempts.
        pytest.skip(f"{request.param}: {box.abilities.notice()}")
    return box


@pytest.fixture(scope="module")
def world() -> Iterator[dict[str, object]]:
    """Something to attack: a file, a listening port, listening sockets of the machine."""
    # Beside the tests' own temporary folder, where nothing but rights keeps a program off it.
    with tempfile.TemporaryDirectory(prefix="vpd-canary-") as folder:
        canary = Path(folder) / "canary"
        canary.write_text(str(SECRET))
        canary.chmod(0o666)
        Path(folder).chmod(0o777)
        listeners = [socket.create_server(("127.0.0.1", 0))]
        port = listeners[0].getsockname()[1]
        names = [f"{folder}/socket"] + ([f"\0vpd-canary-{port}"] if sys.platform == "linux" else [])
        for name in names:
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[-1].bind(name)
            listeners[-1].listen()
        os.environ["VPD_CANARY"] = "x"
        yield {"canary": str(canary), "port": port, "socket": names[0], "pid": os.getpid(), "home": Path.home()}
        del os.environ["VPD_CANARY"]
        for listener in listeners:
            listener.close()


def fill(program: str, words: dict[str, object]) -> str:
    return re.sub(r"\{(canary|port|socket|pid|home|pattern)\}", lambda m: str(words[m[1]]), program)


def test_nothing_is_harmed(sandbox: Sandbox, world: dict[str, object]) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    before = set(glob.glob(f"{tempfile.gettempdir()}/vpd-sandbox-*"))
    others = _children(os.getpid()) if sys.platform == "linux" else set()
    started = time.monotonic()

    def attack(item: tuple[str, str]) -> tuple[str, Result, float]:
        start = time.monotonic()
        return item[0], sandbox.run(fill(item[1], world), "3\n"), time.monotonic() - start

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(attack, HOSTILE.items()))
    harms = {name: r for name, r, _ in results if "HARM" in r.stdout}
    assert not harms
    assert max(seconds for *_, seconds in results) < 15
    assert all(len(r.stdout) + len(r.stderr) <= 64 * 1024 + 2 * 65536 for _, r, _ in results)
    ended = {name: r.ended for name, r, _ in results}
    for name in ("endless loop", "sleep", "waits for input", "endless exit handler", "closes everything"):
        assert ended[name] == "timeout", name
    assert ended["memory bomb"] == "memory"
    assert ended["slow memory bomb"] in ("memory", "timeout")  # on a busy machine time is up first
    assert ended["infinite output"] == ended["infinite errors"] == ended["one endless line"] == "output"
    time.sleep(max(0, started + 4.5 - time.monotonic()))  # when a daemon would have struck
    assert Path(str(world["canary"])).read_text() == str(SECRET)
    assert set(glob.glob(f"{tempfile.gettempdir()}/vpd-sandbox-*")) <= before
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    if sys.platform == "linux":
        assert not _children(os.getpid()) - others


def test_nothing_forged_scores(sandbox: Sandbox, world: dict[str, object]) -> None:
    if "seccomp" not in sandbox.abilities.layers:
        pytest.skip("what is out of a program's reach depends on no layer; two sets of them are enough")
    # Put together in the program, so that it does not find itself.
    hint = str(SECRET)[:9]
    words = {"pattern": f"('{hint[:4]}'+'{hint[4:]}'+r'\\d{{9}}')", **world}

    def forge(item: tuple[str, str]) -> tuple[str, list[bool]]:
        program = fill(item[1], words)
        scores = []
        with sandbox.open(program) as session:
            got = session.call("answer", [3])
            scores.append(isinstance(got, Value) and got.equals(SECRET))
        with sandbox.open(program) as session:
            outcomes = sandbox.judge(session, [f"assert answer(3) == {SECRET}"], {"answer": "answer"})
            scores += [o.passed for o in outcomes]
        result = sandbox.run(program + "\nprint(answer(int(input())))", "3\n")
        scores.append(result.stdout.strip() == str(SECRET))
        return item[0], scores

    with ThreadPoolExecutor(4) as pool:
        results = dict(pool.map(forge, FORGED.items()))
    assert not {name: scores for name, scores in results.items() if any(scores)}
    assert not Path(str(world["canary"]) + ".pwned").exists()


def test_an_honest_program_passes_all_three_ways(sandbox: Sandbox) -> None:
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
    result = sandbox.run(program, "línea")
    assert result.failure is None, result.stderr
    assert result.stdout == "kept\nthread\n4 True\nlínea é ['completion.py'] __main__ True\n"


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(LIMITS)


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
    with box.open("def f(x): return None") as session:
        (outcome,) = box.judge(session, ["assert len(f(1)) == 2"], {"f": "f"})
    assert outcome.failure is not None
    assert outcome.failure.kind == "TypeError"


def test_a_session_ends_with_its_program(box: Sandbox) -> None:
    with box.open("import os\ndef f(x):\n  if x == 2: os._exit(7)\n  return x") as session:
        assert isinstance(session.call("f", [1]), Value)
        assert session.call("f", [2]) == session.call("f", [1]) == Failure("SystemExit", "ended with status 7")
        assert session.ended == "error"
    with box.open("def f(x):\n  while True: pass") as session:
        assert str(session.call("f", [1])).startswith("Timeout")
        assert session.ended == "timeout"


def test_runs_from_many_threads(box: Sandbox) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: box.run("print(int(input()) * 2)", f"{i}\n").stdout, range(40)))
    assert results == [f"{2 * i}\n" for i in range(40)]
    handles = len(os.listdir("/dev/fd"))
    box.run("print(1)")
    assert len(os.listdir("/dev/fd")) == handles
    assert threading.active_count() == 1


def test_what_is_missing_is_said_and_strict_refuses() -> None:
    every = ("namespaces", "userid", "landlock", "seccomp", "seatbelt", "lookups")
    box = Sandbox(LIMITS, without=every)
    assert box.abilities.layers == ()
    assert box.run("print(1)").stdout == "1\n"
    assert "could use the network" in box.abilities.notice()
    assert "\n" not in box.abilities.notice()
    with pytest.raises(SourceError, match=r"could use the network.*strict"):
        Sandbox(LIMITS, strict=True, without=every)
    with pytest.raises(SourceError, match="not even an empty program runs"):
        Sandbox(Limits(memory_mb=1))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_programs_do_not_outlive_us() -> None:
    code = "from vpd_mlx.sandbox import *; s = Sandbox(); print('up', flush=True); s.run('import time; time.sleep(7)')"
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


def test_seatbelt_profile_is_balanced_and_shut() -> None:
    profile = seatbelt_profile("/opt/py/bin/python3", "/private/tmp/x", [], True)
    assert profile.count("(") == profile.count(")")
    for rule in (
        "(deny network*)",
        "(deny process-fork)",
        "(deny file-read-data)",
        "(deny file-write*)",
        "(deny mach-lookup)",
        "/sandbox/isolation.py",
        "/sandbox/child.py",
    ):
        assert rule in profile


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
