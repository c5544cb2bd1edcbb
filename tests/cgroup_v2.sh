#!/usr/bin/env bash
# The embedded driver's limits under cgroup v2, as root and as a user with a delegated group: in User Mode
# Linux (Debian: user-mode-linux), since a machine has one version or the other. Needs root and `cargo build`.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$PWD/target/debug/codesandbox
user=54321
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
cp "$program" "$work/codesandbox"

# User Mode Linux is slow: little memory, and much time to ask for it.
hog="$work/hog.py --timeout 200s --set limits.memory=128MiB --set limits.workspace=32MiB --set limits.tmp=16MiB --set limits.shm=16MiB"
cat >"$work/hog.py" <<'PY'
hog = bytearray(250 << 20)
for page in range(0, len(hog), 4096):
    hog[page] = 1
PY
cat >"$work/init" <<INIT
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /run
mount -t cgroup2 cgroup /sys/fs/cgroup
cd /
echo "BEGIN root"
$work/codesandbox doctor
$work/codesandbox run $hog
echo 'result = "alive"' | $work/codesandbox run -
find /sys/fs/cgroup -name 'codesandbox*'
echo "END root"
groups=/sys/fs/cgroup
echo "+memory +pids +cpu" >\$groups/cgroup.subtree_control
mkdir -p \$groups/user
echo "+memory +pids +cpu" >\$groups/user/cgroup.subtree_control
mkdir \$groups/user/scope
chown -R $user \$groups/user
echo "BEGIN user"
sh -c "echo \\\$\\\$ >\$groups/user/scope/cgroup.procs; exec setpriv --reuid $user --regid $user --clear-groups \\
    env -i PATH=/usr/bin:/bin $work/codesandbox doctor --allow-unenforced uids"
sh -c "echo \\\$\\\$ >\$groups/user/scope/cgroup.procs; exec setpriv --reuid $user --regid $user --clear-groups \\
    env -i PATH=/usr/bin:/bin $work/codesandbox run $hog --allow-unenforced uids"
echo "END user"
python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321fedc)'
INIT
chmod 755 "$work/init"
# A host whose cores have AMX takes no registers of a size that is not its own, which is larger than UML's (until 6.13).
cc -shared -fPIC -o "$work/ptrace.so" -xc - <<'C'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <sys/uio.h>

enum { GETREGSET = 0x4204, SETREGSET = 0x4205, XSTATE = 0x202 };

long ptrace(long request, long pid, long address, long data) {
    static char whole[1 << 16];
    static long (*next)(long, long, long, long);
    if (!next)
        next = (long (*)(long, long, long, long))dlsym(RTLD_NEXT, "ptrace");
    struct iovec *given = (struct iovec *)data, all = {whole, sizeof whole};
    if (request == SETREGSET && address == XSTATE && next(GETREGSET, pid, XSTATE, (long)&all) == 0 &&
        given->iov_len < all.iov_len) {
        memcpy(whole, given->iov_base, given->iov_len);
        data = (long)&all;
    }
    return next(request, pid, address, data);
}
C
# How it ends tells nothing; what it printed is checked below, its end included.
LD_PRELOAD="$work/ptrace.so" timeout 600 linux.uml \
    mem=1500M root=/dev/root rootfstype=hostfs rootflags=/ rw init="$work/init" \
    con=null con0=fd:0,fd:1 quiet </dev/null >"$work/log" 2>&1 || true

passed=0 failed=0
check() { # WHO WHAT PATTERN
    if sed -n "/BEGIN $1/,/END $1/p" "$work/log" | tr -d '\r' | grep -Eq "$3"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "not so under cgroup v2, as $1: $2"
    fi
}
for who in root user; do
    for limit in memory cpus processes; do
        check $who "$limit is limited by the group" "^$limit +on +cgroup v2\$"
    done
    check $who "a server starts" "^A server starts with this configuration"
    check $who "running out of memory is told apart" "^Error running code: killed: out of memory"
    check $who "it ends" "^END $who"
done
check root "the next sandbox works" '^"alive"$'
if sed -n "/BEGIN root/,/END root/p" "$work/log" | grep -q '^/sys/fs/cgroup/codesandbox'; then
    failed=$((failed + 1))
    echo "a control group is left behind"
fi
[ "$failed" = 0 ] || cat "$work/log"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
