#!/usr/bin/env bash
# Brings what the comparison needs, outside of the tree, then runs it: tests/engines.sh run benches/compare/run.sh
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/codesandbox-compare

missing=()
command -v bwrap >/dev/null || missing+=(bubblewrap)
/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
    echo "installing ${missing[*]}" >&2
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
fi

# Debian's Python, as the other contenders have it. Made again where the list of packages has changed.
if ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
    echo "installing requirements.txt into $venv" >&2
    /usr/bin/python3 -m venv --clear "$venv"
    "$venv/bin/pip" --quiet install --requirement "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/"
fi

# A session of its own, so that what it started is also stopped where tests/engines.sh does not wait for that.
# The mounts of containers stay out of what the others see: with 200 more a run under bubblewrap took a third longer.
setsid unshare --mount --propagation private "$venv/bin/python" "$here/compare.py" "$@" &
child=$!
trap 'kill -TERM $child' INT TERM HUP
status=0
wait $child || status=$?
while kill -0 $child 2>/dev/null; do # a signal ends `wait`
    wait $child || status=$?
done
exit $status
