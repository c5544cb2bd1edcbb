# PID 1 of every sandbox: keeps one interpreter forked in advance and hands it the code of the next run.
#
# The supervisor (PID 1) talks to the server, the forker holds the next interpreter ready, and the run's own process
# executes the guest's code. A session that asks for it has a kernel, too: an interpreter that stays between runs.
#
# The files of this directory are one program, joined by program.rs: a sandbox is given one text, and each module
# imported would cost a part of its start. In the order in which they are joined:
#   what all use         prelude, encoding, frames, processes
#   the guest's side     source, outcome, extras, task, narrowed, guest, cell
#   forks                forker
#   the supervisor's     capture, run, kernel, listing, place, files, posture, supervisor, main
# The guest can do as it likes with the processes of its side: the supervisor takes nothing from them on trust.
#
# Only the standard library, Python 3.8 to 3.14, and as few imports as can be: each costs every sandbox
# a part of its start (`signal` alone 4 ms, through enum; hence `_signal`). The frames on descriptors 0
# and 1 are described in protocol.rs. What a run can reach is its own process: it gets its stdin, stdout,
# stderr and the result pipe, and everything that it changed dies with it.
#
# The one argument says what follows the end of descriptor 0: nothing (without an argument: the sandbox dies
# with its server), or, with `park`, a life in which PID 1 only collects the dead, since the engine closes the
# stream of a server that leaves. Then a server that comes back starts this program a second time, `beside` it.
import gc, os, select, struct, sys, time
import _signal, _socket, _stat

WORKSPACE = "/workspace"
NOTHING = -1
MOST_DESCRIPTORS = 64  # this program opens about 15
REAP_S = 5.0  # a process that outlives SIGKILL by this much condemns the sandbox
PARK, BESIDE = "park", "beside"
PARKED = b"parked"  # the name of a PID 1 that is
PARKED_KERNEL = b"parked kernel"  # and of one that had a kernel, which nobody can talk to any more
MODE = sys.argv[1] if len(sys.argv) > 1 else ""
