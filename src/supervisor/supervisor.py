# PID 1 of every sandbox: keeps one interpreter forked in advance and hands it the code of the next run.
#
# Three processes: the supervisor (PID 1) talks to the server, the forker holds the next interpreter ready,
# and the run's own process executes the guest's code.
#
# Only the standard library, Python 3.8 to 3.14, and as few imports as can be: each costs every sandbox
# a part of its start (`signal` alone 4 ms, through enum; hence `_signal`). The frames on descriptors 0
# and 1 are described in protocol.rs. What a run can reach is its own process: it gets its stdin, stdout,
# stderr and the result pipe, and everything that it changed dies with it.
#
# The one argument says what follows the end of descriptor 0: nothing (without an argument: the sandbox dies
# with its server), or, with `park`, a life in which PID 1 only collects the dead, since the engine closes the
# stream of a server that leaves. Then a server that comes back starts this program a second time, `beside` it.
import gc, os, select, struct, sys, time
import _signal, _socket, _stat

HELLO, RUN, INTERRUPT = 1, 2, 3
HELLO_ANSWER, DONE = 129, 130
HEADER = struct.Struct(">QBI")  # nonce, kind, length of the payload
OUTCOME = struct.Struct(">BI")  # what the run's process says of itself: kind, length
RESULT, ERROR = 1, 2
REPORT = struct.Struct(">iiBBBBQQQ")  # see protocol.rs
FORKED = struct.Struct("=i")  # what the forker says: the pid of an interpreter that waits, its descriptors beside it
DESCRIPTORS = struct.Struct("=4i")
ENDED = struct.Struct("=iQQ")  # then of the same one: wait status, CPU time in microseconds, minor page faults
NOTHING = -1
TIMEOUT, CANCELLED = 1, 2
UNKNOWN, NOT_OUT_OF_MEMORY, OUT_OF_MEMORY = 0, 1, 2
PARK, BESIDE = "park", "beside"
PARKED = b"parked"  # the name of a PID 1 that is
EMPTY = b'["total 0"]'
LENGTH = struct.Struct(">I")

WORKSPACE = "/workspace"
CODE_NAME = "<code>"  # the guest's code in its tracebacks
MOST_DESCRIPTORS = 64  # this file opens about 15
PR_SET_DUMPABLE, PR_SET_NAME = 4, 15
PARK_WAIT_S = 5.0  # for a PID 1 whose server has only just left
OOM_SCORE_ADJ = "900"  # of all but the supervisor, whose own comes from the engine
NICE = 10  # of all but the supervisor: a guest's fork bomb must not starve what is to stop it
WARM_AFTER_S = 0.002  # a sandbox that is busy has its next task sooner, and saves the warming
MOST_ENDED = 256  # children collected in one go
ATTEMPTS = 3  # to begin a run, before the sandbox is given up
REAP_S = 5.0  # a process that outlives SIGKILL by this much condemns the sandbox
LISTING_BYTES = 512 * 1024  # a name may be 255 bytes of escapes, so lines alone are no bound


# -- JSON: the C halves of `json`, whose Python half costs 9 ms to import ----------------------------


class ScannerSettings:
    strict, object_hook, object_pairs_hook = True, None, None
    parse_float, parse_int, parse_constant = float, int, {"NaN": None}.__getitem__
    memo = {}


def refuse(value):
    raise TypeError("Object of type %s is not JSON serializable" % type(value).__name__)


def json_functions():
    try:
        import _json

        scan = _json.make_scanner(ScannerSettings)
        if scan('{"a": [1, 2.5, null]}', 0)[0] != {"a": [1, 2.5, None]}:
            raise ImportError("the C scanner is not the one that this was written for")

        def dumps(value):
            encode = _json.make_encoder(
                {}, refuse, _json.encode_basestring, None, ":", ",", False, False, False
            )
            return "".join(encode(value, 0))

        if dumps({"a": [1, 2.5, None]}) != '{"a":[1,2.5,null]}':
            raise ImportError("the C encoder is not the one that this was written for")
        return (lambda text: scan(text, 0)[0]), dumps
    except Exception:
        import json

        return json.loads, lambda value: json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )


loads, dumps = json_functions()


# -- frames ------------------------------------------------------------------------------------------


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def join(sections):
    return b"".join(part for section in sections for part in (LENGTH.pack(len(section)), section))


def send(nonce, kind, *sections):
    payload = join(sections)
    write_all(1, HEADER.pack(nonce, kind, len(payload)) + payload)


def split(payload):
    sections, at = [], 0
    while at < len(payload):
        (length,) = LENGTH.unpack_from(payload, at)
        at += LENGTH.size
        sections.append(payload[at : at + length])
        at += length
    return sections


class Input:
    """The frames that the server sends, in order."""

    def __init__(self):
        self.buffer = bytearray()

    def fill(self):
        data = os.read(0, 1 << 16)
        if not data:
            leave()
        self.buffer += data

    def take(self):
        """The next frame where it is here as a whole, else None."""
        if len(self.buffer) < HEADER.size:
            return None
        nonce, kind, length = HEADER.unpack_from(self.buffer)
        end = HEADER.size + length
        if len(self.buffer) < end:
            return None
        payload = bytes(memoryview(self.buffer)[HEADER.size : end])
        del self.buffer[:end]
        return nonce, kind, payload


# -- the run's own process ---------------------------------------------------------------------------


# What is touched for the first time here costs a page's copy each run, so the forker prepares what it can.

allow_digits = getattr(sys, "set_int_max_str_digits", lambda most: None)  # 3.8.14, 3.9.14, 3.10.7 and newer
DIGITS = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0


class SourceFinder:
    """Puts the guest's source where tracebacks look for it, once `linecache` is imported."""

    source = ""

    def find_spec(self, name, path=None, target=None):
        if name != "linecache":
            return None
        sys.meta_path.remove(self)
        spec = sys.modules["_frozen_importlib_external"].PathFinder.find_spec(name)
        execute = spec.loader.exec_module
        # As Python counts lines, each with its end, as those of a file: carets are placed by it.
        lines = self.source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        entry = (len(self.source), None, [line + "\n" for line in lines], CODE_NAME)

        class Loader:
            create_module = staticmethod(lambda spec: None)

            @staticmethod
            def exec_module(module):
                execute(module)
                module.cache[CODE_NAME] = entry

        spec.loader = Loader
        return spec


FINDER = SourceFinder()
MAIN = type(sys)("__main__")
SCOPE = MAIN.__dict__  # of the guest's code


def prepare(limits):
    """In the forker, once: all that is the same for every run."""
    os.chdir(WORKSPACE)
    sys.path.append(WORKSPACE)  # last: a json.py there shadows nothing
    sys.meta_path.insert(0, FINDER)
    SCOPE["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = MAIN
    allow_digits(0)
    if limits["rlimits"]:  # they stand in for a control group, where the engine has none
        import resource

        for name, value in limits["rlimits"].items():
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def read_task(fd):
    """The sections of the task, once somebody gives it."""
    data = os.read(fd, 1 << 12)
    if not data:
        os._exit(0)  # the supervisor has no use for this process any more
    (length,) = LENGTH.unpack_from(data)
    missing = LENGTH.size + length - len(data)
    parts = [data[LENGTH.size :]]
    while missing:
        parts.append(os.read(fd, min(missing, 1 << 20)))
        missing -= len(parts[-1])
    os.close(fd)
    return split(b"".join(parts))


def blame(value, path, depth=0):
    """Says which part of a result JSON does not have; None where no part is to blame."""
    if depth > 200:
        return "%s is nested too deeply" % path
    if value is None or isinstance(value, (bool, int)):
        return None
    if isinstance(value, float):
        return None if value - value == 0 else "%s is %r, which JSON does not have" % (path, value)
    if isinstance(value, str):
        try:
            return value.encode() and None
        except UnicodeEncodeError:
            return "%s holds a lone surrogate, which is no Unicode text" % path
    if isinstance(value, (list, tuple)):
        parts = ((item, "%s[%d]" % (path, index)) for index, item in enumerate(value))
    elif isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int, float, bool, type(None))):
                return "a key of %s is of type %s, which JSON does not have" % (path, type(key).__name__)
        parts = ((item, "%s[%r]" % (path, key)) for key, item in value.items())
    else:
        return "%s is of type %s, which JSON does not have" % (path, type(value).__name__)
    for item, item_path in parts:
        found = blame(item, item_path, depth + 1)
        if found:
            return found
    return None


class Failure(Exception):
    """A run that failed: what `error_detail` says of it."""

    def __init__(self, kind, name, value, traceback=""):
        self.detail = {"kind": kind, "name": name, "value": value, "traceback": traceback}


def encode_result(value, limit):
    try:
        allow_digits(0)  # integers of any size: the time limit bounds what they cost
        encoded = dumps(value).encode()
    except (KeyboardInterrupt, MemoryError):
        raise
    except RecursionError:
        raise Failure("result_invalid", "RecursionError", "result is nested too deeply")
    except BaseException as error:
        why = None
        try:
            why = blame(value, "result")
        except Exception:
            pass
        raise Failure("result_invalid", type(error).__name__, why or "result: %s" % error)
    if len(encoded) > limit:
        message = "result is %d bytes of JSON, more than the %d allowed" % (len(encoded), limit)
        raise Failure("result_too_large", "ValueError", message)
    return encoded


def format_error(error, syntax=False):
    """Python's own traceback without the frames of this file.

    Imported here, where it costs a failed run 9 ms: held ready in the supervisor it costs each run 0.3 ms
    of CPU, in pages to be shared, copied and given back.
    """
    try:
        hide_own_frames(error)
        import traceback

        if syntax:
            lines = traceback.format_exception_only(type(error), error)
        else:
            lines = traceback.format_exception(type(error), error, error.__traceback__)
        return "".join(lines).rstrip("\n")
    except Exception:
        return str(type(error).__name__)  # its __str__ fails, or there is no memory left for more


def hide_own_frames(error):
    """In the whole chain: what led to an error begins in this file, too."""
    pending, seen = [error], set()
    while pending:
        error = pending.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        frames = error.__traceback__
        while frames and frames.tb_frame.f_globals is globals():
            frames = frames.tb_next
        error.__traceback__ = frames
        pending += error.__cause__, error.__context__


def failure_of(error, syntax=False):
    kind = "raised"
    if syntax:
        kind = "syntax"
    elif isinstance(error, MemoryError):
        kind = "out_of_memory"
    try:
        value = str(error)
    except Exception:
        value = "<exception str() failed>"
    return Failure(kind, str(type(error).__name__), value, format_error(error, syntax))


def end_of(error):
    """What `sys.exit` means: nothing where it is a success, a Failure otherwise."""
    code = error.code
    if code is None or (isinstance(code, int) and code == 0):
        return
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    raise Failure("exited", "SystemExit", "exited with status %d" % (code & 0xFF))


def execute(code, scope):
    """Runs the guest's code and what Python runs at its exit: threads to join, `atexit`."""
    try:
        try:
            exec(code, scope)
        except SystemExit as error:
            end_of(error)
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
    except Failure:
        raise
    except SystemExit as error:
        end_of(error)
    except BaseException as error:
        raise failure_of(error)


def variables(data):
    """The data by the names that code can reach: Python reads identifiers in their NFKC form."""
    found = loads(data)
    if data.isascii() and "\\u" not in data:
        return found
    from unicodedata import normalize

    return {normalize("NFKC", name): value for name, value in found.items()}


def outcome_of(source, data, limits):
    """Runs the code; gives the kind and the bytes that the result pipe carries."""
    try:
        try:
            if data:
                SCOPE.update(variables(data))
            FINDER.source = source
            allow_digits(DIGITS)
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGINT])
            try:
                code = compile(source, CODE_NAME, "exec", 0, True)
            except (SyntaxError, ValueError) as error:
                raise failure_of(error, syntax=True)
            execute(code, SCOPE)
            return RESULT, encode_result(SCOPE.get("result"), limits["result"])
        except Failure:
            raise
        except BaseException as error:
            raise failure_of(error)
    except Failure as failure:
        detail = failure.detail
        for key in ("name", "value", "traceback"):
            text = detail[key].encode("utf-8", "backslashreplace")
            if len(text) > limits["error"]:
                detail["truncated"] = True
                text = text[: limits["error"]]
            detail[key] = text.decode("utf-8", "ignore")
        return ERROR, dumps(detail).encode()


def flush():
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        try:
            stream.flush()
        except Exception:
            pass


def feed(stdin):
    """Gives the run its standard input: a file in memory, so that nobody needs to feed a pipe."""
    fd = os.memfd_create("stdin")
    write_all(fd, stdin)
    os.lseek(fd, 0, os.SEEK_SET)
    os.dup2(fd, 0)
    os.close(fd)


def run_process(task, out, err, result, limits):
    """The whole life of a forked interpreter: wait for the task, run it, tell the outcome."""
    pid = os.getpid()
    os.setsid()
    os.dup2(out, 1), os.dup2(err, 2)  # 0 is the forker's own, which is empty
    low, high = (task, result) if task < result else (result, task)
    os.closerange(3, low), os.closerange(low + 1, high), os.closerange(high + 1, MOST_DESCRIPTORS)
    if not select.select([task], [], [], WARM_AFTER_S)[0]:  # nobody waits: one who comes later shall not, either
        warm_up()
    source, data, stdin = read_task(task)
    if stdin:
        feed(stdin)
    try:
        kind, payload = outcome_of(source.decode(), data.decode(), limits)
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
        flush()
    except KeyboardInterrupt:  # between two of the lines above; the supervisor knows why
        kind, payload = ERROR, b'{"kind":"raised","name":"KeyboardInterrupt","value":"","traceback":""}'
    if os.getpid() == pid:  # and not a fork of the guest's that came to the end of the code
        write_all(result, OUTCOME.pack(kind, len(payload)) + payload)


class Interpreter:
    """An interpreter forked in advance, waiting for its one task."""

    def __init__(self, pid, descriptors):
        self.pid = pid
        self.task, self.out, self.err, self.result = descriptors
        for fd in (self.out, self.err, self.result):
            os.set_blocking(fd, False)

    def give(self, sections):
        """Hands over the task; False where the interpreter died waiting, and so has not begun it."""
        payload = join(sections)
        try:
            write_all(self.task, LENGTH.pack(len(payload)) + payload)
            return True
        except BrokenPipeError:
            return False
        finally:
            os.close(self.task)

    def close(self):
        for fd in (self.out, self.err, self.result):
            os.close(fd)


# -- the forker --------------------------------------------------------------------------------------
#
# After a fork the first write to each page costs its copy, in both processes: 3.5 us each where this was
# measured, and the supervisor writes to 150 in a run. So it forks one process that does nothing but fork and
# touches fewer; and that works while the supervisor answers. A guest can kill the forker or stop it, since
# they have one uid: that run has failed then, and there is a new forker.


def fork_forever(socket, limits):
    """Holds one interpreter ready; when that has ended, kills what it left behind, tells, forks the next."""
    while True:
        pipes = [os.pipe() for _ in range(4)]
        (task, give), (out_read, out), (err_read, err), (result_read, result) = pipes
        pid = os.fork()
        if pid == 0:
            run_process(task, out, err, result, limits)
            os._exit(0)
        ancillary = DESCRIPTORS.pack(give, out_read, err_read, result_read)
        socket.sendmsg([FORKED.pack(pid)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, ancillary)])
        for pair in pipes:
            os.close(pair[0]), os.close(pair[1])
        _, status, usage = os.wait4(pid, 0)
        end = None
        # All but PID 1, which collects them, and this process, which has children by clone(CLONE_PARENT).
        while MODE != BESIDE and kill_all():  # beside PID 1 the supervisor would be one of them, and kills itself
            end = end or time.monotonic() + REAP_S
            if time.monotonic() > end:
                os._exit(1)
            collect()
            time.sleep(0.0005)
        cpu_us = int((usage.ru_utime + usage.ru_stime) * 1e6)
        socket.send(ENDED.pack(status, cpu_us, usage.ru_minflt))


def become_forker(socket):
    """Lets go of all that is the supervisor's: its signals, its descriptors and its place before the guest's."""
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    # Held back until the run's process can raise KeyboardInterrupt, lest a short time be over unnoticed.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    os.nice(NICE)
    die_first()
    null = os.open(os.devnull, os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(null, target)
    os.closerange(3, socket), os.closerange(socket + 1, MOST_DESCRIPTORS)


class Forker:
    """The supervisor's side of the process that forks."""

    def __init__(self, limits):
        self.socket, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                become_forker(theirs.fileno())
                prepare(limits)
                fork_forever(theirs, limits)
            finally:
                os._exit(70)
        theirs.close()
        self.fd = self.socket.fileno()

    def next(self):
        """The interpreter that waits; None where the forker is dead."""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(FORKED.size, _socket.CMSG_SPACE(DESCRIPTORS.size))
        except ConnectionResetError:
            return None
        if not data:
            return None
        return Interpreter(*FORKED.unpack(data), DESCRIPTORS.unpack(ancillary[0][2]))

    def ended(self):
        """How the last interpreter ended: wait status, CPU time, page faults; None where the forker is dead."""
        try:
            data = self.socket.recv(ENDED.size)
        except ConnectionResetError:
            return None
        return ENDED.unpack(data) if data else None


# -- the supervisor ----------------------------------------------------------------------------------


class Capture:
    """Reads one of a run's pipes: keeps up to its cap, drops the rest, never stops reading."""

    def __init__(self, fd, cap):
        self.fd, self.cap, self.parts, self.size, self.cut = fd, cap, [], 0, False

    def read(self):
        """Reads once, so that a fast writer starves nobody: None where nothing is there, False at the end."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return None
        room = self.cap - self.size
        if len(data) > room:
            self.cut = True
        if data and room:
            self.parts.append(data[:room])
            self.size += len(self.parts[-1])
        return bool(data)

    def bytes(self):
        return b"".join(self.parts)


def first_frame(data):
    """The outcome that the run's process sent: its kind and payload; None where there is no whole one."""
    if len(data) < OUTCOME.size:
        return None
    kind, length = OUTCOME.unpack_from(data)
    payload = data[OUTCOME.size : OUTCOME.size + length]
    whole = len(payload) == length and kind in (RESULT, ERROR)
    return (kind, payload) if whole else None


class Run:
    """One run, from its task to its last byte."""

    def __init__(self, supervisor, interpreter, nonce, timeout_ms):
        limits = supervisor.limits
        self.supervisor, self.interpreter, self.nonce = supervisor, interpreter, nonce
        self.out = Capture(interpreter.out, limits["stdout"])
        self.err = Capture(interpreter.err, limits["stderr"])
        self.result = Capture(interpreter.result, OUTCOME.size + max(limits["result"], 16 * limits["error"]))
        self.status, self.cpu_us, self.page_faults = None, 0, 0
        self.why = 0
        self.forker_died = False
        self.grace = limits["grace_ms"] / 1000
        self.deadline = time.monotonic() + timeout_ms / 1000
        self.killed = False

    def interrupt(self, why):
        """Asks first, by SIGINT, for TIMEOUT or CANCELLED; `expire` follows with SIGKILL after the grace."""
        if not self.why:
            self.why = why
            self.deadline = time.monotonic() + self.grace
            try:
                os.kill(self.interpreter.pid, _signal.SIGINT)
            except ProcessLookupError:
                pass  # it has just ended; the forker is about to say so

    def expire(self):
        if not self.why:
            self.interrupt(TIMEOUT)
        else:
            self.killed = True
            kill_all()  # the forker, too
            self.deadline = time.monotonic() + REAP_S

    def end(self, ended):
        """The forker's word on the run's process; where it has none it is dead, and everything else is to be."""
        if ended:
            self.status, self.cpu_us, self.page_faults = ended
        else:
            self.status, self.forker_died = _signal.SIGKILL, True

    def wait(self):
        """Serves the run's pipes, signals and deadline until its process has ended."""
        self.supervisor.listen(self)
        poller = self.supervisor.poller
        captures = {capture.fd: capture for capture in (self.out, self.err, self.result)}
        for fd in captures:
            poller.register(fd, select.POLLIN)
        try:
            while self.status is None:
                left = self.deadline - time.monotonic()
                if left <= 0:
                    if self.killed:
                        os._exit(1)  # it outlives SIGKILL: the sandbox is of no more use
                    self.expire()
                    continue
                for fd, _ in poller.poll(left * 1000 + 1):
                    if fd in captures:
                        if captures[fd].read() is False:
                            poller.unregister(fd)
                            del captures[fd]
                    else:
                        self.supervisor.serve(fd, self)
        finally:
            for fd in captures:
                poller.unregister(fd)

    def drain(self):
        """What is still in the pipes, now that nobody writes any more: 16 reads empty a full one."""
        for capture in (self.out, self.err, self.result):
            for _ in range(16):
                if not capture.read():
                    break


def kill_all():
    """Kills every process but this one; False where there was none."""
    try:
        os.kill(-1, _signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False


def kill_until_nothing_is_left():
    end = time.monotonic() + REAP_S
    while kill_all():
        if time.monotonic() > end:
            os._exit(1)  # something outlives SIGKILL: the sandbox is of no more use
        collect()
        time.sleep(0.0005)
    collect()


def collect():
    """Takes note of the children that have ended: so many at once that a fork bomb cannot keep us at it.

    False where there is none left.
    """
    try:
        for _ in range(MOST_ENDED):
            if not os.waitpid(-1, os.WNOHANG)[0]:
                return False
    except ChildProcessError:
        return False
    return True


def leave():
    """The server is gone. PID 1 may have to stay, and with it the sandbox, for the next one."""
    if MODE == PARK or (MODE == BESIDE and Supervisor.greeted):  # else what lives here is another one's
        kill_until_nothing_is_left()
    if MODE != PARK:
        os._exit(0)
    _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGCHLD])
    prctl(PR_SET_NAME, PARKED)
    while True:
        while collect():
            pass
        _signal.sigwait([_signal.SIGCHLD])


class Supervisor:
    greeted = False  # whether a server has said hello to this one

    def __init__(self):
        self.input = Input()
        self.backlog = []
        self.empty_since = None
        self.limits = None
        self.forker = self.waiting = None
        self.poller = select.poll()
        _signal.signal(_signal.SIGCHLD, lambda *_: collect())
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # a guest may send it: kill(1, SIGINT)
        self.poller.register(0, select.POLLIN)

    def serve(self, fd, run):
        """What may happen beside a run's pipes: its process ended, or the server says something."""
        if fd == 0:
            self.input.fill()
            self.listen(run)
        else:
            run.end(self.forker.ended())

    def listen(self, run):
        """Obeys an interrupt of this run; keeps every other frame for later."""
        while True:
            frame = self.input.take()
            if frame is None:
                return
            if frame[1] != INTERRUPT:
                self.backlog.append(frame)
            if frame[1] == HELLO or (frame[1] == INTERRUPT and frame[0] == run.nonce):
                run.interrupt(CANCELLED)  # another server is here: the one that asked for this run is gone

    def fork_anew(self):
        """A forker that knows what this process knows now, in place of one that is dead or is to be."""
        if self.waiting:  # the old one's
            os.close(self.waiting.task)
            self.waiting.close()
            self.waiting = None
        if self.forker:
            self.poller.unregister(self.forker.fd)
            self.forker.socket.close()
        if self.forker or MODE == BESIDE:  # there is something to kill
            kill_until_nothing_is_left()
        enterable()
        self.forker = Forker(self.limits)
        self.poller.register(self.forker.fd, select.POLLIN)

    def hello(self, nonce, payload):
        self.limits = loads(split(payload)[0].decode())
        self.memory = MemoryGroup()
        Supervisor.greeted = True
        self.fork_anew()
        send(nonce, HELLO_ANSWER, dumps(posture()).encode())
        self.waiting = self.forker.next()

    def run(self, nonce, payload):
        options, *task = split(payload)
        del payload
        options = loads(options.decode())
        interpreter = self.begin(task)
        begun = time.monotonic()
        run = Run(self, interpreter, nonce, options["timeout_ms"])
        run.wait()
        spent = time.monotonic() - begun
        if run.forker_died or MODE == BESIDE:
            self.fork_anew()
        run.drain()
        send(nonce, DONE, *self.answer(run, spent))
        interpreter.close()
        self.waiting = self.forker.next()  # at once: descriptors under way count against a user of the host

    def begin(self, task):
        """An interpreter that has the task. One that died waiting has not begun it, so another one may."""
        for _ in range(ATTEMPTS):
            interpreter, self.waiting = self.waiting or self.forker.next(), None
            if interpreter and interpreter.give(task):
                return interpreter
            if interpreter:
                interpreter.close()
            self.fork_anew()
        os._exit(1)

    def answer(self, run, spent):
        outcome = first_frame(run.result.bytes())
        lines, cut = self.listing()
        killed = os.WIFSIGNALED(run.status) and os.WTERMSIG(run.status) == _signal.SIGKILL
        report = REPORT.pack(
            os.WEXITSTATUS(run.status) if os.WIFEXITED(run.status) else NOTHING,
            os.WTERMSIG(run.status) if os.WIFSIGNALED(run.status) else NOTHING,
            outcome[0] if outcome else 0,
            run.why,
            run.out.cut | run.err.cut << 1 | cut << 2 | run.result.cut << 3,
            self.memory.verdict() if killed else UNKNOWN,
            int(spent * 1e6),
            run.cpu_us,
            run.page_faults,
        )
        return report, outcome[1] if outcome else b"", run.out.bytes(), run.err.bytes(), lines

    def listing(self):
        """The listing as JSON, and whether it was cut.

        An empty workspace whose ctime has not moved is still empty: nobody can set a ctime.
        """
        changed = enterable().st_ctime_ns
        if changed == self.empty_since:
            return EMPTY, False
        lines, cut = listing(WORKSPACE, self.limits["listing_lines"])
        # A change within the clock's tick (at most 10 ms) of this look would leave the same ctime.
        settled = changed < time.time_ns() - 50_000_000
        self.empty_since = changed if settled and lines == ["total 0"] else None
        return dumps(lines).encode("utf-8", "backslashreplace"), cut

    def next_frame(self):
        if self.backlog:
            return self.backlog.pop(0)
        while True:
            frame = self.input.take()
            if frame:
                return frame
            self.input.fill()

    def serve_forever(self):
        while True:
            self.obey(*self.next_frame())

    def obey(self, nonce, kind, payload):
        if kind == HELLO:
            self.hello(nonce, payload)
        elif kind == RUN:
            self.run(nonce, payload)


# -- what the sandbox looks like from inside ---------------------------------------------------------


class MemoryGroup:
    """The control group's own count of processes that it killed for want of memory, where it can be seen."""

    FILES = "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"  # version 2, version 1

    def __init__(self):
        self.kills = self.count()

    def count(self):
        for path in self.FILES:
            try:
                with open(path, "rb", 0) as file:
                    for line in file.read().split(b"\n"):
                        name, _, value = line.partition(b" ")
                        if name == b"oom_kill":
                            return int(value)
            except OSError:
                pass
        return None

    def verdict(self):
        """Of a process that was killed: whether for want of memory."""
        before, self.kills = self.kills, self.count()
        if before is None or self.kills is None:
            return UNKNOWN
        return OUT_OF_MEMORY if self.kills > before else NOT_OUT_OF_MEMORY


def posture():
    """The facts that the server compares with what it asked the engine for."""
    facts = {"python": "%d.%d.%d" % sys.version_info[:3], "pid": os.getpid(), "beside": MODE == BESIDE}
    facts.update(uid=os.getuid(), gid=os.getgid(), groups=os.getgroups())
    try:
        with open("/proc/self/status", "rb", 0) as file:
            lines = dict(line.split(b":\t", 1) for line in file.read().split(b"\n") if b":\t" in line)
    except OSError:  # gVisor has none
        return facts
    for name in ("NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapBnd"):
        if name.encode() in lines:
            facts[name] = lines[name.encode()].strip().decode()
    return facts


# -- the workspace as `ls -lR` prints it -------------------------------------------------------------


def enterable():
    """The workspace's status. A run may take away everybody's rights to it: the next one is to have them."""
    status = os.stat(WORKSPACE)
    if status.st_mode & 0o700 == 0o700:
        return status
    os.chmod(WORKSPACE, 0o700)
    return os.stat(WORKSPACE)


def names_of(path):
    """Numeric ids to names, by the file alone: NSS would load libraries."""
    names = {}
    try:
        with open(path, errors="replace") as file:
            for line in file:
                parts = line.split(":")
                if len(parts) > 2 and parts[2].isdigit():
                    names.setdefault(int(parts[2]), parts[0])
    except OSError:
        pass
    return names


ESCAPES = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def escape(name):
    """As `ls --escape`, but for spaces: one file is one line, whatever its name holds."""
    if name.isascii() and name.isprintable() and "\\" not in name:
        return name
    parts = []
    for char in name:
        if char in ESCAPES:
            parts.append(ESCAPES[char])
        elif char.isprintable():
            parts.append(char)
        else:
            parts.extend("\\%03o" % byte for byte in os.fsencode(char))
    return "".join(parts)


def when(seconds, now):
    recent = now - 15778476 < seconds <= now + 60  # half a Gregorian year, as GNU ls has it
    try:
        return time.strftime("%b %e %H:%M" if recent else "%b %e  %Y", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return str(int(seconds))


def describe(entry, status, now):
    name = escape(entry.name)
    if entry.is_symlink():
        try:
            name += " -> " + escape(os.readlink(entry.path))
        except OSError:
            pass
    owner = USERS.get(status.st_uid, str(status.st_uid))
    group = GROUPS.get(status.st_gid, str(status.st_gid))
    mode = _stat.filemode(status.st_mode)
    return mode, str(status.st_nlink), owner, group, str(status.st_size), when(status.st_mtime, now), name


def directory(path, now, most):
    """The first lines of one directory, and its subdirectories' names. Describing is what takes time."""
    with os.scandir(path) as entries:
        entries = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: os.fsencode(e.name))
    rows, below, blocks = [], [], 0
    for entry in entries:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        blocks += status.st_blocks
        if len(rows) < most:
            rows.append(describe(entry, status, now))
        if _stat.S_ISDIR(status.st_mode):
            below.append(entry.name)
    lines = ["total %d" % ((blocks + 1) // 2)]
    if rows:
        links, owner, group, size = (max(len(row[column]) for row in rows) for column in (1, 2, 3, 4))
        for row in rows:
            lines.append(
                "%s %*s %-*s %-*s %*s %s %s"
                % (row[0], links, row[1], owner, row[2], group, row[3], size, row[4], row[5], row[6])
            )
    return lines, below


def listing(root, most):
    """The lines of `ls -lR` but the first, and whether they were cut at `most` or LISTING_BYTES."""
    lines, size, now, pending = [], 0, time.time(), ["."]
    while pending:
        relative = pending.pop()
        try:
            here, below = directory(root + relative[1:], now, most - len(lines))
        except OSError:  # no permission, or deeper than a path may be
            continue
        if relative != ".":
            here[:0] = ["", escape(relative) + ":"]
        for line in here:
            size += len(line)
            if len(lines) == most or size > LISTING_BYTES:
                return lines, True
            lines.append(line)
        pending.extend(relative + "/" + name for name in reversed(below))
    return lines, False


# -- start -------------------------------------------------------------------------------------------


def add_packages():
    """The image's packages, as `site` would add them; no .pth file is read, no customisation run."""
    import site

    site.ENABLE_USER_SITE = False
    packages = site.getsitepackages()
    environment = os.path.dirname(os.path.dirname(sys.executable))
    if os.path.exists(environment + "/pyvenv.cfg"):  # a virtual environment's, and not its base's
        packages = ["%s/lib/python%d.%d/site-packages" % (environment, *sys.version_info[:2])]
    sys.path.extend(path for path in packages if os.path.isdir(path))
    site.setquit()
    site.setcopyright()
    site.sethelper()


def warm_up():
    """One run of nothing, so that its page faults happen before somebody waits."""
    exec(compile("result = x + 1\nfor _ in range(3): f'{_}'", CODE_NAME, "exec"), {"x": 1})
    encode_result(loads('{"a": [1, 2.5, "x"]}'), 1 << 20)
    sys.stdout.reconfigure(line_buffering=True)  # what was printed before a kill must not be lost


def prctl(option, value):
    """Without `ctypes`, which takes 10 ms to import."""
    import _ctypes

    function = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")
    if _ctypes.call_function(function, (option, value, 0, 0, 0)) != 0:
        os._exit(71)


def set_dumpable(dumpable):
    """At 0 nobody of the same uid can look into this process, or at its descriptors, nor into its forks."""
    prctl(PR_SET_DUMPABLE, dumpable)


def die_first():
    """Lets a lack of memory take a run before its supervisor. Embedded, the server sees to it from outside."""
    if not MODE:
        return
    set_dumpable(1)  # else the file is root's
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(OOM_SCORE_ADJ)
    except OSError:
        pass  # then the largest process is taken, which is most likely the run's, too
    set_dumpable(0)


def is_parked():
    """Whether PID 1 is a supervisor that has left everything but the dead to us, or soon does."""
    end = time.monotonic() + PARK_WAIT_S
    while True:
        with open("/proc/1/comm", "rb", 0) as file:
            if file.read().rstrip(b"\n") == PARKED:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.005)


def freeze():
    # What lives now is never looked at again: no write, no copied page in the children. Collecting first would
    # cost each start 0.6 ms, and finds next to nothing.
    gc.freeze()


def main():
    if os.getpid() != 1 and not (MODE == BESIDE and is_parked()):
        sys.exit("the supervisor kills every process that it can see: it runs in a sandbox only")
    if MODE:
        sys.argv[1:] = []
        if hasattr(sys, "orig_argv"):
            sys.orig_argv[1:] = []
        set_dumpable(0)
    sys.dont_write_bytecode = True
    for name in ("LD_BIND_NOW", "MALLOC_TOP_PAD_"):  # they were for the start of this process
        os.environ.pop(name, None)
    os.umask(0o022)
    sys.modules.pop("linecache", None)  # Python 3.13 needs it for -c; its next import is to find the guest's source
    supervisor = Supervisor()
    add_packages()
    warm_up()
    freeze()
    supervisor.serve_forever()


MODE = sys.argv[1] if len(sys.argv) > 1 else ""
USERS, GROUPS = names_of("/etc/passwd"), names_of("/etc/group")
USERS[os.getuid()] = GROUPS[os.getgid()] = "sandbox"  # whatever the image or the engine calls us
main()
