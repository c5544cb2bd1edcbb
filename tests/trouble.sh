#!/usr/bin/env bash
# Trouble of real engines: their own daemons are stopped, killed and started again, under a server that goes on.
#
# Engines of its own, in a directory of their own, since nobody else's survive that: a dockerd twice, with live-restore
# (containers outlive the daemon) and without (it kills them at its next start), and a rootless Podman. The images are
# those that tests/engines.sh has made, if it has. The trials are the part `daemon` of the conformance suite, which
# kills only engines below $TEST_ENGINES_TO_KILL and brings them up again by tests/engines.sh.
#
# usage: tests/trouble.sh [DRIVER]   docker or podman, both without; needs root
set -euo pipefail
cd "$(dirname "$0")/.."

shared=$(realpath -m "${ENGINES_DIR:-/var/tmp/codesandbox-engines}")
export ENGINES_DIR=${TROUBLE_DIR:-/var/tmp/codesandbox-kill} TEST_ENGINES_TO_KILL=
TEST_ENGINES_TO_KILL=$(realpath -m "$ENGINES_DIR")
[ "$TEST_ENGINES_TO_KILL" != "$shared" ] || { echo "trouble: these engines are not ours to kill" >&2; exit 2; }

drivers=("${@:-docker podman}")
mkdir -p "$ENGINES_DIR/cache"
# Both directories are on one file system, or else they are copied.
for image in "$shared"/cache/python-*.tar; do
    [ ! -e "$image" ] || cp -ln "$image" "$ENGINES_DIR/cache/" 2>/dev/null || cp -n "$image" "$ENGINES_DIR/cache/"
done

trial() { # DRIVER LIVE-RESTORE
    echo "trouble: $1, live-restore $2" >&2
    ENGINES_LIVE_RESTORE=$2 tests/engines.sh --only "$1" run \
        cargo test --test conformance "$1::daemon" -- --test-threads=1
}

for driver in ${drivers[*]}; do
    trial "$driver" true
    [ "$driver" != docker ] || trial docker false
done
