//! What the benches share: a server on the fake engine, and a client that does as little as one can.

// Each bench uses a part of it.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use codesandbox::metrics::Metrics;
use codesandbox::pool::{self, Pool};
use codesandbox::runtime::SandboxSpec;
use codesandbox::runtime::fake::Fake;
use codesandbox::server::auth::Auth;
use codesandbox::server::{self, BodyRoom, Server, State};
use codesandbox::session::{self, Sessions};
use codesandbox::supervisor::{self, Caps};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

/// Nothing is to run into a limit here.
const ROOMY: usize = 64 << 20;
const LONG: Duration = Duration::from_secs(3600);

/// The sandboxes of a fake engine, which answers at once.
pub(crate) fn pool(size: usize, capacity: usize) -> Pool {
    let settings = pool::Settings {
        size,
        starting_max: 8,
        capacity,
        create_timeout: LONG,
        wait_timeout: LONG,
        recycle_after: LONG,
        idle_after: None,
        seed: 0,
        spec: spec(),
        caps: caps(),
    };
    Pool::new(Fake::new(supervisor::fake::spawn), settings, Arc::new(Metrics::new()))
}

/// A server whose sandboxes are the fake engine's: what is left of a run is our own share of it.
pub(crate) async fn fake_server() -> Server {
    let metrics = Arc::new(Metrics::new());
    let settings =
        session::Settings { idle_timeout: LONG, lifetime_max: LONG, max: 16, queue: 16, keep: false };
    let sessions = Sessions::new(pool(1, 17), settings, metrics.clone());
    let settings = server::Settings {
        connections: 16,
        header_timeout: LONG,
        body_timeout: LONG,
        write_timeout: LONG,
        body_bytes: ROOMY,
        bodies_bytes: 4 * ROOMY,
        code_bytes: ROOMY,
        timeout: Duration::from_secs(10),
        timeout_max: LONG,
        cpu_max: LONG,
        memory_bytes: ROOMY as u64,
        output_bytes: ROOMY as u64,
        files: 1000,
        capabilities: Bytes::new(),
    };
    let state = State {
        settings,
        sessions,
        auth: watch::channel(Auth::Open).1,
        audit: None,
        room: BodyRoom::new(4 * ROOMY),
        walks: Arc::new(Semaphore::new(1)),
        metrics,
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port on loopback");
    Server::new(listener, state)
}

/// What a sandbox is when nobody cares.
pub(crate) fn spec() -> SandboxSpec {
    SandboxSpec {
        memory_bytes: 256 << 20,
        processes: 64,
        cpus: 1.0,
        open_files: 256,
        workspace_bytes: 64 << 20,
        tmp_bytes: 64 << 20,
        shm_bytes: 64 << 20,
        inodes: 10_000,
    }
}

/// Caps that nothing here runs into.
pub(crate) fn caps() -> Caps {
    Caps {
        stdout: ROOMY as u64,
        stderr: ROOMY as u64,
        result: ROOMY as u64,
        error: 4096,
        listing_lines: 100,
        artifacts: 0,
        grace_ms: 1000,
        rlimits: Default::default(),
    }
}

/// One connection that stays open, and one request, prepared.
pub(crate) struct Client {
    stream: TcpStream,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Client {
    /// `fields` beside `user_id`.
    pub(crate) fn new(address: SocketAddr, user_id: &str, fields: Value) -> Client {
        let mut body = json!({"user_id": user_id});
        body.as_object_mut()
            .expect("it is one")
            .extend(fields.as_object().expect("fields are an object").clone());
        let body = body.to_string();
        let head = "POST /run HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n";
        let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len()).into_bytes();
        let stream = TcpStream::connect(address).expect("the server listens");
        stream.set_nodelay(true).expect("a TCP socket");
        Client { stream, request, answer: Vec::new() }
    }

    /// The body of the answer, which has to be 200.
    pub(crate) fn run(&mut self) -> &[u8] {
        self.stream.write_all(&self.request).expect("the server reads");
        self.answer.clear();
        loop {
            let mut part = [0; 64 << 10];
            let read = self.stream.read(&mut part).expect("the server answers");
            assert_ne!(read, 0, "the server hung up");
            self.answer.extend_from_slice(&part[..read]);
            if let Some((head, length)) = head_of(&self.answer)
                && self.answer.len() >= head + length
            {
                let answer = String::from_utf8_lossy(&self.answer[..head]);
                let well =
                    answer.starts_with("HTTP/1.1 200") && !self.answer[head..].starts_with(br#"{"error""#);
                assert!(well, "{}", String::from_utf8_lossy(&self.answer));
                return &self.answer[head..];
            }
        }
    }
}

/// Where the body begins, and how long it is.
fn head_of(answer: &[u8]) -> Option<(usize, usize)> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&answer[..end]).expect("headers are ASCII").to_ascii_lowercase();
    let length = head.split_once("content-length:")?.1.split("\r\n").next()?.trim().parse();
    Some((end, length.expect("a number")))
}
