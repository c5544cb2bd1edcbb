#!/usr/bin/env bash
# Our own share of a run in instructions, which repeat where times do not, held against benches/instructions.txt.
#
#     benches/instructions.sh [--write]
#
# Counted by callgrind: the server on the fake engine, and not its client, which is the program's first thread. The start is
# not in it: what a long life costs more than a short one is divided by the requests that it has more. Exits with 1 where that is more than MARGIN
# per cent off the committed figure: less, too, since the next growth would hide in it. --write commits to what was counted.
# Needs valgrind (Debian: valgrind). An unoptimised build: CI has one, and what grows in it grows in the other.
set -euo pipefail
cd "$(dirname "$0")/.."

FEW=500 MANY=1500 MARGIN=5
FIGURE=benches/instructions.txt
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

program=$(cargo build --locked --bench dispatch --message-format=json 2>"$place/build" |
    sed -n 's/.*"name":"dispatch".*"executable":"\([^"]*\)".*/\1/p') || { cat "$place/build" >&2; exit 1; }

# The server's thread is the second one.
count() {
    valgrind --tool=callgrind --separate-threads=yes --callgrind-out-file="$place/out.$1" \
        "$program" --requests "$1" 2>"$place/log.$1" || { cat "$place/log.$1" >&2; exit 1; }
    sed -n 's/^totals: //p' "$place/out.$1-02" | tail -1 | grep -x '[0-9]\+'
}

few=$(count $FEW)
many=$(count $MANY)
now=$(((many - few) / (MANY - FEW)))
if [ "${1:-}" = --write ]; then
    echo "$now" >$FIGURE
    echo "$now instructions a run: written to $FIGURE"
    exit
fi
committed=$(cat $FIGURE)
change=$(((now - committed) * 1000 / committed))
echo "$now instructions a run, $committed committed: $((change / 10)).$((${change#-} % 10)) %"
if ((now * 100 > committed * (100 + MARGIN))); then
    echo "a run costs more than it did. If it has to: benches/instructions.sh --write, and say why in the commit" >&2
    exit 1
elif ((now * 100 < committed * (100 - MARGIN))); then
    echo "a run costs less than it did: benches/instructions.sh --write keeps it so" >&2
    exit 1
fi
