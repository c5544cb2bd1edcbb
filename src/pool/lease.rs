//! A sandbox with everything that goes with it, from its creation to its removal.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::capacity::Permit;
use super::ledger;
use crate::metrics::{Counted, Metrics};
use crate::runtime::{self, Fate, SandboxId, SessionKey, SharedRuntime};
use crate::supervisor::Supervisor;

/// The engine is told of a claim when the session's first run is over, or that long after its begin: before, it would
/// only slow it down.
const CLAIM_PAUSE: Duration = Duration::from_millis(20);
/// Between two looks at a new sandbox that says nothing: a guess, ten times what a hello takes.
const LOOK_PAUSE: Duration = Duration::from_secs(2);
/// A driver's removal that takes longer is tried again.
pub(crate) const REMOVE_TIMEOUT: Duration = Duration::from_secs(20);
/// At once: an engine does no more in the same time when it is asked for hundreds, and each then takes too long. A
/// guess; what Docker was measured with is 20 creations.
const REMOVALS_MOST: usize = 16;

/// The engine, and where its failures are counted.
#[derive(Debug, Clone)]
pub(super) struct Engine {
    pub(super) runtime: SharedRuntime,
    pub(super) metrics: Arc<Metrics>,
    pub(super) jitter: Arc<Jitter>,
    /// Removals that may go on at once.
    removing: Arc<Semaphore>,
}

impl Engine {
    pub(super) fn new(runtime: SharedRuntime, metrics: Arc<Metrics>, seed: u64) -> Engine {
        let (jitter, removing) = (Arc::new(Jitter::new(seed)), Arc::new(Semaphore::new(REMOVALS_MOST)));
        Engine { runtime, metrics, jitter, removing }
    }

    pub(super) async fn fate(&self, id: &SandboxId) -> runtime::Result<Fate> {
        self.runtime.fate(id).await.inspect_err(|error| self.failed("fate", error.reason()))
    }

    pub(super) fn failed(&self, operation: &str, reason: &str) {
        self.metrics.engine_errors.with_label_values(&[operation, reason]).inc();
    }

    pub(super) fn counted(&self, state: &str) -> Counted {
        Counted::new(self.metrics.sandboxes.with_label_values(&[state]))
    }

    /// Comes back once the engine says that the sandbox has ended, which its stream may never do.
    pub(super) async fn end(&self, id: &SandboxId) {
        loop {
            tokio::time::sleep(LOOK_PAUSE).await;
            if let Ok(Fate::Exited { .. } | Fate::OutOfMemory | Fate::Gone) = self.fate(id).await {
                return;
            }
        }
    }

    /// Until it is gone, however often that takes.
    async fn remove(self, id: SandboxId, permit: Permit) {
        let _counted = self.counted("removing");
        for failures in 1.. {
            let turn = self.removing.acquire().await.expect("never closed");
            let (reason, why) = match tokio::time::timeout(REMOVE_TIMEOUT, self.runtime.remove(&id)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => (error.reason(), error.to_string()),
                Err(_) => ("late", format!("no answer within {REMOVE_TIMEOUT:?}")),
            };
            drop(turn);
            let pause = ledger::pause(failures, self.jitter.next());
            self.failed("remove", reason);
            tracing::warn!(sandbox = %id, error = why, retry_in = ?pause, "cannot remove a sandbox");
            tokio::time::sleep(pause).await;
        }
        drop(permit);
    }

    /// Tells the engine whose a sandbox is. Where it has heard that and still failed, it is told again for as long
    /// as the sandbox is there.
    async fn name(
        self,
        id: SandboxId,
        owner: SessionKey,
        now: Arc<Notify>,
        tell: oneshot::Sender<runtime::Result<()>>,
    ) -> bool {
        let _ = tokio::time::timeout(CLAIM_PAUSE, now.notified()).await; // whichever comes first
        let mut tell = Some(tell);
        for failures in 1.. {
            let named = async {
                let claiming = self.runtime.claim(&id, &owner).await?;
                if let Some(tell) = tell.take() {
                    let _ = tell.send(Ok(())); // nobody asks any more: the client is gone
                }
                claiming.await
            };
            let Err(error) = named.await else { return true };
            self.failed("claim", error.reason());
            if let Some(tell) = tell.take() {
                let _ = tell.send(Err(error));
                return false;
            }
            if matches!(error, runtime::Error::Gone(_)) {
                return false;
            }
            tracing::warn!(sandbox = %id, %error, "cannot claim a sandbox");
            tokio::time::sleep(ledger::pause(failures, self.jitter.next())).await;
        }
        unreachable!("it counts to four billion only")
    }
}

/// Keeps apart servers that fail together. The same numbers for the same seed, so that a simulation can be repeated.
#[derive(Debug)]
pub(super) struct Jitter(AtomicU64);

impl Jitter {
    pub(super) fn new(seed: u64) -> Jitter {
        Jitter(AtomicU64::new(seed))
    }

    /// From 0 to 1: the steps of splitmix64.
    pub(super) fn next(&self) -> f64 {
        let mut mixed = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 32) as f64 / f64::from(u32::MAX)
    }
}

/// The duty to remove a sandbox: who drops it has that done in the background.
#[derive(Debug)]
struct Lease {
    engine: Engine,
    id: SandboxId,
    permit: Option<Permit>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else { return };
        let Ok(tasks) = tokio::runtime::Handle::try_current() else {
            return; // the program ends; its engine cleans up, or the next server does
        };
        tasks.spawn(self.engine.clone().remove(self.id.clone(), permit));
    }
}

/// A sandbox that nobody has claimed. Dropping it has it removed.
#[derive(Debug)]
pub struct Held {
    /// The engine's name for it.
    pub id: SandboxId,
    /// The conversation with it.
    pub supervisor: Supervisor,
    /// Last, so that the supervisor's stream is dropped before: an attached one can wedge an engine's removal.
    lease: Lease,
}

/// A sandbox whose supervisor has not said hello yet. Dropping it has it removed.
#[derive(Debug)]
pub(super) struct Made(Lease);

impl Made {
    pub(super) fn new(engine: Engine, id: SandboxId, mut permit: Permit) -> Made {
        permit.name(id.clone());
        Made(Lease { engine, id, permit: Some(permit) })
    }

    pub(super) fn greeted(self, supervisor: Supervisor) -> Held {
        Held { id: self.0.id.clone(), supervisor, lease: self.0 }
    }
}

/// A sandbox that waits for its user.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) held: Held,
    _counted: Counted,
}

impl Ready {
    pub(super) fn new(held: Held) -> Ready {
        let _counted = held.lease.engine.counted("warm");
        Ready { held, _counted }
    }
}

/// A claimed sandbox that nobody is attached to: an earlier server's, or one whose stream broke. Dropping it has it
/// removed.
#[derive(Debug)]
pub struct Kept {
    since: Instant,
    naming: Option<Naming>,
    lease: Lease,
    counted: Counted,
}

impl Kept {
    /// Of an earlier server, claimed at `since`.
    pub(super) fn new(engine: Engine, id: SandboxId, permit: Permit, since: Instant) -> Kept {
        let counted = engine.counted("claimed");
        Kept { since, naming: None, lease: Lease { engine, id, permit: Some(permit) }, counted }
    }

    pub(super) fn id(&self) -> &SandboxId {
        &self.lease.id
    }

    /// Taken up again, now that somebody talks to it.
    pub fn attached(self, supervisor: Supervisor) -> Claimed {
        let Kept { since, naming, lease, counted } = self;
        let held = Held { id: lease.id.clone(), supervisor, lease };
        Claimed { held, since, naming, counted }
    }

    /// Leaves the sandbox as it is, for a later server. Where that one would not find whose it is, has it removed;
    /// what the engine has heard and not done by the deadline, it will do.
    pub async fn leave(self, deadline: Instant) {
        let Kept { since: _, mut naming, mut lease, counted: _ } = self;
        let refused = match &mut naming {
            Some(naming) => tokio::time::timeout_at(deadline, &mut naming.done)
                .await
                .is_ok_and(|named| !named.unwrap_or(false)),
            None => false,
        };
        if !refused {
            lease.permit = None;
        }
    }
}

/// The engine is being told whose a sandbox is.
#[derive(Debug)]
struct Naming {
    /// Somebody waits for it.
    now: Arc<Notify>,
    /// Until it has heard it.
    heard: Option<oneshot::Receiver<runtime::Result<()>>>,
    /// Whether it has done it.
    done: JoinHandle<bool>,
}

impl Drop for Naming {
    fn drop(&mut self) {
        // No sandbox, no more tries; a claim that the engine has heard needs nobody who waits.
        self.done.abort();
    }
}

/// A sandbox that belongs to a session. Dropping it has it removed.
#[derive(Debug)]
pub struct Claimed {
    /// The sandbox.
    pub held: Held,
    /// When the session got it.
    pub since: Instant,
    /// Beside the first run.
    naming: Option<Naming>,
    counted: Counted,
}

impl Claimed {
    pub(super) fn new(held: Held, owner: &SessionKey) -> Claimed {
        let engine = held.lease.engine.clone();
        let counted = engine.counted("claimed");
        let (tell, heard) = oneshot::channel();
        let now = Arc::new(Notify::new());
        let done = tokio::spawn(engine.name(held.id.clone(), owner.clone(), now.clone(), tell));
        let naming = Some(Naming { now, heard: Some(heard), done });
        Claimed { held, since: Instant::now(), naming, counted }
    }

    /// Gives up the stream, and not the sandbox.
    pub fn let_go(self) -> Kept {
        let Claimed { held: Held { id: _, supervisor, lease }, since, naming, counted } = self;
        drop(supervisor);
        Kept { since, naming, lease, counted }
    }

    /// Waits until the engine has heard whose it is: from then on a later server finds it. Whether it was asked now.
    ///
    /// # Errors
    /// Where the engine could not be told: nothing that is in it would outlive this server.
    pub async fn is_named(&mut self) -> runtime::Result<bool> {
        let Some(naming) = &mut self.naming else { return Ok(false) };
        naming.now.notify_one();
        let Some(heard) = &mut naming.heard else { return Ok(false) };
        let named = heard.await; // a caller who goes away here leaves the question to the next one
        if let Some(naming) = &mut self.naming {
            naming.heard = None;
        }
        let named = named.unwrap_or_else(|panic| {
            Err(runtime::Error::Failed { what: "claim".into(), source: std::io::Error::other(panic) })
        });
        named.map(|()| true)
    }
}
