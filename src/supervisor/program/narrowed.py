# Limits of one run, narrower than its sandbox's.

ROOM_BYTES = 8 * 1024 * 1024  # of memory, to tell of a run that had no more


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
