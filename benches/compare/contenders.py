"""The ways to run Python that are compared, each behind the same few calls.

Where a choice is open, it is the one that is faster for them: no web server before `docker exec` and its API rather
than the command, no imports of `site` under bubblewrap, no set-up of a virtual environment in llm-sandbox.
"""

import concurrent.futures, http.client, json, os, shutil, subprocess, tempfile, time

import memory
from engines import IMAGE, Docker, Podman
from measure import TASK, Client, Floor, Server
from pool import Embedded, call, delete, settle

PYTHON = "/usr/bin/python3"  # Debian's; IMAGE has Debian 12's, so on Debian 12 all run the very same interpreter
OURS = str(os.getpid())  # what bears this is of this run of the comparison, and of no other
ANSWER_S = 120  # the most that a run may take before it counts as not answered
POOL = 16  # sandboxes made ahead, as in benches/pool.py
REMOVALS = 8  # at once


class Contender:
    """One way to run Python. `start` may raise anything: the table then tells why."""

    name = None
    isolation = None  # in words: what separates users from the host, and from each other
    note = ""
    most_users = 1000  # at once
    keeps_sessions = True

    def start(self):
        pass

    def stop(self):
        """Ends all that was started, its users, too. Also called after a failed `start`."""

    def user(self, name):
        """A new user, whose session may be one that was made ahead, if the contender does such a thing."""
        raise NotImplementedError

    def cold_user(self, name):
        """A new user of whose session nothing was made ahead."""
        return self.user(name)

    pooled_user = None
    """A new user whose session was made ahead; None where there is no such thing."""

    def settle(self):
        """Waits until all that is made ahead is made."""

    def idle_pids(self, users):
        """The processes that are there for these sessions, made by `cold_user`, and for nothing else."""
        raise NotImplementedError

    def remark(self, user):
        return self.note


class User:
    """Of one contender; has a session, and runs one program after the other in it."""

    def answer(self, code, data):
        """What `result` is after `code` ran with the variables `data`."""
        raise NotImplementedError

    def run(self):
        answer = self.answer(**TASK)
        assert answer == 3, answer

    def wake(self):
        """Before runs that are timed: a server may have closed a connection that was idle."""

    def stop(self):
        pass


def script(code, data):
    """A program that prints its result, for those who know of no data and no results."""
    text = "import json\nscope = json.loads(%r)\nexec(%r, scope)\nprint(json.dumps(scope['result']))"
    return text % (json.dumps(data), code)


# --- The floor


class FloorUser(User):
    def __init__(self):
        self.floor = Floor(PYTHON)

    def answer(self, code, data):
        os.write(self.floor.process.stdin.fileno(), json.dumps({"code": code, "data": data}).encode())
        return json.loads(os.read(self.floor.process.stdout.fileno(), 1 << 16))

    def run(self):
        self.floor.run()

    def stop(self):
        self.floor.stop()


class TheFloor(Contender):
    name = "floor"
    isolation = "none: a pre-forked interpreter behind a pipe, a new process for each run"
    most_users = 1

    def __init__(self):
        self.users = []

    def user(self, name):
        self.users.append(FloorUser())
        return self.users[-1]

    def idle_pids(self, users):
        return memory.below(user.floor.process.pid for user in users)

    def stop(self):
        for user in self.users:
            user.stop()


# --- Containers, by the Python SDK of Docker


class Containers(Contender):
    def start(self):
        import docker

        if not IMAGE or "TEST_DOCKER_HOST" not in os.environ:
            raise RuntimeError("no Docker: tests/engines.sh run benches/compare/run.sh")
        # A connection for each thread, and no call to ask for the version before each session.
        self.client = docker.DockerClient(
            os.environ["TEST_DOCKER_HOST"], version="1.41", timeout=ANSWER_S, max_pool_size=128
        )
        self.client.images.get(IMAGE)
        self.label = {"codesandbox-compare": "%s-%s" % (OURS, self.name)}

    def idle_pids(self, users):
        inspected = (self.client.api.inspect_container(user.container.id) for user in users)
        return memory.below((one["State"]["Pid"] for one in inspected), keeper=True)

    def stop(self):
        if not hasattr(self, "label"):
            return
        label = "%s=%s" % next(iter(self.label.items()))
        left = self.client.api.containers(all=True, filters={"label": label})
        remove = lambda one: self.client.api.remove_container(one["Id"], force=True, v=True)
        in_parallel(remove, left)
        self.client.close()


def in_parallel(function, values):
    with concurrent.futures.ThreadPoolExecutor(REMOVALS) as threads:
        return list(threads.map(function, values))


class DockerExecUser(User):
    def __init__(self, container):
        self.container = container

    def answer(self, code, data):
        printed = self.exec("python3", "-c", script(code, data))
        assert self.exec("ls", "-l", "/workspace").startswith("total ")
        return json.loads(printed)

    def exec(self, *command):
        status, output = self.container.exec_run(list(command))
        assert status == 0, output
        return output.decode()

    def stop(self):
        self.container.remove(force=True, v=True)


class DockerExec(Containers):
    """As the first document of this project had it, less its Flask."""

    name = "docker exec"
    isolation = "a container for each user by Docker's defaults: namespaces but for users, root with 14 capabilities, " \
        "Docker's seccomp profile, a writable root, a network (not in this private engine); no limits"
    note = "docker exec python3, then docker exec ls; through the API, without the docker command"

    def user(self, name):
        container = self.client.containers.run(
            IMAGE, ["sleep", "infinity"], detach=True, labels=self.label, working_dir="/workspace"
        )
        return DockerExecUser(container)


class LlmSandboxUser(User):
    def __init__(self, session):
        self.session = session
        session.open()
        self.container = getattr(session, "container", None)

    def answer(self, code, data):
        output = self.session.run(script(code, data))
        assert output.exit_code == 0, output
        return json.loads(output.stdout)

    def stop(self):
        self.session.close()


class LlmSandbox(Containers):
    name = "llm-sandbox"
    isolation = "a container for each session by Docker's defaults: as docker exec; may check code against patterns (off)"
    note = "its session is reused, its environment setup is left out; its own pool of containers, " \
        "which go from one user to the next as they are; none for the burst"
    pool_size = 4

    def start(self):
        super().start()
        from llm_sandbox import SandboxSession
        from llm_sandbox.core.session_base import PYTHON_VENV_DIR_NAME
        from llm_sandbox.pool import PoolConfig, create_pool_manager

        # It calls `python`, or one of a virtual environment in containers of its pool. The image has neither, and there
        # is no network to install one from.
        self.directory = tempfile.mkdtemp(prefix="codesandbox-compare-")
        os.chmod(self.directory, 0o755)
        os.symlink(PYTHON, os.path.join(self.directory, "python"))
        places = ("/usr/local/bin", "/sandbox/%s/bin" % PYTHON_VENV_DIR_NAME)
        settings = {
            "image": IMAGE, "lang": "python", "client": self.client, "skip_environment_setup": True,
            "runtime_configs": {
                "labels": self.label,
                "user": "",  # root by its number: the image has no /etc/passwd
                "command": ["python3"],  # what images of Python have, but for ours
                "stop_signal": "SIGKILL",  # otherwise it takes 10 s to close a session
                "volumes": ["%s:%s:ro" % (self.directory, place) for place in places],
            },
        }
        self.session = lambda: SandboxSession(**settings)
        first = self.user("first")
        first.run()
        first.stop()
        config = PoolConfig(min_pool_size=self.pool_size, max_pool_size=self.pool_size)
        self.pool = create_pool_manager(backend="docker", config=config, **settings)

    def user(self, name):
        return LlmSandboxUser(self.session())

    def pooled_user(self, name):
        from llm_sandbox.pool import PooledSandboxSession

        return LlmSandboxUser(PooledSandboxSession(pool_manager=self.pool))

    def settle(self):
        end = time.monotonic() + ANSWER_S
        while self.pool.get_stats()["state_counts"]["idle"] < self.pool_size:
            if time.monotonic() > end:
                raise TimeoutError("the pool of llm-sandbox does not fill up")
            time.sleep(0.05)

    def stop(self):
        if hasattr(self, "pool"):
            self.pool.close()
        super().stop()
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)


# --- bubblewrap


class BubblewrapUser(User):
    def __init__(self):
        self.workspace = tempfile.mkdtemp(prefix="codesandbox-compare-")
        os.chmod(self.workspace, 0o777)
        self.command = [
            "bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL",
            "--die-with-parent", "--new-session", "--clearenv", "--ro-bind", "/usr", "/usr",
            *(part for name in ("bin", "lib", "lib64") for part in ("--symlink", "usr/" + name, "/" + name)),
            "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
            "--bind", self.workspace, "/workspace", "--chdir", "/workspace", PYTHON, "-I", "-S", "-c",
        ]

    def answer(self, code, data):
        done = subprocess.run([*self.command, script(code, data)], capture_output=True, timeout=ANSWER_S)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def stop(self):
        shutil.rmtree(self.workspace, ignore_errors=True)


class Bubblewrap(Contender):
    name = "bubblewrap"
    isolation = "namespaces for each run, users' too; no capabilities, no network, the host's /usr read-only; " \
        "no seccomp profile, no limits"
    note = "started anew for each run; a session is a directory and nothing that runs"
    keeps_sessions = False

    def __init__(self):
        self.users = []

    def start(self):
        user = self.user("first")
        user.run()

    def user(self, name):
        self.users.append(BubblewrapUser())
        return self.users[-1]

    def stop(self):
        for user in self.users:
            user.stop()


# --- codesandbox


class CodesandboxUser(User):
    def __init__(self, server, name, mode):
        self.server, self.name, self.mode = server, name, mode
        self.connect()

    def connect(self):
        self.client = Client(self.server, self.name, mode=self.mode)
        self.client.socket.settimeout(ANSWER_S)

    def wake(self):
        self.client.stop()
        self.connect()

    def answer(self, code, data):
        connection = http.client.HTTPConnection(*self.server.address, timeout=ANSWER_S)
        connection.request("POST", "/run", json.dumps({"user_id": self.name, "mode": self.mode, "code": code, "data": data}))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        assert "error" not in answer, answer
        return answer["result"]

    def run(self):
        self.client.run()

    def stop(self):
        self.client.stop()
        delete(self.server, self.name)


class Codesandbox(Contender):
    isolation = "namespaces for each user, an unprivileged uid, no capabilities, its own seccomp profile, " \
        "a read-only root, no network; limits on memory, processes, CPU, files"

    def __init__(self, driver, mode="fresh"):
        self.driver_class, self.mode = driver, mode
        self.name = "codesandbox, " + driver.name + (" (kernel mode)" if mode == "kernel" else "")
        self.servers = []

    def start(self):
        try:
            self.driver = self.driver_class()
        except KeyError as missing:
            raise RuntimeError("%s is not set: tests/engines.sh run benches/compare/run.sh" % missing) from None
        self.warm, self.cold = self.serve("warm", POOL), self.serve("cold", 0)

    def serve(self, name, pool):
        # In a session of its own: Ctrl-C reaches it once, by `stop`, and so it can remove its sandboxes.
        server = Server(
            *self.driver.flags, "--instance", "compare-%s-%s-%s" % (OURS, self.mode, name), "--set", "pool.size=%d" % pool,
            "--set", "embedded.python=" + PYTHON, "--set", "session.idle_timeout=1h",
            prefix=("setsid", *self.driver.prefix),
        )
        self.servers.append(server)
        return server

    def user(self, name):
        return CodesandboxUser(self.warm, name, self.mode)

    pooled_user = user

    def cold_user(self, name):
        return CodesandboxUser(self.cold, name, self.mode)

    def settle(self):
        settle(self.warm, POOL)

    def remark(self, user):
        layers = json.loads(call(self.warm, "GET", "/capabilities"))["layers"]
        missing = ", ".join(layer["name"] for layer in layers if layer["state"] != "on")
        return "%s runs; a pool of %d for the pooled and the burst, none for the cold; not enforced here: %s" % (
            self.mode, POOL, missing or "nothing"
        )

    def idle_pids(self, users):
        """All of the server that has no pool: nobody else is there."""
        if self.driver.name == "embedded":
            return self.cold.sandbox_pids()
        pids = self.driver.engine.pids("compare-%s-%s-cold" % (OURS, self.mode))
        assert len(pids) == len(users), "%d containers of %d users" % (len(pids), len(users))
        return memory.below(pids, keeper=True)

    def stop(self):
        in_parallel(Server.stop, self.servers)


def contenders():
    from jupyter import Jupyter

    ours = [Codesandbox(driver) for driver in (Embedded, Docker, Podman)]
    ours.insert(1, Codesandbox(Embedded, "kernel"))
    return [TheFloor(), *ours, Bubblewrap(), Jupyter(), LlmSandbox(), DockerExec()]
