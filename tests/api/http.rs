//! Bare sockets: what no client library would send, and clients that come, stall and go as they like.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Answer, Server, Wire, eventually, header, post_bytes};

const HEALTH: &str = "GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";

fn server(flags: &[&str]) -> Server {
    let mut all = vec!["--set", "pool.size=1"];
    all.extend(flags);
    Server::start(&all)
}

fn run_body(user_id: &str, code: &str) -> String {
    json!({"user_id": user_id, "code": code}).to_string()
}

/// What one connection gets for these bytes; `None` where it is closed without an answer.
fn ask(server: &Server, bytes: impl AsRef<[u8]>) -> Option<Answer> {
    let mut wire = Wire::new(server);
    wire.send(bytes);
    wire.answer()
}

// -- connections -------------------------------------------------------------------------------------

#[test]
fn one_connection_serves_many_requests_and_outlives_refusals() {
    let server = server(&[]);
    let mut wire = Wire::new(&server);
    for turn in 0..5 {
        wire.send(post_bytes(&run_body("u", &format!("result = {turn}"))));
        assert!(wire.answer().unwrap().body.starts_with(&format!("{{\"result\":{turn},")));
        wire.send(post_bytes("{}"));
        assert_eq!(wire.answer().unwrap().status, 400);
        wire.send("GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n");
        assert_eq!(wire.answer().unwrap().status, 404);
    }
}

#[test]
fn ten_requests_written_at_once_are_answered_in_order() {
    let server = server(&[]);
    let mut wire = Wire::new(&server);
    let all: String = (0..10).map(|turn| post_bytes(&run_body("u", &format!("result = {turn}")))).collect();
    wire.send(all);
    for turn in 0..10 {
        assert!(wire.answer().unwrap().body.starts_with(&format!("{{\"result\":{turn},")));
    }
}

#[test]
fn an_answer_does_not_wait_for_the_rest_of_the_next_request() {
    let server = server(&[]);
    let mut wire = Wire::new(&server);
    wire.send(format!("{HEALTH}{}", &HEALTH[..20]));
    wire.stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    assert_eq!(wire.answer().unwrap().status, 200);
    wire.send(&HEALTH[20..]);
    assert_eq!(wire.answer().unwrap().status, 200);
}

/// Answers that nobody takes must stop the reading of more requests, not pile up.
#[test]
fn a_client_that_pipelines_and_never_reads_does_not_grow_the_server() {
    let server = server(&[]);
    let before = resident_bytes(server.pid());
    let mut wires: Vec<_> = (0..4).map(|_| server.connect()).collect();
    let requests = "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".repeat(1000);
    for wire in &mut wires {
        wire.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        for _ in 0..10 {
            if wire.write_all(requests.as_bytes()).is_err() {
                break; // it reads no more: as it should
            }
        }
    }
    std::thread::sleep(Duration::from_millis(500));
    let grown = resident_bytes(server.pid()).saturating_sub(before);
    assert!(grown < 32 << 20, "grown by {grown} bytes");
    assert_eq!(server.run("u", "result = 1")["result"], 1);
}

fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn a_byte_at_a_time_is_a_request_all_the_same() {
    let server = server(&[]);
    let mut wire = Wire::new(&server);
    wire.stream.set_nodelay(true).unwrap();
    for byte in post_bytes(&run_body("u", "result = 1")).bytes() {
        wire.send([byte]);
    }
    assert_eq!(wire.answer().unwrap().status, 200);
}

#[test]
fn headers_that_do_not_come_are_not_waited_for() {
    let server = server(&["--set", "server.header_timeout=400ms"]);
    for begun in ["", "G", "GET /healthz HTTP/1.1\r\n", "GET /healthz HTTP/1.1\r\nhost: x\r\nx-slow: "] {
        let mut wire = Wire::new(&server);
        let start = Instant::now();
        wire.send(begun);
        let answer = wire.answer();
        assert!(answer.is_none_or(|answer| answer.status == 408), "{begun:?}");
        let took = start.elapsed();
        assert!(took > Duration::from_millis(300) && took < Duration::from_secs(5), "{begun:?}: {took:?}");
    }
}

#[test]
fn headers_that_trickle_do_not_buy_time() {
    let server = server(&["--set", "server.header_timeout=400ms"]);
    let mut wire = Wire::new(&server);
    wire.send("GET /healthz HTTP/1.1\r\n");
    let start = Instant::now();
    let closed = (0..100).any(|turn| {
        std::thread::sleep(Duration::from_millis(50));
        wire.stream.write_all(format!("x-{turn}: y\r\n").as_bytes()).is_err()
    });
    assert!(closed && start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn a_connection_that_idles_between_requests_gives_its_place_back() {
    let server = server(&["--set", "server.header_timeout=400ms", "--set", "server.connections=1"]);
    let mut wire = Wire::new(&server);
    wire.send(HEALTH);
    assert_eq!(wire.answer().unwrap().status, 200);
    assert!(wire.is_closed());
    assert_eq!(server.get("/healthz").0, 200, "and the next one gets in");
}

#[test]
fn a_body_that_does_not_come_is_408() {
    let server = server(&["--set", "server.body_timeout=400ms"]);
    for begun in ["content-length: 100\r\n\r\n{\"user_id\"", "transfer-encoding: chunked\r\n\r\n5\r\n{\"use"]
    {
        let answer = ask(&server, format!("POST /run HTTP/1.1\r\nhost: x\r\n{begun}")).unwrap();
        assert_eq!(answer.status, 408, "{begun}");
        assert!(answer.body.contains(r#""code":"request_timeout""#), "{answer:?}");
    }
}

/// A client that is still writing has to get its answer, not a reset that throws it away.
#[test]
fn a_body_far_over_its_cap_gets_its_413_while_it_is_still_being_written() {
    let server = server(&[]);
    let piece = " ".repeat(1 << 20);
    for (head, pieces) in [
        (format!("content-length: {}\r\n\r\n", 40 << 20), 40),
        (format!("content-length: {}\r\n\r\n", 17 << 20), 17),
    ] {
        let mut wire = Wire::new(&server);
        wire.send(format!("POST /run HTTP/1.1\r\nhost: x\r\n{head}"));
        for _ in 0..pieces {
            wire.send(&piece);
        }
        assert_eq!(wire.answer().map(|answer| answer.status), Some(413), "{head:?}");
    }
}

#[test]
fn a_body_that_breaks_off_runs_nothing() {
    let server = server(&[]);
    let request = post_bytes(&run_body("u", "result = 1"));
    for cut in [1, 10, request.len() / 2] {
        let mut wire = Wire::new(&server);
        wire.send(&request[..request.len() - cut]);
        wire.stream.shutdown(Shutdown::Write).unwrap();
        assert!(wire.answer().is_none_or(|answer| answer.status == 400), "{cut}");
    }
    eventually("all are gone", || server.metric("codesandbox_http_connections") == 1.0);
    assert_eq!(server.get("/sessions/u").0, 404);
}

#[test]
fn a_client_that_expects_100_gets_it_before_its_body_and_only_where_the_body_is_wanted() {
    let server = server(&[]);
    let body = run_body("u", "result = 1");
    let head = |path: &str, kind: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        )
    };
    let mut wire = Wire::new(&server);
    wire.send(head("/run", "application/json"));
    assert_eq!(wire.head().unwrap().status, 100);
    wire.send(&body);
    assert_eq!(wire.answer().unwrap().status, 200);
    assert_eq!(ask(&server, head("/run", "text/plain")).unwrap().status, 415);
    assert_eq!(ask(&server, head("/nowhere", "application/json")).unwrap().status, 404);
}

#[test]
fn head_is_get_without_a_body() {
    let server = server(&[]);
    for path in ["/healthz", "/readyz", "/metrics", "/capabilities"] {
        let mut wire = Wire::new(&server);
        wire.send(format!("HEAD {path} HTTP/1.1\r\nhost: x\r\n\r\n"));
        let head = wire.head().unwrap();
        assert_eq!(head.status, 200, "{path}");
        assert!(header(&head.headers, "content-length").unwrap().parse::<usize>().unwrap() > 0);
        wire.send(HEALTH);
        assert_eq!(wire.answer().unwrap().status, 200, "no byte of a body stood between");
    }
    let mut wire = Wire::new(&server);
    wire.send("HEAD /run HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!(wire.head().unwrap().status, 405);
}

// -- odd requests ------------------------------------------------------------------------------------

#[test]
fn odd_but_lawful_requests_are_understood() {
    let server = server(&[]);
    for (request, status) in [
        ("GET http://anywhere.example/healthz HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        ("GET /healthz HTTP/1.0\r\n\r\n", 200),
        ("\r\n\r\nGET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", 200),
        ("GET /healthz HTTP/1.1\nhost: x\n\n", 200),
        ("GET /healthz HTTP/1.1\r\nhost:x   \r\nX-Odd:\t y \r\n\r\n", 200),
        ("OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        ("OPTIONS /healthz HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        ("CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        ("TRACE /healthz HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        ("BREW /run HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        ("GET /%68ealthz HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        ("GET /../healthz HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        ("GET /healthz#fragment HTTP/1.1\r\nhost: x\r\n\r\n", 200),
    ] {
        assert_eq!(ask(&server, request).map(|answer| answer.status), Some(status), "{request:?}");
    }
}

#[test]
fn http_1_0_closes_unless_asked_to_keep() {
    let server = server(&[]);
    let mut wire = Wire::new(&server);
    wire.send("GET /healthz HTTP/1.0\r\n\r\n");
    assert_eq!(wire.answer().unwrap().status, 200);
    assert!(wire.is_closed());
    let mut wire = Wire::new(&server);
    for _ in 0..2 {
        wire.send("GET /healthz HTTP/1.0\r\nconnection: keep-alive\r\n\r\n");
        assert_eq!(wire.answer().unwrap().status, 200);
    }
}

#[test]
fn bytes_that_are_no_request_are_refused() {
    let server = server(&[]);
    let body = run_body("smuggled", "result = 1");
    let post =
        |headers: &str| format!("POST /run HTTP/1.1\r\nhost: x\r\n{headers}\r\n\r\n{body}").into_bytes();
    let length = body.len();
    for bytes in [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"\0\0\0\0\r\n\r\n".to_vec(),
        b"hello\r\n\r\n".to_vec(),
        b"GET /healthz\r\n\r\n".to_vec(),
        b"GET /healthz HTTP/9.9\r\n\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        b"GET  /healthz HTTP/1.1\r\n\r\n".to_vec(),
        b"GET /heal thz HTTP/1.1\r\n\r\n".to_vec(),
        b"GET /healthz HTTP/1.1\r\nno colon here\r\n\r\n".to_vec(),
        b"GET /healthz HTTP/1.1\r\nhost : x\r\n\r\n".to_vec(),
        b"GET /healthz HTTP/1.1\r\nx: a\r\n folded\r\n\r\n".to_vec(),
        b"GET /healthz HTTP/1.1\r\nx: a\0b\r\n\r\n".to_vec(),
        b"GET /healthz HTTP/1.1\r\nx: a\rb\r\n\r\n".to_vec(),
        b"G\xc3\xa9T /healthz HTTP/1.1\r\n\r\n".to_vec(),
        post("content-length: many"),
        post("content-length: -1"),
        post(&format!("content-length: +{length}")),
        post(&format!("content-length: 0x{length:x}")),
        post("content-length: 99999999999999999999999999"),
        post(&format!("content-length: {length}\r\ncontent-length: {}", length + 1)),
        post(&format!("content-length: {length}, {}", length + 1)),
        post("transfer-encoding: chunked, identity"),
        post("transfer-encoding: xchunked"),
    ] {
        let answer = ask(&server, &bytes);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let silent = text.starts_with("PRI"); // HTTP/2's own greeting may be met with silence
        let refused = answer.as_ref().map_or(silent, |answer| answer.status == 400);
        assert!(refused, "{text:?}: {answer:?}");
    }
    assert_eq!(server.get("/sessions/smuggled").0, 404);
    assert_eq!(server.get("/healthz").0, 200);
}

/// Where a proxy in front and this server could disagree about the end of a body, nothing hides in it.
#[test]
fn a_length_beside_chunks_smuggles_no_second_request() {
    let server = server(&[]);
    let body = run_body("outer", "result = 1");
    let hidden = post_bytes(&run_body("smuggled", "result = 2"));
    let chunk = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    for headers in [
        format!("content-length: {}\r\ntransfer-encoding: chunked", chunk.len() + hidden.len()),
        format!("transfer-encoding: chunked\r\ncontent-length: {}", chunk.len() + hidden.len()),
    ] {
        let mut wire = Wire::new(&server);
        wire.send(format!("POST /run HTTP/1.1\r\nhost: x\r\n{headers}\r\n\r\n{chunk}{hidden}"));
        let status = wire.answer().map(|answer| answer.status);
        assert!(matches!(status, None | Some(200 | 400)), "{status:?}");
        if status == Some(200) {
            assert!(wire.is_closed(), "RFC 9112, 6.3: the connection is closed after such a message");
        }
    }
    assert_eq!(server.get("/sessions/smuggled").0, 404);
}

#[test]
fn the_same_length_twice_is_one_length() {
    let server = server(&[]);
    let body = run_body("u", "result = 1");
    let length = body.len();
    let request = format!(
        "POST /run HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    let answer = ask(&server, request);
    assert!(answer.is_none_or(|answer| [200, 400].contains(&answer.status)));
    assert_eq!(server.get("/healthz").0, 200);
}

#[test]
fn chunks_of_any_size_make_one_body() {
    let server = server(&[]);
    let body = run_body("u", "result = 'é'");
    for size in [1, 7, 1000] {
        let chunks = body.as_bytes().chunks(size).flat_map(|chunk| {
            [format!("{:X};extension=1\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat()
        });
        let mut request = b"POST /run HTTP/1.1\r\nhost: x\r\ntransfer-encoding: Chunked\r\n\r\n".to_vec();
        request.extend(chunks);
        request.extend_from_slice(b"0\r\nx-trailer: y\r\n\r\n");
        request.extend_from_slice(HEALTH.as_bytes());
        let mut wire = Wire::new(&server);
        wire.send(request);
        assert_eq!(wire.answer().unwrap().status, 200, "{size}");
        assert_eq!(wire.answer().unwrap().status, 200, "{size}: what follows is the next request");
    }
    for broken in ["x\r\n{", "5\r\n{\"use\r\n0\r\n\r\n", "-1\r\n", "ffffffffffffffffff\r\n", "1\r\n{x"] {
        let answer = ask(
            &server,
            format!("POST /run HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{broken}\r\n\r\n"),
        );
        assert!(answer.as_ref().is_none_or(|answer| answer.status == 400), "{broken:?}: {answer:?}");
    }
}

#[test]
fn headers_beyond_their_bound_are_431() {
    let server = server(&[]);
    let many: String = (0..300).map(|turn| format!("x-{turn}: y\r\n")).collect();
    assert_eq!(ask(&server, format!("GET /healthz HTTP/1.1\r\n{many}\r\n")).unwrap().status, 431);
    for begun in ["GET /healthz HTTP/1.1\r\nx: ", "GET /healthz?"] {
        let mut wire = Wire::new(&server);
        wire.send(begun);
        for _ in 0..2 {
            wire.send("y".repeat(40 << 10));
            std::thread::sleep(Duration::from_millis(100)); // read as it comes: 64 KiB are the bound
        }
        let status = wire.answer().unwrap().status;
        assert!(status == 431 || (status == 414 && begun.ends_with('?')), "{begun:?}: {status}");
    }
    let fair = format!("GET /healthz HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(30 << 10));
    assert_eq!(ask(&server, &fair).unwrap().status, 200);
}

// -- many clients, and clients that go away ----------------------------------------------------------

#[test]
fn connections_beyond_the_bound_wait_and_nothing_breaks() {
    let server = server(&["--set", "server.connections=8"]);
    let half = |_| {
        let mut wire = Wire::new(&server);
        wire.send(&HEALTH[..10]);
        wire
    };
    let mut holding: Vec<_> = (0..8).map(half).collect();
    let ask = |_| {
        let mut wire = Wire::new(&server);
        wire.send("GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        wire
    };
    // Fewer than any host's backlog holds, so that each of them connects at once.
    let mut waiting: Vec<_> = (0..100).map(ask).collect();
    waiting[0].stream.set_nonblocking(true).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let mut early = [0; 64];
    let read = waiting[0].stream.read(&mut early);
    assert!(read.is_err(), "an answer came though all places are taken: {}", String::from_utf8_lossy(&early));
    waiting[0].stream.set_nonblocking(false).unwrap();
    for wire in &mut holding {
        wire.send(&HEALTH[10..]);
        assert_eq!(wire.answer().unwrap().status, 200);
    }
    drop(holding);
    waiting.extend((100..2000).map(ask));
    for wire in &mut waiting {
        assert_eq!(wire.answer().unwrap().status, 200);
    }
    eventually("all are closed", || server.metric("codesandbox_http_connections") == 1.0);
}

#[test]
fn a_client_that_goes_away_cancels_its_run_and_the_session_stays() {
    let server = server(&[]);
    server.run("u", "open('kept', 'w')");
    for turn in 1..=3 {
        let mut wire = Wire::new(&server);
        wire.send(post_bytes(&run_body("u", "import time\nprint('x')\ntime.sleep(60)")));
        eventually("it runs", || server.get("/sessions/u").1.contains("running"));
        std::thread::sleep(Duration::from_millis(50));
        drop(wire);
        let begun = Instant::now();
        let answer = server.run("u", "import os\nresult = os.listdir()");
        assert_eq!(answer["result"], json!(["kept"]), "{answer}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert_eq!(server.metric("codesandbox_runs_total{outcome=\"cancelled\"}"), f64::from(turn));
    }
    assert_eq!(server.metric("codesandbox_sandboxes{state=\"claimed\"}"), 1.0);
}

#[test]
fn a_stubborn_run_of_a_client_that_went_away_is_killed() {
    let server = server(&[]);
    server.run("u", "open('kept', 'w')");
    let mut wire = Wire::new(&server);
    let code = "while True:\n  try:\n    while True: pass\n  except BaseException: pass";
    wire.send(post_bytes(&run_body("u", code)));
    eventually("it runs", || server.get("/sessions/u").1.contains("running"));
    std::thread::sleep(Duration::from_millis(100));
    drop(wire);
    let begun = Instant::now();
    let answer = server.run("u", "import os\nresult = os.listdir()");
    assert_eq!(answer["result"], json!(["kept"]), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}

#[test]
fn clients_that_go_away_in_the_queue_give_their_places_back() {
    let server = server(&["--set", "session.queue=2"]);
    let mut running = Wire::new(&server);
    running.send(post_bytes(&run_body("u", "import time\ntime.sleep(1)\nresult = 1")));
    eventually("it runs", || server.get("/sessions/u").1.contains("running"));
    for _ in 0..5 {
        let mut gone: Vec<_> = (0..2).map(|_| Wire::new(&server)).collect();
        for wire in &mut gone {
            wire.send(post_bytes(&run_body("u", "open('never', 'w')")));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(50));
    let answer = server.run("u", "import os\nresult = os.listdir()");
    assert_eq!(answer["result"], json!([]), "{answer}");
    assert_eq!(running.answer().unwrap().status, 200);
}

#[test]
fn a_client_that_goes_away_before_its_sandbox_is_there_leaves_none_behind() {
    let server = Server::start(&["--set", "pool.size=0"]);
    for turn in 0..10 {
        let mut wire = Wire::new(&server);
        wire.send(post_bytes(&run_body(&format!("u{turn}"), "result = 1")));
        std::thread::sleep(Duration::from_millis(turn));
    }
    eventually("nothing is being made", || {
        server.metric("codesandbox_sandboxes{state=\"starting\"}") == 0.0
            && server.metric("codesandbox_http_connections") == 1.0
    });
    eventually("what exists belongs to a session", || {
        server.metric("codesandbox_sandboxes{state=\"claimed\"}") == server.metric("codesandbox_sessions")
    });
    assert_eq!(server.metric("codesandbox_sandboxes{state=\"warm\"}"), 0.0);
}

#[test]
fn a_client_that_never_reads_keeps_nobody_waiting() {
    let server = server(&[]);
    let mut deaf: Vec<_> = (0..4).map(|_| Wire::new(&server)).collect();
    for (turn, wire) in deaf.iter_mut().enumerate() {
        wire.send(post_bytes(&run_body(&format!("deaf{turn}"), "result = 'x' * 4_000_000")));
    }
    eventually("their runs are over", || server.metric("codesandbox_runs_total{outcome=\"ok\"}") == 4.0);
    let begun = Instant::now();
    for turn in 0..10 {
        assert_eq!(server.run("other", "result = 1")["result"], 1);
        assert_eq!(server.run(&format!("deaf{}", turn % 4), "result = 2")["result"], 2);
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn a_client_that_never_reads_gives_its_place_to_the_next_one() {
    let server = server(&["--set", "server.connections=1", "--set", "server.write_timeout=300ms"]);
    let mut deaf = Wire::new(&server);
    // Far more than the buffers on the way hold, so that the server has to wait for its reader.
    for _ in 0..200 {
        deaf.send_some("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".repeat(100));
    }
    assert_eq!(ask(&server, HEALTH).unwrap().status, 200);
}

#[test]
fn a_page_in_a_browser_may_not_use_a_server_without_keys() {
    let server = server(&[]);
    let body = run_body("u", "result = 1");
    let with = |lines: &str| post_bytes(&body).replacen("host: x\r\n", &format!("host: x\r\n{lines}"), 1);
    for lines in [
        "origin: http://evil.example\r\n",
        "origin: null\r\n",
        "sec-fetch-site: cross-site\r\n",
        "sec-fetch-site: same-origin\r\n",
    ] {
        let answer = ask(&server, with(lines)).unwrap();
        assert_eq!(answer.status, 403, "{lines}");
        assert!(answer.body.contains("\"code\":\"forbidden\""), "{}", answer.body);
    }
    assert_eq!(ask(&server, with("sec-fetch-site: none\r\n")).unwrap().status, 200);
    assert_eq!(server.metric("codesandbox_sessions"), 1.0, "only the last one got a session");
}

#[test]
fn a_name_that_a_stranger_may_register_is_no_name_of_a_server_without_keys() {
    let server = server(&[]);
    let with = |host: &str| {
        post_bytes(&run_body("u", "result = 1")).replacen("host: x", &format!("host: {host}"), 1)
    };
    for host in ["evil.example", "evil.example:5000", "EVIL.Example.", "127.0.0.1.evil.example"] {
        assert_eq!(ask(&server, with(host)).unwrap().status, 403, "{host}");
    }
    for host in ["localhost:5000", "127.0.0.1:5000", "[::1]:5000", "sandbox", "sandbox.localhost"] {
        assert_eq!(ask(&server, with(host)).unwrap().status, 200, "{host}");
    }
}

#[test]
fn bodies_that_do_not_come_keep_nobody_waiting() {
    // The patience of a client here is less than the time that they have.
    let server = server(&[
        "--set",
        "limits.body=1MiB",
        "--set",
        "server.bodies=1MiB",
        "--set",
        "server.body_timeout=300s",
    ]);
    let silent: Vec<Wire> = ["content-length: 1048576", "transfer-encoding: chunked"]
        .into_iter()
        .cycle()
        .take(20)
        .map(|length| {
            let mut wire = Wire::new(&server);
            wire.send(format!("POST /run HTTP/1.1\r\nhost: x\r\n{length}\r\n\r\n1"));
            wire
        })
        .collect();
    assert_eq!(server.run("u", "result = 1")["result"], 1);
    drop(silent);
}

#[test]
fn what_a_request_says_comes_back_in_part() {
    let server = server(&[]);
    let (status, answer) =
        server.post(format!(r#"{{"user_id":"u","code":"1","{}":1}}"#, "x".repeat(100_000)));
    assert!(status == 400 && answer["error"].as_str().unwrap().len() < 1000, "{answer}");
}

#[test]
fn a_half_closed_connection_ends_with_an_answer_or_as_a_client_gone() {
    let server = server(&[]);
    let mut wire = Wire::new(&server);
    wire.send(post_bytes(&run_body("u", "import time\ntime.sleep(0.3)\nresult = 1")));
    wire.stream.shutdown(Shutdown::Write).unwrap();
    assert!(wire.answer().is_none_or(|answer| answer.status == 200));
    assert_eq!(server.run("u", "result = 2")["result"], 2, "the session goes on");
    let mut silent = Wire::new(&server);
    silent.stream.shutdown(Shutdown::Write).unwrap();
    assert!(silent.is_closed());
    eventually("all are closed", || server.metric("codesandbox_http_connections") == 1.0);
}

#[test]
fn connections_reset_at_any_point_leave_nothing_open() {
    let server = server(&[]);
    let request = post_bytes(&run_body("u", "result = 1"));
    for cut in (0..request.len()).step_by(7) {
        let stream = TcpStream::connect(&server.address).unwrap();
        reset_on_close(&stream);
        let _ = (&stream).write_all(&request.as_bytes()[..cut]);
    }
    eventually("all are closed", || server.metric("codesandbox_http_connections") == 1.0);
    assert_eq!(server.run("u", "result = 1")["result"], 1);
}

fn reset_on_close(stream: &TcpStream) {
    use std::os::fd::AsRawFd;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = size_of::<libc::linger>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel reads a struct of the size given.
    let done = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size,
        )
    };
    assert_eq!(done, 0);
}

// -- mutations ---------------------------------------------------------------------------------------

/// xorshift64: the same bodies for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    fn mutate(&mut self, body: &mut Vec<u8>) {
        const PIECES: [&str; 16] = [
            "\"",
            "\\",
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "null",
            "1e999",
            "-",
            "\\u0000",
            "\\ud800",
            "\u{0}",
            "é",
            "\"data\":{",
        ];
        let at = self.below(body.len() + 1);
        match self.below(5) {
            0 if at < body.len() => body[at] = self.below(256) as u8,
            1 if at < body.len() => drop(body.remove(at)),
            2 => drop(body.splice(at..at, PIECES[self.below(PIECES.len())].bytes())),
            3 => {
                let end = at + self.below(body.len() + 1 - at);
                let copy = body[at..end].to_vec();
                body.splice(at..at, copy);
            }
            _ => body.truncate(at.max(1)),
        }
    }
}

#[test]
fn whatever_a_body_holds_the_connection_lives_and_nothing_is_5xx() {
    let flags = ["--set", "session.max=3", "--set", "limits.timeout=1s", "--set", "limits.timeout_max=1s"];
    let server = server(&flags);
    let seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    let mut random = Random(seed);
    let mut wire = Wire::new(&server);
    let whole = r#"{"user_id":"u","code":"result = x","data":{"x":[1,2.5,"a",null]},"mode":"fresh","timeout_ms":500,"stdin":""}"#;
    let mut statuses = std::collections::BTreeMap::new();
    for turn in 0..3000 {
        let mut body = whole.as_bytes().to_vec();
        for _ in 0..=random.below(3) {
            random.mutate(&mut body);
        }
        let head = format!("POST /run HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        wire.send([head.as_bytes(), &body].concat());
        let what = || format!("seed {seed}, turn {turn}: {}", String::from_utf8_lossy(&body));
        let answer = wire.answer().unwrap_or_else(|| panic!("closed: {}", what()));
        assert!(answer.status == 200 || (400..500).contains(&answer.status), "{}: {answer:?}", what());
        serde_json::from_str::<serde_json::Value>(&answer.body)
            .unwrap_or_else(|error| panic!("{error}: {}", what()));
        *statuses.entry(answer.status).or_insert(0) += 1;
    }
    assert!(statuses[&200] > 10 && statuses[&400] > 1000, "seed {seed}: {statuses:?}");
}
