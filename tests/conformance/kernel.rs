//! `mode: "kernel"`: an interpreter that stays, and what it takes to lose it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::drivers::Driver;
use crate::support::{Server, Wire, post_bytes};

behaviours! {
    "kernel":
    variables_imports_functions_and_the_directory_stay,
    fresh_runs_and_kernel_runs_mix,
    a_kernel_outlives_each_of_many_fresh_runs,
    the_last_expression_is_the_result_where_none_was_assigned,
    an_earlier_result_can_be_read_and_is_not_the_answer,
    what_json_has_not_is_shown_and_no_failure,
    a_value_is_displayed_as_it_shows_itself,
    figures_that_are_open_come_back_as_artifacts,
    artifacts_are_capped_together_and_off_by_configuration,
    an_error_shows_the_lines_of_the_run_that_defined_them,
    an_error_keeps_the_kernel,
    a_timeout_that_is_obeyed_keeps_the_kernel,
    a_timeout_that_is_not_obeyed_loses_the_kernel_and_no_file,
    an_exit_loses_the_kernel_only_where_it_ends_the_process,
    a_kernel_that_is_killed_between_runs_is_told_lost_once,
    a_kernel_that_dies_before_it_has_read_a_run_is_replaced_for_it,
    a_kernel_out_of_memory_is_told_so,
    threads_live_on_and_what_they_print_comes_with_the_next_answer,
    what_is_printed_between_runs_is_bounded,
    processes_of_a_kernel_outlive_fresh_runs_and_those_of_fresh_runs_do_not,
    a_fork_of_the_guests_answers_nothing,
    a_kernel_that_takes_all_processes_is_lost_and_the_session_is_not,
    garbage_on_the_kernels_pipe_costs_the_kernel_only,
    a_kernel_lost_while_nobody_listened_is_told_with_the_next_answer,
    a_timeout_before_the_code_begins_keeps_the_kernel,
    a_kernel_that_was_left_unusable_is_replaced_before_the_next_run,
    standard_input_is_the_runs_own,
    data_becomes_variables_that_stay,
    another_users_kernel_is_another,
}

fn kernel(server: &Server, user: &str, code: &str) -> Value {
    server.run_with(user, code, json!({"mode": "kernel"}))
}

fn kind(answer: &Value) -> &str {
    answer["error_detail"]["kind"].as_str().unwrap_or("none")
}

fn variables_imports_functions_and_the_directory_stay(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "import os, math\nx = [1]\ndef f(): return x\nos.mkdir('d'); os.chdir('d')");
    let answer = kernel(&server, &u, "x.append(math.floor(2.5)); f(), os.getcwd()");
    assert_eq!(answer["result"], json!([[1, 2], "/workspace/d"]), "{answer}");
    assert!(answer.get("session").is_none(), "{answer}");
}

fn fresh_runs_and_kernel_runs_mix(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "x = 1; open('f', 'w').write('kernel')");
    let fresh = server.run(&u, "result = [open('f').read(), 'x' in globals()]");
    assert_eq!(fresh["result"], json!(["kernel", false]), "{fresh}");
    server.run(&u, "open('f', 'w').write('fresh'); x = 2");
    assert_eq!(kernel(&server, &u, "[open('f').read(), x]")["result"], json!(["fresh", 1]));
}

fn a_kernel_outlives_each_of_many_fresh_runs(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "n = 0");
    for round in 1..=60 {
        let fresh = server.run(&u, "result = 'n' in globals()");
        assert_eq!(fresh["result"], false, "{fresh}");
        let answer = kernel(&server, &u, "n += 1; n");
        assert_eq!(answer["result"], round, "{answer}");
    }
}

fn the_last_expression_is_the_result_where_none_was_assigned(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for (code, result) in [
        ("1 + 1", json!(2)),
        ("x = 5", Value::Null),
        ("x", json!(5)),
        ("result = 6\n7", json!(6)),
        ("8", json!(8)),
        ("for i in range(3):\n    result = i", json!(2)),
        ("def f():\n    global result\n    result = 'global'\nf()", json!("global")),
        ("None", Value::Null),
        ("# nothing", Value::Null),
        ("'a'; 'b'", json!("b")),
    ] {
        let answer = kernel(&server, &u, code);
        assert_eq!(answer["result"], result, "{code}: {answer}");
        assert!(answer.get("error").is_none(), "{code}: {answer}");
    }
    assert!(server.run(&u, "1 + 1")["result"].is_null(), "in a fresh run it is not");
}

fn an_earlier_result_can_be_read_and_is_not_the_answer(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "result = 5");
    assert_eq!(kernel(&server, &u, "y = result + 1")["result"], Value::Null);
    assert_eq!(kernel(&server, &u, "result, y")["result"], json!([5, 6]));
    assert_eq!(kernel(&server, &u, "result = 5")["result"], 5, "the same value once more");
    assert_eq!(kernel(&server, &u, "result += 1")["result"], 6);
    assert_eq!(kernel(&server, &u, "1/0")["error_detail"]["kind"], "raised");
    assert_eq!(kernel(&server, &u, "result")["result"], 6);
}

fn what_json_has_not_is_shown_and_no_failure(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let answer = kernel(&server, &u, "{1, 2}");
    assert_eq!(
        (&answer["result"], &answer["display"]),
        (&Value::Null, &json!({"text/plain": "{1, 2}"})),
        "{answer}"
    );
    assert!(answer.get("error").is_none(), "{answer}");
    assert_eq!(
        kind(&kernel(&server, &u, "result = {1, 2}")),
        "result_invalid",
        "where it was asked for, it is"
    );
}

fn a_value_is_displayed_as_it_shows_itself(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.artifacts=1KiB"]);
    let class = "class V:\n    def __init__(self, n): self.n = n\n    def __repr__(self): return 'V'\n    \
                 def _repr_html_(self): return '<b>' + 'x' * self.n + '</b>'\n    \
                 def _repr_png_(self): return b'png'\n    def _repr_svg_(self): raise ValueError\n";
    let answer = kernel(&server, &u, &format!("{class}V(1)"));
    let display = json!({"image/png": "cG5n", "text/html": "<b>x</b>", "text/plain": "V"});
    assert_eq!(answer["display"], display, "{answer}");
    let answer = kernel(&server, &u, "V(1017)");
    assert_eq!(answer["display"]["text/html"].as_str().unwrap().len(), 1024, "at the cap: {answer}");
    let answer = kernel(&server, &u, "V(1018)");
    assert_eq!(answer["truncated"], json!(["artifacts"]), "{answer}");
    assert!(answer["display"].get("text/html").is_none(), "{answer}");
    assert!(server.run(&u, &format!("{class}V(1)")).get("display").is_none(), "fresh runs have none");
    let (server, u) = driver.server(&["--set", "limits.artifacts=0"]);
    assert!(kernel(&server, &u, &format!("{class}V(1)")).get("display").is_none(), "off by configuration");
}

/// As much of matplotlib as its figures need, where the image has none of its own.
const PYPLOT: &str = "
import os
os.makedirs('matplotlib', exist_ok=True)
open('matplotlib/__init__.py', 'w')
open('matplotlib/pyplot.py', 'w').write('''
figures = {}
class Figure:
    def __init__(self, size): self.size = size
    def savefig(self, file, format): file.write(bytes(self.size))
def figure(number=None, size=30):
    return figures.setdefault(number or len(figures) + 1, Figure(size))
def get_fignums(): return sorted(figures)
def close(which): figures.clear()
import atexit
atexit.register(close, 'all')
''')";

fn figures_that_are_open_come_back_as_artifacts(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    server.run(&u, PYPLOT);
    let code = "import matplotlib.pyplot as plt\nplt.figure(); plt.figure()\nresult = 1";
    for mode in ["fresh", "kernel"] {
        let answer = server.run_with(&u, code, json!({"mode": mode}));
        let artifacts = answer["artifacts"].as_array().unwrap_or_else(|| panic!("{mode}: {answer}"));
        assert_eq!(artifacts.len(), 2, "{mode}: {answer}");
        assert_eq!(
            (&artifacts[1]["name"], &artifacts[1]["media_type"]),
            (&json!("figure-2.png"), &json!("image/png"))
        );
        assert!(!artifacts[0]["base64"].as_str().unwrap().is_empty(), "{mode}: {answer}");
        assert_eq!(answer["result"], 1, "{mode}: {answer}");
    }
    assert!(kernel(&server, &u, "1").get("artifacts").is_none(), "each is shown once");
}

fn artifacts_are_capped_together_and_off_by_configuration(driver: &Driver) {
    // Each is 40 bytes of base64, and 100 for its name.
    let (server, u) = driver.server(&["--set", "limits.artifacts=280"]);
    server.run(&u, PYPLOT);
    let figures =
        |count: u32| format!("import matplotlib.pyplot as plt\nfor _ in range({count}): plt.figure()\n");
    let at_cap = server.run(&u, &figures(2));
    assert_eq!(
        (at_cap["artifacts"].as_array().unwrap().len(), at_cap.get("truncated")),
        (2, None),
        "{at_cap}"
    );
    let over = server.run(&u, &figures(3));
    assert_eq!(over["artifacts"].as_array().unwrap().len(), 2, "{over}");
    assert_eq!(over["truncated"], json!(["artifacts"]), "{over}");
    let (server, u) = driver.server(&["--set", "limits.artifacts=0"]);
    server.run(&u, PYPLOT);
    let off = server.run(&u, &figures(1));
    assert!(off.get("artifacts").is_none() && off.get("error").is_none(), "{off}");
}

fn an_error_shows_the_lines_of_the_run_that_defined_them(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "def first():\n    return 1 / 0  # mark");
    kernel(&server, &u, "import linecache");
    let answer = kernel(&server, &u, "\nfirst()");
    let error = answer["error"].as_str().unwrap();
    for line in ["File \"<code 3>\", line 2", "File \"<code 1>\", line 2", "return 1 / 0  # mark"] {
        assert!(error.contains(line), "{line}: {error}");
    }
    assert!(!error.contains("supervisor") && !error.contains("<string>"), "{error}");
}

fn an_error_keeps_the_kernel(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "x = 1");
    for (code, wanted) in [
        ("1/0", "raised"),
        ("def", "syntax"),
        ("raise SystemExit(3)", "exited"),
        ("raise KeyboardInterrupt", "raised"),
        ("result = 'x' * 10_000_000", "result_too_large"),
    ] {
        let answer = kernel(&server, &u, code);
        assert_eq!(kind(&answer), wanted, "{code}: {answer}");
        assert!(answer.get("session").is_none(), "{code}: {answer}");
        assert_eq!(kernel(&server, &u, "x")["result"], 1, "after {code}");
    }
}

fn a_timeout_that_is_obeyed_keeps_the_kernel(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "x = 1");
    let answer = server.run_with(&u, "x = 2\nwhile True: pass", json!({"mode": "kernel", "timeout_ms": 200}));
    assert_eq!(kind(&answer), "timeout", "{answer}");
    assert!(answer.get("session").is_none(), "{answer}");
    assert_eq!(kernel(&server, &u, "x")["result"], 2);
}

fn a_timeout_that_is_not_obeyed_loses_the_kernel_and_no_file(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "x = 1; open('f', 'w').write('kept')");
    let stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass";
    let answer = server.run_with(&u, stubborn, json!({"mode": "kernel", "timeout_ms": 200}));
    assert_eq!((kind(&answer), &answer["session"]), ("timeout", &json!("kernel_lost")), "{answer}");
    let answer = kernel(&server, &u, "'x' in globals(), open('f').read()");
    assert_eq!(answer["result"], json!([false, "kept"]), "{answer}");
    assert!(answer.get("session").is_none(), "told once: {answer}");
    assert!(server.metric("codesandbox_kernels_lost_total") >= 1.0);
}

fn an_exit_loses_the_kernel_only_where_it_ends_the_process(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    assert!(kernel(&server, &u, "import sys; x = 1; sys.exit()").get("error").is_none());
    assert_eq!(kernel(&server, &u, "x")["result"], 1);
    let answer = kernel(&server, &u, "import os\nprint('before', flush=True)\nos._exit(3)");
    assert_eq!((kind(&answer), &answer["session"]), ("exited", &json!("kernel_lost")), "{answer}");
    assert_eq!(answer["stdout"], "before\n", "{answer}");
    let answer = kernel(&server, &u, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)");
    assert_eq!((kind(&answer), &answer["session"]), ("crashed", &json!("kernel_lost")), "{answer}");
    assert_eq!(server.run(&u, "result = 3")["result"], 3);
}

fn a_kernel_that_is_killed_between_runs_is_told_lost_once(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let pid = kernel(&server, &u, "import os; os.getpid()")["result"].clone();
    let fresh = server.run(&u, &format!("import os\nos.kill({pid}, 9)"));
    assert!(fresh.get("error").is_none(), "{fresh}");
    let answer = kernel(&server, &u, "1");
    assert_eq!((&answer["result"], &answer["session"]), (&json!(1), &json!("kernel_lost")), "{answer}");
    assert!(kernel(&server, &u, "1").get("session").is_none());
}

fn a_kernel_that_dies_before_it_has_read_a_run_is_replaced_for_it(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import subprocess, sys, os\nx = subprocess.Popen([sys.executable, '-c', 'import os, time\\n\
                time.sleep(0.3); os.kill(%d, 19); open(\"stopped\", \"w\"); time.sleep(2); os.kill(%d, 9)' % \
                (os.getpid(), os.getpid())])";
    assert!(kernel(&server, &u, code).get("error").is_none());
    let stopped = format!("/sessions/{u}/files/stopped");
    while server.get(&stopped).0 != 200 {
        std::thread::sleep(Duration::from_millis(20));
    }
    let answer = kernel(&server, &u, "open('log', 'a').write('1'); 1");
    assert_eq!((&answer["result"], &answer["session"]), (&json!(1), &json!("kernel_lost")), "{answer}");
    assert_eq!(kernel(&server, &u, "open('log').read()")["result"], "1");
}

fn a_kernel_out_of_memory_is_told_so(driver: &Driver) {
    let (server, u) = driver.server(&[
        "--set",
        "limits.memory=128MiB",
        "--set",
        "limits.workspace=16MiB",
        "--set",
        "limits.tmp=16MiB",
        "--set",
        "limits.shm=16MiB",
    ]);
    let answer = kernel(
        &server,
        &u,
        "import os; open('f', 'w').write('kept')\nx = []\nwhile True: x.append(os.urandom(1 << 20))",
    );
    assert_eq!(kind(&answer), "out_of_memory", "{answer}");
    assert_eq!(server.run(&u, "result = 3")["result"], 3);
}

fn threads_live_on_and_what_they_print_comes_with_the_next_answer(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import threading, time\nn = 0\ndef count():\n    global n\n    \
                while n < 1000:\n        n += 1; print(n); time.sleep(0.01)\n\
                threading.Thread(target=count, daemon=True).start()";
    let first = kernel(&server, &u, code);
    std::thread::sleep(Duration::from_millis(300));
    let second = kernel(&server, &u, "while n < 20: time.sleep(0.01)"); // however busy the machine was meanwhile
    let printed =
        format!("{}{}", first["stdout"].as_str().unwrap_or_default(), second["stdout"].as_str().unwrap());
    let lines: Vec<u32> = printed.lines().map(|line| line.parse().unwrap()).collect();
    assert!(lines.len() > 5, "{printed}");
    assert!(
        lines.iter().zip(1..).all(|(line, wanted)| *line == wanted),
        "nothing lost, nothing twice: {printed}"
    );
}

fn what_is_printed_between_runs_is_bounded(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.stdout=10KiB"]);
    let code = "import threading, time\ndef shout():\n    time.sleep(0.1)\n    for _ in range(1000): print('x' * 1000)\n\
                t = threading.Thread(target=shout); t.start()";
    kernel(&server, &u, code);
    std::thread::sleep(Duration::from_millis(600));
    let answer = kernel(&server, &u, "t.join()");
    assert_eq!(
        answer["stdout"].as_str().unwrap().len(),
        5 * 1024,
        "half of the cap, the rest is the run's: {}",
        answer["truncated"]
    );
    assert_eq!(answer["truncated"], json!(["stdout"]));
    assert_eq!(kernel(&server, &u, "print('y')")["stdout"], "y\n");
}

fn processes_of_a_kernel_outlive_fresh_runs_and_those_of_fresh_runs_do_not(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(
        &server,
        &u,
        "import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
    );
    let fresh = "import subprocess, sys, os\n\
                 q = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n\
                 result = q.pid";
    let fresh = server.run(&u, fresh);
    let code = format!("import os\n[p.poll(), os.path.exists('/proc/{}')]", fresh["result"]);
    let answer = kernel(&server, &u, &code);
    assert_eq!(answer["result"], json!([null, false]), "{fresh} {answer}");
    let bomb = server.run_with(
        &u,
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        json!({"timeout_ms": 500}),
    );
    assert_eq!(kind(&bomb), "timeout", "{bomb}");
    let after = kernel(&server, &u, "[len([e for e in os.listdir('/proc') if e.isdigit()]) < 12, p.poll()]");
    assert_eq!(after["result"], json!([true, null]), "a fork bomb beside it: {after}");
}

fn a_fork_of_the_guests_answers_nothing(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let answer = kernel(&server, &u, "import os\nresult = os.fork() > 0");
    assert_eq!(answer["result"], true, "{answer}");
    assert_eq!(kernel(&server, &u, "1 + 1")["result"], 2);
    assert_eq!(kernel(&server, &u, "2 + 2")["result"], 4);
}

fn a_kernel_that_takes_all_processes_is_lost_and_the_session_is_not(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.processes=16"]);
    server.run(&u, "open('f', 'w').write('kept')");
    let greedy = "import threading, time\ntry:\n    while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n\
                  except RuntimeError: result = 'full'";
    let answer = kernel(&server, &u, greedy);
    assert_eq!(answer["result"], "full", "{answer}");
    let fresh = server.run(&u, "result = open('f').read()");
    assert_eq!((&fresh["result"], fresh.get("session")), (&json!("kept"), None), "{fresh}");
    assert_eq!(server.run(&u, "result = 4")["result"], 4);
}

fn garbage_on_the_kernels_pipe_costs_the_kernel_only(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    server.run(&u, "open('f', 'w').write('kept')");
    let code = "import os, threading, time\ndef shout():\n    time.sleep(0.2)\n    for fd in range(3, 20):\n        \
                try: os.write(fd, b'x' * 100)\n        except OSError: pass\nthreading.Thread(target=shout).start()";
    assert!(kernel(&server, &u, code).get("error").is_none());
    std::thread::sleep(Duration::from_millis(500));
    let answer = kernel(&server, &u, "open('f').read()");
    assert_eq!((&answer["result"], &answer["session"]), (&json!("kept"), &json!("kernel_lost")), "{answer}");
}

fn a_kernel_lost_while_nobody_listened_is_told_with_the_next_answer(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "import signal, time; x = 1");
    let code = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nopen('deaf', 'w')\nwhile True: time.sleep(1)";
    let mut wire = Wire::new(&server);
    wire.send(post_bytes(&json!({"user_id": u, "mode": "kernel", "code": code}).to_string()));
    std::thread::sleep(Duration::from_millis(500));
    drop(wire);
    let answer = kernel(&server, &u, "import os; 'x' in globals(), os.path.exists('deaf')");
    assert_eq!(
        (&answer["result"], &answer["session"]),
        (&json!([false, true]), &json!("kernel_lost")),
        "{answer}"
    );
    assert!(kernel(&server, &u, "1").get("session").is_none());
}

fn a_timeout_before_the_code_begins_keeps_the_kernel(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "x = 1");
    let data: Vec<u32> = (0..400_000).collect();
    let fields = json!({"mode": "kernel", "timeout_ms": 1, "data": {"d": data}});
    let answer = server.run_with(&u, "import time; time.sleep(20)", fields);
    assert_eq!((kind(&answer), answer.get("session")), ("timeout", None), "{answer}");
    assert_eq!(kernel(&server, &u, "x")["result"], 1);
}

fn a_kernel_that_was_left_unusable_is_replaced_before_the_next_run(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for code in [
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
        "import builtins; builtins.open = None",
        // The one that tells that a run has begun.
        "import os, stat\nfor fd in range(3, 64):\n  try:\n    if stat.S_ISFIFO(os.fstat(fd).st_mode): os.close(fd)\n  except OSError: pass",
    ] {
        kernel(&server, &u, code);
        let answer = kernel(&server, &u, "1 + 1");
        assert_eq!(
            (&answer["result"], &answer["session"]),
            (&json!(2), &json!("kernel_lost")),
            "{code}: {answer}"
        );
    }
    kernel(&server, &u, "import os; os.close(0); x = 3");
    let answer = kernel(&server, &u, "x");
    assert_eq!((&answer["result"], answer.get("session")), (&json!(3), None), "{answer}");
}

fn standard_input_is_the_runs_own(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let ask = |stdin: &str| server.run_with(&u, "input()", json!({"mode": "kernel", "stdin": stdin}));
    assert_eq!(ask("a\nb\n")["result"], "a");
    assert_eq!(ask("c\n")["result"], "c");
    assert_eq!(ask("")["error_detail"]["name"], "EOFError");
    assert_eq!(ask("d")["result"], "d");
}

fn data_becomes_variables_that_stay(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let answer = server.run_with(&u, "x + 1", json!({"mode": "kernel", "data": {"x": 1}}));
    assert_eq!(answer["result"], 2, "{answer}");
    assert_eq!(kernel(&server, &u, "x")["result"], 1);
}

fn another_users_kernel_is_another(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    kernel(&server, &u, "x = 1");
    assert_eq!(kernel(&server, &format!("{u}-other"), "'x' in globals()")["result"], false);
}
