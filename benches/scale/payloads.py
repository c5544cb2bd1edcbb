"""How long a run takes by what goes in, what comes out, and what lies in the workspace."""

import dataclasses, http.client, json, os, statistics, time

import sessions
from growth import beyond_first
from measure import median
from pool import serving
from usage import Meter, Processes

MODES = ("fresh", "kernel")
SIZES = (*(10**power for power in range(1, 7)), 3_000_000, 10_000_000)  # bytes
MANY_BYTES = 3_000_000  # a run with so many takes long: in every fourth round is enough
FILES = (0, 10, 100, 1000, 5000)
# What would cut or refuse the largest of them; "body" is more than enough.
CAPS = ("body=64MiB", "code=16MiB", "result=16MiB", "stdout=16MiB", "listing=10000", "memory=4GiB")
# A run that keeps more than one core busy would begin to wait once it takes longer than the kernel's period of 100 ms.
SETTINGS = (*sessions.SETTINGS, *("limits." + cap for cap in CAPS), "limits.cpus=%d" % os.cpu_count())
SETTINGS += ("server.header_timeout=5m",)  # a connection waits for its turn
PAUSE_S = 0.01
ANSWER_S = 60
LINE = 'text = "%s"\n' % ("a" * 60)
PRINTS = 'for _ in range(%d): print("x" * 79)\nprint("x" * %d)'
MAKE_FILES = "for number in range(%d): open('file-%%d' %% number, 'w').close()"


def code(size):
    """That many bytes of assignments."""
    least = "result = 1"
    lines = LINE * ((size - len(least)) // len(LINE))
    rest = size - len(least) - len(lines)
    return {"code": lines + ("#" * (rest - 1) + "\n" if rest else "") + least}


def data(size):
    """A list of numbers, of 8 bytes each."""
    return {"code": "result = 1", "data": {"x": [1234567] * max(1, (size - 8) // 8)}}


def result(size):
    return {"code": "result = [1234567] * %d" % max(1, size // 8)}


def stdout(size):
    """Lines of 80 bytes, each printed by itself."""
    return {"code": PRINTS % (size // 80, max(0, size % 80 - 1))}


def files(_):
    return {"code": "result = 1"}


KINDS = {"code": code, "data": data, "result": result, "stdout": stdout, "streamed": stdout, "files": files}


class Runner:
    """One user, each of whose answers is looked at."""

    def __init__(self, server, user, mode, task, streamed=False):
        self.connection = http.client.HTTPConnection(*server.address, timeout=ANSWER_S)
        self.body = json.dumps({"user_id": user, "mode": mode, **task}, separators=(",", ":"))
        self.headers = {"content-type": "application/json", **({"accept": "text/event-stream"} if streamed else {})}

    def run(self):
        """The milliseconds from the request to the answer's last byte. A pause follows, for what the run leaves."""
        begun = time.perf_counter()
        self.connection.request("POST", "/run", self.body, self.headers)
        answer = self.connection.getresponse()
        text = answer.read()
        spent = time.perf_counter() - begun
        check(answer.status, text.rsplit(b"data: ", 1)[-1])
        time.sleep(PAUSE_S + spent / 4)
        return spent * 1000

    def stop(self):
        self.connection.close()


def check(status, text):
    wrong = status != 200 or {"error", "truncated", "session"} & set(json.loads(text))
    assert not wrong, "not a good answer: %d %s" % (status, text[:300])


@dataclasses.dataclass
class Cost:
    """Of one run, in ms."""

    size: int
    p50: float
    cpu: float  # mean CPU time of all processes: what else the machine does matters less to it


def measure(driver, quick):
    """By kind and mode, the cost at each size."""
    rounds = 5 if quick else 17
    instance = sessions.INSTANCE + "-payloads"
    with serving(driver, *SETTINGS, instance=instance) as server:
        found = {}
        for kind in KINDS:
            for mode in MODES:
                runners = make_runners(server, kind, mode)
                meter = Meter(Processes(driver, server, instance).all())
                found[kind, mode] = costs(runners, meter, rounds)
    tell(driver, found)
    return found


def make_runners(server, kind, mode):
    return {size: runner(server, kind, mode, size) for size in (FILES if kind == "files" else SIZES)}


def costs(runners, meter, rounds):
    """All sizes take turns in each round."""
    times, cpu = ({size: [] for size in runners} for _ in range(2))
    for number in range(rounds):
        for size in runners:
            if size < MANY_BYTES or number % 4 == 0:
                times[size].append(runners[size].run())
                cpu[size].append(meter.cpu_ms())
    for one in runners.values():
        one.stop()
    return [Cost(size, median(times[size]), statistics.mean(cpu[size])) for size in runners]


def runner(server, kind, mode, size):
    """Each size has users of its own, since what is left of a large run may cost the next one; it has run once."""
    user = "%s-%s-%d" % ("files" if kind == "files" else "bytes", mode, size)
    first = {"code": MAKE_FILES % size if kind == "files" else "result = 1"}
    Runner(server, user, mode, first).run()
    found = Runner(server, user, mode, KINDS[kind](size), kind == "streamed")
    found.run()
    return found


def tell(driver, found):
    for title, kinds in (("bytes", [kind for kind in KINDS if kind != "files"]), ("files", ["files"])):
        print("\n%s: one run by %s, p50 in ms" % (driver.name, title))
        print(" " * 20 + "".join("%9s" % short(cost.size) for cost in found[kinds[0], MODES[0]]))
        for kind, mode in ((kind, mode) for kind in kinds for mode in MODES):
            row = "".join("%9.2f" % cost.p50 for cost in found[kind, mode])
            print("%-20s%s" % (kind + ", " + mode, row), flush=True)


def short(size):
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if size >= unit:
            return "%d%s" % (size // unit, name)
    return "%d" % size


def growths(driver, found):
    return [
        beyond_first("%s, %s, %s" % (driver.name, *key), [(cost.size, cost.cpu) for cost in costs])
        for key, costs in found.items()
    ]
