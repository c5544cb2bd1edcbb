#!/usr/bin/env python3
"""Measures the exec path against its floor, both in one run, and prints ratios.

    cargo build --release && python3 benches/measure.py [--quick]

Times of a noisy machine mean little, so floor and server take turns in short rounds and every figure is
the median over the rounds. Needs only the standard library; the rate of 8 users needs wrk (Debian: wrk).
The floor is benches/floor.py under the interpreter that the sandboxes have. Linux, and best as root.
"""

import argparse, atexit, json, multiprocessing, os, re, shutil, signal, socket, statistics, struct, subprocess, sys
import tempfile, threading, time

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "..", "target", "release", "codesandbox")
TASK = {"code": "result = x + y", "data": {"x": 1, "y": 2}}
WRK = """
local n = 0
local users = %d
function request()
  n = n + 1
  return wrk.format("POST", "/run", {["content-type"]="application/json"},
    '{"user_id":"u' .. (id * 100 + n %% users) .. '","code":"result = x + y","data":{"x":1,"y":2}}')
end
local threads = 0
function setup(thread) thread:set("id", threads); threads = threads + 1 end
"""


def median(values):
    return statistics.median(values)


def p50_ms(times):
    return median(times) * 1000


class Floor:
    def __init__(self, python):
        self.process = subprocess.Popen(
            [python, "-I", "-S", os.path.join(HERE, "floor.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.line = json.dumps(TASK).encode()

    def run(self):
        os.write(self.process.stdin.fileno(), self.line)
        assert os.read(self.process.stdout.fileno(), 1 << 16) == b"3"

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


class Server:
    def __init__(self, *flags, prefix=()):
        allow = [] if os.geteuid() == 0 else ["--allow-unenforced", "memory,cpus,uids"]
        self.process = subprocess.Popen(
            [*prefix, PROGRAM, "--listen", "127.0.0.1:0", *allow, *flags], stderr=subprocess.PIPE, text=True
        )
        for line in self.process.stderr:
            found = re.search(r"listening on http://([\d.]+):(\d+)", line)
            if found:
                self.address = (found[1], int(found[2]))
                break
            sys.stderr.write(line)
        else:
            sys.exit("the server did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        atexit.register(self.stop)  # also where a measurement fails

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def runs_cost(self):
        """Page faults and seconds of CPU of all the runs that have ended: what the forkers have waited for."""
        faults = ticks = 0
        for pid in self.sandbox_pids():
            try:
                with open("/proc/%d/stat" % pid) as file:
                    fields = file.read().rsplit(")", 1)[1].split()
            except OSError:
                continue  # a run that has just ended
            faults, ticks = faults + int(fields[8]), ticks + int(fields[13]) + int(fields[14])
        return faults, ticks / os.sysconf("SC_CLK_TCK")

    def sandbox_pids(self):
        """The processes of all sandboxes: what descends from the server, less the launcher's two."""
        children = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open("/proc/%s/stat" % pid) as file:
                    children.setdefault(int(file.read().rsplit(")", 1)[1].split()[1]), []).append(int(pid))
            except OSError:
                pass
        launcher = children.get(self.process.pid, [])
        inner = [pid for outer in launcher for pid in children.get(outer, [])]
        found, pending = [], [pid for one in inner for pid in children.get(one, [])]
        while pending:
            pid = pending.pop()
            found.append(pid)
            pending.extend(children.get(pid, []))
        return found


class Client:
    def __init__(self, server, user, **fields):
        self.socket = socket.create_connection(server.address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        body = json.dumps({"user_id": user, **TASK, **fields}).encode()
        head = "POST /run HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.request = head.encode() + body

    def run(self):
        self.socket.sendall(self.request)
        answer = self.socket.recv(1 << 16)
        assert b'{"result":3,"workspace_files":["total 0"]}' in answer, answer

    def stop(self):
        self.socket.close()


def timed(target, count, pause):
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        target.run()
        times.append(time.perf_counter() - begun)
        if pause:
            time.sleep(pause)
    return times


def rate(targets, seconds):
    """Runs a second of several floors side by side."""
    context = multiprocessing.get_context("fork")  # threads would wait for each other
    counts = context.Array("q", len(targets))

    def work(index):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            targets[index].run()
            counts[index] += 1

    processes = [context.Process(target=work, args=(index,)) for index in range(len(targets))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, "a floor has failed"
    return sum(counts) / seconds


def wrk_rate(server, users, seconds):
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(WRK % 1)
        script.flush()
        command = ["wrk", "-t%d" % users, "-c%d" % users, "-d%ds" % seconds, "-s", script.name, "http://%s:%d" % server.address]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in text, text
    return float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])


def eight_users(server, python, rounds):
    """Runs a second of 8 users at once and of two floors side by side, in turns; none without wrk."""
    if not shutil.which("wrk"):
        print("8 users at once: not measured, wrk is not installed")
        return []
    floors = [Floor(python), Floor(python)]
    pairs = [(wrk_rate(server, 8, 2), rate(floors, 2)) for _ in range(rounds)]
    for floor in floors:
        floor.stop()
    return pairs


def pss_kib(pid):
    with open("/proc/%d/smaps_rollup" % pid) as file:
        return int(re.search(r"^Pss:\s+(\d+)", file.read(), re.M)[1])


def python_of(server):
    client = socket.create_connection(server.address)
    body = json.dumps({"user_id": "who", "code": "import sys; result = sys.executable"}).encode()
    client.sendall(b"POST /run HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    text = b""
    while part := client.recv(1 << 16):
        text += part
    return json.loads(text.split(b"\r\n\r\n")[1])["result"]


def row(name, ours, others, unit, sign, goal, also=""):
    """The medians over the rounds, and that of their ratios, with the least and the most of these."""
    ratios = [one / other for one, other in zip(ours, others)]
    print("%-46s %9.2f %9.2f %-5s  %.2f (%.2f to %.2f)  %s%s" % (
        name, median(ours), median(others), unit, median(ratios), min(ratios), max(ratios),
        verdict(median(ratios), sign, goal), also), flush=True)


def verdict(found, sign, goal):
    return "%s %s %g" % ("met" if (found <= goal if sign == "<=" else found >= goal) else "MISSED", sign, goal)


def warm(rounds, count):
    server = Server()
    python = python_of(server)
    floor, client = Floor(python), Client(server, "warm")
    for target in (floor, client):
        timed(target, 50, 0.002)
    time.sleep(0.2)
    for name, pause in (("warm run, a pause of 10 ms, p50", 0.01), ("warm run, back to back, p50", 0)):
        times = {floor: [], client: []}
        for number in range(rounds):
            for target in (floor, client)[:: -1 if number % 2 else 1]:
                times[target].append(p50_ms(timed(target, count, pause)))
        row(name, times[client], times[floor], "ms", "<=", 1.4)
    floor.stop()
    many = 4 * count  # the kernel tells CPU time of those that have ended in ticks
    before = server.runs_cost()
    timed(client, many, 0)
    faults, cpu = [(now - old) / many for now, old in zip(server.runs_cost(), before)]
    print("a fresh run's process, exit and all: %.0f page faults (%s), %.2f ms of CPU (%s)" % (
        faults, verdict(faults, "<=", 200), cpu * 1000, verdict(cpu * 1000, "<=", 0.8)))
    kernel = Client(server, "kernel", mode="kernel")
    timed(kernel, 50, 0.002)
    for name, pause in (("kernel run to a fresh one, a pause of 10 ms", 0.01), ("kernel run to a fresh one, back to back", 0)):
        pairs = [(p50_ms(timed(kernel, count, pause)), p50_ms(timed(client, count, pause))) for _ in range(rounds)]
        row(name, *zip(*pairs), "ms", "<=", 0.5, "" if pause else "; itself " + verdict(median([one for one, _ in pairs]), "<=", 0.4))
    kernel.stop()
    if pairs := eight_users(server, python, rounds):
        row("8 users at once, to two floors", *zip(*pairs), "run/s", ">=", 0.65)
    client.stop()
    server.stop()
    return python


BARE = "import sys, os, select, struct, gc, time, _signal, _json, site; sys.stdout.write('hello'); sys.stdout.flush(); sys.stdin.read()"


def start_bare(python):
    begun = time.perf_counter()
    process = subprocess.Popen([python, "-I", "-S", "-c", BARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout.read(5) == b"hello"
    spent = time.perf_counter() - begun
    process.stdin.close()
    process.wait()
    return spent


class BareSupervisor:
    """The program that is PID 1 of a sandbox, compiled as for one, in a process namespace and nothing else: from its
    start to the answer of its first run."""

    CAPS = {"stdout": 1 << 20, "stderr": 1 << 20, "result": 4 << 20, "error": 65536, "listing_lines": 1000,
            "artifacts": 0, "grace_ms": 1000, "rlimits": {}}

    def __init__(self, python):
        self.directory = tempfile.TemporaryDirectory()
        parts = re.findall(r'include_str!\("(.*?)"\)', open(os.path.join(HERE, "..", "src", "supervisor", "program.rs")).read())
        source = "".join(open(os.path.join(HERE, "..", "src", "supervisor", part)).read() for part in parts)
        workspace = os.path.join(self.directory.name, "workspace")
        os.mkdir(workspace)
        assert 'WORKSPACE = "/workspace"' in source
        plain = os.path.join(self.directory.name, "supervisor.py")
        with open(plain, "w") as file:
            file.write(source.replace('WORKSPACE = "/workspace"', "WORKSPACE = %r" % workspace))
        self.compiled = plain + "c"
        compiling = "import py_compile, sys; py_compile.compile(*sys.argv[1:3], optimize=2, doraise=True)"
        subprocess.run([python, "-c", compiling, plain, self.compiled], check=True)
        self.command = ["unshare", "--pid", "--fork", "--kill-child", python, "-I", "-S", self.compiled]

    def start(self):
        begun = time.perf_counter()
        process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.ask(process, 1, 129, json.dumps(self.CAPS))
        task = json.dumps({"timeout_ms": 30000}), TASK["code"], json.dumps(TASK["data"]), ""
        assert self.ask(process, 2, 130, *task)[32 + 4 :].startswith(b"3")
        spent = time.perf_counter() - begun
        process.stdin.close()  # which ends it
        process.wait()
        return spent

    def ask(self, process, kind, answer, *sections):
        """A frame, and the payload of its answer: see src/supervisor/protocol.rs."""
        payload = b"".join(len(part).to_bytes(4, "big") + part.encode() for part in sections)
        process.stdin.write(struct.pack(">QBI", 7, kind, len(payload)) + payload)
        nonce, told, length = struct.unpack(">QBI", self.read(process, 13))
        assert (nonce, told) == (7, answer)
        return self.read(process, length)

    def read(self, process, length):
        data = b""
        while len(data) < length:
            data += process.stdout.read(length - len(data)) or sys.exit("the bare supervisor has ended")
        return data


def first_runs(server, floor, rounds, count, users="first"):
    """The p50 of each round, in ms: of new users' first runs, and of what `floor` gives, in turns."""
    ours, theirs, number = [], [], 0
    for _ in range(rounds):
        least, first = [], []
        for _ in range(count):
            least.append(floor())
            number += 1
            client = Client(server, users + str(number))
            first.extend(timed(client, 1, 0))
            client.stop()
        ours.append(p50_ms(first))
        theirs.append(p50_ms(least))
    return ours, theirs


def first_run(python, rounds, count):
    server = Server("--set", "pool.size=0", "--set", "session.max=5000")
    ours, theirs = first_runs(server, lambda: start_bare(python), rounds, count)
    row("first run of a new user, no pool, to bare Python", ours, theirs, "ms", "<=", 1.5)
    if os.geteuid() == 0:  # as the namespace needs
        bare = BareSupervisor(python)
        row("the same, to the supervisor without a sandbox", *first_runs(server, bare.start, rounds, count, "bare"), "ms", "<=", 1.5)
    server.stop()


def live(count):
    server = Server("--set", "pool.size=0", "--set", "session.max=%d" % (count + 1))
    begun = time.perf_counter()
    for number in range(count):
        client = Client(server, "live%d" % number)
        client.run()
        client.stop()
    spent = time.perf_counter() - begun
    time.sleep(2)
    pids = server.sandbox_pids()
    total = sum(pss_kib(pid) for pid in pids)
    print("%d live sessions: %d processes, started at %.0f/s, %.2f MiB PSS each (goal <= 8)"
          % (count, len(pids), count / spent, total / 1024 / count))
    client = Client(server, "live0")
    times = timed(client, 50, 0.01)
    print("%46s a warm run among them: %.2f ms" % ("", p50_ms(times)))
    server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: about 30 s")
    parser.add_argument("--live", type=int, default=500, help="sessions for the memory measurement (0: none)")
    arguments = parser.parse_args()
    if not os.path.exists(PROGRAM):
        sys.exit("build it first: cargo build --release")
    rounds, count = (3, 60) if arguments.quick else (9, 150)
    print("%-46s %9s %9s        ratio" % ("", "server", "floor"))
    python = warm(rounds, count)
    first_run(python, rounds, 5 if arguments.quick else 15)
    if arguments.live:
        live(arguments.live)


if __name__ == "__main__":
    main()
