//! The program as a person at a terminal meets it.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{PROGRAM, command_line, is_root};

/// With `allow_unenforced` where the tests have no control groups.
fn sandboxed(arguments: &[&str], stdin: &str) -> (i32, String, String) {
    let mut all = arguments.to_vec();
    if !is_root() {
        all.extend(["--allow-unenforced", "memory,cpus,uids"]);
    }
    command_line(&all, stdin)
}

/// A start that has to fail: its one message, after status 2.
fn refused(arguments: &[&str]) -> String {
    let (status, out, err) = command_line(arguments, "");
    assert_eq!((status, out.as_str()), (2, ""), "{arguments:?}: {err}");
    assert!(!err.contains("panicked") && !err.contains("RUST_BACKTRACE"), "{err}");
    err
}

/// A directory with one file in it.
fn file(name: &str, content: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    std::fs::write(&path, content).unwrap();
    (directory, path)
}

// -- run ---------------------------------------------------------------------------------------------

#[test]
fn run_prints_what_the_program_prints_and_then_its_result() {
    let code = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nresult = {'a': [x, y]}";
    let (_directory, path) = file("program.py", code);
    let path = path.to_str().unwrap();
    let (status, out, err) = sandboxed(&["run", path, "--data", r#"{"x": 1, "y": "é"}"#], "");
    assert_eq!((status, out.as_str(), err.as_str()), (0, "out\n{\"a\":[1,\"é\"]}\n", "err\n"));
}

#[test]
fn run_reads_a_program_from_standard_input() {
    let (status, out, err) = sandboxed(&["run", "-"], "result = 6 * 7");
    assert_eq!((status, out.as_str(), err.as_str()), (0, "42\n", ""));
    let (status, out, err) = sandboxed(&["run", "-"], "x = 1");
    assert_eq!((status, out.as_str(), err.as_str()), (0, "", ""), "no result is nothing to print");
}

#[test]
fn a_program_that_fails_is_status_1_with_its_traceback() {
    let (status, out, err) = sandboxed(&["run", "-"], "print('before')\n1 / 0");
    assert_eq!((status, out.as_str()), (1, "before\n"));
    assert!(err.contains("line 2") && err.ends_with("ZeroDivisionError: division by zero\n"), "{err}");
    let (status, _, err) = sandboxed(&["run", "-"], "def");
    assert!(status == 1 && err.contains("SyntaxError"), "{status}: {err}");
}

#[test]
fn run_keeps_to_its_timeout() {
    let begun = Instant::now();
    let (status, out, err) =
        sandboxed(&["run", "-", "--timeout", "300ms"], "print('x', flush=True)\nimport time\ntime.sleep(60)");
    assert_eq!((status, out.as_str()), (1, "x\n"));
    assert!(err.contains("300 ms") && begun.elapsed() < Duration::from_secs(10), "{err}");
}

#[test]
fn run_says_what_was_cut() {
    let (status, out, err) = sandboxed(&["run", "-", "--set", "limits.stdout=1KiB"], "print('x' * 5000)");
    assert_eq!((status, out.len()), (0, 1024));
    assert!(err.contains("stdout was cut"), "{err}");
}

#[test]
fn what_run_cannot_begin_with_is_status_2() {
    assert!(refused(&["run", "/no/such/file.py"]).contains("/no/such/file.py"));
    for bad in ["", "[1]", "{", "1", "x=1"] {
        assert!(refused(&["run", "-", "--data", bad]).contains("--data"), "{bad}");
    }
    assert!(refused(&["run", "-", "--timeout", "soon"]).contains("--timeout"));
    assert!(refused(&["run"]).contains("FILE"));
    let (_directory, path) = file("binary.py", "");
    std::fs::write(&path, b"\xff\xfe").unwrap();
    assert!(refused(&["run", path.to_str().unwrap()]).contains("binary.py"));
}

/// What the server refuses, `run` refuses, too: the rule is one.
#[test]
fn run_takes_the_same_data_as_the_server() {
    for bad in [r#"{"a b": 1}"#, r#"{"class": 1}"#, r#"{"__name__": "x"}"#] {
        let (status, _, err) = sandboxed(&["run", "-", "--data", bad], "result = __name__");
        assert_eq!(status, 2, "{bad}: {err}");
        assert!(err.contains("data"), "{bad}: {err}");
    }
    let huge = "123456789012345678901234567890";
    let (status, out, _) = sandboxed(&["run", "-", "--data", &format!("{{\"x\": {huge}}}")], "result = x");
    assert_eq!((status, out.trim()), (0, huge), "to the last digit");
}

// -- doctor ------------------------------------------------------------------------------------------

#[test]
fn doctor_tells_each_layer_and_whether_a_server_would_start() {
    let (status, out, err) = sandboxed(&["doctor"], "");
    assert_eq!(status, 0, "{out}{err}");
    for word in
        ["driver: embedded", "engine:", "Python 3.", "memory", "seccomp", "network", "A server starts"]
    {
        assert!(out.contains(word), "{word}: {out}");
    }
}

#[test]
fn doctor_says_what_is_missing_and_what_helps() {
    let (mut command, _directory) = crate::support::as_ordinary_user();
    let output = command.arg("doctor").output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{out}{}", String::from_utf8_lossy(&output.stderr));
    for word in ["UNENFORCED", "what helps: ", "does not start", "memory"] {
        assert!(out.contains(word), "{word}: {out}");
    }
}

// -- config ------------------------------------------------------------------------------------------

/// The line of a key in what `config` prints.
fn line<'a>(text: &'a str, key: &str) -> &'a str {
    let start = format!("{key} = ");
    text.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("no {key}: {text}"))
}

#[test]
fn config_shows_every_value_and_where_it_came_from() {
    let (_directory, path) = file("my.toml", "[limits]\nmemory = \"700MiB\"\nprocesses = 10\ncpus = 2.0\n");
    let output = Command::new(PROGRAM)
        .args([
            "config",
            "--config",
            path.to_str().unwrap(),
            "--set",
            "limits.cpus=0.5",
            "--listen",
            "127.0.0.1:7",
        ])
        .env("CODESANDBOX_LIMITS__PROCESSES", "20")
        .env("CODESANDBOX_LIMITS__CPUS", "3.0")
        .env("CODESANDBOX_INSTANCE", "mine")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    for (key, value, place) in [
        ("memory", "700MiB", "my.toml"),
        ("processes", "20", "CODESANDBOX_LIMITS__PROCESSES"),
        ("cpus", "0.5", "command line"),
        ("listen", "127.0.0.1:7", "command line"),
        ("instance", "mine", "CODESANDBOX_INSTANCE"),
        ("idle_timeout", "15m", "default"),
        ("driver", "embedded", "default"),
    ] {
        let (shown, from) = line(&text, key).split_once('#').unwrap();
        assert!(shown.contains(value) && from.contains(place), "{key}: {shown}#{from}");
    }
    for table in ["limits", "session", "auth", "pool", "server", "embedded", "docker", "podman"] {
        assert!(text.contains(&format!("\n[{table}]\n")), "{table}: {text}");
    }
}

#[test]
fn what_config_shows_is_a_configuration_file() {
    let (_, text, _) = command_line(&["config", "--set", "limits.memory=700MiB"], "");
    let (_directory, path) = file("shown.toml", &text);
    let (status, again, err) = command_line(&["config", "--config", path.to_str().unwrap()], "");
    assert_eq!(status, 0, "{err}");
    assert!(line(&again, "memory").contains("700MiB"));
    let values = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split('#').next().unwrap().trim().to_owned()).collect()
    };
    assert_eq!(values(&text), values(&again));
}

/// Key, value, and a word of what would be right.
const WRONG: [(&str, &str, &str); 12] = [
    ("limits.memroy", "\"1GiB\"", "memory"),
    ("nonsense", "1", "listen"),
    ("limits.timeout", "\"soon\"", ""),
    ("limits.timeout", "\"400s\"", "timeout_max"),
    ("limits.memory", "\"1MiB\"", "32MiB"),
    ("limits.memory", "\"300MiB\"", "workspace"),
    ("limits.processes", "\"few\"", ""),
    ("limits.cpus", "0", "0.01"),
    ("session.max", "0", "1"),
    ("auth.mode", "\"maybe\"", "keys"),
    ("driver", "\"lxc\"", "embedded"),
    ("pool.size", "2000", "session.max"),
];

/// The message names the key, the place, and what would be right, on one line.
fn explains(message: &str, key: &str, place: &str, right: &str) {
    let last = key.rsplit('.').next().unwrap();
    assert!(message.starts_with("codesandbox: configuration key"), "{key}: {message}");
    assert!(message.contains(last) && message.contains(place) && message.contains(right), "{key}: {message}");
    assert_eq!(message.trim_end().lines().count(), 1, "{key}: {message}");
}

#[test]
fn a_wrong_value_in_a_file_is_explained() {
    for (key, value, right) in WRONG {
        let text = match key.split_once('.') {
            Some((table, key)) => format!("[{table}]\n{key} = {value}\n"),
            None => format!("{key} = {value}\n"),
        };
        let (_directory, path) = file("wrong.toml", &text);
        let message = refused(&["--config", path.to_str().unwrap()]);
        explains(&message, key, "wrong.toml", right);
    }
}

#[test]
fn a_wrong_value_in_a_variable_is_explained() {
    for (key, value, right) in WRONG {
        let name = format!("CODESANDBOX_{}", key.replace('.', "__").to_uppercase());
        let output = Command::new(PROGRAM).env(&name, value.trim_matches('"')).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}: {message}");
        explains(&message, key, &name, right);
    }
}

#[test]
fn a_wrong_value_of_a_flag_is_explained() {
    for (key, value, right) in WRONG {
        let message = refused(&["--set", &format!("{key}={value}")]);
        explains(&message, key, "command line", right);
    }
    for (flags, says) in [
        (["--set", "limits.memory"], "KEY=VALUE"),
        (["--listen", "nowhere"], "--listen"),
        (["--driver", "lxc"], "embedded"),
        (["--allow-unenforced", "disk"], "memory"),
        (["--instance", "a b"], "instance"),
        (["--nonsense", "1"], "--nonsense"),
        (["serve", "now"], "now"),
    ] {
        assert!(refused(&flags).contains(says), "{flags:?}");
    }
}

#[test]
fn a_file_that_is_no_toml_or_not_there_is_named() {
    let (_directory, path) = file("broken.toml", "[limits\nmemory = 1");
    assert!(refused(&["--config", path.to_str().unwrap()]).contains("broken.toml"));
    assert!(refused(&["--config", "/no/such.toml"]).contains("/no/such.toml"));
}

// -- the rest ----------------------------------------------------------------------------------------

#[test]
fn help_says_what_it_is_and_where_to_go_on() {
    let (status, out, _) = command_line(&["--help"], "");
    assert_eq!(status, 0);
    for word in [
        "serve",
        "run",
        "doctor",
        "config",
        "key",
        "--config",
        "--listen",
        "--driver",
        "--set",
        "--allow-unenforced",
        "127.0.0.1:5000",
        "POST /run",
        "Python",
    ] {
        assert!(out.contains(word), "{word}: {out}");
    }
    for command in ["serve", "run", "doctor", "config", "key"] {
        let (status, out, _) = command_line(&[command, "--help"], "");
        assert!(status == 0 && out.len() > 100, "{command}: {out}");
    }
    assert!(command_line(&["run", "--help"], "").1.contains("--data"));
    assert!(command_line(&["--version"], "").1.starts_with("codesandbox "));
}

#[test]
fn an_address_in_use_is_said_to_be() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (status, _, err) = sandboxed(&["--listen", &address, "--set", "pool.size=0"], "");
    assert_eq!(status, 2, "{err}");
    assert!(err.contains(&address) && err.contains("in use") && err.contains("listen"), "{err}");
    assert!(!err.contains("panicked"), "{err}");
}

#[test]
fn an_engine_that_is_not_there_is_a_clear_message() {
    for driver in ["docker", "podman"] {
        for command in
            [&["--listen", "127.0.0.1:0", "--driver", driver][..], &["run", "-", "--driver", driver]]
        {
            let (status, _, err) = command_line(command, "result = 1");
            assert_eq!(status, 2, "{command:?}: {err}");
            assert!(err.starts_with("codesandbox: ") && err.contains(driver), "{err}");
            assert!(!err.contains("panicked"), "{err}");
        }
    }
}

#[test]
fn an_interpreter_that_is_none_is_a_clear_message() {
    for python in ["/no/such/python", "/bin/true", "/etc/passwd"] {
        let setting = format!("embedded.python=\"{python}\"");
        let (status, _, err) = sandboxed(&["run", "-", "--set", &setting], "result = 1");
        assert_eq!(status, 2, "{python}: {err}");
        assert!(err.contains(python) && !err.contains("panicked"), "{python}: {err}");
    }
}

#[test]
fn a_log_filter_that_is_none_is_named() {
    assert!(refused(&["--listen", "127.0.0.1:0", "--set", "log=\"[\""]).contains("log"));
}
