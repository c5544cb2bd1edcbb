#!/usr/bin/env python3
"""Measures what the pool is for, on each driver, all in one run, and prints ratios.

    cargo build --release && tests/engines.sh run benches/pool.py [--quick] [--driver NAME]... [--goal NAME]...

Three goals. "first": the first run of a new user, who finds the pool full and the server at rest, against a warm run
of an existing user under the same conditions, in turns. "burst": 100 new users at once and 16 sandboxes in the pool
(on the embedded driver: no engine promises that). "refill": users who run all the time, while new ones keep the pool
busy against while it is at rest, in turns. Without --driver: embedded, and those whose TEST_..._HOST is set. Best as
root.
"""

import argparse, concurrent.futures, contextlib, http.client, multiprocessing, os, re, selectors, sys, time

import measure
from engines import IMAGE, Docker, Podman
from measure import Client, Server, median, timed

INSTANCE = "bench-pool"  # whoever else uses these engines has nothing to do with it
OLD_USERS = 4
PAUSE_S = 0.2  # between the last thing that the server did and a run that is timed
SETTLE_S = 120
BURST, BURST_POOL, BURST_S = 100, 16, 2.5
ANSWER_S = 30  # the most that one of a burst may take before it counts as not answered
# Often enough that a driver is making a sandbox most of the time.
NEW_USER_EVERY_S = {"embedded": 0.1, "docker": 0.5, "podman": 0.5}


class Embedded:
    name = "embedded"
    flags, prefix = ["--driver", "embedded"], ()


DRIVERS = {driver.name: driver for driver in (Embedded, Docker, Podman)}


def is_there(name):
    return name == "embedded" or bool(IMAGE and os.environ.get("TEST_%s_HOST" % name.upper()))


def percentile_ms(times, percent):
    """The smallest one that is not below `percent` of them."""
    ordered = sorted(times)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] * 1000


@contextlib.contextmanager
def serving(driver, *settings, instance=INSTANCE):
    flags = [flag for setting in ("session.max=1000", *settings) for flag in ("--set", setting)]
    server = Server(*driver.flags, "--instance", instance, *flags, prefix=driver.prefix)
    try:
        yield server
    finally:
        server.stop()


def call(server, method, path):
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request(method, path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status < 300, (method, path, answer.status, text)
    return text


def delete(server, user):
    call(server, "DELETE", "/sessions/" + user)


def metrics(server):
    """Each series with its value, by names as `sessions` and `sandboxes{state="warm"}`."""
    found = re.findall(r"^codesandbox_(\S+) (\S+)$", call(server, "GET", "/metrics"), re.M)
    return {name: float(value) for name, value in found}


def settle(server, size):
    """Waits until the pool is full and nothing is being made or removed."""
    end = time.monotonic() + SETTLE_S
    while True:
        found = metrics(server)
        states = ("warm", "starting", "removing")
        warm, starting, removing = (found['sandboxes{state="%s"}' % state] for state in states)
        if warm >= size and starting == removing == 0:
            return
        if time.monotonic() > end:
            raise TimeoutError("no rest: %d of %d warm, %d starting, %d removing" % (warm, size, starting, removing))
        time.sleep(0.02)


def connected(server, user):
    """A client whose connection has served a request before, so that only the run is timed."""
    client = Client(server, user)
    client.socket.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
    assert client.socket.recv(1 << 16).startswith(b"HTTP/1.1 200")
    return client


# --- The first run of a new user


def run_at_rest(server, user, size):
    settle(server, size)
    client = connected(server, user)
    time.sleep(PAUSE_S)
    spent = timed(client, 1, 0)
    client.stop()
    return spent


def first(driver, quick):
    size, count = 8, 10 if quick else 40
    with serving(driver, "pool.size=%d" % size) as server:
        for number in range(OLD_USERS):
            run_at_rest(server, "old%d" % number, size)
        new, old, before = [], [], metrics(server)
        for number in range(count):
            new += run_at_rest(server, "new%d" % number, size)
            delete(server, "new%d" % number)
            old += run_at_rest(server, "old%d" % (number % OLD_USERS), size)
        misses = since(before, metrics(server), 'claims_total{how="miss"}')
    row("%s: first run, pool of %d" % (driver.name, size), new, old, 50, "<= 2")
    row("", new, old, 90, "none")
    if misses:
        print("%40s NOT WHAT WAS TO BE MEASURED: %d of %d found no sandbox" % ("", misses, count))


def row(name, ours, other, percent, goal):
    mine, theirs = percentile_ms(ours, percent), percentile_ms(other, percent)
    print("%-40s p%d %8.2f ms, warm run %8.2f ms  ratio %.2f  goal %s" % (
        name, percent, mine, theirs, mine / theirs, goal), flush=True)


def since(before, after, series):
    return after.get(series, 0) - before.get(series, 0)


# --- A burst of new users


def burst(driver, quick):
    if driver.name != "embedded":
        return
    with serving(driver, "pool.size=%d" % BURST_POOL) as server:
        for number in range(1 if quick else 3):
            users = ["burst%d-%d" % (number, user) for user in range(BURST)]
            settle(server, BURST_POOL)
            times, errors = all_at_once(server, users)
            tell_burst(driver, times, errors)
            for user in users:
                delete(server, user)


def all_at_once(server, users):
    """Seconds from the first request to each good answer, and what came instead of the others."""
    times, errors, waiting = [], [], selectors.DefaultSelector()
    clients = [connected(server, user) for user in users]
    for client in clients:
        waiting.register(client.socket, selectors.EVENT_READ)
    time.sleep(PAUSE_S)
    begun = time.perf_counter()
    for client in clients:
        client.socket.sendall(client.request)
    while waiting.get_map():
        ready = waiting.select(begun + ANSWER_S - time.perf_counter())
        if not ready:
            errors += ["no answer within %d s" % ANSWER_S] * len(waiting.get_map())
            break
        for key, _ in ready:
            answer = key.fileobj.recv(1 << 16)
            waiting.unregister(key.fileobj)
            if answer.startswith(b"HTTP/1.1 200 ") and b'{"result":3,' in answer:
                times.append(time.perf_counter() - begun)
            else:
                errors.append(answer.decode(errors="replace")[:300] or "closed without an answer")
    for client in clients:
        client.stop()
    waiting.close()
    return times, errors


def tell_burst(driver, times, errors):
    name = "%s: %d new users, pool of %d" % (driver.name, BURST, BURST_POOL)
    print("%-40s answered %d, errors %d" % (name, len(times), len(errors)), end="", flush=True)
    if times:
        spent = tuple(one * 1000 for one in (times[0], median(times), times[-1]))
        print(": first %.0f, median %.0f, last %.0f ms" % spent, end="")
    print("  goal all, <= %d ms" % (BURST_S * 1000), flush=True)
    for error in sorted(set(errors)):
        print("%40s %d x %r" % ("", errors.count(error), error))


# --- Users who run while the pool is refilled


def refill(driver, quick):
    size, rounds, count = 4, 3 if quick else 9, 100 if quick else 250
    resting, refilling, counts = [], [], {"hit": 0, "miss": 0, "making": 0, "seconds": 0}
    with serving(driver, "pool.size=%d" % size) as server:
        for number in range(rounds):
            settle(server, size)
            resting.append(runs(server, count))
            before, begun = metrics(server), time.monotonic()
            with newcomers(server, driver, number):
                refilling.append(runs(server, count))
            after = metrics(server)
            counts["seconds"] += time.monotonic() - begun
            counts["making"] += since(before, after, "create_seconds_sum")
            for how in ("hit", "miss"):
                counts[how] += since(before, after, 'claims_total{how="%s"}' % how)
    for percent, goal in ((50, "none"), (99, "<= 2")):
        ours, theirs = ([percentile_ms(times, percent) for times in one] for one in (refilling, resting))
        ratios = [mine / other for mine, other in zip(ours, theirs)]
        print("%-40s p%d %8.2f ms, at rest %8.2f ms  ratio %.2f (%.2f to %.2f)  goal %s" % (
            "%s: running users, pool refilling" % driver.name if percent == 50 else "", percent,
            median(ours), median(theirs), median(ratios), min(ratios), max(ratios), goal), flush=True)
    print("%40s %.1f new users a second, %d of %d found no sandbox; one was being made %.0f %% of the time" % (
        "", (counts["hit"] + counts["miss"]) / counts["seconds"], counts["miss"], counts["hit"] + counts["miss"],
        100 * counts["making"] / counts["seconds"]))


def runs(server, count):
    """The times of two users, each with a pause of 10 ms between its runs."""
    clients = [connected(server, "running%d" % number) for number in range(2)]
    for client in clients:
        timed(client, 10, 0.01)
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        times = [one for times in pool.map(lambda client: timed(client, count, 0.01), clients) for one in times]
    for client in clients:
        client.stop()
    return times


@contextlib.contextmanager
def newcomers(server, driver, number):
    """New users all the time, in a process of their own: what they take must not delay the clocks of this one."""
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    process = context.Process(target=come_and_go, args=(server, "new%d" % number, NEW_USER_EVERY_S[driver.name], stop))
    process.start()
    try:
        time.sleep(0.5)  # until the pool is busy
        yield
    finally:
        stop.set()
        process.join()
    assert process.exitcode == 0, "a new user was not served"


def come_and_go(server, name, every_s, stop):
    """By the clock, as far as the server keeps up with it."""
    due, number = time.monotonic(), 0
    while not stop.wait(max(0, due - time.monotonic())):
        user = "%s-%d" % (name, number)
        client = Client(server, user)
        client.run()
        client.stop()
        delete(server, user)
        due, number = max(due + every_s, time.monotonic()), number + 1


GOALS = {"first": first, "burst": burst, "refill": refill}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: about 20 s for a driver")
    parser.add_argument("--driver", action="append", choices=DRIVERS, help="may be repeated")
    parser.add_argument("--goal", action="append", choices=GOALS, help="may be repeated; without it, all")
    parser.add_argument("--binary", default=measure.PROGRAM, help="the server, if not target/release/codesandbox")
    arguments = parser.parse_args()
    measure.PROGRAM = os.path.abspath(arguments.binary)
    if not os.path.exists(measure.PROGRAM):
        sys.exit("build it first: cargo build --release")
    for name in arguments.driver or filter(is_there, DRIVERS):
        if not is_there(name):
            sys.exit("no %s: tests/engines.sh run benches/pool.py" % name)
        driver = DRIVERS[name]()
        for goal in arguments.goal or GOALS:
            GOALS[goal](driver, arguments.quick)


if __name__ == "__main__":
    main()
