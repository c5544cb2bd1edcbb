//! The drivers that every behaviour is tried on: how a server of each is started, and why it may be absent.
//!
//! A fifth driver is a line of `NAMES` and an arm of `Driver::find`; no behaviour is edited.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use codesandbox::runtime::docker::Docker;
use codesandbox::runtime::embedded::{self, Embedded};
use codesandbox::runtime::podman::{Podman, Profile};
use codesandbox::runtime::{SharedRuntime, container};
use serde_json::Value;

use crate::engine::Engine;
use crate::support::{ORDINARY_USER, PROGRAM, Server, is_root};

/// All of them, in the order in which they are tried.
pub(crate) const NAMES: [&str; 8] =
    ["embedded", "embedded_user", "docker", "docker_relay", "podman", "podman_stdin", "podman5", "docker26"];

/// No warm sandboxes: each costs a daemon a tenth of a second of both cores, and most trials want one or two.
const FEW: [&str; 2] = ["--set", "pool.size=0"];
/// Of shared servers, whose users come and do not go.
const SHARED: [&str; 2] = ["--set", "session.idle_timeout=30s"];
/// What is not gone by then is left behind.
const LEFT: Duration = Duration::from_secs(20);

/// Servers that ended badly, and what they left behind: told, and failed for, after all trials.
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Drivers that go on, by the engine that they use.
static USERS_OF_ENGINES: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());

pub(crate) fn complaints() -> Vec<String> {
    COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn complain(what: String) {
    COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner).push(what);
}

/// Whether an absent driver is a failure.
pub(crate) fn is_required(name: &str) -> bool {
    let required = std::env::var("TEST_REQUIRE").unwrap_or_default();
    required.split_whitespace().any(|required| required == name)
}

/// One way to make sandboxes, and the servers that use it. The last trial that holds it stops them.
pub(crate) struct Driver {
    pub(crate) name: &'static str,
    kind: Kind,
    /// The shared servers by their flags; one that is just being started is waited for.
    shared: Mutex<HashMap<Vec<String>, Slot>>,
    /// A copy of the program where every user can read it.
    program: tempfile::TempDir,
}

type Slot = Arc<OnceLock<Arc<Server>>>;

#[derive(Debug)]
enum Kind {
    /// As whoever runs the tests: root.
    Embedded,
    /// As an ordinary user without control groups.
    EmbeddedUser,
    Docker(Engine),
    /// The server runs as the ordinary user whose service it is.
    Podman {
        engine: Engine,
        user: User,
        lacks: String,
    },
}

#[derive(Debug)]
struct User {
    uid: u32,
    gid: u32,
}

impl Driver {
    /// The driver of that name, or why it is absent.
    pub(crate) fn find(name: &'static str) -> Result<Driver, String> {
        let kind = match name {
            "embedded" if is_root() => Kind::Embedded,
            "embedded" => return Err("only root is sure to have control groups".into()),
            "embedded_user" => Kind::EmbeddedUser,
            "docker" | "docker_relay" => docker("TEST_DOCKER_HOST")?,
            "docker26" => docker("TEST_DOCKER26_HOST")?,
            "podman" => podman("TEST_PODMAN_HOST")?,
            "podman_stdin" => podman("TEST_PODMAN_STDIN_HOST")?,
            "podman5" => podman("TEST_PODMAN5_HOST")?,
            other => unreachable!("{other} is not in NAMES"),
        };
        let driver = Driver { name, kind, shared: Mutex::default(), program: copy_of_the_program() };
        if let Some(engine) = driver.engine() {
            *USERS_OF_ENGINES
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(engine.url())
                .or_insert(0) += 1;
        }
        Ok(driver)
    }

    /// As a configuration and an answer name it.
    pub(crate) fn configured(&self) -> &'static str {
        match self.kind {
            Kind::Embedded | Kind::EmbeddedUser => "embedded",
            Kind::Docker(_) => "docker",
            Kind::Podman { .. } => "podman",
        }
    }

    /// The engine whose containers the sandboxes are.
    pub(crate) fn engine(&self) -> Option<&Engine> {
        match &self.kind {
            Kind::Embedded | Kind::EmbeddedUser => None,
            Kind::Docker(engine) | Kind::Podman { engine, .. } => Some(engine),
        }
    }

    /// Whether sandboxes are talked to past the engine, where that can be had.
    fn is_direct(&self) -> bool {
        !["docker_relay", "podman_stdin", "podman5"].contains(&self.name)
    }

    /// The flag that has a server talk to its sandboxes so.
    pub(crate) fn direct(&self, direct: bool) -> String {
        format!("{}.direct={direct}", self.configured())
    }

    /// Whether all memory of a sandbox together has a limit. Where not, each process has RLIMIT_AS.
    pub(crate) fn limits_memory(&self) -> bool {
        match &self.kind {
            Kind::Embedded | Kind::Docker(_) => true,
            Kind::EmbeddedUser => false,
            Kind::Podman { lacks, .. } => !lacks.contains("memory"),
        }
    }

    pub(crate) fn limits_cpus(&self) -> bool {
        match &self.kind {
            Kind::Embedded | Kind::Docker(_) => true,
            Kind::EmbeddedUser => false,
            Kind::Podman { lacks, .. } => !lacks.contains("cpus"),
        }
    }

    /// Podman takes no `nr_inodes` for a tmpfs: memory bounds its inodes.
    pub(crate) fn limits_inodes(&self) -> bool {
        !matches!(self.kind, Kind::Podman { .. })
    }

    pub(crate) fn is_embedded(&self) -> bool {
        matches!(self.kind, Kind::Embedded | Kind::EmbeddedUser)
    }

    pub(crate) fn is_docker(&self) -> bool {
        matches!(self.kind, Kind::Docker(_))
    }

    /// A server with these flags, shared by the trials that want the same, and a user that no other trial has.
    pub(crate) fn server(&self, flags: &[&str]) -> (Arc<Server>, String) {
        let key = flags.iter().map(|flag| flag.to_string()).collect();
        let slot = self.shared.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default().clone();
        let start = || Arc::new(self.start(&new_instance(), &[&FEW[..], &SHARED[..], flags].concat()));
        (slot.get_or_init(start).clone(), new_user())
    }

    /// A server of the trial's own.
    pub(crate) fn own(&self, flags: &[&str]) -> Server {
        self.start(&new_instance(), &[&FEW[..], flags].concat())
    }

    /// With an instance of the trial's choice, for one that is to start again.
    pub(crate) fn start(&self, instance: &str, flags: &[&str]) -> Server {
        let mut command = self.command();
        command.args(["--instance", instance]).args(flags);
        Server::spawn(command, None)
    }

    /// The program, told all that it needs to use this driver.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(self.program.path().join("codesandbox"));
        let image = format!("image={}", image());
        if self.engine().is_some() {
            command.args(["--set", &self.direct(self.is_direct())]);
        }
        match &self.kind {
            Kind::Embedded => {
                command.args(["--driver", "embedded"]);
            }
            Kind::EmbeddedUser => {
                as_user(&mut command, &User { uid: ORDINARY_USER, gid: ORDINARY_USER });
                command.args(["--driver", "embedded", "--allow-unenforced", "memory,cpus,uids"]);
            }
            Kind::Docker(engine) => {
                command.env("DOCKER_HOST", engine.url());
                command.args(["--driver", "docker", "--set", "pull=never", "--set", &image]);
            }
            Kind::Podman { engine, user, lacks } => {
                as_user(&mut command, user);
                command.env("CONTAINER_HOST", engine.url()).env("XDG_RUNTIME_DIR", runtime_directory(engine));
                command.args(["--driver", "podman", "--set", "pull=never", "--set", &image]);
                if !lacks.is_empty() {
                    command.args(["--allow-unenforced", lacks]);
                }
            }
        }
        command
    }

    /// The driver itself, without a server: floor 2.
    pub(crate) async fn runtime(&self, instance: &str, supervisor: &'static str) -> SharedRuntime {
        let settings = |engine: &Engine| container::Settings {
            url: engine.url(),
            instance: instance.to_owned(),
            image: image(),
            pull: container::Pull::Never,
            runtime: None,
            user: None,
            direct: self.is_direct(),
            labels: Default::default(),
        };
        match &self.kind {
            Kind::Embedded | Kind::EmbeddedUser => {
                let launcher = PathBuf::from(PROGRAM);
                let settings = embedded::Settings {
                    rootfs: None,
                    python: None,
                    launcher,
                    instance: instance.to_owned(),
                };
                Arc::new(Embedded::start(settings, supervisor).await.unwrap())
            }
            Kind::Docker(engine) => {
                Arc::new(Docker::start(settings(engine), None, supervisor).await.unwrap())
            }
            Kind::Podman { engine, .. } => {
                let profile = Profile::Into(runtime_directory(engine)); // which the service sees, wherever it runs
                Arc::new(Podman::start(settings(engine), profile, supervisor).await.unwrap())
            }
        }
    }

    /// Rootless Podman cannot where there is no control group of its own to freeze.
    pub(crate) fn can_pause(&self) -> bool {
        self.limits_memory()
    }

    /// Whether a driver that goes on uses the same engine, whose sandboxes are not told from ours. Not any more, from now
    /// on.
    fn shares_its_engine(&self) -> bool {
        let Some(engine) = self.engine() else { return false };
        let mut users = USERS_OF_ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
        let count = users.get_mut(&engine.url()).expect("each driver is counted from its begin");
        *count -= 1;
        *count > 0
    }

    /// What is left of this run's sandboxes.
    fn leftovers(&self) -> Vec<String> {
        let ours = instance_prefix();
        match &self.kind {
            Kind::Embedded => groups(&format!("codesandbox-{ours}")),
            Kind::EmbeddedUser => processes_of(self.program.path()),
            Kind::Docker(engine) | Kind::Podman { engine, .. } => engine.containers_of(&ours),
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let slots = std::mem::take(self.shared.get_mut().unwrap_or_else(PoisonError::into_inner));
        let servers: Vec<_> = slots.into_values().filter_map(|slot| slot.get().cloned()).collect();
        servers.iter().for_each(|server| server.signal(libc::SIGTERM)); // all at once
        for server in servers {
            if server.log().contains("panicked") {
                complain(format!("{}: a server panicked: {}", self.name, server.log()));
            }
            if catch_unwind(AssertUnwindSafe(|| drop(server))).is_err() {
                complain(format!("{}: a server did not end well", self.name));
            }
        }
        if self.shares_its_engine() {
            return; // with one that looks when it goes
        }
        let begun = Instant::now();
        while !self.leftovers().is_empty() && begun.elapsed() < LEFT {
            std::thread::sleep(Duration::from_millis(50));
        }
        for left in self.leftovers() {
            complain(format!("{}: left behind: {left}", self.name));
            if let Some(engine) = self.engine() {
                engine.remove(&left); // told once; the next run begins with a clean engine
            }
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for mount in
            mounts.lines().filter(|line| self.is_embedded() && line.contains("codesandbox-conformance"))
        {
            complain(format!("{}: still mounted: {mount}", self.name));
        }
        if let Kind::Podman { engine, .. } = &self.kind {
            forget_profiles(&runtime_directory(engine));
        }
    }
}

/// More of the same engine: another version of it, or set up in another way.
pub(crate) fn is_a_variant(name: &str) -> bool {
    ["docker_relay", "podman_stdin", "podman5", "docker26"].contains(&name)
}

/// The image that sandboxes are made of.
pub(crate) fn image() -> String {
    std::env::var("TEST_IMAGE").unwrap_or_else(|_| "localhost/codesandbox-test/python:3.13".into())
}

/// Those of every Python version that there is.
pub(crate) fn images() -> Vec<String> {
    let all = std::env::var("TEST_IMAGES").unwrap_or_default();
    all.split_whitespace().map(str::to_owned).collect()
}

/// All instances of this run begin so.
fn instance_prefix() -> String {
    format!("conformance-{}-", std::process::id())
}

pub(crate) fn new_instance() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("{}{}", instance_prefix(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn new_user() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("user-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn docker(variable: &str) -> Result<Kind, String> {
    Engine::named_by(variable).map(Kind::Docker)
}

fn podman(variable: &str) -> Result<Kind, String> {
    let engine = Engine::named_by(variable)?;
    let name = std::env::var("TEST_PODMAN_USER").map_err(|_| "TEST_PODMAN_USER is not set")?;
    let user = User::named(&name).ok_or(format!("there is no user {name}"))?;
    let info = engine.get("/v4.0.0/libpod/info");
    Ok(Kind::Podman { lacks: lacking(&info["host"]), engine, user })
}

/// The limits that this Podman cannot enforce, by the names that `allow_unenforced` takes; `processes` it can, by
/// a uid of its own for each sandbox.
fn lacking(host: &Value) -> String {
    let controllers: Vec<&str> =
        host["cgroupControllers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let limits = [("memory", "memory"), ("cpu", "cpus")];
    let lacking = limits.iter().filter(|(controller, _)| !controllers.contains(controller));
    lacking.map(|(_, limit)| *limit).collect::<Vec<_>>().join(",")
}

impl User {
    fn named(name: &str) -> Option<User> {
        let all = std::fs::read_to_string("/etc/passwd").ok()?;
        let line = all.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let mut ids = line.split(':').skip(1).map(str::parse);
        Some(User { uid: ids.next()?.ok()?, gid: ids.next()?.ok()? })
    }
}

/// With a bare environment and no groups.
fn as_user(command: &mut Command, user: &User) {
    command.env_clear().env("PATH", "/usr/bin:/bin").current_dir("/");
    if is_root() {
        command.uid(user.uid).gid(user.gid);
    }
}

/// The one beside the socket of the user's own service.
fn runtime_directory(engine: &Engine) -> PathBuf {
    engine.socket().with_file_name("run")
}

/// A server's seccomp profile stays for the next one of its instance; ours have none.
fn forget_profiles(directory: &Path) {
    let ours = OsString::from(format!("codesandbox-{}", instance_prefix()));
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&*ours.to_string_lossy()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn copy_of_the_program() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::copy(PROGRAM, directory.path().join("codesandbox")).unwrap();
    directory
}

/// The control groups whose name begins so, in every hierarchy.
fn groups(name: &str) -> Vec<String> {
    fn walk(directory: &Path, name: &str, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().starts_with(name) {
                    found.push(entry.path().display().to_string());
                }
                walk(&entry.path(), name, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new("/sys/fs/cgroup"), name, &mut found);
    found
}

/// The processes of a program; of what they started, which has another one, the kernel makes an end with them.
fn processes_of(program: &Path) -> Vec<String> {
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let runs_it = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe.starts_with(program))
    };
    all.filter(runs_it).map(|entry| format!("process {}", entry.file_name().display())).collect()
}
