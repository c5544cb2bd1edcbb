//! The files of a session: read, written and removed inside its sandbox, beside its runs as well.
//!
//! A transfer is a row of small exchanges with the supervisor. Each is served by whoever has the session's seat: a
//! run that waits for its report, or, where nobody has, by the caller himself. So neither waits for the whole of the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::loss::Loss;
use super::{ATTEMPTS, Owner, Place, Seat, Session, Sessions, VERDICT_WAIT};
use crate::metrics::Counted;
use crate::runtime::SessionKey;
use crate::supervisor;
use crate::supervisor::files::{Entry, Exchange, Exchanges, Operation, Reply, Unanswered};
pub use crate::supervisor::files::{FILE_BYTES, Facts, Kind, Refusal};

/// A directory that is still not empty then is being filled as fast as it is emptied.
const MOST_REMOVALS: usize = 1000;

/// Why something about files was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no session.
    #[error("there is no session of this user_id")]
    NoSession,
    /// No sandbox could be had.
    #[error(transparent)]
    Session(#[from] super::Error),
    /// The sandbox is well and says no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The sandbox, or the conversation with it, is over.
    #[error("the sandbox was lost meanwhile")]
    Lost,
}

impl From<Unanswered> for Error {
    fn from(error: Unanswered) -> Error {
        match error {
            Unanswered::Refused(refusal) => Error::Refused(refusal),
            Unanswered::Gone => Error::Lost,
        }
    }
}

/// What is to happen where there is no session yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// It is made.
    Make,
    /// That is an error.
    Refuse,
}

/// The right to a session's files, which keeps it from being idle. A cheap handle.
#[derive(Debug, Clone)]
pub struct Files(Arc<Transfer>);

#[derive(Debug)]
struct Transfer {
    sessions: Sessions,
    session: Arc<Session>,
    exchanges: Exchanges,
    next_handle: AtomicU64,
    _counted: Counted,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.session.glance().last_end = Instant::now();
        self.session.transfers.send_modify(|transfers| *transfers -= 1);
    }
}

impl Sessions {
    /// The files of the owner's session: at once where a sandbox is attached, whatever it does; else in its turn.
    ///
    /// # Errors
    /// Where there is no session, or none can be made.
    pub async fn files(&self, owner: Owner<'_>, missing: Missing) -> Result<Files, Error> {
        let key = self.key(owner);
        if missing == Missing::Refuse {
            let session = self.0.table().get(&key).cloned();
            if session.is_none_or(|session| session.glance().sandbox.is_none()) {
                return Err(Error::NoSession);
            }
        }
        loop {
            let place = match self.enter(&key) {
                Err(super::Error::Busy { retry_after }) => {
                    return self.beside(&key).ok_or(super::Error::Busy { retry_after }.into());
                }
                place => place?,
            };
            if let Some(files) = self.take_turn(place, missing).await? {
                return Ok(files);
            }
        }
    }

    /// Files of a session that is in use, and whose queue is full: who waits there waits for other things.
    fn beside(&self, key: &SessionKey) -> Option<Files> {
        let session = self.0.table().get(key).cloned()?;
        let exchanges = session.exchanges.borrow().clone().filter(|exchanges| !exchanges.is_closed())?;
        Some(Files::new(self, &session, exchanges))
    }

    /// `None` where the session ended meanwhile, so that another is to be asked for.
    async fn take_turn(&self, place: Place, missing: Missing) -> Result<Option<Files>, Error> {
        let session = place.session.clone();
        let mut attached = session.exchanges.subscribe();
        let mut turn = tokio::select! {
            biased; // with the seat the stream can be looked at first
            turn = place.take_seat() => turn,
            exchanges = open(&mut attached) => return Ok(Some(Files::new(self, &session, exchanges))),
        };
        turn.retire_if_outlived();
        if missing == Missing::Refuse && turn.seat().claimed.is_none() && turn.seat().kept.is_none() {
            return Err(Error::NoSession);
        }
        for _ in 0..ATTEMPTS {
            turn.have_sandbox("not_recovered").await?;
            let Some(supervisor) = turn.supervisor() else { return Ok(None) };
            if supervisor.settle().await.is_ok() && supervisor.is_alive() {
                let exchanges = supervisor.exchanges();
                turn.is_named().await?; // what is put there has to be there after a restart, too
                return Ok(Some(Files::new(self, &session, exchanges)));
            }
            turn.let_go();
        }
        Err(Error::Lost)
    }
}

/// Once the supervisor on the seat can be asked.
async fn open(attached: &mut tokio::sync::watch::Receiver<Option<Exchanges>>) -> Exchanges {
    let open = |exchanges: &Option<Exchanges>| exchanges.as_ref().is_some_and(|one| !one.is_closed());
    match attached.wait_for(open).await.map(|exchanges| exchanges.clone()) {
        Ok(Some(exchanges)) => exchanges,
        _ => std::future::pending().await, // whoever waits here waits for the seat, too
    }
}

impl Files {
    fn new(sessions: &Sessions, session: &Arc<Session>, exchanges: Exchanges) -> Files {
        session.transfers.send_modify(|transfers| *transfers += 1);
        Files(Arc::new(Transfer {
            sessions: sessions.clone(),
            session: session.clone(),
            exchanges,
            next_handle: AtomicU64::new(getrandom::u32().map_or(0, u64::from) << 16), // apart from other transfers'
            _counted: Counted::new(sessions.0.metrics.file_transfers.clone()),
        }))
    }

    /// What is at a path.
    pub async fn stat(&self, path: &[u8]) -> Result<Facts, Error> {
        Ok(self.ask(Operation::Stat, path, Bytes::new()).await?.facts)
    }

    /// Entries of a directory that come after a name, and whether there are more.
    pub async fn list(&self, path: &[u8], after: &Bytes) -> Result<(Vec<Entry>, bool), Error> {
        let reply = self.ask(Operation::List, path, after.clone()).await?;
        let entries = supervisor::files::entries(reply.data).ok_or(Refusal::Failed)?;
        let more = reply.facts.more && !entries.is_empty(); // else it would go on for ever
        Ok((entries, more))
    }

    /// Where a symlink leads.
    pub async fn target(&self, path: &[u8]) -> Result<Bytes, Error> {
        Ok(self.ask(Operation::Target, path, Bytes::new()).await?.data)
    }

    /// Makes a directory, and those above.
    pub async fn make_directory(&self, path: &[u8]) -> Result<(), Error> {
        self.ask(Operation::Make, path, Bytes::new()).await.map(drop)
    }

    /// Makes a symlink that leads to somewhere inside.
    pub async fn link(&self, path: &[u8], target: Bytes) -> Result<(), Error> {
        self.ask(Operation::Link, path, target).await.map(drop)
    }

    /// Removes a file, or a directory with all that is in it.
    pub async fn remove(&self, path: &[u8]) -> Result<(), Error> {
        for _ in 0..MOST_REMOVALS {
            if !self.ask(Operation::Remove, path, Bytes::new()).await?.facts.more {
                return Ok(());
            }
        }
        Err(Refusal::Failed.into())
    }

    /// Opens a regular file.
    pub async fn open(&self, path: &[u8]) -> Result<Reader, Error> {
        let handle = self.handle();
        let facts = self.ask(Operation::Open { handle: handle.number }, path, Bytes::new()).await?.facts;
        Ok(Reader { handle, facts })
    }

    /// Begins a file of so many bytes, if that is known.
    pub async fn create(&self, path: &[u8], size: Option<u64>) -> Result<Writer, Error> {
        let handle = self.handle();
        let operation = Operation::Create { handle: handle.number, size: size.unwrap_or(0) };
        self.ask(operation, path, Bytes::new()).await?;
        Ok(Writer { handle, path: path.to_vec() })
    }

    fn handle(&self) -> Handle {
        let number = self.0.next_handle.fetch_add(1, Ordering::Relaxed);
        Handle { files: self.clone(), number, open: true }
    }

    /// May be dropped at any await.
    async fn ask(&self, operation: Operation, path: &[u8], data: Bytes) -> Result<Reply, Error> {
        let exchange = Exchange { operation, path: path.to_vec(), data };
        let mut answer = std::pin::pin!(self.0.exchanges.ask(exchange));
        // Somebody serves it, or gives up the seat by his own deadline.
        let mut seat = tokio::select! {
            biased;
            answer = &mut answer => return Ok(answer?),
            seat = self.0.session.seat.clone().lock_owned() => seat,
        };
        let Some(claimed) = &mut seat.claimed else { return Ok(answer.await?) }; // it is closed, and says so
        let supervisor = &mut claimed.held.supervisor;
        let error = tokio::select! {
            biased;
            answer = &mut answer => match supervisor.settle().await {
                Ok(()) => return Ok(answer?),
                Err(error) => error,
            },
            error = supervisor.serve() => error,
        };
        // Goes on where the caller goes away: nobody else knows what was wrong.
        let _ = tokio::spawn(give_up(self.0.sessions.clone(), self.0.session.clone(), seat, error)).await;
        Err(Error::Lost)
    }
}

/// The conversation broke: looks what became of the sandbox, as a run does.
async fn give_up(
    sessions: Sessions,
    session: Arc<Session>,
    mut seat: OwnedMutexGuard<Seat>,
    error: supervisor::Error,
) {
    let Some(id) = seat.claimed.as_ref().map(|claimed| claimed.held.id.clone()) else { return };
    let fate = sessions.0.fate_after(&error, &id, Instant::now() + VERDICT_WAIT).await;
    let deleted = session.glance().deleted;
    let reason = Loss::of(&error, &fate, deleted);
    tracing::warn!(
        session = %session.key, sandbox = %id, reason = reason.label(), %error, ?fate,
        "a sandbox was lost or is out of reach: it was asked about files"
    );
    if reason.is_open() {
        return seat.let_go(); // it may well live, and the next one looks
    }
    sessions.0.metrics.lost.with_label_values(&[reason.label()]).inc();
    session.glance().sandbox = None;
    seat.empty();
    seat.lost = true; // which the next answer to a run says
}

/// A number that the supervisor knows a file by. It is told when that is dropped.
#[derive(Debug)]
struct Handle {
    files: Files,
    number: u64,
    open: bool,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let Ok(tasks) = tokio::runtime::Handle::try_current() else { return };
        if self.open {
            let (files, handle) = (self.files.clone(), self.number);
            // One exchange: ends by its own deadline.
            tasks.spawn(async move { files.ask(Operation::Close { handle }, &[], Bytes::new()).await });
        }
    }
}

/// A file that is being read.
#[derive(Debug)]
pub struct Reader {
    handle: Handle,
    /// As it was when it was opened.
    pub facts: Facts,
}

impl Reader {
    /// Content from `offset` on, up to `FILE_BYTES` of it; empty at the end.
    pub async fn read(&self, offset: u64, length: u64) -> Result<Bytes, Error> {
        let length = usize::try_from(length).unwrap_or(FILE_BYTES).min(FILE_BYTES);
        let operation = Operation::Read { handle: self.handle.number, offset, length };
        let mut data = self.handle.files.ask(operation, &[], Bytes::new()).await?.data;
        data.truncate(length);
        self.handle.files.count("out", data.len());
        Ok(data)
    }
}

/// A file that is being written, and has no name yet: dropped before `commit`, nothing is left of it.
#[derive(Debug)]
pub struct Writer {
    handle: Handle,
    path: Vec<u8>,
}

impl Writer {
    /// Adds to its end.
    pub async fn write(&self, mut data: Bytes) -> Result<(), Error> {
        while !data.is_empty() {
            let part = data.split_to(data.len().min(FILE_BYTES));
            let length = part.len();
            let operation = Operation::Write { handle: self.handle.number };
            self.handle.files.ask(operation, &[], part).await?;
            self.handle.files.count("in", length);
        }
        Ok(())
    }

    /// Puts it at its path, in place of what is there.
    pub async fn commit(mut self, mode: u32, mtime_ns: Option<i64>) -> Result<Facts, Error> {
        let operation = Operation::Commit { handle: self.handle.number, mode, mtime_ns };
        let reply = self.handle.files.ask(operation, &self.path, Bytes::new()).await?;
        self.handle.open = false;
        Ok(reply.facts)
    }
}

impl Files {
    fn count(&self, direction: &str, bytes: usize) {
        let metrics = &self.0.sessions.0.metrics;
        metrics.file_bytes.with_label_values(&[direction]).inc_by(bytes as u64);
    }
}
