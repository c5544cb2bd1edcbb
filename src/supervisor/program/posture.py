# What the sandbox looks like from inside.

UNKNOWN, NOT_OUT_OF_MEMORY, OUT_OF_MEMORY = 0, 1, 2


def posture():
    """The facts that the server compares with what it asked the engine for."""
    facts = {"python": "%d.%d.%d" % sys.version_info[:3], "pid": os.getpid(), "beside": MODE == BESIDE}
    facts.update(uid=os.getuid(), gid=os.getgid(), groups=os.getgroups())
    try:
        with open("/proc/self/status", "rb", 0) as file:
            lines = dict(line.split(b":\t", 1) for line in file.read().split(b"\n") if b":\t" in line)
    except OSError:  # gVisor has none
        return facts
    for name in ("NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapBnd"):
        if name.encode() in lines:
            facts[name] = lines[name.encode()].strip().decode()
    return facts


class MemoryGroup:
    """The control group's own count of processes that it killed for want of memory, where it can be seen."""

    FILES = "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"  # version 2, version 1

    def __init__(self):
        self.kills = self.count()

    def count(self):
        for path in self.FILES:
            try:
                with open(path, "rb", 0) as file:
                    for line in file.read().split(b"\n"):
                        name, _, value = line.partition(b" ")
                        if name == b"oom_kill":
                            return int(value)
            except OSError:
                pass
        return None

    def verdict(self):
        """Of a process that was killed: whether for want of memory."""
        before, self.kills = self.kills, self.count()
        if before is None or self.kills is None:
            return UNKNOWN
        return OUT_OF_MEMORY if self.kills > before else NOT_OUT_OF_MEMORY
