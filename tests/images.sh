#!/usr/bin/env bash
# What config/ and Containerfile promise, done for real: both images are built, from bases made here since no registry is
# needed; the server's image runs under rootless Podman by the very command that the Quadlet gives, makes its sandboxes
# through the mounted socket, and answers; the units are read by the programs that they are for.
#
#   tests/engines.sh run tests/images.sh
#
# Needs root, Debian 12 or newer, the network, and of tests/engines.sh TEST_PODMAN_HOST, TEST_PODMAN_USER and TEST_IMAGE.
# IMAGES_DIR (/var/tmp/codesandbox-images) keeps what was downloaded and built for the next time; --purge deletes it.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(realpath -m "${IMAGES_DIR:-/var/tmp/codesandbox-images}")

if [ "${1:-}" = --purge ]; then
    rm -rf --one-file-system "$dir"
    exit
fi
[ "$(id -u)" = 0 ] || { echo "images: root is needed" >&2; exit 1; }
: "${TEST_PODMAN_HOST:?run it with tests/engines.sh run tests/images.sh}" "${TEST_PODMAN_USER:?}" "${TEST_IMAGE:?}"
# Whatever is mounted here goes with the last process of it.
[ -n "${IMAGES_MOUNTS:-}" ] || IMAGES_MOUNTS=1 exec unshare --mount "$PWD/tests/${0##*/}" "$@"

user=$TEST_PODMAN_USER
socket=${TEST_PODMAN_HOST#unix://}
run=$dir/run # stands for the user's XDG_RUNTIME_DIR
instance=images-test
tools=$dir/cache/tools

say() { echo "images: $*" >&2; }

step() { # NAME COMMAND...
    local name=$1 began=$SECONDS
    shift
    "$@"
    say "$name ($((SECONDS - began)) s)"
}

# --- A rootless Podman whose storage is ours

prepare() {
    local want missing=()
    for want in curl iptables mmdebstrap podman slirp4netns systemd-analyze:systemd \
        /usr/lib/podman/{aardvark-dns:aardvark-dns,netavark:netavark}; do
        command -v "${want%:*}" >/dev/null || missing+=("${want#*:}")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-remove --no-install-recommends "${missing[@]}" >/dev/null
    fi
    install -d -m 755 "$dir" "$dir/cache" "$dir/log"
    end_processes
    rm -rf --one-file-system "$run" "$dir/rr" "$dir/shm"
    install -d -o "$user" -g "$user" -m 700 "$run" "$run/codesandbox" "$dir/rr" "$dir/shm" "$dir/home" "$dir/tmp"
    # Else it would share its locks with the user's other Podmans; and here only root may use the machine's own tun.
    mount --bind "$dir/shm" /dev/shm
    rm -f "$dir/tun"
    mknod -m 666 "$dir/tun" c 10 200
    mount --bind "$dir/tun" /dev/net/tun
    cat >"$dir/storage.conf" <<TOML
[storage]
driver = "overlay"
graphroot = "$dir/store"
rootless_storage_path = "$dir/store"
runroot = "$dir/rr"
TOML
    cat >"$dir/containers.conf" <<TOML
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
TOML
    install -d -o "$user" -g "$user" -m 700 "$dir/store"
}

as_user=(setpriv --reuid "$user" --regid "$user" --init-groups --
    env -i -C / PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="$dir/home" TMPDIR="$dir/tmp"
    XDG_RUNTIME_DIR="$run" PODMAN_IGNORE_CGROUPSV1_WARNING=1
    CONTAINERS_CONF="$dir/containers.conf" CONTAINERS_STORAGE_CONF="$dir/storage.conf")

podman() { "${as_user[@]}" podman --runroot "$dir/rr" "$@"; }

# --- Bases, as the registries have them

# Only unpacked: no script of a package is run.
unpack() { # NAME PACKAGES FILE MMDEBSTRAP-OPTION...
    local name=$1 packages=$2 file=$3
    shift 3
    # shellcheck disable=SC2016  # it is mmdebstrap's shell that fills it in
    TMPDIR=$dir/tmp mmdebstrap --variant=extract --include="$packages" \
        --setup-hook='mkdir -p "$1/usr/bin" "$1/usr/sbin" "$1/usr/lib" "$1/usr/lib64"
            for name in bin sbin lib lib64; do ln -s usr/$name "$1/$name"; done' \
        "$@" trixie "$file" >"$dir/log/$name" 2>&1 || { tail "$dir/log/$name" >&2; return 1; }
}

# With what those scripts would make, and the certificates that this machine trusts.
make_base() { # NAME PACKAGES
    local name=$1 packages=$2 file key
    key=$({ declare -f unpack make_base; echo "$packages"; } | sha256sum | head -c 12)
    file=$dir/cache/$name-$key.tar
    if [ ! -e "$file" ]; then
        rm -f "$dir/cache/$name-"*
        # shellcheck disable=SC2016  # it is mmdebstrap's shell that fills it in
        unpack "$name" "$packages" "$file.part.tar" \
            --extract-hook='mkdir -p "$1/etc/ssl/certs" "$1/root" "$1/tmp"
                chmod 1777 "$1/tmp"
                cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/"
                printf "[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n" >"$1/etc/pip.conf"
                echo "root:x:0:0:root:/root:/bin/sh" >"$1/etc/passwd"
                rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED
                [ ! -e "$1/usr/bin/gcc" ] || ln -s gcc "$1/usr/bin/cc"'
        mv "$file.part.tar" "$file"
    fi
    [ "$(podman image inspect -f '{{.Comment}}' "localhost/base/$name" 2>/dev/null)" = "$key" ] ||
        podman import -q -m "$key" -c 'ENV CARGO_HOME=/usr/local/cargo' \
            -c 'ENV PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
            - "localhost/base/$name" <"$file" >/dev/null
}

make_bases() {
    make_base rust gcc,libc6-dev,dash,coreutils
    make_base debian libc6,libgcc-s1
    make_base python python3,python3-pip,libstdc++6,dash
}

# --- Building

# This machine's Rust stands for that of the official image.
build_server() {
    local rust=$dir/rust sysroot part
    sysroot=$(rustc --print sysroot)
    rm -rf "$rust"
    mkdir "$rust"
    for part in bin lib libexec; do
        [ ! -e "$sysroot/$part" ] || cp -al "$sysroot/$part" "$rust" 2>/dev/null || cp -a "$sysroot/$part" "$rust"
    done
    build Containerfile localhost/codesandbox:latest -v "$rust:/usr/local/rust:ro" \
        --build-arg BUILD_IMAGE=localhost/base/rust --build-arg BASE_IMAGE=localhost/base/debian
}

build_python() {
    build config/python.Containerfile localhost/codesandbox-python:latest --build-arg PYTHON_IMAGE=localhost/base/python
}

build() { # FILE IMAGE OPTION...
    local file=$1 image=$2 context=$dir/context
    shift 2
    # A checkout may be where the user cannot read.
    rm -rf "$context"
    mkdir "$context"
    cp -a .containerignore Cargo.toml Cargo.lock Containerfile config src "$context"
    podman build --layers --network host -f "$context/$file" -t "$image" "$@" "$context" >"$dir/log/build-${image##*/}" 2>&1 ||
        { tail -n 30 "$dir/log/build-${image##*/}" >&2; return 1; }
    say "$image: $(podman image inspect -f '{{.Size}}' "$image" | awk '{printf "%.0f MB", $1 / 1e6}')"
}

# --- The units

# Debian 12's Podman has no Quadlet yet, and an old podman-compose: those of Debian 13.
make_tools() {
    [ ! -e "$tools" ] || return 0
    rm -rf "$dir/cache/tools"*
    unpack tools podman-compose,podman "$dir/cache/tools.tar"
    mkdir "$tools.part"
    tar -xf "$dir/cache/tools.tar" -C "$tools.part" ./usr/libexec/podman/quadlet ./usr/bin/podman-compose ./usr/lib/python3/dist-packages
    rm "$dir/cache/tools.tar"
    mv "$tools.part" "$tools"
}

generate() {
    mkdir -p "$dir/units"
    QUADLET_UNIT_DIRS=$PWD/config "$tools/usr/libexec/podman/quadlet" --dryrun --user 2>"$dir/log/quadlet" |
        sed '/^---.*---$/d' >"$dir/units/codesandbox.service"
}

# It succeeds with unknown keys, too, but says so.
verify() { # OPTION... UNIT
    local said
    said=$(XDG_RUNTIME_DIR=$run systemd-analyze verify --man=no "$@" 2>&1 || echo "it fails")
    is "$said" ""
}

# --- The server

# By the Quadlet's own command: what systemd would fill in, another port, and no control group of version 2.
quadlet_up() {
    local command
    command=$(sed -n 's|^ExecStart=/usr/bin/podman ||p' "$dir/units/codesandbox.service" | sed "
        s|%t/podman/podman.sock|$socket|g
        s|%t/podman|${socket%/*}|g
        s|%t|$run|g
        s|%E|$dir/home|g
        s|%N|codesandbox|g
        s|127.0.0.1:5000:|127.0.0.1::|
        s|--cgroups=split||")
    # shellcheck disable=SC2086  # its words
    podman $command --instance "$instance" --allow-unenforced memory,cpus --set pull=never --set image="$TEST_IMAGE" >/dev/null
    server=systemd-codesandbox
    await_server
}

quadlet_down() { # its ExecStop
    podman rm -v -f -i "$server" >/dev/null
    rm -f "$run/codesandbox.cid" # as Podman 5 does
    wait # for those who follow it
}

compose() {
    "${as_user[@]}" env -C "$dir/home" PYTHONPATH="$tools/usr/lib/python3/dist-packages" \
        /usr/bin/python3 "$tools/usr/bin/podman-compose" --podman-args "--runroot $dir/rr" \
        -f compose.yaml -f ours.yaml --profile podman "$@" >>"$dir/log/compose" 2>&1
}

compose_up() {
    sed "s|\${XDG_RUNTIME_DIR:-}/podman|${socket%/*}|g; s|podman/podman.sock|podman/${socket##*/}|; s|127.0.0.1:5000:|127.0.0.1::|" \
        config/compose.yaml >"$dir/home/compose.yaml"
    cp config/podman.toml "$dir/home/podman.toml"
    cp "$dir/home/codesandbox/keys" "$dir/home/keys"
    cat >"$dir/home/ours.yaml" <<YAML
services:
  podman:
    environment:
      CODESANDBOX_INSTANCE: $instance
      CODESANDBOX_ALLOW_UNENFORCED: '["memory", "cpus"]'
      CODESANDBOX_PULL: never
      CODESANDBOX_IMAGE: localhost/codesandbox-python
YAML
    chown -R "$user:$user" "$dir/home"
    : >"$dir/log/compose"
    compose up -d --no-build || { cat "$dir/log/compose" >&2; return 1; }
    server=codesandbox_podman_1
    await_server
}

await_server() {
    podman logs --follow "$server" >"$dir/log/server" 2>&1 &
    podman wait "$server" >"$dir/log/server-status" 2>&1 &
    url=http://$(podman port "$server" 5000/tcp)
    for _ in {1..200}; do
        ! curl -sf "$url/readyz" >/dev/null || return 0
        sleep 0.1
    done
    cat "$dir/log/server" >&2
    return 1
}

make_key() {
    local said
    said=$(podman run --rm localhost/codesandbox key new --tenant images)
    key=$(sed -n 's/^key.*: //p' <<<"$said")
    mkdir -p "$dir/home/codesandbox"
    sed -n 's/^line.*: //p' <<<"$said" >"$dir/home/codesandbox/keys"
    chown -R "$user:$user" "$dir/home"
    chmod 600 "$dir/home/codesandbox/keys"
}

ask() { # PATH CURL-OPTION...
    local path=$1
    shift
    curl -sS --max-time 60 -H "authorization: Bearer $key" "$url$path" "$@"
}

run_code() { # PYTHON
    python3 -c 'import json, sys; print(json.dumps({"user_id": "images", "code": sys.argv[1]}))' "$1" |
        ask /run -X POST -H 'content-type: application/json' -d @-
}

seed() { # CURL-OPTION...
    curl -sS --max-time 60 -X POST "$url/run" -H 'content-type: application/json' \
        -d '{"user_id":"anonymous","code":"result = x + y","data":{"x":1,"y":2}}' "$@"
}

of_server() { # FIELD: of /proc/PID/status
    sed -n "s/^$1:[[:space:]]*//p" "/proc/$(podman inspect -f '{{.State.Pid}}' "$server")/status"
}

uid_inside() { # as the container knows it
    local pid uid
    pid=$(podman inspect -f '{{.State.Pid}}' "$server")
    read -r uid _ < <(of_server Uid)
    awk -v uid="$uid" 'uid >= $2 && uid < $2 + $3 { print uid - $2 + $1 }' "/proc/$pid/uid_map"
}

# --- The engine of the tests, which is left as it was

engine() { # PATH CURL-OPTION...
    local path=$1
    shift
    curl -sS -f --unix-socket "$socket" "http://engine/v4.0.0/libpod$path" "$@"
}

sandboxes() {
    engine "/containers/json?all=true&filters=%7B%22label%22%3A%5B%22codesandbox.instance%3D$instance%22%5D%7D" |
        grep -o '"Id":"[0-9a-f]*"' | cut -d'"' -f4
}

remove_sandboxes() {
    local id
    for id in $(sandboxes); do
        engine "/containers/$id?force=true&timeout=0" -X DELETE >/dev/null
    done
}

give_image() { # IMAGE
    podman save "$1" | engine /images/load -X POST -H 'content-type: application/x-tar' -T - >/dev/null
    given=$1
}

# Also the one that holds a rootless Podman's user namespace, and what is left of an earlier life.
end_processes() {
    { grep -lszFx "XDG_RUNTIME_DIR=$run" /proc/[0-9]*/environ || true; } | cut -d/ -f3 | xargs -r kill 2>/dev/null || true
}

given=
clean_up() {
    podman rm -a -f >/dev/null || true
    remove_sandboxes || true
    [ -z "$given" ] || engine "/images/$given?force=true" -X DELETE >/dev/null || true
    end_processes
    (cd "$dir" && rm -rf --one-file-system context home units tun rust)
}

# ---

passed=0 failed=0
check() { # WHAT COMMAND...: succeeds, and is quiet
    local what=$1 said
    shift
    if said=$("$@" 2>&1); then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "not so: $what: $said"
    fi
}
is() { [ "$1" = "$2" ] || { echo "$1, expected $2"; return 1; }; }
has() { grep -q -- "$2" <<<"$1" || { echo "$1"; return 1; }; }

prepare
trap clean_up EXIT
step "bases made" make_bases
step "Quadlet and podman-compose there" make_tools
step "server's image built" build_server
step "sandboxes' image built" build_python

check "the generator takes the Quadlet" generate
check "it gives a unit without faults" verify --user "$dir/units/codesandbox.service"
mkdir -p "$dir/units/system"
sed 's|/usr/local/bin/codesandbox|/bin/true|' config/codesandbox.service >"$dir/units/system/codesandbox.service"
check "the service has no faults" verify "$dir/units/system/codesandbox.service"

make_key
step "server started by the Quadlet" quadlet_up
check "the image's user is not root" is "$(podman image inspect -f '{{.User}}' localhost/codesandbox)" 65532:65532
check "the server is not root" is "$(uid_inside)" 65532
check "nor outside" is "$(of_server Uid | cut -f1)" "$(id -u "$user")"
check "it has no capability" is "$(of_server CapBnd)$(of_server CapEff)" 00000000000000000000000000000000
check "and gets no new one" is "$(of_server NoNewPrivs)" 1
check "nobody runs code without a key" is "$(seed -o /dev/null -w '%{http_code}')" 401
check "it answers as the README says" is "$(seed -H "x-api-key: $key")" '{"result":3,"workspace_files":["total 0"]}'
check "through Podman" has "$(ask /capabilities)" '"driver":"podman"'
check "behind our seccomp profile" is "$(run_code 'import re; result = re.findall(r"Seccomp:\s+(\d)", open("/proc/self/status").read())')" \
    '{"result":["2"],"workspace_files":["total 0"]}'
check "which the server has written" cmp "$dir/context/config/seccomp.json" "$run/codesandbox/codesandbox-$instance-seccomp.json"
run_code 'open("kept", "w").write("it")' >/dev/null
podman kill "$server" >/dev/null
wait
rm -f "$run/codesandbox.cid"
step "server killed, and started again" quadlet_up
check "files stay meanwhile" has "$(run_code 'result = open("kept").read()')" '"result":"it"'
step "server stopped" quadlet_down
check "it stops by itself" is "$(cat "$dir/log/server-status")" 0
remove_sandboxes

step "sandboxes' image given to the engine" give_image localhost/codesandbox-python:latest
step "server started by the compose file" compose_up
check "numpy, pandas and matplotlib work" is "$(run_code '
import numpy, pandas, matplotlib.pyplot as plot
frame = pandas.DataFrame({"x": numpy.arange(4), "y": numpy.arange(4) ** 2})
frame.plot(x="x", y="y")
plot.savefig("plot.png")
result = [int(frame.y.sum()), open("plot.png", "rb").read(4).decode("latin-1")[1:]]
' | sed 's/,"workspace_files.*//')" '{"result":[14,"PNG"]'

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
