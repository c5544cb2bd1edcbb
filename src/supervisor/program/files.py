# Files: PID 1 does this itself, beside a run as well, as one small exchange at a time (see protocol.rs). It has the
# guest's uid, and opens nothing outside the workspace.

FILE_BYTES = 64 * 1024  # of content or entries in one exchange
ENTRY = struct.Struct(">BHQqQH")  # kind, mode, size, mtime in ns, inode number, length of the name that follows
MOST_HANDLES = 8  # far below MOST_DESCRIPTORS, with what else is open
MOST_REMOVED = 512  # entries in one exchange: a run's output and deadline wait that long
MOST_LEVELS = 16  # directories held open while a tree is removed
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
