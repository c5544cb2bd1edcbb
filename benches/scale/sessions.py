"""What sessions cost that sleep, and what one user who is awake notices of them."""

import dataclasses, os, time

import memory
from engines import EMBEDDED_PYTHON
from growth import Growth, each_time
from measure import Client, p50_ms, timed
from pool import PAUSE_S, connected, delete, percentile_ms, serving
from usage import Processes, available_mib, cpu_ms_per_s

INSTANCE = "bench-scale-%d" % os.getpid()
SETTINGS = ("pool.size=0", "session.idle_timeout=2h", "embedded.python=" + EMBEDDED_PYTHON)
REST_S = 2  # after sessions were made, and after the last run, before something else is measured
IDLE_LEAST = 5  # ms of CPU time in a second: less than that is next to nothing, whatever its slope


@dataclasses.dataclass
class Step:
    """At one number of live sessions; memory in MiB, CPU time in ms per second, the rest in ms."""

    sessions: int
    each: float  # PSS of a sandbox's processes
    engine_each: float  # and of its shim
    machine_each: float  # what the machine has less of, whoever took it; the kernel, too
    server: float
    idle: float  # server and sandboxes
    engine_idle: float
    make: float
    remove: float
    least_make: float
    least_remove: float
    p50: float
    p99: float
    alone_p50: float
    alone_p99: float


COLUMNS = (
    ("live", "%5d", "sessions"), ("sandbox", "%8.2f", "each"), ("shim", "%6.2f", "engine_each"),
    ("machine", "%8.2f", "machine_each"), ("server", "%7.1f", "server"), ("idle", "%7.2f", "idle"),
    ("engine", "%7.2f", "engine_idle"), ("make", "%7.1f", "make"), ("remove", "%7.1f", "remove"),
    ("p50", "%6.2f", "p50"), ("p99", "%6.2f", "p99"), ("alone:", "%7.2f", "alone_p50"), ("p99", "%6.2f", "alone_p99"),
)
UNITS = "MiB of each: sandbox, shim, machine; MiB: server; CPU, ms in a second: idle, engine; the others in ms"


class Amounts:
    def __init__(self, quick):
        self.steps = {"embedded": (1, 30, 100, 300), "docker": (1, 20, 50)} if quick else {
            "embedded": (1, 10, 100, 300, 1000), "docker": (1, 10, 50, 100, 200)
        }
        self.idle_s = 5 if quick else 15
        self.rounds, self.runs = (3, 100) if quick else (6, 100)
        self.news = 5 if quick else 10


def measure(driver, quick):
    """The steps. While they are measured a second server with one session takes turns with the first: what the machine
    did to a user meanwhile."""
    amounts = Amounts(quick)
    counts = amounts.steps[driver.name]
    available = available_mib()
    # Docker's list of containers is looked at exactly once while idleness is measured.
    settings = (*SETTINGS, "session.max=%d" % (counts[-1] + 8), "pool.reconcile_period=%ds" % amounts.idle_s)
    print("\n%s: sessions that sleep. %s" % (driver.name, UNITS))
    print(" ".join(name.rjust(len(form % 0)) for name, form, _ in COLUMNS) + "  p99 to 1 session's, to alone")
    steps = []
    with serving(driver, *settings, instance=INSTANCE) as server:
        with serving(driver, *SETTINGS, "pool.reconcile_period=1h", instance=INSTANCE + "-alone") as alone:
            for live, count in zip((0, *counts), counts):
                come(server, range(live, count))
                steps.append(step(driver, server, alone, count, available, amounts))
                tell(steps[-1], steps[0])
        begun = time.monotonic()
    print("the end of the server with %d sessions: %.1f s" % (counts[-1], time.monotonic() - begun))
    return steps


def tell(step, first):
    row = " ".join(form % getattr(step, field) for _, form, field in COLUMNS)
    print("%s  %.2f, %.2f" % (row, step.p99 / first.p99, step.p99 / step.alone_p99), flush=True)


def come(server, numbers):
    for number in numbers:
        client = Client(server, "user%d" % number)
        client.run()
        client.stop()


def step(driver, server, alone, count, available, amounts):
    time.sleep(REST_S)
    ours, theirs = take_turns(connected(server, "user0"), connected(alone, "user0"), amounts)
    time.sleep(REST_S)
    found = Processes(driver, server, INSTANCE)
    machine = available - available_mib()
    idle, engine_idle = cpu_ms_per_s([found.server | found.sandboxes, found.engine | found.shims], amounts.idle_s)
    make, remove = come_and_go(server, amounts.news)
    return Step(
        count, memory.mib(found.sandboxes) / count, memory.mib(found.shims) / count, machine / count,
        memory.mib(found.server), idle, engine_idle, p50_ms(make), p50_ms(remove), min(make) * 1000, min(remove) * 1000,
        p50_ms(ours), percentile_ms(ours, 99), p50_ms(theirs), percentile_ms(theirs, 99),
    )


def come_and_go(server, count):
    """The times of new users' first runs, for whom nothing was made ahead, and of the removal of their sessions."""
    first, removed = [], []
    for number in range(count):
        client = connected(server, "new%d" % number)
        first += timed(client, 1, 0)
        client.stop()
        time.sleep(PAUSE_S)
        begun = time.perf_counter()
        delete(server, "new%d" % number)
        removed.append(time.perf_counter() - begun)
        time.sleep(PAUSE_S)
    return first, removed


def take_turns(client, other, amounts):
    times = [], []
    for target in (client, other):
        timed(target, 20, 0.01)
    for _ in range(amounts.rounds):
        for target, spent in zip((client, other), times):
            spent += timed(target, amounts.runs, 0.01)
    client.stop(), other.stop()
    return times


# --- How it grows


def growths(driver, steps):
    """Times by what noise adds least to: the least one, or the ratio to what was measured in turns."""

    def costs(cost):
        return [(step.sessions, cost(step)) for step in steps]

    total = costs(lambda step: (step.each + step.engine_each) * step.sessions + step.server)
    name = driver.name + ", sessions: "
    return [
        Growth(name + "memory of all", total, 1),
        Growth(name + "CPU time of all, idle", costs(lambda step: step.idle + step.engine_idle), IDLE_LEAST),
        each_time(name + "making all of them", costs(lambda step: step.least_make)),
        each_time(name + "removing all of them", costs(lambda step: step.least_remove)),
        each_time(name + "a run of each, to alone", costs(lambda step: step.p50 / step.alone_p50)),
    ]
