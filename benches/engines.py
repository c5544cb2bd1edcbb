#!/usr/bin/env python3
"""Measures the drivers against each other and against their engines, all in one run, and prints ratios.

    cargo build --release && tests/engines.sh run python3 benches/engines.py [--quick]

The image with Python 3.11 against Debian 12's own: the same interpreter on every driver. Each engine's floor
is its own create and start of a container that does nothing, over the same socket. Root.
"""

import argparse, http.client, json, os, socket, sys, time

from measure import Client, Server, median, p50_ms, timed

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
        return json.loads(text) if text.startswith(b"{") else None

    def create_and_start(self, body):
        begun = time.perf_counter()
        identity = self.call("POST", "/containers/create", body)["Id"]
        self.call("POST", "/containers/%s/start" % identity)
        spent = time.perf_counter() - begun
        self.call("DELETE", "/containers/%s?force=true&timeout=0" % identity)
        return spent


def docker():
    url = os.environ["TEST_DOCKER_HOST"]
    bare = {"Image": IMAGE, "Entrypoint": IDLE, "HostConfig": {"NetworkMode": "none", "LogConfig": {"Type": "none"}}}
    flags = ["--driver", "docker", "--set", "docker.url=" + url, "--set", "image=" + IMAGE]
    return Engine(url, "/v1.41"), bare, flags, ()


def podman():
    import pwd

    url, user = os.environ["TEST_PODMAN_HOST"], pwd.getpwnam(os.environ["TEST_PODMAN_USER"])
    bare = {"image": IMAGE, "entrypoint": IDLE, "netns": {"nsmode": "none"}, "log_configuration": {"driver": "none"}}
    flags = ["--driver", "podman", "--set", "podman.url=" + url, "--set", "image=" + IMAGE]
    flags += ["--allow-unenforced", "memory,cpus"]  # what rootless Podman lacks under cgroup v1
    runtime = os.path.join(os.path.dirname(url[len("unix://") :]), "run")
    prefix = ["setpriv", "--reuid=%d" % user.pw_uid, "--regid=%d" % user.pw_gid, "--clear-groups"]
    return Engine(url, "/v4.0.0/libpod"), bare, flags, [*prefix, "env", "XDG_RUNTIME_DIR=" + runtime]


def row(name, ours, other, goal):
    ratios = [mine / theirs for mine, theirs in zip(ours, other)]
    print("%-40s %8.2f ms %8.2f ms  ratio %.2f (%.2f to %.2f)  goal %s" % (
        name, median(ours), median(other), median(ratios), min(ratios), max(ratios), goal), flush=True)


def warm(name, flags, prefix, rounds, count):
    embedded = Server("--set", "embedded.python=" + EMBEDDED_PYTHON)
    server = Server(*flags, prefix=prefix)
    clients = [Client(embedded, "warm"), Client(server, "warm")]
    for client in clients:
        timed(client, 50, 0.002)
    for what, pause in (("paced", 0.01), ("back to back", 0)):
        times = [[], []]
        for _ in range(rounds):
            for client, spent in zip(clients, times):
                spent.append(p50_ms(timed(client, count, pause)))
        row("%s: warm run, %s, to embedded" % (name, what), times[1], times[0], "<= 1.3")
    for client in clients:
        client.stop()
    server.stop(), embedded.stop()


def first(name, engine, bare, flags, prefix, rounds, count):
    server = Server(*flags, "--set", "pool.size=0", prefix=prefix)
    ours, theirs, number = [], [], 0
    for _ in range(rounds):
        spent, floor = [], []
        for _ in range(count):
            floor.append(engine.create_and_start(bare))
            number += 1
            client = Client(server, "first%d" % number)
            spent.extend(timed(client, 1, 0))
            client.stop()
        ours.append(p50_ms(spent))
        theirs.append(p50_ms(floor))
    row("%s: first run, to create + start" % name, ours, theirs, "<= 1.15")
    server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: about a minute")
    parser.add_argument("engines", nargs="*", default=["docker", "podman"])
    arguments = parser.parse_args()
    if not IMAGE:
        sys.exit("no engines: tests/engines.sh run python3 benches/engines.py")
    rounds, count = (3, 60) if arguments.quick else (9, 150)
    for name in arguments.engines:
        engine, bare, flags, prefix = {"docker": docker, "podman": podman}[name]()
        warm(name, flags, prefix, rounds, count)
        first(name, engine, bare, flags, prefix, rounds, 4 if arguments.quick else 10)


main()
