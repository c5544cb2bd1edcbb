#!/usr/bin/env python3
"""What runs in a sandbox as it runs anywhere: numpy, pandas, matplotlib and the standard library's own tests.

    cargo build && tests/engines.sh run python3 tests/compatibility.py [--quick] [--driver NAME]...

Every driver has the same root file system, Debian 13's Python with those packages, made here once and kept beside what
tests/engines.sh keeps. The programs of CHECKS must give the same value everywhere, under the default limits. The standard
library's tests run once unconfined (Docker, without seccomp profile, limits or a read-only root, as an ordinary user) and
once per driver. A test that passes there but not in a sandbox is a difference, and each has its reason in
tests/compatibility.toml: one without is a failure, and an entry that no longer occurs is told. Root.
"""

import argparse, atexit, concurrent.futures, fnmatch, hashlib, http.client, json, os, pwd, queue, re, shutil, signal, socket
import subprocess, sys, tempfile, threading, time, tomllib

HERE = os.path.dirname(os.path.abspath(__file__))
ENGINES = os.path.realpath(os.environ.get("ENGINES_DIR", "/var/tmp/codesandbox-engines"))
DRIVERS = ["embedded", "docker", "podman"]
IMAGE = "localhost/codesandbox-test/compatibility:3.13"
CGROUP_V2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
WORKERS = 3  # modules at once, for each driver and unconfined: most of these tests wait
MODULE_S = 300  # for the tests of one module
ALONE = 3  # attempts, the later ones without company, before a test that fails counts as failed

# --- The standard library's test modules. A package that takes long goes by its parts.

# What a guest meets first: processes, threads, files, sockets, clocks, and the packages that sit upon them.
QUICK = """
    test_asyncio.test_server test_asyncio.test_streams test_asyncio.test_subprocess test_asyncio.test_unix_events
    test_concurrent_futures.test_thread_pool test_ctypes test_epoll test_fcntl test_fileio test_fork1 test_hashlib
    test_json test_locale test_mmap test_multiprocessing_fork.test_misc test_openpty test_os test_poll test_posix
    test_pty test_pwd test_random test_resource test_select test_selectors test_shutil test_signal test_site
    test_socket test_sqlite3 test_ssl test_stat test_subprocess test_sysconfig test_tempfile test_thread
    test_threading test_time test_tty test_uuid test_zoneinfo
""".split()

FULL = QUICK + """
    test_abc test_argparse test_array test_ast test_asyncio.test_base_events test_asyncio.test_buffered_proto
    test_asyncio.test_eager_task_factory test_asyncio.test_events test_asyncio.test_futures test_asyncio.test_locks
    test_asyncio.test_queues test_asyncio.test_runners test_asyncio.test_selector_events test_asyncio.test_sendfile
    test_asyncio.test_sock_lowlevel test_asyncio.test_ssl test_asyncio.test_sslproto test_asyncio.test_taskgroups
    test_asyncio.test_tasks test_asyncio.test_threads test_asyncio.test_timeouts test_asyncio.test_waitfor test_atexit
    test_base64 test_binascii test_bisect test_bool test_buffer test_bufio test_builtin test_bytes test_bz2
    test_calendar test_call test_cmath test_cmd_line test_cmd_line_script test_code test_codecs test_collections
    test_compile test_compileall test_concurrent_futures.test_as_completed test_concurrent_futures.test_deadlock
    test_concurrent_futures.test_init test_concurrent_futures.test_process_pool test_concurrent_futures.test_shutdown
    test_concurrent_futures.test_wait test_configparser test_contextlib test_copy test_coroutines test_csv
    test_dataclasses test_dbm test_dbm_dumb test_dbm_sqlite3 test_decimal test_descr test_dict
    test_difflib test_doctest test_email test_enum test_errno test_exceptions test_faulthandler test_file
    test_file_eintr test_filecmp test_fileinput test_float test_fnmatch test_format test_fractions test_fstring
    test_ftplib test_functools test_gc test_generators test_genericpath test_getpass test_gettext test_glob
    test_grammar test_graphlib test_grp test_gzip test_hash test_heapq test_hmac test_html test_http_cookies
    test_httplib test_httpservers test_imaplib test_import test_importlib test_inspect test_int test_io test_ioctl
    test_ipaddress test_iter test_itertools test_keyword test_largefile test_linecache test_list test_logging
    test_long test_lzma test_mailbox test_marshal test_math test_memoryio test_memoryview test_mimetypes test_minidom
    test_multiprocessing_fork.test_manager test_multiprocessing_fork.test_processes
    test_multiprocessing_fork.test_threads test_multiprocessing_forkserver.test_misc
    test_multiprocessing_forkserver.test_processes test_multiprocessing_main_handling
    test_multiprocessing_spawn.test_manager test_multiprocessing_spawn.test_misc
    test_multiprocessing_spawn.test_processes test_multiprocessing_spawn.test_threads test_netrc test_numeric_tower
    test_operator test_optparse test_ordered_dict test_pathlib test_pdb test_pickle test_pkgutil test_platform
    test_plistlib test_popen test_poplib test_posixpath test_pprint test_profile test_py_compile test_pydoc
    test_pyexpat test_queue test_range test_re test_readline test_repl test_reprlib test_robotparser test_runpy
    test_sched test_secrets test_set test_shelve test_shlex test_smtplib test_sort test_statistics test_str
    test_strftime test_string test_strptime test_struct test_support test_symtable test_sys test_sys_settrace
    test_syslog test_tarfile test_termios test_textwrap test_threading_local test_threadsignals test_timeit
    test_tokenize test_tomllib test_trace test_traceback test_tracemalloc test_tuple test_types test_typing
    test_unicode_file test_unicode_file_functions test_unicodedata test_unittest test_urllib test_urllib2
    test_urllib2_localnet test_urlparse test_utf8_mode test_wait3 test_wait4 test_warnings test_wave test_weakref
    test_webbrowser test_wsgiref test_xml_etree test_xml_etree_c test_xmlrpc test_zipapp test_zipfile test_zipimport
    test_zlib
""".split()

# These begin first, lest all wait for one in the end.
SLOW = "test_socket test_ssl test_subprocess test_multiprocessing_spawn.test_processes test_tarfile".split()

# --- What runs beside the tests, in a sandbox and unconfined alike

# One test module in a process of its own; each test's outcome is a line, so that a crash takes nothing along.
TESTER = r'''
import importlib, json, os, sys, unittest

RANK = {"passed": 0, "skipped": 1, "failed": 2}


class Outcomes(unittest.TestResult):
    def __init__(self, module, report):
        super().__init__()
        self.module, self.report, self.worst = module, report, {}

    def name(self, test):
        test = getattr(test, "test_case", test)  # a subtest counts as its test
        name = (test.id() if hasattr(test, "id") else repr(test).split(" at 0x")[0]).removeprefix("test.")
        if "(" in name:  # "setUpClass (test.test_os.SomeTests)"
            name = name.split("(")[1].rstrip(")").removeprefix("test.")
        return name if name.startswith(self.module) else "%s: %s" % (self.module, name)

    def tell(self, test, outcome, why=""):
        name = self.name(test)
        if RANK[outcome] >= RANK[self.worst.get(name, "passed")]:
            self.worst[name] = outcome
            self.report([name, outcome, why[:300]])

    def startTest(self, test):
        super().startTest(test)
        self.report([self.name(test), "begun", ""])

    def addSuccess(self, test):
        self.tell(test, "passed")

    def addExpectedFailure(self, test, error):
        self.tell(test, "passed")

    def addSkip(self, test, reason):
        self.tell(test, "skipped", str(reason))

    def addError(self, test, error):
        self.tell(test, "failed", "%s: %s" % (error[0].__name__, error[1]))

    addFailure = addError

    def addUnexpectedSuccess(self, test):
        self.tell(test, "failed", "it was to fail")

    def addSubTest(self, test, subtest, error):
        if error:
            self.addError(test, error)


def main(module, path):
    file = open(path, "a", buffering=1)
    report = lambda line: file.write(json.dumps(line) + "\n")
    sys.path[0] = os.getcwd()
    from test import support

    # Not those that need much time, memory, a network or a display.
    support.use_resources = dict.fromkeys(["curses", "decimal", "subprocess", "tzdata"])
    try:
        tests = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module("test." + module))
    except unittest.SkipTest as reason:
        return report([module, "skipped", str(reason)])
    tests.run(Outcomes(module, report))
    report(["", "ended", ""])


if __name__ == "__main__":
    main(*sys.argv[1:])
'''

INSIDE = r'''
import json, os, shutil, signal, subprocess, sys, tempfile


def outcomes(module, tester, timeout_s):
    """Of one module: {"test": ["passed" or else, why]}."""
    top = tempfile.mkdtemp(prefix="compatibility-", dir="/tmp")
    work = tempfile.mkdtemp(prefix="compatibility-", dir="/workspace")
    script, report, log = (os.path.join(top, name) for name in ("tester.py", "report", "log"))
    with open(script, "w") as file:
        file.write(tester)
    with open(log, "wb") as output:
        process = subprocess.Popen([sys.executable, script, module, report], cwd=work, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=output, start_new_session=True)
        try:
            ended = "ended with status %s" % process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            ended = "ran out of time"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = {}
    if os.path.exists(report):
        with open(report) as file:
            for line in file:
                try:
                    name, outcome, why = json.loads(line)
                except ValueError:
                    continue
                if outcome != "begun" or name not in found:
                    found[name] = [outcome, why]
    for name in [name for name in found if found[name][0] == "begun"]:
        found[name] = ["failed", "never ended: the module " + ended]
    if not found.pop("", None) and module not in found:
        with open(log, errors="replace") as file:
            found[module] = ["failed", ended + ": " + file.read()[-600:]]
    for path in (top, work):
        subprocess.run(["chmod", "-R", "u+rwX", path], stderr=subprocess.DEVNULL)
        shutil.rmtree(path, ignore_errors=True)
    return found
'''

# PID 1 of the unconfined container: it collects what the tests orphan, which a sandbox's supervisor does, too.
UNCONFINED = INSIDE + r'''
import concurrent.futures, time


def work(task):
    (modules, tester, timeout_s, workers), found, times = task, {}, {}

    def one(module):
        begun = time.monotonic()
        found[module] = outcomes(module, tester, timeout_s)
        times[module] = time.monotonic() - begun

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, modules))
    with open("/workspace/found.json", "w") as file:
        json.dump([found, times], file)


child = os.fork()
if child:
    while os.wait()[0] != child:
        pass
else:
    work(json.load(open("/workspace/task.json")))
'''

# --- Programs with the value that each has to give

CHECKS = {
    "numpy: linear algebra": ("""
import numpy as np
a = np.arange(1, 10, dtype=float).reshape(3, 3) + np.eye(3)
b = np.random.default_rng(1).random((300, 300))
values = np.linalg.eigvalsh(b @ b.T)
result = [round(float(np.linalg.det(a)), 6), np.linalg.solve(a, a.sum(axis=1)).round(9).tolist(),
          bool(np.allclose(np.linalg.inv(b) @ b, np.eye(300))), bool(values[0] > -1e-9), np.linalg.svd(b)[1].shape]
""", [-2.0, [1.0, 1.0, 1.0], True, True, [300]]),
    "numpy: threads of ours and of its library": ("""
import numpy as np, threading
a, found = np.random.default_rng(2).random((500, 500)), []
wanted = a @ a
def work():
    for _ in range(5):
        found.append(bool(np.allclose(a @ a, wanted)))
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
result = [len(found), all(found)]
""", [20, True]),
    "numpy: random": ("""
import numpy as np
g = np.random.default_rng(42)
result = [g.integers(0, 100, 5).tolist(), round(float(g.normal()), 6), len(set(np.random.default_rng().integers(0, 1 << 62, 9).tolist()))]
""", [[8, 77, 65, 43, 43], 0.940565, 9]),
    "numpy: save and load in the workspace": ("""
import numpy as np
a = np.arange(100000).reshape(100, 1000)
np.save("a.npy", a); np.savez_compressed("b.npz", a=a, b=a.T); np.savetxt("c.csv", a[:3, :3], fmt="%d", delimiter=",")
m = np.memmap("d.bin", dtype="int32", mode="w+", shape=(1000,)); m[:] = 7; m.flush()
result = [bool((np.load("a.npy") == a).all()), bool((np.load("b.npz")["b"] == a.T).all()),
          int(np.load("a.npy", mmap_mode="r")[99, 999]), np.loadtxt("c.csv", delimiter=",").tolist()[2], int(np.fromfile("d.bin", "int32").sum())]
""", [True, True, 99999, [2000.0, 2001.0, 2002.0], 7000]),
    "numpy: fft and sorting": ("""
import numpy as np
t = np.arange(1024) / 1024
result = [int(np.abs(np.fft.rfft(np.sin(2 * np.pi * 50 * t))).argmax()), np.sort(np.array([3, 1, 2])).tolist(), float(np.float64(0.1) + 0.2)]
""", [50, [1, 2, 3], 0.30000000000000004]),
    "pandas: groupby, merge, pivot": ("""
import pandas as pd
d = pd.DataFrame({"k": list("abab"), "v": [1, 2, 3, 4]})
m = d.merge(pd.DataFrame({"k": ["a", "b"], "w": [10, 20]}), on="k")
result = [d.groupby("k").v.agg(["sum", "mean"]).to_dict(), m.assign(p=m.v * m.w).p.tolist(), d.pivot_table(index="k", values="v", aggfunc="max").v.tolist()]
""", [{"sum": {"a": 4, "b": 6}, "mean": {"a": 2.0, "b": 3.0}}, [10, 40, 30, 80], [3, 4]]),
    "pandas: files": ("""
import pandas as pd, sqlite3
d = pd.DataFrame({"a": range(1000), "b": [i / 8 for i in range(1000)], "c": ["text %d" % i for i in range(1000)]})
d.to_csv("d.csv", index=False); d.to_json("d.json", orient="records"); d.to_pickle("d.pkl"); d.to_csv("d.csv.gz", index=False)
with sqlite3.connect("d.db") as db:
    d.to_sql("d", db, index=False)
    sums = pd.read_sql("select sum(a) as a, sum(b) as b from d", db)
result = [pd.read_csv("d.csv").equals(d), pd.read_json("d.json").equals(d), pd.read_pickle("d.pkl").equals(d), pd.read_csv("d.csv.gz").equals(d), sums.values.tolist()]
""", [True, True, True, True, [[499500.0, 62437.5]]]),
    "pandas: dates": ("""
import pandas as pd
i = pd.date_range("2024-02-28", periods=4, freq="D", tz="UTC")
s = pd.Series(range(4), index=i)
result = [i.strftime("%m-%d").tolist(), str(i[0].tz_convert("Europe/Berlin")), s.resample("2D").sum().tolist(), s.rolling(2).mean().tolist()[1:], (pd.Timestamp("2024-03-01") - pd.Timestamp("2024-02-01")).days]
""", [["02-28", "02-29", "03-01", "03-02"], "2024-02-28 01:00:00+01:00", [1, 5], [0.5, 1.5, 2.5], 29]),
    "matplotlib: a picture in the workspace": ("""
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt, os, struct
figure, axes = plt.subplots(figsize=(4, 3), dpi=100)
axes.plot([1, 2, 3], [1, 4, 9], label="$x^2$"); axes.set_title("squares"); axes.legend()
figure.savefig("p.png"); figure.savefig("p.svg"); figure.savefig("p.pdf")
data = open("p.png", "rb").read()
pixels = plt.imread("p.png")
result = [data[:8].hex(), struct.unpack(">II", data[16:24]), bool(pixels.min() < 0.2), open("p.pdf", "rb").read(5).decode(), "<svg" in open("p.svg").read()]
""", ["89504e470d0a1a0a", [400, 300], True, "%PDF-", True]),
    "threads": ("""
import threading, queue, concurrent.futures
q, lock, total = queue.Queue(), threading.Lock(), 0
def work():
    global total
    while (n := q.get()) is not None:
        with lock: total += n
threads = [threading.Thread(target=work) for _ in range(20)]
for t in threads: t.start()
for n in range(1000): q.put(n)
for _ in threads: q.put(None)
for t in threads: t.join(10)
with concurrent.futures.ThreadPoolExecutor(8) as pool: squares = sum(pool.map(lambda n: n * n, range(100)))
result = [total, squares]
""", [499500, 328350]),
    "subprocess": ("""
import os, subprocess, sys
shell = subprocess.run("echo one; echo two >&2; exit 3", shell=True, capture_output=True, text=True)
pipe = subprocess.run(["sort", "-n"], input="3\\n1\\n2\\n", capture_output=True, text=True).stdout.split()
own = subprocess.check_output([sys.executable, "-c", "print(6 * 7)"], text=True).strip()
try: late = subprocess.run(["sleep", "9"], timeout=0.2)
except subprocess.TimeoutExpired: late = "timeout"
result = [shell.stdout, shell.stderr, shell.returncode, pipe, own, late, os.system("exit 5") >> 8, os.popen("echo p").read()]
""", ["one\n", "two\n", 3, ["1", "2", "3"], "42", "timeout", 5, "p\n"]),
    "asyncio": ("""
import asyncio, sys
async def serve(reader, writer):
    writer.write((await reader.readline()).upper()); await writer.drain(); writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\\n")
    line = await reader.readline()
    writer.close(); server.close()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print('child')", stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    naps = await asyncio.gather(*(asyncio.sleep(0.01, n) for n in range(50)))
    thread = await asyncio.to_thread(sum, range(10))
    try: await asyncio.wait_for(asyncio.sleep(9), 0.05)
    except TimeoutError: late = True
    return [line.decode(), out.decode(), sum(naps), thread, late]
result = asyncio.run(main())
""", ["HELLO\n", "child\n", 1225, 45, True]),
    "multiprocessing: fork": ("""
import multiprocessing, os
def square(n): return n * n
context = multiprocessing.get_context("fork")
with context.Pool(4) as pool: squares = pool.map(square, range(20))
q, value = context.Queue(), context.Value("i", 0)
def work():
    with value.get_lock(): value.value += 1
    q.put(os.getpid() != os.getppid())
ones = [context.Process(target=work) for _ in range(4)]
for p in ones: p.start()
got = [q.get(timeout=20) for _ in ones]
for p in ones: p.join(20)
result = [sum(squares), got, value.value, [p.exitcode for p in ones]]
""", [2470, [True] * 4, 4, [0] * 4]),
    "multiprocessing: spawn, shared memory, manager": ("""
import concurrent.futures, math, multiprocessing, operator
from multiprocessing import shared_memory
context = multiprocessing.get_context("spawn")
with context.Pool(2) as pool: roots = pool.map(math.isqrt, range(10))
block = shared_memory.SharedMemory(create=True, size=1 << 20); block.buf[:5] = b"hello"
again = shared_memory.SharedMemory(name=block.name); text = bytes(again.buf[:5]).decode(); again.close(); block.close(); block.unlink()
with context.Manager() as manager:
    shared = manager.dict(); shared["a"] = [1, 2]; copied = dict(shared)
with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as pool: total = sum(pool.map(operator.neg, range(10)))
result = [roots, text, copied, total]
""", [[0, 1, 1, 1, 2, 2, 2, 2, 2, 3], "hello", {"a": [1, 2]}, -45]),
    "ctypes": ("""
import ctypes, ctypes.util
libc, libm = ctypes.CDLL(None, use_errno=True), ctypes.CDLL(ctypes.util.find_library("m"))
libm.cos.restype, libm.cos.argtypes = ctypes.c_double, [ctypes.c_double]
compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
numbers = (ctypes.c_int * 5)(5, 3, 1, 4, 2)
libc.qsort(numbers, 5, ctypes.sizeof(ctypes.c_int), compare(lambda a, b: a[0] - b[0]))
failed = libc.open(b"/no/such", 0), ctypes.get_errno()
result = [libc.strlen(b"abc"), libm.cos(0.0), list(numbers), failed]
""", [3, 1.0, [1, 2, 3, 4, 5], [-1, 2]]),
    "sqlite3": ("""
import sqlite3
db = sqlite3.connect("s.db"); mode = db.execute("pragma journal_mode=wal").fetchone()[0]
db.execute("create table t (a integer primary key, b text)")
with db: db.executemany("insert into t (b) values (?)", [("row %d" % n,) for n in range(1000)])
other = sqlite3.connect("s.db")
result = [mode, other.execute("select count(*), max(b) from t").fetchone(), sqlite3.connect(":memory:").execute("select sqrt(16), json_extract('{\\"a\\": 7}', '$.a')").fetchone()]
""", ["wal", [1000, "row 999"], [4.0, 7]]),
    "ssl": ("""
import ssl, hashlib, hmac, secrets
context = ssl.create_default_context()
one, two = ssl.MemoryBIO(), ssl.MemoryBIO()
client = context.wrap_bio(one, two, server_hostname="example.org")
try: client.do_handshake()
except ssl.SSLWantReadError: pass
result = [context.verify_mode == ssl.CERT_REQUIRED, two.pending > 100, two.read(1)[0], hashlib.sha256(b"a").hexdigest()[:8], hashlib.scrypt(b"p", salt=b"s", n=1024, r=8, p=1).hex()[:8], len(secrets.token_bytes(32))]
""", [True, True, 22, "ca978112", "c0ed26d3", 32]),
    "mmap": ("""
import mmap, os
with open("m.bin", "w+b") as file:
    file.truncate(1 << 20)
    with mmap.mmap(file.fileno(), 0) as shared:
        shared[:4] = b"abcd"; shared.flush(); shared.resize(1 << 21); size = len(shared)
    file.seek(0); text = file.read(4).decode()
block = mmap.mmap(-1, 1 << 16)
if os.fork() == 0:
    block[:5] = b"child"; os._exit(0)
os.wait(); block.madvise(mmap.MADV_WILLNEED)
result = [text, size, block[:5].decode()]
""", ["abcd", 2097152, "child"]),
    "tempfile, shutil, pathlib": ("""
import os, pathlib, shutil, tempfile, zipfile
with tempfile.TemporaryDirectory() as top:
    path = pathlib.Path(top)
    (path / "a" / "b").mkdir(parents=True); (path / "a" / "b" / "ä.txt").write_text("text")
    (path / "link").symlink_to("a"); shutil.copytree(path / "a", path / "c")
    shutil.make_archive("tree", "gztar", top); shutil.make_archive("tree", "zip", top)
    found = sorted(str(p.relative_to(path)) for p in path.rglob("*.txt"))
with tempfile.TemporaryFile() as file: file.write(b"x" * 100000); size = os.fstat(file.fileno()).st_size
with tempfile.NamedTemporaryFile("w+") as file: there = os.path.exists(file.name)
result = [found, os.path.exists(top), size, there, "a/b/ä.txt" in zipfile.ZipFile("tree.zip").namelist(), shutil.disk_usage(".").total > 1 << 20]
""", [["a/b/ä.txt", "c/b/ä.txt"], False, 100000, True, True, True]),
    "sockets, select, signals, pty": ("""
import os, pty, select, signal, socket, time
a, b = socket.socketpair(); a.send(b"x"); ready = bool(select.select([b], [], [], 1)[0])
poll = select.epoll(); poll.register(b, select.EPOLLIN); events = len(poll.poll(1))
six = socket.has_ipv6 and socket.socket(socket.AF_INET6).family == socket.AF_INET6
got = []; signal.signal(signal.SIGALRM, lambda *_: got.append("alarm")); signal.setitimer(signal.ITIMER_REAL, 0.05); time.sleep(0.2)
child, fd = pty.fork()
if not child: os.execlp("sh", "sh", "-c", "test -t 1 && echo terminal")
said = os.read(fd, 100).decode().strip(); os.waitpid(child, 0)
result = [ready, events, bool(six), got, said, socket.gethostbyname("localhost")]
""", [True, 1, True, ["alarm"], "terminal", "127.0.0.1"]),
    "time zones, locale, time": ("""
import datetime, locale, time, zoneinfo
berlin = datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
begun = time.monotonic(); time.sleep(0.05)
result = [berlin.utcoffset().seconds, locale.getpreferredencoding(), abs(time.time() - datetime.datetime.now().timestamp()) < 1, 0.04 < time.monotonic() - begun < 5]
""", [7200, "UTF-8", True, True]),
    "numpy: some of its own tests": ("""
import re, subprocess, sys
import numpy
done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--pyargs", "numpy.linalg.tests.test_linalg", "numpy.fft", "numpy.lib.tests.test_format", "-k", "not slow and not huge and not large"], capture_output=True, text=True)
result = [done.returncode, int((re.search(r"(\\d+) passed", done.stdout) or [0, 0])[1]) > 400] if done.returncode == 0 else done.stdout[-1500:] + done.stderr[-500:]
""", [0, True]),
}

# --- The image

# Only unpacked, as tests/engines.sh does it: no script of a package is run, so what some would do is done here.
PACKAGES = (
    "python3 python3-numpy python3-pandas python3-matplotlib libpython3.13-testsuite python3-pytest python3-hypothesis "
    "libopenblas0-pthread bash dash coreutils grep sed hostname base-files base-passwd libc-bin media-types netbase tzdata"
)
SETUP = """
    mkdir -p "$1/usr/bin" "$1/usr/sbin" "$1/usr/lib" "$1/usr/lib64" "$1/tmp"; chmod 1777 "$1/tmp"
    for name in bin sbin lib lib64; do ln -s usr/$name "$1/$name"; done"""
EXTRACTED = """
    for file in "$1"/usr/lib/*/openblas-pthread/lib*.so.[03]; do
        ln -s "openblas-pthread/${file##*/}" "${file%/*/*}/"
    done
    cp "$1/usr/share/base-passwd/passwd.master" "$1/etc/passwd"; cp "$1/usr/share/base-passwd/group.master" "$1/etc/group"
    ln -sf /usr/share/zoneinfo/Etc/UTC "$1/etc/localtime"
    # Empty, as `docker export` leaves it: the embedded driver puts its own over a file that is there, and makes none.
    : >"$1/etc/hosts"
    rm -rf "$1"/usr/share/doc "$1"/usr/share/man "$1"/usr/share/icons "$1"/var/cache/* "$1"/var/lib/apt
    chroot "$1" ldconfig
    # Test data that does not compile is told, and no matter.
    chroot "$1" python3 -I -S -m compileall -q -j 0 --invalidation-mode unchecked-hash \\
        -x "/(idlelib|turtledemo|dist-packages/.*/tests?)/" /usr/lib/python3.13 /usr/lib/python3 >/dev/null || true"""
KEY = hashlib.sha256("\n".join((PACKAGES, SETUP, EXTRACTED)).encode()).hexdigest()[:12]


def say(text):
    print(text, file=sys.stderr, flush=True)


def cached():
    """The image as a tar file and as a directory, made unless they are there."""
    cache = os.path.join(ENGINES, "cache")
    tar, root = ("%s/compatibility-%s%s" % (cache, KEY, end) for end in (".tar", ""))
    if not os.path.exists(tar):
        begun = time.monotonic()
        os.makedirs(cache, exist_ok=True)
        for old in os.listdir(cache):
            if old.startswith("compatibility-"):
                old = os.path.join(cache, old)
                shutil.rmtree(old) if os.path.isdir(old) else os.remove(old)
        build(tar)
        say("image made in %.0f s" % (time.monotonic() - begun))
    if not os.path.exists(root):
        os.makedirs(root + ".part", exist_ok=True)
        subprocess.run(["tar", "-C", root + ".part", "-xf", tar, "--exclude=./dev/*"], check=True)
        os.rename(root + ".part", root)
    return tar, root


def build(tar):
    command = ["mmdebstrap", "--variant=extract", "--include=" + PACKAGES.replace(" ", ",")]
    shell = 'eval "$(apt-config shell proxy Acquire::http::Proxy)"; echo "$proxy"'
    proxy = subprocess.check_output(["bash", "-c", shell], text=True).strip()
    command += ['--aptopt=Acquire::http::Proxy "%s"' % proxy] if proxy else []
    command += ["--setup-hook=" + SETUP, "--extract-hook=" + EXTRACTED, "trixie", tar + ".part.tar", mirror()]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": "/var/tmp"}, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("the image was not made: " + done.stderr[-2000:])
    os.rename(tar + ".part.tar", tar)


def mirror():
    if os.environ.get("ENGINES_MIRROR"):
        return os.environ["ENGINES_MIRROR"]
    ask = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Label: Debian", "Created-By: Packages"]
    lines = subprocess.run(ask, stdout=subprocess.PIPE, text=True).stdout.split()
    return lines[0] if lines else "http://deb.debian.org/debian/"


class Engine:
    """An engine's API on its unix socket."""

    def __init__(self, url):
        self.path = url.removeprefix("unix://")

    def call(self, method, path, body=None, fine=()):
        connection = http.client.HTTPConnection("engine")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(self.path)
        headers = {"content-type": "application/json"}
        if hasattr(body, "fileno"):
            headers = {"content-type": "application/x-tar", "content-length": str(os.fstat(body.fileno()).st_size)}
        elif body is not None:
            body = json.dumps(body)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status in fine:
            return {}
        assert answer.status < 400, (path, answer.status, text)
        return json.loads(text) if text.startswith(b"{") and text.count(b"\n") < 2 else {}

    def take_image(self, tar, path):
        before = self.call("GET", "/images/%s/json" % IMAGE, fine=[404])
        if before.get("Comment") == KEY:
            return
        with open(tar, "rb") as file:
            self.call("POST", path, file)
        assert self.call("GET", "/images/%s/json" % IMAGE).get("Comment") == KEY, path
        if before:
            self.call("DELETE", "/images/" + before["Id"], fine=[404, 409])  # it may be in use


# --- The server

# What each server is told; the program is a copy that every user may run, and that no build replaces meanwhile.
class Server:
    def __init__(self, driver, program, root, more):
        flags, prefix = ["--set", "image=" + IMAGE, "--set", "pull=never"], []
        if driver == "embedded":
            flags = ["--set", "embedded.rootfs=" + root]
        elif driver == "docker":
            flags += ["--set", "docker.url=" + os.environ["TEST_DOCKER_HOST"]]
        else:
            url, user = os.environ["TEST_PODMAN_HOST"], pwd.getpwnam(os.environ["TEST_PODMAN_USER"])
            flags += ["--set", "podman.url=" + url]
            if not CGROUP_V2:
                flags += ["--allow-unenforced", "memory,cpus"]  # what rootless Podman lacks under cgroup v1
            runtime = os.path.join(os.path.dirname(url.removeprefix("unix://")), "run")
            prefix = ["setpriv", "--reuid=%d" % user.pw_uid, "--regid=%d" % user.pw_gid, "--clear-groups"]
            prefix += ["env", "XDG_RUNTIME_DIR=" + runtime]
        for setting in ("pool.size=0", "instance=compatibility", "listen=127.0.0.1:0", *more):
            flags += ["--set", setting]
        command = [*prefix, program, "--driver", driver, *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/")
        atexit.register(self.process.terminate)  # for whatever ends in the middle
        self.said, self.users = [], set()
        for line in self.process.stderr:
            found = re.search(r"listening on http://([\d.]+):(\d+)", line)
            if found:
                self.address = found[1], int(found[2])
                break
            self.said.append(line)
        else:
            sys.exit("the server did not start: " + "".join(self.said))
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stderr:
            self.said.append(line)

    def call(self, method, path, body=None, timeout=60):
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        connection.request(method, path, json.dumps(body) if body else None, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return json.loads(text) if text else {}

    def run(self, user, code, data=None, timeout_s=60):
        self.users.add(user)
        body = {"user_id": user, "code": code, "data": data or {}, "timeout_ms": int(timeout_s * 1000)}
        return self.call("POST", "/run", body, timeout_s + 60)

    def stop(self):
        for user in self.users:
            self.call("DELETE", "/sessions/" + user)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


# --- The standard library's tests, unconfined and in sandboxes

TEST_LIMITS = ["limits.timeout_max=10m", "limits.memory=2GiB", "limits.cpus=2", "limits.processes=512",
               "limits.workspace=512MiB", "limits.tmp=512MiB", "limits.shm=256MiB"]


def unconfined(engine, modules):
    with tempfile.TemporaryDirectory(dir=os.path.join(ENGINES, "tmp")) as workspace:
        os.chmod(workspace, 0o1777)
        for name, text in (("task.json", json.dumps([modules, TESTER, MODULE_S, WORKERS])), ("main.py", UNCONFINED)):
            with open(os.path.join(workspace, name), "w") as file:
                file.write(text)
        environment = ["HOME=/workspace", "LANG=C.UTF-8", "LOGNAME=sandbox", "TMPDIR=/tmp", "USER=sandbox",
                       "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "OMP_NUM_THREADS=2"]
        host = {"NetworkMode": "none", "SecurityOpt": ["seccomp=unconfined"], "Binds": [workspace + ":/workspace"]}
        body = {"Image": IMAGE, "Entrypoint": ["python3", "/workspace/main.py"], "User": "54321:54321", "Env": environment,
                "WorkingDir": "/workspace", "Hostname": "sandbox", "HostConfig": host}
        container = "/containers/" + engine.call("POST", "/containers/create", body)["Id"]
        try:
            engine.call("POST", container + "/start")
            engine.call("POST", container + "/wait")
            with open(os.path.join(workspace, "found.json")) as file:
                return json.load(file)
        finally:
            engine.call("DELETE", container + "?force=true")


def confined(server, modules, workers=WORKERS):
    found, times, pending = {}, {}, queue.Queue()
    for module in modules:
        pending.put(module)

    def work(number):
        while True:
            try:
                module = pending.get_nowait()
            except queue.Empty:
                return
            begun = time.monotonic()
            code = INSIDE + "\nresult = outcomes(module, tester, timeout_s)"
            data = {"module": module, "tester": TESTER, "timeout_s": MODULE_S}
            answer = server.run("user%d" % number, code, data, MODULE_S + 60)
            found[module] = answer.get("result")
            if not isinstance(found[module], dict):
                found[module] = {module: ["failed", "the run: %s" % answer.get("error", answer)]}
            times[module] = time.monotonic() - begun

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    return found, times


def differences(reference, found):
    """Tests of one module that pass unconfined, and what they do in the sandbox."""
    different = {}
    for name, (outcome, _) in reference.items():
        if outcome == "passed":
            here, why = found.get(name, ("missing", ""))
            if here != "passed":
                different[name] = "%s: %s" % (here, why)
    # What failed as a whole: a module, or a class in its setUpClass. Its tests are missing for that very reason.
    whole = [name for name, (outcome, _) in found.items() if outcome != "passed" and name not in reference]
    for name in whole:
        begins = name + ".", name + ":"
        below = [test for test in different if test.startswith(begins) and different[test].startswith("missing")]
        if below:
            different[name] = "%s: %s" % tuple(found[name])
            for test in below:
                del different[test]
    return different


class Known:
    """The list of differences, each with its reason."""

    def __init__(self, driver):
        with open(os.path.join(HERE, "compatibility.toml"), "rb") as file:
            groups = tomllib.load(file)["difference"]
        self.reasons = {test: group["reason"] for group in groups
                        if driver in group.get("drivers", DRIVERS) for test in group["tests"]}
        self.seen = set()

    def reason(self, test):
        for pattern, reason in self.reasons.items():
            if test == pattern or fnmatch.fnmatchcase(test, pattern):
                self.seen.add(pattern)
                return reason

    def unseen(self, modules):
        about = lambda pattern: any(re.match(re.escape(module) + r"(\b[.:]|$)", pattern) for module in modules)
        return [pattern for pattern in self.reasons if pattern not in self.seen and about(pattern)]


# --- The whole of it


class Tally:
    passed = failed = 0

    def check(self, fine, text):
        if fine:
            self.passed += 1
        else:
            self.failed += 1
            print("FAILED " + text, flush=True)


def programs(driver, server, tally):
    one = lambda item: server.run("programs%d" % (item[0] % 4), item[1], timeout_s=MODULE_S)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(one, enumerate(code for code, _ in CHECKS.values())))
    for (name, (_, wanted)), answer in zip(CHECKS.items(), answers):
        got = answer.get("result")
        tally.check(got == wanted, "%s, %s: %s instead of %s" % (
            driver, name, answer.get("error") or got or answer, wanted))


def compare(driver, server, modules, reference, found, tally):
    known = Known(driver)
    different = {module: differences(reference[module], found[module]) for module in modules}
    for _ in range(ALONE - 1):
        doubtful = [module for module in modules if any(not known.reason(test) for test in different[module])]
        again, _ = confined(server, doubtful, 1)
        for module in doubtful:
            still = differences(reference[module], again[module])
            different[module] = {test: why for test, why in different[module].items() if known.reason(test) or test in still}
    tests = differing = 0
    for module in modules:
        tests += sum(outcome == "passed" for outcome, _ in reference[module].values())
        differing += len(different[module])
        unknown = {test: why for test, why in different[module].items() if not known.reason(test)}
        tally.check(not unknown, "%s, differences without a reason:%s" % (
            driver, "".join("\n    %s  %s" % item for item in unknown.items())))
    for pattern in known.unseen(modules):
        print("%s: %s is in tests/compatibility.toml, but does not occur" % (driver, pattern))
    strange = sum(not known.reason(test) for module in modules for test in different[module])
    print("%s: %d modules, %d tests, %d differences, %s" % (
        driver, len(modules), tests, differing, "%d without a reason" % strange if strange else "all known"), flush=True)
    return different


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="%d modules instead of %d" % (len(QUICK), len(FULL)))
    parser.add_argument("--driver", action="append", choices=DRIVERS, help="only this one; may be given again")
    parser.add_argument("--program", default=os.path.join(HERE, "..", "target", "debug", "codesandbox"))
    parser.add_argument("--module", action="append", help="only this one; may be given again")
    parser.add_argument("--dump", help="a file for every outcome, as JSON")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or "TEST_DOCKER_HOST" not in os.environ:
        sys.exit("as root: tests/engines.sh run python3 tests/compatibility.py")
    drivers, modules = arguments.driver or DRIVERS, arguments.module or (QUICK if arguments.quick else FULL)
    tar, root = cached()
    docker = Engine(os.environ["TEST_DOCKER_HOST"])
    repository, tag = IMAGE.rsplit(":", 1)
    docker.take_image(tar, "/images/create?fromSrc=-&repo=%s&tag=%s&message=%s" % (repository, tag, KEY))
    if "podman" in drivers:
        podman = Engine(os.environ["TEST_PODMAN_HOST"])
        podman.take_image(tar, "/v4.0.0/libpod/images/import?reference=%s&message=%s" % (IMAGE, KEY))
    tally, dump, servers = Tally(), {}, {}
    modules.sort(key=lambda module: module not in SLOW)
    with tempfile.TemporaryDirectory(dir=os.path.join(ENGINES, "tmp")) as place:
        os.chmod(place, 0o755)
        program = shutil.copy(arguments.program, os.path.join(place, "codesandbox"))
        for driver in drivers:
            # With the default limits, but for numpy's threads; and where memory is a limit on address space, as with
            # rootless Podman under cgroup v1, the default of 512 MiB ends with 14 threads.
            limits = ["limits.cpus=2", "limits.timeout_max=5m"]
            if driver == "podman" and not CGROUP_V2:
                limits.append("limits.memory=2GiB")
            server = Server(driver, program, root, limits)
            programs(driver, server, tally)
            server.stop()
            servers[driver] = Server(driver, program, root, TEST_LIMITS)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            surveys = {driver: pool.submit(confined, server, modules) for driver, server in servers.items()}
            surveys["unconfined"] = pool.submit(unconfined, docker, modules)
        for name, survey in surveys.items():
            found, times = survey.result()
            dump[name] = {"found": found, "times": times}
        reference = dump["unconfined"]["found"]
        for module in modules:
            found = reference[module]
            tally.check(any(outcome == "passed" for outcome, _ in found.values()),
                        "%s: none of its tests passes unconfined: %s" % (module, found.get(module)))
        for driver, server in servers.items():
            dump[driver]["different"] = compare(driver, server, modules, reference, dump[driver]["found"], tally)
            server.stop()
    if arguments.dump:
        with open(arguments.dump, "w") as file:
            json.dump(dump, file, indent=1)
    print("%d passed, %d failed" % (tally.passed, tally.failed))
    sys.exit(tally.failed > 0)


if __name__ == "__main__":
    main()
