//! Floor 4: how many sandboxes exist, and which of them are warm.
//!
//! `capacity` counts what exists, `ledger` decides who gets what, `lease` sees to it that what was made is
//! removed. A sandbox is never given to a second user.

mod capacity;
mod lease;
mod ledger;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::Instant;

use crate::metrics::{Counted, Metrics};
use crate::runtime::{self, Fate, Found, SandboxId, SandboxSpec, SessionKey, SharedRuntime};
use crate::supervisor::{self, Caps, Supervisor};
use capacity::{Capacity, Permit};
pub(crate) use lease::REMOVE_TIMEOUT;
pub use lease::{Claimed, Held, Kept};
use lease::{Engine, Made, Ready};
use ledger::{Claim, Ledger, Plan};

/// Times that a sandbox is attached to while the engine says that it runs: of a stream that ends at once, and of one
/// that says nothing for all of `create_timeout`. Guesses: an engine that comes back loses some streams in a row.
const ENDED_MOST: u32 = 5;
const SILENT_MOST: u32 = 2;
/// Between two of them, and longer each time: 0.5 s in all. A guess.
const ATTACH_PAUSE: Duration = Duration::from_millis(50);

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
    /// How long a claim waits for a sandbox.
    pub wait_timeout: Duration,
    /// A warm sandbox of that age is replaced.
    pub recycle_after: Duration,
    /// That long after the last claim no more are made ahead; `None`: always.
    pub idle_after: Option<Duration>,
    /// What the pauses after failures are varied by: another number for each server.
    pub seed: u64,
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
    /// The sandbox's part.
    #[error("a sandbox did not come up: {0}")]
    Supervisor(#[from] supervisor::Error),
    /// It took longer than `create_timeout`.
    #[error("the engine did not answer within {0:?}")]
    Late(Duration),
    /// The last creations failed; the log has told why.
    #[error("the engine makes no sandboxes")]
    Failing {
        /// Until the next one is tried.
        retry_after: Duration,
        /// What the last one failed for: see `trouble`.
        trouble: &'static str,
    },
    /// So many wait for a sandbox that one more would wait for longer than `wait_timeout`.
    #[error("too many wait for a sandbox")]
    Crowded {
        /// How long the wait is now, by the measured rate.
        retry_after: Duration,
    },
    /// The pool makes no more.
    #[error("the pool is closed")]
    Closed,
}

impl Error {
    /// Whether the sandbox that was asked for cannot be used any more: an engine that does not answer proves nothing.
    pub fn proves_a_loss(&self) -> bool {
        matches!(self, Error::Runtime(runtime::Error::Gone(_)) | Error::Supervisor(_))
    }

    /// What a client may know of it: no names, no paths.
    pub fn trouble(&self) -> &'static str {
        match self {
            Error::Runtime(runtime::Error::ImageMissing { .. }) => "the image of the sandboxes is missing",
            Error::Runtime(runtime::Error::NoSpace { .. }) => "the engine has no space left",
            Error::Runtime(runtime::Error::Unavailable { .. }) | Error::Late(_) => ledger::SILENCE,
            Error::Runtime(_) => "the engine has failed",
            Error::Supervisor(_) => "a sandbox did not come up",
            Error::Failing { trouble, .. } => trouble,
            Error::Crowded { .. } => "too many wait for one",
            Error::Closed => "the server is stopping",
        }
    }

    /// When trying again makes sense, where that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Error::Failing { retry_after, .. } | Error::Crowded { retry_after } => Some(*retry_after),
            Error::Runtime(_) | Error::Supervisor(_) | Error::Late(_) | Error::Closed => None,
        }
    }

    /// A word for it: a metric label.
    fn reason(&self) -> &'static str {
        match self {
            Error::Runtime(error) => error.reason(),
            Error::Supervisor(_) => "silent",
            Error::Late(_) => "late",
            Error::Failing { .. } => "failing",
            Error::Crowded { .. } => "crowded",
            Error::Closed => "closed",
        }
    }
}

/// The sandboxes of a server. A cheap handle; the last one to go stops the making of more.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    engine: Engine,
    settings: Settings,
    capacity: Arc<Capacity>,
    /// Kept sandboxes that may be attached to at once: those who come back all together are served in order, the
    /// first of them soon.
    attaching: Semaphore,
    ledger: Mutex<Ledger<Ready>>,
    /// Told of everything that may call for a creation.
    changed: Arc<Notify>,
}

impl Pool {
    /// A pool that begins to fill at once.
    pub fn new(runtime: SharedRuntime, settings: Settings, metrics: Arc<Metrics>) -> Pool {
        let plan = Plan {
            size: settings.size,
            starting_max: settings.starting_max.max(1),
            wait_timeout: settings.wait_timeout,
            recycle_after: settings.recycle_after,
            idle_after: settings.idle_after,
        };
        metrics.capacity.set(settings.capacity as i64);
        let pool = Pool(Arc::new(Inner {
            engine: Engine::new(runtime, metrics, settings.seed),
            capacity: Capacity::new(settings.capacity),
            attaching: Semaphore::new(plan.starting_max),
            settings,
            ledger: Mutex::new(Ledger::new(plan, Instant::now())),
            changed: Arc::new(Notify::new()),
        }));
        tokio::spawn(keep(Arc::downgrade(&pool.0), pool.0.capacity.clone(), pool.0.changed.clone())); // ends with it
        pool
    }

    /// The engine below.
    pub fn runtime(&self) -> &SharedRuntime {
        &self.0.engine.runtime
    }

    /// Whether the engine does not answer, or none is warm and the last creations failed.
    pub fn is_failing(&self) -> bool {
        let ledger = self.0.ledger();
        ledger.is_silent() || (ledger.is_failing() && ledger.warm() == 0)
    }

    /// The engine has answered.
    pub fn heard(&self) {
        self.0.ledger().heard();
    }

    /// A call to the engine has failed: one that does not answer is asked for nothing new for a moment.
    pub fn note(&self, error: &runtime::Error) {
        if matches!(error, runtime::Error::Unavailable { .. }) {
            let jitter = self.0.engine.jitter.next();
            self.0.ledger().silent(Instant::now(), jitter);
        }
    }

    /// Sandboxes that wait for a user.
    pub fn warm(&self) -> usize {
        self.0.ledger().warm()
    }

    /// A sandbox for a session: a warm one, else the next that gets ready. First come, first served.
    ///
    /// May be dropped at any await: what was begun for this claim then serves another one.
    pub async fn claim(&self, owner: &SessionKey) -> Result<Claimed, Error> {
        let (held, how) = self.next().await?;
        self.0.engine.metrics.claims.with_label_values(&[how]).inc();
        Ok(Claimed::new(held, owner))
    }

    async fn next(&self) -> Result<(Held, &'static str), Error> {
        loop {
            let claim = self.0.ledger().claim(Instant::now());
            self.0.changed.notify_one();
            match claim {
                Claim::Hit(mut ready) => match ready.held.supervisor.is_alive() {
                    true => return Ok((ready.held, "hit")),
                    false => tracing::warn!(sandbox = %ready.held.id, "a warm sandbox had died"),
                },
                Claim::Wait { told, how } => {
                    let _counted = Counted::new(self.0.engine.metrics.claims_waiting.clone());
                    let mut place = Place { pool: self, told };
                    let limit = self.0.settings.wait_timeout;
                    let told = tokio::time::timeout(limit, &mut place.told).await;
                    let crowded = |_| Error::Crowded { retry_after: self.0.ledger().expected_wait() };
                    let ready = told.map_err(crowded)?.map_err(|_| Error::Closed)??;
                    return Ok((ready.held, how));
                }
                Claim::Refused(error) => return Err(error),
            }
        }
    }

    /// Takes over a sandbox of an earlier server, claimed at `since`.
    pub fn keep(&self, id: SandboxId, since: Instant) -> Kept {
        let permit = self.0.capacity.permit_for(id.clone());
        Kept::new(self.0.engine.clone(), id, permit, since)
    }

    /// Removes a sandbox that is nobody's: one that an earlier server had not claimed is given to nobody, since a
    /// crash may have come between its use and the claim.
    pub fn discard(&self, id: SandboxId) {
        let permit = self.0.capacity.permit_for(id.clone());
        drop(Made::new(self.0.engine.clone(), id, permit));
    }

    /// Talks to a kept sandbox again, after those who came before. May be dropped at any await, and tried again.
    pub async fn attach(&self, kept: &Kept) -> Result<Supervisor, Error> {
        let limit = self.0.settings.wait_timeout;
        let turn = tokio::time::timeout(limit, self.0.attaching.acquire()).await;
        let _turn = turn.map_err(|_| Error::Late(limit))?.expect("never closed");
        let mut failures = 0;
        loop {
            let (error, most) = match self.attach_once(kept).await {
                Err(Error::Supervisor(error @ supervisor::Error::Ended)) => (error, ENDED_MOST),
                Err(Error::Supervisor(error @ supervisor::Error::Unresponsive)) => (error, SILENT_MOST),
                attached => return attached,
            };
            // The engine may have lost the stream, as it did before.
            failures += 1;
            if failures >= most || !self.is_running(kept.id()).await? {
                return Err(error.into());
            }
            tokio::time::sleep(failures * ATTACH_PAUSE).await;
        }
    }

    /// By the engine's word.
    async fn is_running(&self, id: &SandboxId) -> Result<bool, Error> {
        let limit = self.0.settings.create_timeout;
        let fate = tokio::time::timeout(limit, self.fate(id)).await.map_err(|_| Error::Late(limit))??;
        Ok(matches!(fate, Fate::Running { .. }))
    }

    /// What became of a sandbox.
    pub async fn fate(&self, id: &SandboxId) -> runtime::Result<Fate> {
        self.0.engine.fate(id).await
    }

    async fn attach_once(&self, kept: &Kept) -> Result<Supervisor, Error> {
        let limit = self.0.settings.create_timeout;
        let attached = tokio::time::timeout(limit, self.runtime().attach(kept.id())).await;
        let attached = attached.map_err(|_| Error::Late(limit)).and_then(|attached| Ok(attached?));
        let sandbox = attached.inspect_err(|error| self.0.engine.failed("attach", error.reason()))?;
        let deadline = Instant::now() + limit; // of its own: a slow engine is no sign of a dead sandbox
        let (supervisor, _) = Supervisor::attach(sandbox.stream, &self.0.settings.caps, deadline).await?;
        Ok(supervisor)
    }

    /// The sandboxes that the engine has.
    pub async fn list(&self) -> runtime::Result<Vec<Found>> {
        let listed = self.runtime().list().await;
        match &listed {
            Ok(_) => self.heard(),
            Err(error) => {
                self.0.engine.failed("list", error.reason());
                self.note(error);
            }
        }
        listed
    }

    /// The sandboxes that this server is to remove one day, whatever their state.
    pub fn known(&self) -> HashSet<SandboxId> {
        self.0.capacity.ids()
    }

    /// Whether this server is to remove it one day.
    pub fn knows(&self, id: &SandboxId) -> bool {
        self.0.capacity.knows(id)
    }

    /// Gives up the warm ones of which the engine says that they are dead.
    pub async fn check(&self) {
        let ids = self.0.ledger().look(|ready| ready.held.id.clone());
        let mut dead = HashSet::new();
        for id in ids {
            // An engine that does not answer proves nothing.
            match self.fate(&id).await {
                Ok(Fate::Running { .. }) | Err(_) => continue,
                Ok(Fate::Gone) => self.0.engine.metrics.reconciled.with_label_values(&["missing"]).inc(),
                Ok(Fate::Exited { .. } | Fate::OutOfMemory | Fate::Paused) => {}
            }
            dead.insert(id);
        }
        self.0.sift(|ready| dead.contains(&ready.held.id));
        self.0.changed.notify_one();
    }

    /// Makes no more, removes all that waits for a user, and tells the users who wait.
    pub fn stop(&self) {
        let warm = self.0.ledger().close();
        drop(warm);
    }

    /// Stops, and waits until no more than `left` sandboxes are there: what is claimed is its session's to give back.
    pub async fn close(&self, left: usize) {
        self.stop();
        self.0.capacity.returned(left).await;
    }
}

/// A place among those who wait for a sandbox. Who leaves it while a sandbox comes gives that to the next.
struct Place<'a> {
    pool: &'a Pool,
    told: oneshot::Receiver<Result<Ready, Error>>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.told.close();
        if let Ok(Ok(ready)) = self.told.try_recv() {
            self.pool.0.place(ready);
        }
        self.pool.0.changed.notify_one();
    }
}

impl Inner {
    fn ledger(&self) -> MutexGuard<'_, Ledger<Ready>> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, ready: Ready) {
        let surplus = self.ledger().place(ready, Instant::now());
        drop(surplus); // outside of the lock
    }

    /// Gives up warm ones.
    fn sift(&self, useless: impl FnMut(&mut Ready) -> bool) {
        let useless = self.ledger().sift(useless);
        for ready in &useless {
            tracing::warn!(sandbox = %ready.held.id, "a warm sandbox has died");
        }
    }

    /// Begins what is to be begun; gives the moment of the next look.
    fn tend(self: &Arc<Inner>) -> Instant {
        let now = Instant::now();
        // Those whose stream has ended, whether or not the engine answers: what cannot be used is not warm.
        self.sift(|ready| !ready.held.supervisor.is_alive());
        let outdated = self.ledger().outdated(now);
        drop(outdated);
        while let Some(permit) = self.permit_to_begin(now) {
            tokio::spawn(self.clone().make(permit)); // it ends by its deadline, whoever wanted it
        }
        self.ledger().next_look(now)
    }

    fn permit_to_begin(&self, now: Instant) -> Option<Permit> {
        let mut ledger = self.ledger();
        let permit = if ledger.wanted(now) > 0 { self.capacity.permit() } else { None };
        if permit.is_some() {
            ledger.begun();
        }
        permit
    }

    async fn make(self: Arc<Inner>, permit: Permit) {
        let begun = Instant::now();
        let made = self.start(permit, begun + self.settings.create_timeout).await;
        let now = Instant::now();
        match made {
            Ok(held) => {
                self.engine.metrics.create_seconds.observe((now - begun).as_secs_f64());
                let surplus = self.ledger().made(Ready::new(held), now - begun, now);
                drop(surplus);
            }
            Err(error) => {
                self.engine.failed("create", error.reason());
                tracing::warn!(%error, "cannot make a sandbox");
                self.ledger().failed(now, self.engine.jitter.next(), error.trouble());
            }
        }
        self.changed.notify_one();
    }

    async fn start(&self, permit: Permit, deadline: Instant) -> Result<Held, Error> {
        let counted = self.engine.counted("starting");
        let Settings { create_timeout, spec, caps, .. } = &self.settings;
        let runtime = &self.engine.runtime;
        let (engine, making) = (runtime.clone(), spec.clone());
        let mut creation = tokio::spawn(async move { engine.create(&making).await });
        let Ok(made) = tokio::time::timeout_at(deadline, &mut creation).await else {
            // Nobody waits for it any longer, and it keeps its permit until the driver has come to an end with it.
            let engine = self.engine.clone();
            tokio::spawn(async move {
                if let Ok(Ok(late)) = creation.await {
                    drop(late.stream);
                    drop(Made::new(engine, late.id, permit));
                }
                drop(counted);
            });
            return Err(Error::Late(*create_timeout));
        };
        let sandbox = made.map_err(|panic| runtime::Error::Failed {
            what: "create a sandbox".into(),
            source: std::io::Error::other(panic),
        })??;
        let made = Made::new(self.engine.clone(), sandbox.id.clone(), permit);
        let greeted = tokio::select! {
            biased;
            greeted = Supervisor::attach(sandbox.stream, caps, deadline) => greeted,
            () = self.engine.end(&sandbox.id) => Err(supervisor::Error::Ended),
        };
        match greeted {
            Ok((supervisor, _)) => Ok(made.greeted(supervisor)),
            Err(error) => {
                let fate = self.engine.fate(&sandbox.id).await;
                tracing::warn!(sandbox = %sandbox.id, ?fate, "a new sandbox did not come up");
                Err(error.into())
            }
        }
    }
}

/// Keeps the pool full for as long as there is one.
async fn keep(pool: Weak<Inner>, capacity: Arc<Capacity>, changed: Arc<Notify>) {
    loop {
        let mut freed = std::pin::pin!(capacity.freed());
        freed.as_mut().enable(); // before the look: a permit that comes back meanwhile is heard
        let Some(inner) = pool.upgrade() else { return };
        let next = inner.tend();
        drop(inner);
        tokio::select! {
            biased;
            () = changed.notified() => {}
            () = freed => {}
            () = tokio::time::sleep_until(next) => {}
        }
    }
}
