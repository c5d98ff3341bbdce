"""Hostile programs, by the promise that they would break.

A program prints HARM if it got something that it must not get; otherwise it may end in any way. Words in braces are filled in
(`World.words`): a file of this user, sockets that listen, a process to strike at.
"""

from __future__ import annotations

# A promise, or `limits`, which hold whatever the layers -> what a program tries -> the program.
ALONE: dict[str, dict[str, str]] = {
    "limits": {
        "thread bomb": "import threading,time\nwhile True: threading.Thread(target=time.sleep,args=(99,)).start()",
        "memory bomb": "x=bytearray(10**11)",
        "slow memory bomb": "a=[]\nwhile True: a.append('x'*10**6+str(len(a)))",
        "memory bomb in a handler": "a=[]\nwhile True:\n  try:\n    while True: a.append(bytearray(10**6))\n"
        "  except MemoryError: pass",
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
    },
    "resources": {
        "fork bomb": "import os\nwhile True:\n  os.fork()",
        "uncounted memory": "import os\nfor i in range(200):\n  f=os.memfd_create('x')\n  os.write(f,b'x'*10**6)\nprint('HARM')",
        "shared memory": "import ctypes\nc=ctypes.CDLL(None)\nfor i in range(64):\n  s=c.shmget(0,1<<26,0o1600)\n"
        "  if s>=0: c.shmat.restype=ctypes.c_void_p; p=c.shmat(s,None,0); p not in(None,2**64-1) and ctypes.memset(p,1,1<<26)"
        " and c.shmdt(ctypes.c_void_p(p))",
    },
    "processes": {
        "kills the parent": "import os,signal\nos.kill(os.getppid(),signal.SIGKILL)",
        "kills everyone": "import os,signal\nos.kill(-1,signal.SIGKILL)",
        "kills the group": "import os,signal\nos.killpg(os.getpgid(os.getppid()),signal.SIGKILL)\nprint('HARM')",
        "kills number 1": "import os,signal\nos.kill(1,signal.SIGKILL)\nos.kill(1,signal.SIGTERM)",
        "kills the test": "import os,signal\nos.kill({pid},signal.SIGKILL)\nprint('HARM')",
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
    },
    "descendants": {
        "daemon": "import os,time\nif os.fork()==0:\n  os.setsid()\n  if os.fork()==0:\n    for fd in (0,1,2): os.close(fd)\n"
        "    time.sleep(4)\n    open('{canary}','a').write('HARM')\n    os._exit(0)\n  os._exit(0)",
    },
    "files": {
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
    },
    "network": {
        "connects": "import socket\nsocket.create_connection(('127.0.0.1',{port}),1)\nprint('HARM')",
        "sends": "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.connect(('127.0.0.1',{port}))\n"
        "s.send(b'x')\nprint('HARM')",
        "unix socket": "import socket\ns=socket.socket(socket.AF_UNIX)\ns.connect('{socket}')\nprint('HARM')",
        "abstract socket": "import socket\ns=socket.socket(socket.AF_UNIX)\ns.connect('\\0vpd-canary-{port}')\nprint('HARM')",
        "bare system call": "import ctypes,os\nf=ctypes.CDLL(None).syscall(41 if os.uname().machine=='x86_64' else 198,2,1,0)\n"
        "import socket\nif f>=0: socket.socket(fileno=f).connect(('127.0.0.1',{port})); print('HARM')",
        "looks up a name": "import socket\nsocket.getaddrinfo('localhost.localdomain.invalid',80)\nprint('HARM')",
    },
}

# What the short ones below have at hand: system calls by their numbers on x86_64 and aarch64, and two ways to tell of success.
HELP = """import ctypes, fcntl, os, resource, signal, socket, struct, sys, threading, time
C = ctypes.CDLL(None, use_errno=True)
C.syscall.restype = ctypes.c_long
X = os.uname().machine == 'x86_64'
def sc(x, a, *words):
    ctypes.set_errno(0)
    return C.syscall(ctypes.c_long(x if X else a), *[ctypes.c_long(w) if isinstance(w, int) else w for w in words])
def harm(got):
    if got: print('HARM', NAME)
def reached(result):
    harm(result >= 0 or ctypes.get_errno() not in (1, 38))
"""
# One system call each, so that many fit into one program (`arena.batch`). `{victim}` is a process of this user; `{key}` a file
# that only the user may read, `{lib}` one that programs may read; `{dgram}` listens for datagrams.
QUICK: dict[str, dict[str, str]] = {
    "processes": {
        "owner of a pipe": "r,w=os.pipe(); fcntl.fcntl(r,fcntl.F_SETOWN,{victim}); fcntl.fcntl(r,10,signal.SIGKILL)\n"
        "fcntl.fcntl(r,fcntl.F_SETFL,os.O_ASYNC|os.O_NONBLOCK); os.write(w,b'x'); harm(fcntl.fcntl(r,fcntl.F_GETOWN)=={victim})",
        "owner of a pipe, extended": "r,w=os.pipe(); fcntl.fcntl(r,15,struct.pack('ii',1,{victim})); fcntl.fcntl(r,10,9)\n"
        "fcntl.fcntl(r,fcntl.F_SETFL,os.O_ASYNC); os.write(w,b'x'); harm(fcntl.fcntl(r,fcntl.F_GETOWN)=={victim})",
        "owner of a socket": "a,b=socket.socketpair(); fcntl.ioctl(a,0x8901,struct.pack('i',{victim})); fcntl.fcntl(a,10,9)\n"
        "fcntl.fcntl(a,fcntl.F_SETFL,os.O_ASYNC); b.send(b'x'); harm(fcntl.fcntl(a,fcntl.F_GETOWN)=={victim})",
        "group of a socket": "a,b=socket.socketpair(); fcntl.ioctl(a,0x8902,struct.pack('i',-{victim}))\n"
        "fcntl.fcntl(a,fcntl.F_SETFL,os.O_ASYNC); b.send(b'x'); harm(fcntl.fcntl(a,fcntl.F_GETOWN)==-{victim})",
        "urgent data": "a,b=socket.socketpair(); fcntl.fcntl(a,fcntl.F_SETOWN,{victim}); b.send(b'x',socket.MSG_OOB)\n"
        "harm(fcntl.fcntl(a,fcntl.F_GETOWN)=={victim})",
        "slows a process": "harm(sc(141,140,0,{victim},19)==0)",
        "slows a group": "harm(sc(141,140,1,os.getpgid({victim}),19)==0)",
        "affinity": "os.sched_setaffinity({victim},[0]); harm(1)",
        "idle class": "os.sched_setscheduler({victim},os.SCHED_IDLE,os.sched_param(0)); harm(1)",
        "scheduling parameters": "os.sched_setparam({victim},os.sched_param(0)); harm(1)",
        "scheduling attributes": "harm(sc(314,274,{victim},struct.pack('IIQiIQQQ',48,5,0,0,0,0,0,0),0)==0)",
        "idle disk": "harm(sc(251,30,1,{victim},3<<13)==0)",
        "limits of another": "harm(sc(302,261,{victim},0,struct.pack('QQ',1,1),None)==0)",
        "reads limits of another": "harm(sc(302,261,{victim},7,None,ctypes.create_string_buffer(16))==0)",
        "kill": "os.kill({victim},9); harm(1)",
        "kills the group's leader": "os.kill(-{victim},9); harm(1)",
        "tkill": "harm(sc(200,130,{victim},9)==0)",
        "tgkill": "harm(sc(234,131,{victim},{victim},9)==0)",
        "rt_sigqueueinfo": "harm(sc(129,138,{victim},9,struct.pack('iii116x',9,0,-1))==0)",
        "rt_tgsigqueueinfo": "harm(sc(297,240,{victim},{victim},9,struct.pack('iii116x',9,0,-1))==0)",
        "pidfd": "f=sc(434,434,{victim},0); harm(f>=0 and sc(424,424,f,9,None,0)==0)",
        "pidfd of a thread": "f=sc(434,434,{victim},0o200); harm(f>=0 and sc(438,438,f,0,0)>=0)",
        "timer of another": "harm(sc(222,107,1,struct.pack('qiiii40x',0,9,4,{victim},0),ctypes.create_string_buffer(8))==0)",
        "moves its memory": "harm(sc(256,238,{victim},8,struct.pack('Q',1),struct.pack('Q',1))>=0)",
        "moves its pages": "harm(sc(279,239,{victim},0,None,None,None,0)>=0)",
        "compares": "harm(sc(312,272,{victim},os.getpid(),1,0,0)>=0)",
        "robust list": "b=ctypes.create_string_buffer(8); harm(sc(274,100,{victim},b,b)==0)",
        "seizes": "harm(sc(101,117,0x4206,{victim},0,0)==0)",
        "writes its memory": "b=ctypes.create_string_buffer(8); v=(ctypes.c_void_p*2)(ctypes.addressof(b),8)\n"
        "harm(sc(311,271,{victim},v,1,v,1,0)>=0)",
        "oom score": "open('/proc/{victim}/oom_score_adj','w').write('1000'); harm(1)",
        "its memory file": "open('/proc/{victim}/mem','r+b'); harm(1)",
        "its autogroup": "open('/proc/{victim}/autogroup','w').write('19'); harm(1)",
        "its environment": "harm(open('/proc/{victim}/environ','rb').read() is not None)",
        "shared segment": "C.shmat.restype=ctypes.c_void_p; p=C.shmat({shm},None,0)\n"
        "if p not in (None,2**64-1): ctypes.memset(p,88,8); harm(1)",
        "removes a segment": "harm(sc(31,195,{shm},0,None)==0)",
        "posts a message": "harm(sc(69,189,{queue},struct.pack('q8s',1,b'x'),8,0o4000)==0)",
        "takes a message": "harm(sc(70,188,{queue},ctypes.create_string_buffer(64),8,0,0o4000)>=0)",
        "removes a queue": "harm(sc(71,187,{queue},0,None)==0)",
        "semaphore": "harm(sc(65,193,{semaphore},struct.pack('Hhh',0,1,0o4000),1)==0)",
        "removes a semaphore": "harm(sc(66,191,{semaphore},0,0,0)==0)",
    },
    "files": {
        "chmod": "os.chmod('{key}',0o777); harm(1)",
        "chmod by handle": "f=os.open('{lib}',os.O_RDONLY); os.fchmod(f,0o777); harm(1)",
        "chmod by folder": "f=os.open(os.path.dirname('{lib}'),os.O_RDONLY); os.chmod('lib.py',0o777,dir_fd=f); harm(1)",
        "chmod, new call": "harm(sc(452,452,-100,b'{key}',0o777,0)==0)",
        "chmod of a device": "os.chmod('/dev/null',0o666); harm(1)",
        "owner": "os.chown('{key}',os.getuid(),os.getgid()); harm(1)",
        "owner by handle": "os.fchown(os.open('{lib}',os.O_RDONLY),os.getuid(),os.getgid()); harm(1)",
        "owner of a link": "os.lchown('{key}',os.getuid(),os.getgid()); harm(1)",
        "times": "os.utime('{key}',(0,0)); harm(1)",
        "times now": "os.utime('{canary}'); harm(1)",
        "times by handle": "os.utime(os.open('{lib}',os.O_RDONLY),(0,0)); harm(1)",
        "times, old call": "harm(X and sc(132,-1,b'{key}',None)==0)",
        "attribute": "os.setxattr('{canary}','user.vpd',b'x'); harm(1)",
        "attribute by handle": "os.setxattr(os.open('{lib}',os.O_RDONLY),'user.vpd',b'x'); harm(1)",
        "attribute, new call": "b=b'x'; p=struct.pack('QII',id(b)+32,1,0)\n"
        "harm(sc(463,463,-100,b'{canary}',0,b'user.vpd',p,16)==0)",
        "reads an attribute": "harm(os.getxattr('{canary}','user.secret'))",
        "lists attributes": "harm(os.listxattr('{canary}'))",
        "removes an attribute": "os.removexattr('{canary}','user.secret'); harm(1)",
        "flags": "f=os.open('{lib}',os.O_RDONLY); fcntl.ioctl(f,0x40086602,struct.pack('l',0x40)); harm(1)",
        "flags, extended": "f=os.open('{lib}',os.O_RDONLY); fcntl.ioctl(f,0x401C5820,struct.pack('7I',64,0,0,0,0,0,0)); harm(1)",
        "flags, new call": "harm(sc(469,469,-100,b'{lib}',struct.pack('QIIII',64,0,0,0,0),24,0)==0)",
        "truncates": "os.truncate('{canary}',0); harm(1)",
        "truncates while reading": "os.open('{lib}',os.O_RDONLY|os.O_TRUNC); harm(1)",
        "opens, new call": "harm(sc(437,437,-100,b'{canary}',struct.pack('QQQ',2,0,0),24)>=0)",
        "renames": "os.rename('{canary}','x'); harm(1)",
        "renames onto it": "open('x','w').close(); os.rename('x','{canary}'); harm(1)",
        "exchanges": "open('y','w').close(); harm(sc(316,276,-100,b'y',-100,b'{canary}',2)==0)",
        "new folder": "os.mkdir(os.path.dirname('{canary}')+'/d'); harm(1)",
        "new link": "os.symlink('x',os.path.dirname('{canary}')+'/l'); harm(1)",
        "new pipe": "os.mkfifo(os.path.dirname('{canary}')+'/p'); harm(1)",
        "lists a folder": "harm(os.listdir(os.path.dirname('{canary}')))",
        "by number": "h=struct.pack('Ii8x',8,0)+bytes(128); m=ctypes.c_int(); b=ctypes.create_string_buffer(h)\n"
        "harm(sc(303,264,-100,b'{key}',b,ctypes.byref(m),0)==0 and sc(304,265,3,b,0)>=0)",
        "watches a folder": "f=sc(294,26,0); harm(f>=0 and sc(254,27,f,os.path.dirname('{canary}').encode(),0xfff)>=0)",
        "watches, new call": "f=sc(300,262,0x200,0); harm(f>=0 and sc(301,263,f,1,0x2,-100,b'{canary}')>=0)",
        "writes a library": "open('{lib}','a').write('x'); harm(1)",
        "maps a library": "import mmap; f=os.open('{lib}',os.O_RDWR); mmap.mmap(f,0)[0]=88; harm(1)",
        "through /proc": "f=os.open('{key}',os.O_PATH); harm(open('/proc/self/fd/%d'%f).read())",
        "from the root": "os.chdir('/proc/1/root'); harm(open('.'+'{canary}').read())",
    },
    "network": {
        "datagram": "a,b=socket.socketpair(type=socket.SOCK_DGRAM); a.sendto(b'x','{dgram}'); harm(1)",
        "datagram, connected": "a,b=socket.socketpair(type=socket.SOCK_DGRAM); a.connect('{dgram}'); a.send(b'x'); harm(1)",
        "datagram by name": "a,b=socket.socketpair(type=socket.SOCK_DGRAM); a.sendto(b'x','\\0vpd-dgram-{port}'); harm(1)",
        "raw pair": "a,b=socket.socketpair(type=socket.SOCK_RAW); a.sendto(b'x','{dgram}'); harm(1)",
        "pair, new address": "a,b=socket.socketpair(); a.shutdown(2); a.connect('{socket}'); harm(1)",
        "pair that listens": "a,b=socket.socketpair(); a.bind('\\0vpd-own-{port}'); a.listen(); harm(1)",
        "IPv6": "s=socket.socket(socket.AF_INET6,socket.SOCK_DGRAM); s.connect(('::1',{port})); harm(1)",
        "mapped IPv6": "s=socket.socket(socket.AF_INET6); s.connect(('::ffff:127.0.0.1',{port})); harm(1)",
        "fast open": "s=socket.socket(); s.sendto(b'x',0x20000000,('127.0.0.1',{port})); harm(1)",
        "packets": "harm(sc(41,198,17,3,0x300)>=0)",
        "to the host": "harm(sc(41,198,40,1,0)>=0)",
        "listens": "s=socket.socket(); s.bind(('127.0.0.1',0)); s.listen(); harm(1)",
    },
    "kernel": {
        "joins a keyring": "reached(sc(250,219,1,None))",
        "reads a keyring": "reached(sc(250,219,11,-3,ctypes.create_string_buffer(64),64))",
        "adds a key": "reached(sc(248,217,b'user',b'vpd',b'x',1,-2))",
        "requests a key": "reached(sc(249,218,b'user',b'vpd',None,0))",
        "userfaultfd": "reached(sc(323,282,1))",
        "bpf": "reached(sc(321,280,0,bytes(64),64))",
        "perf": "reached(sc(298,241,struct.pack('IIQ',1,112,0)+bytes(96),0,-1,-1,0))",
        "io_uring": "reached(sc(425,425,8,ctypes.create_string_buffer(120)))",
        "asynchronous files": "reached(sc(206,0,1,ctypes.create_string_buffer(8)))",
        "watches": "reached(sc(294,26,0))",
        "user namespace": "reached(sc(272,97,0x10000000))",
        "clone into one": "r=sc(56,220,0x10000011,0,0,0,0); r or os._exit(0); reached(r)",
        "clone3": "b=ctypes.create_string_buffer(struct.pack('QQQQQQQQ',0x10000000,0,0,0,17,0,0,0),64)\n"
        "r=sc(435,435,b,64); r or os._exit(0); reached(r)",
        "descriptor table": "reached(sc(154,-1,0,ctypes.create_string_buffer(16),16)) if X else None",
        "file system": "reached(sc(430,430,b'tmpfs',0))",
        "tree": "reached(sc(428,428,-100,b'/',1))",
        "mount attributes": "reached(sc(442,442,-100,b'/',0,bytes(32),32))",
        "kernel log": "reached(sc(103,116,10,None,0))",
        "filter of its own": "reached(sc(317,277,2,0,None))",
        "disk quota": "reached(sc(179,60,0x800001<<8,b'/dev/vda',0,ctypes.create_string_buffer(64)))",
        "x32 call": "X and reached(C.syscall(ctypes.c_long(0x40000000+39)))",
        "unknown call": "harm(sc(480,480)!=-1 or ctypes.get_errno()!=38)",
        "personality": "reached(sc(135,92,0x0040000))",
        "handle of a file": "reached(sc(304,265,-100,bytes(16),0))",
        "secret memory": "reached(sc(447,447,0))",
        "lease": "fcntl.fcntl(os.open('{lib}',os.O_RDONLY),fcntl.F_SETLEASE,fcntl.F_RDLCK); harm(1)",
        "all disks": "reached(sc(162,81))",
    },
}

# Longer ones, among them what may end the program: one each.
ALONE_NEW = {
    "resources": {
        "threads that fork": "import os,threading\ndef f(): [os.fork() for _ in range(99)]\n"
        "for i in range(6): threading.Thread(target=f).start()",
    },
    "limits": {
        "stops itself": "import os,signal\nos.kill(os.getpid(),signal.SIGSTOP)",
        "abort": "import os\nos.abort()",
        "flood of alarms": "import signal\nsignal.signal(signal.SIGALRM,lambda *a:None)\nsignal.setitimer(0,1e-6,1e-6)\n"
        "while True: pass",
        "ignores the time limit": "import signal\nsignal.signal(signal.SIGXCPU,lambda *a:None)\nwhile True: pass",
        "empty frames": "import os\nwhile True: os.write(4,bytes(4)*4096)",
        "half a frame": "import os,time\nos.write(4,b'\\0\\0\\1\\0V'); time.sleep(1000)",
        "frame of 4 GB": "import os,time\nos.write(4,b'\\xff\\xff\\xff\\xffV'); time.sleep(1000)",
        "endless frames": "import os\nwhile True: os.write(4,b'\\0\\0\\0\\5Vnull'*1000)",
        "reads the program's pipe": "import os\nos.read(3,100)",
        "fills a pipe": "import os\nr,w=os.pipe()\nwhile True: os.write(w,b'x'*65536)",
        "many pipes": "import os\nl=[]\nwhile True: l.append(os.pipe())",
        "many descriptors in flight": "import socket,array\na,b=socket.socketpair()\nwhile True:\n"
        "  a.sendmsg([b'x'],[(socket.SOL_SOCKET,socket.SCM_RIGHTS,array.array('i',[0]*60))])",
        "deep stack": "import threading,sys\nsys.setrecursionlimit(10**8)\nthreading.stack_size(64<<20)\n"
        "def f(): f()\nt=threading.Thread(target=f); t.start(); t.join()",
        "no names for files": "import os\nos.mkdir('a'); os.chdir('a'); os.rmdir('../a'); open('x','w')",
        "unreadable folder": "import os\nos.mkdir('a'); os.mkdir('a/b'); os.chmod('a',0)",
        "32-bit call": "import ctypes,mmap,os\nif os.uname().machine=='x86_64':\n"
        "  m=mmap.mmap(-1,4096,prot=7); m.write(bytes.fromhex('b81400000031dbcd80c3'))\n"
        "  call=ctypes.CFUNCTYPE(ctypes.c_int); call(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
    },
    "descendants": {
        "session of its own": "import os,time\nos.setsid() if os.getpid()!=os.getpgid(0) else None\nif os.fork()==0:\n"
        "  time.sleep(4); open('{canary}','a').write('HARM')",
        "double fork": "import os,time\nfor i in range(2):\n  if os.fork(): os._exit(0)\ntime.sleep(4)\n"
        "open('{canary}','a').write('HARM')",
        "no death signal": "import ctypes,os,time\nctypes.CDLL(None).prctl(1,0,0,0,0)\nif os.fork()==0:\n"
        "  os.closerange(0,64); time.sleep(4); open('{canary}','a').write('HARM')",
    },
    "files": {
        "race with a link": "import os,threading\nopen('x','w').close()\ndef swap():\n  while True:\n"
        "    try: os.symlink('{canary}','y'); os.replace('y','x')\n    except OSError: pass\n"
        "threading.Thread(target=swap,daemon=True).start()\nfor i in range(2000):\n"
        "  try:\n    if '9182' in open('x').read(): print('HARM')\n  except OSError: pass\nimport os; os._exit(0)",
    },
}

for _promise, _programs in ALONE_NEW.items():
    ALONE[_promise] |= _programs

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

# Frames of the result pipe -> what a program sends in place of its answer.
FRAMES = {
    "complex of text": b'V{"c":["1","2"]}',
    "complex of huge numbers": b'V{"c":[{"i":"0x%s"},0.0]}' % (b"f" * 400),
    "complex of complex": b'V{"c":[{"c":[1.0,2.0]},1.0]}',
    "complex of three": b'V{"c":[1.0,2.0,3.0]}',
    "huge number": b"V" + b"9" * 5000,
    "huge hexadecimal": b'V{"i":"0x%s"}' % (b"f" * 60000),
    "hexadecimal with marks": b'V{"i":"0x_f"}',
    "infinite number": b"V1e999",
    "NaN": b"VNaN",
    "float in words": b'V{"f":"1e400"}',
    "float from a list": b'V{"f":[1]}',
    "bytes that are none": b'V{"b":"0g"}',
    "odd pairs": b'V{"d":[[1,2,3]]}',
    "pairs that are none": b'V{"d":{"a":1}}',
    "no tag": b"V{}",
    "two tags": b'V{"t":[],"s":[]}',
    "unknown tag": b'V{"q":1}',
    "object of objects": b'V[{"o":["x",true]}]',
    "object without truth": b'V{"o":["x",1]}',
    "set of lists": b'V{"s":[[1],[2]]}',
    "not UTF-8": b"V\xff\xfe",
    "half a surrogate": b'V"\\ud800"',
    "nested lists": b"V" + b"[" * 30000 + b"]" * 30000,
    "nested tags": b"V" + b'{"t":[' * 3000 + b"]}" * 3000,
    "other letters": b"Zabc",
    "no letter": b"",
    "the judge's report": b'T{"ok": true}',
    "the judge's call": b'C["answer",[3],{}]',
    "ready again": b"R",
    "a failure of its own": b"EStopIteration\x00x\x00",
    "an exception of its own": b"XStopIteration\x000\x00",
}
FRAMED = {
    f"frame: {name}": f"import os\nb={frame!r}\ndef answer(x): os.write(4, len(b).to_bytes(4, 'big') + b)"
    for name, frame in FRAMES.items()
}
FORGED |= {
    f"raises {name}": f"def answer(x): raise {name}"
    for name in (
        "StopIteration",
        "StopAsyncIteration",
        "GeneratorExit",
        "KeyboardInterrupt",
        "RuntimeError",
        "IndexError",
    )
}
# Ways of asking for the answer, some of which an exception ends as if nothing were wrong.
QUESTIONS = (
    "assert answer(3) == {answer}",
    "assert all(map(lambda x: answer(x) == {answer}, [3, 3]))",
    "for got, want in zip(map(answer, [3, 3]), [{answer}] * 2):\n    assert got == want",
    "for got in map(answer, [3]):\n    assert got == {answer}",
    "assert not [x for x in map(answer, [3]) if x != {answer}]",
    "assert set(map(answer, [3])) <= {{{answer}}}",
)
