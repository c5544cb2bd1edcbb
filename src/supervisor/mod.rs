//! Floor 3: the conversation with one sandbox. Deadlines and caps are kept here, whatever a guest does.

pub mod fake;
pub mod files;
mod program;
pub mod protocol;
mod report;
mod teller;

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::FutureExt;
use serde::Serialize;
use tokio::io::AsyncWrite;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tokio_util::io::poll_read_buf;
use tracing::Instrument;
use tracing::field::{Empty, debug};

use crate::phase::phase;
use crate::runtime::{Duplex, Layer, LayerState, SandboxSpec};
use files::{Desk, Exchanges};
pub use program::SOURCE;
pub use protocol::Violation;
use protocol::{Answer, Frame, Request};
use report::Asked;
pub use report::{
    Aftermath, Artifact, ErrorDetail, ErrorKind, Field, MAX_JSON_DEPTH, Outcome, Report, is_nested_too_deeply,
};
pub use teller::{Follower, Teller, Told, teller};

/// A program that tries, from inside, what the layers forbid; see `probe_layers`.
const PROBE: &str = include_str!("probe.py");
/// What a supervisor says of itself is short.
const HELLO_BYTES: usize = 64 * 1024;
/// Room for a report and the lengths of sections.
const REPORT_BYTES: usize = 64 * 1024;
/// The listing's own cap in program/listing.py, 512 KiB, each byte at most six as JSON.
const LISTING_BYTES: usize = 6 * 512 * 1024;
/// A read buffer that grew beyond this is given back after the run.
const KEPT_BUFFER_BYTES: usize = 64 * 1024;

/// The caps of every run in a sandbox.
#[derive(Debug, Clone, Serialize)]
pub struct Caps {
    /// Bytes of stdout that are kept.
    pub stdout: u64,
    /// Bytes of stderr that are kept.
    pub stderr: u64,
    /// Bytes of the result as JSON.
    pub result: u64,
    /// Bytes of each text of an error.
    pub error: u64,
    /// Lines of the workspace's listing.
    pub listing_lines: u64,
    /// Bytes of artifacts and display together; 0 for none.
    pub artifacts: u64,
    /// From the first, gentle interrupt of a run to SIGKILL, in milliseconds.
    pub grace_ms: u64,
    /// Resource limits of each run's process, by their names without `RLIMIT_`, where they stand in for a
    /// control group.
    pub rlimits: std::collections::BTreeMap<&'static str, u64>,
}

/// One execution of code.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// Python source.
    pub code: &'a str,
    /// The variables: a JSON object as it came, or nothing.
    pub data: &'a str,
    /// What the run reads from its standard input.
    pub stdin: &'a str,
    /// Its wall time.
    pub timeout: Duration,
    /// In which interpreter.
    pub mode: Mode,
    /// What it may use.
    pub narrowed: Narrowed,
    /// For who wants to know at once what it prints.
    pub teller: Option<&'a Teller>,
    /// Told when it is to be interrupted.
    pub interrupt: Option<&'a Notify>,
}

impl<'a> Run<'a> {
    /// A fresh one that gets nothing and may use what its sandbox may.
    pub fn new(code: &'a str, timeout: Duration) -> Run<'a> {
        Run {
            code,
            data: "",
            stdin: "",
            timeout,
            mode: Mode::Fresh,
            narrowed: Narrowed::default(),
            teller: None,
            interrupt: None,
        }
    }
}

/// In which interpreter a run's code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// A new one, which ends with it.
    #[default]
    Fresh,
    /// The session's own, which keeps variables, imports and threads.
    Kernel,
}

impl Mode {
    /// As in a request.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Fresh => "fresh",
            Mode::Kernel => "kernel",
        }
    }
}

/// Less than the sandbox's limits, for one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Narrowed {
    /// CPU time of its process.
    pub cpu: Option<Duration>,
    /// Bytes that its process maps beyond what an idle interpreter has.
    pub memory_bytes: Option<u64>,
    /// Bytes of each of stdout and stderr that are kept.
    pub output_bytes: Option<u64>,
}

/// What a supervisor is told of a run, beside its code.
#[derive(Serialize)]
struct Options {
    timeout_ms: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    kernel: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_bytes: Option<u64>,
}

impl From<&Run<'_>> for Options {
    fn from(run: &Run<'_>) -> Options {
        let Narrowed { cpu, memory_bytes, output_bytes } = run.narrowed;
        Options {
            timeout_ms: run.timeout.as_millis() as u64,
            kernel: run.mode == Mode::Kernel,
            stream: run.teller.is_some(),
            cpu_ms: cpu.map(|cpu| cpu.as_millis() as u64),
            memory_bytes,
            output_bytes,
        }
    }
}

/// What a supervisor tells of itself when it is attached.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Hello {
    /// The interpreter's version, e.g. `3.13.1`.
    pub python: String,
    /// 1 in a sandbox, but for one that was taken up again beside its parked PID 1.
    pub pid: u32,
    /// Whether it found PID 1 to be this same program, parked.
    #[serde(default)]
    pub beside: bool,
    /// Its user.
    pub uid: u32,
    /// 1 where no program it runs can gain rights.
    #[serde(rename = "NoNewPrivs")]
    pub no_new_privileges: Option<String>,
    /// 2 where a filter is installed.
    #[serde(rename = "Seccomp")]
    pub seccomp: Option<String>,
    /// The bounding set in hex.
    #[serde(rename = "CapBnd")]
    pub bounding_set: Option<String>,
    /// The effective set in hex.
    #[serde(rename = "CapEff")]
    pub effective_set: Option<String>,
}

impl Hello {
    /// The name of the first layer that this sandbox lacks though every sandbox is to have it.
    pub fn missing_layer(&self) -> Option<&'static str> {
        let none =
            |set: &Option<String>| set.as_ref().is_none_or(|set| set.bytes().all(|digit| digit == b'0'));
        let is = |field: &Option<String>, wanted| field.as_ref().is_none_or(|value| value == wanted);
        [
            (self.pid == 1 || self.beside, "pid_namespace"),
            (self.uid != 0, "user"),
            (none(&self.bounding_set) && none(&self.effective_set), "capabilities"),
            (is(&self.no_new_privileges, "1"), "no_new_privileges"),
            (is(&self.seccomp, "2"), "seccomp"),
        ]
        .into_iter()
        .find_map(|(holds, layer)| (!holds).then_some(layer))
    }
}

/// Why a conversation ended. Its sandbox is condemned by each of these.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream ended or broke: the supervisor is dead, or its engine is.
    #[error("the stream to the supervisor ended")]
    Ended,
    /// The stream had ended before a run was handed over as a whole: its code has surely not begun.
    #[error("the sandbox had died before the run")]
    NotBegun,
    /// No answer by the deadline, which every guest can reach and none can pass.
    #[error("the supervisor does not answer")]
    Unresponsive,
    /// Bytes that are no frame of ours.
    #[error("the supervisor sent {0}")]
    Violation(#[from] Violation),
    /// The program that looks at a sandbox from inside failed there.
    #[error("the sandbox could not be looked at from inside: {0}")]
    Probe(String),
    /// A sandbox without a layer that was asked for.
    #[error("the sandbox lacks the layer {0}")]
    Layer(&'static str),
}

/// The server's side of an attached supervisor.
pub struct Supervisor {
    stream: Duplex,
    buffer: BytesMut,
    /// What is left of the frame that is being written.
    outgoing: Bytes,
    /// What was written may lie in a buffer of the stream's.
    unflushed: bool,
    desk: Desk,
    grace: Duration,
    longest: usize,
    error_bytes: usize,
    /// The most that a run can have printed.
    output_bytes: usize,
    /// Of the last run.
    asked: Asked,
    state: State,
}

/// Where a conversation stands, so that it can be taken up when a caller was dropped in the middle.
#[derive(Debug, Clone, Copy)]
enum State {
    Idle,
    /// Its frame is out, or is the next that goes out.
    Running {
        nonce: u64,
    },
}

/// Whether to take up what is asked about files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Calls {
    Take,
    Leave,
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Supervisor {
    /// Says hello over a fresh stream, and believes nothing that comes before the answer to it.
    pub async fn attach(
        stream: Duplex,
        caps: &Caps,
        deadline: Instant,
    ) -> Result<(Supervisor, Hello), Error> {
        let extras = caps.artifacts + 4096; // with their names
        let parts = caps.stdout + caps.stderr + caps.result.max(16 * caps.error) + extras;
        let mut supervisor = Supervisor {
            stream,
            buffer: BytesMut::new(),
            outgoing: Bytes::new(),
            unflushed: false,
            desk: Desk::new(),
            grace: Duration::from_millis(caps.grace_ms) * 2,
            longest: parts as usize + LISTING_BYTES + REPORT_BYTES,
            error_bytes: caps.error as usize,
            output_bytes: (caps.stdout + caps.stderr) as usize,
            asked: Asked::default(),
            state: State::Idle,
        };
        let nonce = nonce();
        let caps = serde_json::to_vec(caps).expect("numbers under string keys are always JSON");
        let converse = async {
            supervisor.send(nonce, Request::Hello, &[&caps]).await?;
            supervisor.skip_to_hello(nonce).await?;
            supervisor.receive(nonce, Answer::Hello, HELLO_BYTES).await
        };
        let frame = timeout_at(deadline, converse).await.unwrap_or(Err(Error::Unresponsive))?;
        supervisor.state = State::Idle;
        let [hello] = protocol::sections(frame.payload)?;
        let hello: Hello = serde_json::from_slice(&hello).map_err(|_| Violation::Content("hello"))?;
        match hello.missing_layer() {
            Some(layer) => Err(Error::Layer(layer)),
            None => Ok((supervisor, hello)),
        }
    }

    /// Runs code. A run that failed is a `Report`, too; an error means that the sandbox is lost.
    ///
    /// May be dropped at any await; `cancel` then brings the supervisor back to rest.
    pub async fn run(&mut self, run: &Run<'_>) -> Result<Report, Error> {
        self.settle().await.map_err(|error| match error {
            Error::Ended => Error::NotBegun,
            error => error,
        })?;
        if !self.is_alive() {
            return Err(Error::NotBegun);
        }
        self.asked = Asked { timeout: run.timeout, cpu: run.narrowed.cpu };
        let deadline = Instant::now() + run.timeout + self.grace;
        let nonce = nonce();
        let options = serde_json::to_vec(&Options::from(run)).expect("numbers under string keys are JSON");
        let sections = [&options[..], run.code.as_bytes(), run.data.as_bytes(), run.stdin.as_bytes()];
        let converse = async {
            let sent = self.send(nonce, Request::Run, &sections).instrument(phase!("send")).await;
            sent.map_err(|_| Error::NotBegun)?;
            let sandbox = phase!("sandbox", wall = Empty, cpu = Empty);
            let report = self.report(nonce, run.teller, run.interrupt).instrument(sandbox.clone()).await?;
            sandbox.record("wall", debug(report.wall)).record("cpu", debug(report.aftermath.cpu));
            Ok(report)
        };
        timeout_at(deadline, converse).await.unwrap_or(Err(Error::Unresponsive))
    }

    /// The report of a run that was `Unresponsive`, where it comes after all: what lies between may have held it up.
    pub async fn late_report(&mut self, deadline: Instant) -> Result<Report, Error> {
        let State::Running { nonce } = self.state else { return Err(Error::Unresponsive) };
        timeout_at(deadline, self.report(nonce, None, None)).await.unwrap_or(Err(Error::Unresponsive))
    }

    /// Whether, as far as can be seen without waiting, it is there and at rest: between runs its stream is open and
    /// silent.
    pub fn is_alive(&mut self) -> bool {
        self.is_idle() && self.is_settled() && self.buffer.is_empty() && self.fill().now_or_never().is_none()
    }

    /// Where questions about its files are asked; they are answered while somebody serves it, or awaits a run's report.
    pub fn exchanges(&self) -> Exchanges {
        self.desk.exchanges()
    }

    /// Serves what is asked about files, between runs, until the caller has what he waits for and drops this.
    pub async fn serve(&mut self) -> Error {
        loop {
            if let Err(error) = self.answer_callers() {
                return error;
            }
            if let Err(error) = self.step(Calls::Take).await {
                return error;
            }
        }
    }

    /// Ends the exchanges that are under way, the callers of some of which may be gone. Takes no further ones.
    pub async fn settle(&mut self) -> Result<(), Error> {
        if !self.is_idle() || self.is_settled() {
            return Ok(());
        }
        let settled = async {
            while !self.is_settled() {
                self.step(Calls::Leave).await?;
                self.answer_callers()?;
            }
            self.rest();
            Ok(())
        };
        timeout_at(Instant::now() + files::TIMEOUT, settled).await.unwrap_or(Err(Error::Unresponsive))
    }

    fn is_settled(&self) -> bool {
        self.outgoing.is_empty() && self.desk.is_quiet()
    }

    /// The answers that have come while no run is under way.
    fn answer_callers(&mut self) -> Result<(), Error> {
        while let Some(frame) = protocol::decode(&mut self.buffer, self.longest)? {
            match frame.kind {
                Answer::File => self.desk.answer(frame)?,
                Answer::Hello | Answer::Done | Answer::Output => return Err(Violation::Nonce.into()),
            }
        }
        Ok(())
    }

    /// Whether no run is under way.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Interrupts a run whose caller is gone and waits until the supervisor is at rest; gives its report, if any.
    pub async fn cancel(&mut self) -> Result<Option<Report>, Error> {
        let State::Running { nonce } = self.state else { return Ok(None) };
        let grace = self.grace;
        // A frame that was begun has to be ended first, or what follows would be taken for a part of it.
        let sent = timeout_at(Instant::now() + grace, self.send(nonce, Request::Interrupt, &[])).await;
        sent.unwrap_or(Err(Error::Unresponsive))?;
        let report = timeout_at(Instant::now() + grace, self.report(nonce, None, None)).await;
        report.unwrap_or(Err(Error::Unresponsive)).map(Some)
    }

    /// What the layers are worth, tried from inside; the engine's own claims are `layers`.
    ///
    /// # Errors
    /// Where the sandbox did not answer; a layer that does not hold is `Unenforced` in what comes back.
    pub async fn probe_layers(
        &mut self,
        mut layers: Vec<Layer>,
        spec: &SandboxSpec,
    ) -> Result<Vec<Layer>, Error> {
        let data = serde_json::to_string(spec).expect("numbers under string keys are always JSON");
        let run = Run { data: &data, ..Run::new(PROBE, Duration::from_secs(10)) };
        let report = self.run(&run).await?;
        let found = match report.outcome {
            Outcome::Result(found) => found,
            Outcome::Failed(detail) => return Err(Error::Probe(detail.message())),
            Outcome::Killed => return Err(Error::Probe("it was killed".into())),
        };
        let found: std::collections::BTreeMap<String, String> =
            serde_json::from_str(found.get()).map_err(|_| Violation::Content("probe"))?;
        for (name, hole) in found {
            match layers.iter_mut().find(|layer| layer.name == name) {
                Some(layer) if layer.state == LayerState::On => {
                    layer.state = LayerState::Unenforced;
                    layer.by = format!("does not hold: {hole}");
                }
                Some(_) => {} // known to be missing already
                None => layers.push(Layer::missing("resources", format!("{name}: {hole}"))),
            }
        }
        Ok(layers)
    }

    async fn send(&mut self, nonce: u64, kind: Request, sections: &[&[u8]]) -> Result<(), Error> {
        self.write_out().await?; // what is left of the frame before
        let mut frame = Vec::new();
        if matches!(kind, Request::Hello) {
            frame.extend_from_slice(&protocol::fresh_start());
        }
        protocol::encode(&mut frame, nonce, kind, sections);
        self.outgoing = frame.into();
        self.state = State::Running { nonce };
        self.write_out().await
    }

    /// Reads meanwhile: a supervisor that waits for its own words to be taken listens to none.
    async fn write_out(&mut self) -> Result<(), Error> {
        while !self.outgoing.is_empty() || self.unflushed {
            self.step(Calls::Leave).await?;
        }
        Ok(())
    }

    /// Some progress: a call taken up, something written, something read, or an exchange given up as overdue.
    async fn step(&mut self, calls: Calls) -> Result<(), Error> {
        let deadline = self.desk.deadline();
        let progress = std::future::poll_fn(|context| self.poll_step(context, calls));
        let Some(deadline) = deadline else { return progress.await };
        if let Ok(done) = timeout_at(deadline, progress).await {
            return done;
        }
        self.desk.expire();
        // Beside a run its own deadline tells whether the supervisor is to be given up.
        if self.is_idle() { Err(Error::Unresponsive) } else { Ok(()) }
    }

    fn poll_step(&mut self, context: &mut Context<'_>, calls: Calls) -> Poll<Result<(), Error>> {
        if calls == Calls::Take
            && self.outgoing.is_empty()
            && let Poll::Ready(frame) = self.desk.poll_next(context)
        {
            self.outgoing = frame.into();
            return Poll::Ready(Ok(())); // it has a deadline now
        }
        if let Poll::Ready(written) = self.poll_write(context) {
            return Poll::Ready(written);
        }
        self.poll_fill(context)
    }

    /// Ready where something was written, pending where nothing is to be or none is taken.
    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let mut stream = Pin::new(&mut self.stream);
        if !self.outgoing.is_empty() {
            return match ready!(stream.poll_write(context, &self.outgoing)) {
                Ok(0) | Err(_) => Poll::Ready(Err(Error::Ended)),
                Ok(written) => {
                    self.outgoing.advance(written);
                    self.unflushed = true;
                    Poll::Ready(Ok(()))
                }
            };
        }
        if !self.unflushed {
            return Poll::Pending; // nobody waits for it: the reading wakes us
        }
        let flushed = ready!(stream.as_mut().poll_flush(context));
        self.unflushed = false;
        Poll::Ready(flushed.map_err(|_| Error::Ended))
    }

    /// Skips what an earlier conversation left in the stream, up to the answer with the fresh nonce.
    async fn skip_to_hello(&mut self, nonce: u64) -> Result<(), Error> {
        let mark = protocol::mark(nonce, Answer::Hello);
        let mut skipped = 0;
        loop {
            if let Some(at) = self.buffer.windows(mark.len()).position(|bytes| bytes == mark) {
                self.buffer.advance(at);
                return Ok(());
            }
            let useless = self.buffer.len().saturating_sub(mark.len() - 1);
            self.buffer.advance(useless);
            skipped += useless;
            if skipped > self.longest {
                return Err(Violation::Length(skipped as u64).into());
            }
            self.fill().await?;
        }
    }

    /// Passes on what is printed until then, and an interrupt.
    async fn report(
        &mut self,
        nonce: u64,
        teller: Option<&Teller>,
        interrupt: Option<&Notify>,
    ) -> Result<Report, Error> {
        let (mut printed, mut interrupt) = (0, interrupt);
        loop {
            let frame = tokio::select! {
                biased;
                frame = self.next(nonce, self.longest) => frame?,
                () = told(interrupt) => {
                    interrupt = None;
                    self.send(nonce, Request::Interrupt, &[]).await?;
                    continue;
                }
            };
            match frame.kind {
                Answer::Done => {
                    self.rest();
                    let sections = protocol::sections(frame.payload)?;
                    return Ok(Report::parse(sections, self.asked, self.error_bytes)?);
                }
                Answer::Output => self.pass_on(frame.payload, &mut printed, teller)?,
                Answer::Hello | Answer::File => return Err(Violation::Nonce.into()),
            }
        }
    }

    fn pass_on(&self, payload: Bytes, printed: &mut usize, teller: Option<&Teller>) -> Result<(), Violation> {
        let [stream, bytes] = protocol::sections(payload)?;
        *printed += bytes.len();
        let stream = match &stream[..] {
            b"\x01" => Field::Stdout,
            b"\x02" => Field::Stderr,
            _ => return Err(Violation::Content("output")),
        };
        if *printed > self.output_bytes {
            return Err(Violation::Length(*printed as u64));
        }
        if let Some(teller) = teller {
            teller.printed(stream, &bytes);
        }
        Ok(())
    }

    async fn receive(&mut self, nonce: u64, kind: Answer, longest: usize) -> Result<Frame, Error> {
        let frame = self.next(nonce, longest).await?;
        if frame.kind == kind { Ok(frame) } else { Err(Violation::Nonce.into()) }
    }

    /// May be dropped at any await: what has come is kept.
    async fn next(&mut self, nonce: u64, longest: usize) -> Result<Frame, Error> {
        loop {
            while let Some(frame) = protocol::decode(&mut self.buffer, longest)? {
                match frame.kind {
                    Answer::File => self.desk.answer(frame)?,
                    _ if frame.nonce == nonce => return Ok(frame),
                    _ => return Err(Violation::Nonce.into()),
                }
            }
            self.step(Calls::Take).await?;
        }
    }

    async fn fill(&mut self) -> Result<(), Error> {
        std::future::poll_fn(|context| self.poll_fill(context)).await
    }

    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let most = self.longest + files::MOST_BYTES;
        if self.buffer.len() > most {
            return Poll::Ready(Err(Violation::Length(self.buffer.len() as u64).into())); // not looked at while we write
        }
        self.buffer.reserve(4096);
        match ready!(poll_read_buf(Pin::new(&mut self.stream), context, &mut self.buffer)) {
            Ok(0) | Err(_) => Poll::Ready(Err(Error::Ended)),
            Ok(_) => Poll::Ready(Ok(())),
        }
    }

    fn rest(&mut self) {
        self.state = State::Idle;
        if self.buffer.is_empty() && self.buffer.capacity() > KEPT_BUFFER_BYTES {
            self.buffer = BytesMut::new();
        }
    }
}

/// Never, without anybody to tell.
async fn told(by: Option<&Notify>) {
    match by {
        Some(by) => by.notified().await,
        None => std::future::pending().await,
    }
}

fn nonce() -> u64 {
    getrandom::u64().expect("the kernel gives random numbers once it is up")
}
