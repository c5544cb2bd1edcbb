# The run's own process.
#
# What is touched for the first time here costs a page's copy each run, so the forker prepares what it can.

allow_digits = getattr(sys, "set_int_max_str_digits", lambda most: None)  # 3.8.14, 3.9.14, 3.10.7 and newer
DIGITS = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0
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


def run_process(task, out, err, result, limits):
    """The whole life of a forked interpreter: wait for the task, run it, tell the outcome."""
    pid = os.getpid()
    os.setsid()
    os.dup2(out, 1), os.dup2(err, 2)
    os.close(0), os.open(os.devnull, os.O_RDONLY)  # its own: flags and locks of the forker's would stay
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


def outcome_of(source, data, limits, run):
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


def run_fresh(source, limits, extras):
    """A program of its own: the value of `result`, as JSON."""
    FINDER.remember(CODE_NAME, source)
    execute(compiled(source, CODE_NAME), SCOPE, extras)
    return encode_result(SCOPE.get("result"), limits["result"])


def warm_up():
    """One run of nothing, so that its page faults happen before somebody waits."""
    exec(compile("result = x + 1\nfor _ in range(3): f'{_}'", CODE_NAME, "exec"), {"x": 1})
    encode_result(loads('{"a": [1, 2.5, "x"]}'), 1 << 20)
    Extras(0).encoded()
    sys.stdout.reconfigure(line_buffering=True)  # what was printed before a kill must not be lost


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
