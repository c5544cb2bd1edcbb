#!/usr/bin/env python3
"""Soak: holds a rate of runs for a time, and tells whether what the server uses stays flat.

    cargo build --release && tests/engines.sh run tests/soak.py [--driver NAME] [--duration 10m] [--rate 50]

Starts a server of its own. Regular users run in turns, by the clock and whatever the server does (a run that cannot
begin in time is counted, and its latency goes from when it was due); others come once and never again. They add, print,
keep files, raise, flood, run out of time, hang up in the middle of a run or of a request, and every answer is checked.

Every 10 s a sample is taken. A quantity GROWS or SHRINKS where, after a warm-up (a tenth of the time, at least twice
session.idle_timeout), both the difference between the medians of the first and the last third and the slope (Theil-Sen:
the median of the slopes between any two samples) times two thirds of the time exceed its tolerance, the larger of a
share of the first third and an amount: see QUANTITIES. Latency is judged by calm samples only, those in which the
machine was hardly busier than in the calmest quarter, and not full; where a third has less than two of them it is told
as unsure, which is no failure. When all users have gone, what is counted has to be again what it was before they came.
In the end SIGTERM: the server has to end with 0, and to leave no process, no container and no control group.

Fails (exit status 1) where anything grows, is left over, or was answered otherwise than it had to be. Best as root.
"""

import argparse, collections, concurrent.futures, ctypes, dataclasses, glob, http.client, itertools, json, os, queue
import random, re, signal, statistics, subprocess, sys, tempfile, threading, time, urllib.parse

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "benches"))

from measure import PROGRAM, median
from pool import DRIVERS, is_there, metrics, percentile_ms

INSTANCE = "soak-%d" % os.getpid()
POOL, STDOUT_CAP = 4, 64 << 10
CONFIG = """
listen = "127.0.0.1:0"
instance = "%s"
log = "warn,codesandbox::cli=info"
[session]
idle_timeout = "%ds"
max = %d
[pool]
size = %d
[limits]
stdout = "%d"
# So that a machine with too much to do costs time, and no session.
grace = "10s"
"""
# Engines take much longer to make a sandbox; all regular users are to have moved in before the first session expires.
VISITS_PER_S = {"embedded": 2, "docker": 0.5, "podman": 0.5}
IDLE_S = {"embedded": 10, "docker": 30, "podman": 30}
MARGIN_S = 5  # a session that has been idle for nearly its time may expire before the next run arrives
# Percent of the machine that may be in use in a calm sample: more than in the calmest quarter, and at most.
CALM_MORE, CALM_MOST = 15, 80
LATE_S = 0.02  # a run that begins that long after it was due is late
CALL_S = 60  # no call takes that long, or it has failed
IDLE_CONNECTION_S = 2  # less than the server allows for
TOLD = 10  # failures of which the whole text is printed
MOST_SAMPLES = 300  # for the slope, whose cost is their square


@dataclasses.dataclass
class Quantity:
    share: float  # of the first third: the tolerance, where it is more than
    amount: float  # that, in the unit of the quantity
    rests: bool = False  # is to be what it was, within `amount`, once all users have gone
    calm: bool = False  # depends on what else the machine does: only calm samples count


# The amounts are guesses from looking at quiet runs: an allocator's arena, a few blocking threads and connections of
# the moment, the processes of two sandboxes. Latency is what a noisy machine moves most.
QUANTITIES = {
    "RSS MiB": Quantity(0.05, 1),
    "descriptors": Quantity(0.1, 4, rests=True),
    "threads": Quantity(0.1, 3, rests=True),
    "processes": Quantity(0.1, 6, rests=True),
    "launcher RSS MiB": Quantity(0.05, 1),
    "launcher descriptors": Quantity(0.1, 4, rests=True),
    "control groups": Quantity(0.1, 6, rests=True),
    "containers": Quantity(0.1, 2, rests=True),
    "warm": Quantity(0, 2, rests=True),
    "starting": Quantity(0, 2, rests=True),
    "claimed": Quantity(0.1, 3, rests=True),
    "removing": Quantity(0, 2, rests=True),
    "sessions": Quantity(0.1, 3, rests=True),
    "connections": Quantity(0.1, 4, rests=True, calm=True),
    "server CPU %": Quantity(0.25, 3),
    "machine busy %": Quantity(1, 100),  # no matter of the server's: told beside the others
    "p50 ms": Quantity(0.3, 1, calm=True),
    "p99 ms": Quantity(0.5, 10, calm=True),
    "visitor p50 ms": Quantity(0.5, 10, calm=True),
}
COUNTED = [name for name, quantity in QUANTITIES.items() if quantity.rests]
SANDBOX_STATES = ("warm", "starting", "claimed", "removing")

# --- The server, and what is to be seen of it from outside


class Server:
    def __init__(self, driver, program, users, directory):
        config = os.path.join(directory, "codesandbox.toml")
        with open(config, "w") as file:
            file.write(CONFIG % (INSTANCE, IDLE_S[driver.name], users + 300, POOL, STDOUT_CAP))
        self.log = os.path.join(directory, "log")
        allow = [] if os.geteuid() == 0 else ["--allow-unenforced", "memory,cpus,uids"]
        command = [*driver.prefix, program, "--config", config, *allow, *driver.flags]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stderr=log, cwd="/")
        self.pid, self.driver, self.container_ids = self.process.pid, driver, set()
        self.cpu = cpu_of(self.pid)
        self.address = self.await_address()
        self.groups = control_groups(lambda name: name.startswith("codesandbox-%s-" % INSTANCE))

    def await_address(self):
        while self.process.poll() is None:
            if found := re.search(r"listening on http://([\d.]+):(\d+)", self.said()):
                return found[1], int(found[2])
            time.sleep(0.05)
        sys.exit("the server did not start:\n" + self.said())

    def said(self):
        return read(self.log)

    def sample(self):
        """All but the latencies."""
        below = descendants(self.pid)
        launcher = [pid for pid in below if program_of(pid) == program_of(self.pid)]
        found = {
            "RSS MiB": rss_mib(self.pid), "descriptors": entries(self.pid, "fd"), "threads": entries(self.pid, "task"),
            "processes": len(below), "launcher RSS MiB": sum(map(rss_mib, launcher)),
            "launcher descriptors": sum(entries(pid, "fd") for pid in launcher),
            "control groups": sum(len(next(os.walk(path), (0, ()))[1]) for path in self.groups),
            "containers": len(self.containers()),
        }
        series = metrics(self)
        for state in SANDBOX_STATES:
            found[state] = series['sandboxes{state="%s"}' % state]
        before, self.cpu = self.cpu, cpu_of(self.pid)
        server, busy, total = (now - then for now, then in zip(self.cpu, before))
        found["server CPU %"] = 100 * os.cpu_count() * server / max(1, total)
        found["machine busy %"] = 100 * busy / max(1, total)
        return {**found, "sessions": series["sessions"], "connections": series["http_connections"]}

    def containers(self):
        if self.driver.name == "embedded":
            return []
        ours = urllib.parse.quote(json.dumps({"label": ["codesandbox.instance=" + INSTANCE]}))
        found = [one["Id"] for one in self.driver.engine.call("GET", "/containers/json?all=true&filters=" + ours)]
        self.driver.engine.close()  # it may not outlive the time to the next sample
        self.container_ids.update(found)
        return found

    def left(self):
        """What is still there, when nothing should be."""
        names = ("codesandbox-%s-" % INSTANCE, *self.container_ids)
        groups = control_groups(lambda name: any(one in name for one in names))
        processes = ["%d (%s)" % (pid, status_of(pid, "Name")) for pid in descendants(os.getpid(), zombies=False)]
        return {"processes": processes, "containers": self.containers(), "control groups": groups}

    def stop(self):
        """What was wrong with its end."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(CALL_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return ["the server did not end within %d s of SIGTERM" % CALL_S]
        faults = [] if status == 0 else ["the server ended with %d" % status]
        # The kernel may take a moment to bury what was killed; the server has waited for the rest.
        eventually(2, lambda: not any(self.left().values()))
        return faults + ["%s are left: %s" % (what, ", ".join(left)) for what, left in self.left().items() if left]

    def kill(self):
        """Where all is lost: leaves nothing behind either way."""
        self.process.kill()
        self.process.wait()
        for identity in self.containers():
            self.driver.engine.call("DELETE", "/containers/%s?force=true&timeout=0" % identity)

    def remove_files(self):
        """What Podman's driver leaves for the next server of its instance, which there will not be."""
        for path in glob.glob("%s/codesandbox-%s-*" % (getattr(self.driver, "runtime", self.log), INSTANCE)):
            os.remove(path)


def adopt_orphans():
    """What outlives the server becomes a child of this process, so that it is seen."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(top, zombies=True):
    children = collections.defaultdict(list)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        state, parent = look(read, int(pid), "stat", ") Z 0").rsplit(")", 1)[1].split()[:2]
        if zombies or state != "Z":
            children[int(parent)].append(int(pid))
    found = list(children[top])
    for pid in found:  # which grows meanwhile
        found += children[pid]
    return found


def look(what, pid, name, otherwise):
    """A process may be gone by the time that it is looked at."""
    try:
        return what("/proc/%d/%s" % (pid, name))
    except OSError:
        return otherwise


def entries(pid, directory):
    return len(look(os.listdir, pid, directory, []))


def program_of(pid):
    return look(os.readlink, pid, "exe", None)


def status_of(pid, field):
    found = re.search(r"^%s:\s+(\S+)" % field, look(read, pid, "status", ""), re.M)
    return found[1] if found else "0"


def rss_mib(pid):
    return int(status_of(pid, "VmRSS")) / 1024


def cpu_of(pid):
    """Ticks so far: of the process, of all processors while they were busy, of all processors."""
    own = look(read, pid, "stat", ") " + "0 " * 20).rsplit(")", 1)[1].split()
    machine = [int(part) for part in read("/proc/stat").split("\n")[0].split()[1:9]]
    return int(own[11]) + int(own[12]), sum(machine) - machine[3] - machine[4], sum(machine)


def read(path):
    with open(path) as file:
        return file.read()


def control_groups(wanted):
    return [os.path.join(path, name) for path, names, _ in os.walk("/sys/fs/cgroup") for name in names if wanted(name)]


def eventually(seconds, is_so):
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.2)


# --- Users


class Wrong(Exception):
    """Not the answer that it had to be."""


class Wire:
    """Connections that are kept alive, the latest first, so that those not needed any more are closed."""

    def __init__(self, address):
        self.address, self.idle, self.lock = address, [], threading.Lock()

    def open(self):
        return http.client.HTTPConnection(*self.address, timeout=CALL_S)

    def take(self):
        with self.lock:
            self.close_idle()
            return self.idle.pop()[0] if self.idle else self.open()

    def give(self, connection):
        with self.lock:
            self.idle.append((connection, time.monotonic()))

    def close_idle(self):
        while self.idle and time.monotonic() - self.idle[0][1] > IDLE_CONNECTION_S:
            self.idle.pop(0)[0].close()

    def call(self, method, path, body=None):
        """The answer's text, decoded."""
        connection = self.take()
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        except Exception:
            connection.close()
            raise
        if random.random() < 0.02:
            connection.close()  # now and then a new one
        else:
            self.give(connection)
        if answer.status >= 300:
            raise Wrong("%d %s" % (answer.status, text))
        return json.loads(text) if text else None


class User:
    """Runs one thing at a time, so that it is known what is in the workspace."""

    def __init__(self, wire, name):
        self.wire, self.name, self.count, self.last_end, self.last = wire, name, 0, time.monotonic(), "nothing"

    def unless_idle(self, seconds):
        """Somebody new where the session may have expired: nobody knows then what is in the workspace."""
        return self if time.monotonic() - self.last_end < seconds else User(self.wire, self.name + "'")

    def run(self, code, timeout_ms=20_000, **data):
        body = {"user_id": self.name, "code": code, "timeout_ms": timeout_ms, "data": data}
        return self.wire.call("POST", "/run", json.dumps(body))

    def expect(self, answer, **fields):
        got = dict(answer)
        files = [line.split()[-1] for line in got.pop("workspace_files")[1:]]
        if got != {"result": None, **fields} or files != (["count"] if self.count else []):
            raise Wrong("%s where there had to be %s" % (str(answer)[:600], str(fields)[:200]))

    def expect_failure(self, answer, kind, **fields):
        """The rest of the answer as ever."""
        answer, fields = dict(answer), {"kind": kind, **fields}
        detail, error = answer.pop("error_detail", {}), answer.pop("error", "")
        if not error.startswith("Error running code: ") or {name: detail.get(name) for name in fields} != fields:
            raise Wrong("%s %s where there had to be %s" % (error[:300], str(detail)[:300], fields))
        return answer


ADD = "result = x + y"
PRINT = "import sys\nprint(text, end='')\nprint('e' * 10, file=sys.stderr)"
COUNT = """
import os
count = int(open("count").read()) + 1 if os.path.exists("count") else 1
open("count", "w").write(str(count))
open("large", "wb").write(bytes(1 << 20))
os.remove("large")
result = count
"""


def adds(user):
    x, y = random.randrange(1 << 60), random.randrange(1 << 60)
    user.expect(user.run(ADD, x=x, y=y), result=x + y)


def prints(user):
    text = "line of text\n" * random.randrange(1, 500)
    user.expect(user.run(PRINT, text=text), stdout=text, stderr="e" * 10 + "\n")


def counts(user):
    user.count += 1
    user.expect(user.run(COUNT), result=user.count)


def raises(user):
    text = "number %d" % random.randrange(1 << 60)
    answer = user.run("raise ValueError(text)", text=text)
    user.expect(user.expect_failure(answer, "raised", name="ValueError", value=text))


def floods(user):
    user.expect(user.run("print('x' * 200000)"), stdout="x" * STDOUT_CAP, truncated=["stdout"])


def times_out(user):
    answer = user.run("print('begun', flush=True)\nwhile True: pass", timeout_ms=200)
    # On a busy machine its time may be over before it prints.
    said = {"stdout": "begun\n"} if "stdout" in answer else {}
    user.expect(user.expect_failure(answer, "timeout"), **said)


def hangs_up(user):
    connection = user.wire.open()
    body = {"user_id": user.name, "code": "import time\ntime.sleep(20)"}
    connection.request("POST", "/run", json.dumps(body), {"content-type": "application/json"})
    time.sleep(random.uniform(0, 0.2))
    connection.close()


def breaks_off(user):
    connection = user.wire.open()
    connection.putrequest("POST", "/run")
    connection.putheader("content-length", "100000")
    connection.endheaders(b'{"user_id": "')
    time.sleep(random.uniform(0, 0.2))
    connection.close()


# What a regular user does next, by weight. The latencies that count are those of the first five.
MIX = {adds: 60, prints: 15, counts: 15, raises: 6, floods: 2, hangs_up: 1, breaks_off: 0.5, times_out: 0.5}
TIMED = (adds, prints, counts, raises, floods)


def leaves_a_file(visitor):
    counts(visitor)


def deletes_all(visitor):
    counts(visitor)
    visitor.wire.call("DELETE", "/sessions/" + visitor.name)


# What those do who never come again, in turns, lest chance make sessions more or fewer. Whoever does not delete leaves
# the session to the reaper.
VISITS = (leaves_a_file, leaves_a_file, deletes_all, leaves_a_file, hangs_up, leaves_a_file, deletes_all)


# --- The load


class Tally:
    """What came of all runs; and the latencies since the last sample."""

    def __init__(self):
        self.lock, self.outcomes, self.failures = threading.Lock(), collections.Counter(), []
        self.begun = self.late = 0
        self.latencies, self.visits = [], []

    def begin(self, due):
        with self.lock:
            self.begun += 1
            self.late += time.monotonic() - due > LATE_S

    def attempt(self, user, what):
        """Whether it went as it had to."""
        ago = time.monotonic() - user.last_end
        try:
            what(user)
            outcome, failure = "as it had to be", None
        except Wrong as error:
            text = str(error)
            outcome, failure = "status " + text[:3] if re.match(r"\d{3} ", text) else "wrong answer", text
        except Exception as error:  # a connection that was refused, reset or closed; what is no JSON
            outcome, failure = type(error).__name__, str(error)
        with self.lock:
            self.outcomes[what.__name__, outcome] += 1
            if failure is not None:
                begun = "%s, %s, %s" % (time.strftime("%T"), user.name, what.__name__)
                self.failures.append("%s %.1f s after %s: %s" % (begun, ago, user.last, failure[:600]))
        user.last_end, user.last = time.monotonic(), what.__name__
        return failure is None

    def failed(self):
        return sum(count for (_, outcome), count in self.outcomes.items() if outcome != "as it had to be")

    def take_latencies(self):
        with self.lock:
            runs, visits = self.latencies, self.visits
            self.latencies, self.visits = [], []
        wanted = {"p50 ms": (runs, 50), "p99 ms": (runs, 99), "visitor p50 ms": (visits, 50)}
        return {name: percentile_ms(times, percent) if times else None for name, (times, percent) in wanted.items()}


def one_of(weights):
    return random.choices(list(weights), list(weights.values()))[0]


class Load:
    """Begins runs by the clock, each in a thread of its own as far as there are enough."""

    def __init__(self, server, users, rate):
        self.wire, self.tally, self.rate, self.idle_s = Wire(server.address), Tally(), rate, IDLE_S[server.driver.name]
        self.visit_every, self.visitors = max(1, round(rate / VISITS_PER_S[server.driver.name])), itertools.count()
        self.regulars = queue.SimpleQueue()
        for number in range(users):
            self.regulars.put(User(self.wire, "regular-%d" % number))
        self.threads = users + 24

    def move_in(self):
        """One after the other, so that an engine is not asked for all sandboxes at once."""
        for _ in range(self.regulars.qsize()):
            user = self.regulars.get()
            self.tally.attempt(user, adds)
            self.regulars.put(user)

    def hold(self, seconds):
        """How many were due, and never begun."""
        pool = concurrent.futures.ThreadPoolExecutor(self.threads)
        begun, count = time.monotonic(), int(seconds * self.rate)
        try:
            for number in range(count):
                due = begun + number / self.rate
                time.sleep(max(0, due - time.monotonic()))
                work = self.regular if number % self.visit_every else self.visit
                pool.submit(work, due)
            eventually(10, lambda: self.tally.begun == count)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        pool.shutdown()
        return count - self.tally.begun

    def regular(self, due):
        user, what = self.regulars.get().unless_idle(self.idle_s - MARGIN_S), one_of(MIX)
        self.tally.begin(due)
        fine = self.tally.attempt(user, what)
        if fine and what in TIMED:
            self.tally.latencies.append(time.monotonic() - due)
        # After a failure nobody knows what is in the workspace, either.
        self.regulars.put(user if fine else User(self.wire, user.name + "+"))

    def visit(self, due):
        number = next(self.visitors)
        user, what = User(self.wire, "visitor-%d" % number), VISITS[number % len(VISITS)]
        self.tally.begin(due)
        if self.tally.attempt(user, what) and what is leaves_a_file:
            self.tally.visits.append(time.monotonic() - due)


class Sampler:
    """Takes a sample now and then, beside the load, until the end of the block."""

    def __init__(self, server, tally, every_s):
        self.server, self.tally, self.every_s = server, tally, every_s
        self.samples, self.over, self.begun = [], threading.Event(), time.monotonic()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self):
        for number in itertools.count(1):
            if self.over.wait(max(0, self.begun + number * self.every_s - time.monotonic())):
                return
            try:
                self.take()
            except (OSError, http.client.HTTPException) as error:  # the server's end is told elsewhere
                print("no sample: %s" % error, flush=True)

    def take(self):
        sample = {**self.server.sample(), **self.tally.take_latencies()}
        self.samples.append((time.monotonic() - self.begun, sample))
        self.tell(*self.samples[-1])

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def tell(self, at, sample):
        values = ", ".join("%s %s" % (name, shown(sample[name])) for name in QUANTITIES if sample[name])
        print("%4d s  late %d, failed %d; %s" % (at, self.tally.late, self.tally.failed(), values), flush=True)


# --- The verdict


def shown(value):
    return "-" if value is None else "%.1f" % value if value % 1 else "%d" % value


def slope(points):
    """Theil-Sen, per second."""
    points = points[:: -(-len(points) // MOST_SAMPLES)]
    pairs = itertools.combinations(points, 2)
    return statistics.median((later - earlier) / (to - at) for (at, earlier), (to, later) in pairs)


def verdict(quantity, points, begin, end):
    """The medians of the first and the last third, the slope per second, and the word for it."""
    third = (end - begin) / 3
    early = [value for at, value in points if at <= begin + third]
    late = [value for at, value in points if at >= end - third]
    if min(len(early), len(late)) < 2:
        return None, None, None, "unsure"
    first, last, per_s = median(early), median(late), slope(points)
    tolerance = max(quantity.share * first, quantity.amount)
    drift = per_s * third * 2  # from the middle of one third to that of the other
    if last - first > tolerance and drift > tolerance:
        return first, last, per_s, "GROWS"
    if first - last > tolerance and -drift > tolerance:
        return first, last, per_s, "SHRINKS"
    return first, last, per_s, "flat"


def calm_ones(samples):
    busy = sorted(sample["machine busy %"] for _, sample in samples)
    most = min(CALM_MOST, busy[len(busy) // 4] + CALM_MORE)
    return [(at, sample) for at, sample in samples if sample["machine busy %"] <= most]


def judge(samples, before, after):
    """Prints the table; gives what was wrong in it."""
    if len(samples) < 6:
        return ["%d samples after the warm-up are too few" % len(samples)]
    calm, (begin, end) = calm_ones(samples), (samples[0][0], samples[-1][0])
    print("\n%d samples after the warm-up, %d of them calm" % (len(samples), len(calm)))
    print(LINE % ("", "first third", "last third", "per minute", "tolerance", "", "before", "after"))
    faults = []
    for name, quantity in QUANTITIES.items():
        values = ((at, sample[name]) for at, sample in (calm if quantity.calm else samples))
        points = [(at, value) for at, value in values if value is not None]
        if any(sample[name] for _, sample in samples):  # else this driver has nothing of the kind
            first, last, per_s, word = verdict(quantity, points, begin, end)
            tell_quantity(name, quantity, (first, last, per_s and per_s * 60), word, before, after)
            faults += ["%s grows: from %.2f to %.2f" % (name, first, last)] if word == "GROWS" else []
        if quantity.rests and after[name] - before[name] > quantity.amount:
            faults.append("%s: %d before all came, and %d after they have gone" % (name, before[name], after[name]))
    return faults


LINE = "%-22s %12s %12s %12s %16s  %-8s %8s %8s"


def tell_quantity(name, quantity, numbers, word, before, after):
    numbers = ["-" if number is None else "%.2f" % number for number in numbers]
    tolerance = "%d %% or %s" % (quantity.share * 100, shown(quantity.amount))
    rest = [shown(round(one[name], 1)) if name in one else "" for one in (before, after)]
    print(LINE % (name, *numbers, tolerance, word, *rest))


def rest(server, seconds, fine):
    """A sample once `fine` holds, or when the time is up."""
    end = time.monotonic() + seconds
    while not fine(sample := server.sample()) and time.monotonic() < end:
        time.sleep(0.5)
    return sample


def is_full(sample):
    return [sample[state] for state in SANDBOX_STATES] == [POOL, 0, 0, 0] and sample["sessions"] == 0


def soak(server, arguments):
    """All but the server's end; gives what was wrong."""
    print("resting before", flush=True)
    before = rest(server, 60, is_full)
    load = Load(server, arguments.users, arguments.rate)
    load.move_in()
    with Sampler(server, load.tally, arguments.interval) as sampler:
        never = load.hold(arguments.duration)
    if server.process.poll() is not None:
        return tell_runs(load.tally, never)
    # tokio keeps idle threads for 10 s.
    print("resting after", flush=True)
    as_before = lambda sample: is_full(sample) and all(sample[name] <= before[name] for name in COUNTED)
    after = rest(server, IDLE_S[arguments.driver] + 40, as_before)
    warm_up = max(arguments.duration / 10, 2 * IDLE_S[arguments.driver])
    faults = judge([one for one in sampler.samples if one[0] > warm_up], before, after)
    tell_losses(server)
    return faults + tell_runs(load.tally, never) + ([] if is_full(after) else ["no rest in the end: %s" % after])


def tell_runs(tally, never):
    total = sum(tally.outcomes.values())
    print("\n%d runs, %d begun more than %d ms late, %d never begun" % (total, tally.late, LATE_S * 1000, never))
    for (what, outcome), count in sorted(tally.outcomes.items()):
        print("  %-16s %-20s %7d" % (what, outcome, count))
    for failure in tally.failures[:TOLD]:
        print("  " + failure)
    faults = ["%d runs failed" % tally.failed()] if tally.failures else []
    return faults + (["%d runs were never begun" % never] if never else [])


def tell_losses(server):
    """As the server itself counted them."""
    told = ("claims", "sessions_ended", "sandboxes_lost", "engine_errors")
    found = {name: value for name, value in metrics(server).items() if name.startswith(told)}
    print("\n" + ", ".join("%s %d" % one for one in found.items()))


def tell_log(text):
    lines = [line for line in text.splitlines() if " INFO " not in line]
    print("%d lines of the log are warnings or worse" % len(lines))
    for line in lines[:TOLD]:
        print("  " + line)


# --- The command line


def seconds_of(text):
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if not found:
        raise argparse.ArgumentTypeError("expected a time as 90s, 10m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", choices=DRIVERS, default="embedded")
    parser.add_argument("--rate", type=float, default=50, help="runs a second (50)")
    parser.add_argument("--duration", type=seconds_of, default="10m", help="as 90s, 10m, 2h (10m)")
    parser.add_argument("--users", type=int, default=40, help="regular users (40)")
    parser.add_argument("--interval", type=seconds_of, default="10s", help="between samples (10s)")
    parser.add_argument("--binary", default=PROGRAM, help="the server, if not target/release/codesandbox")
    arguments = parser.parse_args()
    if not os.path.exists(arguments.binary):
        sys.exit("build it first: cargo build --release")
    if not is_there(arguments.driver):
        sys.exit("no %s: tests/engines.sh run tests/soak.py --driver %s" % (arguments.driver, arguments.driver))
    return arguments


def main():
    arguments = parse_arguments()
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of every `finally`
    with tempfile.TemporaryDirectory(prefix="codesandbox-soak-") as directory:
        os.chmod(directory, 0o755)  # Podman's server is another user
        server = Server(DRIVERS[arguments.driver](), os.path.abspath(arguments.binary), arguments.users, directory)
        try:
            faults = soak(server, arguments)
            faults += server.stop()
        finally:
            if server.process.returncode is None:
                server.kill()
            server.remove_files()
            tell_log(server.said())
    print("\n".join(["", *faults, "FAILED" if faults else "flat"]))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
