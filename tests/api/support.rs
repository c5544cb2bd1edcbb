//! A server of its own for each test that wants one, and a client for it.

#[path = "leaks.rs"]
mod leaks;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_codesandbox");
/// A server that says nothing for so long is a failed test.
const START: Duration = Duration::from_secs(30);
/// An ordinary user without subordinate ids; no such account needs to exist.
pub(crate) const ORDINARY_USER: u32 = 54_321;

/// A running server; it is stopped, and its exit awaited, when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: String,
    log: Arc<Mutex<String>>,
    /// It was told to stop: a second word would end it at once.
    stopping: AtomicBool,
    _directory: Option<tempfile::TempDir>,
}

impl Server {
    /// As whoever runs the tests.
    pub(crate) fn start(flags: &[&str]) -> Server {
        let mut command = Command::new(PROGRAM);
        command.args(flags);
        if !is_root() {
            command.args(["--allow-unenforced", "memory,cpus,uids"]);
        }
        Server::spawn(command, None)
    }

    /// As an ordinary user, where the tests run as root; without a control group of its own.
    pub(crate) fn start_as_ordinary_user(flags: &[&str]) -> Server {
        let (mut command, directory) = as_ordinary_user();
        command.args(flags).args(["--allow-unenforced", "memory,cpus,uids"]);
        Server::spawn(command, Some(directory))
    }

    /// Any command line of the program; the directory goes with the server.
    pub(crate) fn spawn(mut command: Command, directory: Option<tempfile::TempDir>) -> Server {
        command
            .args(["--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program was built with the tests");
        let mut stderr = BufReader::new(child.stderr.take().expect("it was piped"));
        let log = Arc::new(Mutex::new(String::new()));
        let (send, receive) = std::sync::mpsc::channel();
        let kept = log.clone();
        std::thread::spawn(move || {
            let mut line = String::new();
            while matches!(stderr.read_line(&mut line), Ok(length) if length > 0) {
                if let Some((_, rest)) = line.split_once("listening on http://") {
                    let _ = send.send(rest.split(',').next().unwrap_or_default().trim().to_owned());
                }
                kept.lock().unwrap().push_str(&line);
                line.clear();
            }
        });
        let Ok(address) = receive.recv_timeout(START) else {
            let _ = child.kill();
            panic!("the server did not start: {}", log.lock().unwrap());
        };
        leaks::watch(child.id());
        Server { child, address, log, stopping: AtomicBool::new(false), _directory: directory }
    }

    /// `POST /run`; gives status and answer.
    pub(crate) fn post(&self, body: impl AsRef<str>) -> (u16, Value) {
        let (status, _, text) =
            self.request("POST", "/run", &[("content-type", "application/json")], body.as_ref());
        (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")))
    }

    /// Runs code as `user_id`; the status has to be 200.
    pub(crate) fn run(&self, user_id: &str, code: &str) -> Value {
        self.run_with(user_id, code, serde_json::json!({}))
    }

    /// With more fields, e.g. `json!({"timeout_ms": 500})`.
    pub(crate) fn run_with(&self, user_id: &str, code: &str, fields: Value) -> Value {
        let mut body = serde_json::json!({"user_id": user_id, "code": code});
        for (key, value) in fields.as_object().expect("fields are an object") {
            body[key] = value.clone();
        }
        let (status, answer) = self.post(body.to_string());
        assert_eq!(status, 200, "{answer}: {}", self.log());
        answer
    }

    /// Any request: status, headers by lower-case name, body.
    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (u16, Vec<(String, String)>, String) {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(120)))
            .allow_non_standard_methods(true)
            .build()
            .new_agent();
        let mut request =
            ureq::http::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = match body {
            "" => agent.run(request.body(()).unwrap()),
            body => agent.run(request.body(body).unwrap()),
        }
        .unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let headers = response.headers().iter();
        let headers =
            headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_owned()));
        let headers = headers.collect();
        let text = response.body_mut().with_config().limit(64 << 20).read_to_string().unwrap();
        (response.status().as_u16(), headers, text)
    }

    /// Any request with any bytes, either way.
    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> (u16, Vec<(String, String)>, Vec<u8>) {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(120)))
            .allow_non_standard_methods(true)
            .build()
            .new_agent();
        let mut request =
            ureq::http::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let sent = if method == "PUT" {
            agent.run(request.body(body).unwrap())
        } else {
            agent.run(request.body(()).unwrap())
        };
        let mut response = sent.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let headers = response.headers().iter();
        let headers =
            headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_owned()));
        let headers = headers.collect();
        let bytes = response.body_mut().with_config().limit(64 << 20).read_to_vec().unwrap();
        (response.status().as_u16(), headers, bytes)
    }

    /// Puts a file; gives the status.
    pub(crate) fn put(&self, path: &str, body: impl AsRef<[u8]>) -> u16 {
        self.send("PUT", path, &[], body.as_ref()).0
    }

    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let (status, _, text) = self.request("GET", path, &[], "");
        (status, text)
    }

    /// The value of a series, by its name with labels as Prometheus prints it; 0 where it is not there.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// A bare connection, for what no client library would send.
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// What it logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: sends a signal to a process that this test started and has not reaped.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
        if signal == libc::SIGKILL {
            leaks::forgive(self.child.id());
        }
        self.stopping.fetch_or(matches!(signal, libc::SIGTERM | libc::SIGINT), Ordering::SeqCst);
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Awaits its exit; gives the status.
    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "the server does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            if !self.stopping.load(Ordering::SeqCst) {
                self.signal(libc::SIGTERM);
            }
            if !std::thread::panicking() {
                assert!(self.wait().success(), "the server did not end well: {}", self.log());
            }
        }
    }
}

pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// The program as an ordinary user would start it: no groups, a bare environment, a copy that it can read.
pub(crate) fn as_ordinary_user() -> (Command, tempfile::TempDir) {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program: PathBuf = directory.path().join("codesandbox");
    std::fs::copy(PROGRAM, &program).unwrap();
    let mut command = Command::new(&program);
    command.env_clear().env("PATH", "/usr/bin:/bin").current_dir("/");
    if is_root() {
        command.uid(ORDINARY_USER).gid(ORDINARY_USER);
    }
    (command, directory)
}

/// The output of a command line, as a person sees it.
pub(crate) fn command_line(arguments: &[&str], stdin: &str) -> (i32, String, String) {
    let mut command = Command::new(PROGRAM);
    let mut child = command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes()); // one that fails early reads nothing
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// Waits until something holds; panics with `what` after ten seconds.
pub(crate) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(30), "never came: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The value of a header, by its lower-case name.
pub(crate) fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

/// An answer as it came over a bare connection.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

/// A bare connection that gives one answer after the other.
pub(crate) struct Wire {
    pub(crate) stream: TcpStream,
    unread: Vec<u8>,
}

impl Wire {
    pub(crate) fn new(server: &Server) -> Wire {
        Wire { stream: server.connect(), unread: Vec::new() }
    }

    /// Writes bytes as they are; a server that has closed meanwhile is told by `answer`.
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref());
    }

    /// The next answer with its body; `None` where the connection ended before.
    pub(crate) fn answer(&mut self) -> Option<Answer> {
        let mut answer = self.head()?;
        let length = header(&answer.headers, "content-length").map_or(0, |value| value.parse().unwrap());
        while self.unread.len() < length {
            self.fill()?;
        }
        answer.body = String::from_utf8(self.unread.drain(..length).collect()).unwrap();
        Some(answer)
    }

    /// The next answer's status and headers; what follows is left unread.
    pub(crate) fn head(&mut self) -> Option<Answer> {
        let end = loop {
            match self.unread.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                Some(end) => break end + 4,
                None => self.fill()?,
            }
        };
        let text = String::from_utf8(self.unread.drain(..end).collect()).unwrap();
        let mut lines = text.lines();
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers = lines.filter_map(|line| line.split_once(": "));
        let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
        Some(Answer { status, headers, body: String::new() })
    }

    /// Sends what the connection takes at once; the server may have closed it.
    pub(crate) fn send_some(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.set_write_timeout(Some(Duration::from_millis(5))).unwrap();
        let _ = self.stream.write(bytes.as_ref()); // a full or a closed connection takes nothing: both are meant
    }

    /// Whether the server has closed, with nothing unread.
    pub(crate) fn is_closed(&mut self) -> bool {
        self.unread.is_empty() && self.fill().is_none()
    }

    fn fill(&mut self) -> Option<()> {
        let mut buffer = [0; 65536];
        match self.stream.read(&mut buffer) {
            Ok(length) if length > 0 => self.unread.extend_from_slice(&buffer[..length]),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => {
                panic!("the server neither answers nor closes")
            }
            _ => return None,
        }
        Some(())
    }
}

/// The bytes of a `POST /run`.
pub(crate) fn post_bytes(body: &str) -> String {
    format!(
        "POST /run HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}
