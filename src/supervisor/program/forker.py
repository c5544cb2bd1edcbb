# The forker.
#
# After a fork the first write to each page costs its copy, in both processes: 3.5 us each where this was
# measured, and the supervisor writes to 150 in a run. So it forks one process that does nothing but fork and
# touches fewer; and that works while the supervisor answers. A guest can kill the forker or stop it, since
# they have one uid: that run has failed then, and there is a new forker.

FORKED = struct.Struct("=i")  # what the forker says: the pid of an interpreter that waits, its descriptors beside it
DESCRIPTORS = struct.Struct("=4i")
ENDED = struct.Struct("=iQ")  # then of the same one: wait status, CPU time in microseconds
KERNEL = struct.Struct("=iQ")  # what the forker is told: the pid of a kernel, and when it was started
NICE = 10  # of all but the supervisor: a guest's fork bomb must not starve what is to stop it


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


class Forker:
    """The supervisor's side of the process that forks."""

    def __init__(self, limits):
        self.socket, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                become_guest(theirs.fileno(), LOAD)
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
        """How the last interpreter ended: wait status and CPU time; None where the forker is dead, or slower than it
        may be."""
        if self.is_silent(patience):
            return None
        try:
            data = self.socket.recv(ENDED.size)
        except ConnectionResetError:
            return None
        return ENDED.unpack(data) if data else None


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
        status, cpu_us = end_of_process(pid)
        end = None
        kernel = told_kernel(socket, poller)
        # All but PID 1, which collects them, and this process, which has children by clone(CLONE_PARENT).
        while MODE != BESIDE and kill_all(kernel):  # beside PID 1 the supervisor would be one of them, and kills itself
            end = end or time.monotonic() + REAP_S
            if time.monotonic() > end:
                os._exit(1)
            collect()
            time.sleep(0.0005)
        socket.send(ENDED.pack(status, cpu_us))
        unbury()
        open_up()


def unbury():
    """What a run has sent through sockets that hold each other is nobody's, and still there, with its memory and its
    locks, until the kernel looks for such; which it does when any socket of that kind is closed.
    """
    for end in _socket.socketpair():
        end.close()


def open_up():
    """Everybody's directories belong to the guest where nobody else has an id, and it may have closed them."""
    for path in ("/tmp", "/dev/shm"):
        try:
            if os.stat(path).st_mode & 0o777 != 0o777:
                os.chmod(path, 0o1777)
        except OSError:
            pass  # an image without one, or somebody else's


def end_of_process(pid):
    """Waits for the end of an interpreter: its wait status, and CPU time in microseconds, with that of its children.

    `wait4` imports a module for what it returns, which each later interpreter would map, and most have no children.
    """
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    if last_pid() != pid:
        _, status, usage = os.wait4(pid, 0)
        return status, int((usage.ru_utime + usage.ru_stime) * 1e6)
    seconds = cpu_time(pid) or 0
    return os.waitpid(pid, 0)[1], int(seconds * 1e6)


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
    """Lets go of all that is the supervisor's: its signals, its descriptors and its place before the guest's.

    One that is to be kept may be None.
    """
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    # Held back until the run's process can raise KeyboardInterrupt, lest a short time be over unnoticed.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    os.nice(NICE)
    null = os.open(os.devnull, os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(null, target)
    low = 3
    for fd in sorted(filter(None, kept)) + [MOST_DESCRIPTORS]:
        os.closerange(low, fd)
        low = fd + 1
    die_first()  # which lets a guest look into this process: after it has let go of the server's stream
