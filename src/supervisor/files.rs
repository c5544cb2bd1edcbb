//! The exchanges about a sandbox's files: small ones, each with a nonce of its own, beside a run as well.
//!
//! Whoever converses with a supervisor also serves these: what callers ask waits in a queue, a few are under way at
//! once, and the answers find their callers by the nonce. A caller may go away at any time: his answer is dropped.

use std::collections::HashMap;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::protocol::{self, Frame, Request, Violation};

/// Bytes of content or entries in one exchange: `FILE_BYTES` in program/files.py.
pub const FILE_BYTES: usize = 64 * 1024;
/// Beside the content of an answer: facts, and the lengths of sections.
const FACTS_BYTES: usize = 4096;
/// Callers that wait while others are served.
const QUEUE: usize = 16;
/// Exchanges under way at once: the supervisor serves one after the other, and must not wait for the next.
const UNDER_WAY: usize = 4;
/// Bytes of all the answers to them.
pub(super) const MOST_BYTES: usize = UNDER_WAY * (protocol::HEADER_BYTES + FILE_BYTES + FACTS_BYTES);
/// From the frame to its answer. The longest of them sorts a directory's names or removes 512 entries.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an entry of a listing before its name: `ENTRY` in program/files.py.
const ENTRY_BYTES: usize = 29;

/// What can be asked. Handles are the caller's own numbers.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
#[expect(missing_docs, reason = "the fields are the arguments of the calls that they are named after")]
pub enum Operation {
    /// What is at the path.
    Stat,
    /// The entries of a directory that come after the name in `data`; `more` where there are others.
    List,
    /// Where the symlink at the path leads.
    Target,
    /// Opens the regular file at the path.
    Open { handle: u64 },
    /// Content of an open file, at most `FILE_BYTES`.
    Read { handle: u64, offset: u64, length: usize },
    /// Begins a file that has no name until `Commit`; refused where the path cannot be one or `size` is too much.
    Create { handle: u64, size: u64 },
    /// `data` at the end of a file that was begun; where there is no space for it, the file is given up.
    Write { handle: u64 },
    /// Puts the file at its path, in one step, with the directories that are missing there.
    Commit {
        handle: u64,
        mode: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        mtime_ns: Option<i64>,
    },
    /// Gives up a handle; fine where it is none.
    Close { handle: u64 },
    /// Removes what is at the path; a large directory in parts, `more` where there is something left.
    Remove,
    /// Makes a directory, and those above.
    Make,
    /// Makes a symlink to `data`, which must lead to somewhere inside.
    Link,
}

/// One question.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// What is to be done.
    pub operation: Operation,
    /// Where: names with slashes between them, the workspace itself where empty.
    pub path: Vec<u8>,
    /// Content, a name or a target.
    pub data: Bytes,
}

/// Its answer.
#[derive(Debug, Clone)]
pub struct Reply {
    /// What is known of the file.
    pub facts: Facts,
    /// Content or entries.
    pub data: Bytes,
}

/// What a supervisor tells of a file; zeros where an operation has nothing to say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// Of the last change, since 1970.
    pub mtime_ns: i64,
    /// Its inode's number: another file of the same name has another.
    pub inode: u64,
    /// There was none before.
    pub created: bool,
    /// The operation has to be repeated for the rest.
    pub more: bool,
}

/// What there can be in a directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "u8", rename_all = "snake_case")]
pub enum Kind {
    /// A regular file.
    #[default]
    File,
    /// A directory.
    Directory,
    /// A symlink.
    Symlink,
    /// A FIFO or a socket: nothing with content.
    Other,
}

impl TryFrom<u8> for Kind {
    type Error = &'static str;

    fn try_from(number: u8) -> Result<Kind, &'static str> {
        Ok(match number {
            0 => Kind::File,
            1 => Kind::Directory,
            2 => Kind::Symlink,
            3 => Kind::Other,
            _ => return Err("there is no such kind"),
        })
    }
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Any bytes but a slash.
    pub name: Bytes,
    /// What it is.
    pub facts: Facts,
}

/// Why an exchange was not done; the sandbox is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing is there.
    #[error("there is no such file")]
    NotFound,
    /// It leads out of the workspace.
    #[error("the path leaves the workspace")]
    Outside,
    /// A FIFO, a socket or a device.
    #[error("that is no regular file")]
    NotAFile,
    /// A directory where a file is meant.
    #[error("that is a directory")]
    IsDirectory,
    /// A file where a directory is meant.
    #[error("a part of the path is no directory")]
    NotADirectory,
    /// Something else is in the way.
    #[error("something else is there")]
    Exists,
    /// The guest has taken away its own rights.
    #[error("the permissions do not allow it")]
    Denied,
    /// A name beyond what a file system takes.
    #[error("a name is too long")]
    NameTooLong,
    /// The workspace is full.
    #[error("the workspace is full: {available_bytes} bytes are left")]
    NoSpace {
        /// What it still takes.
        available_bytes: u64,
    },
    /// As many files are open as may be.
    #[error("too many files of this session are open")]
    Busy,
    /// A handle of an earlier server, or one that was given up.
    #[error("the file is not open any more")]
    Closed,
    /// Anything else.
    #[error("the operation failed")]
    Failed,
}

/// The JSON of an answer.
#[derive(Deserialize)]
struct Told {
    error: Option<String>,
    #[serde(default)]
    available_bytes: u64,
    #[serde(flatten)]
    facts: Facts,
}

impl Told {
    fn refusal(&self) -> Option<Refusal> {
        Some(match self.error.as_deref()? {
            "not_found" => Refusal::NotFound,
            "outside" => Refusal::Outside,
            "not_a_file" => Refusal::NotAFile,
            "is_directory" => Refusal::IsDirectory,
            "not_a_directory" => Refusal::NotADirectory,
            "exists" => Refusal::Exists,
            "denied" => Refusal::Denied,
            "name_too_long" => Refusal::NameTooLong,
            "no_space" => Refusal::NoSpace { available_bytes: self.available_bytes },
            "busy" => Refusal::Busy,
            "closed" => Refusal::Closed,
            _ => Refusal::Failed,
        })
    }
}

/// An answer's sections, checked.
fn parse(payload: Bytes) -> Result<Result<Reply, Refusal>, Violation> {
    if payload.len() > FILE_BYTES + FACTS_BYTES {
        return Err(Violation::Length(payload.len() as u64));
    }
    let [told, data] = protocol::sections(payload)?;
    let told: Told = serde_json::from_slice(&told).map_err(|_| Violation::Content("file"))?;
    Ok(match told.refusal() {
        Some(refusal) => Err(refusal),
        None => Ok(Reply { facts: told.facts, data }),
    })
}

/// The entries in the answer to `List`; `None` where they are none.
pub fn entries(mut data: Bytes) -> Option<Vec<Entry>> {
    let mut entries = Vec::new();
    while !data.is_empty() {
        if data.len() < ENTRY_BYTES {
            return None;
        }
        let kind = Kind::try_from(data.get_u8()).ok()?;
        let (mode, size, mtime_ns) = (u32::from(data.get_u16()), data.get_u64(), data.get_i64());
        let (inode, length) = (data.get_u64(), usize::from(data.get_u16()));
        if length == 0 || length > data.len() {
            return None;
        }
        let name = data.split_to(length);
        if name.contains(&b'/') || name.contains(&0) || name == "." || name == ".." {
            return None;
        }
        entries.push(Entry { name, facts: Facts { kind, mode, size, mtime_ns, inode, ..Facts::default() } });
    }
    Some(entries)
}

/// Why an exchange has no reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// By the supervisor itself.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The conversation with the supervisor is over, or it did not answer in time.
    #[error("the sandbox does not answer")]
    Gone,
}

/// What a caller asks, and where the answer goes.
#[derive(Debug)]
pub(super) struct Call {
    exchange: Exchange,
    reply: oneshot::Sender<Result<Reply, Refusal>>,
}

/// The callers' end. Asks the one supervisor that gave it, for as long as that is attached.
#[derive(Debug, Clone)]
pub struct Exchanges(mpsc::Sender<Call>);

impl Exchanges {
    /// Asks, and waits for the answer: somebody has to serve the supervisor meanwhile.
    ///
    /// # Errors
    /// Where there is no reply to it.
    pub async fn ask(&self, exchange: Exchange) -> Result<Reply, Unanswered> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Call { exchange, reply }).await.map_err(|_| Unanswered::Gone)?;
        Ok(answer.await.map_err(|_| Unanswered::Gone)??)
    }

    /// Whether the supervisor is attached no more.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// The supervisor's end: what is asked, and what is under way.
#[derive(Debug)]
pub(super) struct Desk {
    exchanges: Exchanges,
    calls: mpsc::Receiver<Call>,
    under_way: HashMap<u64, UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    /// None once the caller was told that no answer came in time.
    reply: Option<oneshot::Sender<Result<Reply, Refusal>>>,
    deadline: Instant,
}

impl Desk {
    pub(super) fn new() -> Desk {
        let (sender, calls) = mpsc::channel(QUEUE);
        Desk { exchanges: Exchanges(sender), calls, under_way: HashMap::new() }
    }

    pub(super) fn exchanges(&self) -> Exchanges {
        self.exchanges.clone()
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.under_way.is_empty()
    }

    /// The frame of the next call, where there is one and room for it.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Vec<u8>> {
        if self.under_way.len() >= UNDER_WAY {
            return Poll::Pending; // the next answer wakes us
        }
        loop {
            // Never closed: this has a sender of its own.
            let Poll::Ready(Some(call)) = self.calls.poll_recv(context) else { return Poll::Pending };
            let Call { exchange: Exchange { operation, path, data }, reply } = call;
            if reply.is_closed() && !matches!(operation, Operation::Close { .. }) {
                continue; // nobody waits for it any more
            }
            let nonce = super::nonce();
            let operation = serde_json::to_vec(&operation).expect("numbers under string keys are JSON");
            let mut frame = Vec::new();
            protocol::encode(&mut frame, nonce, Request::File, &[&operation, &path, &data]);
            let deadline = Instant::now() + TIMEOUT;
            self.under_way.insert(nonce, UnderWay { reply: Some(reply), deadline });
            return Poll::Ready(frame);
        }
    }

    /// An answer, to whom it belongs.
    pub(super) fn answer(&mut self, frame: Frame) -> Result<(), Violation> {
        let UnderWay { reply, deadline: _ } = self.under_way.remove(&frame.nonce).ok_or(Violation::Nonce)?;
        let answer = parse(frame.payload)?;
        if let Some(reply) = reply {
            let _ = reply.send(answer); // he may be gone
        }
        Ok(())
    }

    /// When the next answer is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.under_way.values().filter(|one| one.reply.is_some()).map(|one| one.deadline).min()
    }

    /// Tells the callers whose answers are overdue that there is none.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        for one in self.under_way.values_mut().filter(|one| one.deadline <= now) {
            one.reply = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(told: &str, data: &[u8]) -> Bytes {
        let mut payload = Vec::new();
        for section in [told.as_bytes(), data] {
            payload.extend_from_slice(&(section.len() as u32).to_be_bytes());
            payload.extend_from_slice(section);
        }
        payload.into()
    }

    fn entry(kind: u8, name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind, 1, 0xa4];
        bytes.extend_from_slice(&5_u64.to_be_bytes());
        bytes.extend_from_slice(&(-7_i64).to_be_bytes());
        bytes.extend_from_slice(&9_u64.to_be_bytes());
        bytes.extend_from_slice(&(name.len() as u16).to_be_bytes());
        bytes.extend_from_slice(name);
        bytes
    }

    #[test]
    fn an_answer_is_facts_and_data_or_a_refusal() {
        let reply = parse(payload(r#"{"kind":1,"size":3,"created":true}"#, b"\xff")).unwrap().unwrap();
        assert_eq!((reply.facts.kind, reply.facts.size, &reply.data[..]), (Kind::Directory, 3, &b"\xff"[..]));
        assert!(reply.facts.created);
        let refused = |told| parse(payload(told, b"")).unwrap().unwrap_err();
        assert_eq!(refused(r#"{"error":"outside"}"#), Refusal::Outside);
        let full = refused(r#"{"error":"no_space","available_bytes":12}"#);
        assert_eq!(full, Refusal::NoSpace { available_bytes: 12 });
        assert_eq!(refused(r#"{"error":"a word of the future"}"#), Refusal::Failed);
    }

    #[test]
    fn an_answer_that_is_none_of_ours_is_a_violation() {
        for told in ["", "[]", "{", r#"{"kind":4}"#, r#"{"kind":"x"}"#, r#"{"size":-1}"#, r#"{"error":1}"#] {
            assert_eq!(parse(payload(told, b"")).unwrap_err(), Violation::Content("file"), "{told}");
        }
        let most = parse(payload("{}", &vec![0; FILE_BYTES])).unwrap();
        assert!(most.is_ok());
        assert!(matches!(
            parse(payload("{}", &vec![0; FILE_BYTES + FACTS_BYTES])).unwrap_err(),
            Violation::Length(_)
        ));
    }

    #[test]
    fn entries_are_names_and_nothing_else() {
        let two = [entry(0, b"a\nb"), entry(2, b"\xff")].concat();
        let two = entries(two.into()).unwrap();
        assert_eq!((&two[0].name[..], two[1].facts.kind), (&b"a\nb"[..], Kind::Symlink));
        assert_eq!((two[0].facts.mode, two[0].facts.size, two[0].facts.mtime_ns), (0o644, 5, -7));
        for name in [&b""[..], b".", b"..", b"a/b", b"../x", b"a\0"] {
            assert_eq!(entries(entry(0, name).into()), None, "{name:?}");
        }
        assert_eq!(entries(entry(4, b"x").into()), None);
        let whole = entry(0, b"name");
        for cut in 1..whole.len() {
            assert_eq!(entries(Bytes::copy_from_slice(&whole[..cut])), None, "cut at {cut}");
        }
    }

    #[test]
    fn an_answer_that_nobody_asked_for_is_a_violation() {
        let mut desk = Desk::new();
        let frame = Frame { nonce: 1, kind: protocol::Answer::File, payload: payload("{}", b"") };
        assert_eq!(desk.answer(frame).unwrap_err(), Violation::Nonce);
    }

    // -- the conversation ----------------------------------------------------------------------------

    use super::super::{Caps, Error, Run, Supervisor};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    async fn next(stream: &mut DuplexStream) -> (u64, u8, Vec<u8>) {
        let (nonce, kind) = (stream.read_u64().await.unwrap(), stream.read_u8().await.unwrap());
        let mut payload = vec![0; stream.read_u32().await.unwrap() as usize];
        stream.read_exact(&mut payload).await.unwrap();
        (nonce, kind, payload)
    }

    async fn send(stream: &mut DuplexStream, nonce: u64, kind: u8, payload: &[u8]) {
        stream.write_u64(nonce).await.unwrap();
        stream.write_u8(kind).await.unwrap();
        stream.write_u32(payload.len() as u32).await.unwrap();
        stream.write_all(payload).await.unwrap();
    }

    /// Attached over a stream that holds next to nothing, with the sandbox's end of it.
    async fn attached() -> (Supervisor, DuplexStream) {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        let caps = Caps {
            stdout: 1000,
            stderr: 1000,
            result: 1000,
            error: 1000,
            listing_lines: 10,
            artifacts: 0,
            grace_ms: 1000,
            rlimits: Default::default(),
        };
        let greet = async {
            assert_eq!(next(&mut theirs).await.1, 255, "a fresh start");
            let (nonce, ..) = next(&mut theirs).await;
            let hello = br#"{"python":"3.0.0","pid":1,"uid":1000}"#;
            let section = [&(hello.len() as u32).to_be_bytes()[..], hello].concat();
            send(&mut theirs, nonce, 129, &section).await;
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        let (attached, ()) = tokio::join!(Supervisor::attach(Box::new(ours), &caps, deadline), greet);
        (attached.unwrap().0, theirs)
    }

    /// As a supervisor does it: one after the other, each answer as a whole before the next is read.
    async fn answer_all(mut stream: DuplexStream) {
        loop {
            let (nonce, kind, _) = next(&mut stream).await;
            match kind {
                4 => send(&mut stream, nonce, 132, &payload("{}", &[7; FILE_BYTES])).await,
                _ => report(&mut stream, nonce).await,
            }
        }
    }

    async fn report(stream: &mut DuplexStream, nonce: u64) {
        let sections: [&[u8]; 6] = [&[0; 28], b"null", b"", b"", b"[]", b""];
        let mut report = Vec::new();
        for section in sections {
            report.extend_from_slice(&(section.len() as u32).to_be_bytes());
            report.extend_from_slice(section);
        }
        send(stream, nonce, 130, &report).await;
    }

    /// A run with input goes on until it is interrupted.
    async fn run_until_interrupted(mut stream: DuplexStream) {
        loop {
            let (nonce, kind, payload) = next(&mut stream).await;
            assert_eq!(kind, 2);
            if payload.len() > FILE_BYTES {
                let (interrupted, kind, _) = next(&mut stream).await;
                assert_eq!((interrupted, kind), (nonce, 3));
            }
            report(&mut stream, nonce).await;
        }
    }

    #[tokio::test]
    async fn a_run_whose_caller_goes_away_while_it_is_sent_leaves_a_supervisor_that_runs() {
        let stdin = "x".repeat(2 * FILE_BYTES);
        let input = Run { stdin: &stdin, ..Run::new("1", Duration::from_secs(5)) };
        let mut cancelled = 0;
        for polls in 0..200 {
            let (mut supervisor, theirs) = attached().await;
            let peer = tokio::spawn(run_until_interrupted(theirs));
            {
                let mut running = Box::pin(supervisor.run(&input));
                for _ in 0..polls {
                    assert!(futures_util::poll!(&mut running).is_pending());
                    tokio::task::yield_now().await;
                }
            }
            let report = supervisor.cancel().await.unwrap_or_else(|error| panic!("after {polls}: {error}"));
            cancelled += usize::from(report.is_some());
            supervisor
                .run(&Run::new("1", Duration::from_secs(1)))
                .await
                .unwrap_or_else(|error| panic!("after {polls}: {error}"));
            peer.abort();
        }
        assert_eq!(cancelled, 199, "all but the one that was never asked for");
    }

    fn write() -> Exchange {
        let operation = Operation::Write { handle: 1 };
        Exchange { operation, path: Vec::new(), data: vec![1; FILE_BYTES].into() }
    }

    #[tokio::test]
    async fn both_sides_can_have_more_to_say_than_the_stream_holds() {
        let (mut supervisor, theirs) = attached().await;
        let peer = tokio::spawn(answer_all(theirs));
        let exchanges = supervisor.exchanges();
        let asked = futures_util::future::join_all((0..2 * QUEUE).map(|_| exchanges.ask(write())));
        let replies = tokio::select! {
            replies = asked => replies,
            error = supervisor.serve() => panic!("{error}"),
            () = tokio::time::sleep(Duration::from_secs(10)) => panic!("each waits for the other"),
        };
        assert!(replies.iter().all(|reply| reply.as_ref().unwrap().data.len() == FILE_BYTES));
        supervisor.settle().await.unwrap();
        supervisor.run(&Run::new("1", Duration::from_secs(1))).await.unwrap();
        peer.abort();
    }

    #[tokio::test]
    async fn a_caller_who_goes_away_at_any_moment_leaves_a_supervisor_that_runs() {
        for polls in 0..200 {
            let (mut supervisor, theirs) = attached().await;
            let peer = tokio::spawn(answer_all(theirs));
            let exchanges = supervisor.exchanges();
            {
                let mut asked = Box::pin(exchanges.ask(write()));
                let mut served = Box::pin(supervisor.serve());
                for _ in 0..polls {
                    if futures_util::poll!(&mut asked).is_ready() {
                        break;
                    }
                    let _ = futures_util::poll!(&mut served);
                    tokio::task::yield_now().await;
                }
            }
            supervisor
                .run(&Run::new("1", Duration::from_secs(1)))
                .await
                .unwrap_or_else(|error| panic!("after {polls}: {error}"));
            peer.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_supervisor_that_does_not_answer_is_given_up_and_the_caller_told() {
        let (mut supervisor, _theirs) = attached().await;
        let exchanges = supervisor.exchanges();
        let (asked, served) = tokio::join!(exchanges.ask(write()), async {
            let error = supervisor.serve().await;
            (error, supervisor.run(&Run::new("1", Duration::from_secs(1))).await)
        });
        assert_eq!(asked.unwrap_err(), Unanswered::Gone);
        assert!(matches!(served.0, Error::Unresponsive), "{}", served.0);
        assert!(matches!(served.1, Err(Error::Unresponsive)), "and no run is begun there");
    }
}
