# PID 1 of every sandbox: keeps one interpreter forked in advance and hands it the code of the next run.
#
# The supervisor (PID 1) talks to the server, the forker holds the next interpreter ready, and the run's own process
# executes the guest's code. A session that asks for it has a kernel, too: an interpreter that stays between runs.
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
HELLO_ANSWER, DONE, OUTPUT = 129, 130, 131
HEADER = struct.Struct(">QBI")  # nonce, kind, length of the payload
OUTCOME = struct.Struct(">BII")  # what the run's process says of itself: kind, lengths of the payload and the extras
RESULT, ERROR = 1, 2
REPORT = struct.Struct(">iiBBBBQQQ")  # see protocol.rs
FORKED = struct.Struct("=i")  # what the forker says: the pid of an interpreter that waits, its descriptors beside it
DESCRIPTORS = struct.Struct("=4i")
ENDED = struct.Struct("=iQQ")  # then of the same one: wait status, CPU time in microseconds, minor page faults
KERNEL = struct.Struct("=iQ")  # what the forker is told: the pid of a kernel, and when it was started
NOTHING = -1
TIMEOUT, CANCELLED, CPU_EXCEEDED = 1, 2, 3
CUT_STDOUT, CUT_STDERR, CUT_LISTING, CUT_RESULT, KERNEL_LOST = 1, 2, 4, 8, 16
UNKNOWN, NOT_OUT_OF_MEMORY, OUT_OF_MEMORY = 0, 1, 2
PARK, BESIDE = "park", "beside"
PARKED = b"parked"  # the name of a PID 1 that is
PARKED_KERNEL = b"parked kernel"  # and of one that had a kernel, which nobody can talk to any more
EMPTY = b'["total 0"]'
LENGTH = struct.Struct(">I")
TASK = struct.Struct(">4I")  # the lengths of what follows: code, data, stdin, and narrower limits than the sandbox's
REST = b"\xff"  # ahead of a task, of which it is no beginning: nothing is to be done yet

WORKSPACE = "/workspace"
CODE_NAME = "<code>"  # the guest's code in its tracebacks
CELL_NAME = "<code %d>"  # and that of a kernel's runs, whose functions outlive them
SOURCES = 256  # of a kernel's runs, the last ones whose lines tracebacks show
ONLY_AST = 0x400  # as ast.PyCF_ONLY_AST
MOST_DESCRIPTORS = 64  # this file opens about 15
PR_SET_DUMPABLE, PR_SET_NAME = 4, 15
PARK_WAIT_S = 5.0  # for a PID 1 whose server has only just left
OOM_SCORE_ADJ = "900"  # of all but the supervisor, whose own comes from the engine
NICE = 10  # of all but the supervisor: a guest's fork bomb must not starve what is to stop it
REST_AFTER_MS = 2  # a sandbox that is busy has its next task sooner, and saves the warming
MOST_ENDED = 256  # children collected in one go
PLAIN_CHARACTERS = 10_000  # of a value as Python prints it
BETWEEN_BYTES = 64 * 1024  # of what a kernel prints between two runs, and never more than half of the cap
KERNEL_WAIT_S = 0.5  # for a forker beside a kernel, which may have stopped it
ROOM_BYTES = 8 * 1024 * 1024  # of memory, to tell of a run that had no more
ARTIFACT_BYTES = 100  # of each, beside its content
LOOK_AGAIN_S = 0.25  # whether a kernel is dead whose end of the pipe a fork of it holds open
MOST_STEPS = 20_000  # into directories, on the way to one place: a tenth of a second
ATTEMPTS = 3  # to begin a run, before the sandbox is given up
LEAVE_S = 1.0  # from a run's answer to the end of its process, which has nothing to do but to exit
LONE_S = 0.05  # a run that takes longer may have gone through all pids, and be at the same one again
LEAST_PIDS = 32768  # before they begin anew
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

    sources = {}

    def remember(self, name, source):
        self.sources[name] = source
        if len(self.sources) > SOURCES:
            forgotten = next(iter(self.sources))
            del self.sources[forgotten]
            if "linecache" in sys.modules:
                sys.modules["linecache"].cache.pop(forgotten, None)
        if "linecache" in sys.modules:
            sys.modules["linecache"].cache[name] = self.entry(name)

    def entry(self, name):
        """As Python counts lines, each with its end, as those of a file: carets are placed by it."""
        source = self.sources[name]
        lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return len(source), None, [line + "\n" for line in lines], name

    def find_spec(self, name, path=None, target=None):
        if name != "linecache":
            return None
        sys.meta_path.remove(self)
        spec = sys.modules["_frozen_importlib_external"].PathFinder.find_spec(name)
        execute = spec.loader.exec_module
        entries = {name: self.entry(name) for name in self.sources}

        class Loader:
            create_module = staticmethod(lambda spec: None)

            @staticmethod
            def exec_module(module):
                execute(module)
                module.cache.update(entries)

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


def packed(task):
    """The sections of a task, as `read_task` takes them apart."""
    return TASK.pack(*map(len, task)) + b"".join(task)


def read_task(fd, data=b""):
    """The sections of the task, once somebody gives it, whose beginning may have been read."""
    data = data or os.read(fd, 1 << 12)
    if not data:
        os._exit(0)  # the supervisor has no use for this process any more
    lengths = TASK.unpack_from(data)
    missing = TASK.size + sum(lengths) - len(data)
    if missing:
        parts = [data]
        while missing:
            parts.append(os.read(fd, min(missing, 1 << 20)))
            missing -= len(parts[-1])
        data = b"".join(parts)
    sections, at = [], TASK.size
    for length in lengths:
        sections.append(data[at : at + length])
        at += length
    return sections


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
    give_room()
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


def execute(code, scope, extras):
    """Runs the guest's code and what Python runs at its exit: threads to join, `atexit`."""
    try:
        try:
            exec(code, scope)
        except SystemExit as error:
            end_of(error)
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        extras.take_figures()  # which matplotlib drops at exit
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


def compiled(source, name, flags=0, mode="exec"):
    try:
        return compile(source, name, mode, flags, True)
    except (SyntaxError, ValueError) as error:
        raise failure_of(error, syntax=True)


def run_fresh(source, limits, extras):
    """A program of its own: the value of `result`, as JSON."""
    FINDER.remember(CODE_NAME, source)
    execute(compiled(source, CODE_NAME), SCOPE, extras)
    return encode_result(SCOPE.get("result"), limits["result"])


def outcome_of(source, data, limits, run=run_fresh):
    """Runs the code; gives the kind and the bytes that the result pipe carries, and the extras."""
    extras = Extras(limits["artifacts"])
    try:
        try:
            if data:
                SCOPE.update(variables(data))
            allow_digits(DIGITS)
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGINT])
            return RESULT, run(source, limits, extras), extras.encoded()
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
        return ERROR, dumps(detail).encode(), extras.encoded()


class Extras:
    """What an answer may hold beside the result: figures, and a value as a page would show it."""

    DISPLAYS = (
        ("text/html", "_repr_html_"),
        ("text/markdown", "_repr_markdown_"),
        ("text/latex", "_repr_latex_"),
        ("image/svg+xml", "_repr_svg_"),
        ("image/png", "_repr_png_"),
        ("image/jpeg", "_repr_jpeg_"),
    )

    def __init__(self, room):
        self.room = room  # bytes; without any there are no extras
        self.artifacts, self.display, self.cut = [], {}, False

    def fits(self, size):
        if size <= self.room:
            self.room -= size
            return True
        self.cut = True
        return False

    def take_figures(self):
        """The figures that are still open, as PNG."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if not pyplot or not self.room:
            return
        try:
            import io

            for number in pyplot.get_fignums():
                image = io.BytesIO()
                pyplot.figure(number).savefig(image, format="png")
                encoded = base64(image.getvalue())
                if self.fits(len(encoded) + ARTIFACT_BYTES):
                    name = "figure-%d.png" % number
                    self.artifacts.append({"name": name, "media_type": "image/png", "base64": encoded})
        except Exception:
            pass  # a picture that cannot be drawn is no failure of the run

    def close_figures(self):
        """So that an interpreter that stays shows each of them once."""
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")

    def show(self, value, anyhow):
        """A value by its own idea of how it looks; without one, `anyhow`, as Python prints it."""
        if not self.room:
            return
        shown = {}
        for media_type, method in self.DISPLAYS:
            try:
                look = getattr(type(value), method, None)
                drawn = look and look(value)
                if isinstance(drawn, (bytes, str)):
                    shown[media_type] = base64(drawn) if isinstance(drawn, bytes) else drawn
            except Exception:
                pass
        if shown or anyhow:
            try:
                shown["text/plain"] = repr(value)[:PLAIN_CHARACTERS]
            except Exception:
                pass
        for media_type, text in shown.items():
            text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no JSON
            if self.fits(len(dumps(text).encode()) - 2):  # as it is sent, without its quotes
                self.display[media_type] = text

    def encoded(self):
        parts = {"artifacts": self.artifacts, "display": self.display, "cut": self.cut}
        parts = {name: part for name, part in parts.items() if part}
        return dumps(parts).encode() if parts else b""


def base64(data):
    from binascii import b2a_base64

    return b2a_base64(data, newline=False).decode()


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
    if fd:
        os.dup2(fd, 0)
        os.close(fd)


def run_process(task, out, err, result, limits):
    """The whole life of a forked interpreter: wait for the task, run it, tell the outcome."""
    pid = os.getpid()
    os.setsid()
    os.dup2(out, 1), os.dup2(err, 2)  # 0 is the forker's own, which is empty
    low, high = (task, result) if task < result else (result, task)
    os.closerange(3, low), os.closerange(low + 1, high), os.closerange(high + 1, MOST_DESCRIPTORS)
    begun = os.read(task, 1 << 12)
    resting = begun[:1] == REST
    if resting:  # nobody waits: one who comes later shall not, either
        warm_up()
        begun = begun[1:]
    source, data, stdin, narrowed = read_task(task, begun)
    os.close(task)
    if stdin:
        feed(stdin)
    if narrowed:
        narrow(loads(narrowed.decode()))
    outcome = outcome_to_tell(source, data, limits, run_fresh)
    if os.getpid() == pid:  # and not a fork of the guest's that came to the end of the code
        write_all(result, outcome)
        if resting:
            let_answer()


def let_answer():
    """Lets the supervisor go first. Who writes to a pipe has its reader woken on the core that the writer is on, since
    the kernel takes it to sleep soon; and this process has its exit before it, a third of a millisecond. Of a busy
    sandbox the next interpreter waits for that exit, and with it the next run, so there it is better done at once.
    """
    os.sched_yield()


def outcome_to_tell(source, data, limits, run):
    try:
        kind, payload, extras = outcome_of(source.decode(), data.decode(), limits, run)
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
        flush()
    except KeyboardInterrupt:  # between two of the lines above; the supervisor knows why
        kind, payload, extras = ERROR, INTERRUPTED, b""
    except MemoryError:
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
        return FULL
    return OUTCOME.pack(kind, len(payload), len(extras)) + payload + extras


def narrow(limits, hard=True):
    """Less than the sandbox may, for this process and what it starts; but for a process that stays, for good."""
    import resource

    if "memory_bytes" in limits:
        old = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm", "rb", 0) as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        soft = at_most(mapped + limits["memory_bytes"], old)  # what the run itself maps
        room = (soft, at_most(soft + ROOM_BYTES, old)) if hard else (soft, old[1])
        Narrowed.undo = resource.setrlimit, resource.RLIMIT_AS, (room[1], room[1]) if hard else old
        resource.setrlimit(resource.RLIMIT_AS, room)
    if hard and "cpu_ms" in limits:  # the supervisor looks closer, but at this process only
        seconds = at_most(limits["cpu_ms"] // 1000 + 2, resource.getrlimit(resource.RLIMIT_CPU))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def at_most(value, bounds):
    """RLIM_INFINITY is -1 and bounds nothing."""
    return min([value] + [bound for bound in bounds if bound >= 0])


class Narrowed:
    undo = None  # a call and its arguments


def give_room():
    """Out of memory, there is none left to say so in; at the end of a run it is of no more use to the guest."""
    if Narrowed.undo:
        call, *arguments = Narrowed.undo
        Narrowed.undo = None
        call(*arguments)


# -- the kernel's own process ------------------------------------------------------------------------


def run_cell(source, limits, extras):
    """In the scope that stays: the value of `result` where this run sets it, else of a last expression, as JSON."""
    try:
        write_all(Cell.begun, BEGUN)
    except OSError:
        os._exit(70)  # an earlier run has closed it: this kernel cannot be interrupted any more
    Cell.number += 1
    name = CELL_NAME % Cell.number
    FINDER.remember(name, source)
    tree = compiled(source, name, ONLY_AST)
    last = tree.body[-1] if tree.body else None
    expression = None
    if type(last).__name__ == "Expr":
        import _ast

        tree.body.pop()
        expression = compiled(_ast.Expression(last.value), name, mode="eval")
    with Results():
        try:
            value = execute_cell(compiled(tree, name), expression)
            extras.take_figures()
        finally:
            extras.close_figures()
        if "result" in SCOPE:
            extras.show(SCOPE["result"], False)
            return encode_result(SCOPE["result"], limits["result"])
    return shown_result(value, limits, extras)


class Cell:
    """What a kernel knows of its runs."""

    number, begun = 0, None


def execute_cell(code, expression):
    try:
        exec(code, SCOPE)
        return eval(expression, SCOPE) if expression else None
    except SystemExit as error:
        end_of(error)
    except BaseException as error:
        raise failure_of(error)


def shown_result(value, limits, extras):
    """Of an expression: what JSON does not have is no failure, but only shown."""
    if value is None:
        return b"null"
    try:
        encoded = encode_result(value, limits["result"])
        extras.show(value, False)
        return encoded
    except Failure as failure:
        if failure.detail["kind"] == "result_too_large":
            raise
        extras.show(value, True)
        return b"null"


class Results:
    """Tells a `result` that this run sets from an earlier one's, which can be read all the same: as a builtin."""

    def __enter__(self):
        self.old = SCOPE.pop("result", self)
        if self.old is not self:
            BUILTINS.result = self.old

    def __exit__(self, *_):
        if self.old is not self:
            vars(BUILTINS).pop("result", None)
            SCOPE.setdefault("result", self.old)


BUILTINS = sys.modules["builtins"]
INTERRUPTED = b'{"kind":"raised","name":"KeyboardInterrupt","value":"","traceback":""}'
FULL = b'{"kind":"out_of_memory","name":"MemoryError","value":"","traceback":""}'
FULL = OUTCOME.pack(ERROR, len(FULL), 0) + FULL  # whole, since nothing can be made any more
BEGUN = b"\1"  # a kernel says so where nobody waits for it: from here on SIGINT is a KeyboardInterrupt


def kernel_process(channel, out, err, begun, limits):
    """The whole life of a kernel: one task after another in one scope, whose threads go on between them."""
    pid = os.getpid()
    os.setsid()
    os.dup2(out, 1), os.dup2(err, 2)
    os.close(out), os.close(err)
    Cell.begun = begun
    while True:
        ready = stands_in_ahead()
        source, data, stdin, narrowed = read_task(channel)
        if stdin or not ready:
            stand_in(stdin)
        if narrowed:
            narrow(loads(narrowed.decode()), hard=False)
        outcome = outcome_to_tell(source, data, limits, run_cell)
        if os.getpid() != pid:
            os._exit(0)  # a fork of the guest's that came to the end of the code
        give_room()
        write_all(channel, outcome)
        let_answer()


def stands_in_ahead():
    """For a run without input. Where the last run has left no way to do so the kernel dies with the next, not now: its
    answer is on its way."""
    try:
        stand_in(b"")
        return True
    except BaseException:
        return False


def stand_in(stdin):
    """A new standard input for each run: the last one's may be at its end."""
    if stdin:
        feed(stdin)
    else:
        null = os.open(os.devnull, os.O_RDONLY)
        if null:  # the guest has closed its own
            os.dup2(null, 0)
            os.close(null)
    sys.stdin = sys.__stdin__ = open(0, closefd=False, encoding="utf-8", errors="surrogateescape")




class Interpreter:
    """An interpreter forked in advance, waiting for its one task."""

    def __init__(self, pid, descriptors):
        self.pid, self.is_warm = pid, False
        self.task, self.out, self.err, self.result = descriptors
        for fd in (self.out, self.err, self.result):
            os.set_blocking(fd, False)

    def give(self, sections):
        """Hands over the task; False where the interpreter died waiting, and so has not begun it."""
        try:
            write_all(self.task, packed(sections))
            return True
        except BrokenPipeError:
            return False
        finally:
            os.close(self.task)

    def warm_up(self):
        self.is_warm = True
        try:
            os.write(self.task, REST)
        except BrokenPipeError:
            pass  # it is dead, which the next task finds out

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
    poller = select.poll()
    poller.register(socket, select.POLLIN)
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
        kernel = told_kernel(socket, poller)
        # All but PID 1, which collects them, and this process, which has children by clone(CLONE_PARENT).
        while MODE != BESIDE and kill_all(kernel):  # beside PID 1 the supervisor would be one of them, and kills itself
            end = end or time.monotonic() + REAP_S
            if time.monotonic() > end:
                os._exit(1)
            collect()
            time.sleep(0.0005)
        cpu_us = int((usage.ru_utime + usage.ru_stime) * 1e6)
        socket.send(ENDED.pack(status, cpu_us, usage.ru_minflt))


def told_kernel(socket, poller):
    """The kernel that is to be spared, as the supervisor told before the run."""
    kernel = None
    while poller.poll(0):
        data = socket.recv(KERNEL.size)
        if not data:
            os._exit(0)
        kernel = KERNEL.unpack(data)
    return kernel


def become_guest(*kept):
    """Lets go of all that is the supervisor's: its signals, its descriptors and its place before the guest's."""
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    # Held back until the run's process can raise KeyboardInterrupt, lest a short time be over unnoticed.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    os.nice(NICE)
    null = os.open(os.devnull, os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(null, target)
    low = 3
    for fd in sorted(kept) + [MOST_DESCRIPTORS]:
        os.closerange(low, fd)
        low = fd + 1
    die_first()  # which lets a guest look into this process: after it has let go of the server's stream


class Forker:
    """The supervisor's side of the process that forks."""

    def __init__(self, limits):
        self.socket, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                become_guest(theirs.fileno())
                prepare(limits)
                fork_forever(theirs, limits)
            finally:
                os._exit(70)
        theirs.close()
        self.fd = self.socket.fileno()

    def next(self, patience=None):
        """The interpreter that waits; None where the forker is dead, or slower than it may be."""
        if self.is_silent(patience):
            return None
        try:
            data, ancillary, _, _ = self.socket.recvmsg(FORKED.size, _socket.CMSG_SPACE(DESCRIPTORS.size))
        except ConnectionResetError:
            return None
        if not data:
            return None
        return Interpreter(*FORKED.unpack(data), DESCRIPTORS.unpack(ancillary[0][2]))

    def is_silent(self, patience):
        """Whether it says nothing for that long; without a patience it is waited for."""
        return patience and not select.select([self.fd], [], [], patience)[0]

    def spare(self, kernel):
        """At the end of the run that comes next."""
        try:
            self.socket.send(KERNEL.pack(*kernel.identity))
        except OSError:
            pass  # it is dead, and noticed

    def ended(self, patience=None):
        """How the last interpreter ended: wait status, CPU time, page faults; None where the forker is dead, or slower
        than it may be."""
        if self.is_silent(patience):
            return None
        try:
            data = self.socket.recv(ENDED.size)
        except ConnectionResetError:
            return None
        return ENDED.unpack(data) if data else None


# -- the supervisor ----------------------------------------------------------------------------------


class Capture:
    """Reads one of a run's pipes: keeps up to its cap, drops the rest, never stops reading."""

    def __init__(self, fd, cap, tell=None):
        self.fd, self.cap, self.parts, self.size, self.cut = fd, cap, [], 0, False
        self.tell = tell  # whom each part is told as it comes

    def read(self):
        """Reads once, so that a fast writer starves nobody: None where nothing is there, False at the end."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return None
        except ConnectionResetError:  # a kernel that died before it read its task
            return False
        room = self.cap - self.size
        if data and room:
            self.parts.append(data[:room])
            self.size += len(self.parts[-1])
            if self.tell:
                self.tell(self.parts[-1])
        if len(data) > room and not self.cut:
            self.cut = True
            if self.tell:
                self.tell(b"")  # nothing follows
        return bool(data)

    def empty(self):
        """Reads what is there: 16 reads empty a full pipe."""
        for _ in range(16):
            if not self.read():
                break

    def go_on(self, cap, tell):
        """For the next run, whose answer has what has come since the last one, up to half of what it may have."""
        old = self.bytes()
        self.cut = self.cut or len(old) > cap // 2
        old = old[: cap // 2]
        self.parts, self.size, self.cap, self.tell = [old], len(old), cap, tell
        if tell and old:
            tell(old)
        if tell and self.cut:
            tell(b"")

    def begin_anew(self, cap):
        self.parts, self.size, self.cut, self.tell = [], 0, False, None
        self.cap = min(cap // 2, BETWEEN_BYTES)

    def bytes(self):
        return b"".join(self.parts)


def first_frame(data):
    """The outcome that the run's process sent: kind, payload, extras; None where there is no whole one."""
    if len(data) < OUTCOME.size:
        return None
    kind, length, more = OUTCOME.unpack_from(data)
    end = OUTCOME.size + length
    payload, extras = data[OUTCOME.size : end], data[end : end + more]
    whole = len(payload) == length and len(extras) == more and kind in (RESULT, ERROR)
    return (kind, payload, extras) if whole else None


class Run:
    """One run, from its task to its last byte."""

    def __init__(self, supervisor, nonce, options, pid):
        self.supervisor, self.nonce, self.options, self.pid = supervisor, nonce, options, pid
        self.status, self.cpu_us, self.page_faults = None, 0, 0
        self.why = 0
        self.forker_died = self.killed = False
        self.since, self.wanted = time.monotonic(), None
        self.grace = supervisor.limits["grace_ms"] / 1000
        self.deadline = self.since + options["timeout_ms"] / 1000
        self.cpu_end = None
        if "cpu_ms" in options:
            self.cpu_end = (cpu_time(pid) or 0) + options["cpu_ms"] / 1000

    def cap(self, name):
        return min(self.supervisor.limits[name], self.options.get("output_bytes", 1 << 62))

    def teller(self, stream):
        """Where the client wants output as it comes."""
        if not self.options.get("stream"):
            return None
        return lambda data: send(self.nonce, OUTPUT, stream, data)

    def result_cap(self):
        limits = self.supervisor.limits
        return OUTCOME.size + max(limits["result"], 16 * limits["error"]) + extras_cap(limits)

    def interrupt(self, why):
        """Asks first, by SIGINT, for one of the reasons; `expire` follows with SIGKILL after the grace."""
        if not self.why:
            self.why = why
            self.deadline = time.monotonic() + self.grace
            self.signal()

    def signal(self):
        send_signal(self.pid, _signal.SIGINT)

    def expire(self):
        if not self.why:
            self.interrupt(TIMEOUT)
        else:
            self.killed = True
            self.kill()
            self.deadline = time.monotonic() + REAP_S

    def kill(self):
        kill_all(self.supervisor.kernel_identity())  # the forker, too

    def end(self, ended):
        """The forker's word on the run's process; where it has none it is dead, and everything else is to be."""
        if ended:
            self.status, self.cpu_us, self.page_faults = ended
        else:
            self.status, self.forker_died = _signal.SIGKILL, True

    def patience(self):
        """Seconds until something is due."""
        now = time.monotonic()
        if self.cpu_end is None or self.why:
            return self.deadline - now
        left = self.cpu_end - (cpu_time(self.pid) or 0)
        if left <= 0:
            self.interrupt(CPU_EXCEEDED)
            return self.deadline - now
        return min(self.deadline - now, max(left / CORES, 0.001))

    def wait(self):
        """Serves the run's pipes, signals and deadline until its process has ended."""
        self.supervisor.listen(self)
        poller = self.poller
        captures = {capture.fd: capture for capture in self.captures()}
        for fd in captures:
            poller.register(fd, select.POLLIN)
        try:
            while self.status is None:
                left = self.patience()
                if time.monotonic() >= self.deadline:
                    if self.killed:
                        os._exit(1)  # it outlives SIGKILL: the sandbox is of no more use
                    self.expire()
                    continue
                for fd, _ in poller.poll(left * 1000 + 1):
                    if fd in captures:
                        if captures[fd].read() is False:
                            poller.unregister(fd)
                            del captures[fd]
                        if fd == self.result.fd:
                            self.heard(fd in captures)
                    else:
                        self.serve(fd)
        finally:
            for fd in captures:
                poller.unregister(fd)

    def captures(self):
        return self.out, self.err, self.result

    def heard(self, more):
        """Something came on the result pipe, or its end did."""

    def is_whole(self):
        """Whether the outcome is here."""
        if self.wanted is None and self.result.size >= OUTCOME.size:
            _, length, extras = OUTCOME.unpack_from(self.result.bytes())
            self.wanted = OUTCOME.size + length + extras
        return self.wanted is not None and self.result.size >= self.wanted

    def outcome(self):
        return first_frame(self.result.bytes())

    def serve(self, fd):
        self.supervisor.serve(fd, self)

    def drain(self):
        """What is still in the pipes, now that nobody writes any more."""
        for capture in (self.out, self.err, self.result):
            capture.empty()


class FreshRun(Run):
    """In an interpreter of its own."""

    def __init__(self, supervisor, nonce, options, interpreter):
        super().__init__(supervisor, nonce, options, interpreter.pid)
        self.is_leaving = False
        self.out = Capture(interpreter.out, self.cap("stdout"), self.teller(b"\1"))
        self.err = Capture(interpreter.err, self.cap("stderr"), self.teller(b"\2"))
        self.result = Capture(interpreter.result, self.result_cap())
        self.poller = supervisor.poller

    def captures(self):
        """A kernel's as well, whose threads go on."""
        kernel = self.supervisor.kernel
        return super().captures() + ((kernel.out, kernel.err) if kernel else ())

    def heard(self, more):
        """An outcome that is whole is answered ahead of the end of its process, which takes longer than most runs.

        Only of a run that started nobody: what its children print or use is not known before they have ended.
        """
        whole = self.is_whole() and self.result.parts[0][0] in (RESULT, ERROR)
        if whole and self.status is None and not self.why and self.is_alone():
            cpu, faults = cpu_time(self.pid), page_faults(self.pid)
            if cpu is not None and faults is not None:  # else it has ended already, and the forker tells
                self.is_leaving, self.status = True, 0
                self.cpu_us, self.page_faults = int(cpu * 1e6), faults

    def end(self, ended):
        self.is_leaving = False
        super().end(ended)

    def kill_process(self):
        """It has nothing left to do; one that forged its outcome would go on beside its answer."""
        send_signal(self.pid, _signal.SIGKILL)

    def is_alone(self):
        """Whether no process and no thread was started since this one: pids go up by one."""
        return time.monotonic() < self.since + LONE_S and self.pid == last_pid()


class KernelRun(Run):
    """In the interpreter that stays, which may end in the middle of it."""

    def __init__(self, supervisor, nonce, options, kernel, task):
        super().__init__(supervisor, nonce, options, kernel.pid)
        self.kernel, self.task = kernel, memoryview(task)
        self.begun = self.signalled = False
        self.cpu_before = cpu_time(kernel.pid) or 0
        self.give()  # first: it runs while we prepare
        self.out, self.err, self.poller = kernel.out, kernel.err, kernel.poller
        self.out.go_on(self.cap("stdout"), self.teller(b"\1"))
        self.err.go_on(self.cap("stderr"), self.teller(b"\2"))
        self.result = Capture(kernel.channel.fileno(), self.result_cap())

    def give(self):
        """As much of the task as the kernel takes; a thread of it that holds everything up shall not hold us."""
        try:
            while self.task:
                self.task = self.task[self.kernel.channel.send(self.task[: 1 << 16]) :]
        except BlockingIOError:
            pass
        except OSError:
            self.task = b""  # it is dead, and about to be seen

    def patience(self):
        if self.kernel.status() is not None:
            self.lost()  # the pipe may be open all the same, in a fork of it
            return 0
        self.give()
        if self.why and not self.signalled:
            self.signal()
        patience = super().patience()  # which may interrupt
        soon = self.task or (self.why and not self.signalled)
        return min(patience, 0.001 if soon else LOOK_AGAIN_S)

    def signal(self):
        """Not before the code has begun, since a kernel at rest hears no SIGINT: `patience` tries again."""
        if self.has_begun():
            self.signalled = True
            super().signal()

    def has_begun(self):
        """Whether the code has: looked up only where it matters, since a word about it would wake us in each run."""
        self.begun = self.begun or self.kernel.has_begun()
        return self.begun

    def heard(self, more):
        if self.is_whole():
            self.status = 0
        elif self.result.cut or not more:
            self.lost()

    def lost(self):
        """The kernel is dead, and all that it had started is to be, too. After an outcome that is the next run's affair."""
        self.result.empty()
        if self.is_whole():
            self.status = 0
            return
        self.has_begun()
        self.kill()
        end = time.monotonic() + REAP_S
        while self.kernel.status() is None:
            if time.monotonic() > end:
                os._exit(1)
            collect()
            time.sleep(0.0005)
        self.status = self.kernel.status()

    def kill(self):
        self.forker_died = True
        kill_all()

    def drain(self):
        self.cpu_us = int(((cpu_time(self.pid) or self.cpu_before) - self.cpu_before) * 1e6)
        for capture in (self.out, self.err):
            capture.empty()


class Kernel:
    """The supervisor's side of an interpreter that stays between runs."""

    def __init__(self, limits):
        self.limits = limits
        self.channel, theirs = _socket.socketpair()
        (out_read, out), (err_read, err), (self.begun, begun) = os.pipe(), os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                become_guest(theirs.fileno(), out, err, begun)
                prepare(limits)
                kernel_process(theirs.fileno(), out, err, begun, limits)
            finally:
                os._exit(70)
        KERNELS[self.pid] = None
        theirs.close()
        os.close(out), os.close(err), os.close(begun)
        self.channel.setblocking(False)
        for fd in (out_read, err_read, self.begun):
            os.set_blocking(fd, False)
        self.out, self.err = Capture(out_read, limits["stdout"]), Capture(err_read, limits["stderr"])
        self.poller = select.poll()  # for its runs
        self.poller.register(0, select.POLLIN)
        self.identity = self.pid, stat_of(self.pid)[2]

    def status(self):
        """Its wait status; None while it lives."""
        return KERNELS[self.pid]

    def has_begun(self):
        """Whether the code of its run has, asked until it has."""
        try:
            return bool(os.read(self.begun, 1 << 16))
        except BlockingIOError:
            return False

    def rest(self):
        """Between runs: what it prints from now on comes with the next answer."""
        self.has_begun()  # of this run, if nobody asked
        self.out.begin_anew(self.limits["stdout"]), self.err.begin_anew(self.limits["stderr"])

    def watch(self):
        """Reads what it prints until the server says something; False where the kernel is of no more use."""
        poller, open_fds = select.poll(), {self.out.fd: self.out, self.err.fd: self.err}
        for fd in (0, self.channel.fileno(), *open_fds):
            poller.register(fd, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == 0:
                    return True
                if fd == self.channel.fileno():
                    return False  # it has ended, or says something that nobody asked for
                if open_fds[fd].read() is False:
                    poller.unregister(fd)

    def close(self):
        self.channel.close()
        os.close(self.out.fd), os.close(self.err.fd), os.close(self.begun)
        del KERNELS[self.pid]


KERNELS = {}  # wait statuses by pid, once they have ended
CORES = os.cpu_count() or 1


def extras_cap(limits):
    return limits["artifacts"] and limits["artifacts"] + 4096  # with their names


def cpu_time(pid):
    """Seconds of CPU that a process has used; None where it is gone."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # the clock that clock_getcpuclockid(3) names
    except OSError:
        return None


def contents(path):
    """Of a file in /proc: `open` takes 50 us longer, and somebody waits."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def open_load():
    """/proc/loadavg, which ends with the pid that this namespace gave last; None where it does not, or they are few."""
    try:
        enough = int(contents("/proc/sys/kernel/pid_max")) >= LEAST_PIDS
        return os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC) if enough else None
    except (OSError, ValueError):
        return None


def last_pid():
    return int(os.pread(LOAD, 64, 0).rpartition(b" ")[2]) if LOAD is not None else NOTHING


def stat_of(pid):
    """A process's parent, its minor page faults, and when it was started: with its pid, who it is."""
    fields = contents("/proc/%d/stat" % pid).rpartition(b")")[2].split()
    return int(fields[1]), int(fields[7]), int(fields[19])


def page_faults(pid):
    """None where the process is gone."""
    try:
        return stat_of(pid)[1]
    except (OSError, IndexError):
        return None


def send_signal(pid, signal):
    """Fine where the process has just ended."""
    try:
        os.kill(pid, signal)
    except ProcessLookupError:
        pass


def kill_all(kernel=None):
    """Kills every process but this one, and a kernel and its children; False where there was none."""
    try:
        if not kernel or not is_kernel(kernel):
            os.kill(-1, _signal.SIGKILL)
            return True
        os.kill(-1, _signal.SIGSTOP)  # from here on nobody forks
        return kill_all_but(family(kernel[0]))
    except ProcessLookupError:
        return False


def is_kernel(kernel):
    pid, started = kernel
    try:
        return stat_of(pid)[2] == started
    except (OSError, IndexError):
        return False


def family(pid):
    """A process with all that descends from it, and all others but PID 1 and this one."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (1, os.getpid()):
            try:
                parents[int(name)] = stat_of(int(name))[0]
            except (OSError, IndexError):
                pass  # it is gone
    members, before = {pid}, 0
    while len(members) > before:
        before = len(members)
        members |= {child for child, parent in parents.items() if parent in members}
    return members, parents.keys() - members


def kill_all_but(kin):
    kept, others = kin
    for pids, signal in ((others, _signal.SIGKILL), (kept, _signal.SIGCONT)):
        for pid in pids:
            send_signal(pid, signal)
    return bool(others)


def kill_until_nothing_is_left(kernel=None):
    end = time.monotonic() + REAP_S
    while kill_all(kernel):
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
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return False
            if pid in KERNELS:
                KERNELS[pid] = status
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
    prctl(PR_SET_NAME, PARKED_KERNEL if KERNELS else PARKED)
    while True:
        while collect():
            pass
        _signal.sigwait([_signal.SIGCHLD])


class Supervisor:
    greeted = False  # whether a server has said hello to this one
    kernel_lost = False  # since the last answer that said so

    def __init__(self):
        self.input = Input()
        self.backlog = []
        self.files = Files()
        self.empty_since = None
        self.limits = None
        self.forker = self.waiting = self.kernel = None
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
        """Obeys an interrupt of this run, and what is asked about files; keeps every other frame for later."""
        while True:
            frame = self.input.take()
            if frame is None:
                return
            if frame[1] == FILE:
                self.files.obey(frame[0], frame[2])
            elif frame[1] != INTERRUPT:
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
            kill_until_nothing_is_left(self.kernel_identity())
        enterable()
        try:
            self.forker = Forker(self.limits)
        except BlockingIOError:  # a kernel has all the processes that there may be
            if not self.kernel:
                raise
            self.forker = None
            return self.lose_kernel()
        self.poller.register(self.forker.fd, select.POLLIN)

    def hello(self, nonce, payload):
        self.files.close_all()
        self.limits = loads(split(payload)[0].decode())
        self.memory = MemoryGroup()
        Supervisor.greeted = True
        self.fork_anew()
        send(nonce, HELLO_ANSWER, dumps(posture()).encode())
        self.waiting = self.next_interpreter()

    def run(self, nonce, payload):
        options, *task = split(payload)
        del payload
        options = loads(options.decode())
        narrowed = {name: options[name] for name in ("memory_bytes", "cpu_ms") if name in options}
        task.append(dumps(narrowed).encode() if narrowed else b"")
        if options.get("kernel"):
            self.run_in_kernel(nonce, options, task)
        else:
            self.run_fresh(nonce, options, task)

    def run_fresh(self, nonce, options, task):
        interpreter = self.begin(task)
        run = FreshRun(self, nonce, options, interpreter)
        run.wait()
        spent = time.monotonic() - run.since
        if run.is_leaving:
            run.kill_process()
        else:
            self.clear_up(run)
        run.drain()
        send(nonce, DONE, *self.answer(run, spent))
        interpreter.close()
        if run.is_leaving:
            run.end(self.forker.ended(LEAVE_S))
            self.clear_up(run)
        self.waiting = self.next_interpreter()  # at once: descriptors under way count against a user of the host

    def clear_up(self, run):
        """After the end of its process: the forker has killed what it left behind, or is to be killed with it."""
        if run.forker_died or MODE == BESIDE:
            self.fork_anew()

    def run_in_kernel(self, nonce, options, task):
        if self.kernel and self.kernel.status() is not None:
            self.lose_kernel()
        begun = time.monotonic()
        task = packed(task)
        for _ in range(2):
            self.kernel = self.kernel or Kernel(self.limits)
            run = KernelRun(self, nonce, options, self.kernel, task)
            run.wait()
            run.drain()
            if not run.forker_died:
                break
            self.lose_kernel()
            if run.begun or run.why:
                break  # else the kernel was of no use before, and the code has not begun
        send(nonce, DONE, *self.answer(run, time.monotonic() - begun, self.kernel_lost))
        self.kernel_lost = False
        if self.kernel:
            self.kernel.rest()
        self.waiting = self.waiting or self.next_interpreter()

    def next_interpreter(self):
        return self.forker.next(self.kernel and KERNEL_WAIT_S)

    def lose_kernel(self):
        """Its variables are gone; which the next answer of one says."""
        self.kernel.close()
        self.kernel, self.kernel_lost = None, True
        kill_until_nothing_is_left()
        self.fork_anew()

    def kernel_identity(self):
        return self.kernel.identity if self.kernel else None

    def begin(self, task):
        """An interpreter that has the task. One that died waiting has not begun it, so another one may."""
        for attempt in range(ATTEMPTS):
            interpreter, self.waiting = self.waiting or self.next_interpreter(), None
            if self.kernel:
                self.forker.spare(self.kernel)
            if interpreter and interpreter.give(task):
                return interpreter
            if interpreter:
                interpreter.close()
            if attempt and self.kernel:
                self.lose_kernel()  # its processes may be all that there may be
            else:
                self.fork_anew()
        os._exit(1)

    def answer(self, run, spent, kernel_lost=False):
        kind, payload, extras = run.outcome() or (0, b"", b"")
        lines, cut = self.listing()
        killed = os.WIFSIGNALED(run.status) and os.WTERMSIG(run.status) == _signal.SIGKILL
        report = REPORT.pack(
            os.WEXITSTATUS(run.status) if os.WIFEXITED(run.status) else NOTHING,
            os.WTERMSIG(run.status) if os.WIFSIGNALED(run.status) else NOTHING,
            kind,
            run.why,
            run.out.cut * CUT_STDOUT
            | run.err.cut * CUT_STDERR
            | cut * CUT_LISTING
            | run.result.cut * CUT_RESULT
            | kernel_lost * KERNEL_LOST,
            self.memory.verdict() if killed else UNKNOWN,
            int(spent * 1e6),
            run.cpu_us,
            run.page_faults,
        )
        return report, payload, run.out.bytes(), run.err.bytes(), lines, extras

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
            self.rest()
            if self.kernel and not self.kernel.watch():
                self.lose_kernel()
                self.waiting = self.next_interpreter()
                continue
            self.input.fill()

    def rest(self):
        """Has the interpreter that waits warm up, once it is clear that its task is not just coming."""
        if self.waiting and not self.waiting.is_warm and not self.poller.poll(REST_AFTER_MS):
            self.waiting.warm_up()

    def serve_forever(self):
        while True:
            self.obey(*self.next_frame())

    def obey(self, nonce, kind, payload):
        if kind == HELLO:
            self.hello(nonce, payload)
        elif kind == RUN:
            self.run(nonce, payload)
        elif kind == FILE:
            self.files.obey(nonce, payload)


# -- files -------------------------------------------------------------------------------------------
#
# PID 1 does this itself, beside a run as well, as one small exchange at a time (see protocol.rs). It has the
# guest's uid, and opens nothing outside the workspace: each step is one name in a directory that is held open,
# and no call follows a symlink. `Place` reads symlinks and walks where they lead, where that is inside; what a
# guest swaps meanwhile is an error, or another place in its own workspace.


FILE, FILE_ANSWER = 4, 132
FILE_BYTES = 64 * 1024  # of content or entries in one exchange
ENTRY = struct.Struct(">BHQqQH")  # kind, mode, size, mtime in ns, inode number, length of the name that follows
MOST_HANDLES = 8  # far below MOST_DESCRIPTORS, with what else is open
MOST_LINKS = 40  # symlinks on the way, as the kernel has it
MOST_REMOVED = 512  # entries in one exchange: a run's output and deadline wait that long
MOST_LEVELS = 16  # directories held open while a tree is removed
ROOT = WORKSPACE.encode()
STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a lease of the guest's is refused, not waited for
NO_SPACE = 28, 122, 27  # ENOSPC, EDQUOT, EFBIG
WORDS = {
    1: "denied",
    2: "not_found",
    6: "not_a_file",  # ENXIO: a socket
    11: "denied",  # EAGAIN: a lease
    13: "denied",
    17: "exists",
    20: "not_a_directory",
    21: "is_directory",
    36: "name_too_long",
    40: "outside",  # ELOOP: a symlink, swapped in after the look
}


class Refused(Exception):
    """An exchange that is refused, with the word for the reason."""


def available():
    """Bytes that the workspace still takes."""
    left = os.statvfs(WORKSPACE)
    return left.f_bavail * left.f_frsize


def refusal(error):
    """What the server is told of an error: a word of the protocol."""
    if isinstance(error, Refused):
        word = error.args[0]
    else:
        errno = getattr(error, "errno", None)
        word = "no_space" if errno in NO_SPACE else WORDS.get(errno, "failed")
    return {"error": word, "available_bytes": available()} if word == "no_space" else {"error": word}


def kind_of(mode):
    if _stat.S_ISREG(mode):
        return 0
    return 1 if _stat.S_ISDIR(mode) else 2 if _stat.S_ISLNK(mode) else 3


def mtime_ns(status):
    """A guest may set any; 64 bits end in the year 2262."""
    return max(-(1 << 63), min(status.st_mtime_ns, (1 << 63) - 1))


def facts_of(status):
    return {
        "kind": kind_of(status.st_mode),
        "mode": _stat.S_IMODE(status.st_mode),
        "size": status.st_size,
        "mtime_ns": mtime_ns(status),
        "inode": status.st_ino,
    }


def check_regular(status):
    """Whatever else there is blocks, or is no bytes."""
    if _stat.S_ISDIR(status.st_mode):
        raise Refused("is_directory")
    if not _stat.S_ISREG(status.st_mode):
        raise Refused("not_a_file")


def steps_of(path):
    """The names of a request's path, the first one last; the server has refused what is odd, and so do we."""
    names = path.split(b"/") if path else []
    if any(name in (b"", b".", b"..") or b"\0" in name for name in names):
        raise Refused("outside")
    return names[::-1]


class Place:
    """Where a path ends: a directory that is held open, and a name in it.

    `make` makes the directories on the way; without `follow` a symlink at the end is the place itself.
    """

    def __init__(self, path, make=False, follow=True):
        self.above, self.make, self.steps_left = [], make, MOST_STEPS
        self.fd, self.name = os.open(WORKSPACE, STEP), b"."
        try:
            self.walk(steps_of(path), follow)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)

    def walk(self, pending, follow):
        links = 0
        while pending:
            name = pending.pop()
            target = self.link_at(name) if pending or follow else None
            if name == b"..":
                self.leave()
            elif target is not None:
                links += 1
                if links > MOST_LINKS:
                    raise Refused("outside")
                pending += [step for step in self.inside(target).split(b"/") if step not in (b"", b".")][::-1]
            elif pending:
                self.enter(name)
            else:
                self.name = name

    def link_at(self, name):
        """Where a symlink leads; None for all that is none."""
        try:
            return os.readlink(name, dir_fd=self.fd)
        except OSError:
            return None

    def inside(self, target):
        """A symlink's target as seen from the directory that is open."""
        if not target.startswith(b"/"):
            return target
        if target != ROOT and not target.startswith(ROOT + b"/"):
            raise Refused("outside")
        self.stand_at([])
        return target[len(ROOT) :]

    def leave(self):
        if not self.above:
            raise Refused("outside")
        self.stand_at(self.above[:-1])  # not by "..", which leads wherever the directory is by now

    def stand_at(self, names):
        fd = os.open(WORKSPACE, STEP)
        os.close(self.fd)
        self.fd, self.above = fd, []
        for name in names:
            self.enter(name)

    def enter(self, name):
        self.steps_left -= 1
        if self.steps_left < 0:
            raise Refused("outside")  # a maze of symlinks: others wait for us
        try:
            fd = os.open(name, STEP, dir_fd=self.fd)
        except FileNotFoundError:
            if not self.make:
                raise
            os.mkdir(name, 0o755, dir_fd=self.fd)
            fd = os.open(name, STEP, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = fd
        self.above.append(name)

    def status(self):
        return os.stat(self.name, dir_fd=self.fd, follow_symlinks=False)

    def open(self, flags):
        return os.open(self.name, flags, dir_fd=self.fd)

    def take(self, make):
        """Puts here what `make` makes under a name, in one step where something is here already; True where
        nothing was."""
        try:
            make(self.name, self.fd)
            return True
        except FileExistsError:
            if _stat.S_ISDIR(self.status().st_mode):
                raise Refused("is_directory")
        aside = b".codesandbox-%x" % time.monotonic_ns()
        make(aside, self.fd)
        try:
            os.rename(aside, self.name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError:
            os.unlink(aside, dir_fd=self.fd)
            raise
        return False


class Files:
    """The exchanges about files, each by its word; what is open is known by numbers that the server chose."""

    def __init__(self):
        self.handles = {}

    def obey(self, nonce, payload):
        try:
            options, path, data = split(payload)
            options = loads(options.decode())
            facts, data = getattr(self, "do_" + options["op"])(path, data, options)
        except Exception as error:  # whatever a guest or a client has thought of: this is PID 1
            facts, data = refusal(error), b""
        send(nonce, FILE_ANSWER, dumps(facts).encode(), data)

    def close_all(self):
        """Another server is here, which knows nothing of them."""
        for handle in list(self.handles):
            os.close(self.handles.pop(handle))

    def check_room(self):
        if len(self.handles) >= MOST_HANDLES:
            raise Refused("busy")

    def fd_of(self, options):
        try:
            return self.handles[options["handle"]]
        except KeyError:
            raise Refused("closed")

    def do_stat(self, path, data, options):
        with Place(path) as place:
            return facts_of(place.status()), b""

    def do_list(self, path, after, options):
        """The entries of one directory that come after a name, by their bytes, as many as fit."""
        with Place(path) as place:
            fd = place.open(READ | os.O_DIRECTORY)
        try:
            entries, size = [], 0
            for name in sorted(name for name in map(os.fsencode, os.listdir(fd)) if name > after):
                try:
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                size += ENTRY.size + len(name)
                if size > FILE_BYTES:
                    return {"more": True}, b"".join(entries)
                facts = facts_of(status)
                numbers = facts["kind"], facts["mode"], facts["size"], facts["mtime_ns"], facts["inode"]
                entries.append(ENTRY.pack(*numbers, len(name)) + name)
            return {}, b"".join(entries)
        finally:
            os.close(fd)

    def do_target(self, path, data, options):
        with Place(path, follow=False) as place:
            return {}, os.readlink(place.name, dir_fd=place.fd)

    def do_open(self, path, data, options):
        self.check_room()
        with Place(path) as place:
            check_regular(place.status())  # a FIFO is not even opened: somebody may wait for that
            fd = place.open(READ)
        status = os.fstat(fd)
        try:
            check_regular(status)
        except Refused:
            os.close(fd)
            raise
        self.handles[options["handle"]] = fd
        return facts_of(status), b""

    def do_read(self, path, data, options):
        return {}, os.pread(self.fd_of(options), min(options["length"], FILE_BYTES), options["offset"])

    def do_create(self, path, data, options):
        """A file without a name: whoever dies, nothing of it is left."""
        self.check_room()
        try:
            with Place(path) as place:
                check_regular(place.status())
        except FileNotFoundError:
            pass  # so it is to be made
        if options["size"] > available():
            raise Refused("no_space")
        fd = os.open(WORKSPACE, os.O_TMPFILE | os.O_WRONLY, 0o600)
        self.handles[options["handle"]] = fd
        return {}, b""

    def do_write(self, path, data, options):
        try:
            write_all(self.fd_of(options), data)
        except OSError:
            self.do_close(path, data, options)  # what it took is available again
            raise
        return {}, b""

    def do_commit(self, path, data, options):
        fd = self.fd_of(options)
        os.fchmod(fd, options["mode"])
        if "mtime_ns" in options:
            os.utime(fd, ns=(options["mtime_ns"], options["mtime_ns"]))
        source = "/proc/self/fd/%d" % fd
        with Place(path, make=True) as place:
            created = place.take(lambda name, at: os.link(source, name, dst_dir_fd=at, follow_symlinks=True))
        facts = facts_of(os.fstat(fd))
        facts["created"] = created
        self.do_close(path, data, options)
        return facts, b""

    def do_close(self, path, data, options):
        fd = self.handles.pop(options["handle"], None)
        if fd is not None:
            os.close(fd)
        return {}, b""

    def do_make(self, path, data, options):
        with Place(path, make=True) as place:
            try:
                os.mkdir(place.name, 0o755, dir_fd=place.fd)
            except FileExistsError:
                if not _stat.S_ISDIR(place.status().st_mode):
                    raise
        return {}, b""

    def do_link(self, path, target, options):
        """A symlink, where it leads to somewhere inside: up first, and then down only, lest a link leads it astray."""
        with Place(path, make=True, follow=False) as place:
            steps = [step for step in target.split(b"/") if step not in (b"", b".")]
            up = steps.count(b"..")
            if target.startswith(b"/") or b"\0" in target or b".." in steps[up:] or up > len(place.above):
                raise Refused("outside")
            place.take(lambda name, at: os.symlink(target, name, dir_fd=at))
        return {}, b""

    def do_remove(self, path, data, options):
        """A file, or so much of a directory as one exchange may take: `more` where something is left."""
        with Place(path, follow=False) as place:
            try:
                os.unlink(place.name, dir_fd=place.fd)
                return {}, b""
            except IsADirectoryError:
                top = place.open(STEP)
            try:
                self.clear(top, top, 1, MOST_REMOVED)
            finally:
                os.close(top)
            try:
                os.rmdir(place.name, dir_fd=place.fd)
            except OSError as error:
                if error.errno != 39:  # ENOTEMPTY
                    raise
                return {"more": True}, b""
        return {}, b""

    def clear(self, directory, top, level, left):
        """Empties a directory; gives how many entries may still be removed. What is too deep is moved up."""
        fd = os.open(".", READ | os.O_DIRECTORY, dir_fd=directory)
        try:
            names = os.listdir(fd)
        finally:
            os.close(fd)
        for name in names:
            if not left:
                return 0
            left -= 1
            try:
                os.unlink(name, dir_fd=directory)
                continue
            except IsADirectoryError:
                pass
            if level == MOST_LEVELS:
                aside = ".codesandbox-%x" % time.monotonic_ns()
                os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=top)
                continue
            below = os.open(name, STEP, dir_fd=directory)
            try:
                left = self.clear(below, top, level + 1, left)
            finally:
                os.close(below)
            if left:
                os.rmdir(name, dir_fd=directory)
        return left


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
    Extras(0).encoded()
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
            name = file.read().rstrip(b"\n")
        if name in (PARKED, PARKED_KERNEL):
            Supervisor.kernel_lost = name == PARKED_KERNEL
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
LOAD = open_load()
USERS, GROUPS = names_of("/etc/passwd"), names_of("/etc/group")
USERS[os.getuid()] = GROUPS[os.getgid()] = "sandbox"  # whatever the image or the engine calls us
main()
