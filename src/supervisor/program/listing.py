# The workspace as `ls -lR` prints it.

LISTING_BYTES = 512 * 1024  # a name may be 255 bytes of escapes, so lines alone are no bound


def enterable():
    """The workspace's status. A run may take away everybody's rights to it: the next one is to have them."""
    status = os.stat(WORKSPACE)
    if status.st_mode & 0o700 == 0o700:
        return status
    os.chmod(WORKSPACE, 0o700)
    return os.stat(WORKSPACE)


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


def directory(path, now, most):
    """The first lines of one directory, and its subdirectories' names. Describing is what takes time."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # A kernel's thread may put symlinks on the way meanwhile, and this process sees what no guest may.
        if os.readlink("/proc/self/fd/%d" % fd) != path:
            raise NotADirectoryError(path)
        return rows_of(fd, now, most)
    finally:
        os.close(fd)


def rows_of(fd, now, most):
    with os.scandir(fd) as entries:
        entries = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: os.fsencode(e.name))
    rows, below, blocks = [], [], 0
    for entry in entries:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        blocks += status.st_blocks
        if len(rows) < most:
            rows.append(describe(fd, entry, status, now))
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


def describe(fd, entry, status, now):
    name = escape(entry.name)
    if entry.is_symlink():
        try:
            name += " -> " + escape(os.readlink(entry.name, dir_fd=fd))
        except OSError:
            pass
    owner = USERS.get(status.st_uid, str(status.st_uid))
    group = GROUPS.get(status.st_gid, str(status.st_gid))
    mode = _stat.filemode(status.st_mode)
    return mode, str(status.st_nlink), owner, group, str(status.st_size), when(status.st_mtime, now), name


def when(seconds, now):
    recent = now - 15778476 < seconds <= now + 60  # half a Gregorian year, as GNU ls has it
    try:
        return time.strftime("%b %e %H:%M" if recent else "%b %e  %Y", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return str(int(seconds))


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


USERS, GROUPS = names_of("/etc/passwd"), names_of("/etc/group")
USERS[os.getuid()] = GROUPS[os.getgid()] = "sandbox"  # whatever the image or the engine calls us
