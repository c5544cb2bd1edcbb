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
[ -n "${IMAGES_MOUNTS:-}" ] || IMAGES_MOUNTS=1 exec unshare --mount "$0" "$@"

user=$TEST_PODMAN_USER
socket=${TEST_PODMAN_HOST#unix://}
run=$dir/run # stands for the user's XDG_RUNTIME_DIR
instance=images-test
server=systemd-codesandbox

say() { echo "images: $*" >&2; }

step() { # NAME COMMAND...
    local name=$1 began=$SECONDS
    shift
    "$@"
    say "$name ($((SECONDS - began)) s)"
}

# --- A rootless Podman whose storage is ours

prepare() {
    local command packages=()
    for command in mmdebstrap:mmdebstrap podman:podman slirp4netns:slirp4netns systemd-analyze:systemd; do
        command -v "${command%:*}" >/dev/null || packages+=("${command#*:}")
    done
    [ ${#packages[@]} = 0 ] || DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null
    install -d -m 755 "$dir" "$dir/cache" "$dir/log"
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
default_ulimits = ["nofile=1024:20000", "nproc=4096:4096"]
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

# Only unpacked: no script of a package is run, so what those would make is made here.
make_base() { # NAME PACKAGES
    local name=$1 packages=$2 file key
    key=$({ declare -f make_base; echo "$packages"; } | sha256sum | head -c 12)
    file=$dir/cache/$name-$key.tar
    if [ ! -e "$file" ]; then
        rm -f "$dir/cache/$name-"*
        # shellcheck disable=SC2016  # it is mmdebstrap's shell that fills it in
        TMPDIR=$dir/tmp mmdebstrap --variant=extract --include="$packages" \
            --setup-hook='mkdir -p "$1/usr/bin" "$1/usr/sbin" "$1/usr/lib" "$1/usr/lib64" "$1/tmp" "$1/root"; chmod 1777 "$1/tmp"
                for name in bin sbin lib lib64; do ln -s usr/$name "$1/$name"; done' \
            --extract-hook='mkdir -p "$1/etc/ssl/certs"
                cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/"
                printf "[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n" >"$1/etc/pip.conf"
                echo "root:x:0:0:root:/root:/bin/sh" >"$1/etc/passwd"
                rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED
                [ ! -e "$1/usr/bin/gcc" ] || ln -s gcc "$1/usr/bin/cc"' \
            trixie "$file.part.tar" >"$dir/log/base-$name" 2>&1 || { tail "$dir/log/base-$name" >&2; return 1; }
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
    make_base python python3,python3-pip,dash
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

prepare
step "bases" make_bases
step "server's image" build_server
step "sandboxes' image" build_python
