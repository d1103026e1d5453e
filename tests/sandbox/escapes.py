"""Programs that try to get out, by category. Each is run as a script after PRELUDE; the verdict is in test_escapes.py.

What is read outside is printed: the secret of the canary file in any output is an escape. What cannot be seen from
outside (a file of /proc/sys that opens for writing) is told by `escaped()`; nothing is ever written to it.
"""

from __future__ import annotations

from typing import Final

PRELUDE: Final = '''
import ctypes, errno, fcntl, json, os, signal, socket, struct, sys, threading, time
facts = json.loads({facts!r})
def escaped(what=""):
    print("ESCAPED", what, flush=True)
def shown(path):
    print(open(path, "rb").read(4096), flush=True)
def opened(path, flags=os.O_WRONLY):
    try:
        os.close(os.open(path, flags))
    except OSError:
        return
    escaped(path)
_libc = ctypes.CDLL(None, use_errno=True)
_ARM = os.uname().machine == "aarch64"
def syscall(x86, arm, *arguments):
    whole = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _libc.syscall(ctypes.c_long(arm if _ARM else x86), *whole)
def allowed(result, what=""):
    if result != -1:
        escaped(what)
def tried(attempt, what=""):
    try:
        attempt()
    except Exception:
        return
    escaped(what)
'''

REACH: Final = {
    "read the canary": "shown(facts['file'])",
    "read the canary by a descriptor of its folder": "d = os.open(facts['folder'], os.O_RDONLY)\n"
    "print(os.read(os.open('file', os.O_RDONLY, dir_fd=d), 99))",
    "read the canary through a link": "os.symlink(facts['file'], 'link'); shown('link')",
    "read the canary through a hard link": "os.link(facts['file'], 'hard'); shown('hard')",
    "read the canary through /proc/self/root": "shown('/proc/self/root' + facts['file'])",
    "read the canary through /proc/1/root": "shown('/proc/1/root' + facts['file'])",
    "read the canary through /proc/self/cwd": "shown('/proc/self/cwd/../..' + facts['file'])",
    "read the canary with many dots": "shown('../' * 40 + facts['file'].lstrip('/'))",
    "read the canary through another's root": "[shown(f'/proc/{p}/root' + facts['file']) for p in os.listdir('/proc') "
    "if p.isdigit() and os.path.exists(f'/proc/{p}/root' + facts['file'])]",
    "read the canary with cat": "import subprocess; print(subprocess.run(['/bin/cat', facts['file']], "
    "capture_output=True).stdout)",
    "read the canary with a shell": "os.system('cat ' + facts['file'])",
    "read the canary with openat2": "h = struct.pack('=QQQ', 0, 0, 0)\n"
    "f = syscall(437, 437, -100, facts['file'].encode(), h, 24)\nprint(os.read(f, 99))",
    "read the canary by its handle": "h = ctypes.create_string_buffer(struct.pack('=Ii', 128, 0) + bytes(128))\n"
    "m = ctypes.c_int()\nallowed(syscall(303, 264, -100, facts['file'].encode(), h, ctypes.byref(m), 0))",
    "read the canary as a module": "import importlib.machinery as m\nprint(m.SourceFileLoader('c', facts['file']).get_data(facts['file']))",
    "read the canary with mmap": "import mmap; f = open(facts['file'], 'rb'); print(mmap.mmap(f.fileno(), 0, "
    "prot=mmap.PROT_READ)[:99])",
    "read the canary with sendfile": "f = os.open(facts['file'], os.O_RDONLY); os.sendfile(1, f, 0, 99)",
    "read the canary in a thread": "t = threading.Thread(target=shown, args=(facts['file'],)); t.start(); t.join()",
    "read the canary after a fork": "p = os.fork()\nshown(facts['file']) if p == 0 else os.wait()",
    "read the canary after exec": "os.execv(sys.executable, [sys.executable, '-S', '-c', "
    "'print(open(%r).read())' % facts['file']])",
    "list the folder of the canary": "print(os.listdir(facts['folder'])); escaped()",
    "write the canary": "opened(facts['file'])",
    "append to the canary": "open(facts['file'], 'a').close(); escaped()",
    "cut the canary": "os.truncate(facts['file'], 0); escaped()",
    "replace the canary": "open('new', 'w').close(); os.rename('new', facts['file']); escaped()",
    "delete the canary": "os.unlink(facts['file']); escaped()",
    "close the canary to its owner": "os.chmod(facts['file'], 0); escaped()",
    "age the canary": "os.utime(facts['file'], (0, 0)); escaped()",
    "own the canary": "os.chown(facts['file'], os.getuid(), -1); escaped()",
    "mark the canary": "os.setxattr(facts['file'], 'user.mark', b'1'); escaped()",
    "make a file beside the canary": "open(facts['folder'] + '/made', 'w').close(); escaped()",
    "make a folder beside the canary": "os.mkdir(facts['folder'] + '/made'); escaped()",
    "make a link beside the canary": "os.symlink('/', facts['folder'] + '/made'); escaped()",
    "lock the canary": "f = open(facts['file']); fcntl.flock(f, fcntl.LOCK_EX); escaped()",
    "/etc/shadow": "shown('/etc/shadow'); escaped()",
    "/etc/passwd": "shown('/etc/passwd'); escaped()",
    "/root": "print(os.listdir('/root/.ssh')); escaped()",
    "keys of ssh": "print(os.listdir(facts['home'] + '/.ssh')); escaped()",
    "a token of the hub": "shown(facts['home'] + '/.cache/huggingface/token'); escaped()",
    "history of the shell": "shown(facts['home'] + '/.bash_history'); escaped()",
    "settings of git": "shown(facts['home'] + '/.gitconfig'); escaped()",
    "the checkout": "print(os.listdir(facts['checkout'])); escaped()",
    "the environment of the host": "print(dict(os.environ))",
    "the environment of the parent": "shown(f'/proc/{os.getppid()}/environ'); escaped()",
    "the environment of process 1": "shown('/proc/1/environ'); escaped()",
    "the command line of the parent": "shown(f'/proc/{facts[\"process\"]}/cmdline'); escaped()",
    "descriptors of ours": "extra = [n for n in range(4, 2048) if not _libc.fcntl(n, 1) == -1]\n"
    "print(extra)\nif extra: escaped()",
    "descriptors of the parent": "print(os.listdir(f'/proc/{os.getppid()}/fd')); escaped()",
    "descriptors of the host": "print(os.listdir(f'/proc/{facts[\"process\"]}/fd')); escaped()",
    "memory of every process": "for p in os.listdir('/proc'):\n    if p.isdigit() and int(p) != os.getpid():\n"
    "        opened(f'/proc/{p}/mem', os.O_RDWR)",
    "memory of the host": "opened('/dev/mem', os.O_RDONLY); opened('/proc/kcore', os.O_RDONLY)",
    "ports": "opened('/dev/port', os.O_RDWR)",
    "disks": "[opened('/dev/' + d, os.O_RDONLY) for d in ('sda', 'vda', 'nvme0n1', 'loop0', 'xvda')]",
    "fuse": "opened('/dev/fuse', os.O_RDWR)",
    "kvm": "opened('/dev/kvm', os.O_RDWR)",
    "tun": "opened('/dev/net/tun', os.O_RDWR)",
    "terminals": "opened('/dev/tty', os.O_RDWR); opened('/dev/tty1', os.O_RDWR); opened('/dev/ptmx', os.O_RDWR)",
    "shared memory of the host": "print(os.listdir('/dev/shm')); escaped()",
    "shared memory that stays": "open('/dev/shm/stays', 'w').close(); escaped()",
    "core_pattern": "opened('/proc/sys/kernel/core_pattern')",
    "modprobe": "opened('/proc/sys/kernel/modprobe')",
    "hotplug": "opened('/proc/sys/kernel/hotplug'); opened('/sys/kernel/uevent_helper')",
    "binfmt_misc": "opened('/proc/sys/fs/binfmt_misc/register')",
    "any switch of the kernel": "for where, _, names in os.walk('/proc/sys'):\n"
    "    for name in names: opened(os.path.join(where, name))",
    "sysrq": "opened('/proc/sysrq-trigger')",
    "cgroup release_agent": "[opened(f'/sys/fs/cgroup/{c}/release_agent') for c in ('', 'memory', 'pids', 'devices')]",
    "cgroups of ours": "opened('/sys/fs/cgroup/cgroup.procs'); opened('/sys/fs/cgroup/memory/cgroup.procs')",
    "sysfs": "opened('/sys/power/state'); opened('/sys/kernel/mm/transparent_hugepage/enabled')",
    "our own score of the killer": "opened('/proc/self/oom_score_adj')",
    "the interpreter": "opened(sys.executable, os.O_RDWR); opened('/proc/self/exe', os.O_RDWR)",
    "the standard library": "opened(json.__file__); opened(os.path.dirname(os.__file__) + '/sitecustomize.py', "
    "os.O_WRONLY | os.O_CREAT)",
    "libc": "[opened(line.split()[-1]) for line in open('/proc/self/maps') if 'libc' in line]",
    "programs of the system": "[opened('/usr/bin/' + n) for n in ('env', 'cat', 'python3', 'bwrap')]",
    "programs that change the user": "import subprocess\n"
    "for words in (['mount', '--bind', '/', '.'], ['su', '-c', 'true'], ['sudo', '-n', 'true'], ['pkexec', 'true']):\n"
    "    if subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0: escaped(words)",
    "be root": "if 0 in (os.getuid(), os.geteuid(), os.getgid(), os.getegid(), *os.getgroups()): escaped()",
    "become root": "tried(lambda: os.setuid(0)); tried(lambda: os.setresuid(0, 0, 0)); tried(lambda: os.setgid(0))",
    "join a group": "tried(lambda: os.setgroups([0]))",
    "capabilities": "h = struct.pack('=Ii', 0x20080522, 0); d = ctypes.create_string_buffer(24)\n"
    "if syscall(125, 90, h, d) == 0 and any(struct.unpack('=6I', d.raw)): escaped()",
    "take capabilities": "h = struct.pack('=Ii', 0x20080522, 0)\nallowed(syscall(126, 91, h, b'\\xff' * 24))",
    "privileges anew": "allowed(_libc.prctl(38, 0, 0, 0, 0)) ; allowed(_libc.prctl(47, 2, 21, 0, 0))",
    "live on without a parent": "allowed(_libc.prctl(1, 0, 0, 0, 0))",
    "adopt orphans": "allowed(_libc.prctl(36, 1, 0, 0, 0))",
    "look into others again": "allowed(_libc.prctl(4, 1, 0, 0, 0))",
}  # fmt: skip

KERNEL: Final = {
    "a user namespace": "allowed(syscall(272, 97, 0x10000000))",
    "every namespace": "for f in (0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000, 0x2000000, 0x80):\n"
    "    allowed(syscall(272, 97, f), hex(f))",
    "a namespace by clone": "p = syscall(56, 220, 0x10000000 | 17, 0, 0, 0, 0)\n"
    "if p == 0: os._exit(0)\nallowed(p)",
    "a namespace by clone3": "a = ctypes.create_string_buffer(struct.pack('=11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0))\n"
    "p = syscall(435, 435, a, 88)\nif p == 0: os._exit(0)\nallowed(p)",
    "the namespace of another": "for n in ('mnt', 'net', 'pid', 'user'):\n"
    "    try: f = os.open(f'/proc/1/ns/{n}', os.O_RDONLY)\n    except OSError: continue\n"
    "    allowed(syscall(308, 268, f, 0), n)",
    "mount": "allowed(syscall(165, 40, b'tmpfs', b'/guest', b'tmpfs', 0, None))",
    "mount proc": "os.mkdir('p'); allowed(syscall(165, 40, b'proc', b'p', b'proc', 0, None))",
    "bind the root": "os.mkdir('r'); allowed(syscall(165, 40, b'/', b'r', None, 0x1000, None))",
    "make a mount writable": "allowed(syscall(165, 40, None, b'/usr', None, 0x1000 | 0x20, None))",
    "make a mount writable anew": "allowed(syscall(442, 442, -100, b'/usr', 0x8000, struct.pack('=QQQQ', 0, 1, 0, 0), 32))",
    "unmount": "[allowed(_libc.umount2(p, 2), p) for p in (b'/proc', b'/guest', b'/usr', b'/dev/null')]",
    "open a tree": "allowed(syscall(428, 428, -100, b'/', 1))",
    "open a file system": "allowed(syscall(430, 430, b'tmpfs', 0)); allowed(syscall(433, 433, -100, b'/', 0))",
    "move a mount": "allowed(syscall(429, 429, -100, b'/usr', -100, b'/guest', 0))",
    "another root": "allowed(syscall(155, 41, b'.', b'.'))",
    "chroot": "os.mkdir('x'); allowed(syscall(161, 51, b'x'))",
    "trace myself": "allowed(syscall(101, 117, 0, 0, 0, 0))",
    "trace the parent": "allowed(syscall(101, 117, 16, os.getppid() or 1, 0, 0)); allowed(syscall(101, 117, 0x4206, 1, 0, 0))",
    "read another's memory": "b = ctypes.create_string_buffer(8); v = struct.pack('=QQ', ctypes.addressof(b), 8)\n"
    "[allowed(syscall(310, 270, p, v, 1, v, 1, 0), p) for p in (os.getppid(), facts['process']) if p]",
    "write another's memory": "b = ctypes.create_string_buffer(8); v = struct.pack('=QQ', ctypes.addressof(b), 8)\n"
    "[allowed(syscall(311, 271, p, v, 0, v, 0, 0), p) for p in (os.getppid(), facts['process']) if p]",
    "compare with another": "allowed(syscall(312, 272, os.getpid(), facts['process'], 0, 0, 0))",
    "take a descriptor of another": "f = syscall(434, 434, facts['process'], 0); allowed(f)\n"
    "allowed(syscall(438, 438, f, 0, 0))",
    "signal by descriptor": "f = syscall(434, 434, os.getppid() or 1, 0); allowed(f); allowed(syscall(424, 424, f, 0, 0, 0))",
    "queue a signal": "[allowed(syscall(129, 138, p, 0, bytes(128)), p) for p in (facts['process'], os.getppid()) if p]",
    "advise another": "allowed(syscall(440, 440, 0, 0, 0, 20, 0))",
    "reap another": "allowed(syscall(448, 448, 0, 0))",
    "limits of another": "r = ctypes.create_string_buffer(16)\n"
    "[allowed(syscall(302, 261, p, 7, None, r), p) for p in (facts['process'], os.getppid(), 1) if p and p != os.getpid()]",
    "raise my limits": "import resource\nfor k in range(16):\n    s, h = resource.getrlimit(k)\n"
    "    if h != -1: tried(lambda: resource.setrlimit(k, (h + 1, h + 1)), k)",
    "priority of others": "tried(lambda: os.setpriority(os.PRIO_USER, 0, 19)); tried(lambda: os.nice(-5))",
    "processors of others": "tried(lambda: os.sched_setaffinity(facts['process'], {0}))",
    "real time": "tried(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))",
    "priority of reading": "allowed(syscall(251, 30, 1, 0, 4))",
    "bpf": "allowed(syscall(321, 280, 0, bytes(64), 64))",
    "perf": "allowed(syscall(298, 241, bytes(112), 0, -1, -1, 0))",
    "userfaultfd": "allowed(syscall(323, 282, 1))",
    "io_uring": "allowed(syscall(425, 425, 1, ctypes.create_string_buffer(120)))",
    "io_uring on another's ring": "allowed(syscall(426, 426, 0, 0, 0, 0, None, 0)); allowed(syscall(427, 427, 0, 0, None, 0))",
    "keys": "allowed(syscall(248, 217, b'user', b'k', b'v', 1, -3)); allowed(syscall(250, 219, 0, -3, 0))",
    "a nameless program": "f = syscall(319, 279, b'x', 0); allowed(f)",
    "secret memory": "allowed(syscall(447, 447, 0))",
    "run a descriptor": "f = os.open(sys.executable, os.O_RDONLY)\n"
    "allowed(syscall(322, 281, f, b'', None, None, 0x1000))",
    "load a module": "allowed(syscall(313, 273, 0, b'', 0)); allowed(syscall(175, 105, None, 0, b''))",
    "load a kernel": "allowed(syscall(246, 104, 0, 0, None, 0)); allowed(syscall(320, 294, 0, 0, 0, None, 0))",
    "reboot": "allowed(syscall(169, 142, 0xfee1dead, 672274793, 0, None))",
    "swap": "allowed(syscall(167, 224, b'/guest/s', 0)); allowed(syscall(168, 225, b'/guest/s'))",
    "set the clock": "allowed(syscall(227, 112, 0, struct.pack('=qq', 0, 0))); allowed(syscall(159, 171, bytes(208)))",
    "set the name of the host": "tried(lambda: socket.sethostname('mine'))",
    "read the log of the kernel": "allowed(syscall(103, 116, 3, ctypes.create_string_buffer(99), 99))",
    "account": "allowed(syscall(163, 89, None))",
    "quota": "allowed(syscall(179, 60, 0, None, 0, None))",
    "input and output ports": "allowed(syscall(172, -1, 3)); allowed(syscall(173, -1, 0, 1, 1))",
    "a 16 bit segment": "allowed(syscall(154, -1, 1, bytes(16), 16))",
    "calls of the x32 kind": "allowed(_libc.syscall(ctypes.c_long(0x40000000 + 272), ctypes.c_long(0x10000000)))\n"
    "allowed(_libc.syscall(ctypes.c_long(0x40000000 + 39)))",
    "calls that do not exist yet": "[allowed(syscall(n, n, 0, 0, 0, 0), n) for n in range(450, 520)]",
    "a filter of my own": "allowed(syscall(317, 277, 1, 0, None)); allowed(_libc.prctl(22, 2, 0, 0, 0))",
    "shared memory": "allowed(syscall(29, 194, 7, 4096, 0o1600))",
    "messages": "allowed(syscall(68, 186, 7, 0o1600)); allowed(syscall(240, 180, b'q', 0o102, 0o600, None))",
    "semaphores": "allowed(syscall(64, 190, 7, 1, 0o1600))",
    "watch all files": "allowed(syscall(300, 262, 0, 0)); allowed(syscall(294, 26, 0))",
    "a device": "tried(lambda: os.mknod('null', 0o20666, os.makedev(1, 3)))",
    "a fifo in a folder of the host": "tried(lambda: os.mkfifo(facts['folder'] + '/fifo'))",
    "type into the terminal": "[tried(lambda f=f: fcntl.ioctl(f, 0x5412, b'x')) for f in (0, 1, 2)]",
    "other controls of terminals": "[tried(lambda r=r: fcntl.ioctl(0, r, bytes(64))) for r in (0x541C, 0x5423, 0x540E, 0x5410)]",
    "have others signalled": "r, w = os.pipe()\ntried(lambda: fcntl.fcntl(r, 8, facts['process']))\n"
    "tried(lambda: fcntl.fcntl(r, 10, 9))",
    "leases": "tried(lambda: fcntl.fcntl(os.open(json.__file__, os.O_RDONLY), 1024, 0))",
    "lock memory": "allowed(_libc.mlockall(3)); b = ctypes.create_string_buffer(1 << 20); allowed(_libc.mlock(b, 1 << 20))",
}  # fmt: skip

NETWORK: Final = {
    "connect to a port": "socket.create_connection(('127.0.0.1', facts['port']), 0.5); escaped()",
    "connect over IPv6": "socket.create_connection(('::1', facts['port']), 0.5); escaped()",
    "connect without waiting": "s = socket.socket(); s.setblocking(False); s.connect_ex(('127.0.0.1', facts['port'])); escaped()",
    "connect to the gateway": "socket.create_connection(('169.254.169.254', 80), 0.3); escaped()",
    "ask for a name": "print(socket.getaddrinfo('example.org', 80)); escaped()",
    "fetch a page": "import urllib.request as u; print(u.urlopen(f'http://127.0.0.1:{facts[\"port\"]}/', timeout=0.5)); escaped()",
    "send a datagram": "s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', facts['port'])); escaped()",
    "listen": "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); escaped()",
    "a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); escaped()",
    "a packet socket": "socket.socket(17, socket.SOCK_RAW); escaped()",
    "netlink": "socket.socket(16, socket.SOCK_RAW, 0); escaped()",
    "vsock": "socket.socket(40, socket.SOCK_STREAM); escaped()",
    "bluetooth, can, alg": "[tried(lambda f=f: socket.socket(f, socket.SOCK_SEQPACKET)) for f in (31, 29, 38, 44)]",
    "a socket by name": "s = socket.socket(socket.AF_UNIX); s.connect('\\0' + facts['abstract']); escaped()",
    "a socket by path": "s = socket.socket(socket.AF_UNIX); s.connect(facts['socket']); escaped()",
    "a datagram to a socket by path": "a, b = socket.socketpair(type=socket.SOCK_DGRAM)\na.sendto(b'x', facts['datagrams']); escaped()",
    "a datagram to a socket by name": "a, b = socket.socketpair(type=socket.SOCK_DGRAM)\n"
    "a.sendto(b'x', '\\0' + facts['abstract'] + '-datagrams'); escaped()",
    "a message to a socket by path": "a, b = socket.socketpair(type=socket.SOCK_DGRAM)\n"
    "a.sendmsg([b'x'], [], 0, facts['datagrams']); escaped()",
    "a pair that connects anew": "a, b = socket.socketpair(type=socket.SOCK_DGRAM)\na.connect(facts['datagrams']); escaped()",
    "a pair that is bound": "a, b = socket.socketpair(type=socket.SOCK_DGRAM)\na.bind('\\0mine'); escaped()",
    "a pair of another kind": "socket.socketpair(socket.AF_INET); escaped()",
    "hand over a descriptor": "socket.send_fds(socket.socket(fileno=os.dup(3)), [b'x'], [0]); escaped()",
    "docker": "s = socket.socket(socket.AF_UNIX); s.connect('/var/run/docker.sock'); escaped()",
    "the bus": "s = socket.socket(socket.AF_UNIX); s.connect('/run/dbus/system_bus_socket'); escaped()",
    "the agent of ssh": "s = socket.socket(socket.AF_UNIX); s.connect(os.environ['SSH_AUTH_SOCK']); escaped()",
    "by io_uring": "allowed(syscall(425, 425, 8, ctypes.create_string_buffer(120)))",
}  # fmt: skip

SIGNALS: Final = {
    "kill the host": "tried(lambda: os.kill(facts['process'], 0)); os.kill(facts['process'], 9)",
    "kill the group of the host": "tried(lambda: os.killpg(facts['group'], 0))",
    "kill the parent": "if os.getppid() > 1: os.kill(os.getppid(), 9); escaped()",
    "kill everybody": "os.kill(-1, 9)",
    "kill my group": "os.killpg(0, 9)",
    "stop everybody": "os.kill(-1, 19)",
    "kill by numbers": "for p in range(2, 3000):\n    try: os.kill(p, 0)\n    except OSError: continue\n"
    "    if p != os.getpid(): escaped(p)",
    "kill a thread of the host": "[allowed(syscall(234, 131, facts['process'], facts['process'], 0))]",
}  # fmt: skip

CHANNEL: Final = {
    "say that all is well": "b = json.dumps({'is': 'answer', 'value': 'FORGED'}).encode()\n"
    "os.write(3, len(b).to_bytes(4, 'big') + b); os._exit(0)",
    "say that the sandbox is broken": "b = json.dumps({'is': 'broken', 'why': 'x'}).encode()\n"
    "os.write(3, len(b).to_bytes(4, 'big') + b); os._exit(0)",
    "nonsense": "os.write(3, b'\\xff' * 5000); time.sleep(5)",
    "an endless answer": "os.write(3, (1 << 31).to_bytes(4, 'big'))\nwhile True: os.write(3, b'x' * 65536)",
    "an answer that is deep": "b = b'[' * 200000\nos.write(3, len(b).to_bytes(4, 'big') + b); time.sleep(5)",
    "an answer of long numbers": "b = b'{\"is\":\"ready\",\"x\":' + b'9' * 200000 + b'}'\n"
    "os.write(3, len(b).to_bytes(4, 'big') + b); time.sleep(5)",
    "close the channel": "os.close(3); time.sleep(0.05)",
    "close everything": "os.closerange(0, 300)",
    "leave a writer behind": "p = os.fork()\nif p == 0:\n    os.setsid()\n    time.sleep(30)\nos._exit(0)",
    "read the questions before they are asked": "fcntl.fcntl(3, fcntl.F_SETFL, os.O_NONBLOCK); time.sleep(0.1)\n"
    "print(os.read(3, 99)); escaped()",
}  # fmt: skip

CROSS: Final = {
    # Each is followed by LOOKS, in a fresh process of the same zygote.
    "a file in the working folder": "open('left', 'w').write('LEFT'); open('/tmp/left', 'w').write('LEFT')",
    "a cached module": "os.makedirs('__pycache__', exist_ok=True); open('json.py', 'w').write('LEFT = 1')",
    "customize the site": "open('sitecustomize.py', 'w').write('import builtins; builtins.LEFT = 1')",
    "patch a module": "import math; math.LEFT = 1; import builtins; builtins.LEFT = 1",
    "the environment": "os.environ['LEFT'] = 'LEFT'",
    "a child that stays": "p = os.fork()\nif p == 0:\n    os.setsid(); time.sleep(60)\n    os._exit(0)",
    "a thread that stays": "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "the memory of the zygote": "secret = 'LEFT-' + 'IN-MEMORY' * 3",
    "a lock on a library": "f = open(json.__file__); fcntl.flock(f, fcntl.LOCK_EX); time.sleep(0.01)",
    "modules of the path": "sys.path.insert(0, '/guest'); sys.meta_path.clear()",
}  # fmt: skip

LOOKS: Final = '''
import builtins, math, sys as _s
found = [n for n in os.listdir('.')] if facts['writes'] else []
if found or hasattr(math, 'LEFT') or hasattr(builtins, 'LEFT') or 'LEFT' in os.environ or not _s.meta_path:
    escaped(found)
f = open(json.__file__)
fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
import gc
if any(isinstance(o, str) and o.startswith('LEFT-' + 'IN-MEM') for o in gc.get_objects()):
    escaped('memory')
try:
    os.kill(-1, 0)
    escaped('processes')
except OSError:
    pass
'''

RESOURCES: Final = {
    "spin": "while True: pass",
    "sleep": "time.sleep(60)",
    "spin in the kernel": "while True: os.getppid()",
    "a large number": "print(len(str(9 ** 9 ** 9)))",
    "an expression that explodes": "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "no time limit": "import resource\ntried(lambda: resource.setrlimit(resource.RLIMIT_CPU, (99, 99)))\nwhile True: pass",
    "no signals": "for s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "while True: pass",
    "stop myself": "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)",
    "ignore the end": "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
    "wait for input": "while True: sys.stdin.read(); time.sleep(0.01)",
    "a fork bomb": "while True:\n    try: os.fork()\n    except OSError: pass",
    "forks that leave": "for _ in range(40):\n    try: p = os.fork()\n    except OSError: break\n"
    "    if p == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(60)\n        os._exit(0)\ntime.sleep(0.05)",
    "zombies": "for _ in range(400):\n    try: p = os.fork()\n    except OSError: continue\n    if p == 0: os._exit(0)",
    "vfork and exec": "import subprocess\nps = []\nfor _ in range(100):\n    try: ps.append(subprocess.Popen(['/bin/sleep', '60']))\n"
    "    except OSError: break",
    "threads": "def t(): time.sleep(60)\nfor _ in range(5000):\n    try: threading.Thread(target=t, daemon=True).start()\n"
    "    except RuntimeError: break\nprint(threading.active_count())",
    "memory at once": "x = bytearray(1 << 36)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 22))",
    "memory by mmap": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))",
    "memory in many processes": "for _ in range(12):\n    try:\n        if os.fork() == 0: break\n    except OSError: break\n"
    "x = []\nwhile True: x.append(bytearray(b'x' * (1 << 20)))",
    "memory in pipes": "x = []\nwhile True:\n    r, w = os.pipe(); os.set_blocking(w, False); x += [r, w]\n"
    "    try: os.write(w, b'x' * (1 << 20))\n    except BlockingIOError: pass",
    "memory in socket pairs": "x = []\nwhile True:\n    a, b = socket.socketpair(); a.setblocking(False); x += [a, b]\n"
    "    try:\n        while True: a.send(b'x' * 65536)\n    except BlockingIOError: pass",
    "fill the folder": "f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20))",
    "many files": "for n in range(10 ** 6): open(str(n), 'w').close()",
    "a file of a terabyte": "f = open('sparse', 'wb'); f.truncate(1 << 40)",
    "allocate a terabyte": "f = open('a', 'wb'); os.posix_fallocate(f.fileno(), 0, 1 << 40)",
    "a flood of output": "while True: os.write(1, b'x' * 65536)",
    "a flood of error output": "while True: os.write(2, b'x' * 65536)",
    "descriptors": "x = []\nwhile True: x.append(os.open('/dev/null', os.O_RDONLY))",
    "deep recursion": "sys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "a deep parse": "eval('(' * 10 ** 5 + ')' * 10 ** 5)",
    "a crash": "ctypes.string_at(0)",
    "a core file": "import resource\ntried(lambda: resource.setrlimit(resource.RLIMIT_CORE, (-1, -1)))\nos.abort()",
    "a storm of signals": "signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)\n"
    "while True: pass",
    "timers": "signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(60)",
    "a bomb of names": "s = 'a' * (1 << 20)\nwhile True: s += s",
}  # fmt: skip
