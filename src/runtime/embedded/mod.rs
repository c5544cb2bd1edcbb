//! The embedded engine: sandboxes made by this very program, without a daemon, an image or root.
//!
//! `layers` lists every security setting. `launcher` is the process that makes sandboxes, `template` their
//! root file system, `sandbox` the way in. On the server's side `link` talks to the launcher, and this
//! file is the driver.

mod cgroup;
mod launcher;
mod layers;
mod link;
mod python;
mod remedy;
mod sandbox;
mod seccomp;
mod template;
mod wire;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{
    Claim, Claiming, Engine, Error, Fate, Found, KeySecret, Layer, Limit, Result, Runtime, Sandbox,
    SandboxId, SandboxSpec, SessionKey, detached,
};
use cgroup::{Group, Hierarchy};
pub use launcher::run_if_asked;
use layers::SUPERVISOR_OOM_SCORE_ADJ;
use link::{Exit, Link};
use wire::{Entrance, Preparation, Program};

/// The hidden argument by which the server starts its launcher.
const LAUNCHER_ARGUMENT: &str = "__codesandbox_launcher";
/// What the compiler sandbox runs: the supervisor as Python's own cached form, without a file to compare with.
const COMPILER: &str = "import sys, marshal, _frozen_importlib_external as external\n\
    code = compile(sys.stdin.read(), '<supervisor>', 'exec', optimize=2)\n\
    sys.stdout.buffer.write(external.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))\n";
/// A guess: the compiled supervisor is about 30 KiB.
const COMPILED_BYTES: u64 = 1 << 20;
/// From the end of a sandbox to the launcher's word on it: milliseconds, or there comes none.
const EXIT_WAIT: Duration = Duration::from_millis(500);
/// What is kept of a dead supervisor's stderr.
const STDERR_BYTES: usize = 4096;

/// The driver's part of the configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The root of an unpacked image; `None`: this host's own files, read-only.
    pub rootfs: Option<PathBuf>,
    /// The interpreter; `None`: found by itself.
    pub python: Option<PathBuf>,
    /// The program that is started as the launcher: one that calls `run_if_asked` first.
    pub launcher: PathBuf,
    /// Tells our control groups from another server's.
    pub instance: String,
}

/// The embedded engine. Its sandboxes end with it.
#[derive(Debug, Clone)]
pub struct Embedded(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: Settings,
    /// No sandbox outlives this server.
    secret: KeySecret,
    supervisor: &'static str,
    python: python::Python,
    /// Before the groups: the launcher has to be gone when they are removed.
    link: tokio::sync::Mutex<Option<Arc<Link>>>,
    groups: Hierarchy,
    numbers: AtomicU64,
    alive: Mutex<HashMap<SandboxId, Arc<Live>>>,
}

/// A sandbox, as long as it has not been removed.
#[derive(Debug)]
struct Live {
    pidfd: OwnedFd,
    group: Mutex<Option<Group>>,
    stderr: OwnedFd,
    claim: Mutex<Option<Claim>>,
    exit: Exit,
}

impl Embedded {
    /// Starts the launcher and builds the root file system. `supervisor` is the source of PID 1.
    ///
    /// # Errors
    /// `Unusable`, with the step that failed and what to do about it, where this host lacks something.
    pub async fn start(settings: Settings, supervisor: &'static str) -> Result<Embedded> {
        let python = python::find(settings.rootfs.as_deref(), settings.python.as_deref()).await?;
        let groups = Hierarchy::find(&settings.instance);
        let embedded = Embedded(Arc::new(Inner {
            settings,
            secret: KeySecret::random(),
            supervisor,
            python,
            groups,
            link: tokio::sync::Mutex::new(None),
            numbers: AtomicU64::new(0),
            alive: Mutex::new(HashMap::new()),
        }));
        embedded.0.link().await?;
        Ok(embedded)
    }
}

impl Inner {
    /// The launcher: a new one where the last has ended, and all its sandboxes with it.
    async fn link(&self) -> Result<Arc<Link>> {
        let mut held = self.link.lock().await;
        if let Some(link) = held.as_ref().filter(|link| link.is_alive()) {
            return Ok(link.clone());
        }
        let preparation = Preparation {
            rootfs: self.settings.rootfs.clone(),
            python: self.python.path.clone(),
            python_prefixes: self.python.prefixes.clone(),
            ids: link::root_ids(),
        };
        let link = Link::start(&self.settings.launcher, preparation).await?;
        let compiled = self.compile(&link).await?;
        link.install(compiled).await?;
        *held = Some(link.clone());
        Ok(link)
    }

    /// Compiling the supervisor takes 5 ms and more; it is done once, by the sandboxes' own Python.
    async fn compile(&self, link: &Link) -> Result<Vec<u8>> {
        let spec = SandboxSpec::smallest();
        let (mut stream, live) =
            self.launch(link, self.next_number(), &spec, Program::Compiler, None).await?;
        let what = "compile the supervisor";
        let converse = async {
            stream.write_all(self.supervisor.as_bytes()).await?;
            stream.shutdown().await?;
            let mut compiled = Vec::new();
            (&mut stream).take(COMPILED_BYTES).read_to_end(&mut compiled).await?;
            Ok::<_, io::Error>(compiled)
        };
        let compiled = tokio::time::timeout(Duration::from_secs(20), converse).await;
        let compiled = compiled.unwrap_or_else(|late| Err(late.into())).map_err(Error::failed(what))?;
        if compiled.is_empty() {
            live.exit.wait().await;
            return Err(Error::Unusable {
                what: what.into(),
                why: format!("{} said: {}", self.python.path.display(), live.last_words()),
                remedy: "set embedded.python to a Python from 3.8 to 3.14 that runs on this host".into(),
            });
        }
        let _ = rustix::process::pidfd_send_signal(&live.pidfd, Signal::KILL); // it has most likely ended by itself
        Ok(compiled)
    }

    fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    async fn launch(
        &self,
        link: &Link,
        number: u64,
        spec: &SandboxSpec,
        program: Program,
        group: Option<Group>,
    ) -> Result<(UnixStream, Live)> {
        let wrap = |what: &'static str| Error::failed(format!("{what} of a new sandbox"));
        let (ours, theirs) = StdUnixStream::pair().map_err(wrap("make the stream"))?;
        ours.set_nonblocking(true).map_err(wrap("make the stream"))?;
        let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
        let (stderr, their_stderr) =
            rustix::pipe::pipe_with(flags).map_err(io::Error::from).map_err(wrap("make the stderr"))?;
        let entrance = group.as_ref().map_or(Entrance::Tasks(0), Group::entrance);
        let opened = group.as_ref().map_or(Ok(Vec::new()), Group::open).map_err(wrap("open the cgroup"))?;
        let fds = [theirs.as_fd(), their_stderr.as_fd()].into_iter().chain(opened.iter().map(AsFd::as_fd));
        let (pidfd, exit) = match link.create(number, spec, program, entrance, &fds.collect::<Vec<_>>()).await
        {
            Ok(made) => made,
            Err(error) => {
                tokio::task::spawn_blocking(move || drop(group)); // which waits for what is still dying there
                return Err(error);
            }
        };
        let stream = UnixStream::from_std(ours).map_err(wrap("use the stream"))?;
        Ok((stream, Live { pidfd, group: Mutex::new(group), stderr, claim: Mutex::new(None), exit }))
    }

    async fn create(self: &Arc<Self>, spec: SandboxSpec) -> Result<Sandbox> {
        let link = self.link().await?;
        let number = self.next_number();
        let this = self.clone();
        let made = spec.clone();
        let group = tokio::task::spawn_blocking(move || this.groups.create(number, &made))
            .await
            .unwrap_or_else(|panic| Err(io::Error::other(panic)))
            .map_err(Error::failed("make the control group of a new sandbox"))?;
        let (stream, live) = self.launch(&link, number, &spec, Program::Supervisor, Some(group)).await?;
        let (id, live) = (SandboxId(number.to_string()), Arc::new(live));
        lock(&self.alive).insert(id.clone(), live);
        Ok(Sandbox { id, stream: Box::new(stream) })
    }

    async fn remove(&self, id: &SandboxId) -> Result<()> {
        let Some(live) = lock(&self.alive).get(id).cloned() else { return Ok(()) };
        match rustix::process::pidfd_send_signal(&live.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => {
                return Err(Error::Failed { what: format!("kill sandbox {id}"), source: error.into() });
            }
        }
        live.exit.wait().await;
        lock(&self.alive).remove(id);
        let group = lock(&live.group).take();
        let removed = tokio::task::spawn_blocking(move || drop(group)).await;
        removed.map_err(|panic| Error::Failed {
            what: format!("remove sandbox {id}"),
            source: io::Error::other(panic),
        })
    }

    fn layers(&self, separate_uids: bool) -> Vec<Layer> {
        let enforced = self.groups.limits();
        let limit = |name, limit, stand_in: &str| match enforced.contains(&limit) {
            true => Layer::on(name, self.groups.describe()),
            false => {
                let by = format!("{stand_in} ({})", self.groups.describe());
                Layer::unenforced(name, by, limit, remedy::CGROUP)
            }
        };
        let mut layers = vec![
            limit("memory", Limit::Memory, "RLIMIT_AS for each process alone"),
            limit("cpus", Limit::Cpus, "nothing"),
        ];
        layers.push(match enforced.contains(&Limit::Processes) {
            true => Layer::on("processes", self.groups.describe()),
            // Since Linux 5.14 it counts within the sandbox's own user namespace.
            false => Layer::on("processes", "RLIMIT_NPROC in a user namespace of its own"),
        });
        layers.push(match separate_uids {
            true => Layer::on("uids", "a uid of its own for each sandbox"),
            false => {
                let by = "all sandboxes have the uid of the server's own user";
                Layer::unenforced("uids", by, Limit::Uids, remedy::UIDS)
            }
        });
        layers.extend([
            Layer::on("user", "uid 1000, not root"),
            Layer::on("user_namespace", "one of its own, without rights outside"),
            Layer::on("capabilities", "none, bounding set empty"),
            Layer::on("no_new_privileges", "prctl"),
            Layer::on("seccomp", "config/seccomp.json"),
            Layer::on("root_file_system", "read-only"),
            Layer::on("workspace", "tmpfs with size and inode limits"),
            Layer::on("network", "a namespace with nothing but lo"),
            Layer::on("supervisor", "not dumpable: executed from a file that nobody may read"),
        ]);
        layers
    }
}

impl Live {
    /// PID 1 of the sandbox as this process sees it: the launcher's own number is of another namespace.
    fn pid(&self) -> io::Result<u32> {
        let information = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd()))?;
        let pid = information.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
        pid.ok_or_else(|| io::Error::other("the pidfd tells no pid"))
    }

    /// From now on, since its forker has been forked, a lack of memory takes a run before the supervisor.
    fn prefer_supervisor(&self) {
        let path = self.pid().map(|pid| format!("/proc/{pid}/oom_score_adj"));
        // Only root may; without it the largest process is taken, which is most likely the run's, too.
        let _ = path.and_then(|path| fs::write(path, SUPERVISOR_OOM_SCORE_ADJ));
    }

    /// Whether PID 1 has, as the kernel knows it: sooner than any message does.
    fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut ready = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(poll(&mut ready, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1))
    }

    fn last_words(&self) -> String {
        let mut text = [0; STDERR_BYTES];
        let length = rustix::io::read(&self.stderr, &mut text).unwrap_or(0);
        String::from_utf8_lossy(&text[..length]).trim().to_owned()
    }
}

#[async_trait]
impl Runtime for Embedded {
    fn name(&self) -> &'static str {
        "embedded"
    }

    fn secret(&self) -> KeySecret {
        self.0.secret.clone()
    }

    async fn probe(&self, _first: &SandboxId, _spec: &SandboxSpec) -> Result<Engine> {
        let link = self.0.link().await?;
        let settings = &self.0.settings;
        Ok(Engine {
            version: env!("CARGO_PKG_VERSION").into(),
            rootless: !rustix::process::geteuid().is_root(),
            image: settings.rootfs.as_ref().map_or("host".into(), |path| path.display().to_string()),
            layers: self.0.layers(link.separates_uids()),
        })
    }

    async fn create(&self, spec: &SandboxSpec) -> Result<Sandbox> {
        let (inner, undoing, spec) = (self.0.clone(), self.0.clone(), spec.clone());
        detached("embedded", async move { inner.create(spec).await }, async move |id| {
            let _ = undoing.remove(&id).await; // logged where groups are removed; nobody asks
        })
        .await
    }

    async fn attach(&self, id: &SandboxId) -> Result<Sandbox> {
        Err(Error::Gone(id.clone())) // its stream ended with the server that made it, and so did it
    }

    async fn claim(&self, id: &SandboxId, owner: &SessionKey) -> Result<Claiming> {
        let live = lock(&self.0.alive).get(id).cloned().ok_or_else(|| Error::Gone(id.clone()))?;
        *lock(&live.claim) = Some(Claim { owner: owner.clone(), at: SystemTime::now() });
        Ok(Box::pin(async move {
            tokio::task::yield_now().await; // to the answer that waits for this claim
            live.prefer_supervisor();
            Ok(())
        }))
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let found =
            |(id, live): (&SandboxId, &Arc<Live>)| Found { id: id.clone(), claim: lock(&live.claim).clone() };
        Ok(lock(&self.0.alive).iter().map(found).collect())
    }

    async fn fate(&self, id: &SandboxId) -> Result<Fate> {
        let Some(live) = lock(&self.0.alive).get(id).cloned() else { return Ok(Fate::Gone) };
        if live.has_ended() {
            // The launcher is about to say how; where it is gone too, its own end says enough.
            let _ = tokio::time::timeout(EXIT_WAIT, live.exit.wait()).await;
        }
        // Without a group nobody is killed for want of memory: a call for more fails.
        let kills = lock(&live.group).as_ref().and_then(Group::out_of_memory_kills);
        let out_of_memory_kills = kills.unwrap_or(0);
        Ok(match live.exit.code() {
            None if live.has_ended() => Fate::Gone,
            None => Fate::Running { out_of_memory_kills: Some(out_of_memory_kills) },
            Some(Fate::KILLED) if out_of_memory_kills > 0 => Fate::OutOfMemory,
            Some(code) => Fate::Exited { code, stderr: live.last_words() },
        })
    }

    async fn remove(&self, id: &SandboxId) -> Result<()> {
        self.0.remove(id).await
    }
}

/// Nothing panics while it holds one of these locks, and what they guard is whole at any moment.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
