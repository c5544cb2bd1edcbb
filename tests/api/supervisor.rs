//! What PID 1 of a sandbox promises: data bound and never pasted, output to its caps, the guest's own lines in
//! tracebacks, a listing as `ls -lR` makes it, nothing left over from one run to the next.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Server, is_root};

/// Caps small enough to stand at their edges.
const CAPS: [&str; 10] = [
    "--set",
    "limits.stdout=1024",
    "--set",
    "limits.stderr=1024",
    "--set",
    "limits.result=1024",
    "--set",
    "limits.error=1024",
    "--set",
    "limits.listing=10",
];

fn kind(answer: &Value) -> &str {
    answer["error_detail"]["kind"].as_str().unwrap_or("ok")
}

fn lines(answer: &Value) -> Vec<&str> {
    answer["workspace_files"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect()
}

/// The answer as it came, for what a JSON parser would round.
fn raw(server: &Server, body: &str) -> String {
    let (status, _, text) = server.request("POST", "/run", &[("content-type", "application/json")], body);
    assert_eq!(status, 200, "{text}");
    text
}

// -- data --------------------------------------------------------------------------------------------

#[test]
fn integers_of_any_size_pass_unchanged_both_ways() {
    let server = Server::start(&[]);
    for digits in [1, 19, 20, 400, 4300, 4301, 20_000] {
        let number = "7".repeat(digits);
        for number in [number.clone(), format!("-{number}")] {
            let body =
                format!(r#"{{"user_id":"u","code":"result = [x, x + 1 > x]","data":{{"x":{number}}}}}"#);
            let text = raw(&server, &body);
            assert!(text.contains(&format!(r#""result":[{number},true]"#)), "{digits} digits: {text:.200}");
        }
    }
}

#[test]
fn floats_keep_their_last_bit() {
    let server = Server::start(&[]);
    let numbers = [0.1, -0.0, 5e-324, f64::MAX, f64::MIN_POSITIVE, 1.0 / 3.0, 1e22, 123456789.12345679, 1.0];
    let code = r"import struct\nresult = [x, struct.pack('>d', x).hex(), type(x).__name__]";
    for number in numbers {
        let body = format!(r#"{{"user_id":"u","code":"{code}","data":{{"x":{number:?}}}}}"#);
        let text = raw(&server, &body);
        // Not by serde_json, which may be off by one in the last bit.
        let back: f64 = text[text.find('[').unwrap() + 1..text.find(',').unwrap()].parse().unwrap();
        assert_eq!(back.to_bits(), number.to_bits(), "{number:e}: {text}");
        assert!(text.contains(&format!(r#""{:016x}","float"]"#, number.to_bits())), "{number:e}: {text}");
    }
}

#[test]
fn json_constants_become_pythons_own() {
    let server = Server::start(&[]);
    let data = json!({"data": {"t": true, "f": false, "n": null, "i": 1, "e": {}, "l": [], "s": ""}});
    let code = "result = [t is True, f is False, n is None, type(i) is int, type(e) is dict, type(l) is list, s == '']";
    let answer = server.run_with("u", code, data);
    assert_eq!(answer["result"], json!([true, true, true, true, true, true, true]), "{answer}");
}

#[test]
fn values_and_keys_are_never_pasted_into_the_source() {
    let server = Server::start(&[]);
    let nasty = [
        "'''; import os; os._exit(3) #",
        "\"\"\"\n1/0\n",
        "\\",
        "{x}",
        "%s",
        "\u{0}\u{1}\u{7f}",
        "\u{2028}\n\r",
        "\u{1f600}é",
        "#",
    ];
    for text in nasty {
        let data = json!({"data": {"x": text, "d": {text: [text]}}, "stdin": text});
        let answer = server.run_with("u", "result = [x, d]", data);
        assert_eq!(answer["result"], json!([text, {text: [text]}]), "{answer}");
    }
}

#[test]
fn names_of_any_script_are_variables() {
    let server = Server::start(&[]);
    for name in ["größe", "名前", "_", "ñ", "Ω", "match", "print", "ﬁ"] {
        let answer = server.run_with("u", &format!("result = {name}"), json!({"data": {name: 5}}));
        assert_eq!(answer["result"], 5, "{name}: {answer}");
    }
}

#[test]
fn lone_surrogates_in_data_do_no_harm() {
    let server = Server::start(&[]);
    let (status, answer) = server.post(r#"{"user_id":"u","code":"result = 1","data":{"x":"\ud800"}}"#);
    assert!(status == 400 || (status == 200 && answer["result"] == 1), "{status} {answer}");
}

// -- output and caps ---------------------------------------------------------------------------------

#[test]
fn output_at_its_cap_passes_and_a_byte_more_is_cut() {
    let server = Server::start(&CAPS);
    for (fd, field) in [(1, "stdout"), (2, "stderr")] {
        let write = |bytes: usize| server.run("u", &format!("import os\nos.write({fd}, b'x' * {bytes})"));
        let full = write(1024);
        assert_eq!(full[field].as_str().unwrap().len(), 1024, "{full}");
        assert_eq!(full.get("truncated"), None, "{full}");
        let cut = write(1025);
        assert_eq!(cut[field].as_str().unwrap().len(), 1024, "{cut}");
        assert_eq!(cut["truncated"], json!([field]), "{cut}");
        assert_eq!(kind(&cut), "ok", "output beyond its cap is dropped, not an error: {cut}");
    }
}

#[test]
fn a_character_cut_in_two_is_replaced() {
    let server = Server::start(&CAPS);
    let answer = server.run("u", "print('x' * 1023 + 'é')");
    assert!(answer["stdout"].as_str().unwrap().ends_with("x\u{fffd}"), "{answer}");
    assert_eq!(answer["truncated"], json!(["stdout"]));
}

#[test]
fn a_result_at_its_cap_passes_and_a_byte_more_does_not() {
    let server = Server::start(&CAPS);
    let answer = server.run("u", "result = 'x' * 1022"); // and two quotes
    assert_eq!(answer["result"].as_str().unwrap().len(), 1022, "{answer}");
    let answer = server.run("u", "result = 'x' * 1023");
    assert_eq!(kind(&answer), "result_too_large", "{answer}");
    assert!(answer["error"].as_str().unwrap().contains("1025 bytes"), "{answer}");
    let answer = server.run("u", "result = 'é' * 511");
    assert_eq!(kind(&answer), "ok", "bytes count, as they are sent: {answer}");
    assert_eq!(kind(&server.run("u", "result = 'é' * 512")), "result_too_large");
}

#[test]
fn error_text_at_its_cap_passes_and_a_byte_more_is_cut() {
    let server = Server::start(&CAPS);
    let fail = |length: usize| {
        server.run_with("u", "raise ValueError(text)", json!({"data": {"text": "v".repeat(length)}}))
    };
    let traceback = |answer: &Value| answer["error_detail"]["traceback"].as_str().unwrap().len();
    let around = traceback(&fail(0)) + ": ".len();
    let full = fail(1024 - around);
    assert_eq!((traceback(&full), full.get("truncated")), (1024, None), "{full}");
    let cut = fail(1025 - around);
    assert_eq!((traceback(&cut), &cut["truncated"]), (1024, &json!(["error"])), "{cut}");
}

#[test]
fn the_listing_at_its_cap_passes_and_a_line_more_is_cut() {
    let server = Server::start(&CAPS);
    let full = server.run("u", "for n in range(9): open('f%d' % n, 'w')");
    assert_eq!((lines(&full).len(), full.get("truncated")), (10, None), "{full}");
    let cut = server.run("u", "open('f9', 'w')");
    assert_eq!((lines(&cut).len(), &cut["truncated"]), (10, &json!(["workspace_files"])), "{cut}");
}

#[test]
fn stdout_and_stderr_are_kept_apart_and_in_order() {
    let server = Server::start(&[]);
    let code = "import os, sys\nprint('a', flush=True); os.write(1, b'b\\n'); os.system('echo c')\nprint('d', file=sys.stderr)";
    let answer = server.run("u", code);
    assert_eq!((&answer["stdout"], &answer["stderr"]), (&json!("a\nb\nc\n"), &json!("d\n")), "{answer}");
    let quiet = server.run("u", "result = 1");
    assert_eq!((quiet.get("stdout"), quiet.get("stderr")), (None, None), "{quiet}");
}

// -- stdin -------------------------------------------------------------------------------------------

#[test]
fn stdin_is_fed_and_ends() {
    let server = Server::start(&[]);
    let code = "import sys\nresult = [input(), input(), sys.stdin.read()]";
    let answer = server.run_with("u", code, json!({"stdin": "one\nzwei ü\nthe rest\n"}));
    assert_eq!(answer["result"], json!(["one", "zwei ü", "the rest\n"]), "{answer}");
    let big = "x".repeat(3 << 20);
    let answer = server.run_with("u", "import sys\nresult = len(sys.stdin.read())", json!({"stdin": big}));
    assert_eq!(answer["result"], 3 << 20, "{answer}");
}

#[test]
fn input_raises_eof_error_where_there_is_no_stdin() {
    let answer = Server::start(&[]).run("u", "try: input()\nexcept EOFError: result = 'EOF'");
    assert_eq!(answer["result"], "EOF", "{answer}");
}

// -- the end of a run --------------------------------------------------------------------------------

#[test]
fn a_timeout_interrupts_first_so_that_finally_blocks_run() {
    let server = Server::start(&[]);
    let code = "import time\ndef wait():\n    time.sleep(1000)\nprint('before')\ntry:\n    wait()\nfinally:\n    print('finally'); open('kept', 'w')";
    let answer = server.run_with("u", code, json!({"timeout_ms": 400}));
    assert_eq!((kind(&answer), &answer["stdout"]), ("timeout", &json!("before\nfinally\n")), "{answer}");
    let error = answer["error"].as_str().unwrap();
    for part in ["400 ms", "KeyboardInterrupt", "line 3, in wait", "    time.sleep(1000)"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    assert!(lines(&answer).iter().any(|line| line.ends_with(" kept")), "{answer}");
    assert_eq!(server.run("u", "import os\nresult = os.listdir()")["result"], json!(["kept"]));
}

#[test]
fn a_run_that_ignores_the_interrupt_is_killed_with_all_its_processes() {
    let server = Server::start(&[]);
    let code = "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('before')\nfor n in range(3):\n if os.fork() == 0: os.setsid()\nwhile True: pass";
    let answer = server.run_with("u", code, json!({"timeout_ms": 300}));
    assert_eq!((kind(&answer), &answer["stdout"]), ("timeout", &json!("before\n")), "{answer}");
    assert!([json!([]), json!([1])].contains(&processes(&server, "u")), "{}", processes(&server, "u"));
}

#[test]
fn a_traceback_is_the_one_of_a_file_with_that_code() {
    let server = Server::start(&[]);
    // No newline at the end; a form feed and a line separator, which end no line; a carriage return, which does.
    for code in ["1/0", "x = '\u{2028}'\n\u{c}\r1/0", "def f():\r\n    return 1/0\r\nf()"] {
        let file = format!(
            "import runpy, traceback\nopen('/tmp/f.py', 'w', newline='').write({})\ntry: runpy.run_path('/tmp/f.py')\nexcept ZeroDivisionError: result = traceback.format_exc()",
            json!(code)
        );
        let of_file = server.run("file", &file)["result"].as_str().unwrap().to_owned();
        let of_code = server.run("code", code)["error_detail"]["traceback"].as_str().unwrap().to_owned();
        let tail = |text: &str, name: &str| {
            text[text.find(&format!("File \"{name}\"")).unwrap()..].replace(name, "<code>")
        };
        assert_eq!(tail(&of_code, "<code>").trim(), tail(&of_file, "/tmp/f.py").trim(), "{code:?}");
    }
}

#[test]
fn what_was_printed_before_a_crash_is_in_the_answer() {
    let server = Server::start(&[]);
    for (code, kind_of_it) in [
        ("os.kill(os.getpid(), 11)", "crashed"),
        ("os.abort()", "crashed"),
        ("os._exit(5)", "exited"),
        ("raise SystemExit(5)", "exited"),
        ("1 / 0", "raised"),
    ] {
        let code = format!("import os, sys\nprint('out'); print('err', file=sys.stderr)\n{code}");
        let answer = server.run("u", &code);
        assert_eq!(kind(&answer), kind_of_it, "{answer}");
        assert_eq!(answer["stdout"], "out\n", "{answer}");
        assert!(answer["stderr"].as_str().unwrap().starts_with("err\n"), "{answer}");
    }
}

#[test]
fn the_exit_status_and_the_signal_are_told() {
    let server = Server::start(&[]);
    let answer = server.run("u", "import sys; sys.exit(7)");
    assert!(answer["error"].as_str().unwrap().contains("status 7"), "{answer}");
    let answer = server.run("u", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)");
    assert_eq!(answer["error_detail"]["name"], "SIGTERM", "{answer}");
}

/// The processes that a run of the user sees beside itself and the one that forked it.
fn processes(server: &Server, user: &str) -> Value {
    let code = "import os\nours = (os.getpid(), os.getppid())\nresult = sorted(int(p) for p in os.listdir('/proc') if p.isdigit() and int(p) not in ours)";
    server.run(user, code)["result"].clone()
}

#[test]
fn background_processes_are_dead_after_the_run() {
    let server = Server::start(&[]);
    let code = "import os, subprocess, time\nsubprocess.Popen(['sleep', '1000'])\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(1000)\n os._exit(0)\nresult = 1";
    assert_eq!(server.run("u", code)["result"], 1);
    assert!([json!([]), json!([1])].contains(&processes(&server, "u")), "{}", processes(&server, "u"));
}

#[test]
fn an_interpreter_waits_ahead_of_its_run() {
    let server = Server::start(&[]);
    server.run("u", "1");
    std::thread::sleep(std::time::Duration::from_millis(400));
    let code = "import os\nbegun = int(open('/proc/self/stat').read().rsplit(')', 1)[1].split()[19])\nnow = float(open('/proc/uptime').read().split()[0])\nresult = now - begun / os.sysconf('SC_CLK_TCK')";
    let age = server.run("u", code)["result"].as_f64().unwrap();
    assert!(age > 0.3, "it was forked {age} s before its code ran");
}

// -- tracebacks --------------------------------------------------------------------------------------

#[test]
fn a_traceback_shows_the_guests_lines_and_none_of_ours() {
    let server = Server::start(&[]);
    let code = "def outer(zero):\n    def inner():\n        return 1 / zero  # the line\n    return inner()\n\nouter(0)\n";
    let answer = server.run("u", code);
    let error = answer["error"].as_str().unwrap();
    let parts = [
        "Error running code: Traceback (most recent call last):\n  File \"<code>\", line 6, in <module>\n    outer(0)\n",
        "File \"<code>\", line 4, in outer\n    return inner()\n",
        "File \"<code>\", line 3, in inner\n    return 1 / zero  # the line\n",
    ];
    for part in parts {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    assert!(error.ends_with("\nZeroDivisionError: division by zero"), "{error}");
    assert!(!error.contains("supervisor"), "{error}");
    let detail = &answer["error_detail"];
    assert_eq!(
        (&detail["name"], &detail["value"]),
        (&json!("ZeroDivisionError"), &json!("division by zero"))
    );
}

#[test]
fn chained_exceptions_are_shown_as_python_shows_them() {
    let server = Server::start(&[]);
    let code = "def first(): {}['key']  # one\ntry:\n    first()\nexcept KeyError as error:\n    raise ValueError('second') from error  # two\n";
    let text = server.run("u", code)["error"].as_str().unwrap().to_owned();
    for part in
        ["{}['key']  # one", "KeyError: 'key'", "direct cause", "from error  # two", "ValueError: second"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let answer = server.run("u", "try: 1 / 0\nexcept ZeroDivisionError: undefined");
    let text = answer["error"].as_str().unwrap();
    assert!(text.contains("During handling") && text.contains("NameError"), "{text}");
    assert!(!text.contains("supervisor"), "{text}");
}

#[test]
fn the_guest_sees_its_own_lines_too() {
    let server = Server::start(&[]);
    for (name, code) in [
        (
            "print_exc",
            "import traceback\ntry:\n    1 / 0  # here\nexcept ZeroDivisionError:\n    traceback.print_exc()",
        ),
        (
            "print_exc before anything is warm",
            "try:\n    1 / 0  # here\nexcept ZeroDivisionError:\n    __import__('traceback').print_exc()",
        ),
        (
            "logging",
            "import logging\ntry:\n    1 / 0  # here\nexcept ZeroDivisionError:\n    logging.exception('x')",
        ),
        ("print_stack", "import traceback\ndef f():\n    traceback.print_stack()  # here\nf()"),
        ("a warning", "import warnings\nwarnings.warn('x')  # here"),
    ] {
        for user in ["u".to_owned(), format!("first run of {name}")] {
            let answer = server.run(&user, code);
            let text = answer["stderr"].as_str().unwrap_or_default();
            assert!(text.contains("# here\n"), "{name}: {answer}");
            assert!(name == "print_stack" || !text.contains("<supervisor>"), "{name}: {answer}");
        }
    }
}

/// Python's C code prints these; before 3.13 it reads files only, so there is the line's number alone.
#[test]
fn errors_that_nobody_can_catch_are_told_on_stderr() {
    let server = Server::start(&[]);
    for code in [
        "import threading\ndef run():\n    1 / 0\nt = threading.Thread(target=run); t.start(); t.join()",
        "class D:\n    def __del__(self):\n        1 / 0\nD()",
    ] {
        let answer = server.run("u", code);
        let text = answer["stderr"].as_str().unwrap_or_default();
        assert!(
            text.contains("File \"<code>\", line 3, in ") && text.contains("ZeroDivisionError"),
            "{answer}"
        );
        assert!(!text.contains("<supervisor>"), "{answer}");
    }
}

#[test]
fn a_syntax_error_shows_the_line_and_a_caret() {
    let server = Server::start(&[]);
    let answer = server.run("u", "x = 1\nif x = 2:\n    pass\n");
    let text = answer["error"].as_str().unwrap();
    assert_eq!(kind(&answer), "syntax");
    for part in ["File \"<code>\", line 2", "    if x = 2:", "^", "SyntaxError: "] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(!text.contains("Traceback") && !text.contains("supervisor"), "{text}");
    assert_eq!(kind(&server.run("u", "  x = 1")), "syntax");
    assert_eq!(kind(&server.run("u", "x = '\u{0}'")), "syntax");
    let inside = server.run("u", "exec('x = = 1')");
    assert_eq!(kind(&inside), "raised", "the code itself is fine: {inside}");
}

#[test]
fn a_failure_inside_the_end_of_a_run_shows_none_of_our_lines() {
    let server = Server::start(&[]);
    for code in [
        "import sys\nclass E:\n    def __str__(self): 1 / 0\nsys.exit(E())",
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E",
        "import sys\nsys.exit(10 ** 5000)",
        "import atexit\natexit.register(lambda: 1 / 0)",
    ] {
        let answer = server.run("u", code);
        assert!(!answer.to_string().contains("<supervisor>"), "{answer}");
    }
}

// -- the workspace's listing -------------------------------------------------------------------------

#[test]
fn the_listing_is_what_ls_prints() {
    let server = Server::start(&[]);
    let code = r#"
import os, subprocess, time
sizes = [0, 1, 9, 10, 999, 4096, 4097, 123456]
for n, size in enumerate(sizes): open("file%d.txt" % n, "wb").write(bytes(size))
os.makedirs("sub/deeper/deepest"); os.makedirs("Upper"); os.mkdir("sub-2"); os.mkdir("sub.d"); os.mkdir("empty")
open("sub/x y", "w").write("two words"); open("sub/deeper/last", "w"); open("sub-2/b", "w"); open("Upper/Z", "w")
open(".hidden", "w"); os.mkdir(".hidden-directory"); open(".hidden-directory/x", "w"); open("sub/.h", "w")
os.symlink("file1.txt", "link"); os.symlink("/nowhere", "dangling"); os.symlink("sub", "to-sub")
os.link("file0.txt", "hard"); os.mkfifo("fifo")
os.chmod("file2.txt", 0o4755); os.chmod("file3.txt", 0); os.chmod("sub", 0o1777); os.chmod("file4.txt", 0o2644)
now = time.time()
for name, age in ("file5.txt", 86400 * 400), ("file6.txt", 86400 * 170), ("file7.txt", -86400 * 3), ("hard", now - 5):
    os.utime(name, (now - age, now - age))
with open("sparse", "wb") as file: file.truncate(1 << 30)
print(subprocess.run(["ls", "-lR"], env={"LC_ALL": "C", "PATH": "/bin:/usr/bin"}, capture_output=True, text=True).stdout, end="")
"#;
    let answer = server.run("u", code);
    assert_eq!(kind(&answer), "ok", "{answer}");
    let theirs: Vec<&str> = answer["stdout"].as_str().unwrap().lines().skip(1).collect();
    assert_eq!(lines(&answer), theirs);
    assert!(theirs.len() > 30, "{theirs:?}");
}

#[test]
fn an_empty_workspace_and_one_with_hidden_files_only_are_total_0() {
    let server = Server::start(&[]);
    assert_eq!(lines(&server.run("u", "1")), ["total 0"]);
    assert_eq!(lines(&server.run("u", "open('.hidden', 'w')")), ["total 0"]);
}

#[test]
fn one_file_is_one_line_whatever_its_name_holds() {
    let server = Server::start(&[]);
    let code = r"import os
for name in (b'a\nb', b'a\rb', b'a\tb', b'back\\slash', b'\xff\xfe', '\u2028'.encode(), '\u202ex'.encode(), b'\x1b[2J', 'ü'.encode(), b' '):
    os.close(os.open(name, os.O_CREAT))
os.mkdir('d\n\n./x:\ntotal 0'.replace('/', '_'))";
    let answer = server.run("u", code);
    let lines = lines(&answer);
    assert_eq!(kind(&answer), "ok", "{answer}");
    assert_eq!(lines.len(), 1 + 11 + 3, "{lines:?}");
    for line in &lines {
        assert!(!line.chars().any(|char| char.is_control() || "\u{2028}\u{202e}".contains(char)), "{line:?}");
    }
    let named = |end: &str| lines.iter().any(|line| line.ends_with(end));
    for name in ["a\\nb", "a\\rb", "a\\tb", "back\\\\slash", "\\377\\376", " ü"] {
        assert!(named(name), "{name}: {lines:?}");
    }
}

// -- nothing is left over ----------------------------------------------------------------------------

/// Everything about an interpreter that an earlier run could have changed.
const SNAPSHOT: &str = r#"
import builtins, gc, json, os, resource, signal, sys, threading, traceback
mask = os.umask(0); os.umask(mask)
result = {
    "environment": dict(os.environ), "umask": mask, "cwd": os.getcwd(), "path": sys.path,
    "limits": [resource.getrlimit(getattr(resource, name)) for name in sorted(dir(resource)) if name.startswith("RLIMIT_")],
    "nice": os.getpriority(os.PRIO_PROCESS, 0), "handlers": [str(signal.getsignal(s)) for s in range(1, 32)],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "fds": sorted(os.listdir("/proc/self/fd")),
    "threads": threading.active_count(), "recursion": sys.getrecursionlimit(), "switch": sys.getswitchinterval(),
    "builtins": sorted(n for n in vars(builtins)), "modules": sorted(sys.modules), "gc": [gc.isenabled(), gc.get_threshold()],
    "len": len("four"), "dumps": json.dumps([1]), "hook": str(sys.excepthook), "argv": sys.argv,
    "affinity": sorted(os.sched_getaffinity(0)), "session": os.getsid(0) == os.getpid(), "names": sorted(globals()),
}
result["limits"] = [list(pair) for pair in result["limits"]]
"#;

#[test]
fn what_a_run_changes_in_its_interpreter_is_gone_in_the_next() {
    let server = Server::start(&[]);
    server.run("u", "import time; time.sleep(0.3)"); // whatever is loaded while idle is loaded now
    let before = server.run("u", SNAPSHOT);
    let code = r#"
import builtins, gc, json, os, resource, signal, sys, traceback
os.environ["PYTHONPATH"] = "/workspace"; os.environ.pop("HOME"); os.putenv("LD_PRELOAD", "/workspace/x.so")
os.umask(0o777); os.chdir("/tmp"); sys.path[:] = ["/workspace"]; os.nice(5)
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); signal.signal(signal.SIGTERM, signal.SIG_IGN)
builtins.len = lambda _: 0; json.dumps = None; traceback.format_exception = None; sys.excepthook = None
sys.setrecursionlimit(50); sys.setswitchinterval(10); gc.disable(); sys.modules["this"] = 1; sys.argv = ["x"]
for n in range(3, 15):
    try: os.dup2(1, n) if n not in (3, 4, 5, 6, 7) else None
    except OSError: pass
leftover = 1
"#;
    server.run("u", code);
    let after = server.run("u", SNAPSHOT);
    assert_eq!(kind(&before), "ok", "{before}");
    for (key, value) in before["result"].as_object().unwrap() {
        assert_eq!(value, &after["result"][key], "{key}");
    }
}

#[test]
fn a_poisoned_workspace_is_the_guests_own_affair() {
    let server = Server::start(&[]);
    let poison = r#"
import os, sys
names = ["json", "traceback", "linecache", "sitecustomize", "usercustomize", "os", "_json", "resource", "signal", "site",
    "encodings", "codecs", "threading", "tokenize", "textwrap", "_colorize", "readline", "math", "struct", "select", "gc"]
version = "python%d.%d" % sys.version_info[:2]
places = ["", ".local/lib/%s/site-packages/" % version, "lib/%s/site-packages/" % version, "lib/%s/" % version, "site-packages/"]
for place in places:
    os.makedirs(place or '.', exist_ok=True)
    for name in names:
        with open(place + name + ".py", "w") as file: file.write("import os; os.write(1, b'POISON'); os._exit(66)\n")
    for name in ("x.pth", "easy-install.pth", version + "._pth", "pyvenv.cfg"):
        with open(place + name, "w") as file: file.write("import os; os.write(1, b'POISON')\nhome = /workspace\n")
for name in ("PYTHONSTARTUP", "PYTHONPATH", "python", "python3", "sh"):
    with open(name, "w") as file: file.write('#!/bin/sh\necho POISON\n')
    os.chmod(name, 0o755)
result = len(os.listdir())
"#;
    assert!(server.run("u", poison)["result"].as_i64().unwrap() > 20);
    let uses = "import json, traceback, linecache, signal, resource, threading, math, struct, tokenize, site, sys\nresult = [json.dumps([1]), json.__file__.startswith('/workspace'), sys.path[-1]]";
    let answer = server.run("u", uses);
    assert_eq!(answer["result"], json!(["[1]", false, "/workspace"]), "{answer}");
    let fails = server.run("u", "def f(): return 1 / 0  # mine\nf()");
    assert!(fails["error"].as_str().unwrap().contains("return 1 / 0  # mine"), "{fails}");
    let late = server.run_with("u", "while True: pass", json!({"timeout_ms": 200}));
    assert_eq!(kind(&late), "timeout", "{late}");
    for answer in [answer, fails, late] {
        assert!(!answer.to_string().contains("POISON"), "{answer}");
    }
}

#[test]
fn modules_of_the_workspace_can_be_imported() {
    let server = Server::start(&[]);
    server.run("u", "open('mine.py', 'w').write('def f(): return 5')");
    let answer = server.run("u", "import mine\nresult = mine.f()");
    assert_eq!(answer["result"], 5, "{answer}");
}

#[test]
fn nothing_but_stdio_and_the_result_pipe_is_open() {
    let server = Server::start(&[]);
    let code = "import os\nresult = []\nfor name in sorted(os.listdir('/proc/self/fd'), key=int):\n try: result.append(os.readlink('/proc/self/fd/' + name).split(':')[0])\n except OSError: pass";
    for fields in [json!({}), json!({"stdin": "x"})] {
        let found = server.run_with("u", code, fields.clone())["result"].clone();
        let stdin = if fields == json!({}) { "/dev/null" } else { "/memfd" };
        assert_eq!(found, json!([stdin, "pipe", "pipe", "pipe"]), "{found}");
    }
}

#[test]
fn memory_that_belongs_to_no_process_does_not_outlive_its_run() {
    let server = Server::start(&[]);
    let code = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nresult = [libc.shmget(0, 1 << 20, 0o1600) >= 0, libc.msgget(0, 0o1600) >= 0, libc.semget(0, 1, 0o1600) >= 0]";
    assert_eq!(kind(&server.run("u", code)), "ok"); // refused or made: both are fine
    let code =
        "result = [len(open('/proc/sysvipc/' + kind).readlines()) - 1 for kind in ('shm', 'msg', 'sem')]";
    let answer = server.run("u", code);
    assert_eq!(answer["result"], json!([0, 0, 0]), "kernel objects are left: {answer}");
}

#[test]
fn files_are_kept_and_variables_are_not() {
    let server = Server::start(&[]);
    server.run("u", "x = 1; open('f', 'w').write('kept'); open('/tmp/f', 'w').write('kept')");
    let answer = server.run("u", "result = [open('f').read(), open('/tmp/f').read(), 'x' in globals()]");
    assert_eq!(answer["result"], json!(["kept", "kept", false]), "{answer}");
}

#[test]
fn the_interpreter_can_start_itself_again() {
    let server = Server::start(&[]);
    let code = "import subprocess, sys\nresult = subprocess.run([sys.executable, '-c', 'print(6 * 7)'], capture_output=True, text=True).stdout";
    let answer = server.run("u", code);
    assert_eq!(answer["result"], "42\n", "{answer}");
}

// -- every Python ------------------------------------------------------------------------------------

/// Code, and what comes of it: `result` as JSON where it begins with `=`, else text that `error` holds.
const BEHAVIOURS: [(&str, &str); 16] = [
    ("result = x + y", "=3"),
    ("result = __name__", "=\"__main__\""),
    ("result = [True, None, 1.5, 'ü', {'a': (1, 2)}]", "=[true,null,1.5,\"ü\",{\"a\":[1,2]}]"),
    ("def f():\n    return 1 / 0  # mine\nf()", "    return 1 / 0  # mine"),
    ("if x = 1: pass", "SyntaxError"),
    ("import sys; sys.exit(3)", "status 3"),
    ("import os; os.abort()", "signal 6"),
    ("result = float('nan')", "result is nan"),
    ("result = {1}", "of type set"),
    ("result = [1]\nresult.append(result)", "result"),
    ("input()", "EOFError"),
    ("x = []\nwhile True: x.append(bytearray(1 << 24))", "emory"),
    ("import time; time.sleep(100)", "KeyboardInterrupt"),
    (
        "import asyncio, concurrent.futures\nasync def f(): return 5\nwith concurrent.futures.ThreadPoolExecutor(2) as pool: result = [asyncio.run(f()), pool.submit(len, 'ab').result()]",
        "=[5,2]",
    ),
    (
        "import ctypes, decimal, hashlib, re, sqlite3, ssl, zlib\nresult = hashlib.md5(b'').hexdigest()[:4]",
        "=\"d41d\"",
    ),
    (
        "import traceback\ntry:\n    1 / 0  # here\nexcept ZeroDivisionError:\n    result = traceback.format_exc().count('# here')",
        "=1",
    ),
];

fn behaves(python: &str, server: &Server) {
    for user in ["one", "two"] {
        for (code, wanted) in BEHAVIOURS {
            let fields = json!({"data": {"x": 1, "y": 2}, "timeout_ms": if code.contains("sleep") { 300 } else { 10_000 }});
            let answer = server.run_with(user, code, fields);
            let right = match wanted.strip_prefix('=') {
                Some(json) => {
                    answer["result"] == serde_json::from_str::<Value>(json).unwrap() && kind(&answer) == "ok"
                }
                None => answer["error"].as_str().is_some_and(|error| error.contains(wanted)),
            };
            assert!(right, "{python}: {code}: wanted {wanted}, got {answer}");
            assert!(!answer.to_string().contains("<supervisor>"), "{python}: {answer}");
        }
    }
}

#[test]
fn every_installed_python_behaves_alike() {
    behaves("the system's python3", &Server::start(&["--set", "limits.memory=400MiB"]));
    let mut ran = vec!["the system's".to_owned()];
    for version in ["3.8.18", "3.9.18", "3.10.13", "3.12.1", "3.13.0"] {
        let python = format!("/root/.pyenv/versions/{version}/bin/python3");
        if !is_root() || !Path::new(&python).exists() {
            eprintln!("skipped: no {python} for us");
            continue;
        }
        let flag = format!("embedded.python={python}");
        let server = Server::start(&["--set", &flag, "--set", "limits.memory=400MiB"]);
        let said = server.run("version", "import platform\nresult = platform.python_version()");
        assert_eq!(said["result"], version, "{said}");
        behaves(version, &server);
        ran.push(version.to_owned());
    }
    println!("ran on {}", ran.join(", "));
}
