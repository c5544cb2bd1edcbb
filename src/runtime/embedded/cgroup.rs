//! Control groups: the limits of a sandbox as a whole, where this process may write them.
//!
//! Version 2 needs a delegated group; the sandbox is then born in its own. Version 1 has a hierarchy for
//! each controller, in each of which the sandbox's first process takes its place before it does anything else.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::wire::Entrance;
use crate::runtime::{Limit, SandboxSpec};

/// Microseconds over which the CPU quota counts: the kernel's own default.
const PERIOD_US: u64 = 100_000;
/// For the last processes of a server that was killed a moment ago: half a minute.
const SWEEPS: usize = 60;
const SWEEP_PAUSE: Duration = Duration::from_millis(500);
/// A group is busy for a moment after its last process: `rmdir` is tried again that often.
const REMOVALS: u32 = 100;
/// The share of a sandbox's memory that may lie in socket buffers beside it, under version 1: a guess.
const SOCKET_SHARE: u64 = 16;
const CONTROLLERS: [(Limit, &str); 3] =
    [(Limit::Memory, "memory"), (Limit::Processes, "pids"), (Limit::Cpus, "cpu")];

/// Where groups for sandboxes can be made.
#[derive(Debug)]
pub(super) enum Hierarchy {
    /// One directory for all controllers, and the group that this process left for it, if it did.
    V2(PathBuf, Option<Left>),
    /// A directory for each controller that can be written.
    V1(Vec<(Limit, PathBuf)>),
    /// None, and why.
    Missing(String),
}

impl Hierarchy {
    /// Finds what this process may write and makes the server's own directory there.
    pub(super) fn find(instance: &str) -> Hierarchy {
        let (Ok(groups), Ok(mounts)) =
            (fs::read_to_string("/proc/self/cgroup"), fs::read_to_string("/proc/self/mountinfo"))
        else {
            return Hierarchy::Missing("/proc tells of no control groups".into());
        };
        let name = format!("codesandbox-{instance}-{}", std::process::id());
        match unified(&groups, &mounts) {
            Some(own) => version_2(&own, &name),
            None => version_1(&groups, &mounts, &name),
        }
    }

    /// The limits that it enforces.
    pub(super) fn limits(&self) -> Vec<Limit> {
        match self {
            Hierarchy::V2(..) => CONTROLLERS.iter().map(|(limit, _)| *limit).collect(),
            Hierarchy::V1(directories) => directories.iter().map(|(limit, _)| *limit).collect(),
            Hierarchy::Missing(_) => Vec::new(),
        }
    }

    /// What to call it in a report.
    pub(super) fn describe(&self) -> String {
        match self {
            Hierarchy::V2(..) => "cgroup v2".into(),
            Hierarchy::V1(_) => "cgroup v1".into(),
            Hierarchy::Missing(why) => why.clone(),
        }
    }

    /// A group with the limits of one sandbox.
    pub(super) fn create(&self, number: u64, spec: &SandboxSpec) -> io::Result<Group> {
        let name = format!("sandbox-{number}");
        let parents: Vec<_> = match self {
            Hierarchy::V2(directory, _) => vec![(None, directory)],
            Hierarchy::V1(directories) => {
                directories.iter().map(|(limit, path)| (Some(*limit), path)).collect()
            }
            Hierarchy::Missing(_) => Vec::new(),
        };
        let mut group = Group { directories: Vec::new(), version_2: matches!(self, Hierarchy::V2(..)) };
        for (limit, parent) in parents {
            let directory = parent.join(&name);
            fs::create_dir(&directory)?;
            group.directories.push((limit, directory.clone()));
            write_limits(limit, &directory, spec)?;
        }
        Ok(group)
    }
}

/// The group that this process was in, and the leaf that it went to, since processes may not stand beside
/// groups with controllers.
#[derive(Debug)]
pub(super) struct Left {
    own: PathBuf,
    leaf: PathBuf,
}

impl Drop for Hierarchy {
    /// The server's own directories go with it, once the groups in them are gone.
    fn drop(&mut self) {
        match self {
            Hierarchy::V2(directory, left) => {
                sweep(directory);
                if let Some(Left { own, leaf }) = left {
                    // So that the next server can be started in the same group; if not, it is a new one's to clean.
                    let _ = fs::write(own.join("cgroup.subtree_control"), "-memory -pids -cpu");
                    let _ = fs::write(own.join("cgroup.procs"), std::process::id().to_string());
                    remove(leaf);
                }
            }
            Hierarchy::V1(directories) => directories.iter().for_each(|(_, directory)| {
                sweep(directory);
            }),
            Hierarchy::Missing(_) => {}
        }
    }
}

/// One sandbox's control groups; removed when dropped.
#[derive(Debug)]
pub(super) struct Group {
    directories: Vec<(Option<Limit>, PathBuf)>,
    version_2: bool,
}

impl Group {
    pub(super) fn entrance(&self) -> Entrance {
        if self.version_2 { Entrance::BornIn } else { Entrance::Tasks(self.directories.len()) }
    }

    /// What `entrance` needs: the group's directory, or the `tasks` of each hierarchy.
    pub(super) fn open(&self) -> io::Result<Vec<OwnedFd>> {
        let open = |(_, directory): &(_, PathBuf)| match self.entrance() {
            Entrance::BornIn => rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()),
            Entrance::Tasks(_) => {
                rustix::fs::open(directory.join("tasks"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            }
        };
        Ok(self.directories.iter().map(open).collect::<Result<_, _>>()?)
    }

    /// Processes in it that were killed for want of memory; `None` where nobody counts.
    pub(super) fn out_of_memory_kills(&self) -> Option<u64> {
        let file = if self.version_2 { "memory.events" } else { "memory.oom_control" };
        let (_, directory) =
            self.directories.iter().find(|(limit, _)| matches!(limit, None | Some(Limit::Memory)))?;
        let text = fs::read_to_string(directory.join(file)).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for (_, directory) in &self.directories {
            remove(directory);
        }
    }
}

fn write_limits(limit: Option<Limit>, directory: &Path, spec: &SandboxSpec) -> io::Result<()> {
    let write = |file: &str, value: String| fs::write(directory.join(file), value);
    let optional = |file: &str, value: String| match write(file, value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()), // a kernel without swap accounting
        done => done,
    };
    let quota = (spec.cpus * PERIOD_US as f64) as u64;
    match limit {
        None => {
            write("memory.max", spec.memory_bytes.to_string())?;
            optional("memory.swap.max", "0".into())?;
            write("pids.max", spec.processes.to_string())?;
            write("cpu.max", format!("{quota} {PERIOD_US}"))
        }
        Some(Limit::Memory) => {
            write("memory.limit_in_bytes", spec.memory_bytes.to_string())?;
            optional("memory.memsw.limit_in_bytes", spec.memory_bytes.to_string())?;
            // Version 1 counts socket buffers apart (TCP and UDP alike); a guest could hold gigabytes in them.
            optional("memory.kmem.tcp.limit_in_bytes", (spec.memory_bytes / SOCKET_SHARE).to_string())
        }
        Some(Limit::Processes) => write("pids.max", spec.processes.to_string()),
        Some(Limit::Cpus) => {
            // The kernel's own; a write to either of the two has it walk all groups.
            let period = fs::read_to_string(directory.join("cpu.cfs_period_us"))?;
            if period.trim() != PERIOD_US.to_string() {
                write("cpu.cfs_period_us", PERIOD_US.to_string())?;
            }
            write("cpu.cfs_quota_us", quota.to_string())
        }
        Some(Limit::Uids) => Ok(()), // no controller's
    }
}

/// This process's group of the unified hierarchy, where that one has the controllers.
fn unified(groups: &str, mounts: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mount = mounts.lines().find_map(|line| mount_point(line, |kind, _| kind == "cgroup2"))?;
    let own = below(&mount, path);
    let controllers = fs::read_to_string(own.join("cgroup.controllers")).ok()?;
    CONTROLLERS
        .iter()
        .all(|(_, name)| controllers.split_whitespace().any(|word| word == *name))
        .then_some(own)
}

/// The mount's root in its hierarchy and its mount point, where `wanted` says so of type and options.
fn mount_point(line: &str, wanted: impl Fn(&str, &str) -> bool) -> Option<(String, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1)?);
    let mut before = before.split(' ').skip(3);
    let (root, point) = (before.next()?, before.next()?);
    wanted(kind, options).then(|| (root.to_owned(), PathBuf::from(point)))
}

fn below((root, point): &(String, PathBuf), path: &str) -> PathBuf {
    let inside = if root == "/" { path } else { path.strip_prefix(root.as_str()).unwrap_or(path) };
    point.join(inside.trim_start_matches('/'))
}

/// Processes may not stand beside groups with controllers, so the server moves into a leaf of its own; that
/// is done only where the group is ours alone. Root may instead begin at the top of the hierarchy.
fn version_2(own: &Path, name: &str) -> Hierarchy {
    let missing =
        |what: &str, error: io::Error| Hierarchy::Missing(format!("{what} {}: {error}", own.display()));
    let pid = std::process::id().to_string();
    let alone =
        fs::read_to_string(own.join("cgroup.procs")).is_ok_and(|procs| procs.lines().all(|line| line == pid));
    let is_root_of_hierarchy = !own.join("cgroup.type").exists();
    if !alone && !is_root_of_hierarchy {
        let top = own.ancestors().take_while(|path| path.join("cgroup.controllers").exists()).last();
        return match top.map(|top| make_below(top, name)) {
            Some(Ok(directory)) => Hierarchy::V2(directory, None),
            Some(Err(error)) => missing("no group of our own, and cannot make one above", error),
            None => Hierarchy::Missing("no group of our own".into()),
        };
    }
    let left = match is_root_of_hierarchy {
        true => None,
        false => match step_aside(own, name) {
            Ok(left) => Some(left),
            Err(error) => return missing("cannot make groups in", error),
        },
    };
    match make_below(own, name) {
        Ok(directory) => Hierarchy::V2(directory, left),
        Err(error) => missing("cannot pass controllers on in", error),
    }
}

fn step_aside(own: &Path, name: &str) -> io::Result<Left> {
    let leaf = own.join(format!("{name}-server"));
    fs::create_dir(&leaf)?;
    fs::write(leaf.join("cgroup.procs"), std::process::id().to_string())?;
    Ok(Left { own: own.to_owned(), leaf })
}

fn make_below(parent: &Path, name: &str) -> io::Result<PathBuf> {
    const PASS_ON: &str = "+memory +pids +cpu";
    clean_up_after_the_dead(parent);
    fs::write(parent.join("cgroup.subtree_control"), PASS_ON)?;
    let directory = parent.join(name);
    fs::create_dir(&directory)?;
    fs::write(directory.join("cgroup.subtree_control"), PASS_ON)?;
    Ok(directory)
}

fn version_1(groups: &str, mounts: &str, name: &str) -> Hierarchy {
    let mut directories = Vec::new();
    let mut why =
        "this process was given no control group with the controllers memory, pids and cpu".to_owned();
    for (limit, controller) in CONTROLLERS {
        let has = |list: &str| list.split(',').any(|word| word == controller);
        let path = groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            has(parts.next()?).then(|| parts.next())?
        });
        let mount = mounts
            .lines()
            .find_map(|line| mount_point(line, |kind, options| kind == "cgroup" && has(options)));
        let (Some(path), Some(mount)) = (path, mount) else { continue };
        let own = below(&mount, path);
        clean_up_after_the_dead(&own);
        match fs::create_dir(own.join(name)) {
            Ok(()) => directories.push((limit, own.join(name))),
            Err(error) => why = format!("cannot make a group in {}: {error}", own.display()),
        }
    }
    if directories.is_empty() { Hierarchy::Missing(why) } else { Hierarchy::V1(directories) }
}

/// Removes the directories of servers that were killed: a group of the living cannot be removed. What still dies is
/// waited for in the background.
fn clean_up_after_the_dead(parent: &Path) {
    if sweep_all(parent) {
        return;
    }
    let parent = parent.to_owned();
    std::thread::spawn(move || {
        for _ in 0..SWEEPS {
            std::thread::sleep(SWEEP_PAUSE);
            if sweep_all(&parent) {
                return;
            }
        }
        tracing::warn!(parent = %parent.display(), "cgroups of an earlier server stay busy");
    });
}

/// Whether none is left.
fn sweep_all(parent: &Path) -> bool {
    let Ok(entries) = fs::read_dir(parent) else { return true };
    let mut done = true;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.trim_end_matches("-server").rsplit('-').next().and_then(|pid| pid.parse::<u32>().ok());
        let dead = pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists());
        if name.starts_with("codesandbox-") && dead {
            done &= sweep(&entry.path());
        }
    }
    done
}

fn sweep(directory: &Path) -> bool {
    let Ok(entries) = fs::read_dir(directory) else { return true };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _ = fs::remove_dir(entry.path()); // one that is in use stays
        }
    }
    fs::remove_dir(directory).is_ok()
}

fn remove(directory: &Path) {
    for _ in 0..REMOVALS {
        match fs::remove_dir(directory) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(Duration::from_millis(2))
            }
            Ok(()) => return,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                return tracing::warn!(directory = %directory.display(), %error, "cannot remove a cgroup");
            }
        }
    }
    tracing::warn!(directory = %directory.display(), "cannot remove a cgroup: it stays busy");
}
