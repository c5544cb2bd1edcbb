//! What happens between `clone3` and `execve`: a process shuts itself in, step by step.
//!
//! The launcher has one thread, so the child of its clone may allocate and use all of std. Every step
//! that fails ends the child and tells the launcher its name and errno; `execve` closes that pipe.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, mount, mount_bind, mount_remount, move_mount, open_tree,
};
use rustix::process::{Gid, Resource, Rlimit, Signal, Uid, chdir, setrlimit, setsid, umask};

use super::layers::*;
use super::seccomp;
use super::template::{SANDBOX, TEMPLATE, pivot};
use super::wire::{Failure, Program, step};
use crate::runtime::SandboxSpec;
use crate::runtime::guest::{self, HOSTNAME};

/// What the launcher hands to a new sandbox.
pub(super) struct Entry<'a> {
    /// Of its control groups of version 1: see `Entrance::Tasks`.
    pub(super) tasks: Vec<OwnedFd>,
    /// Closed by the launcher once the ids are mapped; it writes one byte first.
    pub(super) mapped: OwnedFd,
    /// Becomes stdin and stdout.
    pub(super) stream: OwnedFd,
    /// Becomes stderr.
    pub(super) stderr: OwnedFd,
    pub(super) spec: &'a SandboxSpec,
    pub(super) program: Program,
    /// The interpreter's real path: its `argv[0]`, from which Python finds its library.
    pub(super) python: &'a Path,
    pub(super) filter: &'a seccomp::Program,
    /// Whether supplementary groups can be given up: not by a user who has but one id.
    pub(super) may_drop_groups: bool,
}

/// Makes this process the PID 1 of a sandbox. Comes back only with a failure.
pub(super) fn enter(entry: Entry<'_>) -> Failure {
    match try_enter(entry) {
        Err(failure) => failure,
        Ok(never) => match never {},
    }
}

fn try_enter(entry: Entry<'_>) -> Result<Infallible, Failure> {
    let Entry { tasks, mapped, stream, stderr, spec, program, python, filter, may_drop_groups } = entry;
    step("join its control groups", tasks.into_iter().try_for_each(join))?;
    step("wait for the ids", wait_for(mapped))?;
    step("setresuid", take_ids(may_drop_groups))?;
    step("setsid", setsid())?;
    fill_root(spec)?;
    step("pivot_root of the sandbox", pivot(Path::new(SANDBOX)))?;
    step("mask /proc", mask_proc())?;
    step("sethostname", rustix::system::sethostname(HOSTNAME.as_bytes()))?;
    step("bring lo up", bring_up_loopback())?;
    step("setrlimit", limit_resources(spec))?;
    step("chdir /workspace", chdir("/workspace"))?;
    umask(rustix::fs::Mode::from_raw_mode(0o022));
    step("dup2", take_descriptors(stream, stderr))?;
    let (arguments, environment) = command(program, python, spec);
    step("reset signals", reset_signals())?;
    step("PR_SET_PDEATHSIG", rustix::process::set_parent_process_death_signal(Some(Signal::KILL)))?;
    step("drop capabilities", drop_capabilities())?;
    step("PR_SET_NO_NEW_PRIVS", rustix::thread::set_no_new_privs(true))?;
    step("seccomp", filter.install())?;
    Err(Failure::new("execve of the interpreter", &execute(&arguments, &environment)))
}

fn join(tasks: OwnedFd) -> io::Result<()> {
    fs::File::from(tasks).write_all(b"0") // whoever writes
}

fn wait_for(mapped: OwnedFd) -> io::Result<()> {
    let mut byte = [0];
    fs::File::from(mapped).read_exact(&mut byte)
}

fn take_ids(may_drop_groups: bool) -> io::Result<()> {
    if may_drop_groups {
        rustix::thread::set_thread_groups(&[])?;
    }
    let (uid, gid) = (Uid::from_raw(SANDBOX_ID), Gid::from_raw(SANDBOX_ID));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
}

/// The template and, upon it, what each sandbox has for itself.
fn fill_root(spec: &SandboxSpec) -> Result<(), Failure> {
    // A copy, since the mounts that came along are locked, and pivot_root takes none that is.
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = step("open_tree of the template", open_tree(CWD, TEMPLATE, flags))?;
    let moved = move_mount(&tree, "", CWD, SANDBOX, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
    step("move_mount of the template", moved)?;
    step("chdir to the new root", chdir(SANDBOX))?;
    let proc = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    step("mount /proc", mount("proc", "proc", "proc", proc, None))?;
    step("limit namespaces", forbid_namespaces())?;
    step("limit the network's buffers", limit_network())?;
    let pts = MountFlags::NOSUID | MountFlags::NOEXEC;
    step("mount /dev/pts", mount("devpts", "dev/pts", "devpts", pts, Some(&*text(PTS_OPTIONS))))?;
    for (name, bytes, mode, more) in [
        ("workspace", spec.workspace_bytes, 700, MountFlags::empty()),
        ("tmp", spec.tmp_bytes, 1777, MountFlags::empty()),
        ("dev/shm", spec.shm_bytes, 1777, MountFlags::NOEXEC),
    ] {
        let inodes = spec.inodes;
        let options = format!(
            "size={bytes},nr_inodes={inodes},mode={mode},uid={SANDBOX_ID},gid={SANDBOX_ID},huge=never"
        );
        let done = mount("tmpfs", name, "tmpfs", WRITABLE | more, Some(&*text(&options)));
        step(format!("mount /{name}"), done)?;
    }
    Ok(())
}

fn forbid_namespaces() -> io::Result<()> {
    for name in NAMESPACE_LIMITS {
        match fs::write(Path::new("proc/sys/user").join(name), "0") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // no such kind in this kernel
            done => done?,
        }
    }
    Ok(())
}

fn limit_network() -> io::Result<()> {
    for (name, value) in NETWORK_LIMITS {
        fs::write(Path::new("proc/sys/net").join(name), value)?;
    }
    Ok(())
}

fn mask_proc() -> io::Result<()> {
    for name in MASKED_PROC {
        let path = Path::new("/proc").join(name);
        match fs::symlink_metadata(&path) {
            Ok(kind) if kind.is_dir() => {
                let flags = MountFlags::RDONLY | WRITABLE | MountFlags::NOEXEC;
                mount("tmpfs", &path, "tmpfs", flags, Some(c"size=0,nr_inodes=2"))?;
            }
            Ok(_) => mount_bind("/dev/null", &path)?,
            Err(_) => {}
        }
    }
    for name in READ_ONLY_PROC {
        let path = Path::new("/proc").join(name);
        if path.exists() {
            mount_bind(&path, &path)?;
            let flags = MountFlags::RDONLY | WRITABLE | MountFlags::NOEXEC;
            mount_remount(&path, MountFlags::BIND | flags, c"")?;
        }
    }
    Ok(())
}

/// Programs talk to themselves over 127.0.0.1; there is no other interface.
fn bring_up_loopback() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is a valid value; the kernel reads the name and the flags set here.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the socket is open and the request outlives the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn limit_resources(spec: &SandboxSpec) -> io::Result<()> {
    let of_spec = [(Resource::Nofile, spec.open_files), (Resource::Nproc, spec.processes)];
    for (resource, value) in RESOURCES.into_iter().chain(of_spec) {
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?;
    }
    Ok(())
}

fn take_descriptors(stream: OwnedFd, stderr: OwnedFd) -> io::Result<()> {
    rustix::stdio::dup2_stdin(&stream)?;
    rustix::stdio::dup2_stdout(&stream)?;
    rustix::stdio::dup2_stderr(&stderr)?;
    // Not dropped: they may be among the three that were just replaced.
    let _ = (stream.into_raw_fd(), stderr.into_raw_fd());
    // SAFETY: marks descriptors close-on-exec; closes none, so that no Rust owner is surprised.
    match unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn reset_signals() -> io::Result<()> {
    // SAFETY: sets the default action and an empty mask with valid pointers. Rust's runtime ignores
    // SIGPIPE and the launcher blocks SIGCHLD; both would outlive execve.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        match libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Every set: bounding, ambient, inheritable, permitted, effective.
fn drop_capabilities() -> io::Result<()> {
    use rustix::thread::{CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities};
    for capability in 0..64 {
        // SAFETY: drops one capability from this thread's bounding set; EINVAL is the first that the kernel lacks.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::EINVAL) => break,
                error => return Err(error),
            }
        }
    }
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
}

fn command(program: Program, python: &Path, spec: &SandboxSpec) -> (Vec<CString>, Vec<CString>) {
    let python = python.to_string_lossy();
    let what: &[&str] = match program {
        Program::Supervisor => &[SUPERVISOR],
        Program::Compiler => &["-c", super::COMPILER],
    };
    let arguments = [&*python, "-I", "-S"].into_iter().chain(what.iter().copied()).map(text).collect();
    let own = ENVIRONMENT.into_iter().map(|(name, value)| (name, value.to_owned()));
    let environment = own.chain(guest::environment(spec));
    (arguments, environment.map(|(name, value)| text(&format!("{name}={value}"))).collect())
}

fn execute(arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|item| item.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end in a null pointer, and their strings live in the caller.
    unsafe { libc::execve(text(INTERPRETER).as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

fn text(text: &str) -> CString {
    CString::new(text.replace('\0', "")).expect("its NUL bytes are gone")
}
