#!/usr/bin/env bash
# Private container engines for the tests: they touch no engine of the machine's own, and leave nothing behind.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: tests/engines.sh [--docker-26 | --only ENGINE] up | down [--purge] | run COMMAND... | revive | status

  up       brings up what is missing and prints `export` lines: eval "$(tests/engines.sh up)"
  run      brings up what is missing and runs COMMAND with those variables; takes the engines down again, unless
           `up` was asked for before or another `run` is still using them; ends with COMMAND's status
  down     removes all containers in these engines and stops them; images and what was downloaded stay
           --purge  deletes those, too
  revive   starts again what a COMMAND of `run` has killed
  status   what answers, and where; fails where something does not

  --docker-26   with `up` and `run`: a dockerd 26.1 as well
  --only        with `up` and `run`: this engine alone (docker, podman, podman-stdin, podman5, docker26)

Needs root and Debian 12 or newer. Variables: ENGINES_DIR, where everything lies (/var/tmp/codesandbox-engines), and
ENGINES_MIRROR, the Debian mirror (the one that apt uses); ENGINES_LIVE_RESTORE (true): whether Docker's containers
outlive a daemon that is killed. The ordinary user that Podman runs as stays: codesandbox-test.

What comes up, each on a socket of its own:
  TEST_DOCKER_HOST        this machine's Docker, as root
  TEST_PODMAN_HOST        this machine's Podman, rootless
  TEST_PODMAN_STDIN_HOST  the same, and conmon keeps a container's stdin open when a client goes (--leave-stdin-open)
  TEST_PODMAN5_HOST       Podman 5.4 (Debian 13's), rootless
  TEST_DOCKER26_HOST      Docker 26.1 (Debian 13's), as root: with --docker-26 only
COMMAND is also told TEST_IMAGE, TEST_IMAGES (all of them), TEST_PODMAN_USER and TEST_REQUIRE.
USAGE
}

dir=$(realpath -m "${ENGINES_DIR:-/var/tmp/codesandbox-engines}")
user=codesandbox-test
here=$(cd "$(dirname "$0")" && pwd)
# The name must be whole for Podman, and "localhost/" is never looked for in a registry, by either.
image=localhost/codesandbox-test/python
# The first one is the main one, and may not be missing.
pythons=(3.13:trixie 3.11:bookworm 3.9:bullseye)
engines=(docker podman podman-stdin podman5) # those wanted
all_engines=("${engines[@]}" docker26)
# Two of these may live side by side.
group=codesandbox-engines-$(printf %s "$dir" | sha256sum | head -c 8)

say() { echo "engines: $*" >&2; }

# --- Doing several things at once, and telling how long each took

step() { # NAME FUNCTION [ARGUMENT...]
    local name=$1 began=${EPOCHREALTIME/[^0-9]/} took
    shift
    "$@" || return
    took=$(((${EPOCHREALTIME/[^0-9]/} - began) / 1000))
    printf 'engines: %3d.%02d s  %s\n' $((took / 1000)) $((took % 1000 / 10)) "$name" >&2
}

together() { # COMMAND-LINE...: all run; fails if one has failed, once all have ended
    local line pid pids=() failed=0
    for line in "$@"; do
        $line &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
    return $failed
}

# --- What is made once and kept: a root file system per Python, and one that engines of Debian 13 run in

mirror() {
    local uri=${ENGINES_MIRROR:-}
    # shellcheck disable=SC2016  # it is apt that fills it in
    [ -n "$uri" ] || uri=$(apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' 'Created-By: Packages' 2>/dev/null | sed -n 1p)
    echo "${uri:-http://deb.debian.org/debian/}"
}

debootstrap() { # NAME SUITE TARGET OPTION...: from the mirror, or from where Debian keeps its oldest releases
    local name=$1 suite=$2 target=$3 from proxy=
    shift 3
    eval "$(apt-config shell proxy Acquire::http::Proxy)"
    for from in "$(mirror)" http://archive.debian.org/debian; do
        # Only unpacked: no script of a package is run. The links are what a merged /usr looks like.
        # shellcheck disable=SC2016  # it is mmdebstrap's shell that fills it in
        TMPDIR=$dir/tmp mmdebstrap --variant=extract ${proxy:+--aptopt="Acquire::http::Proxy \"$proxy\""} \
            --setup-hook='mkdir -p "$1/usr/bin" "$1/usr/sbin" "$1/usr/lib" "$1/usr/lib64" "$1/tmp"; chmod 1777 "$1/tmp"
                for name in bin sbin lib lib64; do ln -s usr/$name "$1/$name"; done' \
            "$@" "$suite" "$target" "$from" >"$dir/log/$name" 2>&1 8>&- 9>&- && return
        rm -rf "$target"
        say "$suite from $from: $(grep '^E: ' "$dir/log/$name" | head -n 3)"
    done
    return 1
}

# Whatever a thing is made by is the key that it is kept under.
python_key() { # PYTHON:SUITE
    { declare -f debootstrap make_python; echo "$1"; } | sha256sum | head -c 12
}

python_file() { echo "$dir/cache/python-${1%:*}-$(python_key "$1").tar"; } # PYTHON:SUITE

# Without the compiled files every first reply takes a tenth of a second longer. `python3-minimal` would lack ctypes,
# resource, mmap and asyncio. Hostile programs start a shell and its tools.
make_python() { # PYTHON:SUITE
    local python=${1%:*} suite=${1#*:} file
    file=$(python_file "$1")
    [ ! -e "$file" ] || return 0
    rm -f "$dir/cache/python-$python-"*
    # shellcheck disable=SC2016  # it is mmdebstrap's shell that fills it in
    debootstrap "python-$python" "$suite" "$file.part.tar" --include=python3,dash,coreutils \
        --extract-hook='chroot "$1" python3 -I -S -m compileall -q --invalidation-mode unchecked-hash \
            /usr/lib/python'"$python" || return 1
    mv "$file.part.tar" "$file"
}

trixie_key() {
    declare -f debootstrap make_trixie | sha256sum | head -c 12
}

trixie_root() { echo "$dir/cache/trixie-$(trixie_key)"; }

make_trixie() {
    local root
    root=$(trixie_root)
    [ ! -e "$root" ] || return 0
    rm -rf "$dir/cache/trixie-"*
    debootstrap trixie trixie "$root.part" \
        --include=podman,conmon,runc,uidmap,netavark,docker.io,iptables,ca-certificates,mount,util-linux,bash || return 1
    mv "$root.part" "$root"
}

make_images() {
    local python missing=()
    together "${pythons[@]/#/make_image }" || true
    for python in "${pythons[@]}"; do
        [ -e "$(python_file "$python")" ] || missing+=("$python")
    done
    [ ${#missing[@]} = 0 ] || say "NOT MADE: ${missing[*]} (is it on the mirror?); the tests go without"
    [ -e "$(python_file "${pythons[0]}")" ]
}

make_image() { # PYTHON:SUITE
    [ -e "$(python_file "$1")" ] || step "image for Python ${1%:*} made" make_python "$1"
}

# --- Talking to an engine

socket() { echo "$dir/$1/$1.sock"; } # ENGINE

api() { # ENGINE PATH CURL-OPTION...
    local engine=$1 path=$2
    shift 2
    curl -sS -f --unix-socket "$(socket "$engine")" "$@" "http://engine$path"
}

answers() { api "$1" /_ping --max-time 5 >/dev/null 2>&1; } # ENGINE

await() { # ENGINE PID
    local _
    for _ in {1..600}; do
        ! answers "$1" || return 0
        kill -0 "$2" 2>/dev/null || break
        sleep 0.05
    done
    say "$1 does not come up; its log ends with"
    tail -n 15 "$dir/$1/log" >&2
    return 1
}

# --- Starting an engine

# XDG_RUNTIME_DIR is also how `family` knows what belongs to us, so an engine that has no use for it gets it, too.
detached() { # ENGINE COMMAND...
    local engine=$1 home=$dir/$1
    shift
    cd /
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="$home" TMPDIR="$home/tmp" \
        XDG_RUNTIME_DIR="$home/run" PODMAN_IGNORE_CGROUPSV1_WARNING=1 \
        CONTAINERS_CONF="$home/containers.conf" CONTAINERS_STORAGE_CONF="$home/storage.conf" \
        setsid "$@" </dev/null >>"$home/log" 2>&1 8>&- 9>&- &
    echo $! >"$home/pid"
    await "$engine" $!
}

forget_dead() { # PIDFILE...
    local file
    for file; do
        [ ! -s "$file" ] || grep -q '^State:.[^ZX]' "/proc/$(cat "$file")/status" 2>/dev/null || rm -f "$file"
    done
}

# No network of its own, so that it leaves the machine's firewall alone; a file of its own, so that it reads no other.
# What it makes elsewhere all the same: /etc/docker/key.json and empty directories in /run/docker and /run/containerd.
configure_docker() { # ENGINE
    local home=$dir/$1
    mkdir -p "$home/tmp" "$home/run"
    # Of one that was killed: until somebody has collected it, the next takes it for alive.
    forget_dead "$home/daemon.pid" "$home/exec/containerd/containerd.pid"
    cat >"$home/daemon.json" <<JSON
{
    "hosts": ["unix://$(socket "$1")"],
    "data-root": "$home/data",
    "exec-root": "$home/exec",
    "pidfile": "$home/daemon.pid",
    "bridge": "none",
    "iptables": false,
    "live-restore": ${ENGINES_LIVE_RESTORE:-true},
    "exec-opts": ["native.cgroupdriver=cgroupfs"],
    "cgroup-parent": "/$group"
}
JSON
}

start_docker() {
    configure_docker docker
    detached docker dockerd --config-file "$dir/docker/daemon.json"
}

at_most() { # ULIMIT-OPTION NUMBER
    local hard
    hard=$(ulimit "-H$1")
    if [ "$hard" = unlimited ] || [ "$hard" -ge "$2" ]; then echo "$2"; else echo "$hard"; fi
}

configure_podman() { # ENGINE
    local home=$dir/$1
    install -d -o "$user" -g "$user" -m 755 "$home" "$home/tmp"
    install -d -o "$user" -g "$user" -m 700 "$home/run" "$home/rr" "$home/shm"
    # "vfs", the default in places, takes seconds to create a container.
    cat >"$home/storage.conf" <<TOML
[storage]
driver = "overlay"
graphroot = "$home/store"
rootless_storage_path = "$home/store"
runroot = "$home/rr"
TOML
    # Podman's own limits may be above what an ordinary user can have; crun refuses a machine that has both versions of
    # control groups; the other two are for a machine without systemd.
    cat >"$home/containers.conf" <<TOML
[containers]
default_ulimits = ["nofile=1024:$(at_most n 20000)", "nproc=$(at_most u 4096):$(at_most u 4096)"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
# What podman exec leaves behind waits for five minutes by default; each restart of a server makes some.
exit_command_delay = 10
TOML
}

# All Podmans of a user share the locks in /dev/shm, whatever their stores are, unless each has one of its own.
# shellcheck disable=SC2016  # the inner shell fills it in
own_shm=(unshare --mount sh -ec 'mount --bind "$HOME/shm" /dev/shm; exec "$@"' own_shm)
as_user=(setpriv --reuid "$user" --regid "$user" --init-groups --)

# Of `runroot` the configuration file alone does not convince it.
serve() { # ENGINE WRAPPER...
    local engine=$1
    shift
    detached "$engine" "$@" "${as_user[@]}" podman --runroot "$dir/$engine/rr" system service -t 0 "unix://$(socket "$engine")"
}

start_podman() {
    configure_podman podman
    serve podman "${own_shm[@]}"
}

start_podman-stdin() {
    configure_podman podman-stdin
    printf '#!/bin/sh\nexec conmon --leave-stdin-open "$@"\n' >"$dir/podman-stdin/conmon"
    chmod 755 "$dir/podman-stdin/conmon"
    echo "conmon_path = [\"$dir/podman-stdin/conmon\"]" >>"$dir/podman-stdin/containers.conf"
    serve podman-stdin "${own_shm[@]}"
}

# Debian 13's root file system becomes the root, in a mount namespace that ends with its last process. A chroot would
# not do: nobody may make user namespaces in one. Paths below our directory mean the same inside and outside.
# shellcheck disable=SC2016  # the inner shell fills it in
in_trixie=(unshare --mount sh -ec '
    root=$1 dir=$2; shift 2
    mount --bind "$root" "$root"
    for part in proc sys dev; do mkdir -p "$root/$part"; mount --rbind "/$part" "$root/$part"; done
    mkdir -p "$root/run" "$root/var/tmp" "$root$dir"
    chmod 1777 "$root/var/tmp"
    mount -t tmpfs tmpfs "$root/run"
    mount --bind "$dir" "$root$dir"
    [ ! -d "$HOME/shm" ] || mount --bind "$HOME/shm" "$root/dev/shm"
    for file in passwd group subuid subgid; do cp "/etc/$file" "$root/etc/$file"; done
    cd "$root"
    pivot_root . .
    umount -l .
    exec "$@"' in_trixie)

start_podman5() {
    [ -e "$(trixie_root)" ] || step "root of Debian 13 made" make_trixie
    configure_podman podman5
    serve podman5 "${in_trixie[@]}" "$(trixie_root)" "$dir"
}

start_docker26() {
    [ -e "$(trixie_root)" ] || step "root of Debian 13 made" make_trixie
    configure_docker docker26
    detached docker26 "${in_trixie[@]}" "$(trixie_root)" "$dir" dockerd --config-file "$dir/docker26/daemon.json"
}

# --- Bringing engines up

in_engine() { # ENGINE PYTHON:SUITE: whether it has this very image
    api "$1" "/images/$image:${2%:*}/json" 2>/dev/null | grep -q "\"Comment\":\"$(python_key "$2")\""
}

image_id() { # ENGINE NAME
    { api "$1" "/images/$2/json" 2>/dev/null || true; } |
        sed -n 's/^[^"]*"Id":"\([^"]*\)".*/\1/p'
}

import() { # ENGINE: the images that it lacks
    local python file name key path before
    for python in "${pythons[@]}"; do
        file=$(python_file "$python") name=$image:${python%:*} key=$(python_key "$python")
        if [ ! -e "$file" ] || in_engine "$1" "$python"; then continue; fi
        case $1 in # Docker's own call, asked of Podman 4.3, drops the tag
            docker*) path="/images/create?fromSrc=-&repo=${name%:*}&tag=${name##*:}&message=$key" ;;
            podman*) path="/v4.0.0/libpod/images/import?reference=$name&message=$key" ;;
        esac
        before=$(image_id "$1" "$name")
        api "$1" "$path" -X POST -H 'Content-Type: application/x-tar' -T "$file" >>"$dir/$1/log" || return 1
        in_engine "$1" "$python" || { say "$1 did not take the image $name"; return 1; }
        [ -z "$before" ] || api "$1" "/images/$before" -X DELETE >>"$dir/$1/log" 2>&1 || true # it may be in use
    done
}

start() { # ENGINE
    answers "$1" || step "$1 started" start_anew "$1"
}

# An engine believes what it finds of an earlier life, process numbers among it, unless something of it is still alive.
start_anew() { # ENGINE
    is_left "$1" || (cd "$dir" && rm -rf --one-file-system "$1"/{run,rr,shm,exec,daemon.pid})
    "start_$1"
}

need_packages() {
    local command
    for command in conmon containerd curl dockerd mmdebstrap newuidmap podman runc; do
        command -v "$command" >/dev/null || { "$here/../.ci/setup" --engines; return; }
    done
}

# No system user, so that it gets a range in /etc/subuid, which Podman needs.
need_user() {
    id "$user" >/dev/null 2>&1 || useradd --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$user"
    grep -q "^$user:" /etc/subuid || { say "$user has no range in /etc/subuid"; return 1; }
    "${as_user[@]}" test -x "$dir" || { say "$user cannot reach $dir"; return 1; }
}

up() {
    need_packages
    need_user
    mkdir -p "$dir/cache" "$dir/log" "$dir/tmp"
    together make_images "${engines[@]/#/start }"
    together "${engines[@]/#/import }"
}

variables() { # what COMMAND is told; never CODESANDBOX_..., which would configure the server
    local engine name python images=()
    for engine in "${engines[@]}"; do
        name=${engine^^}
        name=TEST_${name//-/_}_HOST
        ! answers "$engine" || echo "$name=unix://$(socket "$engine")"
    done
    for python in "${pythons[@]}"; do
        [ ! -e "$(python_file "$python")" ] || images+=("$image:${python%:*}")
    done
    echo "TEST_IMAGE=${images[0]}"
    echo "TEST_IMAGES=${images[*]}"
    echo "TEST_PODMAN_USER=$user"
    echo "TEST_REQUIRE=embedded docker podman"
}

# --- Taking engines down

descendants() { # reads process ids, writes them and all below
    cat - <(cat /proc/[0-9]*/status 2>/dev/null) | awk '
        !/:/ { found[$1] }
        $1 == "Pid:" { pid = $2 }
        $1 == "PPid:" { parent[pid] = $2 }
        END {
            do {
                more = 0
                for (pid in parent) if (!(pid in found) && parent[pid] in found) { found[pid]; more = 1 }
            } while (more)
            for (pid in found) print pid
        }'
}

# Is it one of ours, and of this very directory: something else may have one of the same name. Unlike `kill -0` it says
# no to zombies and to whoever has the number by now.
belongs() { # ENGINE PID
    grep -qszFx "XDG_RUNTIME_DIR=$dir/$1/run" "/proc/$2/environ" && [ "/proc/$2/root$dir" -ef "$dir" ]
}

# What an engine starts may outlive it, as shims, conmon and Podman's pause process do. All of it has the engine's
# environment, but for what runs in a container, whose parent has it.
family() { # ENGINE
    local pid
    { grep -lszFx "XDG_RUNTIME_DIR=$dir/$1/run" /proc/[0-9]*/environ || true; } | while IFS=/ read -r _ _ pid _; do
        ! belongs "$1" "$pid" || echo "$pid"
    done | descendants
}

is_left() { [ -n "$(family "$1")" ]; } # ENGINE

gone() { # SECONDS COMMAND...: waits until COMMAND fails
    local end=$((SECONDS + $1))
    shift
    while "$@" 2>/dev/null; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}

remove_containers() { # ENGINE
    local id path='/containers/%s?force=1&v=1'
    [[ $1 != podman* ]] || path='/v4.0.0/libpod/containers/%s?force=1&v=1&timeout=0' # otherwise it waits 10 s
    for id in $(api "$1" '/containers/json?all=1' --max-time 10 | grep -o '"Id":"[0-9a-f]*"' | cut -d'"' -f4); do
        api "$1" "${path/\%s/$id}" -X DELETE --max-time 20 >/dev/null &
    done
    wait
}

stop() { # ENGINE
    local pid below
    # While it answers: nothing ends containers as thoroughly. Docker's would outlive it, by --live-restore.
    ! answers "$1" || remove_containers "$1"
    pid=$(cat "$dir/$1/pid" 2>/dev/null) || pid=
    # The number may be somebody else's by now.
    if [ -n "$pid" ] && belongs "$1" "$pid"; then
        kill "$pid"
        gone 15 belongs "$1" "$pid" || say "$1 does not end by itself"
    fi
    for pid in $(family "$1"); do
        kill -KILL "$pid" 2>/dev/null || true
    done
    gone 5 is_left "$1" || say "$1 leaves processes behind: $(family "$1" | xargs)"
    while read -r below; do
        umount "$below" || umount -l "$below"
    done < <(cut -d' ' -f5 /proc/self/mountinfo | grep "^$dir/$1/" | sort -r)
    rm -f "$dir/$1/pid" "$(socket "$1")"
}

stop_step() { step "$1 stopped" stop "$1"; } # ENGINE

remove_groups() {
    local top
    for top in /sys/fs/cgroup/"$group" /sys/fs/cgroup/*/"$group"; do
        [ ! -d "$top" ] || find "$top" -depth -type d -exec rmdir {} +
    done
}

down() {
    local engine running=()
    for engine in "${all_engines[@]}"; do
        [ ! -e "$dir/$engine/pid" ] || running+=("$engine")
    done
    together "${running[@]/#/stop_step }"
    remove_groups
    rm -f "$dir/keep"
    say "down"
}

# By name: somebody may have said ENGINES_DIR=/tmp.
purge() {
    (cd "$dir" && rm -rf --one-file-system "${all_engines[@]}" cache log tmp lock users)
    rmdir "$dir"
}

# --- Running a command with the engines

# One at a time changes what is up.
lock() {
    flock -n 9 || { say "waiting for another $0"; flock 9; }
}

child=
run() { # COMMAND...
    local variables
    flock -s 8
    trap leave EXIT
    trap 'interrupted INT 130' INT
    trap 'interrupted TERM 143' TERM
    trap 'interrupted HUP 129' HUP
    lock
    up
    mapfile -t variables < <(variables)
    flock -u 9
    # A process group of its own, so that what COMMAND starts is reached, too. The shell lets what runs in the background
    # ignore SIGINT.
    env --default-signal=INT,QUIT "${variables[@]}" setsid "$@" <&0 8>&- 9>&- &
    child=$!
    wait $child
}

interrupted() { # SIGNAL STATUS
    local jobs
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -s "$1" -- "-$child" 2>/dev/null || kill "$child" 2>/dev/null || true
        gone 10 kill -0 -- "-$child" || kill -KILL -- "-$child"
    else
        jobs=$(jobs -p | descendants)
        # shellcheck disable=SC2086  # one word each
        [ -z "$jobs" ] || { kill $jobs && gone 10 kill -0 $jobs; } 2>/dev/null || true
    fi
    exit "$2"
}

# The last one out, unless the engines are to stay.
leave() {
    trap '' INT TERM HUP
    lock
    [ -e "$dir/keep" ] || ! flock -n 8 || down
}

status() {
    local engine all=0
    for engine in "${all_engines[@]}"; do
        if answers "$engine"; then
            echo "$engine $(version "$engine") unix://$(socket "$engine")"
        elif [[ " ${engines[*]} " == *" $engine "* ]]; then
            echo "$engine is down"
            all=1
        fi
    done
    return $all
}

version() { # ENGINE
    api "$1" /version --max-time 5 | grep -o '"Version":"[^"]*"' | sed -n '1s/.*:"\(.*\)"/\1/p'
}

verb='' purge=''
while [ $# -gt 0 ]; do
    case $1 in
        --docker-26) engines+=(docker26) ;;
        --only) engines=("$2"); shift ;;
        --purge) purge=1 ;;
        -h | --help) usage; exit ;;
        -*) usage >&2; exit 2 ;;
        *) [ -z "$verb" ] || break; verb=$1 ;;
    esac
    shift
done
case "$verb $#" in
    "up 0" | "down 0" | "revive 0" | "status 0" | "run "[1-9]*) ;;
    *) usage >&2; exit 2 ;;
esac
[ "$(id -u)" = 0 ] || { say "root is needed"; exit 1; }
# Podman 4.3 takes no path above 50 characters for its "runroot" when it cleans up; a run would then end 20 s late.
[[ $dir =~ ^[A-Za-z0-9/._-]+$ ]] || { say "ENGINES_DIR may have letters, digits, / . _ and - only"; exit 1; }
[ ${#dir} -le 34 ] || { say "ENGINES_DIR is longer than 34 characters"; exit 1; }
[ -d "$dir" ] || install -d -m 755 "$dir"
exec 8>"$dir/users" 9>"$dir/lock"

case $verb in
    up)
        lock
        touch "$dir/keep"
        step "up" up
        variables | while IFS='=' read -r name value; do printf 'export %s=%q\n' "$name" "$value"; done
        ;;
    down)
        lock
        down
        [ -z "$purge" ] || purge
        ;;
    run) run "$@" ;;
    revive)
        lock
        together "${engines[@]/#/start }"
        ;;
    status) status ;;
esac
