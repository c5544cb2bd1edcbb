#!/usr/bin/env bash
# Fuzzes the server by its own description: schemathesis (from PyPI, into target/) reads /openapi.json, makes up some
# thousand requests, right and wrong ones, and looks that each answer is one that the document describes. The same
# requests each time: the seed and the number are fixed. Takes two minutes at most; needs `cargo build`, python3 and PyPI.
#
# usage: tests/schemathesis.sh [OPTION OF SCHEMATHESIS…]
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$PWD/target/schemathesis
if ! cmp -s tests/schemathesis.txt "$venv/installed.txt"; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" -q install --disable-pip-version-check -r tests/schemathesis.txt
    cp tests/schemathesis.txt "$venv/installed.txt"
fi

work=$(mktemp -d)
: >"$work/log" # it is read before the server has opened it
server=
finish() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" || true
    fi
    rm -rf "$work"
}
trap finish EXIT

made=$(target/debug/codesandbox key new --tenant fuzz)
key=$(sed -n 's/^key.*: //p' <<<"$made")
sed -n 's/^line.*: //p' <<<"$made" >"$work/keys"
unenforced=()
[ "$(id -u)" = 0 ] || unenforced=(--allow-unenforced memory,cpus,uids)
# Each made-up user gets a sandbox: soon taken back, so that the next one finds room.
target/debug/codesandbox --listen 127.0.0.1:0 --driver embedded "${unenforced[@]}" \
    --set auth.mode=keys --set auth.keys_file="\"$work/keys\"" --set log=warn,codesandbox::cli=info \
    --set limits.timeout=1s --set session.idle_timeout=1s --set session.max=200 2>"$work/log" &
server=$!
for _ in $(seq 300); do
    address=$(sed -n 's|.*listening on \(http://[^,]*\),.*|\1|p' "$work/log")
    [ -z "$address" ] || break
    kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
    sleep 0.1
done
[ -n "$address" ] || { echo "schemathesis: the server does not start" >&2; exit 1; }

# Left out: unpack_files, since it makes no tars (tests/api/files.rs does, good and evil ones); positive_data_acceptance, since no schema says which names `data` may have, what 256 bytes are and what this
# server's caps are, so that some of what fits the schema is refused with 400; use_after_free, since a run makes a
# session that was deleted anew, as it should, and the check takes that for the old one.
cd "$work" # schemathesis writes into its directory
curl -fsS "$address/openapi.json" >openapi.json # as a file: it leaves out the path that it has the document from
timeout 170 "$venv/bin/schemathesis" run openapi.json --url "$address" -H "Authorization: Bearer $key" \
    --exclude-operation-id unpack_files --checks all --exclude-checks positive_data_acceptance,use_after_free --max-examples 100 --seed 1 \
    --generation-database none --request-timeout 20 --no-color "$@"
kill -0 "$server" || { echo "schemathesis: the server ended" >&2; cat "$work/log" >&2; exit 1; }
