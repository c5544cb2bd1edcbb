//! At the end of a test program: whatever its servers left behind on this machine fails it. What they left on an
//! engine, the suites look for themselves.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// For what ends a moment after its server.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where tests/engines.sh mounts what it needs.
const ENGINES: &str = "codesandbox-engines";

static SERVERS: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
static BEFORE: OnceLock<BTreeSet<String>> = OnceLock::new();

/// A server that is to leave nothing behind.
pub(crate) fn watch(server: u32) {
    BEFORE.get_or_init(|| {
        // SAFETY: the function takes nothing, returns nothing and does not unwind.
        assert_eq!(unsafe { libc::atexit(fail_on_leaks) }, 0);
        orphans().into_iter().chain(mounts()).collect()
    });
    servers().insert(server);
}

/// It is killed: its control groups wait for the next start.
pub(crate) fn forgive(server: u32) {
    servers().remove(&server);
}

fn servers() -> std::sync::MutexGuard<'static, BTreeSet<u32>> {
    SERVERS.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn fail_on_leaks() {
    let begun = Instant::now();
    let leaks = loop {
        let leaks = leaks();
        if leaks.is_empty() || begun.elapsed() > PATIENCE {
            break leaks;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    if !leaks.is_empty() {
        eprintln!("FAILED: left behind: {leaks:#?}");
        // SAFETY: ends the program at once, from where no second `exit` may be called.
        unsafe { libc::_exit(101) }
    }
}

fn leaks() -> Vec<String> {
    let before = BEFORE.get().into_iter().flatten().collect::<BTreeSet<_>>();
    let new = orphans().into_iter().chain(mounts()).filter(|leak| !before.contains(leak));
    new.chain(control_groups()).collect()
}

/// Processes of a namespace of their own whose parent is gone: no engine's, which all have one.
fn orphans() -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        let nested = field("NSpid:").split_whitespace().count() > 1;
        if nested && field("PPid:").trim() == "1" && !field("State:").contains('Z') {
            found.push(format!("process {} {}", field("Pid:").trim(), field("Name:").trim()));
        }
    }
    found
}

fn mounts() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let ours = mounts.lines().filter(|line| line.contains("codesandbox") && !line.contains(ENGINES));
    ours.map(|line| format!("mount {line}")).collect()
}

/// Of the watched servers.
fn control_groups() -> Vec<String> {
    let servers: BTreeSet<_> = servers().iter().map(u32::to_string).collect();
    let (mut found, mut pending) = (Vec::new(), vec![Path::new("/sys/fs/cgroup").to_path_buf()]);
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("codesandbox-") && name.split('-').any(|part| servers.contains(part)) {
                found.push(format!("control group {}", entry.path().display()));
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                pending.push(entry.path());
            }
        }
    }
    found
}
