#!/usr/bin/env python3
"""Measures the drivers against each other and against their engines, all in one run, and prints ratios.

    cargo build --release && tests/engines.sh run python3 benches/engines.py [--quick]

The image with Python 3.11 against Debian 12's own: the same interpreter on every driver. Each engine's floor
is its own create and start of a container with the very same settings, which does nothing. Root.
"""

import argparse, http.client, json, os, socket, sys, time, urllib.parse

from measure import Client, Server, eight_users, first_runs, median, p50_ms, timed

IMAGE = next((name for name in os.environ.get("TEST_IMAGES", "").split() if name.endswith(":3.11")), None)
EMBEDDED_PYTHON = "/usr/bin/python3"
IDLE = ["python3", "-I", "-S", "-c", "import time; time.sleep(60)"]


class Engine(http.client.HTTPConnection):
    """An engine's API on its unix socket."""

    def __init__(self, url, prefix):
        super().__init__("engine")
        self.path, self.prefix = url[len("unix://") :], prefix

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)

    def call(self, method, path, body=None):
        self.request(method, self.prefix + path, json.dumps(body) if body else None, {"content-type": "application/json"})
        answer = self.getresponse()
        text = answer.read()
        assert answer.status < 300, (path, answer.status, text)
        return json.loads(text) if text[:1] in (b"{", b"[") else None

    def create_and_start(self, body):
        begun = time.perf_counter()
        identity = self.call("POST", "/containers/create", body)["Id"]
        self.call("POST", "/containers/%s/start" % identity)
        spent = time.perf_counter() - begun
        self.call("DELETE", "/containers/%s?force=true&timeout=0" % identity)
        return spent

    def containers(self, instance):
        """Those that run, of a server's instance."""
        filters = json.dumps({"label": ["codesandbox.instance=" + instance]})
        return self.call("GET", "/containers/json?filters=" + urllib.parse.quote(filters))

    def pids(self, instance):
        """The first process of each of them."""
        ids = [one["Id"] for one in self.containers(instance)]
        return [self.call("GET", "/containers/%s/json" % identity)["State"]["Pid"] for identity in ids]


class Docker:
    name = "docker"

    def __init__(self):
        url = os.environ["TEST_DOCKER_HOST"]
        self.engine, self.prefix = Engine(url, "/v1.41"), ()
        self.flags = ["--driver", "docker", "--set", "docker.url=" + url, "--set", "image=" + IMAGE]

    def idle(self):
        """As a sandbox that is there, but for its program."""
        found = self.engine.call("GET", "/containers/%s/json" % self.engine.containers("default")[0]["Id"])
        changed = {"Entrypoint": IDLE, "Cmd": [], "Labels": {}, "HostConfig": found["HostConfig"]}
        return {**found["Config"], **changed}


class Podman:
    name = "podman"

    def __init__(self):
        import pwd

        url, user = os.environ["TEST_PODMAN_HOST"], pwd.getpwnam(os.environ["TEST_PODMAN_USER"])
        self.engine = Engine(url, "/v4.0.0/libpod")
        self.flags = ["--driver", "podman", "--set", "podman.url=" + url, "--set", "image=" + IMAGE]
        self.flags += ["--allow-unenforced", "memory,cpus"]  # what rootless Podman lacks under cgroup v1
        self.runtime = os.path.join(os.path.dirname(url[len("unix://") :]), "run")
        self.prefix = ["setpriv", "--reuid=%d" % user.pw_uid, "--regid=%d" % user.pw_gid, "--clear-groups"]
        self.prefix += ["env", "XDG_RUNTIME_DIR=" + self.runtime]

    def idle(self):
        """As `request` in src/runtime/podman/request.rs has it: Podman's inspect gives back less."""
        options = ["rw", "exec", "nosuid", "nodev", "size=64m", "mode=1777"]
        tmpfs = [{"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options}
                 for place in ("/workspace", "/tmp", "/dev/shm")]
        limits = [{"type": name, "soft": most, "hard": most}
                  for name, most in (("CORE", 0), ("MEMLOCK", 65536), ("MSGQUEUE", 0), ("NOFILE", 1024), ("NPROC", 64))]
        private = {"nsmode": "private"}
        return {
            "image": IMAGE, "entrypoint": IDLE, "command": [], "user": "10000:10000", "stdin": True, "systemd": "false",
            "httpproxy": False, "cap_drop": ["ALL"], "no_new_privileges": True, "read_only_filesystem": True,
            "seccomp_profile_path": self.runtime + "/codesandbox-default-seccomp.json", "image_volume_mode": "ignore",
            "mounts": tmpfs, "r_limits": limits, "work_dir": "/workspace", "netns": {"nsmode": "none"},
            "sysctl": {"net.ipv4.tcp_rmem": "4096 65536 262144", "net.ipv4.tcp_wmem": "4096 65536 262144",
                       "net.ipv4.tcp_max_tw_buckets": "0", "net.ipv4.igmp_max_memberships": "1"},
            "ipcns": private, "pidns": private, "utsns": private, "cgroupns": private,
            "oom_score_adj": 500, "use_image_resolve_conf": True, "log_configuration": {"driver": "none"},
        }


def row(name, ours, other, goal):
    ratios = [mine / theirs for mine, theirs in zip(ours, other)]
    print("%-40s %8.2f ms %8.2f ms  ratio %.2f (%.2f to %.2f)  goal %s" % (
        name, median(ours), median(other), median(ratios), min(ratios), max(ratios), goal), flush=True)


def warm(driver, rounds, count):
    embedded = Server("--set", "embedded.python=" + EMBEDDED_PYTHON)
    server = Server(*driver.flags, prefix=driver.prefix)
    clients = [Client(embedded, "warm"), Client(server, "warm")]
    for client in clients:
        timed(client, 50, 0.002)
    for what, pause in (("paced", 0.01), ("back to back", 0)):
        times = [[], []]
        for _ in range(rounds):
            for client, spent in zip(clients, times):
                spent.append(p50_ms(timed(client, count, pause)))
        row("%s: warm run, %s, to embedded" % (driver.name, what), times[1], times[0], "<= 1.3")
    for client in clients:
        client.stop()
    server.stop(), embedded.stop()


def users(driver, rounds):
    """8 at once: the only figure that is not a time, and the only one against the floor."""
    server = Server(*driver.flags, prefix=driver.prefix)
    pairs = eight_users(server, EMBEDDED_PYTHON, rounds)
    server.stop()
    if not pairs:
        return
    ours, theirs = map(median, zip(*pairs))
    ratios = [mine / other for mine, other in pairs]
    print("%-40s %8.0f/s  %8.0f/s  ratio %.2f (%.2f to %.2f)  goal >= 0.55" % (
        driver.name + ": 8 users, to two floors", ours, theirs, median(ratios), min(ratios), max(ratios)), flush=True)


def first(driver, rounds, count):
    server = Server(*driver.flags, "--set", "pool.size=0", prefix=driver.prefix)
    Client(server, "first").run()
    idle = driver.idle()
    ours, theirs = first_runs(server, lambda: driver.engine.create_and_start(idle), rounds, count)
    row("%s: first run, to create + start" % driver.name, ours, theirs, "<= 1.15")
    server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: about a minute")
    parser.add_argument("engines", nargs="*", default=["docker", "podman"])
    arguments = parser.parse_args()
    if not IMAGE:
        sys.exit("no engines: tests/engines.sh run python3 benches/engines.py")
    rounds, count = (3, 60) if arguments.quick else (9, 150)
    for driver in (Docker, Podman):
        if driver.name in arguments.engines:
            driver = driver()
            warm(driver, rounds, count)
            users(driver, rounds)
            first(driver, rounds, 4 if arguments.quick else 10)


if __name__ == "__main__":
    main()
