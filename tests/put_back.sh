#!/usr/bin/env bash
# Whether the simulation would find what it is there to find: puts each bug of tests/put_back/ back into a copy of this
# checkout, and fails where `simulation` then passes. The first two were found by it (see the log for c7b62dc and
# f570a5f), once in a thousand seeds or two; the others are what an earlier version did, or nearly did.
#
# usage: tests/put_back.sh [NAME]...   SEEDS (5000): how many are tried for each; about a minute a thousand
set -euo pipefail
cd "$(dirname "$0")/.."

here=$PWD
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git clone --quiet "$here" "$copy/main"
cd "$copy/main"
export CARGO_TARGET_DIR=$here/target/put_back SEEDS=${SEEDS:-5000} RUST_BACKTRACE=0

[ $# -gt 0 ] || set -- $(cd tests/put_back && ls ./*.patch | sed 's|.*/||; s|\.patch$||')
passed=0 failed=0
for bug; do
    git apply "tests/put_back/$bug.patch"
    # Built before, so that a patch that does not compile any more is no finding.
    cargo test --quiet --locked --test api --no-run
    if output=$(cargo test --quiet --locked --test api simulation::no_seed 2>&1); then
        echo "$bug: NOT found"
        failed=$((failed + 1))
    else
        echo "$bug: $(grep -o '[0-9]* of [0-9]* seeds broke a promise' <<<"$output"): $(grep -om1 '": [a-z ]*: ' <<<"$output" | tr -d '":')"
        passed=$((passed + 1))
    fi
    git checkout --quiet .
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
