//! The messages between the server and its launcher: one JSON text a datagram, descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::runtime::SandboxSpec;

/// No message comes near it: they carry numbers and paths.
const MESSAGE_BYTES: usize = 64 * 1024;
/// The most descriptors that one message carries: stream, stderr, three hierarchies of control groups.
const DESCRIPTORS: usize = 5;

/// What the server asks of the launcher.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// The first message: build the root file system.
    Prepare(Preparation),
    /// The outer user namespace's ids have been mapped.
    Mapped { ids: Ids },
    /// Put the compiled supervisor, which the descriptor holds, in its place.
    Install,
    /// Make a sandbox. Descriptors: its stdin and stdout, its stderr, and those of its control group.
    Create { number: u64, spec: SandboxSpec, program: Program, entrance: Entrance },
}

/// What the root file system of every sandbox is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Preparation {
    /// An unpacked image's root directory; `None`: this host's own.
    pub(super) rootfs: Option<PathBuf>,
    /// The interpreter, as the sandbox sees it.
    pub(super) python: PathBuf,
    /// Directories beside the system's own that it needs: where it is installed.
    pub(super) python_prefixes: Vec<PathBuf>,
    /// The ids of sandboxes where no outer user namespace stands between.
    pub(super) ids: Ids,
}

/// The ids, as the launcher sees them, that sandboxes are mapped to.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Ids {
    /// Each sandbox an id of its own, `first + number % count`.
    Range { first: u32, count: u32 },
    /// All sandboxes the one id that an ordinary user has.
    Own,
}

/// What PID 1 of a sandbox is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Program {
    /// The supervisor.
    Supervisor,
    /// Compiles the supervisor from its stdin to its stdout, once for all sandboxes.
    Compiler,
}

/// How a sandbox gets into its control group, by the group's descriptors.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Entrance {
    /// Version 2: it is born in that directory.
    BornIn,
    /// Version 1: its first process writes itself into that many files, as the first thing that it does. A thread that
    /// moves itself is the one that the kernel moves without waiting for an RCU grace period (7 ms and more), since 5.5.
    Tasks(usize),
}

impl Entrance {
    /// How many there must be: with fewer a sandbox would lack a limit, and nobody would notice.
    pub(super) fn descriptors(self) -> usize {
        match self {
            Entrance::BornIn => 1,
            Entrance::Tasks(hierarchies) => hierarchies,
        }
    }
}

/// What the launcher says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// It stands in a user namespace of its own and waits for its ids to be mapped.
    MapMe { pid: u32 },
    /// The root file system stands, or the supervisor is in its place.
    Ready,
    /// Something does not work on this host: the last message.
    Unusable(Failure),
    /// A sandbox runs. Descriptor: its pidfd.
    Created { number: u64 },
    /// A sandbox could not be made; nothing of it is left.
    Failed { number: u64, failure: Failure },
    /// A sandbox's PID 1 has ended and been reaped, and so have all its processes.
    Exited { number: u64, code: i32 },
}

/// A step that failed, and with which errno.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) step: String,
    pub(super) errno: i32,
}

impl Failure {
    pub(super) fn new(step: impl Into<String>, error: &io::Error) -> Failure {
        Failure { step: step.into(), errno: error.raw_os_error().unwrap_or(0) }
    }

    pub(super) fn error(&self) -> io::Error {
        io::Error::from_raw_os_error(self.errno)
    }
}

/// Gives a failed call the name of the step that it was.
pub(super) fn step<T, E: Into<io::Error>>(what: impl Into<String>, done: Result<T, E>) -> Result<T, Failure> {
    done.map_err(|error| Failure::new(what, &error.into()))
}

/// Sends one message; `EAGAIN` where a non-blocking socket is full.
pub(super) fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("more descriptors than a message carries"));
    }
    sendmsg(socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one message; `None` where the other side is gone.
pub(super) fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut text = vec![0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        match recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            other => other?,
        };
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    match received.bytes {
        0 => Ok(None),
        length => Ok(Some((serde_json::from_slice(&text[..length])?, fds))),
    }
}
