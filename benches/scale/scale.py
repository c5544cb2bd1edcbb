#!/usr/bin/env python3
"""Measures how costs grow on one machine, with sessions, with what goes in and out of a run, and with files.

    cargo build --release && tests/engines.sh run python3 benches/scale/scale.py [--quick] [--drivers embedded,docker]

Up to 1000 live sessions on the embedded driver and 200 on Docker: the memory and CPU time of those that sleep, how long
one more takes to make and to remove, and the p50 and p99 of one user who runs, with pauses of 10 ms, while the others
sleep ("alone": the same of a server with that one session, in turns). Memory is PSS, of all processes of a sandbox;
Docker's shims are told apart, since they are the engine's; "machine" is what the whole machine has less of, the kernel's
part of each sandbox among it, and means nothing for a few sessions. Idle CPU time is of the server and all sandboxes,
the engine's (dockerd, containerd, shims) is told apart. Then one run by the bytes of its code, data, result and stdout,
and by the files in its workspace, fresh and in a kernel, with the caps raised as far as that needs.

Exit status 1 where a cost grows faster than linearly, or an answer is not what it has to be. Growth of memory is judged
by PSS, of making and removing by the least time, of an active user by the ratio to alone, of runs by the CPU time of all
processes. Draws figures/scale.svg where it is no quick run and has both drivers. 13 minutes, --quick takes 4. Root;
standard library only.
"""

import argparse, os, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))
BENCHES = os.path.dirname(HERE)
sys.path[1:1] = [BENCHES, os.path.join(BENCHES, "compare")]  # measure, engines and pool; memory and plot

import curves
import growth
import measure
import payloads
import sessions
from pool import DRIVERS, is_there

FIGURE = os.path.join(HERE, "figures", "scale.svg")
NAMES = ("embedded", "docker")


def of_sessions(title, note, steps, solid, dashed=None, least=0.01):
    """A panel: of each driver a field of its steps, or two."""
    fields = [(solid, False)] + ([(dashed, True)] if dashed else [])
    return curves.Panel(title, note, [
        (name, is_dashed, [(step.sessions, getattr(step, field)) for step in found])
        for name, found in steps.items() for field, is_dashed in fields
    ], least)


def of_payloads(title, kind, found):
    return curves.Panel(title, "ms; dashed: in a kernel", [
        (name, mode == "kernel", [(cost.size, cost.p50) for cost in of_driver[kind, mode]])
        for name, of_driver in found.items() for mode in payloads.MODES
    ])


def panels(steps, found):
    return [
        [
            of_sessions("Idle memory by sessions", "MiB each", steps, "each"),
            of_sessions("Idle CPU by sessions", "ms in a second, server and sandboxes", steps, "idle"),
            of_sessions("One more by sessions", "ms; dashed: to remove it", steps, "make", "remove"),
            of_sessions("An active user by sessions", "ms, p99; dashed: p50", steps, "p99", "p50"),
            of_payloads("A run by files", "files", found),
        ],
        [of_payloads("A run by bytes of " + kind, kind, found) for kind in ("code", "data", "result", "stdout")]
        + [of_payloads("A run by stdout, streamed", "streamed", found)],
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sessions and rounds: about 4 minutes; no figure")
    parser.add_argument("--drivers", default=",".join(NAMES), help="embedded, docker or both, with a comma")
    arguments = parser.parse_args()
    names = arguments.drivers.split(",")
    if not os.path.exists(measure.PROGRAM):
        sys.exit("build it first: cargo build --release")
    for name in names:
        if name not in NAMES or not is_there(name):
            sys.exit("no %s: tests/engines.sh run python3 benches/scale/scale.py" % name)
    begun, steps, found, growths = time.monotonic(), {}, {}, []
    for driver in (DRIVERS[name]() for name in names):
        steps[driver.name] = sessions.measure(driver, arguments.quick)
        found[driver.name] = payloads.measure(driver, arguments.quick)
        growths += sessions.growths(driver, steps[driver.name]) + payloads.growths(driver, found[driver.name])
    is_fine = growth.tell(growths)
    if set(names) == set(NAMES) and not arguments.quick:
        curves.draw(FIGURE, panels(steps, found))
    print("\n%.0f s in all" % (time.monotonic() - begun))
    sys.exit(0 if is_fine else 1)


if __name__ == "__main__":
    main()
