#!/usr/bin/env python3
"""Kills the server under load, again and again, and checks what it had promised.

    cargo build --release && tests/engines.sh run tests/crash_loop.py [--driver NAME]... [--rounds N] [--seed N]

In each round users write unique ids into a file of their workspace, by runs that are answered with the whole file,
until the server gets SIGKILL, at a random moment. The lives after it may be killed, too, while they start or recover.
Then:

- The first run of an existing user is answered within 5 s of the start: of the time that this machine's host left it,
  since an engine is all processes, and a host that is short of cores takes more than half of them away here.
- Every id that was acknowledged is there, once; every other one once at most, and never later than the next answer; no
  id of another user, nor, with the embedded driver, whose sandboxes end with the server, of an earlier life.
- Within 60 s there is one sandbox for each session, the pool, and nothing else: no container, process or control group.

In the end SIGTERM leaves nothing at all. A seed gives the same loads and moments again, as far as the machine keeps
time. Exits with 1, and tells every violation, where there is one. Root.
"""

import argparse, contextlib, http.client, json, os, pwd, random, re, shutil, signal, socket, subprocess, sys, tempfile
import threading, time, urllib.parse
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "target", "release", "codesandbox")
CGROUPS = "/sys/fs/cgroup"
NEEDS = {"embedded": [], "docker": ["TEST_DOCKER_HOST", "TEST_IMAGE"],
         "podman": ["TEST_PODMAN_HOST", "TEST_PODMAN_USER", "TEST_IMAGE"]}
COLUMNS = "rounds", "kills", "acknowledged", "unacknowledged", "orphans"
POOL = 4
NEWCOMERS = 4  # a round: users whose first run the kill may hit
FIRST_ANSWER_S = 5
SETTLED_S = 60
PATIENCE_S = 60  # for what should come much sooner
LIFE_LINES = 300  # of its log, where a life answers late
CODE = """
import os, time
if id:
    time.sleep(before)
    with open("ids", "a") as file: file.write(id + "\\n")
    time.sleep(after)
result = open("ids").read().split() if os.path.exists("ids") else []
"""


class Fatal(Exception):
    """There is no use in going on with this driver."""


class Tally:
    """What happened on one driver."""

    def __init__(self, driver, seed):
        self.driver, self.seed, self.round = driver, seed, 0
        self.counts, self.lock = Counter(), threading.Lock()
        self.violations, self.first_answers = [], []

    def count(self, what, many=1):
        with self.lock:
            self.counts[what] += many

    def violation(self, text):
        self.violations.append("%s, seed %d, round %d: %s" % (self.driver, self.seed, self.round, text))
        print("VIOLATION " + self.violations[-1], flush=True)


# --- What can be seen from outside: containers, processes, control groups


class Engine:
    """An engine's API on its unix socket."""

    def __init__(self, url, prefix, instance):
        self.path, self.prefix, self.instance = url.removeprefix("unix://"), prefix, instance

    def call(self, method, path):
        connection = http.client.HTTPConnection("engine")
        with contextlib.closing(connection), socket.socket(socket.AF_UNIX) as connection.sock:
            connection.sock.settimeout(PATIENCE_S)
            connection.sock.connect(self.path)
            connection.request(method, self.prefix + path)
            answer = connection.getresponse()
            text = answer.read()
        if answer.status >= 400 and answer.status not in (404, 409):  # it is gone, or going
            raise OSError("%s %s: %d %s" % (method, path, answer.status, text))
        return json.loads(text) if text.startswith(b"[") else None

    def containers(self):
        """Names of this instance's containers by id."""
        filters = urllib.parse.quote(json.dumps({"label": ["codesandbox.instance=" + self.instance]}))
        listed = self.call("GET", "/containers/json?all=true&filters=" + filters)
        return {one["Id"]: (one.get("Names") or ["?"])[0].lstrip("/") for one in listed}

    def remove_all(self):
        while found := self.containers():
            for identity in found:
                self.call("DELETE", "/containers/%s?force=true&v=true&timeout=0" % identity)
            time.sleep(2)  # an engine ends what it has begun, though the server that asked for it is dead


def stolen_seconds():
    """Since the boot, of each core on average: the host ran somebody else where this machine had work to do."""
    with open("/proc/stat") as stat:
        return int(stat.readline().split()[8]) / os.sysconf("SC_CLK_TCK") / os.cpu_count()


def processes():
    """All of this host's: parents by (pid, start), which no later process has."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open("/proc/%s/stat" % pid) as file:
            fields = file.read().rsplit(")", 1)[1].split()
            found[int(pid), int(fields[19])] = int(fields[1])
    return found


def family(pid):
    """A process and its descendants."""
    children = defaultdict(list)
    for one, parent in processes().items():
        children[parent].append(one)
    found = [one for siblings in children.values() for one in siblings if one[0] == pid]
    for one in found:
        found.extend(children[one[0]])
    return set(found)


def control_groups(instance):
    """Directories of this instance's servers, and each server's pid."""
    name = re.compile(r"codesandbox-%s-(\d+)(-server)?" % re.escape(instance))
    for directory, below, _ in os.walk(CGROUPS):
        for match in filter(None, map(name.fullmatch, below)):
            yield os.path.join(directory, match[0]), int(match[1])


# --- The server


class Server:
    """One life after the other, all with the same configuration."""

    def __init__(self, driver, program, sessions, tally, place):
        self.tally, self.instance, self.log = tally, "crash-%d" % os.getpid(), os.path.join(place, "log")
        self.down = threading.Event()  # it is being killed
        self.steady = False  # from its first answer on, until then: a connection that breaks is a fault
        self.life, self.process, self.dead = 0, None, set()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
        self.engine, self.runtime_directory, prefix, settings = None, None, [], []
        if driver == "docker":
            self.engine = Engine(os.environ["TEST_DOCKER_HOST"], "/v1.41", self.instance)
        elif driver == "podman":
            self.engine = Engine(os.environ["TEST_PODMAN_HOST"], "/v4.0.0/libpod", self.instance)
            self.runtime_directory = os.path.join(os.path.dirname(self.engine.path), "run")
            user = pwd.getpwnam(os.environ["TEST_PODMAN_USER"])
            prefix = ["setpriv", "--reuid=%d" % user.pw_uid, "--regid=%d" % user.pw_gid, "--clear-groups"]
            prefix += ["env", "XDG_RUNTIME_DIR=" + self.runtime_directory]
            if not os.path.exists(CGROUPS + "/cgroup.controllers"):
                settings.append('allow_unenforced = ["memory", "cpus"]')  # what rootless Podman lacks under cgroup v1
        if self.engine:
            settings += ['image = "%s"' % os.environ["TEST_IMAGE"], 'pull = "never"']
            settings += ["[%s]" % driver, 'url = "unix://%s"' % self.engine.path]
        config = os.path.join(place, "codesandbox.toml")
        log = "info,codesandbox::runtime=debug"  # how long each call of the engine takes, too
        settings = ['log = "%s"' % log, 'listen = "127.0.0.1:%d"' % self.address[1], 'driver = "%s"' % driver, *settings]
        # No more than there are: a recovery may not need more room than a life.
        settings += ["[pool]", "size = %d" % POOL, "[session]", "max = %d" % sessions, 'idle_timeout = "24h"']
        with open(config, "w") as file:
            file.write('instance = "%s"\n%s\n' % (self.instance, "\n".join(settings)))
        self.command = [*prefix, program, "serve", "--config", config]

    def start(self):
        self.life += 1
        self.down.clear()
        self.log_begun = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        self.begun = time.monotonic()
        ours = {"stdin": subprocess.DEVNULL, "cwd": "/", "start_new_session": True}  # ^C is for this script alone
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.command, stderr=log, **ours)

    def is_alive(self):
        return self.process.poll() is None

    def check_alive(self):
        if not self.is_alive():
            with open(self.log) as log:
                raise Fatal("the server ended by itself, status %s: %s" % (self.process.returncode, log.read()[-2000:]))

    def end(self, number):
        self.check_alive()
        self.steady = False
        self.dead |= family(self.process.pid)
        self.down.set()
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S * 2)

    def kill(self):
        self.end(signal.SIGKILL)
        self.tally.count("kills")

    def sandboxes(self):
        """How many the server says there are, by state."""
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return {state: int(many) for state, many in re.findall(r'codesandbox_sandboxes\{state="(\w+)"\} (\d+)', text)}

    def leftovers(self):
        """What is there of servers that are dead, in the host's own eyes."""
        alive = self.process.pid if self.is_alive() else None
        found = ["process %d" % one[0] for one in self.dead & processes().keys()]
        return found + [path for path, pid in control_groups(self.instance) if pid != alive]

    def surplus(self, sessions):
        """What is there beside that many sessions and the pool, or on its way; or is missing."""
        found = self.leftovers()
        wanted, told = {"claimed": sessions, "warm": POOL, "starting": 0, "removing": 0}, self.sandboxes()
        found += ["%d sandboxes are %s" % (told[state], state) for state in wanted if told[state] != wanted[state]]
        if self.engine:  # the names are codesandbox-INSTANCE-KEY-TIME, or have "new" or "helper" for a key
            key_of = lambda name: name.split(self.instance + "-")[-1].split("-")[0]
            names = sorted(self.engine.containers().values())
            keys, fine = Counter(map(key_of, names)), {"new": POOL, "helper": 0}
            found += [name for name in names if keys[key_of(name)] > fine.get(key_of(name), 1)]
            if len(keys.keys() - fine.keys()) != sessions:
                found.append("containers of %d sessions" % len(keys.keys() - fine.keys()))
        return found

    def quote_life(self):
        """What the last life has told so far."""
        with open(self.log) as log:
            log.seek(self.log_begun)
            print("this life told:\n", *log.readlines()[:LIFE_LINES], sep="", end="", flush=True)

    def quote(self):
        with open(self.log) as log:
            warnings = [line for line in log if re.search("WARN|ERROR", line) and "allow_unenforced" not in line]
        print("the last that the servers warned of:\n", *warnings[-40:] or ["nothing\n"], sep="", end="", flush=True)

    def clean_up(self):
        if self.process and self.is_alive():
            self.end(signal.SIGKILL)
        if self.engine:
            self.engine.remove_all()
        for name in os.listdir(self.runtime_directory) if self.runtime_directory else []:
            if name.startswith("codesandbox-%s-" % self.instance):
                os.remove(os.path.join(self.runtime_directory, name))
        for top, _ in control_groups(self.instance):
            for directory, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # told before as left
                    os.rmdir(directory)


# --- Those who use it


class User:
    """Sends one run after the other, and knows what must be in its file."""

    def __init__(self, name, server):
        self.name, self.server, self.tally = name, server, server.tally
        self.number = self.life = 0
        self.known, self.pending = [], []  # ids that the last answer had; those sent since
        self.connection = http.client.HTTPConnection(*server.address, timeout=PATIENCE_S)

    def run(self, write=True, before=0, after=0):
        """One run: whether it was served. Never sent twice."""
        if self.life != self.server.life:
            self.life = self.server.life
            if not self.server.engine:
                self.known, self.pending = [], []
        self.number += write
        identity = "%s.%d" % (self.name, self.number) if write else ""
        self.pending += [identity] * write
        body = {"user_id": self.name, "code": CODE, "data": {"id": identity, "before": before, "after": after}}
        try:
            self.connection.request("POST", "/run", json.dumps(body), {"content-type": "application/json"})
            answer = self.connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            refused = isinstance(error, ConnectionRefusedError)
            self.tally.count("refused connections" if refused else "unacknowledged", refused or write)
            if self.server.steady:
                self.tally.violation("%s: no answer from a server that lives: %r" % (self.name, error))
            self.server.down.wait(0.02)
            return False
        if answer.status == 200:
            self.take(json.loads(text), identity)
            return True
        self.tally.count("unacknowledged", write)
        self.tally.count("%d %s" % (answer.status, json.loads(text).get("code")))
        pause = answer.headers.get("retry-after", "")
        if answer.status not in (429, 503) or not pause.isdigit():
            self.tally.violation("%s: %d, Retry-After %r: %s" % (self.name, answer.status, pause, text))
        self.server.down.wait(min(int(pause or 1), 1))
        return False

    def take(self, answer, identity):
        if answer.get("error") or answer.get("session"):
            if "session" in answer:
                self.known, self.pending = [], []  # told once
            return self.tally.violation("%s: a run failed, or its session was lost: %s" % (self.name, answer))
        self.tally.count("acknowledged", bool(identity))
        found = Counter(answer["result"])
        faults = {
            "acknowledged, and not there": {*self.known, *filter(None, [identity])} - found.keys(),
            "more than once": {one for one, many in found.items() if many > 1},
            "of somebody else, of an earlier life, or late": found.keys() - self.known - set(self.pending),
        }
        for what, ids in faults.items():
            if ids:
                run = "%s, life %d, run %s" % (self.name, self.life, identity or "that reads")
                self.tally.violation("%s: %s: %d ids, %s" % (run, what, len(ids), " ".join(sorted(ids)[:9])))
        self.known, self.pending = found.keys(), []

    def load(self, rng):
        """Until the server is killed."""
        self.connection.close()  # the server may have closed it, for having been idle
        while not self.server.down.is_set():
            slow = rng.random() < 0.2
            self.run(**{rng.choice(("before", "after")): rng.uniform(0.1, 1)} if slow else {})
            self.server.down.wait(rng.uniform(0, 0.05))

    def insist(self, write=False):
        """Until a run is served."""
        self.connection.close()
        until = time.monotonic() + PATIENCE_S
        while not self.run(write):
            self.server.check_alive()
            if time.monotonic() > until:
                raise Fatal("%s is not served within %d s" % (self.name, PATIENCE_S))

    def leave(self):
        self.connection.close()
        self.connection.request("DELETE", "/sessions/" + self.name)
        answer = self.connection.getresponse()
        answer.read()
        if answer.status != 204:
            self.tally.violation("%s: DELETE: %d" % (self.name, answer.status))


# --- The whole of it


class Loop:
    """All rounds on one driver."""

    def __init__(self, server, users, threads):
        self.server, self.tally, self.threads = server, server.tally, threads
        self.users = [User("user%d" % number, server) for number in range(users)]

    def random(self, what):
        return random.Random("%d %s %s" % (self.tally.seed, self.tally.driver, what))

    def live(self, rng, users, seconds):
        """Some users work, the others idle; then the server is killed."""
        busy = rng.sample(users, max(1, len(users) * 4 // 5))
        works = [self.threads.submit(user.load, random.Random(rng.random())) for user in busy]
        time.sleep(seconds)
        self.server.kill()
        for work in works:
            work.result()

    def die_early(self, rng, users):
        """Lives that are killed while they start or recover."""
        for _ in range(rng.choice((0, 1, 2))):
            self.server.start()
            self.live(rng, users, rng.uniform(0, 4))

    def come_back(self, rng, users):
        stolen = stolen_seconds()
        self.server.start()
        rng.choice(self.users).insist()
        took, stolen = time.monotonic() - self.server.begun, stolen_seconds() - stolen
        self.tally.first_answers.append(took - stolen)
        if took - stolen > FIRST_ANSWER_S:
            self.tally.violation("first answer after %.2f s, %.2f s of them stolen by the host" % (took, stolen))
            self.server.quote_life()
        self.server.steady = True
        list(self.threads.map(User.insist, users))

    def settle(self, surplus):
        until = time.monotonic() + SETTLED_S
        while found := surplus():
            if time.monotonic() > until:
                self.tally.count("orphans", len(found))
                return self.tally.violation("left behind after %d s, or missing: %s" % (SETTLED_S, found))
            time.sleep(0.2)

    def settle_down(self):
        self.settle(lambda: self.server.surplus(len(self.users)))

    def fill(self):
        begun = time.monotonic()
        self.die_early(self.random("fill"), self.users[:1])  # without any container of an earlier life to go by
        self.server.start()
        with ThreadPoolExecutor(4) as few:
            list(few.map(lambda user: user.insist(write=True), self.users))
        self.server.steady = True
        self.settle_down()
        took = time.monotonic() - begun
        print("%s: %d sessions after %.1f s" % (self.tally.driver, len(self.users), took), flush=True)

    def round(self, number):
        self.tally.round, rng = number, self.random(number)
        begun, before = time.monotonic(), self.tally.counts.copy()
        newcomers = [User("new%d.%d" % (number, one), self.server) for one in range(NEWCOMERS)]
        everyone = self.users + newcomers
        self.live(rng, everyone, rng.uniform(0.3, 2))
        self.die_early(rng, everyone)
        self.come_back(rng, everyone)
        back = time.monotonic()
        list(self.threads.map(User.leave, newcomers))
        self.settle_down()
        self.tally.count("rounds")
        new, now = self.tally.counts - before, time.monotonic()
        counts = "%d kills, %d acknowledged, %d not" % (new["kills"], new["acknowledged"], new["unacknowledged"])
        times = self.tally.first_answers[-1], back - self.server.begun, now - back, now - begun
        times = "first answer %.2f s, all back %.1f s, settled %.1f s; %.1f s" % times
        print("%s, round %d: %s; %s" % (self.tally.driver, number, counts, times), flush=True)

    def end(self):
        self.server.kill()
        self.come_back(self.random("end"), self.users)
        self.settle_down()
        status = self.server.end(signal.SIGTERM)
        if status:
            self.tally.violation("exit status %d after SIGTERM" % status)
        containers = self.server.engine.containers if self.server.engine else dict
        self.settle(lambda: self.server.leftovers() + list(containers().values()))


def crash(driver, arguments):
    tally, begun, most = Tally(driver, arguments.seed), time.monotonic(), arguments.users + NEWCOMERS
    with tempfile.TemporaryDirectory(prefix="crash-loop-") as place, ThreadPoolExecutor(most) as threads:
        os.chmod(place, 0o755)
        # A copy that every user may run, and that no build replaces meanwhile.
        program = shutil.copy(arguments.binary, os.path.join(place, "codesandbox"))
        server = Server(driver, program, most, tally, place)
        loop = Loop(server, arguments.users, threads)
        try:
            loop.fill()
            for number in range(1, arguments.rounds + 1):
                loop.round(number)
            loop.end()
        except Fatal as why:
            tally.violation(str(why))
        finally:
            server.clean_up()
            if tally.violations:
                server.quote()
    others = ["%s: %d" % item for item in sorted(tally.counts.items()) if item[0][0].isdigit() or "refused" in item[0]]
    print("%s: %.0f s; %s" % (driver, time.monotonic() - begun, ", ".join(others) or "nothing refused"), flush=True)
    return tally


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", action="append", choices=NEEDS, help="only this one; may be given again")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="on each driver (default: %(default)s)")
    parser.add_argument("--users", type=int, default=50, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), metavar="N", help="default: a new one")
    parser.add_argument("--binary", default=PROGRAM, metavar="PATH", help="the server (default: the release build)")
    arguments = parser.parse_args()
    drivers = arguments.driver or list(NEEDS)
    missing = sorted({name for driver in drivers for name in NEEDS[driver] if name not in os.environ})
    if missing:
        parser.error("%s not set: tests/engines.sh run tests/crash_loop.py, or --driver embedded" % ", ".join(missing))
    if os.geteuid() != 0:
        parser.error("root is needed")
    if not os.path.exists(arguments.binary):
        parser.error("no %s: cargo build --release" % arguments.binary)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    print("seed %d" % arguments.seed, flush=True)
    tallies = [crash(driver, arguments) for driver in drivers]
    layout = "%-9s" + " %14s" * (len(COLUMNS) + 2)
    print(layout % ("driver", *COLUMNS, "first answer", "violations"))
    for tally in tallies:
        worst = "<= %.2f s" % max(tally.first_answers, default=float("nan"))
        counts = (tally.counts[column] for column in COLUMNS)
        print(layout % (tally.driver, *counts, worst, len(tally.violations)))
    violations = [text for tally in tallies for text in tally.violations]
    for text in violations:
        print("VIOLATION " + text)
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
