//! What container engines have in common: how we name and label containers, and what runs in them.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::io::StreamReader;

use super::direct::{Direct, Offer};
use super::guest::{MEMBERSHIPS, TCP_BUFFERS, TIME_WAITS};
use super::{
    Claim, Duplex, Error, Found, KeySecret, Layer, Limit, Result, Sandbox, SandboxId, SandboxSpec, SessionKey,
};

/// A label of every container of ours: whose it is.
pub(super) const INSTANCE_LABEL: &str = "codesandbox.instance";
/// A label of every container of ours: the secret of the keys in their names.
pub(super) const SECRET_LABEL: &str = "codesandbox.secret";

/// Victims of the host's own out-of-memory killer are sandboxes before the server; a run's process raises its
/// own score further, so that within a sandbox it goes before the supervisor.
pub(super) const OOM_SCORE_ADJ: i64 = 500;
/// What no control group may count is small.
pub(super) const SYSCTLS: [(&str, &str); 4] = [
    ("net.ipv4.tcp_rmem", TCP_BUFFERS),
    ("net.ipv4.tcp_wmem", TCP_BUFFERS),
    ("net.ipv4.tcp_max_tw_buckets", TIME_WAITS),
    ("net.ipv4.igmp_max_memberships", MEMBERSHIPS),
];
/// What of /proc tells of the host: the engines' own list, and `interrupts`, whose counters tell of the others.
pub(super) const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// Resource limits that are the same for every sandbox. Message queues and locked memory are outside every
/// memory limit of ours, so they are small.
const RESOURCES: [(&str, u64); 3] = [("core", 0), ("memlock", 64 * 1024), ("msgqueue", 0)];

/// Some hundred times what it takes.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(10);
/// What is kept of a dead supervisor's stderr.
const STDERR_BYTES: usize = 4096;

/// A container engine's part of the configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where its service listens: `unix://…` or `tcp://…`.
    pub url: String,
    /// Tells our containers from another server's.
    pub instance: String,
    /// The image of every sandbox; it needs a `python3`.
    pub image: String,
    /// When the image is fetched.
    pub pull: Pull,
    /// The OCI runtime by the name that the engine has for it; `None`: the engine's default.
    pub runtime: Option<String>,
    /// Whether streams go past the engine where they can.
    pub direct: bool,
    /// `uid:gid` of every sandbox; `None`: a uid of its own for each.
    pub user: Option<String>,
    /// Labels beside our own.
    pub labels: BTreeMap<String, String>,
}

/// When an image is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pull {
    /// Where the engine does not have it.
    Missing,
    /// At every start.
    Always,
    /// Not by us.
    Never,
}

impl Settings {
    /// Whether the image, which is `here` or not, is to be fetched.
    pub(super) fn wants_pull(&self, driver: &str, here: bool) -> Result<bool> {
        match self.pull {
            Pull::Always => Ok(true),
            Pull::Missing => Ok(!here),
            Pull::Never if here => Ok(false),
            Pull::Never => {
                Err(image_missing(driver, &self.image, "the engine has no such image, and pull = \"never\""))
            }
        }
    }

    /// Whether each sandbox has a uid of its own.
    pub(super) fn uids_layer(&self, driver: &str) -> Layer {
        match &self.user {
            None => Layer::on("uids", "a uid of its own for each sandbox"),
            Some(user) => Layer::unenforced(
                "uids",
                format!("{driver}.user gives every sandbox the user {user}"),
                Limit::Uids,
                &format!("leave {driver}.user empty, or name uids in allow_unenforced"),
            ),
        }
    }
}

/// Which limits an engine can put on a container here. What it cannot is not asked for: some engines refuse the container.
#[derive(Debug, Clone, Copy)]
pub(super) struct Enforced {
    pub(super) memory: bool,
    pub(super) cpus: bool,
    pub(super) processes: bool,
}

impl Enforced {
    /// These limits as layers: `by` what they are enforced, by what `engine` the rest is not.
    pub(super) fn layers(self, by: &str, engine: &str, own_uids: bool, remedy: &str) -> [Layer; 3] {
        let limit = |name, limit, holds, controller: &str, stand_in: &str| match holds {
            true => Layer::on(name, by),
            false => {
                let why = format!("{stand_in}: {engine} has no {controller} controller here");
                Layer::unenforced(name, why, limit, remedy)
            }
        };
        [
            limit("memory", Limit::Memory, self.memory, "memory", "RLIMIT_AS for each process alone"),
            limit("cpus", Limit::Cpus, self.cpus, "cpu", "nothing"),
            match (self.processes, own_uids) {
                (false, true) => Layer::on("processes", "RLIMIT_NPROC of a uid of its own for each sandbox"),
                (holds, _) => {
                    let stand_in = "RLIMIT_NPROC of the one user of all sandboxes";
                    limit("processes", Limit::Processes, holds, "pids", stand_in)
                }
            },
        ]
    }
}

/// What runs in a container: the supervisor, handed over on its stdin, so that any image with a `python3` serves.
///
/// Not as an argument: an engine writes a command line to its disk at each change of a container's state.
#[derive(Debug)]
pub(super) struct Program {
    source: &'static str,
    /// As the image's own Python compiled it, in the first container: compiling takes 11 ms, which is a tenth of a start.
    compiled: OnceLock<Vec<u8>>,
    /// Whether new sandboxes are talked to directly, as far as the first one has shown.
    direct: OnceLock<bool>,
}

/// Runs the compiled program, or the source where an image was replaced by one with another Python. Where it gets none,
/// it tells what it has compiled: Python's own cached form, after the number that says whose it is. Where it may, it
/// offers a direct stream, and keeps the engine's for when that one has ended.
const LOADER: &str = "\
import marshal, os, sys
def take(count):
    taken = b''
    while len(taken) < count:
        part = os.read(0, count - len(taken))
        if not part:
            sys.exit('the server went away')
        taken += part
    return taken
compiled, source = (take(int.from_bytes(take(4), 'big')) for _ in range(2))
magic = sys.modules['_frozen_importlib_external'].MAGIC_NUMBER
if compiled.startswith(magic):
    program = marshal.loads(memoryview(compiled)[len(magic):])
else:
    program = compile(source, '<supervisor>', 'exec', optimize=2)
if not compiled:
    compiled = magic + marshal.dumps(program)
    sys.stdout.buffer.write(len(compiled).to_bytes(4, 'big') + compiled)
    sys.stdout.buffer.flush()
if take(1) == b'd':
    import _socket
    own, other = _socket.socketpair()
    token = os.urandom(16)
    own.send(token)
    os.write(1, bytes([other.fileno()]) + token)
    if take(1) == b'd':
        engine = os.dup(0), os.dup(1)
        os.dup2(own.fileno(), 0), os.dup2(own.fileno(), 1)
    del own, other, token
del compiled, source, magic, take
exec(program)
";
/// Whether the loader offers a direct stream, and whether we have it then.
const DIRECTLY: u8 = b'd';
const BY_ENGINE: u8 = b'-';
/// No Python's cached form: the loader compiles the source, and tells nobody.
const UNCOMPILED: &[u8] = &[0];
/// A guess: the compiled supervisor is about 65 KiB.
const COMPILED_BYTES: u32 = 1 << 20;
/// Some thousand times what it takes: 100 KiB, through an engine.
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For the engine to tell a container's process; a direct stream is not worth more. A hundred times what it takes.
const PID_WAIT: Duration = Duration::from_secs(1);

impl Program {
    /// Before anything was compiled.
    pub(super) fn new(source: &'static str, direct: bool) -> Program {
        let direct = if direct { OnceLock::new() } else { OnceLock::from(false) };
        Program { source, compiled: OnceLock::new(), direct }
    }

    /// The command line of a supervisor, which then waits for `load`.
    pub(super) fn supervisor(mode: Mode) -> Vec<String> {
        let mode = match mode {
            Mode::Park => "park",
            Mode::Beside => "beside",
        };
        ["python3", "-I", "-S", "-c", LOADER, mode].map(str::to_owned).to_vec()
    }

    /// Whether one has told: from then on this process knows that the image's python3 can.
    pub(super) fn is_compiled(&self) -> bool {
        self.compiled.get().is_some()
    }

    /// Hands the supervisor over to a process that waits for it.
    pub(super) async fn load(&self, sandbox: Sandbox) -> Result<Sandbox> {
        self.hand_over(self.compiled.get().map_or(UNCOMPILED, Vec::as_slice), BY_ENGINE, sandbox).await
    }

    /// Likewise in a container that is new; the first one compiles it for all that follow. In no other one: whose word
    /// this is, is then the image's, and no guest's. What a container has said on its stderr is in `words`.
    ///
    /// `pid` is that of the container's first process, as the engine tells it.
    pub(super) async fn load_new(
        &self,
        sandbox: Sandbox,
        words: &AllLastWords,
        pid: impl Future<Output = Result<i32>>,
    ) -> Result<Sandbox> {
        let wanted = if *self.direct.get().unwrap_or(&true) { DIRECTLY } else { BY_ENGINE };
        let compiled = self.compiled.get().map_or(&[][..], Vec::as_slice);
        let mut sandbox = self.hand_over(compiled, wanted, sandbox).await?;
        if compiled.is_empty() {
            self.learn(&mut sandbox, words).await?;
        }
        if wanted == BY_ENGINE {
            return Ok(sandbox);
        }
        let directed = tokio::time::timeout(LOAD_TIMEOUT, self.go_direct(sandbox, pid)).await;
        let directed = directed.unwrap_or_else(|late| Err(io::Error::other(late)));
        directed.map_err(Error::failed("hand over the supervisor"))
    }

    async fn learn(&self, sandbox: &mut Sandbox, words: &AllLastWords) -> Result<()> {
        let told = tokio::time::timeout(COMPILE_TIMEOUT, told(&mut sandbox.stream)).await;
        let told = told.unwrap_or_else(|late| Err(io::Error::other(late)));
        let compiled = told.map_err(|error| Error::Unusable {
            what: "compile the supervisor with the image's python3".into(),
            why: format!("{error} {}", words.of(&sandbox.id)).trim().to_owned(),
            remedy: "set image to one with a python3 from 3.8 to 3.14".into(),
        })?;
        let _ = self.compiled.set(compiled); // several may be the first
        Ok(())
    }

    async fn go_direct(
        &self,
        mut sandbox: Sandbox,
        pid: impl Future<Output = Result<i32>>,
    ) -> io::Result<Sandbox> {
        let pid = tokio::time::timeout(PID_WAIT, pid);
        let (offer, pid) = tokio::join!(Offer::read(&mut sandbox.stream), pid);
        let offer = offer?;
        let pid = pid.map_err(io::Error::other).and_then(|told| told.map_err(io::Error::other));
        let known = self.direct.get().is_some();
        let taken = pid.and_then(|pid| {
            let taken = offer.take(pid);
            let _ = self.direct.set(taken.is_ok()); // several may be the first; an engine that is slow shows nothing
            taken
        });
        sandbox.stream.write_all(&[if taken.is_ok() { DIRECTLY } else { BY_ENGINE }]).await?;
        sandbox.stream.flush().await?;
        match taken {
            Ok(stream) => sandbox.stream = Box::new(Direct::new(stream, sandbox.stream)),
            Err(error) if known => tracing::debug!(sandbox = %sandbox.id, %error, "no direct stream"),
            Err(error) => {
                tracing::info!(%error, "sandboxes are talked to through the engine, which takes longer")
            }
        }
        Ok(sandbox)
    }

    async fn hand_over(&self, compiled: &[u8], how: u8, mut sandbox: Sandbox) -> Result<Sandbox> {
        let mut bytes = Vec::new();
        for part in [compiled, self.source.as_bytes()] {
            bytes.extend_from_slice(&(part.len() as u32).to_be_bytes());
            bytes.extend_from_slice(part);
        }
        bytes.push(how);
        let loading = async {
            sandbox.stream.write_all(&bytes).await?;
            sandbox.stream.flush().await
        };
        let loaded = tokio::time::timeout(LOAD_TIMEOUT, loading).await;
        let loaded = loaded.unwrap_or_else(|late| Err(io::Error::other(late)));
        loaded.map_err(Error::failed("hand over the supervisor"))?;
        Ok(sandbox)
    }
}

/// What the first loader has compiled.
async fn told(stream: &mut Duplex) -> io::Result<Vec<u8>> {
    let length = stream.read_u32().await?;
    if !(1..=COMPILED_BYTES).contains(&length) {
        return Err(io::Error::other("it said something else"));
    }
    let mut compiled = vec![0; length as usize];
    stream.read_exact(&mut compiled).await?;
    Ok(compiled)
}

/// See supervisor/program/prelude.py.
#[derive(Debug, Clone, Copy)]
pub(super) enum Mode {
    /// PID 1; at the end of its stream it stays, to hold the sandbox.
    Park,
    /// A second one, beside a parked PID 1.
    Beside,
}

/// Resource limits by their names without `RLIMIT_`, in lower case.
///
/// Not `nproc`: the engine's runtime sets them while it still is the engine's own user, of whose processes there
/// may be more, and then no container starts. The supervisor sets it for each run.
pub(super) fn resources(spec: &SandboxSpec) -> impl Iterator<Item = (&'static str, u64)> {
    RESOURCES.into_iter().chain([("nofile", spec.open_files)])
}

/// The names of this instance's containers: unclaimed, `codesandbox-INSTANCE-new-RANDOM`; claimed,
/// `codesandbox-INSTANCE-KEY-TIME`, with the session's key and the milliseconds of the claim in hex; and
/// `codesandbox-INSTANCE-helper-RANDOM` for those that a driver makes for itself.
///
/// The time keeps apart a session's new sandbox and its last one, which may still be on its way out.
#[derive(Debug, Clone)]
pub(super) struct Names(String);

impl Names {
    pub(super) fn new(instance: &str) -> Names {
        Names(format!("codesandbox-{instance}-"))
    }

    /// For a container that nobody has claimed.
    pub(super) fn unclaimed(&self) -> Result<String> {
        self.random("new")
    }

    /// For one that is no sandbox, and lives for one call.
    pub(super) fn helper(&self) -> Result<String> {
        self.random("helper")
    }

    fn random(&self, what: &str) -> Result<String> {
        let random = getrandom::u64().map_err(|error| Error::Failed {
            what: "name a new sandbox".into(),
            source: io::Error::other(error),
        })?;
        Ok(format!("{}{what}-{random:016x}", self.0))
    }

    /// For one that `owner` claims now.
    pub(super) fn claimed(&self, owner: &SessionKey, at: SystemTime) -> String {
        let millis = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        format!("{}{owner}-{millis:x}", self.0)
    }

    /// A regular expression for the names of claimed ones.
    pub(super) fn claimed_pattern(&self) -> String {
        format!("^{}[0-9a-f]+-[0-9a-f]+$", self.0)
    }

    /// Who claimed a container of that name, if anyone did.
    pub(super) fn claim_of(&self, name: &str) -> Option<Claim> {
        let (owner, millis) = name.trim_start_matches('/').strip_prefix(&self.0)?.split_once('-')?;
        let hex = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let at = u64::from_str_radix(millis, 16).ok().filter(|_| hex(owner))?;
        Some(Claim { owner: SessionKey(owner.to_owned()), at: UNIX_EPOCH + Duration::from_millis(at) })
    }

    /// A container as `Runtime::list` gives it. A helper is one that nobody has claimed: where its removal failed it
    /// is cleared up as such.
    pub(super) fn found(&self, Listed { id, name, .. }: Listed) -> Found {
        Found { id, claim: self.claim_of(&name) }
    }
}

/// A container of this instance, as an engine lists it.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) id: SandboxId,
    /// With a slash before it where Docker gives it.
    pub(super) name: String,
    secret: Option<KeySecret>,
}

impl Listed {
    /// `None` for one without an id, which no engine lists.
    pub(super) fn new(
        id: Option<String>,
        names: Option<Vec<String>>,
        labels: Option<HashMap<String, String>>,
    ) -> Option<Listed> {
        let name = names.into_iter().flatten().next().unwrap_or_default();
        let secret = labels.and_then(|labels| KeySecret::from_hex(labels.get(SECRET_LABEL)?));
        Some(Listed { id: SandboxId(id?), name, secret })
    }
}

/// The secret that names our containers; a new one where there is none. That of a claimed one comes first: a server
/// that was killed as it started may have left a helper with another.
pub(super) fn secret_of(names: &Names, containers: &[Listed]) -> KeySecret {
    let claimed = containers.iter().filter(|container| names.claim_of(&container.name).is_some());
    let secret = claimed.chain(containers).find_map(|container| container.secret.clone());
    secret.unwrap_or_else(KeySecret::random)
}

/// The labels of every container of ours.
pub(super) fn labels(settings: &Settings, secret: &KeySecret) -> BTreeMap<String, String> {
    let own = [(INSTANCE_LABEL, settings.instance.clone()), (SECRET_LABEL, secret.to_hex())];
    let own = own.into_iter().map(|(name, value)| (name.to_owned(), value));
    settings.labels.clone().into_iter().chain(own).collect()
}

/// Uids, each for one sandbox, as long as no more than `many` of them are alive.
///
/// What the kernel counts by user (processes, inotify watches, pending signals) is then each sandbox's own.
#[derive(Debug)]
pub(super) struct Uids {
    first: u32,
    many: u32,
    next: AtomicU32,
}

impl Uids {
    pub(super) fn new(first: u32, many: u32) -> Uids {
        // Begins anywhere, since sandboxes of an earlier server may be alive.
        let next = AtomicU32::new(getrandom::u32().unwrap_or(0));
        Uids { first, many: many.max(1), next }
    }

    /// `uid:gid`
    pub(super) fn next(&self) -> String {
        let id = self.first + self.next.fetch_add(1, Ordering::Relaxed) % self.many;
        format!("{id}:{id}")
    }
}

/// A piece of a container's output.
#[derive(Debug)]
pub(super) enum Output {
    /// Of the stream that the floors above read.
    Stdout(Bytes),
    /// Of what is kept as last words.
    Stderr(Bytes),
}

/// The end of what a container wrote to its stderr.
#[derive(Debug, Clone, Default)]
pub(super) struct LastWords(Arc<Mutex<Vec<u8>>>);

impl LastWords {
    fn add(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(bytes);
        let surplus = kept.len().saturating_sub(STDERR_BYTES);
        kept.drain(..surplus);
    }
}

impl fmt::Display for LastWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        f.write_str(String::from_utf8_lossy(&kept).trim())
    }
}

/// The last words of the containers that this process attached to.
#[derive(Debug, Default)]
pub(super) struct AllLastWords(Mutex<HashMap<SandboxId, LastWords>>);

impl AllLastWords {
    /// Empty ones, for a container that is being attached to.
    pub(super) fn begin(&self, id: &SandboxId) -> LastWords {
        let words = LastWords::default();
        self.kept().insert(id.clone(), words.clone());
        words
    }

    pub(super) fn of(&self, id: &SandboxId) -> String {
        self.kept().get(id).map(LastWords::to_string).unwrap_or_default()
    }

    pub(super) fn forget(&self, id: &SandboxId) {
        self.kept().remove(id);
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<SandboxId, LastWords>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Logs how long the engine took, for who wonders what a start is waiting for.
pub(super) async fn timed<T>(call: &'static str, answer: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let answer = answer.await;
    tracing::debug!(call, took = ?begun.elapsed(), "the engine was asked");
    answer
}

/// What is left of a creation that nobody wants, or that failed, has been removed, or the log says so.
pub(super) fn undone(removed: Result<()>) {
    removed.unwrap_or_else(|error| tracing::warn!(%error, "a container that nobody wants may be left"));
}

/// One stream of an attached container's three.
pub(super) fn duplex(
    output: impl Stream<Item = io::Result<Output>> + Send + 'static,
    input: impl AsyncWrite + Send + Unpin + 'static,
    words: LastWords,
) -> Duplex {
    let stdout = output.filter_map(move |output| {
        std::future::ready(match output {
            Ok(Output::Stdout(bytes)) => Some(Ok(bytes)),
            Ok(Output::Stderr(bytes)) => {
                words.add(&bytes);
                None
            }
            Err(error) => Some(Err(error)),
        })
    });
    Box::new(tokio::io::join(StreamReader::new(Box::pin(stdout)), input))
}

/// What an engine's error message says is true of both engines, since both pass on the kernel's words.
pub(super) fn is_no_space(message: &str) -> bool {
    let message = message.to_lowercase(); // Go writes it small, and C large
    message.contains("no space left on device") || message.contains("disk quota exceeded")
}

/// Where the image is not there and may not be fetched.
pub(super) fn image_missing(driver: &str, image: &str, why: &str) -> Error {
    Error::ImageMissing {
        image: image.into(),
        why: why.trim().to_owned(),
        remedy: format!("{driver} pull {image}   (or set image, or pull = \"missing\" and start again)"),
    }
}

/// Where the image could not be fetched.
pub(super) fn pull_failed(driver: &str, image: &str, why: &str) -> Error {
    Error::Unusable {
        what: format!("pull the image {image}"),
        why: why.trim().to_owned(),
        remedy: format!("see what `{driver} pull {image}` says; or set image to one that is there"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_who_claimed_when_and_nothing_else_passes_for_a_claim() {
        let names = Names::new("a-b_c");
        let owner = SessionKey("00ff".repeat(8));
        let at = UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        let claimed = names.claimed(&owner, at);
        assert_eq!(names.claim_of(&claimed), Some(Claim { owner: owner.clone(), at }));
        assert_eq!(names.claim_of(&format!("/{claimed}")), Some(Claim { owner, at }), "as Docker lists it");
        assert_eq!(names.claim_of(&names.unclaimed().unwrap()), None);
        let helper = names.helper().unwrap();
        assert_eq!(names.claim_of(&helper), None);
        for other in ["codesandbox-a-b_c-", "codesandbox-other-00ff-1", "x", "codesandbox-a-b_c-00ff", ""] {
            assert_eq!(names.claim_of(other), None, "{other}");
        }
    }

    #[test]
    fn the_secret_is_that_of_the_claimed() {
        let names = Names::new("i");
        let listed = |name: String, secret: &KeySecret| {
            let labels = HashMap::from([(SECRET_LABEL.to_owned(), secret.to_hex())]);
            Listed::new(Some("id".into()), Some(vec![name]), Some(labels)).unwrap()
        };
        let (one, other) = (KeySecret([1; 32]), KeySecret([2; 32]));
        let helper = listed(names.helper().unwrap(), &one);
        let claimed = listed(names.claimed(&SessionKey("00".into()), UNIX_EPOCH), &other);
        assert!(secret_of(&names, &[helper, claimed]) == other);
        assert!(secret_of(&names, &[listed(names.helper().unwrap(), &one)]) == one);
    }

    #[test]
    fn uids_stay_in_their_range_and_differ() {
        let uids = Uids::new(100, 3);
        let mut seen: Vec<_> = (0..3).map(|_| uids.next()).collect();
        seen.sort();
        assert_eq!(seen, ["100:100", "101:101", "102:102"]);
    }

    #[test]
    fn last_words_are_the_last() {
        let words = LastWords::default();
        words.add(&[b'a'; 5000]);
        words.add(b"the end\n");
        let text = words.to_string();
        assert_eq!(text.len(), STDERR_BYTES - 1);
        assert!(text.ends_with("the end"), "{text}");
    }

    #[tokio::test]
    async fn stdout_is_the_stream_and_stderr_is_not() {
        use tokio::io::AsyncReadExt;
        let (words, part) = (LastWords::default(), Bytes::from_static);
        let output = [Output::Stdout(part(b"a")), Output::Stderr(part(b"oops")), Output::Stdout(part(b"b"))];
        let output = futures_util::stream::iter(output.map(Ok));
        let mut text = String::new();
        duplex(output, tokio::io::sink(), words.clone()).read_to_string(&mut text).await.unwrap();
        assert_eq!((text.as_str(), words.to_string().as_str()), ("ab", "oops"));
    }

    fn sandbox() -> (Sandbox, tokio::io::DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        (Sandbox { id: SandboxId("a".into()), stream: Box::new(ours) }, theirs)
    }

    async fn nobody() -> Result<i32> {
        Ok(0)
    }

    /// What the loader gets: the compiled program, the source, and how it is talked to.
    async fn handed_over(theirs: &mut tokio::io::DuplexStream) -> [Vec<u8>; 2] {
        let mut parts = [Vec::new(), Vec::new()];
        for part in &mut parts {
            part.resize(theirs.read_u32().await.unwrap() as usize, 0);
            theirs.read_exact(part).await.unwrap();
        }
        assert_eq!(theirs.read_u8().await.unwrap(), BY_ENGINE);
        parts
    }

    #[tokio::test]
    async fn a_new_container_compiles_for_all_that_follow() {
        let program = Program::new("source", false);
        let ((first, mut loader), words) = (sandbox(), AllLastWords::default());
        let compile = async {
            assert_eq!(handed_over(&mut loader).await, [b"".to_vec(), b"source".to_vec()]);
            loader.write_all(b"\0\0\0\x08compiledhello").await.unwrap();
        };
        let (loaded, ()) = tokio::join!(program.load_new(first, &words, nobody()), compile);
        let mut hello = [0; 5];
        loaded.unwrap().stream.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"hello");
        for new in [true, false] {
            let (next, mut loader) = sandbox();
            let loaded =
                if new { program.load_new(next, &words, nobody()).await } else { program.load(next).await };
            let _stream = loaded.unwrap();
            assert_eq!(handed_over(&mut loader).await, [b"compiled".to_vec(), b"source".to_vec()]);
        }
    }

    /// A guest may have been there: what it would tell is no program of ours.
    #[tokio::test]
    async fn a_container_that_is_not_new_is_never_asked_what_it_has_compiled() {
        let program = Program::new("source", false);
        let (old, mut loader) = sandbox();
        let _stream = program.load(old).await.unwrap();
        assert_eq!(handed_over(&mut loader).await, [UNCOMPILED.to_vec(), b"source".to_vec()]);
        assert!(!program.is_compiled());
    }

    #[tokio::test]
    async fn an_image_that_says_something_else_is_unusable() {
        for said in [&b"\0\0\0\0"[..], b"\xff\xff\xff\xff", b"\0\0\0\x08half"] {
            let program = Program::new("source", false);
            let ((first, mut loader), words) = (sandbox(), AllLastWords::default());
            let say = async {
                handed_over(&mut loader).await;
                loader.write_all(said).await.unwrap();
                drop(loader);
            };
            let (loaded, ()) = tokio::join!(program.load_new(first, &words, nobody()), say);
            assert!(matches!(loaded, Err(Error::Unusable { .. })), "{said:?}");
            assert!(!program.is_compiled());
        }
    }
}
