# The supervisor's side of a run.

TIMEOUT, CANCELLED, CPU_EXCEEDED = 1, 2, 3
LOOK_AGAIN_S = 0.25  # whether a kernel is dead whose end of the pipe a fork of it holds open
LONGEST_POLL_S = 86400  # poll(2) takes milliseconds as an int, of which there are 24 days
LONE_S = 0.05  # a run that takes longer may have gone through all pids, and be at the same one again
CORES = os.cpu_count() or 1


class Run:
    """One run, from its task to its last byte."""

    def __init__(self, supervisor, nonce, options, pid):
        self.supervisor, self.nonce, self.options, self.pid = supervisor, nonce, options, pid
        self.status, self.cpu_us = None, 0
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
            self.status, self.cpu_us = ended
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
                for fd, _ in poller.poll(min(left, LONGEST_POLL_S) * 1000 + 1):
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
            cpu = cpu_time(self.pid)
            if cpu is not None:  # else it has ended already, and the forker tells
                self.is_leaving, self.status, self.cpu_us = True, 0, int(cpu * 1e6)

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
        except OSError:
            pass  # it has to read first, or it is dead, and about to be seen

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

    def has_surely_not_begun(self):
        """Of a kernel that is dead: it has not read all of its task, or has found that it cannot be interrupted. Its own
        word that it has begun may have been stopped by an earlier run.
        """
        unread = bool(self.task) or self.result.reset
        refused = os.WIFEXITED(self.status) and os.WEXITSTATUS(self.status) == UNINTERRUPTIBLE
        return not self.begun and (unread or refused)

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
