//! The server's end of the socket to its launcher.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};

use super::layers::{FIRST_ROOT_ID, ROOT_IDS};
use super::wire::{self, Entrance, Failure, Ids, Preparation, Program, Reply, Request};
use super::{LAUNCHER_ARGUMENT, lock, remedy};
use crate::runtime::{Error, Fate, Result, SandboxSpec};

/// The end of a sandbox, to be asked or awaited.
#[derive(Debug, Clone)]
pub(super) struct Exit(watch::Receiver<Option<i32>>);

/// The exit code of a sandbox whose launcher is gone: the kernel has killed it.
const GONE_WITH_LAUNCHER: i32 = Fate::KILLED;

impl Exit {
    /// The exit code of its PID 1, 128 + the signal where one ended it; `None` while it lives.
    pub(super) fn code(&self) -> Option<i32> {
        match self.0.has_changed() {
            Err(_) => Some(self.0.borrow().unwrap_or(GONE_WITH_LAUNCHER)),
            Ok(_) => *self.0.borrow(),
        }
    }

    /// Until all its processes are gone.
    pub(super) async fn wait(&self) {
        let _ = self.0.clone().wait_for(Option::is_some).await; // the sender's end means the launcher's
    }
}

type Made = std::result::Result<OwnedFd, Failure>;

/// A running launcher. Dropping it ends the launcher, and with it every sandbox.
#[derive(Debug)]
pub(super) struct Link {
    socket: Arc<AsyncFd<OwnedFd>>,
    waiting: Arc<Waiting>,
    ids: Ids,
    /// Held so that the process is reaped; it ends when the socket closes.
    _process: Child,
}

/// Who waits for which reply; `None` once the launcher is gone.
#[derive(Debug)]
struct Waiting(Mutex<Option<Book>>);

#[derive(Debug, Default)]
struct Book {
    made: HashMap<u64, oneshot::Sender<Made>>,
    ends: HashMap<u64, watch::Sender<Option<i32>>>,
    installed: Option<oneshot::Sender<std::result::Result<(), Failure>>>,
}

impl Link {
    /// Starts a launcher and has it build the root file system.
    pub(super) async fn start(program: &Path, preparation: Preparation) -> Result<Arc<Link>> {
        let what = || format!("start the launcher {}", program.display());
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(io::Error::from)
            .map_err(Error::failed(what()))?;
        // The launcher reads one message after the other and has nothing else to do meanwhile.
        rustix::io::ioctl_fionbio(&theirs, false).map_err(io::Error::from).map_err(Error::failed(what()))?;
        let process = Command::new(program)
            .arg(LAUNCHER_ARGUMENT)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(Error::failed(what()))?;
        // SAFETY: an OwnedFd is open for as long as it lives, and its number never changes.
        let socket = unsafe { AsyncFd::register(ours) };
        let socket = Arc::new(socket.map_err(io::Error::from).map_err(Error::failed(what()))?);
        let ids = build(&socket, preparation).await?;
        let waiting = Arc::new(Waiting(Mutex::new(Some(Book::default()))));
        tokio::spawn(listen(socket.clone(), waiting.clone())); // ends with the socket, which `drop` shuts down
        Ok(Arc::new(Link { socket, waiting, ids, _process: process }))
    }

    /// Whether each sandbox is a user of its own to the host.
    pub(super) fn separates_uids(&self) -> bool {
        matches!(self.ids, Ids::Range { .. })
    }

    pub(super) fn is_alive(&self) -> bool {
        lock(&self.waiting.0).is_some()
    }

    /// Has a sandbox made; gives its pidfd and its end.
    pub(super) async fn create(
        &self,
        number: u64,
        spec: &SandboxSpec,
        program: Program,
        entrance: Entrance,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(OwnedFd, Exit)> {
        let (made, reply) = oneshot::channel();
        let (end, exit) = watch::channel(None);
        match &mut *lock(&self.waiting.0) {
            Some(book) => {
                book.made.insert(number, made);
                book.ends.insert(number, end);
            }
            None => return Err(gone()),
        }
        let request = Request::Create { number, spec: spec.clone(), program, entrance };
        if let Err(error) = send(&self.socket, &request, fds).await {
            if let Some(book) = &mut *lock(&self.waiting.0) {
                book.made.remove(&number);
                book.ends.remove(&number);
            }
            return Err(Error::failed("ask the launcher for a sandbox")(error));
        }
        match reply.await {
            Ok(Ok(pidfd)) => Ok((pidfd, Exit(exit))),
            Ok(Err(failure)) => Err(remedy::of(&failure)),
            Err(_) => Err(gone()),
        }
    }

    /// Puts the compiled supervisor into the root file system.
    pub(super) async fn install(&self, compiled: Vec<u8>) -> Result<()> {
        let what = "install the supervisor";
        let file = memory_file(&compiled).map_err(Error::failed(what))?;
        let (done, reply) = oneshot::channel();
        match &mut *lock(&self.waiting.0) {
            Some(book) => book.installed = Some(done),
            None => return Err(gone()),
        }
        send(&self.socket, &Request::Install, &[file.as_fd()]).await.map_err(Error::failed(what))?;
        match reply.await {
            Ok(done) => done.map_err(|failure| remedy::of(&failure)),
            Err(_) => Err(gone()),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = shutdown(&*self.socket, Shutdown::Both); // it fails only where the launcher is gone already
    }
}

fn gone() -> Error {
    Error::Unavailable { driver: "embedded", why: "its launcher has ended".into() }
}

/// For a server that is root: each sandbox an id of its own, as the kernel counts them.
pub(super) fn root_ids() -> Ids {
    Ids::Range { first: FIRST_ROOT_ID, count: ROOT_IDS }
}

/// The first messages, up to a root file system that stands.
async fn build(socket: &AsyncFd<OwnedFd>, preparation: Preparation) -> Result<Ids> {
    let what = "prepare the launcher";
    let mut ids = preparation.ids;
    send(socket, &Request::Prepare(preparation), &[]).await.map_err(Error::failed(what))?;
    loop {
        match receive(socket).await.map_err(Error::failed(what))? {
            Some((Reply::MapMe { pid }, _)) => {
                ids = map_ids(pid).await.map_err(|failure| remedy::of(&failure))?;
                send(socket, &Request::Mapped { ids }, &[]).await.map_err(Error::failed(what))?;
            }
            Some((Reply::Ready, _)) => return Ok(ids),
            Some((Reply::Unusable(failure), _)) => return Err(remedy::of(&failure)),
            Some(_) => {}
            None => {
                let why = "it ended without a word: is embedded.launcher the codesandbox program?".into();
                return Err(Error::Unavailable { driver: "embedded", why });
            }
        }
    }
}

async fn listen(socket: Arc<AsyncFd<OwnedFd>>, waiting: Arc<Waiting>) {
    while let Ok(Some((reply, fds))) = receive(&socket).await {
        let Some(book) = &mut *lock(&waiting.0) else { break };
        match reply {
            Reply::Created { number } => {
                if let (Some(made), Some(pidfd)) = (book.made.remove(&number), fds.into_iter().next()) {
                    drop_unless_taken(made, pidfd);
                }
            }
            Reply::Failed { number, failure } => {
                book.ends.remove(&number);
                if let Some(made) = book.made.remove(&number) {
                    let _ = made.send(Err(failure)); // whoever asked may have gone
                }
            }
            Reply::Exited { number, code } => {
                if let Some(end) = book.ends.remove(&number) {
                    end.send_replace(Some(code));
                }
            }
            Reply::Ready => answer_install(book, Ok(())),
            Reply::Unusable(failure) => answer_install(book, Err(failure)),
            Reply::MapMe { .. } => {}
        }
    }
    *lock(&waiting.0) = None; // everyone who waits sees the sender dropped
    tracing::debug!("the launcher has ended");
}

fn answer_install(book: &mut Book, done: std::result::Result<(), Failure>) {
    if let Some(installed) = book.installed.take() {
        let _ = installed.send(done); // whoever asked may have gone
    }
}

/// A sandbox that nobody waits for any more is killed at once; its end is reaped as any other.
fn drop_unless_taken(made: oneshot::Sender<Made>, pidfd: OwnedFd) {
    if let Err(Ok(pidfd)) = made.send(Ok(pidfd)) {
        let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL); // it may have ended
    }
}

async fn send(socket: &AsyncFd<OwnedFd>, request: &Request, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    socket.async_io(Interest::WRITABLE, |socket| wire::send(socket.as_fd(), request, fds)).await
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> io::Result<Option<(Reply, Vec<OwnedFd>)>> {
    socket.async_io(Interest::READABLE, |socket| wire::receive(socket.as_fd())).await
}

fn memory_file(content: &[u8]) -> io::Result<OwnedFd> {
    use std::io::{Seek, Write};
    let mut file = fs::File::from(rustix::fs::memfd_create("supervisor", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file.into())
}

/// Maps the ids of the launcher's user namespace: 0 to our own, and as many more as this user was given.
async fn map_ids(pid: u32) -> std::result::Result<Ids, Failure> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if let (Some(uids), Some(gids)) = (subordinate("/etc/subuid", uid), subordinate("/etc/subgid", uid)) {
        let count = uids.1.min(gids.1);
        let mapped = map_with("newuidmap", pid, uid, (uids.0, count)).await
            && map_with("newgidmap", pid, gid, (gids.0, count)).await;
        if mapped {
            return Ok(Ids::Range { first: 1, count });
        }
    }
    let proc = Path::new("/proc").join(pid.to_string());
    wire::step("deny setgroups", fs::write(proc.join("setgroups"), "deny"))?;
    wire::step("write gid_map", fs::write(proc.join("gid_map"), format!("0 {gid} 1")))?;
    wire::step("write uid_map", fs::write(proc.join("uid_map"), format!("0 {uid} 1")))?;
    Ok(Ids::Own)
}

async fn map_with(program: &str, pid: u32, own: u32, (first, count): (u32, u32)) -> bool {
    let numbers = [pid, 0, own, 1, 1, first, count].map(|number| number.to_string());
    let run = Command::new(program).args(numbers).stdin(Stdio::null()).stderr(Stdio::null()).status();
    run.await.is_ok_and(|status| status.success())
}

/// The first range that this user may use: `name:first:count` by name or number.
fn subordinate(file: &str, uid: u32) -> Option<(u32, u32)> {
    let name = fs::read_to_string("/etc/passwd").ok()?.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid.to_string()).then(|| name.to_owned())
    });
    fs::read_to_string(file).ok()?.lines().find_map(|line| {
        let mut fields = line.split(':');
        let user = fields.next()?;
        let ours = Some(user) == name.as_deref() || user == uid.to_string();
        ours.then(|| Some((fields.next()?.parse().ok()?, fields.next()?.trim().parse().ok()?)))?
    })
}
