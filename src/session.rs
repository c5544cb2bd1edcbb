//! Floor 5: who holds which sandbox, until when.
//!
//! A session has one seat with at most one sandbox on it. Who runs code holds the seat; the others queue
//! up for it, first come first served. A seat is held across awaits only inside a `Turn`, whose drop
//! brings the sandbox back to rest when the client went away in the middle.

pub mod files;
mod loss;
mod turn;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hmac::{Hmac, KeyInit, Mac};
use serde::Serialize;
use serde_json::value::RawValue;
use sha2::Sha256;
use tokio::sync::{Notify, OwnedMutexGuard, watch};
use tokio::time::Instant;
use tracing::Instrument;

use self::loss::Loss;
use self::turn::Turn;
use crate::metrics::Metrics;
use crate::phase::phase;
use crate::pool::{self, Claimed, Kept, Pool};
use crate::runtime::{self, Claim, Fate, Found, KeySecret, SandboxId, SessionKey};
use crate::supervisor::files::Exchanges;
use crate::supervisor::{self, Aftermath, ErrorDetail, Report, Run};

/// The reaper looks at least that often, whatever it expects.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
/// A run whose code has not begun is handed over again, that often in all.
const ATTEMPTS: usize = 3;
/// Of the mean time of a session's runs, the part that the last one has.
const WEIGHT: f64 = 0.2;
/// From the end of a stream to the end of its sandbox: milliseconds, or it goes on.
const FATE_WAIT: Duration = Duration::from_secs(1);
/// Beyond a run's time, how long the engine may take to tell what became of its sandbox: the answer has to come.
const VERDICT_WAIT: Duration = Duration::from_secs(2);
/// How long a server that stops waits for the engine to remove sandboxes, beyond its runs' time.
const REMOVAL_WAIT: Duration = Duration::from_secs(30);
/// Bytes of a session key: 128 bits leave no two users with the same.
const KEY_BYTES: usize = 16;

/// How long sessions live, and how many.
#[derive(Debug, Clone)]
pub struct Settings {
    /// From the end of the last run to the removal of the sandbox.
    pub idle_timeout: Duration,
    /// From the claim to the removal, however busy.
    pub lifetime_max: Duration,
    /// Sessions at once.
    pub max: usize,
    /// Runs of one session that wait while another runs.
    pub queue: usize,
    /// Leave the sandboxes of sessions to a later server, at the end of this one.
    pub keep: bool,
}

/// Whose session it is.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// Whose key the request bore; empty without keys.
    pub tenant: &'a str,
    /// As the request gave it, byte for byte.
    pub user_id: &'a str,
}

/// Why a run was not begun.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// As many runs of this session wait as may.
    #[error("too many runs of this user_id are waiting")]
    Busy {
        /// Until they have run, by the time that the last ones took.
        retry_after: Duration,
    },
    /// As many sessions exist as may.
    #[error("all sessions are in use")]
    TooMany {
        /// Until one may be free.
        retry_after: Duration,
    },
    /// More users wait for a sandbox than can be served in time.
    #[error("too many new users wait for a sandbox")]
    Crowded {
        /// How long the wait is, by the measured rate.
        retry_after: Duration,
    },
    /// The server is stopping.
    #[error("the server is stopping")]
    Draining,
    /// There is nothing to interrupt.
    #[error("no run of this user_id goes on")]
    NotRunning,
    /// No sandbox could be had.
    #[error("no sandbox could be had: {0}")]
    Unavailable(#[from] pool::Error),
}

/// A run that came to its end.
#[derive(Debug)]
pub struct Done {
    /// The result as JSON, or why there is none.
    pub outcome: Result<Box<RawValue>, ErrorDetail>,
    /// What it left beside it.
    pub aftermath: Aftermath,
    /// The sandbox had to be destroyed, and the files with it.
    pub lost: bool,
    /// Where the time went.
    pub timing: Timing,
}

/// The phases of a run, as the server sees them.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Waiting for earlier runs of the same session.
    pub queue: Duration,
    /// Getting a sandbox.
    pub claim: Duration,
    /// The conversation with the supervisor.
    pub run: Duration,
}

/// What `GET /sessions/{user_id}` tells.
#[derive(Debug, Serialize)]
pub struct Description {
    /// `idle` or `running`.
    pub state: &'static str,
    /// When it got its sandbox.
    #[serde(serialize_with = "rfc3339")]
    pub created_at: SystemTime,
    /// Since the end of the last run, in milliseconds.
    pub idle_ms: u64,
    /// Until the reaper takes it if nothing happens, in milliseconds.
    pub expires_in_ms: u64,
    /// The engine's name.
    pub driver: &'static str,
}

/// All sessions of a server. A cheap handle.
#[derive(Debug, Clone)]
pub struct Sessions(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: Pool,
    settings: Settings,
    metrics: Arc<Metrics>,
    table: Mutex<HashMap<SessionKey, Arc<Session>>>,
    draining: AtomicBool,
    secret: KeySecret,
    /// Told when sessions of an earlier server are taken up, which may expire sooner than a new one.
    recovered: Notify,
}

#[derive(Debug)]
struct Session {
    key: SessionKey,
    seat: Arc<tokio::sync::Mutex<Seat>>,
    /// The run that goes on and those that wait.
    queued: AtomicUsize,
    /// Files that are on their way in or out.
    transfers: watch::Sender<usize>,
    /// Where the supervisor on the seat is asked about files; an earlier one's are closed.
    exchanges: watch::Sender<Option<Exchanges>>,
    /// What can be told and done without the seat.
    glance: Mutex<Glance>,
}

/// A claimed sandbox, and since when.
type Seen = (SandboxId, SystemTime, Instant);

#[derive(Debug)]
struct Glance {
    sandbox: Option<Seen>,
    last_end: Instant,
    /// Of a run, in the session's own turn.
    mean: Option<Duration>,
    /// Interrupts the run that goes on.
    interrupt: Option<Arc<Notify>>,
    deleted: bool,
}

#[derive(Debug, Default)]
struct Seat {
    claimed: Option<Claimed>,
    /// Of an earlier server, until the first run attaches to it: then `claimed`.
    kept: Option<Kept>,
    /// A sandbox of this session was lost, and no answer has said so yet.
    lost: bool,
    /// Likewise of its kernel.
    kernel_lost: bool,
    /// Of this sandbox, at the end of the last run that was killed.
    out_of_memory_kills: u64,
    /// The session is out of the table: whoever waited begins anew.
    closed: bool,
}

impl Sessions {
    /// None yet.
    pub fn new(pool: Pool, settings: Settings, metrics: Arc<Metrics>) -> Sessions {
        let secret = pool.runtime().secret();
        metrics.ready.set(1.0);
        Sessions(Arc::new(Inner {
            pool,
            settings,
            metrics,
            table: Mutex::default(),
            draining: AtomicBool::new(false),
            secret,
            recovered: Notify::new(),
        }))
    }

    /// Runs code in the owner's sandbox, after the runs that came before.
    ///
    /// May be dropped at any await: a run that has begun is then interrupted, and the session stays.
    pub async fn run(&self, owner: Owner<'_>, run: &Run<'_>) -> Result<Done, Error> {
        let key = self.key(owner);
        let begun = Instant::now();
        let (mut turn, seated, claimed, answer) = loop {
            let place = self.enter(&key)?;
            if let Some(teller) = run.teller {
                teller.accepted();
            }
            let mut turn = place.take_seat().instrument(phase!("queue")).await;
            let seated = Instant::now();
            turn.retire_if_outlived();
            if let Some((claimed, answer)) = turn.execute(run).await? {
                break (turn, seated, claimed, answer);
            }
        };
        let timing = Timing { queue: seated - begun, claim: claimed - seated, run: claimed.elapsed() };
        let mut done = match answer {
            Ok(report) => turn.conclude(report, timing).await,
            Err(error) => turn.lose(error, claimed + run.timeout, timing).await,
        };
        turn.is_named().await?;
        turn.place().session.took(timing.run);
        done.lost |= std::mem::take(&mut turn.seat().lost);
        done.aftermath.kernel_lost |= std::mem::take(&mut turn.seat().kernel_lost);
        self.count(&done);
        Ok(done)
    }

    /// Interrupts the run that goes on, as Ctrl-C would; those that wait for their turn stay.
    ///
    /// # Errors
    /// `NotRunning`.
    pub fn interrupt(&self, owner: Owner<'_>) -> Result<(), Error> {
        let session = self.0.table().get(&self.key(owner)).cloned().ok_or(Error::NotRunning)?;
        let glance = session.glance();
        glance.interrupt.as_ref().ok_or(Error::NotRunning)?.notify_one();
        Ok(())
    }

    /// Takes up sandboxes of an earlier server: claimed ones with their files, each for the session that it belonged
    /// to. Removes the rest.
    pub fn recover(&self, found: Vec<Found>) {
        self.take_up(found, false);
    }

    /// What is found `late` may have been claimed, by its owner's last server, while that one has begun anew.
    fn take_up(&self, found: Vec<Found>, late: bool) {
        let mut claims = Vec::new();
        for Found { id, claim } in found {
            match claim {
                Some(claim) => claims.push((claim, id)),
                None => self.forsake(id),
            }
        }
        // The latest first: of two with one owner, the earlier one was already on its way out.
        claims.sort_by_key(|(claim, _)| std::cmp::Reverse(claim.at));
        for (Claim { owner, at }, id) in claims {
            let now = Instant::now();
            let since = now.checked_sub(at.elapsed().unwrap_or_default()).unwrap_or(now);
            let mut table = self.0.table();
            let place = match table.entry(owner) {
                Entry::Vacant(place) => place,
                Entry::Occupied(session) => {
                    let session = session.get().clone();
                    drop(table);
                    tracing::warn!(session = %session.key, sandbox = %id, "removes an earlier sandbox of a session");
                    self.forsake(id);
                    if late {
                        // An answer may have acknowledged what is in it. The session's next one says so.
                        tokio::spawn(async move { session.seat.lock().await.lost = true });
                    }
                    continue;
                }
            };
            let owner = place.key().clone();
            let kept = self.0.pool.keep(id.clone(), since); // even where they are more than may be: it has files
            let session = Session::new(owner);
            session.glance().sandbox = Some((id, at, since));
            session.seat.try_lock().expect("nobody else knows of it yet").kept = Some(kept);
            place.insert(Arc::new(session));
            drop(table);
            self.0.metrics.recovered.with_label_values(&["kept"]).inc();
        }
        self.0.metrics.sessions.set(self.0.table().len() as i64);
        self.0.recovered.notify_one();
    }

    /// The engine has these no more: tells their sessions, at the next run of each.
    pub(crate) fn missing(&self, gone: &HashSet<SandboxId>) {
        if gone.is_empty() {
            return;
        }
        for session in self.0.all() {
            let Ok(mut seat) = session.seat.clone().try_lock_owned() else { continue }; // its run will see
            let mut glance = session.glance();
            if glance.sandbox.take_if(|(id, ..)| gone.contains(id)).is_none() {
                continue;
            }
            drop(glance);
            tracing::warn!(session = %session.key, "its sandbox is gone");
            seat.empty();
            seat.lost = true;
            self.0.metrics.lost.with_label_values(&[Loss::Gone.label()]).inc();
            self.0.metrics.reconciled.with_label_values(&["missing"]).inc();
        }
    }

    /// The engine has these, and nobody knew of them: some `left` by an earlier server, some `found` later.
    pub(crate) fn unknown(&self, left: Vec<Found>, found: Vec<Found>) {
        if self.0.draining.load(Ordering::SeqCst) {
            return; // what it has just left to a later server is among them
        }
        self.0.metrics.reconciled.with_label_values(&["unknown"]).inc_by(found.len() as u64);
        self.take_up(left.into_iter().chain(found).collect(), true);
    }

    fn forsake(&self, id: SandboxId) {
        self.0.metrics.recovered.with_label_values(&["removed"]).inc();
        self.0.pool.discard(id);
    }

    /// What there is to tell of a session; `None` where it has no sandbox.
    pub fn describe(&self, owner: Owner<'_>) -> Option<Description> {
        let session = self.0.table().get(&self.key(owner)).cloned()?;
        let running = session.queued.load(Ordering::SeqCst) > 0;
        let idle_since = session.idle_since();
        let glance = session.glance();
        let (_, created_at, _) = glance.sandbox.as_ref()?;
        let now = Instant::now();
        let idle = if running { Duration::ZERO } else { now.saturating_duration_since(idle_since) };
        let (expiry, _) = self.0.expiry_of(glance.sandbox.as_ref(), now - idle);
        Some(Description {
            state: if running { "running" } else { "idle" },
            created_at: *created_at,
            idle_ms: idle.as_millis() as u64,
            expires_in_ms: (expiry - now).as_millis() as u64,
            driver: self.0.pool.runtime().name(),
        })
    }

    /// Destroys a session now, a run in it included. Fine where there is none.
    pub async fn delete(&self, owner: Owner<'_>) -> Result<(), Error> {
        let Some((session, id)) = self.0.take_out(&self.key(owner)) else { return Ok(()) };
        self.0.ended("deleted");
        // The run that goes on, if any, sees its stream end; who holds the seat gives the sandbox back.
        let runtime = self.0.pool.runtime().clone();
        let removal = tokio::spawn(async move { runtime.remove(&id).await });
        let _ = tokio::time::timeout(pool::REMOVE_TIMEOUT, removal).await; // the pool tries again
        let seat = session.seat.clone().lock_owned().await;
        self.0.close(seat);
        Ok(())
    }

    /// Takes no more runs and lets those that go on end until the deadline. Then removes every sandbox, or leaves
    /// those of sessions to a later server.
    pub async fn drain(&self, deadline: Instant) {
        self.drain_beside(deadline, || true).await;
    }

    /// Likewise where others may use the same instance: what this server has not made it removes only if it is `alone`.
    pub async fn drain_beside(&self, deadline: Instant, alone: impl FnOnce() -> bool) {
        self.0.draining.store(true, Ordering::SeqCst);
        self.0.metrics.ready.set(0.0);
        self.0.pool.stop();
        let sessions = self.0.all();
        self.0.table().clear();
        let mut left = 0;
        for session in sessions {
            self.0.ended("shutdown");
            let seat = async {
                let _ = session.transfers.subscribe().wait_for(|transfers| *transfers == 0).await;
                session.seat.clone().lock_owned().await
            };
            let seat = tokio::time::timeout_at(deadline, seat).await;
            match (seat, self.0.settings.keep) {
                (Ok(seat), false) => self.0.close(seat),
                (Ok(seat), true) => self.0.leave(seat, deadline).await,
                (Err(_), true) => {
                    left += 1;
                    let inner = self.0.clone(); // where the run ends before this program does
                    tokio::spawn(async move {
                        inner.leave(session.seat.clone().lock_owned().await, deadline).await
                    });
                }
                (Err(_), false) => {
                    if let Some(id) = session.cut() {
                        let runtime = self.0.pool.runtime().clone();
                        tokio::spawn(async move { runtime.remove(&id).await }); // ends the run; awaited by the pool below
                    }
                }
            }
        }
        let cleared = async {
            self.0.pool.close(left).await;
            if !self.0.settings.keep && alone() {
                self.0.clear_up().await;
                self.0.pool.close(left).await;
            }
        };
        if tokio::time::timeout_at(deadline + REMOVAL_WAIT, cleared).await.is_err() {
            tracing::warn!("the engine has not removed all sandboxes in time: the next start does");
        }
    }

    /// Whether the run of a new user would be taken now; else why not.
    pub fn readiness(&self) -> Result<(), &'static str> {
        if self.0.draining.load(Ordering::SeqCst) {
            Err("the server is stopping")
        } else if self.0.table().len() >= self.0.settings.max {
            Err("all sessions are in use")
        } else if self.0.pool.is_failing() {
            Err("the engine makes no sandboxes")
        } else {
            Ok(())
        }
    }

    /// The pool below.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// Closes what has expired; gives the moment of the next expiry, of a session that begins later, too.
    pub(crate) fn expire(&self) -> Instant {
        let now = Instant::now();
        let mut next =
            now + LONGEST_SLEEP.min(self.0.settings.idle_timeout).min(self.0.settings.lifetime_max);
        for session in self.0.all() {
            let Ok(seat) = session.seat.clone().try_lock_owned() else { continue }; // a run is in it
            if seat.closed || session.queued.load(Ordering::SeqCst) > 0 {
                continue;
            }
            let (expiry, reason) = self.0.expiry(&session);
            if expiry > now {
                next = next.min(expiry);
                continue;
            }
            self.0.strike_off(&session);
            self.0.ended(reason);
            self.0.close(seat);
        }
        next
    }

    /// Until sessions of an earlier server are taken up.
    pub(crate) async fn recovered(&self) {
        self.0.recovered.notified().await;
    }

    /// The session's name outside of this program: nobody learns the user_id from it.
    pub(crate) fn key(&self, Owner { tenant, user_id }: Owner<'_>) -> SessionKey {
        let mut hash =
            Hmac::<Sha256>::new_from_slice(&self.0.secret.0).expect("HMAC takes keys of any length");
        hash.update(&(tenant.len() as u64).to_be_bytes());
        hash.update(tenant.as_bytes());
        hash.update(user_id.as_bytes());
        let hash = hash.finalize().into_bytes();
        SessionKey(hex::encode(&hash[..KEY_BYTES]))
    }

    /// A place in the queue of a session, which is made where it is missing.
    fn enter(&self, key: &SessionKey) -> Result<Place, Error> {
        if self.0.draining.load(Ordering::SeqCst) {
            return Err(Error::Draining);
        }
        let mut table = self.0.table();
        if !table.contains_key(key) && table.len() >= self.0.settings.max {
            let soonest = |session: &Arc<Session>| match session.queued.load(Ordering::SeqCst) {
                0 => self.0.expiry(session).0,
                _ => Instant::now() + self.0.settings.idle_timeout,
            };
            let expiries = table.values().map(soonest);
            let retry_after = expiries.min().map_or(Duration::ZERO, |expiry| expiry - Instant::now());
            return Err(Error::TooMany { retry_after });
        }
        let session = table.entry(key.clone()).or_insert_with(|| Arc::new(Session::new(key.clone())));
        let queued = session.queued.load(Ordering::SeqCst);
        if queued > self.0.settings.queue {
            let mean = session.glance().mean.unwrap_or_default();
            return Err(Error::Busy { retry_after: mean * u32::try_from(queued).unwrap_or(u32::MAX) });
        }
        session.queued.fetch_add(1, Ordering::SeqCst);
        let place = Place { sessions: self.clone(), session: session.clone() };
        self.0.metrics.sessions.set(table.len() as i64);
        Ok(place)
    }

    fn count(&self, done: &Done) {
        let metrics = &self.0.metrics;
        let outcome = done.outcome.as_ref().err().map_or("ok", |detail| detail.kind.as_str());
        metrics.runs.with_label_values(&[outcome]).inc();
        let Timing { queue, claim, run } = done.timing;
        for (phase, time) in
            [("queue", queue), ("claim", claim), ("run", run), ("total", queue + claim + run)]
        {
            metrics.run_seconds.with_label_values(&[phase]).observe(time.as_secs_f64());
        }
        for field in &done.aftermath.truncated {
            metrics.capped.with_label_values(&[field.as_str()]).inc();
        }
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, HashMap<SessionKey, Arc<Session>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a session out of the table, where it is still the one that stands there.
    fn strike_off(&self, session: &Arc<Session>) {
        let mut table = self.table();
        if table.get(&session.key).is_some_and(|other| Arc::ptr_eq(other, session)) {
            table.remove(&session.key);
        }
        self.metrics.sessions.set(table.len() as i64);
    }

    /// In an order that repeats itself.
    fn all(&self) -> Vec<Arc<Session>> {
        let mut sessions: Vec<_> = self.table().values().cloned().collect();
        sessions.sort_by(|one, other| one.key.0.cmp(&other.key.0));
        sessions
    }

    /// A session and its sandbox. One without a sandbox, as yet, stays: there is nothing to destroy.
    fn take_out(&self, key: &SessionKey) -> Option<(Arc<Session>, SandboxId)> {
        let mut table = self.table();
        let id = table.get(key)?.cut()?;
        table.remove(key).map(|session| (session, id))
    }

    fn expiry(&self, session: &Session) -> (Instant, &'static str) {
        let idle_since = session.idle_since();
        self.expiry_of(session.glance().sandbox.as_ref(), idle_since)
    }

    /// When a session that does nothing from `idle_since` on is to be closed, and why.
    fn expiry_of(&self, sandbox: Option<&Seen>, idle_since: Instant) -> (Instant, &'static str) {
        let idle = idle_since + self.settings.idle_timeout;
        match sandbox {
            Some((_, _, since)) if *since + self.settings.lifetime_max < idle => {
                (*since + self.settings.lifetime_max, "lifetime")
            }
            _ => (idle, "idle"),
        }
    }

    /// What became of a sandbox, as far as the engine tells in time.
    async fn fate(&self, id: &SandboxId, deadline: Instant) -> runtime::Result<Fate> {
        let driver = self.pool.runtime().name();
        let silent = || runtime::Error::Unavailable { driver, why: "it is silent".into() };
        let fate = tokio::time::timeout_at(deadline, self.pool.fate(id)).await;
        fate.unwrap_or_else(|_| Err(silent()))
    }

    /// A stream ends a moment before its sandbox does: a fate that has not come yet is asked for again.
    async fn fate_after(
        &self,
        error: &supervisor::Error,
        id: &SandboxId,
        deadline: Instant,
    ) -> runtime::Result<Fate> {
        let until = Instant::now() + FATE_WAIT;
        loop {
            let fate = self.fate(id, deadline).await;
            let open = matches!((error, &fate), (supervisor::Error::Ended, Ok(Fate::Running { .. })));
            if !open || Instant::now() > until {
                return fate;
            }
            tokio::time::sleep(FATE_WAIT / 100).await;
        }
    }

    fn close(&self, mut seat: OwnedMutexGuard<Seat>) {
        seat.closed = true;
        seat.empty();
    }

    /// Removes what is nobody's: left by an earlier server, or made too late for this one.
    async fn clear_up(&self) {
        let found = match self.pool.list().await {
            Ok(found) => found,
            Err(error) => return tracing::warn!(%error, "cannot look what is left on the engine"),
        };
        for Found { id, .. } in found {
            if !self.pool.knows(&id) {
                self.pool.discard(id);
            }
        }
    }

    /// Closes a session whose sandbox stays.
    async fn leave(&self, mut seat: OwnedMutexGuard<Seat>, deadline: Instant) {
        seat.closed = true;
        seat.let_go();
        if let Some(kept) = seat.kept.take() {
            kept.leave(deadline).await;
        }
    }

    fn ended(&self, reason: &str) {
        self.metrics.sessions_ended.with_label_values(&[reason]).inc();
        self.metrics.sessions.set(self.table().len() as i64);
    }
}

impl Seat {
    /// Whoever drops a sandbox has it removed.
    fn empty(&mut self) {
        (self.claimed, self.kept) = (None, None);
    }

    /// Where nobody heard that a run lost its kernel: the next answer says so.
    fn miss_kernel(&mut self, report: Option<&Report>, inner: &Inner) {
        if report.is_some_and(|report| report.aftermath.kernel_lost) {
            self.kernel_lost = true;
            inner.metrics.kernels_lost.inc();
        }
    }

    /// Gives up the stream, and not the sandbox.
    fn let_go(&mut self) {
        if let Some(claimed) = self.claimed.take() {
            self.kept = Some(claimed.let_go());
        }
    }
}

impl Session {
    fn new(key: SessionKey) -> Session {
        let glance =
            Glance { sandbox: None, last_end: Instant::now(), mean: None, interrupt: None, deleted: false };
        Session {
            key,
            seat: Arc::default(),
            queued: AtomicUsize::new(0),
            transfers: watch::Sender::new(0),
            exchanges: watch::Sender::new(None),
            glance: Mutex::new(glance),
        }
    }

    /// Its supervisor can be asked about files from now on, beside a run as well.
    fn attached(&self, supervisor: &supervisor::Supervisor) {
        self.exchanges.send_replace(Some(supervisor.exchanges()));
    }

    /// Since when nothing happens: now, where something does.
    fn idle_since(&self) -> Instant {
        match *self.transfers.borrow() {
            0 => self.glance().last_end,
            _ => Instant::now(),
        }
    }

    /// A run of it came to its end.
    fn took(&self, time: Duration) {
        let mut glance = self.glance();
        let mean = glance.mean.unwrap_or(time);
        glance.mean = Some(mean.mul_f64(1.0 - WEIGHT) + time.mul_f64(WEIGHT));
    }

    /// Its sandbox is about to be removed under the run that may go on.
    fn cut(&self) -> Option<SandboxId> {
        let mut glance = self.glance();
        let (id, ..) = glance.sandbox.take()?;
        glance.deleted = true;
        Some(id)
    }

    fn glance(&self) -> MutexGuard<'_, Glance> {
        self.glance.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in a session's queue, given up by dropping it.
#[derive(Debug)]
struct Place {
    sessions: Sessions,
    session: Arc<Session>,
}

impl Place {
    async fn take_seat(self) -> Turn {
        let seat = self.session.seat.clone().lock_owned().await;
        let interrupt = Arc::new(Notify::new());
        self.session.glance().interrupt = Some(interrupt.clone());
        Turn { seat: Some(seat), place: Some(self), interrupt }
    }

    /// A session without a sandbox is none: it must not count against the most that there may be.
    fn leave(&self, seat: &mut Seat) {
        if !std::mem::replace(&mut seat.closed, true) {
            self.sessions.0.strike_off(&self.session);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.session.glance().last_end = Instant::now();
        self.session.queued.fetch_sub(1, Ordering::SeqCst);
    }
}

fn rfc3339<S: serde::Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_millis(*time))
}
