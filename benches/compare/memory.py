"""The memory of processes, as the kernel counts it: each shared page divided by those who share it (PSS)."""

import os

from measure import pss_kib


def parents():
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % pid) as file:
                found[int(pid)] = int(file.read().rsplit(")", 1)[1].split()[1])
        except OSError:
            pass  # it has ended
    return found


def below(roots, keeper=False):
    """These processes and all that descend from them; with `keeper` those that started them, too: a container's shim
    or conmon, of which there is one for each and which lives as long as it does."""
    parent = parents()
    found = {parent[pid] for pid in roots} if keeper else set(roots)
    assert 1 not in found, "a container's keeper is gone"
    while more := {pid for pid in parent if parent[pid] in found} - found:
        found |= more
    return found


def mib(pids):
    total = 0
    for pid in pids:
        try:
            total += pss_kib(pid)
        except (OSError, TypeError):
            pass  # it has ended
    return total / 1024
