//! A faulty way to an engine: what a daemon that dies, stops or loses its answers looks like from outside, without
//! harming one.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

/// Passes on every connection to its socket, but for the trouble that it is told to make.
pub(crate) struct Proxy {
    directory: tempfile::TempDir,
    listener: Mutex<UnixListener>,
    way: Arc<Way>,
}

/// A call of the engine's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Create,
    Rename,
    Remove,
    List,
    Inspect,
}

impl Call {
    /// By the request line, as Docker and Podman both have it.
    fn of(line: &str) -> Option<Call> {
        let mut words = line.split(' ');
        let (method, target) = (words.next()?, words.next()?);
        let path = target.split('?').next()?.split_once("/containers/")?.1;
        match (method, path) {
            ("POST", "create") => Some(Call::Create),
            ("POST", path) if path.ends_with("/rename") => Some(Call::Rename),
            ("DELETE", _) => Some(Call::Remove),
            ("GET", "json") => Some(Call::List),
            ("GET", path) if path.ends_with("/json") => Some(Call::Inspect),
            _ => None,
        }
    }
}

/// What all connections have in common.
struct Way {
    engine: PathBuf,
    frozen: Mutex<bool>,
    thawed: Condvar,
    delay: Mutex<Duration>,
    lossy: Mutex<Option<Call>>,
    /// Calls that could have been lost so far.
    chances: AtomicUsize,
    open: Mutex<Vec<Weak<Connection>>>,
}

/// Both ends; closed when nothing goes through it any more.
struct Connection {
    client: UnixStream,
    engine: UnixStream,
    /// A request went through, and nothing has come back since.
    asked: AtomicBool,
    /// The next answer is to be lost.
    loses: AtomicBool,
}

impl Proxy {
    pub(crate) fn to(engine: &Path) -> Proxy {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let way = Arc::new(Way {
            engine: engine.to_owned(),
            frozen: Mutex::default(),
            thawed: Condvar::new(),
            delay: Mutex::default(),
            lossy: Mutex::default(),
            chances: AtomicUsize::new(0),
            open: Mutex::default(),
        });
        let listener = Mutex::new(listen(&directory.path().join("engine.sock"), way.clone()));
        Proxy { directory, listener, way }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("engine.sock")
    }

    /// Ends every connection, and refuses new ones.
    pub(crate) fn cut(&self) {
        // SAFETY: the listener is open for as long as the lock is held.
        let refused = unsafe { libc::shutdown(self.listener.lock().unwrap().as_raw_fd(), libc::SHUT_RDWR) };
        assert_eq!(refused, 0, "{}", std::io::Error::last_os_error());
        self.cut_streams();
    }

    /// Ends every connection; new ones are fine.
    pub(crate) fn cut_streams(&self) {
        for connection in self.way.open.lock().unwrap().drain(..).filter_map(|open| open.upgrade()) {
            connection.cut();
        }
    }

    /// After `cut`: takes connections again.
    pub(crate) fn mend(&self) {
        std::fs::remove_file(self.socket()).unwrap();
        *self.listener.lock().unwrap() = listen(&self.socket(), self.way.clone());
    }

    /// Nothing goes through in either direction, and nothing is lost.
    pub(crate) fn freeze(&self) {
        *self.way.frozen.lock().unwrap() = true;
    }

    pub(crate) fn thaw(&self) {
        *self.way.frozen.lock().unwrap() = false;
        self.way.thawed.notify_all();
    }

    /// Every answer, and every piece of a stream that answers another, comes that much later.
    pub(crate) fn delay(&self, time: Duration) {
        *self.way.delay.lock().unwrap() = time;
    }

    /// Of every three such calls two reach the engine and get no answer: one connection is cut at once, the other
    /// when the engine has answered.
    pub(crate) fn lose(&self, call: Option<Call>) {
        *self.way.lossy.lock().unwrap() = call;
    }

    /// Calls that could have been lost so far: two of three were.
    pub(crate) fn chances(&self) -> usize {
        self.way.chances.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.thaw(); // no thread is to wait for ever
    }
}

fn listen(socket: &Path, way: Arc<Way>) -> UnixListener {
    let listener = UnixListener::bind(socket).unwrap();
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o777)).unwrap();
    let ours = listener.try_clone().unwrap();
    std::thread::spawn(move || {
        // An error: it was shut down.
        while let Ok((client, _)) = ours.accept() {
            way.wait_for_thaw();
            let Ok(engine) = UnixStream::connect(&way.engine) else { continue };
            let (asked, loses) = (AtomicBool::new(false), AtomicBool::new(false));
            let connection = Arc::new(Connection { client, engine, asked, loses });
            let mut open = way.open.lock().unwrap();
            open.retain(|other| other.strong_count() > 0);
            open.push(Arc::downgrade(&connection));
            drop(open);
            let (way, other_way, other) = (way.clone(), way.clone(), connection.clone());
            std::thread::spawn(move || connection.pass_requests(&way));
            std::thread::spawn(move || other.pass_answers(&other_way));
        }
    });
    listener
}

impl Way {
    fn wait_for_thaw(&self) {
        drop(self.thawed.wait_while(self.frozen.lock().unwrap(), |frozen| *frozen).unwrap());
    }
}

impl Connection {
    fn pass_requests(&self, way: &Way) {
        let (mut buffer, mut requests) = (vec![0; 1 << 16], Requests::default());
        while let Ok(length @ 1..) = (&self.client).read(&mut buffer) {
            way.wait_for_thaw();
            self.asked.store(true, Ordering::SeqCst);
            let line = requests.completed_by(&buffer[..length]);
            let lossy = *way.lossy.lock().unwrap();
            let chosen = lossy.is_some() && line.as_deref().and_then(Call::of) == lossy;
            let chance = chosen.then(|| way.chances.fetch_add(1, Ordering::SeqCst) % 3);
            self.loses.store(chance == Some(1), Ordering::SeqCst);
            if (&self.engine).write_all(&buffer[..length]).is_err() {
                break;
            }
            if chance == Some(0) {
                self.cut();
            }
        }
        let _ = self.engine.shutdown(Shutdown::Write); // it may have ended by itself
    }

    fn pass_answers(&self, way: &Way) {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(length @ 1..) = (&self.engine).read(&mut buffer) {
            if self.asked.swap(false, Ordering::SeqCst) {
                std::thread::sleep(*way.delay.lock().unwrap());
            }
            way.wait_for_thaw();
            if self.loses.load(Ordering::SeqCst) {
                self.cut();
            }
            if (&self.client).write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        let _ = self.client.shutdown(Shutdown::Write); // likewise
    }

    fn cut(&self) {
        for end in [&self.client, &self.engine] {
            let _ = end.shutdown(Shutdown::Both); // it may have ended by itself
        }
    }
}

/// As much of HTTP as tells where a request ends: no client of an engine sends the next one before the answer.
#[derive(Default)]
struct Requests {
    head: Vec<u8>,
    line: String,
    /// Bytes of the body that are still to come.
    body: usize,
    /// The connection is a container's stream by now.
    upgraded: bool,
}

impl Requests {
    /// The request line, where these bytes are the end of a request.
    fn completed_by(&mut self, bytes: &[u8]) -> Option<String> {
        if self.upgraded {
            return None;
        }
        if self.body > 0 {
            self.body = self.body.saturating_sub(bytes.len());
        } else {
            self.head.extend_from_slice(bytes);
            let end = self.head.windows(4).position(|bytes| bytes == b"\r\n\r\n")? + 4;
            let head = String::from_utf8_lossy(&self.head[..end]).into_owned();
            let fields: Vec<_> =
                head.lines().map(str::to_ascii_lowercase).filter(|line| line.contains(": ")).collect();
            let field = |name: &str| fields.iter().find_map(|field| field.strip_prefix(name));
            let length = field("content-length: ").map_or(0, |value| value.trim().parse().unwrap());
            self.upgraded = field("upgrade: ").is_some();
            self.body = (end + length).saturating_sub(self.head.len());
            self.line = head.lines().next().unwrap_or_default().to_owned();
            self.head.clear();
        }
        (self.body == 0).then(|| std::mem::take(&mut self.line))
    }
}
