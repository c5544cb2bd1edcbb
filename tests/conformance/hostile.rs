//! Programs that mean harm, each with the outcome that it must have and no other. After each, the same user and
//! another one compute x + y as ever.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::behaviour::Behaviour;
use crate::drivers::Driver;

/// Small, so that filling something takes no time.
///
/// The grace is longer than the default: four fork bombs at once leave two cores little for anything else.
const LIMITS: [&str; 10] = [
    "--set",
    "limits.grace=6s",
    "--set",
    "limits.memory=256MiB",
    "--set",
    "limits.workspace=32MiB",
    "--set",
    "limits.tmp=16MiB",
    "--set",
    "limits.shm=16MiB",
];
/// Other users, who go on computing meanwhile.
const NEIGHBOURS: usize = 4;
/// Beyond its time a run has the grace, and the machine is busy.
const LATE: Duration = Duration::from_secs(12);
/// The caps on what a run says of its own failure (64 KiB), escapes and the words around them included.
const ERROR_BYTES: usize = 70_000;

/// What every program may call.
const PRELUDE: &str = r#"
import errno, os, signal, sys, time

NUMBERS = {
    "x86_64": dict(ptrace=101, process_vm_readv=310, process_vm_writev=311, unshare=272, setns=308, mount=165,
        umount2=166, pivot_root=155, chroot=161, keyctl=250, add_key=248, bpf=321, perf_event_open=298,
        userfaultfd=323, open_by_handle_at=304, kexec_load=246, init_module=175, clone=56, exit=60,
        shmget=29, prctl=157, inotify_init1=294, seccomp=317),
    "aarch64": dict(ptrace=117, process_vm_readv=270, process_vm_writev=271, unshare=97, setns=268, mount=40,
        umount2=39, pivot_root=41, chroot=51, keyctl=219, add_key=217, bpf=280, perf_event_open=241,
        userfaultfd=282, open_by_handle_at=265, kexec_load=104, init_module=105, clone=220, exit=93,
        shmget=194, prctl=167, inotify_init1=26, seccomp=277),
}[os.uname().machine]
NUMBERS.update(io_uring_setup=425, pidfd_getfd=438, pidfd_open=434, clone3=435, mount_setattr=442, open_tree=428)

def refused(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "works"

def call(name, *arguments):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    number = libc.syscall(ctypes.c_long(NUMBERS[name]),
        *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    return errno.errorcode[ctypes.get_errno()] if number == -1 else number

def result_pipe():
    "The descriptor beyond stderr that is a pipe."
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and os.readlink("/proc/self/fd/" + name).startswith("pipe:"):
                return int(name)
        except OSError:
            pass

def forge(kind, payload, length=None):
    head = kind.to_bytes(1, "big") + (len(payload) if length is None else length).to_bytes(4, "big") + bytes(4)
    try:
        os.write(result_pipe(), head + payload)
    finally:
        os._exit(0)
"#;

/// How a program has to end.
#[derive(Clone, Copy)]
enum Expect {
    /// With this result, as JSON.
    Value(&'static str),
    /// With this kind of failure.
    Kind(&'static str),
    /// With one of these, `ok` for any result: where the kernel's timing decides.
    OneOf(&'static [&'static str]),
}
use Expect::{Kind, OneOf, Value as Gives};

/// A row of the table.
struct Program {
    name: &'static str,
    code: &'static str,
    expect: Expect,
    /// Where no control group limits memory, and this gives another outcome.
    without_group: Option<Expect>,
    /// Where nothing but memory bounds a file system's inodes.
    without_inode_limit: Option<Expect>,
    /// In a container, whose image is its own.
    in_a_container: Option<Expect>,
    timeout_ms: u64,
    stdout: Option<&'static str>,
    stderr: Option<&'static str>,
    truncated: &'static [&'static str],
    /// From question to answer, where a program could try to delay it.
    within: Option<Duration>,
    /// It makes Python print its whole stack, or breaks the code that would hide us.
    shows_our_frames: bool,
}

fn program(name: &'static str, expect: Expect, code: &'static str) -> Program {
    Program {
        name,
        code,
        expect,
        without_group: None,
        without_inode_limit: None,
        in_a_container: None,
        timeout_ms: 10_000,
        stdout: None,
        stderr: None,
        truncated: &[],
        within: None,
        shows_our_frames: false,
    }
}

/// One that would go on for ever.
fn endless(name: &'static str, code: &'static str) -> Program {
    Program { timeout_ms: 600, ..program(name, Kind("timeout"), code) }
}

impl Program {
    fn without_group(self, expect: Expect) -> Program {
        Program { without_group: Some(expect), ..self }
    }
    fn without_inode_limit(self, expect: Expect) -> Program {
        Program { without_inode_limit: Some(expect), ..self }
    }
    fn in_a_container(self, expect: Expect) -> Program {
        Program { in_a_container: Some(expect), ..self }
    }
    fn prints(self, stdout: &'static str) -> Program {
        Program { stdout: Some(stdout), ..self }
    }
    fn complains(self, stderr: &'static str) -> Program {
        Program { stderr: Some(stderr), ..self }
    }
    fn cuts(self, truncated: &'static [&'static str]) -> Program {
        Program { truncated, ..self }
    }
    fn at_once(self) -> Program {
        Program { within: Some(Duration::from_millis(2500)), ..self }
    }
}

fn programs() -> Vec<Program> {
    [
        bombs(),
        hangs(),
        floods(),
        forgeries(),
        attacks_on_pid_1(),
        escapes(),
        files(),
        ends(),
        results(),
        tricks(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn bombs() -> Vec<Program> {
    vec![
        endless("fork_bomb", "while True:\n try: os.fork()\n except OSError: pass"),
        endless(
            "fork_bomb_of_orphans",
            "while True:\n try:\n  if os.fork() == 0:\n   os.fork(); os._exit(0)\n except OSError: pass",
        ),
        endless(
            "fork_bomb_of_sessions_that_ignore_signals",
            "for s in (1, 2, 3, 13, 14, 15): signal.signal(s, signal.SIG_IGN)\nwhile True:\n try: os.fork(); os.setsid()\n except OSError: pass",
        ),
        endless(
            "fork_bomb_of_programs",
            "while True:\n try:\n  if os.fork() == 0: os.execv('/bin/sh', ['sh', '-c', 'while :; do (:) & done'])\n except OSError: pass",
        ),
        program("processes_are_limited", Gives("true"), "n = 0\ntry:\n for n in range(1000):\n  if os.fork() == 0: time.sleep(60)\nexcept BlockingIOError: pass\nresult = 5 < n < 64")
            .at_once(),
        program("threads_are_limited", Gives("true"), "import threading\ngo = threading.Event()\nn = 0\nthreading.stack_size(65536)\ntry:\n for n in range(1000): threading.Thread(target=go.wait).start()\nexcept RuntimeError: pass\ngo.set()\nresult = 5 < n < 64"),
        program("memory_by_a_list", Kind("out_of_memory"), "x = []\nwhile True: x.append([0] * 100000)"),
        program("memory_by_bytes", Kind("out_of_memory"), "x = b'x' * (1 << 30)\nresult = len(x)"),
        program("memory_by_a_string_that_doubles", Kind("out_of_memory"), "x = 'ab'\nwhile True: x += x"),
        program("memory_by_mmap", Kind("out_of_memory"), "import mmap\nkept = []\nwhile True:\n m = mmap.mmap(-1, 1 << 24); kept.append(m)\n for at in range(0, 1 << 24, 4096): m[at] = 1")
            .without_group(Kind("raised")),
        program("memory_by_an_allocation_that_nothing_has", OneOf(&["out_of_memory"]), "x = bytearray(1 << 60)"),
        program("memory_caught_as_memory_error", OneOf(&["ok", "out_of_memory"]), "try: x = bytearray(300 << 20)\nexcept MemoryError: pass\nresult = 1"),
        program("memory_by_memfd", OneOf(&["out_of_memory"]), "fd = os.memfd_create('x')\nfor n in range(600): os.write(fd, bytes(1 << 20))")
            // A file in memory is outside RLIMIT_AS: the loop is short, for the sake of the machine.
            .without_group(OneOf(&["ok", "raised", "crashed"])),
        // The memory belongs to no mapping, and the process that makes it is smaller than PID 1.
        program("memory_by_a_tiny_process", OneOf(&["crashed", "out_of_memory", "exited"]), "fd = os.memfd_create('x')\nos.dup2(fd, 1)\nos.execv('/bin/dd', ['dd', 'if=/dev/zero', 'bs=1M', 'count=400'])"),
        program("memory_by_many_processes", OneOf(&["ok", "out_of_memory"]), "pids = []\nfor n in range(10):\n pid = os.fork()\n if pid == 0:\n  try: x = bytearray(60 << 20)\n  finally: time.sleep(0.3); os._exit(0)\n pids.append(pid)\nfor pid in pids: os.waitpid(pid, 0)\nresult = 1"),
        program("memory_by_shared_memory", Gives("\"ENOSPC\""), "def fill():\n with open('/dev/shm/x', 'wb', 0) as f:\n  while f.write(bytes(1 << 20)): pass\nresult = refused(fill)"),
        program("memory_by_the_workspace", Gives("\"ENOSPC\""), "def fill():\n with open('x', 'wb', 0) as f:\n  while f.write(bytes(1 << 20)): pass\nresult = refused(fill)"),
        program("memory_by_tmp", Gives("\"ENOSPC\""), "def fill():\n with open('/tmp/x', 'wb', 0) as f:\n  while f.write(bytes(1 << 20)): pass\nresult = refused(fill)"),
        program("all_file_systems_full_at_once", Gives("[\"ENOSPC\",\"ENOSPC\",\"ENOSPC\"]"), "def fill(p):\n with open(p, 'wb', 0) as f:\n  while f.write(bytes(1 << 20)): pass\nresult = [refused(fill, p + '/x') for p in ('/workspace', '/tmp', '/dev/shm')]"),
        program("inodes", Gives("\"ENOSPC\""), "os.mkdir('d')\ndef fill():\n for n in range(20000): os.close(os.open('d/%d' % n, os.O_CREAT | os.O_WRONLY))\nresult = refused(fill)")
            .without_inode_limit(Gives("\"works\"")),
        program("sparse_file", Gives("[268435456,0]"), "with open('sparse', 'wb') as f: f.truncate(1 << 28)\ns = os.stat('sparse')\nresult = [s.st_size, s.st_blocks]"),
        program("sparse_file_of_a_tebibyte", OneOf(&["ok", "raised"]), "with open('sparse', 'wb') as f: f.truncate(1 << 40)\nresult = os.stat('sparse').st_blocks"),
        program("memory_by_pipes", OneOf(&["ok", "out_of_memory"]), "import fcntl\npipes = []\ntry:\n while True:\n  r, w = os.pipe(); pipes.append((r, w)); os.set_blocking(w, False)\n  try: fcntl.fcntl(w, 1031, 1 << 20)\n  except OSError: pass\n  try:\n   while True: os.write(w, bytes(65536))\n  except BlockingIOError: pass\nexcept OSError as e: result = e.errno == errno.EMFILE"),
        program("descriptors_in_flight", OneOf(&["ok"]), "import array, socket\na, b = socket.socketpair()\na.setblocking(False)\ntry:\n while True: a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1] * 200))])\nexcept OSError: result = 1"),
        program("decompression_bomb", Kind("out_of_memory"), "import zlib\nx = zlib.compress(bytes(300 << 10)) ; d = b''\nfor n in range(10): d += d or bytes(64 << 20)"),
    ]
}

fn hangs() -> Vec<Program> {
    vec![
        endless("spin", "print('before')\nwhile True: pass").prints("before\n"),
        endless("spin_that_ignores_sigint", "signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('before')\nwhile True: pass")
            .prints("before\n"),
        endless("spin_that_catches_everything", "while True:\n try:\n  while True: pass\n except BaseException: pass"),
        endless("sleep_that_is_resumed", "while True:\n try: time.sleep(1000)\n except BaseException: pass"),
        endless("sleep_in_c", "import ctypes\nlibc = ctypes.CDLL(None)\nwhile True: libc.sleep(1000)"),
        endless("blocked_signals", "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: time.sleep(1000)"),
        endless("a_regular_expression", "import re\nre.match('(a*)*b', 'a' * 40)"),
        endless("a_power", "x = 9 ** 9 ** 9"),
        endless("stopped_by_itself", "print('before')\nos.kill(os.getpid(), signal.SIGSTOP)").prints("before\n"),
        endless("a_lock_twice", "import threading\nl = threading.Lock(); l.acquire(); l.acquire()"),
        endless("a_fifo_without_a_writer", "os.mkfifo('fifo'); open('fifo')"),
        endless("main_thread_ended_and_another_left", "import threading\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\ncall('exit', 0)"),
        endless("a_thread_that_hangs_at_exit", "import threading\nresult = 1\nthreading.Thread(target=time.sleep, args=(1000,)).start()"),
        endless("atexit_that_hangs", "import atexit\nresult = 1\natexit.register(time.sleep, 1000)").shows_our_frames(),
        endless("finally_that_hangs", "try: time.sleep(1000)\nfinally: time.sleep(1000)"),
        endless("str_of_the_exception_that_hangs", "class E(Exception):\n def __str__(self): time.sleep(1000)\nraise E"),
        endless("result_that_hangs", "class D(dict):\n def items(self): time.sleep(1000)\nresult = D(a=1)"),
        endless("a_generator_without_end", "x = sum(iter(int, 1))"),
        endless("an_interval_timer_of_signals", "signal.signal(signal.SIGALRM, lambda *_: None)\nsignal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)\nwhile True: pass"),
        endless("sigint_to_itself_for_ever", "signal.signal(signal.SIGINT, lambda *_: None)\nwhile True: os.kill(os.getpid(), signal.SIGINT)"),
        program("a_result_after_its_time", Kind("timeout"), "print('before')\ntry: time.sleep(1000)\nexcept KeyboardInterrupt: result = 5\nprint('after')")
            .prints("before\nafter\n"),
    ]
    .into_iter()
    .map(|program| Program { timeout_ms: 600, ..program })
    .collect()
}

fn floods() -> Vec<Program> {
    vec![
        endless("stdout_flood", "while True: os.write(1, b'x' * 65536)").cuts(&["stdout"]),
        endless("stderr_flood", "while True: os.write(2, b'x' * 65536)").cuts(&["stderr"]),
        endless("both_floods", "while True: os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)")
            .cuts(&["stdout", "stderr"]),
        endless("result_pipe_flood", "fd = result_pipe()\nwhile True: os.write(fd, bytes(65536))"),
        program("result_pipe_filled_and_left", Kind("result_too_large"), "fd = result_pipe()\nfor n in range(200): os.write(fd, bytes(65536))\nos._exit(0)"),
        program("flood_by_children", OneOf(&["ok"]), "for n in range(8):\n if os.fork() == 0:\n  while True: os.write(1, b'x' * 65536)\ntime.sleep(0.2)\nresult = 1")
            .at_once(),
        program("zero_bytes_and_no_utf_8", Gives("1"), r"os.write(1, b'a\0\xff\xfe\xed\xa0\x80z\n')
result = 1")
            .prints("a\0\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}z\n"),
        program("writing_to_every_descriptor", OneOf(&["exited", "ok", "result_too_large"]), "for fd in range(1024):\n try: os.write(fd, b'garbage' * 10)\n except OSError: pass\nresult = 1"),
        program("closing_every_descriptor", Kind("exited"), "os.closerange(0, 1024)\nresult = 1"),
        program("stdout_is_the_result_pipe", Kind("exited"), "os.dup2(result_pipe(), 1)\nprint('a lot of things')\nsys.stdout.flush()\nresult = 1"),
        program("pipes_held_open_by_a_daemon", Gives("1"), "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)\n os._exit(0)\nresult = 1")
            .at_once(),
        program("a_daemon_that_goes_on_writing", OneOf(&["ok"]), "if os.fork() == 0:\n os.setsid()\n while True: print('daemon')\nresult = 1")
            .at_once(),
        program("its_own_pipes_made_larger_and_read", OneOf(&["ok"]), "import fcntl\nfor fd in (1, 2, result_pipe()):\n try: fcntl.fcntl(fd, 1031, 1 << 20)\n except OSError: pass\nr = os.open('/proc/self/fd/1', os.O_RDONLY | os.O_NONBLOCK)\nos.write(1, b'x' * 900000)\nresult = 1"),
    ]
}

fn forgeries() -> Vec<Program> {
    vec![
        program("a_forged_result", Gives("[1]"), "forge(RESULT, b'[1]')"),
        program(
            "two_frames_of_which_the_first_counts",
            Gives("1"),
            "os.write(result_pipe(), bytes([RESULT, 0, 0, 0, 1, 0, 0, 0, 0]) + b'1'); result = 2",
        ),
        // Where it was quick it is over with its answer, whatever it goes on to do: the next run comes after its end.
        program(
            "a_result_and_then_work_without_end",
            OneOf(&["ok", "timeout"]),
            "os.write(result_pipe(), bytes([RESULT, 0, 0, 0, 1, 0, 0, 0, 0]) + b'1')\nwhile True: pass",
        ),
        program("half_a_frame", Kind("exited"), "forge(RESULT, b'[1', 3)"),
        program("half_a_header", Kind("exited"), "os.write(result_pipe(), bytes([RESULT, 0])); os._exit(0)"),
        program("a_frame_of_4_gib", Kind("exited"), "forge(RESULT, b'1', 0xffffffff)"),
        program("a_frame_of_a_kind_that_is_not", Kind("exited"), "forge(7, b'1')"),
        program("a_result_that_is_no_json", Kind("result_invalid"), "forge(RESULT, b'{\"a\":}')"),
        program("a_result_with_nan", Kind("result_invalid"), "forge(RESULT, b'[NaN]')"),
        program("a_result_that_is_two", Kind("result_invalid"), "forge(RESULT, b'1,\"error\":null')"),
        program("a_result_that_is_no_utf_8", Kind("result_invalid"), "forge(RESULT, b'\"\\xff\"')"),
        program(
            "a_result_nested_100_000_deep",
            Kind("result_invalid"),
            "forge(RESULT, b'[' * 100000 + b']' * 100000)",
        ),
        program("an_error_that_is_no_json", Kind("exited"), "forge(ERROR, b'{')"),
        program(
            "an_error_of_a_kind_that_is_not",
            Kind("exited"),
            "forge(ERROR, b'{\"kind\":\"lost\",\"name\":\"\",\"value\":\"\",\"traceback\":\"\"}')",
        ),
        // Only the supervisor knows whose time is over, and only the engine what was cancelled.
        program(
            "an_error_that_claims_a_timeout",
            OneOf(&["exited", "raised"]),
            "forge(ERROR, b'{\"kind\":\"timeout\",\"name\":\"\",\"value\":\"\",\"traceback\":\"\"}')",
        ),
        program(
            "an_error_that_claims_to_be_cancelled",
            OneOf(&["exited", "raised"]),
            "forge(ERROR, b'{\"kind\":\"cancelled\",\"name\":\"\",\"value\":\"\",\"traceback\":\"\"}')",
        ),
        // Its texts have a cap wherever they come from: see ERROR_BYTES.
        program(
            "an_error_of_900_kb",
            OneOf(&["exited", "raised"]),
            "forge(ERROR, b'{\"kind\":\"raised\",\"name\":\"E\",\"value\":\"' + b'v' * 900000 + b'\",\"traceback\":\"' + b't' * 90000 + b'\"}')",
        ),
        program(
            "frames_of_the_supervisor_on_every_descriptor",
            OneOf(&["ok", "exited", "result_invalid"]),
            "frame = bytes(8) + bytes([130]) + (4).to_bytes(4, 'big') + bytes(4)\nfor name in os.listdir('/proc/self/fd'):\n for n in range(3):\n  try: os.write(int(name), frame)\n  except OSError: pass\nresult = 1",
        ),
        program(
            "frames_of_the_supervisor_on_stdout",
            Gives("1"),
            "os.write(1, b'OK' + bytes(8) + bytes([130]) + bytes(4))\nresult = 1",
        )
        .prints("OK\0\0\0\0\0\0\0\0\u{fffd}\0\0\0\0"),
    ]
}

fn attacks_on_pid_1() -> Vec<Program> {
    vec![
        program(
            "kill_pid_1_with_every_signal",
            Gives("1"),
            "for s in range(1, 65):\n try: os.kill(1, s)\n except OSError: pass\ntime.sleep(0.1)\nresult = 1",
        ),
        program(
            "kill_pid_1_through_a_pidfd",
            OneOf(&["ok"]),
            "fd = os.pidfd_open(1)\nfor s in (9, 15, 19, 2): refused(signal.pidfd_send_signal, fd, s)\nresult = 1",
        ),
        program(
            "have_the_kernel_send_signals",
            Gives(r#"["EPERM","EPERM","EPERM","EPERM","EPERM","EPERM","EPERM"]"#),
            "import fcntl\nr, w = os.pipe()\nresult = [refused(fcntl.fcntl, r, c, a) for c, a in ((8, 1), (10, 9), (15, 0), (1024, 0), (1026, 1))] + [refused(fcntl.ioctl, r, c, bytes([1, 0, 0, 0])) for c in (0x8901, 0x8902)]",
        ),
        program(
            "leave_an_acl_or_empty_the_hosts_cache",
            Gives(r#"["EOPNOTSUPP","EPERM"]"#),
            "result = [refused(os.setxattr, '/workspace', 'user.x', b'y').replace('ENOTSUP', 'EOPNOTSUPP'), refused(os.posix_fadvise, os.open('/proc/self/exe' if not os.access('/etc/passwd', os.R_OK) else '/etc/passwd', os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)]",
        ),
        program(
            "flood_pid_1_with_sigchld",
            Gives("1"),
            "end = time.time() + 0.5\nwhile time.time() < end: os.kill(1, signal.SIGCHLD)\nresult = 1",
        ),
        endless(
            "flood_pid_1_with_orphans",
            "while True:\n pid = os.fork()\n if pid == 0:\n  for n in range(20):\n   if os.fork() == 0: os._exit(0)\n  os._exit(0)\n os.waitpid(pid, 0)",
        ),
        program("kill_everything", Kind("crashed"), "os.kill(0, 9)")
            .without_group(OneOf(&["crashed", "out_of_memory"])),
        program(
            "kill_minus_one", // the process that forks dies of it, and with it this run
            OneOf(&["ok", "crashed", "out_of_memory"]),
            "if os.fork() == 0: time.sleep(1000)\nos.kill(-1, 9)\nresult = 1",
        )
        .at_once(),
        program(
            "kill_minus_one_that_stops_all",
            OneOf(&["ok", "timeout"]),
            "if os.fork() == 0: time.sleep(1000)\nos.kill(-1, signal.SIGSTOP)\nresult = 1",
        )
        .in_600_ms(),
        program(
            "kill_the_parent",
            OneOf(&["ok", "crashed", "out_of_memory"]),
            "if os.getppid() != 1: os.kill(os.getppid(), 9)\ntime.sleep(0.2)\nresult = 1",
        )
        .at_once(),
        program(
            "a_daemon_that_stops_everything_it_can",
            OneOf(&["ok", "timeout"]),
            "if os.fork() == 0:\n me = os.getpid()\n while True:\n  for p in range(2, 40):\n   if p != me: refused(os.kill, p, signal.SIGSTOP)\ntime.sleep(0.05)\nresult = 1",
        )
        .in_600_ms(),
        program(
            "proc_of_the_parent",
            Gives("[\"EACCES\"]"),
            "def touch(p): os.listdir(p) if os.path.isdir(p) else open(p, 'rb').read(1)\nresult = sorted({refused(touch, '/proc/%d/%s' % (os.getppid(), p)).replace('EPERM', 'EACCES') for p in ('mem', 'fd', 'environ', 'maps', 'cwd')})",
        ),
        program(
            "ptrace_of_the_parent",
            Gives("[\"EPERM\",\"EPERM\"]"),
            "result = [call('ptrace', 16, os.getppid(), 0, 0), call('pidfd_getfd', os.pidfd_open(os.getppid()), 3, 0)]",
        ),
        program(
            "proc_of_pid_1",
            Gives("[\"EACCES\"]"),
            "paths = ['mem', 'fd', 'environ', 'root', 'cwd', 'maps', 'exe', 'auxv', 'io', 'map_files', 'pagemap']\ndef touch(p):\n try: os.readlink(p)\n except OSError as e:\n  if e.errno != errno.EINVAL: raise\n  os.listdir(p) if os.path.isdir(p) else open(p, 'rb').read(1)\nresult = sorted({refused(touch, '/proc/1/' + p).replace('EPERM', 'EACCES') for p in paths})",
        ),
        program(
            "ptrace_of_pid_1",
            Gives("[\"EPERM\",\"EPERM\",\"EPERM\",\"EPERM\"]"),
            "result = [call('ptrace', 16, 1, 0, 0), call('ptrace', 0x4206, 1, 0, 0), call('process_vm_readv', 1, 0, 0, 0, 0, 0), call('process_vm_writev', 1, 0, 0, 0, 0, 0)]",
        ),
        program(
            "descriptors_of_pid_1",
            Gives("\"EPERM\""),
            "result = call('pidfd_getfd', os.pidfd_open(1), 0, 0)",
        ),
        program(
            "limits_and_priorities_of_pid_1",
            Gives("[\"EPERM\",\"EPERM\",\"EPERM\"]"),
            "import resource\ndef r(f, *a):\n try: return refused(f, *a)\n except PermissionError: return 'EPERM'\nresult = [r(resource.prlimit, 1, resource.RLIMIT_NOFILE, (3, 3)), r(os.setpriority, os.PRIO_PROCESS, 1, 19), r(os.sched_setaffinity, 1, {0})]",
        ),
        program(
            "the_files_of_pid_1_in_proc",
            Gives("[\"EACCES\",\"EACCES\"]"),
            "def put(p, t): open(p, 'w').write(t)\nresult = [refused(put, '/proc/1/oom_score_adj', '1000').replace('EPERM', 'EACCES'), refused(put, '/proc/1/comm', 'x').replace('EPERM', 'EACCES').replace('EINVAL', 'EACCES')]",
        ),
        program(
            "the_interpreter_of_pid_1_is_unreadable",
            Gives("[\"EACCES\",true]"),
            "result = [refused(open, '/run/codesandbox/python', 'rb'), refused(os.chmod, '/run/codesandbox/python', 0o777) in ('EROFS', 'EPERM')]",
        )
        .in_a_container(Gives("[\"ENOENT\",false]")),
    ]
}

fn escapes() -> Vec<Program> {
    vec![
        program(
            "namespaces",
            Gives("[\"EPERM\",\"EPERM\"]"),
            "bits = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80)\nresult = [sorted({call('unshare', b) for b in bits})[0], call('setns', os.open('/proc/self/ns/net', 0), 0)]",
        ),
        program(
            "clone_with_namespaces",
            Gives("[\"EPERM\",\"ENOSYS\"]"),
            "result = [call('clone', 0x10000000 | 17, 0, 0, 0, 0), call('clone3', 0, 0)]",
        ),
        program(
            "mounts",
            Gives("[\"EPERM\"]"),
            "result = sorted({str(call(n, 0, 0, 0, 0, 0)) for n in ('mount', 'umount2', 'pivot_root', 'chroot', 'mount_setattr', 'open_tree', 'open_by_handle_at')})",
        ),
        program(
            "doors_to_the_kernel",
            Gives("[\"EPERM\"]"),
            "result = sorted({str(call(n, 0, 0, 0, 0, 0)) for n in ('keyctl', 'add_key', 'bpf', 'io_uring_setup', 'perf_event_open', 'userfaultfd', 'kexec_load', 'init_module')})",
        ),
        program(
            "what_the_whole_host_shares",
            Gives("[\"EPERM\",\"EPERM\",\"EPERM\",\"EPERM\",\"EPERM\"]"),
            "import mmap, socket\nresult = [call('inotify_init1', 0), call('seccomp', 1, 0, 0), refused(socket.socket().setsockopt, socket.SOL_SOCKET, 26, bytes(16)), refused(mmap.mmap, -1, 2 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000), refused(os.memfd_create, 'x', 4)]",
        ),
        program(
            "memory_in_the_buffers_of_connections",
            OneOf(&["ok"]),
            "import socket\nserver = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen(500)\nheld, kept, data = 0, [], bytes(1 << 20)\ntry:\n for _ in range(400):\n  a = socket.create_connection(server.getsockname(), 1); b, _ = server.accept(); kept += a, b; a.setblocking(False)\n  try:\n   while True: held += a.send(data)\n  except BlockingIOError: pass\nexcept OSError: pass\nassert held < 300 << 20, held",
        ),
        program(
            "calls_of_another_architecture",
            OneOf(&["crashed", "ok"]),
            "call('prctl', 0x53564d41, 0, 0)\nimport ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nresult = [libc.syscall(0x40000000 + 39), ctypes.get_errno()] if os.uname().machine == 'x86_64' else [-1, 38]\nassert result == [-1, 38], result",
        ),
        program(
            "no_capability_comes_back",
            Gives("[\"EPERM\",\"EPERM\",\"EPERM\"]"),
            "result = [refused(os.setuid, 0).replace('EINVAL', 'EPERM'), refused(os.setgid, 0).replace('EINVAL', 'EPERM'), refused(os.setgroups, [0]).replace('EINVAL', 'EPERM')]",
        ),
        program(
            "sockets_of_other_families",
            Gives("[\"EAFNOSUPPORT\"]"),
            "import socket\nresult = sorted({refused(socket.socket, f, t) for f in (16, 17, 38, 40, 44, 31, 29, 3, 4, 5) for t in (1, 2, 3)})",
        ),
        program(
            "raw_sockets",
            Gives("[\"EPERM\",\"EPERM\"]"),
            "import socket\nresult = [refused(socket.socket, f, socket.SOCK_RAW, 1) for f in (socket.AF_INET, socket.AF_INET6)]",
        ),
        program(
            "the_servers_own_port",
            Gives("[\"ECONNREFUSED\",\"ENETUNREACH\"]"),
            "import socket\ndef c(h): socket.create_connection((h, port), 2)\nresult = [refused(c, '127.0.0.1'), refused(c, '10.0.2.2')]",
        ),
        program(
            "names_of_the_network",
            Gives("true"),
            "import socket\ntry: result = socket.getaddrinfo('example.com', 80)\nexcept socket.gaierror: result = True",
        ),
        program(
            "abstract_sockets_of_the_host",
            Gives("[]"),
            "lines = open('/proc/net/unix').read().splitlines()[1:]\nresult = [l for l in lines if len(l.split()) > 7]",
        ),
        program(
            "a_terminals_input",
            Gives("[\"ENXIO\",\"EPERM\"]"),
            "import fcntl, pty\nm, s = pty.openpty()\nresult = [refused(os.open, '/dev/tty', os.O_RDWR), refused(fcntl.ioctl, s, 0x5412, b'x')]",
        ),
        program(
            "writing_where_nobody_may",
            Gives("[]"),
            "def put(p):\n with open(p, 'w') as f: f.write('x')\npaths = '/x /usr/x /etc/x /etc/passwd /dev/x /run/x /run/codesandbox/x /run/codesandbox/supervisor.pyc /bin/sh /lib/x /proc/sys/kernel/hostname /proc/sys/kernel/core_pattern /proc/sysrq-trigger /proc/sys/user/max_user_namespaces /sys/x /sys/fs/cgroup/x /proc/self/uid_map'.split()\nresult = [p for p in paths if refused(put, p) not in ('EROFS', 'EACCES', 'EPERM', 'ENOENT')]",
        ),
        program(
            "device_nodes",
            Gives("[\"EPERM\",\"EPERM\",\"EPERM\"]"),
            "import stat\nresult = [refused(os.mknod, p + '/d', stat.S_IFBLK | 0o666, os.makedev(254, 0)) for p in ('/workspace', '/tmp', '/dev/shm')]",
        ),
        program(
            "set_uid_programs",
            Gives("[]"),
            "import subprocess\nresult = []\nfor c in (['/bin/su', '-c', 'id -u'], ['/bin/mount', '-t', 'tmpfs', 'x', '/tmp'], ['/usr/bin/passwd', '-d', 'root']):\n if os.path.exists(c[0]) and subprocess.run(c, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0: result.append(c)",
        ),
        program(
            "a_set_uid_file_of_its_own",
            Gives("[0,true]"),
            "import shutil, subprocess\nshutil.copy('/bin/sh', 'sh'); os.chmod('sh', 0o6755)\nresult = [0, int(subprocess.run(['./sh', '-c', 'id -u'], capture_output=True).stdout) == os.getuid()]",
        ),
        program(
            "a_core_dump",
            Kind("crashed"),
            "import resource\ntry: resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))\nexcept ValueError: pass\nos.abort()",
        ),
        program(
            "limits_raised_again",
            Gives("[\"limit\",\"limit\"]"),
            "import resource\ndef r(which):\n try: resource.setrlimit(which, (1 << 20, 1 << 20)); return 'works'\n except (ValueError, OSError): return 'limit'\nresult = [r(resource.RLIMIT_NPROC), r(resource.RLIMIT_NOFILE)]",
        ),
        program(
            "a_sibling_by_clone_parent",
            OneOf(&["ok"]),
            "pid = call('clone', 0x8000 | 17, 0, 0, 0, 0)\nif pid == 0: time.sleep(1000)\nresult = 1",
        )
        .at_once(),
    ]
}

fn files() -> Vec<Program> {
    vec![
        program("a_link_to_everything", Gives("1"), "for n, to in enumerate(['/', '/proc/self/mem', '/dev/zero', '..', 'loop', '/etc/passwd']): os.symlink(to, 'link%d' % n)\nos.symlink('loop', 'loop')\nresult = 1"),
        program("fifos_and_sockets", Gives("1"), "import socket\nfor n in range(50): os.mkfifo('fifo%d' % n)\nsocket.socket(socket.AF_UNIX).bind('sock')\nresult = 1"),
        program("names_with_newlines", Gives("1"), "for n in ('a\\nb', 'total 0', '\\n./sub:\\ntotal 0', '\\x1b[2J', 'a\\tb\\rc', '-rf'): open(n.replace('/', ' '), 'w')\nresult = 1"),
        program("names_that_are_no_utf_8", Gives("1"), "for n in (b'\\xff\\xfe', b'\\xed\\xa0\\x80', b'\\xc3', b'ok\\x01'): os.close(os.open(b'/workspace/' + n, os.O_CREAT))\nresult = 1"),
        program("names_of_255_bytes", Gives("1"), "for n in range(300): open(('%03d' % n) + '\\x01' * 252, 'w')\nresult = 1"),
        program("directories_deeper_than_a_path", Gives("true"), "deep = 0\nfor deep in range(1500): os.mkdir('d' * 20); os.chdir('d' * 20)\nresult = deep > 1000"),
        program("directories_that_nobody_may_read", Gives("1"), "os.makedirs('a/b'); os.chmod('a', 0)\nopen('f', 'w'); os.chmod('f', 0)\nresult = 1"),
        program("the_workspace_itself_that_nobody_may_enter", Gives("1"), "os.chmod('/workspace', 0)\nresult = 1"),
        program("the_workspace_that_nobody_may_list", Gives("1"), "open('a', 'w'); os.chmod('/workspace', 0o300)\nresult = 1"),
        program("tmp_and_shm_that_nobody_may_enter", Gives("1"), "os.chmod('/tmp', 0); os.chmod('/dev/shm', 0)\nresult = 1"),
        program("the_workspace_renamed_and_removed", Gives("[true,true]"), "result = [refused(os.rename, '/workspace', '/tmp/w') in ('EBUSY', 'EROFS', 'EXDEV'), refused(os.rmdir, '/workspace') in ('EBUSY', 'EROFS')]"),
        program("files_20_000", OneOf(&["ok"]), "import itertools\ntry:\n for n in range(20000): os.symlink('x', 'l%d' % n)\nexcept OSError: pass\nresult = 1")
            .cuts(&["workspace_files"]),
        program("directories_4_000", OneOf(&["ok"]), "for n in range(4000): os.mkdir('d%d' % n)\nresult = 1").cuts(&["workspace_files"]),
        program("times_that_no_calendar_has", OneOf(&["ok"]), "for n, t in enumerate((-1 << 40, 1 << 40, (1 << 62), -(1 << 62), 0)):\n open('f%d' % n, 'w')\n try: os.utime('f%d' % n, (t, t))\n except (OSError, OverflowError): pass\nresult = 1"),
        program("a_file_that_grows_while_it_is_listed", OneOf(&["ok"]), "if os.fork() == 0:\n n = 0\n while True:\n  n += 1\n  try: os.rename('a', 'b') if n % 2 else os.rename('b', 'a')\n  except OSError: open('a', 'w')\ntime.sleep(0.05)\nresult = 1")
            .at_once(),
        program("hard_links_10_000", Gives("1"), "open('a', 'w')\nos.mkdir('d')\nfor n in range(10000): os.link('a', 'd/%d' % n)\nresult = 1")
            .cuts(&["workspace_files"]),
    ]
}

fn ends() -> Vec<Program> {
    vec![
        program("recursion_in_python", Kind("raised"), "def f(): f()\nf()"),
        program("recursion_without_a_limit", OneOf(&["crashed", "raised", "out_of_memory"]), "sys.setrecursionlimit(1 << 30)\ndef f(): return [f()]\nclass A:\n def __repr__(self): return repr([self])\nrepr(A())\nf()"),
        program("recursion_in_c", OneOf(&["crashed", "ok"]), "x = None\nfor n in range(10**6): x = [x]\ndel x\nresult = 1"),
        program("recursion_in_the_compiler", OneOf(&["crashed", "raised", "out_of_memory", "syntax"]), "eval('-' * 1000000 + '1')"),
        program("segmentation_fault", Kind("crashed"), "print('before')\nimport ctypes; ctypes.string_at(0)").prints("before\n"),
        program("abort", Kind("crashed"), "os.abort()"),
        program("an_alarm_that_kills", Kind("crashed"), "signal.signal(signal.SIGALRM, signal.SIG_DFL)\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\nwhile True: pass"),
        program("sys_exit", Gives("1"), "result = 1\nsys.exit()"),
        program("sys_exit_false", Gives("null"), "sys.exit(False)"),
        program("sys_exit_with_a_number", Kind("exited"), "result = 1\nsys.exit(3)"),
        program("sys_exit_with_a_giant", Kind("exited"), "sys.exit(10 ** 5000)"),
        program("sys_exit_with_words", Kind("exited"), "sys.exit('words')").complains("words\n"),
        program("sys_exit_with_a_hostile_object", OneOf(&["exited", "raised"]), "class E:\n def __str__(self): raise SystemExit(self)\nsys.exit(E())"),
        program("sys_exit_in_a_thread", Gives("1"), "import threading\nthreading.Thread(target=sys.exit).start()\nresult = 1"),
        program("os_exit", Kind("exited"), "result = 1\nos._exit(0)"),
        program("exec_of_another_program", Kind("exited"), "os.execv('/bin/echo', ['echo', 'not Python any more'])")
            .prints("not Python any more\n"),
        program("exec_of_a_program_that_stays", Kind("timeout"), "os.execv('/bin/sleep', ['sleep', '1000'])").in_600_ms(),
        program("both_sides_of_a_fork_go_on", Gives("\"parent\""), "pid = os.fork()\nresult = 'parent' if pid else 'child'\nif pid: os.waitpid(pid, 0)"),
        program("the_child_goes_on_alone", Kind("exited"), "if os.fork(): os._exit(0)\ntime.sleep(0.1)\nresult = 'child'"),
        program("a_subprocess_left_behind", Gives("1"), "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\nresult = 1").at_once(),
        program("multiprocessing", Gives("[1,4,9]"), "import multiprocessing\ndef square(x): return x * x\nwith multiprocessing.get_context('fork').Pool(2) as pool: result = pool.map(square, [1, 2, 3])"),
        program("del_at_exit", Gives("1"), "class D:\n def __del__(self): time.sleep(1000)\nkept = D()\nresult = 1").at_once(),
        program("a_daemon_thread_at_exit", Gives("1"), "import threading\ndef f():\n while True: pass\nthreading.Thread(target=f, daemon=True).start()\nresult = 1").at_once(),
        program("atexit_that_fails", OneOf(&["ok", "raised"]), "import atexit\natexit.register(lambda: 1 / 0)\nresult = 1"),
    ]
}

fn results() -> Vec<Program> {
    vec![
        program(
            "str_that_raises",
            Kind("raised"),
            "class E(Exception):\n def __str__(self): raise ValueError\n __repr__ = __str__\nraise E",
        ),
        program(
            "str_that_raises_for_ever",
            OneOf(&["raised", "exited"]),
            "class E(BaseException):\n def __str__(self): raise E\nraise E",
        ),
        program(
            "str_that_exits",
            OneOf(&["raised", "exited", "ok"]),
            "class E(Exception):\n def __str__(self): sys.exit(0)\nraise E",
        ),
        program(
            "str_of_another_type",
            OneOf(&["raised", "exited"]),
            "class S(str):\n def encode(self, *a): return 5\nclass E(Exception):\n def __str__(self): return S('x')\nraise E",
        ),
        program(
            "class_that_lies",
            Kind("raised"),
            "class E(Exception):\n __class__ = property(lambda self: 1 / 0)\nraise E",
        ),
        program(
            "class_with_a_name_of_its_own",
            OneOf(&["raised", "exited"]),
            "class M(type):\n __name__ = property(lambda self: 5)\nclass E(Exception, metaclass=M): pass\nraise E",
        ),
        program("an_error_of_5_mb", Kind("raised"), "raise ValueError('x' * 5000000)").cuts(&["error"]),
        program("an_error_with_surrogates", Kind("raised"), "raise ValueError('\\ud800 \\x00 \\x1b')"),
        program(
            "a_chain_of_10_000_errors",
            OneOf(&["raised", "crashed"]),
            "e = None\nfor n in range(10000):\n new = ValueError(n); new.__cause__ = e; e = new\nraise e",
        ),
        program(
            "an_error_that_causes_itself",
            Kind("raised"),
            "e = ValueError(1); f = ValueError(2)\ne.__cause__ = f; f.__cause__ = e\nraise e",
        ),
        program(
            "dict_with_hostile_items",
            Kind("result_invalid"),
            "class D(dict):\n def items(self): raise ValueError('hostile')\nresult = D(a=1)",
        ),
        program(
            "dict_with_items_of_something_else",
            OneOf(&["ok", "result_invalid"]),
            "class D(dict):\n def items(self): return [(1, 2, 3), 'x']\nresult = D(a=1)",
        ),
        program(
            "list_with_a_hostile_iter",
            OneOf(&["ok", "result_invalid"]),
            "class L(list):\n def __iter__(self): 1 / 0\nresult = L([1])",
        ),
        program(
            "float_and_int_that_lie",
            OneOf(&["ok", "result_invalid"]),
            "class F(float):\n __repr__ = lambda self: '],\"error\":['\n __float__ = __repr__\nclass I(int):\n __repr__ = lambda self: '}'\n __str__ = __repr__\nresult = [F(1.5), I(2)]\nassert 1",
        ),
        program("a_cycle", Kind("result_invalid"), "result = []\nresult.append(result)"),
        program("nan", Kind("result_invalid"), "result = {'a': [1, float('nan')]}"),
        program("infinity", Kind("result_invalid"), "result = -float('inf')"),
        program("a_giant_integer", OneOf(&["ok"]), "result = 10 ** 300\nprint(len(str(1)))").prints("1\n"),
        program("a_lone_surrogate", Kind("result_invalid"), "result = '\\ud800'"),
        program("a_set", Kind("result_invalid"), "result = {1, 2}"),
        program("bytes", Kind("result_invalid"), "result = b'x'"),
        program("a_key_that_is_a_tuple", Kind("result_invalid"), "result = {(1, 2): 3}"),
        program("five_megabytes", Kind("result_too_large"), "result = 'x' * 5000000"),
        program(
            "two_hundred_deep",
            Kind("result_invalid"),
            "for n in range(200): result = [result] if n else []",
        ),
        program("a_hundred_deep", OneOf(&["ok"]), "for n in range(100): result = [result] if n else []"),
        program(
            "a_hundred_thousand_deep",
            Kind("result_invalid"),
            "for n in range(100000): result = [result] if n else []",
        ),
        program("a_class_as_result", Kind("result_invalid"), "result = type"),
        program(
            "null_bytes_and_quotes",
            Gives("\"\\u0000\\\"\\\\\\u007f\\u2028\""),
            "result = '\\0\"\\\\\\x7f\\u2028'",
        ),
    ]
}

fn tricks() -> Vec<Program> {
    vec![
        program("builtins_replaced", OneOf(&["ok", "raised", "exited"]), "import builtins\nfor n in ('len', 'str', 'isinstance', 'type', 'print', 'open', 'sorted', 'Exception'): setattr(builtins, n, None)\nresult = 1"),
        program("all_builtins_deleted", OneOf(&["ok", "raised", "exited"]), "import builtins\nresult = 1\nfor n in list(vars(builtins)): delattr(builtins, n)"),
        program("modules_replaced", OneOf(&["ok", "raised", "exited"]), "import json, traceback, linecache\nfor m in (json, traceback, linecache, os, time):\n for n in list(vars(m)):\n  if not n.startswith('__'): setattr(m, n, None)\nresult = 1").shows_our_frames(),
        program("modules_replaced_and_an_error", OneOf(&["raised", "exited"]), "import linecache, traceback\ntraceback.format_exception = linecache.getline = None\n1 / 0"),
        program("sys_modules_emptied", OneOf(&["ok", "raised", "exited"]), "import threading\nresult = 1\nsys.modules.clear()"),
        program("sys_modules_of_strangers", OneOf(&["ok", "raised", "exited"]), "sys.modules.update({n: 5 for n in ('threading', 'atexit', 'traceback', 'linecache', '__main__')})\nresult = 1"),
        program("the_supervisors_globals", OneOf(&["ok", "exited", "raised"]), "frame = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\nfor n in list(frame.f_globals):\n if n not in ('__builtins__', '__name__'): frame.f_globals[n] = None\nresult = 1").shows_our_frames(),
        program("stdout_replaced", Gives("1"), "import io\nsys.stdout = io.StringIO(); sys.stderr = None\nprint('nowhere')\nresult = 1"),
        program("stdout_closed", Gives("1"), "sys.stdout.close(); sys.stderr.close(); sys.stdin.close()\nresult = 1"),
        program("stdout_that_raises", OneOf(&["ok"]), "class S:\n def flush(self): raise ValueError\n write = flush\nsys.stdout = sys.stderr = sys.__stdout__ = S()\nresult = 1"),
        program("stdout_whose_flush_exits", OneOf(&["ok", "exited"]), "class S:\n def flush(self): sys.exit(3)\nsys.stdout = S()\nresult = 1"),
        program("settrace_and_setprofile", OneOf(&["ok"]), "def f(frame, *_): return f\nsys.settrace(f); sys.setprofile(f)\nresult = 1"),
        program("a_profiler_that_raises", OneOf(&["raised", "exited", "ok"]), "def f(*_): raise ValueError('profiler')\nresult = 1\nsys.setprofile(f)"),
        program("gc_abuse", OneOf(&["ok", "raised", "exited", "crashed"]), "import gc\ngc.unfreeze()\nfor o in gc.get_objects():\n if type(o) is dict and o is not globals():\n  try: o.clear()\n  except Exception: pass\nresult = 1"),
        program("signal_handlers_left", OneOf(&["ok", "raised"]), "for s in range(1, 32):\n try: signal.signal(s, lambda *_: 1 / 0)\n except OSError: pass\nsignal.setitimer(signal.ITIMER_REAL, 0.001)\nresult = 1"),
        program("faulthandler", Kind("crashed"), "import faulthandler, ctypes\nfaulthandler.enable()\nctypes.string_at(0)").shows_our_frames(),
        program("an_excepthook", Kind("raised"), "sys.excepthook = lambda *_: os._exit(0)\n1 / 0"),
        program("a_meta_path_finder", OneOf(&["raised", "exited"]), "class F:\n def find_spec(*_): raise SystemExit(7)\nsys.meta_path.insert(0, F)\n1 / 0"),
        program("an_audit_hook", OneOf(&["ok", "raised", "exited"]), "sys.addaudithook(lambda *_: None)\nresult = 1"),
        program("a_seccomp_filter_of_its_own", Gives("\"EPERM\""), "import ctypes, struct\ncode = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x80000000))\nfilter = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 1, ctypes.addressof(code)))\nresult = call('prctl', 22, 2, ctypes.addressof(filter), 0, 0)"),
        program("getpid_that_lies", OneOf(&["ok", "exited"]), "os.getpid = lambda: 1\nresult = 1"),
        program("the_code_asks_for_input", Kind("raised"), "input()"),
        program("a_result_that_is_main", Kind("result_invalid"), "import __main__\nresult = __main__"),
    ]
}

impl Program {
    fn shows_our_frames(self) -> Program {
        Program { shows_our_frames: true, ..self }
    }
    fn in_600_ms(self) -> Program {
        Program { timeout_ms: 600, ..self }
    }

    fn expected_on(&self, driver: &Driver) -> Expect {
        let otherwise = [
            (driver.limits_memory(), self.without_group),
            (driver.limits_inodes(), self.without_inode_limit),
            (driver.is_embedded(), self.in_a_container),
        ];
        let other = otherwise.into_iter().find_map(|(as_usual, expect)| expect.filter(|_| !as_usual));
        other.unwrap_or(self.expect)
    }

    /// What is wrong with the answer, if anything.
    fn judge(&self, answer: &Value, took: Duration, driver: &Driver) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut check = |holds: bool, what: String| {
            if !holds {
                wrong.push(what);
            }
        };
        let kind = answer["error_detail"]["kind"].as_str();
        let expect = self.expected_on(driver);
        let short = brief(answer);
        match expect {
            Gives(text) => {
                let value: Value = serde_json::from_str(text).unwrap();
                check(kind.is_none() && answer["result"] == value, format!("wanted {text}: {short}"));
            }
            Kind(wanted) => check(kind == Some(wanted), format!("wanted {wanted}: {short}")),
            OneOf(wanted) => {
                check(wanted.contains(&kind.unwrap_or("ok")), format!("wanted one of {wanted:?}: {short}"));
            }
        }
        check(kind.is_none() || answer["result"].is_null(), format!("failed, and has a result: {short}"));
        for text in ["value", "traceback", "name"].map(|key| &answer["error_detail"][key]) {
            check(text.as_str().unwrap_or("").len() <= ERROR_BYTES, "the error's text has no cap".into());
        }
        for (stream, wanted) in [("stdout", self.stdout), ("stderr", self.stderr)] {
            if let Some(wanted) = wanted {
                check(answer[stream] == wanted, format!("{stream} is not {wanted:?}: {short}"));
            }
            check(answer[stream].as_str().unwrap_or("").len() <= 3 << 20, format!("{stream} has no cap"));
        }
        for field in self.truncated {
            let cut = answer["truncated"].as_array().is_some_and(|fields| fields.contains(&json!(field)));
            check(cut, format!("{field} was not cut: {short}"));
        }
        let lines = answer["workspace_files"].as_array().map_or(0, Vec::len);
        check((1..=1000).contains(&lines), format!("{lines} lines of workspace_files"));
        check(answer.get("session").is_none(), format!("the session was lost: {short}"));
        let ours = ["error", "stderr"].iter().any(|text| answer[*text].to_string().contains("<supervisor>"));
        check(!ours || self.shows_our_frames, format!("shows our own lines: {short}"));
        let late = self.within.unwrap_or(Duration::from_millis(self.timeout_ms) + LATE);
        check(took <= late, format!("took {took:?}: {short}"));
        wrong
    }
}

fn brief(answer: &Value) -> String {
    answer.to_string().chars().take(600).collect()
}

/// The supervisor's own line that numbers the outcomes: a forger has read it.
fn outcome_kinds() -> &'static str {
    let mut lines = codesandbox::supervisor::SOURCE.lines();
    lines.find(|line| line.starts_with("RESULT, ERROR = ")).expect("outcome.py numbers the outcomes")
}

/// Runs a program as a user of its own, then what must still work.
fn attempt(driver: &Driver, program: &Program) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let neighbour = format!("neighbour-{}", NEXT.fetch_add(1, Ordering::Relaxed) % NEIGHBOURS);
    let (server, _) = driver.server(&LIMITS);
    let plus = json!({"data": {"x": 1, "y": 2}});
    let port: u16 = server.address.rsplit(':').next().unwrap().parse().unwrap();
    let fields = json!({"timeout_ms": program.timeout_ms, "data": {"port": port}});
    server.run(program.name, "pass"); // its sandbox is there: what is timed is the program
    let begun = Instant::now();
    let answer =
        server.run_with(program.name, &format!("{}{PRELUDE}{}", outcome_kinds(), program.code), fields);
    let mut wrong = program.judge(&answer, begun.elapsed(), driver);
    for (user, whose) in [(program.name, "the same user"), (neighbour.as_str(), "another user")] {
        let answer = server.run_with(user, "result = x + y", plus.clone());
        if answer["result"] != 3 || answer.get("error").is_some() || answer.get("session").is_some() {
            wrong.push(format!("afterwards {whose} got {}", brief(&answer)));
        }
    }
    let (status, _, text) = server.request("DELETE", &format!("/sessions/{}", program.name), &[], "");
    if status != 204 {
        wrong.push(format!("DELETE gave {status}: {text}"));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// One for each row of the table.
pub(crate) fn behaviours() -> Vec<Behaviour> {
    let programs = programs();
    let names: HashSet<_> = programs.iter().map(|program| program.name).collect();
    assert_eq!(names.len(), programs.len(), "two rows with one name would share a session");
    assert!(names.len() >= 200, "{}", names.len());
    let row = |program: Program| {
        Behaviour::new(format!("hostile::{}", program.name), move |driver| attempt(driver, &program))
    };
    let mut all: Vec<_> = programs.into_iter().map(row).collect();
    all.push(Behaviour::new(
        "hostile::files_that_fill_every_file_system_leave_room_for_runs".into(),
        files_that_fill_every_file_system_leave_room_for_runs,
    ));
    all
}

fn files_that_fill_every_file_system_leave_room_for_runs(driver: &Driver) {
    let limits =
        ["tmp=16MiB", "shm=16MiB", "workspace=32MiB", "memory=96MiB"].map(|limit| format!("limits.{limit}"));
    let flags: Vec<_> = limits.iter().flat_map(|limit| ["--set", limit]).collect();
    let (server, _) = driver.server(&flags);
    let code = "for p in ('/workspace/x', '/tmp/x', '/dev/shm/x'):\n try:\n  with open(p, 'wb', 0) as f:\n   while f.write(bytes(1 << 20)): pass\n except OSError: pass\nresult = 1";
    let filled = server.run_with("filler", code, json!({"timeout_ms": 10_000}));
    assert_eq!(filled["result"], 1, "{filled}");
    for user in ["filler", "neighbour"] {
        let answer = server.run(user, "result = 3");
        assert_eq!((&answer["result"], answer.get("session")), (&json!(3), None), "{user}: {answer}");
    }
}
