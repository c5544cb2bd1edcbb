# The supervisor: obeys the server, one frame after the other.

REPORT = struct.Struct(">iiBBBBQQ")  # see protocol.rs
CUT_STDOUT, CUT_STDERR, CUT_LISTING, CUT_RESULT, KERNEL_LOST = 1, 2, 4, 8, 16
EMPTY = b'["total 0"]'
REST_AFTER_MS = 2  # a sandbox that is busy has its next task sooner, and saves the warming
FORK_WAIT_S = 2.0  # for a forker, which a run may have stopped as it ended
KERNEL_WAIT_S = 0.5  # beside a kernel, which may do so at any time
ATTEMPTS = 3  # to begin a run, before the sandbox is given up
LEAVE_S = 1.0  # from a run's answer to the end of its process, which has nothing to do but to exit


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
        self.in_reach = False  # whether the interpreter that waits was in a kernel's reach, which may have stopped it
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
        self.in_reach = False
        if self.forker:  # first: at the end of its interpreter it would kill a kernel that it was not told to spare
            self.poller.unregister(self.forker.fd)
            self.forker.socket.close()
        if self.waiting:  # the old one's
            os.close(self.waiting.task)
            self.waiting.close()
            self.waiting = None
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
            run.deadline = begun + options["timeout_ms"] / 1000  # of both together
            run.wait()
            run.drain()
            if not run.forker_died:
                break
            self.lose_kernel()
            if run.why or not run.has_surely_not_begun():
                break
        send(nonce, DONE, *self.answer(run, time.monotonic() - begun, self.kernel_lost))
        self.kernel_lost = False
        if self.kernel:
            self.kernel.rest()
        self.waiting = self.waiting or self.next_interpreter()
        self.in_reach = True

    def next_interpreter(self):
        return self.forker.next(KERNEL_WAIT_S if self.kernel else FORK_WAIT_S)

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
        if self.in_reach:
            self.fork_anew()
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
        # The caps that an honest one keeps by itself.
        oversized = run.result.cut or (kind == RESULT and len(payload) > self.limits["result"])
        payload = b"" if oversized else payload
        extras = extras if len(extras) <= extras_cap(self.limits) else b""
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
            | oversized * CUT_RESULT
            | kernel_lost * KERNEL_LOST,
            self.memory.verdict() if killed else UNKNOWN,
            int(spent * 1e6),
            run.cpu_us,
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
