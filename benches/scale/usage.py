"""The processes of a server, and the CPU time and memory that they take."""

import collections, glob, os, re, socket, struct, time

import memory

TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK")


class Processes:
    """Of the server, of its sandboxes, of the engine, and of what the engine keeps beside each container."""

    def __init__(self, driver, server, instance):
        self.engine, self.shims = set(), set()
        if driver.name == "embedded":
            self.sandboxes = set(server.sandbox_pids())
        else:
            pids = driver.engine.pids(instance)
            driver.engine.close()  # it may not outlive the time until the next look
            self.sandboxes = memory.below(pids)
            self.shims = memory.below(pids, keeper=True) - self.sandboxes
            self.engine = memory.below([listener(driver.engine.path)]) - self.shims - self.sandboxes
        self.server = memory.below([server.process.pid]) - self.sandboxes

    def all(self):
        return self.server | self.sandboxes | self.engine | self.shims


def listener(path):
    """The process that listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        return struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


class Meter:
    """What these processes, and all that they have started since, take from one look to the next."""

    def __init__(self, pids):
        self.pids, self.before = set(pids), cpu_ns(pids)

    def cpu_ms(self):
        now = cpu_ns(memory.below(self.pids))
        spent, self.before = now - self.before, now
        return spent.total() / 1e6


def cpu_ms_per_s(groups, seconds):
    """Of each group of processes."""
    before, begun = [cpu_ns(pids) for pids in groups], time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - begun
    return [(cpu_ns(pids) - then).total() / 1e6 / spent for pids, then in zip(groups, before)]


def cpu_ns(pids):
    """Of each thread by the scheduler's own count, since of what is idle /proc/PID/stat sees no tick; of the children
    that have ended by that. A difference of two of these leaves out what has ended meanwhile."""
    found = collections.Counter()
    for pid in pids:
        for path in glob.glob("/proc/%d/task/*/schedstat" % pid):
            found[path] = int(first_line(path).split()[0])
        waited = first_line("/proc/%d/stat" % pid).rsplit(")", 1)[-1].split()[13:15]
        found[pid] = sum(map(int, waited)) * TICK_NS
    return found


def first_line(path):
    try:
        with open(path) as file:
            return file.readline()
    except OSError:
        return "0"  # it has ended


def available_mib():
    with open("/proc/meminfo") as file:
        return int(re.search(r"MemAvailable:\s+(\d+)", file.read())[1]) / 1024
