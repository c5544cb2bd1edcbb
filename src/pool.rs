//! Floor 4: how many sandboxes exist, and which of them are warm.
//!
//! A permit of the capacity travels with each sandbox and comes back after its removal, so that no
//! moment has more sandboxes than `Settings::capacity`. A sandbox is never given to a second user.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::metrics::{Counted, Metrics};
use crate::runtime::{self, Fate, SandboxId, SandboxSpec, SessionKey, SharedRuntime};
use crate::supervisor::{self, Caps, Supervisor};

/// After a failed creation or removal; doubled up to the last with each more.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// A driver's removal that takes longer is tried again.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(20);

/// What the pool is to hold, and what its sandboxes are.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Sandboxes made ahead of anyone who wants them.
    pub size: usize,
    /// Creations at once.
    pub starting_max: usize,
    /// Sandboxes that may exist, in whatever state.
    pub capacity: usize,
    /// From asking the engine to the supervisor's hello.
    pub create_timeout: Duration,
    /// The limits of each.
    pub spec: SandboxSpec,
    /// The caps of their runs.
    pub caps: Caps,
}

/// Why a claim failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The engine's part.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The new sandbox's part.
    #[error("a new sandbox did not come up: {0}")]
    Supervisor(#[from] supervisor::Error),
    /// It took longer than `create_timeout`.
    #[error("the engine did not make a sandbox within {0:?}")]
    Late(Duration),
    /// As many sandboxes exist as may.
    #[error("as many sandboxes exist as may")]
    Full,
}

impl Error {
    /// Whether the sandbox that was asked for cannot be used any more: an engine that does not answer proves nothing.
    pub fn proves_a_loss(&self) -> bool {
        matches!(self, Error::Runtime(runtime::Error::Gone(_)) | Error::Supervisor(_))
    }

    /// A word for it: a metric label.
    fn reason(&self) -> &'static str {
        match self {
            Error::Runtime(error) => error.reason(),
            Error::Supervisor(_) => "silent",
            Error::Late(_) => "late",
            Error::Full => "full",
        }
    }
}

/// The sandboxes of a server. A cheap handle; the last one to go stops the making of more.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    runtime: SharedRuntime,
    settings: Settings,
    metrics: Arc<Metrics>,
    capacity: Arc<Semaphore>,
    starting: Semaphore,
    warm: Mutex<VecDeque<Ready>>,
    wanted: Arc<Notify>,
    failing: AtomicBool,
}

/// A sandbox that waits for its user.
#[derive(Debug)]
struct Ready {
    held: Held,
    _counted: Counted,
}

/// A sandbox with everything that goes with it. Dropping it has it removed.
#[derive(Debug)]
pub struct Held {
    /// The engine's name for it.
    pub id: SandboxId,
    /// The conversation with it.
    pub supervisor: Supervisor,
    /// Last, so that the supervisor's stream is dropped before: an attached one can wedge an engine's removal.
    disposal: Disposal,
}

/// Whoever drops it has the sandbox removed in the background: until it is gone, however often that takes.
#[derive(Debug)]
struct Disposal {
    runtime: SharedRuntime,
    id: SandboxId,
    permit: Option<OwnedSemaphorePermit>,
    metrics: Arc<Metrics>,
}

impl Drop for Disposal {
    fn drop(&mut self) {
        let Ok(tasks) = tokio::runtime::Handle::try_current() else {
            return; // the program ends; its engine cleans up, or the next server does
        };
        tasks.spawn(remove(self.runtime.clone(), self.id.clone(), self.permit.take(), self.metrics.clone()));
    }
}

/// A claimed sandbox that nobody is attached to: an earlier server's, or one whose stream broke. Dropping it has it
/// removed.
#[derive(Debug)]
pub struct Kept {
    since: Instant,
    named: Option<Naming>,
    disposal: Disposal,
    counted: Counted,
}

/// The engine is being told whose a sandbox is.
type Naming = JoinHandle<runtime::Result<()>>;

impl Kept {
    /// Taken up again, now that somebody talks to it.
    pub fn attached(self, supervisor: Supervisor) -> Claimed {
        let Kept { since, named, disposal, counted } = self;
        let held = Held { id: disposal.id.clone(), supervisor, disposal };
        Claimed { held, since, named, counted }
    }
}

/// A sandbox that belongs to a session.
#[derive(Debug)]
pub struct Claimed {
    /// The sandbox.
    pub held: Held,
    /// When the session got it.
    pub since: Instant,
    /// The engine is being told whose it is, beside the first run.
    named: Option<Naming>,
    counted: Counted,
}

impl Claimed {
    /// Gives up the stream, and not the sandbox.
    pub fn let_go(self) -> Kept {
        let Claimed { held: Held { id: _, supervisor, disposal }, since, named, counted } = self;
        drop(supervisor);
        Kept { since, named, disposal, counted }
    }

    /// Waits until a later server would find whose it is.
    ///
    /// # Errors
    /// Where the engine could not be told: nothing that is in it would outlive this server.
    pub async fn is_named(&mut self) -> runtime::Result<()> {
        let Some(naming) = &mut self.named else { return Ok(()) };
        let named = naming.await; // a caller who goes away here leaves the question to the next one
        self.named = None;
        named.unwrap_or_else(|panic| {
            Err(runtime::Error::Failed { what: "claim".into(), source: std::io::Error::other(panic) })
        })
    }
}

impl Pool {
    /// A pool that begins to fill at once.
    pub fn new(runtime: SharedRuntime, settings: Settings, metrics: Arc<Metrics>) -> Pool {
        let pool = Pool(Arc::new(Inner {
            runtime,
            metrics,
            capacity: Arc::new(Semaphore::new(settings.capacity)),
            starting: Semaphore::new(settings.starting_max.max(1)),
            settings,
            warm: Mutex::default(),
            wanted: Arc::new(Notify::new()),
            failing: AtomicBool::new(false),
        }));
        if pool.0.settings.size > 0 {
            tokio::spawn(fill(Arc::downgrade(&pool.0), pool.0.wanted.clone())); // ends with the pool
        }
        pool
    }

    /// The engine below.
    pub fn runtime(&self) -> &SharedRuntime {
        &self.0.runtime
    }

    /// Whether none is warm and the last creation failed.
    pub fn is_failing(&self) -> bool {
        self.0.failing.load(Ordering::SeqCst) && self.warm() == 0
    }

    /// Sandboxes that wait for a user.
    pub fn warm(&self) -> usize {
        self.0.warm().len()
    }

    /// A sandbox for a session: a warm one, else a new one.
    pub async fn claim(&self, owner: &SessionKey) -> Result<Claimed, Error> {
        let (held, how) = match self.take_warm().await {
            Some(held) => (held, "hit"),
            None => (self.make().await?, "miss"),
        };
        self.0.metrics.claims.with_label_values(&[how]).inc();
        let (pool, id, owner) = (self.0.clone(), held.id.clone(), owner.clone());
        let naming = async move {
            let named = pool.runtime.claim(&id, &owner).await;
            named.inspect_err(|error| pool.failed("claim", error.reason()))
        };
        let named = Some(tokio::spawn(naming));
        Ok(Claimed { held, since: Instant::now(), named, counted: self.0.counted("claimed") })
    }

    /// Takes over a sandbox of an earlier server, claimed at `since`; `None`, and it is removed, where as many
    /// exist as may.
    pub fn keep(&self, id: SandboxId, since: Instant) -> Option<Kept> {
        let permit = self.0.capacity.clone().try_acquire_owned().ok();
        let full = permit.is_none();
        let disposal = self.0.disposal(id, permit);
        (!full).then(|| Kept { since, named: None, disposal, counted: self.0.counted("claimed") })
    }

    /// Removes a sandbox of an earlier server: one that nobody claimed is given to nobody, since a crash may
    /// have come between its use and the claim.
    pub fn discard(&self, id: SandboxId) {
        drop(self.0.disposal(id, self.0.capacity.clone().try_acquire_owned().ok()));
    }

    /// Talks to a kept sandbox again. May be dropped at any await, and tried again.
    pub async fn attach(&self, kept: &Kept) -> Result<Supervisor, Error> {
        let limit = self.0.settings.create_timeout;
        let deadline = Instant::now() + limit;
        let attached = tokio::time::timeout_at(deadline, self.0.runtime.attach(&kept.disposal.id)).await;
        let attached = attached.map_err(|_| Error::Late(limit)).and_then(|attached| Ok(attached?));
        let sandbox = attached.inspect_err(|error| self.0.failed("attach", error.reason()))?;
        let (supervisor, _) = Supervisor::attach(sandbox.stream, &self.0.settings.caps, deadline).await?;
        Ok(supervisor)
    }

    /// Removes all that waits and makes no more; what is claimed is its session's to give back.
    pub async fn close(&self) {
        self.0.starting.close();
        let warm: Vec<_> = self.0.warm().drain(..).collect();
        drop(warm);
        let all = u32::try_from(self.0.settings.capacity).unwrap_or(u32::MAX);
        let _ = self.0.capacity.acquire_many(all).await; // every permit is back: every sandbox is gone
    }

    async fn take_warm(&self) -> Option<Held> {
        loop {
            let Ready { held, _counted } = self.0.warm().pop_front()?;
            self.0.wanted.notify_one();
            // It may have died while it waited.
            if matches!(self.0.runtime.fate(&held.id).await, Ok(Fate::Running { .. })) {
                return Some(held);
            }
        }
    }

    /// In a task of its own: a client that goes away leaves a sandbox that the next one gets.
    async fn make(&self) -> Result<Held, Error> {
        let pool = self.clone();
        let (send, receive) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            if let Err(Ok(unwanted)) = send.send(pool.0.make().await) {
                pool.keep_or_discard(unwanted);
            }
        });
        receive.await.unwrap_or(Err(Error::Full))
    }

    fn keep_or_discard(&self, held: Held) {
        if self.warm() < self.0.settings.size {
            self.0.keep(held);
        }
    }
}

impl Inner {
    fn warm(&self) -> MutexGuard<'_, VecDeque<Ready>> {
        self.warm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counted(&self, state: &str) -> Counted {
        Counted::new(self.metrics.sandboxes.with_label_values(&[state]))
    }

    fn failed(&self, operation: &str, reason: &str) {
        self.metrics.engine_errors.with_label_values(&[operation, reason]).inc();
    }

    fn disposal(&self, id: SandboxId, permit: Option<OwnedSemaphorePermit>) -> Disposal {
        Disposal { runtime: self.runtime.clone(), id, permit, metrics: self.metrics.clone() }
    }

    fn keep(&self, held: Held) {
        let ready = Ready { held, _counted: self.counted("warm") };
        let mut warm = self.warm();
        // Looked at under the lock that `close` empties under: nothing is kept behind its back.
        if !self.starting.is_closed() {
            warm.push_back(ready);
        }
    }

    async fn make(&self) -> Result<Held, Error> {
        // What is being removed gives its place back soon.
        let permit = self.capacity.clone().acquire_owned();
        let permit = tokio::time::timeout(self.settings.create_timeout, permit).await;
        let permit = permit.map_err(|_| Error::Full)?.map_err(|_| Error::Full)?;
        let _turn = self.starting.acquire().await.map_err(|_| Error::Full)?;
        let made = self.start(permit).await;
        self.failing.store(made.is_err(), Ordering::SeqCst);
        made
    }

    async fn start(&self, permit: OwnedSemaphorePermit) -> Result<Held, Error> {
        let _counted = self.counted("starting");
        let begun = Instant::now();
        let limit = self.settings.create_timeout;
        let made = tokio::time::timeout(limit, self.runtime.create(&self.settings.spec)).await;
        let made = made.map_err(|_| Error::Late(limit)).and_then(|made| Ok(made?));
        let sandbox = made.inspect_err(|error| self.failed("create", error.reason()))?;
        let disposal = self.disposal(sandbox.id.clone(), Some(permit));
        match Supervisor::attach(sandbox.stream, &self.settings.caps, begun + limit).await {
            Ok((supervisor, _)) => {
                self.metrics.create_seconds.observe(begun.elapsed().as_secs_f64());
                Ok(Held { id: sandbox.id, supervisor, disposal })
            }
            Err(error) => {
                self.failed("attach", "silent");
                let fate = self.runtime.fate(&sandbox.id).await;
                tracing::warn!(sandbox = %sandbox.id, %error, ?fate, "a new sandbox did not come up");
                Err(error.into())
            }
        }
    }
}

/// Keeps the pool full for as long as there is one.
async fn fill(pool: Weak<Inner>, wanted: Arc<Notify>) {
    let mut pause = RETRY.0;
    loop {
        let Some(inner) = pool.upgrade() else { return };
        if inner.starting.is_closed() {
            return;
        }
        if inner.warm().len() >= inner.settings.size {
            drop(inner);
            // Woken by each claim; now and then also looks whether the pool still exists.
            let _ = tokio::time::timeout(RETRY.1, wanted.notified()).await;
            continue;
        }
        match inner.make().await {
            Ok(held) => {
                pause = RETRY.0;
                inner.keep(held);
            }
            Err(error) => {
                tracing::warn!(%error, retry_in = ?pause, "cannot make a sandbox for the pool");
                drop(inner);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
            }
        }
    }
}

async fn remove(
    runtime: SharedRuntime,
    id: SandboxId,
    permit: Option<OwnedSemaphorePermit>,
    metrics: Arc<Metrics>,
) {
    let _counted = Counted::new(metrics.sandboxes.with_label_values(&["removing"]));
    let mut pause = RETRY.0;
    loop {
        let (reason, why) = match tokio::time::timeout(REMOVE_TIMEOUT, runtime.remove(&id)).await {
            Ok(Ok(())) => break,
            Ok(Err(error)) => (error.reason(), error.to_string()),
            Err(_) => ("late", format!("no answer within {REMOVE_TIMEOUT:?}")),
        };
        metrics.engine_errors.with_label_values(&["remove", reason]).inc();
        tracing::warn!(sandbox = %id, error = why, retry_in = ?pause, "cannot remove a sandbox");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
    drop(permit);
}
