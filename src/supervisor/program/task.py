# What an interpreter is given to do.

TASK = struct.Struct(">4I")  # the lengths of what follows: code, data, stdin, and narrower limits than the sandbox's
REST = b"\xff"  # ahead of a task, of which it is no beginning: nothing is to be done yet


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
