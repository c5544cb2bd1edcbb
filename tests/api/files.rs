//! Files over a real socket: parts and versions of them, clients that stall and go, memory, and bounds at their edges.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Server, Wire, eventually, header};

const F: &str = "/sessions/u/files";
const MIB: usize = 1 << 20;

fn server(flags: &[&str]) -> Server {
    let mut all = vec!["--set", "pool.size=1"];
    all.extend(flags);
    Server::start(&all)
}

fn paths(server: &Server) -> Vec<String> {
    let listed: Vec<Value> = serde_json::from_str(&server.get(F).1).unwrap();
    listed.iter().map(|entry| entry["path"].as_str().unwrap().to_owned()).collect()
}

fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Bytes that tell where they stand.
fn block(number: usize) -> Vec<u8> {
    (0..MIB / 8).flat_map(|at| ((number * MIB / 8 + at) as u64).to_le_bytes()).collect()
}

// -- what is asked of a file -------------------------------------------------------------------------

#[test]
fn conditions_of_a_change_are_refused_where_they_would_not_be_kept() {
    let server = Server::start(&[]);
    assert_eq!(server.request("PUT", &format!("{F}/f"), &[], "old").0, 201);
    for (method, name) in [("PUT", "if-none-match"), ("PUT", "if-match"), ("DELETE", "if-match")] {
        let (status, _, body) = server.request(method, &format!("{F}/f"), &[(name, "*")], "new");
        assert_eq!(status, 400, "{body}");
    }
    assert_eq!(server.get(&format!("{F}/f")).1, "old");
}

#[test]
fn a_part_of_a_file_is_206_and_one_beyond_it_416() {
    let server = server(&[]);
    let content: Vec<u8> = (0..200_000_u32).map(|at| at as u8).collect();
    assert_eq!(server.put(&format!("{F}/f"), &content), 201);
    let get = |range| server.send("GET", &format!("{F}/f"), &[("range", range)], b"");
    for (range, from, to) in
        [("bytes=0-0", 0, 0), ("bytes=70000-", 70_000, 199_999), ("bytes=-5", 199_995, 199_999)]
    {
        let (status, headers, body) = get(range);
        assert_eq!((status, body == content[from..=to]), (206, true), "{range}");
        assert_eq!(header(&headers, "content-range").unwrap(), format!("bytes {from}-{to}/200000"));
        assert_eq!(header(&headers, "content-length").unwrap(), (to - from + 1).to_string());
    }
    let (status, headers, body) = get("bytes=200000-");
    assert_eq!((status, header(&headers, "content-range")), (416, Some("bytes */200000")));
    assert!(String::from_utf8(body).unwrap().contains("range_not_satisfiable"));
    assert_eq!(get("bytes=0-1,5-6").0, 200, "more than one: the whole");
}

#[test]
fn a_file_has_a_version_that_a_client_may_know() {
    let server = server(&[]);
    let path = format!("{F}/f");
    server.put(&path, "one");
    let tag = |server: &Server| {
        let (_, headers, _) = server.send("GET", &path, &[], b"");
        assert_eq!(header(&headers, "accept-ranges"), Some("bytes"));
        assert_eq!(header(&headers, "content-type"), Some("application/octet-stream"));
        assert_eq!(header(&headers, "x-content-type-options"), Some("nosniff"));
        assert!(header(&headers, "last-modified").unwrap().ends_with("GMT"));
        header(&headers, "etag").unwrap().to_owned()
    };
    let known = |tag: &str| server.send("GET", &path, &[("if-none-match", tag)], b"");
    let first = tag(&server);
    let (status, headers, body) = known(&first);
    assert_eq!((status, body.len(), header(&headers, "etag")), (304, 0, Some(&*first)));
    assert_eq!(known("\"x\"").0, 200);
    server.put(&path, "two");
    let second = tag(&server);
    assert_ne!(first, second, "of the same size, and within a moment");
    assert_eq!(known(&first).2, b"two");
    server.run("u", "open('f', 'a').write('!')");
    assert_ne!(second, tag(&server), "a program has changed it");
}

#[test]
fn head_tells_what_get_would_and_keeps_nothing_open() {
    let server = server(&[]);
    server.put(&format!("{F}/f"), "hello");
    for _ in 0..30 {
        let (status, headers, body) = server.send("HEAD", &format!("{F}/f"), &[], b"");
        assert_eq!((status, header(&headers, "content-length"), body.len()), (200, Some("5"), 0));
    }
    assert_eq!(server.get(&format!("{F}/f")).1, "hello");
    eventually("nothing is under way", || server.metric("codesandbox_file_transfers") == 0.0);
}

#[test]
fn methods_and_types_that_there_are_not_are_refused() {
    let server = server(&[]);
    let (status, headers, _) = server.send("POST", &format!("{F}/f"), &[], b"");
    assert_eq!((status, header(&headers, "allow")), (405, Some("GET, HEAD, PUT, DELETE")));
    assert_eq!(server.send("DELETE", F, &[], b"").0, 405);
    assert_eq!(server.put(F, "x"), 415, "only a tar can be put there");
    assert_eq!(server.send("PUT", &format!("{F}/f"), &[("content-range", "bytes 0-0/1")], b"x").0, 400);
    assert_eq!(server.get("/sessions/u/filesx").0, 404);
    assert_eq!(server.get("/sessions/u").0, 404, "none of this made a session");
}

// -- clients that stall and go -----------------------------------------------------------------------

fn begin_put(server: &Server, name: &str, announced: usize, sent: &[u8]) -> Wire {
    let mut wire = Wire::new(server);
    wire.send(format!("PUT {F}/{name} HTTP/1.1\r\nhost: x\r\ncontent-length: {announced}\r\n\r\n"));
    wire.send(sent);
    wire
}

#[test]
fn a_client_that_goes_away_in_the_middle_leaves_nothing_behind() {
    let server = server(&[]);
    server.put(&format!("{F}/f"), "as before");
    let free = "import os\ns = os.statvfs('.')\nresult = s.f_bavail * s.f_frsize";
    let before = server.run("u", free)["result"].clone();
    for name in ["f", "new", "d/e/new"] {
        let wire = begin_put(&server, name, 4 * MIB, &block(0));
        eventually("a part is in", || server.metric("codesandbox_file_transfers") == 1.0);
        eventually("a part is written", || server.run("u", free)["result"] != before);
        drop(wire);
        eventually("it is given up", || server.metric("codesandbox_file_transfers") == 0.0);
        assert_eq!(paths(&server), ["f"], "{name}");
    }
    assert_eq!(server.get(&format!("{F}/f")).1, "as before");
    assert_eq!(server.run("u", free)["result"], before);
}

#[test]
fn a_reader_that_goes_away_gives_its_handle_back() {
    let server = server(&[]);
    server.put(&format!("{F}/f"), vec![7; 8 * MIB]);
    for _ in 0..30 {
        let mut wire = Wire::new(&server);
        wire.send(format!("GET {F}/f HTTP/1.1\r\nhost: x\r\n\r\n"));
        assert_eq!(wire.head().unwrap().status, 200);
        drop(wire);
        eventually("it is given up", || server.metric("codesandbox_file_transfers") == 0.0);
    }
}

#[test]
fn a_body_that_stalls_is_given_up_and_one_that_trickles_is_not() {
    let server = server(&["--set", "server.body_timeout=600ms"]);
    let mut stalled = begin_put(&server, "stalled", 100, b"begun");
    let answer = stalled.answer().unwrap();
    assert_eq!(answer.status, 408, "{}", answer.body);
    let mut slow = begin_put(&server, "slow", 10, b"");
    for byte in b"0123456789" {
        std::thread::sleep(Duration::from_millis(150));
        slow.send([*byte]);
    }
    assert_eq!(slow.answer().unwrap().status, 201, "each bit was in time");
    assert_eq!(server.get(&format!("{F}/slow")).1, "0123456789");
    assert_eq!(paths(&server), ["slow"]);
}

#[test]
fn eight_files_are_open_at_once_and_a_ninth_is_refused() {
    let server = server(&[]);
    server.put(&format!("{F}/f"), "x");
    let open: Vec<_> =
        (0..8).map(|number| begin_put(&server, &format!("open{number}"), 10, b"begun")).collect();
    eventually("all are begun", || server.metric("codesandbox_file_bytes_total{direction=\"in\"}") >= 41.0);
    let (status, headers, body) = server.send("GET", &format!("{F}/f"), &[], b"");
    let body = String::from_utf8(body).unwrap();
    assert!(status == 429 && body.contains("session_busy"), "{status} {body}");
    assert!(header(&headers, "retry-after").is_some());
    assert_eq!(server.metric("codesandbox_refused_total{code=\"session_busy\"}"), 1.0);
    assert_eq!(paths(&server), ["f"], "a listing needs no handle");
    assert_eq!(server.run("u", "result = 1")["result"], 1);
    assert_eq!(server.put("/sessions/v/files/f", "x"), 201, "others are not concerned");
    drop(open);
    eventually("they are given back", || server.get(&format!("{F}/f")).0 == 200);
}

#[test]
fn a_server_that_stops_lets_a_file_come_to_its_end() {
    let mut server = server(&[]);
    let mut wire = begin_put(&server, "f", 10, b"begun");
    eventually("it is begun", || server.metric("codesandbox_file_transfers") == 1.0);
    server.signal(libc::SIGTERM);
    std::thread::sleep(Duration::from_millis(200));
    wire.send("later");
    assert_eq!(wire.answer().unwrap().status, 201);
    assert!(server.wait().success());
}

// -- beside runs -------------------------------------------------------------------------------------

#[test]
fn a_file_comes_while_the_first_run_of_its_session_sleeps() {
    let server = server(&["--set", "session.queue=1"]);
    std::thread::scope(|scope| {
        let sleep = || server.run("u", "import time\ntime.sleep(3)\nimport os\nresult = os.path.exists('f')");
        let first = scope.spawn(sleep);
        eventually("it runs", || server.get("/sessions/u").1.contains("running"));
        let second = scope.spawn(sleep);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(server.post(json!({"user_id": "u", "code": "1"}).to_string()).0, 429, "the queue is full");
        let begun = Instant::now();
        assert_eq!(server.put(&format!("{F}/f"), vec![1; 3 * MIB]), 201);
        assert_eq!(server.send("GET", &format!("{F}/f"), &[], b"").2.len(), 3 * MIB);
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        assert_eq!(
            (&first.join().unwrap()["result"], &second.join().unwrap()["result"]),
            (&json!(true), &json!(true))
        );
    });
}

#[test]
fn a_run_that_is_killed_or_cancelled_takes_no_file_along() {
    let server = server(&[]);
    server.put(&format!("{F}/f"), vec![1; 20 * MIB]);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| server.send("GET", &format!("{F}/f"), &[], b"").2.len());
        for code in ["import os\nos.kill(-1, 9)", "while True: pass", "print('x' * 5_000_000)"] {
            server.run_with("u", code, json!({"timeout_ms": 100}));
        }
        let mut wire = Wire::new(&server);
        wire.send(crate::support::post_bytes(r#"{"user_id":"u","code":"import time\ntime.sleep(60)"}"#));
        drop(wire);
        assert_eq!(reader.join().unwrap(), 20 * MIB);
    });
    assert_eq!(server.run("u", "result = 1")["result"], 1);
}

#[test]
fn a_session_that_only_moves_files_is_not_idle() {
    let server = server(&["--set", "session.idle_timeout=1s"]);
    let mut wire = begin_put(&server, "f", 5, b"");
    for byte in b"hello" {
        std::thread::sleep(Duration::from_millis(400));
        wire.send([*byte]);
    }
    assert_eq!(wire.answer().unwrap().status, 201);
    assert_eq!(server.get(&format!("{F}/f")).1, "hello");
    eventually("it is idle at last", || server.get("/sessions/u").0 == 404);
}

#[test]
fn a_session_that_is_deleted_ends_its_transfers() {
    let server = server(&[]);
    let mut wire = begin_put(&server, "f", 10, b"begun");
    eventually("it is begun", || server.metric("codesandbox_file_bytes_total{direction=\"in\"}") == 5.0);
    assert_eq!(server.send("DELETE", "/sessions/u", &[], b"").0, 204);
    wire.send("later");
    let answer = wire.answer().unwrap();
    assert!(answer.status == 503 && answer.body.contains("session_lost"), "{answer:?}");
    assert_eq!(server.get(F).0, 404);
}

// -- bounds ------------------------------------------------------------------------------------------

#[test]
fn two_hundred_megabytes_pass_through_a_server_that_stays_small() {
    const BLOCKS: usize = 200;
    let server = server(&[]);
    server.put(&format!("{F}/small"), "x");
    assert_eq!(server.get(&format!("{F}/small")).1, "x");
    let before = resident_bytes(server.pid());
    let mut most = before;
    let mut wire = Wire::new(&server);
    let length = BLOCKS * MIB;
    write!(wire.stream, "PUT {F}/large HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n").unwrap();
    for number in 0..BLOCKS {
        wire.stream.write_all(&block(number)).unwrap();
        most = most.max(resident_bytes(server.pid()));
    }
    assert_eq!(wire.answer().unwrap().status, 201);
    wire.send(format!("GET {F}/large HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"));
    let mut stream = wire.stream;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let mut got = vec![0; MIB];
    for number in 0..BLOCKS {
        stream.read_exact(&mut got).unwrap();
        assert!(got == block(number), "block {number}");
        most = most.max(resident_bytes(server.pid()));
    }
    assert_eq!(stream.read(&mut got).unwrap(), 0);
    let grown = most - before;
    assert!(grown < 32 * MIB as u64, "grown by {grown} bytes");
    assert_eq!(server.metric("codesandbox_file_bytes_total{direction=\"out\"}"), (length + 1) as f64);
}

#[test]
fn a_listing_and_a_tar_are_cut_at_their_cap() {
    let server = server(&["--set", "limits.files=10"]);
    server.run("u", "for i in range(10): open(str(i), 'w')");
    let tar = |server: &Server| {
        let mut wire = Wire::new(server);
        wire.send(format!(
            "GET {F} HTTP/1.1\r\nhost: x\r\naccept: application/x-tar\r\nconnection: close\r\n\r\n"
        ));
        let mut all = Vec::new();
        let _ = wire.stream.read_to_end(&mut all);
        all
    };
    let get = || server.send("GET", F, &[], b"");
    assert_eq!((paths(&server).len(), header(&get().1, "x-truncated")), (10, None));
    let whole = tar(&server);
    assert!(whole.ends_with(b"0\r\n\r\n"), "its last chunk is there");
    server.put(&format!("{F}/one-more"), "");
    assert_eq!((paths(&server).len(), header(&get().1, "x-truncated")), (10, Some("files")));
    assert!(server.metric("codesandbox_capped_total{field=\"files\"}") >= 1.0);
    assert!(!tar(&server).ends_with(b"0\r\n\r\n"), "half a directory is none");
    let pack = "import tarfile\nfor n in 10, 11:\n with tarfile.open(f'/workspace/{n}.tar', 'w') as t:\n  \
        for i in range(n): t.addfile(tarfile.TarInfo(f'into/{i}'))";
    server.run("v", pack);
    for (entries, status) in [(10, 204), (11, 400)] {
        let made = server.send("GET", &format!("/sessions/v/files/{entries}.tar"), &[], b"").2;
        let (got, _, body) =
            server.send("PUT", "/sessions/w/files", &[("content-type", "application/x-tar")], &made);
        assert_eq!(got, status, "{}", String::from_utf8_lossy(&body));
    }
}

#[test]
fn a_tar_that_ends_in_the_middle_of_a_file_leaves_none_of_that() {
    let server = server(&[]);
    server.run("v", "open('first', 'w').write('x' * 600)\nopen('second', 'w').write('y' * 200_000)");
    let whole = server.send("GET", "/sessions/v/files", &[("accept", "application/x-tar")], b"").2;
    let put = |tar: &[u8]| server.send("PUT", F, &[("content-type", "application/x-tar")], tar);
    for cut in [1600, 2100, 2561, 100_000, 202_047] {
        let (status, _, body) = put(&whole[..cut]);
        assert_eq!(status, 400, "cut at {cut}: {}", String::from_utf8_lossy(&body));
        assert!(!paths(&server).contains(&"second".to_owned()), "cut at {cut}");
    }
    assert_eq!(put(b"nonsense").0, 400);
    assert_eq!(put(&[b'x'; 2000]).0, 400);
    assert_eq!(paths(&server), ["first"]);
    assert_eq!(put(&whole).0, 204);
    assert_eq!(server.get(&format!("{F}/second")).1, "y".repeat(200_000));
}

#[test]
fn a_tar_whose_names_are_endless_does_not_grow_the_server() {
    let server = server(&[]);
    server.put(&format!("{F}/small"), "x");
    let before = resident_bytes(server.pid());
    let mut header = tokio_tar::Header::new_gnu();
    header.set_entry_type(tokio_tar::EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let mut wire = Wire::new(&server);
    wire.send(format!(
        "PUT {F} HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-tar\r\ncontent-length: {}\r\n\r\n",
        1_u64 << 40
    ));
    wire.send(header.as_bytes());
    wire.stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    let refused = (0..100).any(|_| wire.stream.write_all(&[b'n'; MIB]).is_err());
    assert!(refused, "it reads on and on");
    let grown = resident_bytes(server.pid()).saturating_sub(before);
    assert!(grown < 16 * MIB as u64, "grown by {grown} bytes");
    assert_eq!(server.run("u", "result = 1")["result"], 1);
}

#[test]
fn an_announced_size_that_does_not_fit_is_refused_before_it_comes() {
    let server = server(&["--set", "limits.workspace=1MiB"]);
    let mut wire = begin_put(&server, "f", 2 * MIB, b"");
    let answer = wire.answer().unwrap();
    assert_eq!(answer.status, 507, "{}", answer.body);
    let told: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(told["available_bytes"], MIB, "{told}");
    assert_eq!(server.metric("codesandbox_refused_total{code=\"insufficient_storage\"}"), 1.0);
}
