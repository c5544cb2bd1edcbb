//! What a run leaves to the next one of its user: files, and nothing else, whatever it tried.

use serde_json::{Value, json};

use crate::drivers::Driver;
use crate::support::Server;

behaviours! {
    "aftermath":
    what_a_run_buries_in_sockets_is_gone,
    a_port_is_free_again,
    everybodys_directories_are_open_again,
    descriptor_0_is_each_runs_own,
    a_kernel_run_spoils_no_fresh_one_that_follows,
    a_lack_of_memory_takes_runs_first_whoever_was_killed_before,
    a_stopped_forker_costs_no_session_its_files,
    a_kernel_that_hid_its_beginning_executes_nothing_twice,
    a_forged_outcome_keeps_the_caps,
}

/// The result of code; the run has to go well.
fn result(server: &Server, user: &str, code: &str) -> Value {
    of(server.run(user, code))
}

fn in_kernel(server: &Server, user: &str, code: &str) -> Value {
    of(server.run_with(user, code, json!({"mode": "kernel"})))
}

fn of(answer: Value) -> Value {
    assert!(answer.get("error").is_none() && answer.get("session").is_none(), "{answer}");
    answer["result"].clone()
}

/// Descriptors in sockets that hold each other and that nobody has: only the kernel's collector finds them.
const BURY: &str = r"
import array, fcntl, os, socket
def send(to, fds):
    to.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))])
def bury(*fds):
    a, b = socket.socketpair()
    send(a, list(fds)); send(a, [a.fileno(), b.fileno()])
    for fd in (a.detach(), b.detach(), *fds):
        os.close(fd)
";

fn what_a_run_buries_in_sockets_is_gone(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let lock =
        "fd = os.open('f', os.O_RDWR | os.O_CREAT)\nfcntl.flock(fd, fcntl.LOCK_EX)\nbury(fd)\nresult = 1";
    assert_eq!(result(&server, &u, &format!("{BURY}{lock}")), 1);
    let wait = "import fcntl, time\nf = open('f')\nend = time.time() + 2\nwhile True:\n try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); break\n except BlockingIOError: assert time.time() < end\n time.sleep(0.01)\nresult = 2";
    assert_eq!(result(&server, &u, wait), 2);
}

fn a_port_is_free_again(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    // The side that closes first is the one that the kernel would have wait.
    let talk = "import socket\nl = socket.socket(); l.bind(('127.0.0.1', 8123)); l.listen()\nc = socket.create_connection(('127.0.0.1', 8123)); a, _ = l.accept()\na.close(); c.close(); l.close()\nresult = 1";
    assert_eq!(result(&server, &u, talk), 1);
    assert_eq!(
        result(&server, &u, "import socket\nsocket.socket().bind(('127.0.0.1', 8123))\nresult = 2"),
        2
    );
}

fn everybodys_directories_are_open_again(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let close = "import os\nfor path in ('/tmp', '/dev/shm', '/workspace'):\n try: os.chmod(path, 0)\n except PermissionError: pass";
    result(&server, &u, close);
    let write =
        "for path in ('/tmp', '/dev/shm', '/workspace'): open(path + '/f', 'w').write('x')\nresult = 1";
    assert_eq!(result(&server, &u, write), 1);
}

fn descriptor_0_is_each_runs_own(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let flags = "import fcntl\nresult = fcntl.fcntl(0, fcntl.F_GETFL)";
    let before = result(&server, &u, flags);
    result(&server, &u, "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)");
    assert_eq!(result(&server, &u, flags), before);
}

fn a_kernel_run_spoils_no_fresh_one_that_follows(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for spoil in [
        "os.kill(-1, 19)",
        "for pid in os.listdir('/proc'):\n if pid.isdigit() and int(pid) not in (1, os.getpid()): os.kill(int(pid), 2)",
    ] {
        in_kernel(&server, &u, &format!("import os\n{spoil}"));
        let options = json!({"timeout_ms": 5000});
        assert_eq!(of(server.run_with(&u, "result = 'well'", options)), "well", "{spoil}");
    }
    assert_eq!(in_kernel(&server, &u, "1 + 1"), 2, "and the kernel lives");
}

fn a_lack_of_memory_takes_runs_first_whoever_was_killed_before(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    // The kernel's choice is by this number, where the memory of two is about the same.
    let scores = "result = [int(open(f'/proc/{pid}/oom_score_adj').read()) for pid in ('self', 1)]\nresult = result[0] - result[1]";
    result(&server, &u, "1");
    let mut before = result(&server, &u, scores).as_i64().unwrap();
    if driver.is_embedded() && driver.limits_memory() {
        before = before.max(1); // told a moment after the first answer
    }
    server.run(&u, "import os\nos.kill(os.getppid(), 9)");
    assert!(result(&server, &u, scores).as_i64().unwrap() >= before, "{before}");
    assert!(in_kernel(&server, &u, scores).as_i64().unwrap() >= before, "{before}");
}

fn a_stopped_forker_costs_no_session_its_files(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    result(&server, &u, "open('f', 'w').write('kept')");
    for pause in ["0", "0.001", "0.003", "0.06"] {
        // By a process that outlives the run's own, so that the moment is one of many.
        let stop = format!(
            "import os, time\nforker = os.getppid()\nif os.fork() == 0:\n time.sleep({pause})\n os.kill(forker, 19)\n os._exit(0)"
        );
        server.run_with(&u, &stop, json!({"timeout_ms": 1000}));
        assert_eq!(result(&server, &u, "result = open('f').read()"), "kept", "{pause}");
    }
}

fn a_kernel_that_hid_its_beginning_executes_nothing_twice(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let hide = "import sys, os\nframe = sys._getframe()\nwhile 'Cell' not in frame.f_globals: frame = frame.f_back\nos.dup2(os.open('/dev/null', os.O_WRONLY), frame.f_globals['Cell'].begun)";
    in_kernel(&server, &u, hide);
    let answer =
        server.run_with(&u, "open('log', 'a').write('x')\nimport os\nos.abort()", json!({"mode": "kernel"}));
    assert_eq!(
        (&answer["error_detail"]["kind"], &answer["session"]),
        (&json!("crashed"), &json!("kernel_lost"))
    );
    assert_eq!(result(&server, &u, "result = open('log').read()"), "x");
}

fn a_forged_outcome_keeps_the_caps(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.result=1KiB", "--set", "limits.artifacts=0"]);
    let forge = |payload: &str, extras: &str| {
        format!(
            "import os\npayload, extras = {payload}, {extras}\npipe = [fd for fd in range(3, 64) if os.path.exists(f'/proc/self/fd/{{fd}}') and os.readlink(f'/proc/self/fd/{{fd}}').startswith('pipe')][0]\nos.write(pipe, b'\\1' + len(payload).to_bytes(4, 'big') + len(extras).to_bytes(4, 'big') + payload + extras)\nos._exit(0)"
        )
    };
    let answer = server.run(&u, &forge("b'\"' + b'x' * 2000 + b'\"'", "b''"));
    assert_eq!(answer["error_detail"]["kind"], "result_too_large", "{answer}");
    let answer = server.run(&u, &forge("b'1'", r#"b'{"display":{"text/plain":"x"}}'"#));
    assert_eq!((&answer["result"], answer.get("display")), (&json!(1), None), "{answer}");
}
