# Where a path of a request ends: each step is one name in a directory that is held open, and no call follows a
# symlink. `Place` reads symlinks and walks where they lead, where that is inside; what a guest swaps meanwhile is
# an error, or another place in its own workspace.

MOST_STEPS = 20_000  # into directories, on the way to one place: a tenth of a second
MOST_LINKS = 40  # symlinks on the way, as the kernel has it
ROOT = WORKSPACE.encode()
STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


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


def steps_of(path):
    """The names of a request's path, the first one last; the server has refused what is odd, and so do we."""
    names = path.split(b"/") if path else []
    if any(name in (b"", b".", b"..") or b"\0" in name for name in names):
        raise Refused("outside")
    return names[::-1]


class Refused(Exception):
    """An exchange that is refused, with the word for the reason."""
