#!/usr/bin/env python3
"""Where the time of a warm run goes on the embedded driver, from its request to the interpreter for the next one.

    cargo build --release && python3 benches/phases.py [--runs 60] [--pause 0.01]

Needs root and `perf` (Debian: linux-perf), whose record of every system call and task switch makes all of it about a
fifth longer. Prints medians, in microseconds, as the table of the README. First, without perf, what CPU time a run takes
where one follows the other, by process.
"""

import argparse, os, re, statistics, subprocess, tempfile, time
from measure import Client, Server

EVENTS = "raw_syscalls:sys_enter,sched:sched_switch,sched:sched_process_exit,sched:sched_process_fork"
WRITE, WRITEV, SEND = 1, 20, 44
LINE = re.compile(r"\s*(?P<task>\d+)\s+(?P<time>[\d.]+):\s+\w+:(?P<event>\w+):\s+(?P<rest>.*)")

PHASES = (
    ("the client's request", "the server has read and parsed it, and sent the run to PID 1"),
    ("", "PID 1 has parsed that, and handed it to the interpreter that waits"),
    ("", "that interpreter is on a core"),
    ("", "it has read, compiled and executed the code, and told the result"),
    ("", "PID 1 has looked that it is alone, and sent its report"),
    ("", "the server has parsed that, and written the answer"),
    ("", "the client is on a core"),
    ("the interpreter exits, beside the answer", "it has given back its memory (its exit)"),
    ("", "the forker has killed what may be left, and forked the next"),
)


def trace(server, client, runs, pause):
    """The events of so many runs: time in microseconds, task, name, number or text."""
    with tempfile.NamedTemporaryFile() as data:
        record = ["perf", "record", "-q", "-a", "-m", "16M", "-e", EVENTS, "-o", data.name]
        recorder = subprocess.Popen([*record, "sleep", str(1 + runs * (pause + 0.004))], stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        for _ in range(runs):
            client.run()
            time.sleep(pause)
        if recorder.wait():
            raise SystemExit("perf cannot record: it needs root, and Debian's package linux-perf")
        script = ["perf", "script", "-i", data.name, "-F", "tid,time,event,trace"]
        text = subprocess.run(script, capture_output=True, check=True).stdout.decode(errors="replace")
    events = []
    for match in map(LINE.match, text.splitlines()):
        if match:
            events.append((float(match["time"]) * 1e6, int(match["task"]), match["event"], match["rest"]))
    return events


def first(events, since, wanted):
    """The first event after a time that is as wanted."""
    return next((event for event in events if event[0] > since and wanted(event)), None)


def called(tasks, *numbers):
    return lambda event: event[2] == "sys_enter" and event[1] in tasks and int(event[3].split()[1]) in numbers


def on_core(task):
    return lambda event: event[2] == "sched_switch" and "next_pid=%d " % task in event[3]


def off_core_for_good(task):
    return lambda event: event[2] == "sched_switch" and re.search("prev_pid=%d .*prev_state=[ZX]" % task, event[3])


def happened(name, task):
    return lambda event: event[2] == name and event[1] == task


def marks(events, sent, me, server, first_process, forker):
    """When each phase of one run began and ended, nine pairs, in microseconds."""
    given = first(events, sent, called(server, WRITE, WRITEV, SEND))
    handed = first(events, given[0], called({first_process}, WRITE))
    forked = [event for event in events if event[0] < sent and happened("sched_process_fork", forker)(event)]
    interpreter = int(re.search(r"child_pid=(\d+)", forked[-1][3])[1])
    running = first(events, given[0], on_core(interpreter))
    told = first(events, running[0], called({interpreter}, WRITE))
    reported = first(events, told[0], called({first_process}, WRITE))
    answered = first(events, reported[0], called(server, WRITE, WRITEV, SEND))
    back = first(events, answered[0], on_core(me))
    killed = first(events, told[0], happened("sched_process_exit", interpreter))
    gone = first(events, killed[0], off_core_for_good(interpreter))
    following = first(events, gone[0], happened("sched_process_fork", forker))
    ends = [event[0] for event in (given, handed, running, told, reported, answered, back, gone, following)]
    return list(zip([sent, *ends[:6], killed[0], gone[0]], ends))


def cpu_times(server, first_process, forker):
    """Milliseconds that each has used so far; of the interpreters, those that have ended."""

    def used(path):
        with open(path + "/schedstat") as file:
            return int(file.read().split()[0]) / 1e6

    threads = "/proc/%d/task" % server.process.pid
    return {
        "the interpreters": server.runs_cost()[1] * 1000,
        "the forker": used("/proc/%d" % forker),
        "PID 1": used("/proc/%d" % first_process),
        "the server": sum(used(threads + "/" + task) for task in os.listdir(threads)),
    }


def tell_cpu(server, client, first_process, forker, runs):
    before = cpu_times(server, first_process, forker)
    for _ in range(runs):
        client.run()
    now = cpu_times(server, first_process, forker)
    spent = {name: (now[name] - before[name]) / runs for name in now}
    parts = ", ".join("%s %.2f" % item for item in spent.items())
    print("CPU time of a run, in ms: %s; %.2f in all (%d runs)" % (parts, sum(spent.values()), runs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--pause", type=float, default=0.01, help="seconds between two runs")
    options = parser.parse_args()
    server = Server("--set", "pool.size=0")
    try:
        client = Client(server, "a")
        for _ in range(50):
            client.run()
            time.sleep(0.005)
        tasks = {int(task) for task in os.listdir("/proc/%d/task" % server.process.pid)}
        first_process, forker, _ = server.sandbox_pids()
        tell_cpu(server, client, first_process, forker, 20 * options.runs)
        events = trace(server, client, options.runs, options.pause)
    finally:
        server.stop()
    rows = []
    for event in events:
        if called({os.getpid()}, SEND)(event):
            try:
                times = marks(events, event[0], os.getpid(), tasks, first_process, forker)
            except (IndexError, TypeError):
                continue  # the first and the last are not recorded as a whole
            rows.append([end - begin for begin, end in times])
    if len(rows) < options.runs / 2:
        raise SystemExit("only %d of %d runs have all their phases in perf's record" % (len(rows), options.runs))
    for (since, until), column in zip(PHASES, zip(*rows)):
        print("| %s | %s | %.0f |" % (since, until, statistics.median(column)))
    print("from %d runs" % len(rows))


main()
