//! One line for each run: of those that end well, fail, are refused or left; with nothing in it that is the user's.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{Server, Wire, command_line, eventually, header, post_bytes};

/// The user's own: none of it may be in a line.
const CODE: &str = "print('secret-stdout'); result = secret_name + 'secret-result'";
const SECRETS: [&str; 6] =
    ["secret-user", "secret_name", "secret-data", "secret-stdin", "secret-stdout", "secret-result"];
/// Of each line, in their order.
const ALWAYS: [&str; 12] = [
    "time",
    "request_id",
    "tenant",
    "session",
    "code_bytes",
    "code_sha256",
    "data_bytes",
    "stdin_bytes",
    "mode",
    "timeout_ms",
    "outcome",
    "driver",
];
/// Of a run that came to its end.
const USAGE: [&str; 10] = [
    "kernel_lost",
    "lost",
    "result_bytes",
    "stdout_bytes",
    "stderr_bytes",
    "truncated",
    "queue_ms",
    "claim_ms",
    "run_ms",
    "cpu_ms",
];

/// A server that writes audit lines.
struct Audited {
    server: Server,
    path: PathBuf,
    directory: tempfile::TempDir,
}

fn audited(flags: &[&str]) -> Audited {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit.log");
    let file = format!("audit.file=\"{}\"", path.display());
    let mut all = vec!["--set", "pool.size=1", "--set", &file];
    all.extend(flags);
    Audited { server: Server::start(&all), path, directory }
}

impl Audited {
    /// All lines, once there are that many.
    fn lines(&self, count: usize) -> Vec<Value> {
        let text = || std::fs::read_to_string(&self.path).unwrap();
        eventually("the lines", || text().lines().count() >= count);
        let text = text();
        assert!(text.ends_with('\n'), "{text}");
        let lines: Vec<_> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), count, "{text}");
        lines
    }
}

fn names(line: &Value) -> Vec<&str> {
    line.as_object().unwrap().keys().map(String::as_str).collect()
}

fn sorted(names: &[&[&'static str]]) -> Vec<&'static str> {
    let mut all = names.concat();
    all.sort_unstable();
    all
}

fn secret_body() -> Value {
    json!({"user_id": "secret-user", "code": CODE, "data": {"secret_name": "secret-data"}, "stdin": "secret-stdin"})
}

fn sleeping(user_id: &str, seconds: f64) -> String {
    post_bytes(
        &json!({"user_id": user_id, "code": format!("import time; time.sleep({seconds})")}).to_string(),
    )
}

#[test]
fn a_run_has_one_line_that_tells_everything_but_what_is_the_users() {
    let audited = audited(&[]);
    let headers = [("content-type", "application/json"), ("x-request-id", "my-id")];
    let (status, ..) = audited.server.request("POST", "/run", &headers, &secret_body().to_string());
    assert_eq!(status, 200);
    let [line] = &audited.lines(1)[..] else { unreachable!() };
    assert_eq!(names(line), sorted(&[&ALWAYS, &USAGE]));
    for (name, value) in [
        ("request_id", json!("my-id")),
        ("tenant", json!("")),
        ("code_bytes", json!(CODE.len())),
        ("code_sha256", json!(hex::encode(Sha256::digest(CODE)))),
        ("data_bytes", json!("{\"secret_name\":\"secret-data\"}".len())),
        ("stdin_bytes", json!("secret-stdin".len())),
        ("mode", json!("fresh")),
        ("timeout_ms", json!(30_000)),
        ("outcome", json!("ok")),
        ("lost", json!(false)),
        ("result_bytes", json!("\"secret-datasecret-result\"".len())),
        ("stdout_bytes", json!("secret-stdout\n".len())),
        ("stderr_bytes", json!(0)),
        ("truncated", json!([])),
        ("driver", json!("embedded")),
    ] {
        assert_eq!(line[name], value, "{name}: {line}");
    }
    assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
    assert_eq!(line["session"].as_str().unwrap().len(), 32, "{line}");
    assert!(line["run_ms"].as_f64().unwrap() > 0.0 && line["cpu_ms"].as_f64().unwrap() > 0.0, "{line}");
    let text = line.to_string();
    assert!(SECRETS.iter().all(|secret| !text.contains(secret)), "{text}");
    assert_eq!(audited.path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!audited.server.log().contains("code_sha256"), "nobody asked for lines on stderr");
}

#[test]
fn however_a_run_ends_it_has_its_line() {
    let flags = ["--set", "session.queue=0", "--set", "session.max=2", "--set", "limits.stdout=1KiB"];
    let audited = audited(&flags);
    let server = &audited.server;
    server.run("secret-user", "1/0");
    server.run("secret-user", "print('x' * 2000)");
    server.run_with("secret-user", "while True: pass", json!({"timeout_ms": 50}));
    assert_eq!(server.post("{\"user_id\":\"secret-user\"}").0, 400); // no run, and no line
    let mut first = Wire::new(server);
    first.send(sleeping("secret-user", 60.0));
    eventually("it runs", || server.get("/sessions/secret-user").1.contains("running"));
    assert_eq!(server.post(secret_body().to_string()).0, 429);
    drop(first); // goes away in the middle
    eventually("its run is over", || server.get("/sessions/secret-user").1.contains("idle"));
    server.run("other", "result = 1");
    assert_eq!(server.post(r#"{"user_id":"third","code":"result = 1"}"#).0, 429);
    let lines = audited.lines(7);
    let outcomes: Vec<_> = lines.iter().map(|line| line["outcome"].as_str().unwrap()).collect();
    let expected = ["raised", "ok", "timeout", "session_busy", "cancelled", "ok", "too_many_sessions"];
    assert_eq!(outcomes, expected);
    assert_eq!(lines[1]["truncated"], json!(["stdout"]));
    for (line, outcome) in lines.iter().zip(outcomes) {
        let ended = !["session_busy", "cancelled", "too_many_sessions"].contains(&outcome);
        assert_eq!(names(line), sorted(&[&ALWAYS, if ended { &USAGE } else { &[] }]), "{line}");
        assert!(SECRETS.iter().all(|secret| !line.to_string().contains(secret)), "{line}");
    }
    let session = |turn: usize| lines[turn]["session"].as_str().unwrap();
    assert!(session(0) == session(4) && session(0) != session(5), "{lines:?}");
}

#[test]
fn a_line_bears_the_id_of_its_answer_and_the_tenant_of_its_key() {
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("keys");
    let (_, made, _) = command_line(&["key", "new", "--tenant", "alice"], "");
    let values: Vec<_> = made.lines().map(|line| line.rsplit_once(": ").unwrap().1).collect();
    std::fs::write(&keys, values[1]).unwrap();
    let keys = format!("auth.keys_file=\"{}\"", keys.display());
    let audited = audited(&["--set", "auth.mode=keys", "--set", &keys]);
    let body = secret_body().to_string();
    assert_eq!(audited.server.request("POST", "/run", &[], &body).0, 401); // no run, and no line
    let (status, headers, _) = audited.server.request("POST", "/run", &[("x-api-key", values[0])], &body);
    assert_eq!(status, 200);
    let [line] = &audited.lines(1)[..] else { unreachable!() };
    assert_eq!(
        (line["tenant"].as_str(), line["request_id"].as_str()),
        (Some("alice"), header(&headers, "x-request-id"))
    );
    assert!(!line.to_string().contains(values[0]), "{line}");
}

#[test]
fn a_filter_that_names_the_lines_has_the_same_ones_logged() {
    let audited = audited(&["--set", "log=\"info,codesandbox::audit=info\"", "--set", "log_format=json"]);
    audited.server.run("secret-user", "result = 1");
    let written = audited.lines(1).remove(0);
    eventually("the line on stderr", || audited.server.log().contains("code_sha256"));
    let log = audited.server.log();
    let logged: Value =
        serde_json::from_str(log.lines().find(|line| line.contains("code_sha256")).unwrap()).unwrap();
    assert_eq!(logged["target"], "codesandbox::audit");
    assert!(!log.contains("secret-user"), "{log}");
    for (name, value) in written.as_object().unwrap() {
        match name.as_str() {
            "time" => {}                                           // every line of the log has one
            "truncated" => assert_eq!(logged["fields"][name], ""), // there are no lists there
            _ => assert_eq!(&logged["fields"][name], value, "{name}: {logged}"),
        }
    }
}

#[test]
fn a_full_disk_costs_lines_that_are_counted_and_no_answer() {
    let server = Server::start(&["--set", "pool.size=1", "--set", "audit.file=\"/dev/full\""]);
    for turn in 0..3 {
        assert_eq!(server.run("u", &format!("result = {turn}"))["result"], turn);
    }
    eventually("the count", || server.metric("codesandbox_audit_lost_total") == 3.0);
    let warnings = server.log().matches("audit lines are lost").count();
    assert_eq!(warnings, 1, "{}", server.log());
}

#[test]
fn a_file_that_cannot_be_opened_stops_the_start_by_its_key() {
    let (status, _, said) =
        command_line(&["--listen", "127.0.0.1:0", "--set", "audit.file=\"/nowhere/audit.log\""], "");
    assert_eq!(status, 2);
    assert!(said.contains("audit.file") && said.contains("/nowhere/audit.log"), "{said}");
}

#[test]
fn sighup_opens_the_file_again() {
    let audited = audited(&[]);
    audited.server.run("u", "result = 1");
    let first = audited.lines(1);
    let moved = audited.directory.path().join("audit.log.1");
    std::fs::rename(&audited.path, &moved).unwrap();
    audited.server.run("u", "result = 2"); // before the signal: into the old one
    audited.server.signal(libc::SIGHUP);
    eventually("a new file", || audited.path.exists());
    audited.server.run("u", "result = 3");
    let new = audited.lines(1);
    assert_eq!(new[0]["session"], first[0]["session"]);
    assert_eq!(std::fs::read_to_string(&moved).unwrap().lines().count(), 2);
    // One that cannot be opened changes nothing.
    std::fs::rename(&audited.path, &moved).unwrap();
    std::fs::create_dir(&audited.path).unwrap();
    audited.server.signal(libc::SIGHUP);
    eventually("a word on it", || audited.server.log().contains("the old one goes on"));
    audited.server.run("u", "result = 4");
    eventually("its line", || std::fs::read_to_string(&moved).unwrap().lines().count() == 2);
}

#[test]
fn what_a_server_that_stops_cuts_off_has_its_line() {
    let mut audited = audited(&["--set", "shutdown.timeout=300ms"]);
    let mut wire = Wire::new(&audited.server);
    for _ in 0..50 {
        audited.server.run("quick", "result = 1");
    }
    wire.send(sleeping("u", 60.0));
    eventually("it runs", || audited.server.get("/sessions/u").1.contains("running"));
    audited.server.signal(libc::SIGTERM);
    assert!(audited.server.wait().success());
    assert_eq!(audited.lines(51)[50]["outcome"], "cancelled");
}
