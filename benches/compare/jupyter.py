"""Jupyter Kernel Gateway: a kernel for each user, which is talked to through a websocket."""

import ast, json, os, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.error, urllib.request, uuid

import memory
from contenders import ANSWER_S, Contender, User
from measure import p50_ms, timed

START_S = 60
STOP_S = 30
PING_S = 20  # less than the gateway's 30
AHEAD = 4  # kernels started before their users come


class JupyterUser(User):
    quick_ack = False

    def __init__(self, gateway, kernel):
        self.gateway, self.kernel = gateway, kernel
        self.connect()

    def connect(self):
        import websocket

        self.socket = websocket.create_connection(
            "ws://127.0.0.1:%d/api/kernels/%s/channels" % (self.gateway.port, self.kernel), timeout=ANSWER_S,
            sockopt=((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),),
        )
        self.used = time.monotonic()

    def wake(self):
        """The gateway closes a websocket that does not answer its pings, which nobody reads meanwhile."""
        if time.monotonic() - self.used > PING_S:
            self.socket.close()
            self.connect()

    def answer(self, code, data):
        """The value of the last expression, once the kernel has replied and says that it is idle."""
        identity = uuid.uuid4().hex
        given = "".join("%s = %r\n" % item for item in data.items())
        self.socket.send(json.dumps(execute_request(identity, given + code + "\nresult")))
        result, waiting = None, {"execute_reply", "idle"}
        while waiting:
            if self.quick_ack:
                self.socket.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            message = json.loads(self.socket.recv())
            if message["parent_header"].get("msg_id") != identity:
                continue
            content = message["content"]
            assert message["msg_type"] != "error", content
            if message["msg_type"] == "execute_result":
                result = ast.literal_eval(content["data"]["text/plain"])
            waiting.discard(content.get("execution_state", message["msg_type"]))
        self.used = time.monotonic()
        return result

    def stop(self):
        self.socket.close()
        self.gateway.call("DELETE", "/api/kernels/" + self.kernel)


def execute_request(identity, code):
    header = {"msg_id": identity, "msg_type": "execute_request", "username": "", "session": "compare", "version": "5.3"}
    content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
    return {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}


class Jupyter(Contender):
    name = "jupyter gateway"
    isolation = "none: a process for each kernel, as the gateway's own user; variables stay between runs"

    def start(self):
        self.ahead = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.home = tempfile.mkdtemp(prefix="codesandbox-compare-")
        self.log = open(os.path.join(self.home, "log"), "w+")
        flags = {"ip": "127.0.0.1", "port": self.port, "port_retries": 0}
        places = ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        # In a session of its own: Ctrl-C reaches it once, by `stop`.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kernel_gateway", *("--KernelGatewayApp.%s=%s" % item for item in flags.items())],
            env={**os.environ, **dict.fromkeys(places, self.home)}, cwd=self.home, stdout=self.log, stderr=self.log,
            start_new_session=True,
        )
        self.wait_until_it_answers()

    def wait_until_it_answers(self):
        end = time.monotonic() + START_S
        while True:
            try:
                return self.call("GET", "/api")
            except urllib.error.URLError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.log.seek(0)
                    raise RuntimeError("it does not start: " + self.log.read()[-300:]) from None
            time.sleep(0.1)

    def call(self, method, path, body=None):
        request = urllib.request.Request("http://127.0.0.1:%d%s" % (self.port, path), data=body, method=method)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def user(self, name):
        return JupyterUser(self, self.call("POST", "/api/kernels", b"{}")["id"])

    def pooled_user(self, name):
        return JupyterUser(self, self.ahead.pop())

    def settle(self):
        """Starts kernels ahead, which the gateway itself does once only (`prespawn_count`)."""
        while len(self.ahead) < AHEAD:
            user = self.user("ahead")
            user.run()
            user.socket.close()
            self.ahead.append(user.kernel)

    def idle_pids(self, users):
        return memory.below(user.answer("import os\nresult = os.getpid()", {}) for user in users)

    def remark(self, user):
        user.quick_ack = True
        times = timed(user, 30, 0.01)
        user.quick_ack = False
        return (
            "a kernel keeps its interpreter, as codesandbox's kernel mode does; pooled is a kernel that has run before, "
            "none for the burst; the gateway leaves Nagle's algorithm on and waits for our delayed acknowledgements: "
            "a client that acknowledges at once (TCP_QUICKACK) sees a paced p50 of %.1f ms" % p50_ms(times)
        )

    def stop(self):
        if hasattr(self, "process"):
            kernels = memory.below([self.process.pid])
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                for pid in kernels & memory.below([self.process.pid]):
                    os.kill(pid, signal.SIGKILL)
                self.process.wait()
            self.log.close()
        if hasattr(self, "home"):
            shutil.rmtree(self.home)
