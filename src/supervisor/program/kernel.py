# The supervisor's side of an interpreter that stays between runs.

BETWEEN_BYTES = 64 * 1024  # of what a kernel prints between two runs, and never more than half of the cap


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
        self.identity = self.pid, stat_of(self.pid)[1]

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
