//! An engine in memory, for tests of the floors above: no process, no isolation, faults on request.
//!
//! It outlives the server that uses it, as Docker does: a later one, on a runtime of its own, finds what was left.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::io::DuplexStream;
use tokio::task::AbortHandle;

use super::{
    Claim, Claiming, Engine, Error, Fate, Found, KeySecret, Layer, Result, Runtime, Sandbox, SandboxId,
    SandboxSpec, SessionKey, detached,
};

/// Bytes that a stream holds between its ends, as a pipe does.
const STREAM_BYTES: usize = 64 * 1024;

/// What a fake sandbox does with its end of the stream, until it is removed.
type Guest = dyn Fn(DuplexStream, Arc<Inside>) -> AbortHandle + Send + Sync;

/// What is inside a fake sandbox.
#[derive(Debug, Default)]
pub struct Inside {
    /// Tells sandboxes apart, from within.
    pub serial: u64,
    /// Its workspace: one line for each file.
    pub files: Mutex<Vec<String>>,
    /// Its PID 1 has ended.
    pub dead: AtomicBool,
}

/// A call of the driver that a test can let fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `create`
    Create,
    /// `attach`
    Attach,
    /// `claim`
    Claim,
    /// `list`
    List,
    /// `fate`
    Fate,
    /// `remove`
    Remove,
}

/// How a call goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It has no effect and says so.
    Fails,
    /// It has its effect, and the answer is lost.
    Unheard,
    /// It has its effect, and the answer comes that much later.
    Late(Duration),
}

/// The engine in memory. A cheap handle.
#[derive(Clone)]
pub struct Fake(Arc<Inner>);

struct Inner {
    guest: Box<Guest>,
    next: AtomicU64,
    sandboxes: Mutex<BTreeMap<SandboxId, Entry>>,
    faults: Mutex<VecDeque<(Call, Fault)>>,
    /// Claims that were heard, and are not carried out yet.
    claims: Mutex<Vec<(SandboxId, Claim)>>,
}

struct Entry {
    inside: Arc<Inside>,
    /// Of who is attached.
    stream: Option<AbortHandle>,
    claim: Option<Claim>,
    /// `remove` was called.
    doomed: bool,
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fake").finish_non_exhaustive()
    }
}

impl Fake {
    /// An engine whose sandboxes are tasks that `guest` spawns.
    pub fn new(
        guest: impl Fn(DuplexStream, Arc<Inside>) -> AbortHandle + Send + Sync + 'static,
    ) -> Arc<Fake> {
        Arc::new(Fake(Arc::new(Inner {
            guest: Box::new(guest),
            next: AtomicU64::new(0),
            sandboxes: Mutex::default(),
            faults: Mutex::default(),
            claims: Mutex::default(),
        })))
    }

    /// Lets the next `call` fail; several add up.
    pub fn fail_next(&self, call: Call) {
        self.fault_next(call, Fault::Fails);
    }

    /// Lets the next `call` go wrong; several add up.
    pub fn fault_next(&self, call: Call, fault: Fault) {
        lock(&self.0.faults).push_back((call, fault));
    }

    /// Forgets the faults that are still to come.
    pub fn mend(&self) {
        lock(&self.0.faults).clear();
    }

    /// Sandboxes that exist.
    pub fn alive(&self) -> usize {
        self.0.sandboxes().len()
    }

    /// Sandboxes that were ever made.
    pub fn created(&self) -> u64 {
        self.0.next.load(Ordering::SeqCst)
    }

    /// Claimed sandboxes, but for those that somebody has asked to remove: serial and owner.
    pub fn owned(&self) -> Vec<(u64, SessionKey)> {
        let sandboxes = self.0.sandboxes();
        let owned = sandboxes.values().filter(|entry| !entry.doomed);
        owned.filter_map(|entry| Some((entry.inside.serial, entry.claim.clone()?.owner))).collect()
    }

    /// Breaks the stream of the sandbox `serial`, which lives on.
    pub fn cut(&self, serial: u64) {
        self.on(serial, |entry| entry.detach());
    }

    /// Ends the PID 1 of the sandbox `serial`.
    pub fn kill(&self, serial: u64) {
        self.on(serial, |entry| {
            entry.inside.dead.store(true, Ordering::SeqCst);
            entry.detach();
        });
    }

    /// Removes the sandbox `serial` behind the server's back.
    pub fn vanish(&self, serial: u64) {
        self.on(serial, |entry| entry.detach());
        self.0.sandboxes().retain(|_, entry| entry.inside.serial != serial);
    }

    /// The server was killed: its ends of all streams are closed. What it asked for is carried out in time.
    pub fn server_gone(&self) {
        self.0.sandboxes().values_mut().for_each(Entry::detach);
        lock(&self.0.faults).clear();
    }

    /// Carries out the claims that it had heard of an earlier server; gives their serials.
    pub fn catch_up(&self) -> Vec<u64> {
        let heard = std::mem::take(&mut *lock(&self.0.claims));
        heard.into_iter().filter_map(|(id, claim)| self.0.write(&id, claim)).collect()
    }

    fn on(&self, serial: u64, act: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.0.sandboxes().values_mut().find(|entry| entry.inside.serial == serial) {
            act(entry);
        }
    }
}

impl Entry {
    fn detach(&mut self) {
        if let Some(stream) = self.stream.take() {
            stream.abort();
        }
    }
}

impl Inner {
    /// What the next `call` is to suffer; an error where it is to have no effect.
    fn fault(&self, call: Call) -> Result<Option<Fault>> {
        let mut faults = lock(&self.faults);
        let at = faults.iter().position(|(other, _)| *other == call);
        match at.and_then(|at| faults.remove(at)) {
            Some((_, Fault::Fails)) => Err(lost(call)),
            other => Ok(other.map(|(_, fault)| fault)),
        }
    }

    fn sandboxes(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Entry>> {
        lock(&self.sandboxes)
    }

    fn write(&self, id: &SandboxId, claim: Claim) -> Option<u64> {
        let mut sandboxes = self.sandboxes();
        let entry = sandboxes.get_mut(id)?;
        entry.claim = Some(claim);
        Some(entry.inside.serial)
    }

    fn connect(&self, entry: &mut Entry) -> Box<DuplexStream> {
        let (ours, theirs) = tokio::io::duplex(STREAM_BYTES);
        entry.detach();
        entry.stream = Some((self.guest)(theirs, entry.inside.clone()));
        Box::new(ours)
    }

    async fn create(&self) -> Result<Sandbox> {
        let fault = self.fault(Call::Create)?;
        let serial = self.next.fetch_add(1, Ordering::SeqCst);
        let id = SandboxId(serial.to_string());
        let inside = Arc::new(Inside { serial, ..Inside::default() });
        let mut entry = Entry { inside, stream: None, claim: None, doomed: false };
        let stream = self.connect(&mut entry);
        self.sandboxes().insert(id.clone(), entry);
        if let Err(error) = answered(Call::Create, fault).await {
            self.sandboxes().remove(&id); // as a driver does whose create failed in the middle
            return Err(error);
        }
        Ok(Sandbox { id, stream })
    }
}

/// The way of an answer.
async fn answered(call: Call, fault: Option<Fault>) -> Result<()> {
    match fault {
        Some(Fault::Late(time)) => tokio::time::sleep(time).await,
        Some(Fault::Unheard) => return Err(lost(call)),
        Some(Fault::Fails) | None => {}
    }
    Ok(())
}

fn lost(call: Call) -> Error {
    Error::Unavailable { driver: "fake", why: format!("{call:?} was to fail") }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (inner, undoing) = (self.0.clone(), self.0.clone());
        detached("fake", async move { inner.create().await }, async move |id| {
            undoing.sandboxes().remove(&id);
        })
        .await
    }

    async fn attach(&self, id: &SandboxId) -> Result<Sandbox> {
        let fault = self.0.fault(Call::Attach)?;
        let stream = match self.0.sandboxes().get_mut(id) {
            Some(entry) if !entry.inside.dead.load(Ordering::SeqCst) => self.0.connect(entry),
            _ => return Err(Error::Gone(id.clone())),
        };
        answered(Call::Attach, fault).await?;
        Ok(Sandbox { id: id.clone(), stream })
    }

    async fn claim(&self, id: &SandboxId, owner: &SessionKey) -> Result<Claiming> {
        let fault = self.0.fault(Call::Claim)?;
        if !self.0.sandboxes().contains_key(id) {
            return Err(Error::Gone(id.clone()));
        }
        let claim = Claim { owner: owner.clone(), at: SystemTime::now() };
        lock(&self.0.claims).push((id.clone(), claim.clone()));
        let (inner, id) = (self.0.clone(), id.clone());
        Ok(Box::pin(async move {
            let answer = answered(Call::Claim, fault).await;
            lock(&inner.claims).retain(|(other, _)| *other != id);
            inner.write(&id, claim);
            answer
        }))
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let fault = self.0.fault(Call::List)?;
        let found = |(id, entry): (&SandboxId, &Entry)| Found { id: id.clone(), claim: entry.claim.clone() };
        let found = self.0.sandboxes().iter().map(found).collect();
        answered(Call::List, fault).await?;
        Ok(found)
    }

    async fn fate(&self, id: &SandboxId) -> Result<Fate> {
        let fault = self.0.fault(Call::Fate)?;
        let fate = match self.0.sandboxes().get(id) {
            Some(entry) if entry.inside.dead.load(Ordering::SeqCst) => {
                Fate::Exited { code: 1, stderr: String::new() }
            }
            Some(_) => Fate::Running { out_of_memory_kills: None },
            None => Fate::Gone,
        };
        answered(Call::Fate, fault).await?;
        Ok(fate)
    }

    async fn remove(&self, id: &SandboxId) -> Result<()> {
        if let Some(entry) = self.0.sandboxes().get_mut(id) {
            entry.doomed = true;
        }
        let fault = self.0.fault(Call::Remove)?;
        if let Some(mut entry) = self.0.sandboxes().remove(id) {
            entry.detach();
        }
        answered(Call::Remove, fault).await
    }
}
