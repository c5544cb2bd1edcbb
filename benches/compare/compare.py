#!/usr/bin/env python3
"""Compares codesandbox with other ways to run Python, side by side on this machine, and prints tables.

    cargo build --release && tests/engines.sh run benches/compare/run.sh [--quick] [--only NAME]...

All contenders are up at once and take turns at each measure of each round, every second one backwards. A p50 is the
median over the rounds, with the least and the most of them in parentheses; p90 and p99 are of all runs of all rounds
(p99 of fewer than 100 runs is the slowest). "x floor" is the ratio to the floor's in the same round, told alike. The memory of an idle
session is PSS, with the container's shim or conmon where it has one. The client is the same for all: threads of this
program, which share the cores with what they measure.
A full run draws figures/compare.svg, too, unless a contender could not be started, which fails. Last come the ratios
that this project has set itself as goals. Root, on Debian 12.
"""

import argparse, os, platform, shutil, signal, subprocess, sys, threading, time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(1, os.path.dirname(HERE))  # measure, engines and pool

import measure
import memory
import plot
from contenders import contenders, in_parallel
from measure import median, verdict
from pool import percentile_ms

USERS = (1, 8, 32)  # at once, of the rates
IDLE_SESSIONS = 6  # whose memory is measured
IDLE_S = 1.5  # between their last run and that
BURST_S = 90  # the most that a burst may take; who is not answered by then counts as failed
PAUSE_S = 0.01
FIRST_PAUSE_S = 0.2  # before each first run

PROBE = r"""
import os, sys
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
result = {
    "python": sys.version.split()[0], "uid": os.getuid(), "capabilities": bin(int(status["CapEff"], 16)).count("1"),
    "no_new_privs": status["NoNewPrivs"].strip(), "seccomp": status["Seccomp"].strip(),
    "interfaces": [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line],
    "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
    "usr": os.access("/usr", os.W_OK),
}
"""


class Amounts:
    """How much is measured. Slow contenders get as many runs as fit in the time, fast ones up to the most."""

    def __init__(self, quick):
        self.rounds = 2 if quick else 4
        self.runs_s, self.runs = (0.8, 50) if quick else (2, 150)
        self.rate_s = 0.4 if quick else 1
        self.firsts_s, self.firsts = (1, 5) if quick else (2, 10)
        self.burst = max(USERS) if quick else 100


class Outcome:
    """What is known of one contender."""

    def __init__(self, contender):
        self.contender = contender
        self.reason = None  # why it is not among the running
        self.failed = {}  # the reason, by measure
        self.times = {}  # by measure, the seconds of each round's runs
        self.rates = {count: [] for count in USERS}
        self.burst_times, self.burst_errors = None, []
        self.idle_mib = None
        self.probed, self.remark = {}, ""
        self.users = []

    def attempt(self, measure, function, *arguments):
        """A measure that fails is told and not tried again; the others go on."""
        if self.reason or measure in self.failed:
            return
        try:
            function(self, *arguments)
        except (Exception, SystemExit) as error:
            self.failed[measure] = told(error)
            if measure in ("start", "users"):
                self.reason = self.failed.pop(measure)
            say("%s: %s: %s" % (self.contender.name, measure, told(error)))


def told(error):
    return (type(error).__name__ + ": " + " ".join(str(error).split()))[:300]


def say(text):
    print("%6.1f s  %s" % (time.monotonic() - BEGAN, text), file=sys.stderr, flush=True)


BEGAN = time.monotonic()


# --- What is measured once


def start(outcome):
    outcome.contender.start()


def idle_memory(outcome):
    contender = outcome.contender
    if not contender.keeps_sessions:
        return
    users = [contender.cold_user("idle%d" % number) for number in range(IDLE_SESSIONS)]
    for user in users:
        user.run()
    time.sleep(IDLE_S)
    outcome.idle_mib = memory.mib(contender.idle_pids(users)) / len(users)
    in_parallel(lambda user: user.stop(), users)


def burst(outcome, count):
    """New users at once; up to the most that the rates want of them stay."""
    contender = outcome.contender
    if contender.most_users < count:
        return
    contender.settle()
    time.sleep(FIRST_PAUSE_S)
    users, served, times, errors, barrier = [], [], [], [], threading.Barrier(count + 1)

    def come(name):
        try:
            barrier.wait()
            user = contender.user(name)
            users.append(user)
            user.run()
            times.append(time.perf_counter() - begun)
            served.append(user)
        except Exception as error:
            errors.append(told(error))

    def leave(user):
        try:
            user.stop()
        except Exception as error:  # of those who were not served there may be nothing to stop
            say("%s: a user does not leave: %s" % (contender.name, told(error)))

    threads = [threading.Thread(target=come, args=("burst%d" % number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    begun = time.perf_counter()
    barrier.wait()
    for thread in threads:
        thread.join(max(0, begun + BURST_S - time.perf_counter()))
    outcome.burst_times = list(times)
    late = count - len(outcome.burst_times) - len(errors)
    outcome.burst_errors = errors + ["no answer within %d s" % BURST_S] * late
    outcome.users = served[: max(USERS)]
    in_parallel(leave, [user for user in users if user not in outcome.users])


def make_users(outcome):
    """As many as the rates want, beside those of the burst."""
    contender = outcome.contender
    wanted = min(max(USERS), contender.most_users)
    for number in range(len(outcome.users), wanted):
        outcome.users.append(contender.user("user%d" % number))
    for user in outcome.users:
        user.wake()
        user.run()
    contender.settle()


def probe(outcome):
    outcome.probed = outcome.users[0].answer(PROBE, {})


def remark(outcome):
    outcome.remark = outcome.contender.remark(outcome.users[0])


# --- What is measured in each round


def as_many(one, seconds, most, least=2):
    """The times that `one` gives: `most` of them, or what fits in that time."""
    times, end = [], time.monotonic() + seconds
    while len(times) < most and (len(times) < least or time.monotonic() < end):
        times.append(one())
    return times


def spent(function):
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def warm(outcome, measure, pause, amounts):
    user = outcome.users[0]

    def one():
        if pause:
            time.sleep(pause)
        return spent(user.run)

    user.wake()
    for _ in range(3):
        one()
    outcome.times.setdefault(measure, []).append(as_many(one, amounts.runs_s, amounts.runs))


def first(outcome, measure, make, amounts):
    if make is None:
        return
    number = 0

    def one():
        nonlocal number
        number += 1
        if measure == "pooled":
            outcome.contender.settle()
        time.sleep(FIRST_PAUSE_S)
        begun = time.perf_counter()
        user = make("%s%d-%d" % (measure, len(outcome.times.get(measure, [])), number))
        user.run()
        taken = time.perf_counter() - begun
        user.stop()
        return taken

    outcome.times.setdefault(measure, []).append(as_many(one, amounts.firsts_s, amounts.firsts))


def rate(outcome, count, amounts):
    """Runs a second, up to the end of the last one that was begun in time."""
    if outcome.contender.most_users < count:
        return
    for user in outcome.users[:count]:
        user.wake()
    counts, errors = [0] * count, []
    begun = time.perf_counter()

    def work(index):
        try:
            while time.perf_counter() < begun + amounts.rate_s:
                outcome.users[index].run()
                counts[index] += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    outcome.rates[count].append(sum(counts) / (time.perf_counter() - begun))


def settle(outcome):
    outcome.contender.settle()


def one_round(outcomes, amounts):
    """Measure by measure, so that what is compared is seconds apart."""
    for outcome in outcomes:
        outcome.attempt("paced", warm, "paced", PAUSE_S, amounts)
    for outcome in outcomes:
        outcome.attempt("back to back", warm, "back to back", 0, amounts)
    for outcome in outcomes:
        outcome.attempt("cold", first, "cold", outcome.contender.cold_user, amounts)
    for outcome in outcomes:
        outcome.attempt("pooled", first, "pooled", outcome.contender.pooled_user, amounts)
        outcome.attempt("settle", settle)  # what the last of the pooled has taken is made again
    for count in USERS:
        for outcome in outcomes:
            outcome.attempt("%d users" % count, rate, count, amounts)


# --- Telling it


def circumstances():
    """What the figures are of."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout
    versions = [subprocess.run([name, "--version"], capture_output=True, text=True).stdout.strip()
                for name in ("dockerd", "podman", "bwrap") if shutil.which(name)]
    return "%s: codesandbox %s; Linux %s, %d cores of %s; %s" % (
        time.strftime("%Y-%m-%d"), commit.strip(), platform.release(), os.cpu_count(), model, "; ".join(versions)
    )


def table(title, head, rows):
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    print("\n" + title)
    for row in [head, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) if not column else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths))).rstrip())


def number(value):
    """With three digits that count."""
    return "%.0f" % value if value >= 100 else "%.1f" % value if value >= 10 else "%.2f" % value


def with_spread(values):
    return "%s (%s-%s)" % tuple(map(number, (median(values), min(values), max(values))))


def p50s(outcome, measure):
    return [median(times) * 1000 for times in outcome.times.get(measure, [])]


def p50_cells(outcome, floor, measure):
    """The p50 with its spread, and its ratio to the floor's."""
    ours, theirs = p50s(outcome, measure), p50s(floor, measure) if floor else []
    if not ours:
        return ["failed" if measure in outcome.failed else "-", "-"]
    return [with_spread(ours), ratio(ours, theirs)]


def ratio(ours, theirs):
    """By rounds, of which one that failed has fewer."""
    return with_spread([one / other for one, other in zip(ours, theirs)]) if ours and theirs else "-"


def warm_row(outcome, floor):
    row = [outcome.contender.name]
    for measure in ("paced", "back to back"):
        times = [one for times in outcome.times.get(measure, []) for one in times]
        tails = [number(percentile_ms(times, percent)) for percent in (90, 99)] if times else ["-", "-"]
        p50, to_floor = p50_cells(outcome, floor, measure)
        row += [p50, *tails, to_floor, str(len(times))]
    return row


def rate_row(outcome, floor):
    row = [outcome.contender.name]
    for count in USERS:
        failed = "failed" if "%d users" % count in outcome.failed else "-"
        row.append(with_spread(outcome.rates[count]) if outcome.rates[count] else failed)
    return row + [ratio(outcome.rates[1], floor.rates[1] if floor else [])]


def first_row(outcome, floor):
    row = [outcome.contender.name, *p50_cells(outcome, floor, "cold"), p50_cells(outcome, floor, "pooled")[0]]
    times = outcome.burst_times
    if times is None:
        row += ["failed" if "burst" in outcome.failed else "-", "-", "-", "-"]
    else:
        row += [number(percentile_ms(times, percent)) if times else "-" for percent in (50, 95, 99)]
        row.append("%d of %d" % (len(times), len(times) + len(outcome.burst_errors)))
    idle = "failed" if "memory" in outcome.failed else "-"
    return row + [number(outcome.idle_mib) if outcome.idle_mib is not None else idle]


def isolation_row(outcome):
    found = outcome.probed
    if not found:
        return [outcome.contender.name] + ["-"] * 8
    seccomp, network = {"0": "no", "2": "yes"}.get(found["seccomp"], "?"), "+".join(found["interfaces"]) or "none"
    return [
        outcome.contender.name, found["python"], str(found["uid"]), str(found["capabilities"]),
        "yes" if found["no_new_privs"] == "1" else "no", seccomp, network, str(found["processes"]),
        "yes" if found["usr"] else "no",
    ]


def tell(outcomes, amounts):
    running = [outcome for outcome in outcomes if not outcome.reason]
    floor = next((one for one in running if one.contender.name == "floor"), None)
    print(circumstances())
    tail = ["p50 ms", "p90", "p99", "x floor", "runs"]
    table("A warm run: with a pause of 10 ms (left), and back to back (right)", ["", *tail, *tail],
          [warm_row(one, floor) for one in running])
    table("Runs a second", ["", *("%d users" % count if count > 1 else "1 user" for count in USERS), "1 user, x floor"],
          [rate_row(one, floor) for one in running])
    table("The first run of a new user, %d new users at once, and what an idle session holds" % amounts.burst,
          ["", "cold p50 ms", "x floor", "pooled p50 ms", "burst: median ms", "p95", "p99", "answered", "idle MiB"],
          [first_row(one, floor) for one in running])
    table("Isolation, as a program in it sees it",
          ["", "Python", "uid", "capabilities", "no_new_privs", "seccomp", "interfaces", "processes seen", "may write /usr"],
          list(map(isolation_row, running)))
    print()
    for outcome in outcomes:
        print("%s: %s" % (outcome.contender.name, outcome.contender.isolation))
        unserved = ["NOT ANSWERED, %d of the burst: %s" % (outcome.burst_errors.count(error), error)
                    for error in sorted(set(outcome.burst_errors))]
        for text in (outcome.remark or outcome.contender.note, outcome.reason and "NOT STARTED: " + outcome.reason,
                     *unserved, *("FAILED, %s: %s" % item for item in outcome.failed.items())):
            if text:
                print("    " + text)
    sys.stdout.flush()


GOALS = (
    ("codesandbox, docker", "floor", "paced", "<=", 1.3),
    ("codesandbox, docker", "floor", "back to back", "<=", 1.5),
    ("docker exec", "codesandbox, docker", "paced", ">=", 100),
    ("codesandbox, embedded", "floor", "paced", "<=", 1.4),
    ("codesandbox, embedded", "floor", "back to back", "<=", 1.4),
)


def tell_goals(outcomes):
    """The p50 of one contender to that of another, as the median over the rounds."""
    named = {outcome.contender.name: outcome for outcome in outcomes}
    rows = []
    for name, other, measure, sign, goal in GOALS:
        ours, theirs = (p50s(named[one], measure) if one in named else [] for one in (name, other))
        if not ours or not theirs:
            continue
        found = median([one / its for one, its in zip(ours, theirs)])
        rows.append(["%s to %s, %s" % (name, other, measure), ratio(ours, theirs), verdict(found, sign, goal)])
    if rows:
        table("Goals", ["", "ratio of the p50s", "goal"], rows)


def panels(outcomes, amounts):
    """What the figure shows: for each contender a line from the least to the most, and points on it."""
    found = {title: {} for title in ("warm", "rates", "first", "burst", "memory")}
    for outcome in outcomes:
        name = outcome.contender.name
        if times := [one for times in outcome.times.get("paced", []) for one in times]:
            found["warm"][name] = [median(p50s(outcome, "paced")), percentile_ms(times, 99)]
        if any(outcome.rates.values()):
            found["rates"][name] = [median(values) if values else None for values in outcome.rates.values()]
        if cold := p50s(outcome, "cold"):
            pooled = p50s(outcome, "pooled")
            found["first"][name] = [median(pooled), median(cold)] if pooled else [None, median(cold)]
        if outcome.burst_times:
            found["burst"][name] = [percentile_ms(outcome.burst_times, percent) for percent in (50, 99)]
        if outcome.idle_mib is not None:
            found["memory"][name] = [outcome.idle_mib]
    return [
        plot.Panel("Warm run, ms", ["p50", "p99"], found["warm"]),
        plot.Panel("Runs a second", ["%d" % count for count in USERS[:2]] + ["%d users" % USERS[2]], found["rates"]),
        plot.Panel("First run of a new user, ms", ["pooled", "cold"], found["first"]),
        plot.Panel("%d new users at once, ms" % amounts.burst, ["median", "p99"], found["burst"]),
        plot.Panel("Idle session, MiB", ["PSS"], found["memory"]),
    ]


# --- All of it


def measure_all(outcomes, amounts):
    for outcome in outcomes:
        say(outcome.contender.name + " is started")
        outcome.attempt("start", start)
        outcome.attempt("memory", idle_memory)
    for outcome in outcomes:
        say(outcome.contender.name + ": %d new users at once" % amounts.burst)
        outcome.attempt("burst", burst, amounts.burst)
        outcome.attempt("users", make_users)
        outcome.attempt("probe", probe)
    for number in range(amounts.rounds):
        say("round %d of %d" % (number + 1, amounts.rounds))
        one_round(outcomes[:: -1 if number % 2 else 1], amounts)
    for outcome in outcomes:
        outcome.attempt("remark", remark)


def stop_all(outcomes):
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    in_parallel(stop, outcomes)


def stop(outcome):
    try:
        outcome.contender.stop()
        say(outcome.contender.name + " is stopped")
    except (Exception, SystemExit) as error:
        say("%s: it does not stop: %s" % (outcome.contender.name, told(error)))


def interrupted(*_):
    raise KeyboardInterrupt


def main():
    everyone = contenders()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "; ".join(one.name for one in everyone)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a burst of %d: 4 minutes" % max(USERS))
    parser.add_argument("--only", action="append", help="a part of a name, may be repeated: " + names)
    parser.add_argument("--figures", help="where the figure goes; without it, figures/, after a full run only")
    arguments = parser.parse_args()
    if not os.path.exists(measure.PROGRAM):
        sys.exit("build it first: cargo build --release")
    chosen = [one for one in everyone if not arguments.only or any(part in one.name for part in arguments.only)]
    if not chosen:
        parser.error("no contender has such a name")
    full = not arguments.quick and not arguments.only
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    outcomes, amounts = [Outcome(one) for one in chosen], Amounts(arguments.quick)
    try:
        measure_all(outcomes, amounts)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    finally:
        stop_all(outcomes)
    tell(outcomes, amounts)
    tell_goals(outcomes)
    if missing := [outcome.contender.name for outcome in outcomes if outcome.reason]:
        sys.exit("not started, so nothing is drawn: " + ", ".join(missing))
    if figures := arguments.figures or (os.path.join(HERE, "figures") if full else None):
        names = [outcome.contender.name for outcome in outcomes if not outcome.reason]
        plot.draw(os.path.join(figures, "compare.svg"), names, panels(outcomes, amounts), circumstances())
    say("done")


if __name__ == "__main__":
    main()
