//! The launcher: a process with one thread that makes the sandboxes and dies with the server.
//!
//! The server starts it from its own executable with `LAUNCHER_ARGUMENT`; its stdin is one end of a
//! SOCK_SEQPACKET pair. It becomes PID 1 of a pid namespace in which all sandboxes live, so that the
//! kernel ends every one of them when it ends, and it ends when the server closes the socket, however
//! the server came to its own end. Fork safety never meets threads: here is only one.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, set_parent_process_death_signal, wait};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::layers::{NAMESPACES, OOM_SCORE_ADJ, SANDBOX_ID};
use super::sandbox::{Entry, enter};
use super::template::Template;
use super::wire::{self, Entrance, Failure, Ids, Preparation, Program, Reply, Request, step};
use super::{LAUNCHER_ARGUMENT, seccomp};
use crate::runtime::SandboxSpec;
use crate::runtime::guest::SECCOMP_PROFILE;

/// Becomes the launcher and never returns where this process was started as one.
///
/// To be called first in `main`, before any thread is made.
pub fn run_if_asked() {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == LAUNCHER_ARGUMENT) {
        std::process::exit(run());
    }
}

/// Gives the exit status: the server reads the reason from the socket.
fn run() -> i32 {
    let socket = io::stdin();
    let socket = socket.as_fd();
    match prepare(socket) {
        Ok(Some(launcher)) => launcher.serve(socket),
        Ok(None) => 0,
        Err(failure) => {
            let _ = wire::send(socket, &Reply::Unusable(failure), &[]); // a server that is gone needs no reason
            1
        }
    }
}

/// Up to a launcher that stands in its namespaces. `None` where the server went meanwhile, and in the
/// outer process, whose one task is to wait for the inner one.
fn prepare(socket: BorrowedFd<'_>) -> Result<Option<Launcher>, Failure> {
    let Some(mut preparation) = next(socket)?.and_then(|(request, _)| match request {
        Request::Prepare(preparation) => Some(preparation),
        _ => None,
    }) else {
        return Ok(None);
    };
    // Else Ctrl-C at the server's terminal would end the sandboxes with the runs that the server lets end.
    step("setsid", rustix::process::setsid())?;
    if !rustix::process::geteuid().is_root() {
        step("unshare a user namespace", unshare(UnshareFlags::NEWUSER))?;
        let pid = std::process::id();
        step("ask for ids", wire::send(socket, &Reply::MapMe { pid }, &[]))?;
        match next(socket)? {
            Some((Request::Mapped { ids }, _)) => preparation.ids = ids,
            _ => return Ok(None),
        }
    }
    let spaces = UnshareFlags::NEWNS | UnshareFlags::NEWPID;
    step("unshare mount and pid namespaces", unshare(spaces))?;
    // SAFETY: this process has one thread, so its copy may do whatever this one may.
    match step("fork", check(unsafe { libc::fork() }))? {
        0 => {}
        inner => {
            let _ = rustix::process::waitpid(Pid::from_raw(inner), WaitOptions::empty());
            return Ok(None);
        }
    }
    step("PR_SET_PDEATHSIG", set_parent_process_death_signal(Some(Signal::KILL)))?;
    raise_descriptor_limit();
    let filter = seccomp::Program::compile(SECCOMP_PROFILE)
        .map_err(|error| Failure { step: format!("compile config/seccomp.json: {error}"), errno: 0 })?;
    let template = Template::build(&preparation)?;
    step("tell the server", wire::send(socket, &Reply::Ready, &[]))?;
    Ok(Some(Launcher { preparation, filter, template, alive: HashMap::new() }))
}

fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: none of these flags unshares the file descriptor table.
    unsafe { unshare_unsafe(flags) }
}

fn next(socket: BorrowedFd<'_>) -> Result<Option<(Request, Vec<OwnedFd>)>, Failure> {
    step("read from the server", wire::receive(socket))
}

/// 500 sandboxes need 500 descriptors here.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }); // what is left is what there is
}

struct Launcher {
    preparation: Preparation,
    filter: seccomp::Program,
    template: Template,
    /// The number of each sandbox by its pid.
    alive: HashMap<Pid, u64>,
}

impl Launcher {
    /// Serves until the server is gone.
    fn serve(mut self, socket: BorrowedFd<'_>) -> i32 {
        let Ok(ended) = children() else { return 1 };
        loop {
            let mut ready = [PollFd::new(&socket, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
            if !matches!(poll(&mut ready, None), Ok(_) | Err(rustix::io::Errno::INTR)) {
                return 1;
            }
            let (message, child) = (!ready[0].revents().is_empty(), !ready[1].revents().is_empty());
            if child && self.reap(ended.as_fd(), socket).is_err() {
                return 1;
            }
            if message {
                match next(socket) {
                    Ok(Some((request, fds))) => {
                        if self.obey(socket, request, fds).is_err() {
                            return 1;
                        }
                    }
                    Ok(None) => return 0,
                    Err(_) => return 1,
                }
            }
        }
    }

    fn obey(&mut self, socket: BorrowedFd<'_>, request: Request, fds: Vec<OwnedFd>) -> io::Result<()> {
        match request {
            Request::Create { number, spec, program, entrance } => {
                match self.create(number, &spec, program, entrance, fds) {
                    Ok(pidfd) => wire::send(socket, &Reply::Created { number }, &[pidfd.as_fd()]),
                    Err(failure) => wire::send(socket, &Reply::Failed { number, failure }, &[]),
                }
            }
            Request::Install => match self.install(fds) {
                Ok(()) => wire::send(socket, &Reply::Ready, &[]),
                Err(failure) => wire::send(socket, &Reply::Unusable(failure), &[]),
            },
            Request::Prepare(_) | Request::Mapped { .. } => Ok(()), // only ever the first messages
        }
    }

    fn install(&self, fds: Vec<OwnedFd>) -> Result<(), Failure> {
        match fds.into_iter().next() {
            Some(compiled) => self.template.install_supervisor(compiled),
            None => Err(Failure { step: "install the supervisor: no descriptor came".into(), errno: 0 }),
        }
    }

    fn create(
        &mut self,
        number: u64,
        spec: &SandboxSpec,
        program: Program,
        entrance: Entrance,
        fds: Vec<OwnedFd>,
    ) -> Result<OwnedFd, Failure> {
        let mut fds = fds.into_iter();
        let (Some(stream), Some(stderr)) = (fds.next(), fds.next()) else {
            return Err(Failure { step: "take descriptors: too few came".into(), errno: 0 });
        };
        let group: Vec<_> = fds.collect();
        if group.len() != entrance.descriptors() {
            return Err(Failure { step: "take the control groups: too few came".into(), errno: 0 });
        }
        let (born_in, tasks) = match entrance {
            Entrance::BornIn => (group.into_iter().next(), Vec::new()),
            Entrance::Tasks(_) => (None, group),
        };
        let (mapped, map) = step("pipe2", pipe_with(PipeFlags::CLOEXEC))?;
        let (failed, fail) = step("pipe2", pipe_with(PipeFlags::CLOEXEC))?;
        let (pid, pidfd) = match step("clone3", clone(born_in.as_ref().map(AsFd::as_fd)))? {
            Clone::Parent { pid, pidfd } => (pid, pidfd),
            Clone::Child => {
                drop((map, failed));
                let entry = Entry {
                    tasks,
                    mapped,
                    stream,
                    stderr,
                    spec,
                    program,
                    python: &self.preparation.python,
                    filter: &self.filter,
                    may_drop_groups: matches!(self.preparation.ids, Ids::Range { .. }),
                };
                report(fail, &enter(entry));
            }
        };
        self.alive.insert(pid, number);
        drop((tasks, mapped, fail, stream, stderr));
        let begun = set_ids(pid, number, self.preparation.ids).and_then(|()| {
            let released = step("release the sandbox", fs::File::from(map).write_all(&[1]));
            outcome(failed).and(released) // one that has failed before tells more than a broken pipe does
        });
        match begun {
            Ok(()) => Ok(pidfd),
            Err(failure) => {
                self.alive.remove(&pid); // nobody was told of it, so nobody waits for its end
                let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL); // it may have ended by itself
                Err(failure)
            }
        }
    }

    /// Collects what has ended, and tells the server of those that it knows.
    fn reap(&mut self, ended: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut notice = [0; 128];
        let _ = rustix::io::read(ended, &mut notice); // only the wake-up counts
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(number) = self.alive.remove(&pid) {
                wire::send(socket, &Reply::Exited { number, code: exit_code(status) }, &[])?;
            }
        }
        Ok(())
    }
}

fn exit_code(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => -1,
    }
}

/// A descriptor that is readable when a child has ended.
fn children() -> io::Result<OwnedFd> {
    // SAFETY: blocks one signal with a valid set, then wraps the descriptor that the kernel just made.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// From linux/sched.h; the constant of the libc crate does not fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

enum Clone {
    Parent { pid: Pid, pidfd: OwnedFd },
    Child,
}

/// A child in namespaces of its own, and in its version 2 cgroup from its first instruction where there is one.
fn clone(cgroup: Option<BorrowedFd<'_>>) -> io::Result<Clone> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: an all-zero clone_args asks for nothing; the fields set below are valid for the call.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = NAMESPACES | libc::CLONE_PIDFD as u64;
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM this is a fork; this process has one thread, so its copy may do anything.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) };
    match check(pid as i32)? {
        0 => Ok(Clone::Child),
        pid => {
            let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("clone3 gave no pid"))?;
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(Clone::Parent { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
        }
    }
}

fn set_ids(pid: Pid, number: u64, ids: Ids) -> Result<(), Failure> {
    let proc = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    // Only a preference between victims: where it cannot be set, nothing is less safe.
    let _ = fs::write(proc.join("oom_score_adj"), OOM_SCORE_ADJ);
    let outside = match ids {
        Ids::Range { first, count } => first + (number % u64::from(count)) as u32,
        Ids::Own => {
            step("deny setgroups", fs::write(proc.join("setgroups"), "deny"))?;
            0
        }
    };
    let map = format!("{SANDBOX_ID} {outside} 1");
    step("write gid_map", fs::write(proc.join("gid_map"), &map))?;
    step("write uid_map", fs::write(proc.join("uid_map"), &map))
}

/// Waits for `execve`, which closes the pipe, or for the failure that the child tells.
fn outcome(failed: OwnedFd) -> Result<(), Failure> {
    let mut told = Vec::new();
    step("read from the sandbox", fs::File::from(failed).read_to_end(&mut told))?;
    if told.is_empty() {
        return Ok(());
    }
    Err(serde_json::from_slice(&told).unwrap_or(Failure { step: "start the sandbox".into(), errno: 0 }))
}

fn report(fail: OwnedFd, failure: &Failure) -> ! {
    let told = serde_json::to_vec(failure).unwrap_or_default();
    let _ = fs::File::from(fail).write_all(&told); // where it cannot be told, the exit status is all there is
    // SAFETY: ends this process at once; nothing of the launcher's that it copied may run its destructors.
    unsafe { libc::_exit(1) }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
