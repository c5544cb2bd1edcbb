//! An engine in memory, for tests of the floors above: no process, no isolation, faults on request.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::io::DuplexStream;
use tokio::task::AbortHandle;

use super::{
    Claim, Engine, Error, Fate, Found, KeySecret, Layer, Result, Runtime, Sandbox, SandboxId, SandboxSpec,
    SessionKey,
};

/// Bytes that a stream holds between its ends, as a pipe does.
const STREAM_BYTES: usize = 64 * 1024;

/// What a fake sandbox does with its end of the stream, until it is removed.
type Guest = dyn Fn(DuplexStream) -> AbortHandle + Send + Sync;

/// A call of the driver that a test can let fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `create`
    Create,
    /// `remove`
    Remove,
}

/// The engine in memory.
pub struct Fake {
    guest: Box<Guest>,
    next: AtomicU64,
    sandboxes: Mutex<HashMap<SandboxId, Entry>>,
    faults: Mutex<VecDeque<Call>>,
    created: AtomicU64,
}

struct Entry {
    guest: AbortHandle,
    claim: Option<Claim>,
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fake").finish_non_exhaustive()
    }
}

impl Fake {
    /// An engine whose sandboxes are tasks that `guest` spawns.
    pub fn new(guest: impl Fn(DuplexStream) -> AbortHandle + Send + Sync + 'static) -> Arc<Fake> {
        Arc::new(Fake {
            guest: Box::new(guest),
            next: AtomicU64::new(0),
            sandboxes: Mutex::default(),
            faults: Mutex::default(),
            created: AtomicU64::new(0),
        })
    }

    /// Lets the next `call` fail; several add up.
    pub fn fail_next(&self, call: Call) {
        self.faults().push_back(call);
    }

    /// Sandboxes that exist.
    pub fn alive(&self) -> usize {
        self.sandboxes().len()
    }

    /// Sandboxes that were ever made.
    pub fn created(&self) -> u64 {
        self.created.load(Ordering::SeqCst)
    }

    fn fault(&self, call: Call) -> Result<()> {
        let mut faults = self.faults();
        match faults.iter().position(|fault| *fault == call) {
            Some(at) => {
                faults.remove(at);
                Err(Error::Unavailable { driver: "fake", why: format!("{call:?} was to fail") })
            }
            None => Ok(()),
        }
    }

    fn faults(&self) -> std::sync::MutexGuard<'_, VecDeque<Call>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sandboxes(&self) -> std::sync::MutexGuard<'_, HashMap<SandboxId, Entry>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Runtime for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn secret(&self) -> KeySecret {
        KeySecret([0; 32])
    }

    async fn probe(&self, _first: &SandboxId, _spec: &SandboxSpec) -> Result<Engine> {
        let layers = vec![Layer::on("memory", "nothing: a fake")];
        Ok(Engine { version: "0".into(), rootless: true, image: "none".into(), layers })
    }

    async fn create(&self, _spec: &SandboxSpec) -> Result<Sandbox> {
        self.fault(Call::Create)?;
        let (ours, theirs) = tokio::io::duplex(STREAM_BYTES);
        let id = SandboxId(self.next.fetch_add(1, Ordering::SeqCst).to_string());
        let entry = Entry { guest: (self.guest)(theirs), claim: None };
        self.created.fetch_add(1, Ordering::SeqCst);
        self.sandboxes().insert(id.clone(), entry);
        Ok(Sandbox { id, stream: Box::new(ours) })
    }

    async fn attach(&self, id: &SandboxId) -> Result<Sandbox> {
        Err(Error::Gone(id.clone()))
    }

    async fn claim(&self, id: &SandboxId, owner: &SessionKey) -> Result<()> {
        match self.sandboxes().get_mut(id) {
            Some(entry) => entry.claim = Some(Claim { owner: owner.clone(), at: SystemTime::now() }),
            None => return Err(Error::Gone(id.clone())),
        }
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let found = |(id, entry): (&SandboxId, &Entry)| Found { id: id.clone(), claim: entry.claim.clone() };
        Ok(self.sandboxes().iter().map(found).collect())
    }

    async fn fate(&self, id: &SandboxId) -> Result<Fate> {
        Ok(match self.sandboxes().get(id) {
            Some(entry) if entry.guest.is_finished() => Fate::Exited { code: 1, stderr: String::new() },
            Some(_) => Fate::Running { out_of_memory_kills: None },
            None => Fate::Gone,
        })
    }

    async fn remove(&self, id: &SandboxId) -> Result<()> {
        self.fault(Call::Remove)?;
        if let Some(entry) = self.sandboxes().remove(id) {
            entry.guest.abort();
        }
        Ok(())
    }
}
