//! Server-sent events, interrupts and what one request may narrow.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::drivers::Driver;
use crate::support::{Server, Wire, eventually};

behaviours! {
    "stream":
    output_comes_as_events_and_the_plain_answer_last,
    output_comes_while_the_run_goes_on,
    output_over_its_cap_is_said_to_be_cut_and_the_run_goes_on,
    characters_that_come_in_pieces_arrive_whole,
    a_request_that_is_refused_is_no_stream,
    a_client_that_leaves_a_stream_cancels_its_run,
    a_client_that_does_not_read_holds_up_nobody,
    a_kernel_run_streams_too,
    an_interrupt_ends_the_run_that_goes_on,
    an_interrupt_without_a_run_is_a_conflict,
    an_interrupted_kernel_keeps_its_variables,
    a_run_that_does_not_obey_an_interrupt_is_killed,
    cpu_time_is_narrowed_for_one_run,
    memory_is_narrowed_for_one_run,
    output_is_narrowed_for_one_run,
    limits_may_only_narrow,
}

/// A run's events as they come: when, which, and their data.
struct Events(BufReader<TcpStream>);

impl Events {
    fn of(server: &Server, body: &Value) -> Events {
        let body = body.to_string();
        let mut wire = Wire::new(server);
        wire.send(format!(
            "POST /run HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\naccept: text/event-stream\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        ));
        let mut events = Events(BufReader::new(wire.stream));
        let head: Vec<_> =
            std::iter::from_fn(|| Some(events.line()).filter(|line| !line.is_empty())).collect();
        assert!(head[0].contains(" 200 "), "{head:?}");
        assert!(head.iter().any(|line| line == "content-type: text/event-stream"), "{head:?}");
        events
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// None at the stream's end. The framing of chunks is passed over: no line of an event is a number.
    fn next(&mut self) -> Option<(String, Value)> {
        loop {
            let line = self.line();
            if line == "0" {
                return None;
            }
            if let Some(name) = line.strip_prefix("event: ") {
                let data = self.line();
                let data = data.strip_prefix("data: ").unwrap_or_else(|| panic!("{name}: {data}"));
                return Some((name.to_owned(), serde_json::from_str(data).unwrap()));
            }
        }
    }

    fn rest(mut self) -> Vec<(String, Value)> {
        std::iter::from_fn(|| self.next()).collect()
    }
}

fn text_of(events: &[(String, Value)], name: &str) -> String {
    let texts = events.iter().filter(|(event, _)| event == name);
    texts.map(|(_, data)| data["text"].as_str().unwrap()).collect()
}

fn kind(answer: &Value) -> &str {
    answer["error_detail"]["kind"].as_str().unwrap_or("none")
}

fn output_comes_as_events_and_the_plain_answer_last(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import sys\nprint('one'); print('two', file=sys.stderr); result = 3";
    let events = Events::of(&server, &json!({"user_id": u, "code": code})).rest();
    assert_eq!(text_of(&events, "stdout"), "one\n");
    assert_eq!(text_of(&events, "stderr"), "two\n");
    let (name, done) = events.last().unwrap();
    assert_eq!(name, "done", "{events:?}");
    assert_eq!(done, &server.run(&u, code), "exactly the plain answer");
    let failed = Events::of(&server, &json!({"user_id": u, "code": "1/0"})).rest();
    assert_eq!(kind(&failed.last().unwrap().1), "raised", "{failed:?}");
}

fn output_comes_while_the_run_goes_on(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    server.run(&u, "1");
    let code = "import time\nfor _ in range(5):\n    print(time.time()); time.sleep(0.3)";
    let mut events = Events::of(&server, &json!({"user_id": u, "code": code}));
    let mut delays = Vec::new();
    while let Some((name, data)) = events.next() {
        if name == "stdout" {
            let printed: f64 = data["text"].as_str().unwrap().trim().parse().unwrap();
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            delays.push(now.as_secs_f64() - printed);
        }
    }
    assert_eq!(delays.len(), 5, "{delays:?}");
    delays.sort_by(f64::total_cmp);
    // 50 ms are promised; each of them waits for the next line at least where it is not told at once.
    assert!(delays[2] < 0.25, "{delays:?}");
}

fn output_over_its_cap_is_said_to_be_cut_and_the_run_goes_on(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.stdout=10KiB"]);
    let code = "for _ in range(2000): print('x' * 99)\nresult = 'the end'";
    let events = Events::of(&server, &json!({"user_id": u, "code": code})).rest();
    assert_eq!(text_of(&events, "stdout").len(), 10 * 1024);
    assert!(events.contains(&("truncated".into(), json!({"field": "stdout"}))), "{:?}", events.last());
    let done = &events.last().unwrap().1;
    assert_eq!((&done["result"], &done["truncated"]), (&json!("the end"), &json!(["stdout"])));
}

fn characters_that_come_in_pieces_arrive_whole(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import os, time\nfor byte in '\u{20ac}\u{e4}'.encode() + b'\\xff\\xe2':\n    \
                os.write(1, bytes([byte])); time.sleep(0.02)";
    let events = Events::of(&server, &json!({"user_id": u, "code": code})).rest();
    assert_eq!(text_of(&events, "stdout"), "\u{20ac}\u{e4}\u{fffd}\u{fffd}", "{events:?}");
    assert_eq!(events.last().unwrap().1["stdout"], "\u{20ac}\u{e4}\u{fffd}\u{fffd}");
}

fn a_request_that_is_refused_is_no_stream(driver: &Driver) {
    let (server, _) = driver.server(&[]);
    let headers = [("content-type", "application/json"), ("accept", "text/event-stream")];
    let (status, _, body) = server.request("POST", "/run", &headers, r#"{"user_id":"","code":"1"}"#);
    assert_eq!(status, 400, "{body}");
    assert!(body.contains("invalid_request"), "{body}");
}

fn a_client_that_leaves_a_stream_cancels_its_run(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import time\ntry:\n    print('here'); time.sleep(60)\nexcept KeyboardInterrupt: open('cancelled', 'w')";
    let mut events = Events::of(&server, &json!({"user_id": u, "code": code}));
    assert_eq!(events.next().unwrap().0, "stdout");
    drop(events);
    let begun = Instant::now();
    let found = server.run(&u, "import os; result = os.path.exists('cancelled')");
    assert_eq!(found["result"], true, "{found}");
    assert!(begun.elapsed() < Duration::from_secs(30), "it was interrupted, not awaited");
}

fn a_client_that_does_not_read_holds_up_nobody(driver: &Driver) {
    let (server, u) = driver.server(&["--set", "limits.stdout=16MiB"]);
    let code = "for _ in range(150): print('x' * 99_999)\nopen('written', 'w')\nimport time; time.sleep(60)";
    let events = Events::of(&server, &json!({"user_id": u, "code": code}));
    let other = format!("{u}-other");
    assert_eq!(server.run(&other, "result = 3")["result"], 3);
    // The run has written 15 MB, which nobody has read, and goes on: the session's own next run tells.
    std::thread::sleep(Duration::from_secs(2));
    drop(events);
    let found = server.run(&u, "import os; result = os.path.exists('written')");
    assert_eq!(found["result"], true, "{found}");
}

fn a_kernel_run_streams_too(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let body = json!({"user_id": u, "mode": "kernel", "code": "print('one')\n1 + 1"});
    let events = Events::of(&server, &body).rest();
    assert_eq!(text_of(&events, "stdout"), "one\n");
    assert_eq!(events.last().unwrap().1["result"], 2);
}

/// Interrupts a run as soon as there is one, and gives what it is answered.
fn interrupted(server: &Server, user: &str, body: Value) -> Value {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| server.post(body.to_string()).1);
        eventually("a run that can be interrupted", || {
            std::thread::sleep(Duration::from_millis(100));
            server.request("POST", &format!("/sessions/{user}/interrupt"), &[], "").0 == 204
        });
        run.join().unwrap()
    })
}

fn an_interrupt_ends_the_run_that_goes_on(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import time\nopen('f', 'w').write('kept')\ntime.sleep(60)";
    let answer = interrupted(&server, &u, json!({"user_id": u, "code": code, "timeout_ms": 60_000}));
    assert_eq!((kind(&answer), answer.get("session")), ("cancelled", None), "{answer}");
    let after = server.run(&u, "import os; result = os.listdir()");
    assert!(after.get("error").is_none(), "{after}");
}

fn an_interrupt_without_a_run_is_a_conflict(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let path = format!("/sessions/{u}/interrupt");
    let (status, _, body) = server.request("POST", &path, &[], "");
    assert_eq!(status, 409, "{body}");
    assert!(body.contains("not_running"), "{body}");
    server.run(&u, "1");
    assert_eq!(server.request("POST", &path, &[], "").0, 409, "nor after one");
    assert_eq!(server.run(&u, "result = 3")["result"], 3, "and the next one is not interrupted");
    let (status, headers, _) = server.request("GET", &path, &[], "");
    assert_eq!((status, crate::support::header(&headers, "allow")), (405, Some("POST")));
}

fn an_interrupted_kernel_keeps_its_variables(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    server.run_with(&u, "x = 1", json!({"mode": "kernel"}));
    let body =
        json!({"user_id": u, "mode": "kernel", "code": "x = 2\nwhile True: pass", "timeout_ms": 60_000});
    let answer = interrupted(&server, &u, body);
    assert_eq!((kind(&answer), answer.get("session")), ("cancelled", None), "{answer}");
    assert_eq!(server.run_with(&u, "x is not None", json!({"mode": "kernel"}))["result"], true);
}

fn a_run_that_does_not_obey_an_interrupt_is_killed(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    let code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nopen('deaf', 'w')\nwhile True: time.sleep(1)";
    let answer = interrupted(&server, &u, json!({"user_id": u, "code": code, "timeout_ms": 60_000}));
    assert_eq!((kind(&answer), answer.get("session")), ("cancelled", None), "{answer}");
    assert_eq!(server.run(&u, "result = 3")["result"], 3);
}

fn cpu_time_is_narrowed_for_one_run(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for mode in ["fresh", "kernel"] {
        let limits = json!({"mode": mode, "limits": {"cpu_ms": 200}, "timeout_ms": 20_000});
        let answer = server.run_with(&u, "while True: pass", limits.clone());
        assert_eq!(kind(&answer), "cpu_exceeded", "{mode}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains("200 ms of CPU time"), "{answer}");
        let idle = server.run_with(&u, "import time; time.sleep(0.5); result = 3", limits);
        assert_eq!(idle["result"], 3, "{mode}: sleeping costs none: {idle}");
        let after =
            server.run_with(&u, "for _ in range(10_000_000): pass\nresult = 3", json!({"mode": mode}));
        assert_eq!(after["result"], 3, "{mode}: for that run alone: {after}");
    }
    let child = "import subprocess, sys\nresult = subprocess.run([sys.executable, '-c', 'while True: pass']).returncode";
    let answer = server.run_with(&u, child, json!({"limits": {"cpu_ms": 1}, "timeout_ms": 20_000}));
    assert_ne!(kind(&answer), "timeout", "a child has its bound, too: {answer}");
}

fn memory_is_narrowed_for_one_run(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for mode in ["fresh", "kernel"] {
        let limits = json!({"mode": mode, "limits": {"memory_bytes": 20_000_000}});
        let answer = server.run_with(&u, "x = bytearray(40_000_000)", limits.clone());
        assert_eq!(kind(&answer), "out_of_memory", "{mode}: {answer}");
        let answer = server.run_with(&u, "x = bytearray(10_000_000); result = 3", limits);
        assert_eq!(answer["result"], 3, "{mode}: {answer}");
        let answer = server.run_with(&u, "x = bytearray(40_000_000); result = 3", json!({"mode": mode}));
        assert_eq!(answer["result"], 3, "{mode}: for that run alone: {answer}");
    }
    let raise = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)";
    let answer = server.run_with(&u, raise, json!({"limits": {"memory_bytes": 20_000_000}}));
    assert_eq!(kind(&answer), "raised", "and cannot be raised again: {answer}");
}

fn output_is_narrowed_for_one_run(driver: &Driver) {
    let (server, u) = driver.server(&[]);
    for mode in ["fresh", "kernel"] {
        let limits = json!({"mode": mode, "limits": {"output_bytes": 10}});
        let answer = server.run_with(&u, "print('x' * 9)", limits.clone());
        assert_eq!(
            (answer["stdout"].as_str().unwrap().len(), answer.get("truncated")),
            (10, None),
            "{answer}"
        );
        let answer = server.run_with(&u, "print('x' * 10)", limits);
        assert_eq!(
            (&answer["stdout"], &answer["truncated"]),
            (&json!("x".repeat(10)), &json!(["stdout"])),
            "{answer}"
        );
        assert_eq!(
            server.run_with(&u, "print('x' * 99)", json!({"mode": mode}))["stdout"].as_str().unwrap().len(),
            100
        );
    }
}

fn limits_may_only_narrow(driver: &Driver) {
    let server = driver.own(&["--set", "limits.timeout=10s", "--set", "limits.timeout_max=10s"]);
    for (limits, says) in [
        (json!([]), "limits must be an object"),
        (
            json!({"memory_bytes": 512 * 1024 * 1024 + 1}),
            "limits.memory_bytes must be an integer from 1048576 to 536870912",
        ),
        (json!({"memory_bytes": 1}), "limits.memory_bytes"),
        (json!({"cpu_ms": 10_001}), "limits.cpu_ms must be an integer from 1 to 10000"),
        (json!({"cpu_ms": 0}), "limits.cpu_ms"),
        (json!({"cpu_ms": 1.5}), "limits.cpu_ms"),
        (json!({"output_bytes": 1048577}), "limits.output_bytes must be an integer from 0 to 1048576"),
        (json!({"output_bytes": -1}), "limits.output_bytes"),
        (json!({"disk": 1}), "disk"),
    ] {
        let (status, answer) =
            server.post(json!({"user_id": "u", "code": "1", "limits": limits}).to_string());
        assert_eq!(status, 400, "{answer}");
        assert!(answer["error"].as_str().unwrap().contains(says), "{answer}");
    }
}
