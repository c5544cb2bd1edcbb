//! What came of a run. Every byte of it was a stranger's: here it is checked once, and typed from then on.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Buf, Bytes};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::protocol::Violation;

/// How deep JSON may be nested, both ways: parsers of clients begin to fail at 128.
pub const MAX_JSON_DEPTH: usize = 100;

/// A run that came to its end, well or not.
#[derive(Debug)]
pub struct Report {
    /// The result, or why there is none.
    pub outcome: Outcome,
    /// What it left beside it.
    pub aftermath: Aftermath,
    /// Wall time of the run's own process.
    pub wall: Duration,
}

/// What a run leaves beside its outcome.
#[derive(Debug, Default)]
pub struct Aftermath {
    /// What was printed, with U+FFFD for what is no UTF-8.
    pub stdout: String,
    /// Likewise.
    pub stderr: String,
    /// The workspace as `ls -lR` prints it, the leading line left out.
    pub workspace_files: Vec<String>,
    /// Figures that were open at its end.
    pub artifacts: Vec<Artifact>,
    /// The value as a page would show it, by media type.
    pub display: BTreeMap<String, String>,
    /// The fields that were cut at their cap.
    pub truncated: Vec<Field>,
    /// The session's kernel is gone, and its variables with it.
    pub kernel_lost: bool,
    /// CPU time of the run's own process; none where its sandbox was lost.
    pub cpu: Duration,
}

/// A file that a run made without writing one.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Artifact {
    /// Unique in its answer.
    pub name: String,
    /// As in `Content-Type`.
    pub media_type: String,
    /// The bytes.
    pub base64: String,
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// The value of `result`, as JSON.
    Result(Box<RawValue>),
    /// It failed.
    Failed(ErrorDetail),
    /// SIGKILL that we did not send: out of memory, or by the run's own hand. The supervisor cannot see which;
    /// the engine may know.
    Killed,
}

/// The fields of an answer that have a cap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Field {
    /// `stdout`
    Stdout,
    /// `stderr`
    Stderr,
    /// `workspace_files`
    WorkspaceFiles,
    /// `error`
    Error,
    /// `artifacts` and `display`, which share one cap
    Artifacts,
}

impl Field {
    /// As in `truncated`; a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Field::Stdout => "stdout",
            Field::Stderr => "stderr",
            Field::WorkspaceFiles => "workspace_files",
            Field::Error => "error",
            Field::Artifacts => "artifacts",
        }
    }
}

/// How a run failed, for a program to read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ErrorDetail {
    /// Which of the ways to fail.
    pub kind: ErrorKind,
    /// The exception's class, or a word for what ended the run.
    pub name: String,
    /// The exception's text.
    pub value: String,
    /// Python's own traceback, empty where there is none.
    pub traceback: String,
}

impl ErrorDetail {
    /// A failure that Python has no exception for.
    pub fn new(kind: ErrorKind, name: &str, value: impl Into<String>) -> ErrorDetail {
        ErrorDetail { kind, name: name.into(), value: value.into(), traceback: String::new() }
    }

    /// A SIGKILL by the kernel's out-of-memory killer.
    pub fn out_of_memory() -> ErrorDetail {
        ErrorDetail::new(ErrorKind::OutOfMemory, "MemoryError", "killed: out of memory")
    }

    /// A SIGKILL by the run's own hand: from outside nobody sends one to it alone.
    pub fn killed() -> ErrorDetail {
        ErrorDetail::new(ErrorKind::Crashed, "SIGKILL", "killed by signal 9")
    }

    /// The text of an answer's `error`.
    pub fn message(&self) -> String {
        let ErrorDetail { kind, name: _, value, traceback } = self;
        match kind {
            ErrorKind::Raised | ErrorKind::Syntax | ErrorKind::OutOfMemory if !traceback.is_empty() => {
                format!("Error running code: {traceback}")
            }
            _ if traceback.is_empty() => format!("Error running code: {value}"),
            _ => format!("Error running code: {value}\n{traceback}"),
        }
    }
}

/// The ways in which a run fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// An exception that nobody caught.
    Raised,
    /// The code is no Python.
    Syntax,
    /// It ended itself with a status.
    Exited,
    /// Its time was over.
    Timeout,
    /// MemoryError, or killed for want of memory.
    OutOfMemory,
    /// A signal ended it.
    Crashed,
    /// `result` is nothing that JSON has.
    ResultInvalid,
    /// `result` is longer than its cap.
    ResultTooLarge,
    /// Interrupted on request.
    Cancelled,
    /// It used the CPU time that its request allowed.
    CpuExceeded,
}

impl ErrorKind {
    /// Whether the run's own process may say so; the others are what we saw from outside.
    fn is_for_the_run_to_tell(self) -> bool {
        match self {
            ErrorKind::Timeout | ErrorKind::Crashed | ErrorKind::Cancelled | ErrorKind::CpuExceeded => false,
            ErrorKind::Raised
            | ErrorKind::Syntax
            | ErrorKind::Exited
            | ErrorKind::OutOfMemory
            | ErrorKind::ResultInvalid
            | ErrorKind::ResultTooLarge => true,
        }
    }

    /// As in `error_detail.kind`; a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorKind::Raised => "raised",
            ErrorKind::Syntax => "syntax",
            ErrorKind::Exited => "exited",
            ErrorKind::Timeout => "timeout",
            ErrorKind::OutOfMemory => "out_of_memory",
            ErrorKind::Crashed => "crashed",
            ErrorKind::ResultInvalid => "result_invalid",
            ErrorKind::ResultTooLarge => "result_too_large",
            ErrorKind::Cancelled => "cancelled",
            ErrorKind::CpuExceeded => "cpu_exceeded",
        }
    }
}

/// What the supervisor tells of the run's process: `REPORT` in program/supervisor.py.
struct Facts {
    exited: Option<i32>,
    signal: Option<i32>,
    said: Said,
    stopped: Option<Stopped>,
    truncated: Vec<Field>,
    oversized: bool,
    kernel_lost: bool,
    /// Of a process that got a SIGKILL, where the supervisor can see it.
    out_of_memory: Option<bool>,
    wall: Duration,
    cpu: Duration,
}

/// What came on the result pipe.
#[derive(Clone, Copy, PartialEq)]
enum Said {
    Nothing,
    Result,
    Error,
}

/// What ended the run from outside.
#[derive(Clone, Copy)]
enum Stopped {
    Timeout,
    Cancelled,
    CpuExceeded,
}

impl Facts {
    /// At least: a supervisor that outlived an older server, or is of a newer one, may tell more.
    const BYTES: usize = 28;

    fn parse(mut bytes: Bytes) -> Result<Facts, Violation> {
        if bytes.len() < Facts::BYTES {
            return Err(Violation::Content("report"));
        }
        let given = |number: i32| (number >= 0).then_some(number);
        let (exited, signal) = (given(bytes.get_i32()), given(bytes.get_i32()));
        let said = match bytes.get_u8() {
            0 => Said::Nothing,
            1 => Said::Result,
            2 => Said::Error,
            _ => return Err(Violation::Content("report")),
        };
        let stopped = match bytes.get_u8() {
            0 => None,
            1 => Some(Stopped::Timeout),
            2 => Some(Stopped::Cancelled),
            3 => Some(Stopped::CpuExceeded),
            _ => return Err(Violation::Content("report")),
        };
        let cut = bytes.get_u8();
        let out_of_memory = match bytes.get_u8() {
            0 => None,
            1 => Some(false),
            2 => Some(true),
            _ => return Err(Violation::Content("report")),
        };
        let fields = [(1, Field::Stdout), (2, Field::Stderr), (4, Field::WorkspaceFiles)];
        Ok(Facts {
            exited,
            signal,
            said,
            stopped,
            truncated: fields
                .into_iter()
                .filter_map(|(bit, field)| (cut & bit != 0).then_some(field))
                .collect(),
            oversized: cut & 8 != 0,
            kernel_lost: cut & 16 != 0,
            out_of_memory,
            wall: Duration::from_micros(bytes.get_u64()),
            cpu: Duration::from_micros(bytes.get_u64()),
        })
    }
}

/// What the run's process told of its own failure.
#[derive(Deserialize)]
struct Told {
    kind: ErrorKind,
    name: String,
    value: String,
    traceback: String,
    #[serde(default)]
    truncated: bool,
}

impl Told {
    /// `None` for what no supervisor of ours would have passed on: only the guest can have written that.
    fn parse(payload: &[u8], error_bytes: usize) -> Option<Told> {
        let mut told: Told = serde_json::from_slice(payload).ok()?;
        for text in [&mut told.name, &mut told.value, &mut told.traceback] {
            if text.len() > error_bytes {
                text.truncate(text.floor_char_boundary(error_bytes));
                told.truncated = true;
            }
        }
        told.kind.is_for_the_run_to_tell().then_some(told)
    }
}

/// What a run gave beside its result: each byte of it may be the guest's own.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Extras {
    #[serde(default)]
    artifacts: Vec<Artifact>,
    #[serde(default)]
    display: BTreeMap<String, String>,
    #[serde(default)]
    cut: bool,
}

impl Extras {
    /// None for what no supervisor of ours would have passed on.
    fn parse(payload: &[u8]) -> Extras {
        if payload.is_empty() {
            return Extras::default(); // as of most runs
        }
        serde_json::from_slice(payload).unwrap_or_default()
    }
}

/// What was asked of a run, as far as its report has to be read by it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    pub(super) timeout: Duration,
    pub(super) cpu: Option<Duration>,
}

const SIGKILL: i32 = 9;

impl Report {
    /// `error_bytes` is the cap of each text of an error.
    pub(super) fn parse(sections: [Bytes; 6], asked: Asked, error_bytes: usize) -> Result<Report, Violation> {
        let [facts, payload, stdout, stderr, listing, extras] = sections;
        let mut facts = Facts::parse(facts)?;
        let workspace_files = serde_json::from_slice(&listing).map_err(|_| Violation::Content("listing"))?;
        let told = match facts.said {
            Said::Error => Told::parse(&payload, error_bytes),
            Said::Result | Said::Nothing => None,
        };
        let mut truncated = std::mem::take(&mut facts.truncated);
        if told.as_ref().is_some_and(|told| told.truncated) {
            truncated.push(Field::Error);
        }
        let Extras { artifacts, display, cut } = Extras::parse(&extras);
        if cut {
            truncated.push(Field::Artifacts);
        }
        let outcome = outcome(&facts, told, &payload, asked);
        let text = |bytes: Bytes| String::from_utf8_lossy(&bytes).into_owned();
        let (stdout, stderr) = (text(stdout), text(stderr));
        Ok(Report {
            outcome,
            aftermath: Aftermath {
                stdout,
                stderr,
                workspace_files,
                artifacts,
                display,
                truncated,
                kernel_lost: facts.kernel_lost,
                cpu: facts.cpu,
            },
            wall: facts.wall,
        })
    }
}

/// What ended the run counts more than what its process says of itself.
fn outcome(facts: &Facts, told: Option<Told>, payload: &[u8], asked: Asked) -> Outcome {
    let fail = |kind, name: &str, value: String| Outcome::Failed(ErrorDetail::new(kind, name, value));
    match (facts.stopped, told) {
        (Some(stopped), told) => Outcome::Failed(stopped_by(stopped, told, asked)),
        (None, Some(Told { kind, name, value, traceback, truncated: _ })) => {
            Outcome::Failed(ErrorDetail { kind, name, value, traceback })
        }
        (None, None) if facts.oversized => fail(
            ErrorKind::ResultTooLarge,
            "ValueError",
            "the result pipe got more than any result may have".into(),
        ),
        (None, None) if facts.said == Said::Result => match result(payload) {
            Some(result) => Outcome::Result(result),
            None => {
                fail(ErrorKind::ResultInvalid, "ValueError", "result is no JSON, or nested too deeply".into())
            }
        },
        (None, None) => match (facts.signal, facts.exited) {
            (Some(SIGKILL), _) => match facts.out_of_memory {
                None => Outcome::Killed,
                Some(true) => Outcome::Failed(ErrorDetail::out_of_memory()),
                Some(false) => Outcome::Failed(ErrorDetail::killed()),
            },
            (Some(signal), _) => {
                fail(ErrorKind::Crashed, signal_name(signal), format!("killed by signal {signal}"))
            }
            (None, code) => {
                fail(ErrorKind::Exited, "SystemExit", format!("exited with status {}", code.unwrap_or(-1)))
            }
        },
    }
}

fn stopped_by(stopped: Stopped, told: Option<Told>, asked: Asked) -> ErrorDetail {
    let traceback = told.map(|told| told.traceback).unwrap_or_default();
    let (kind, name, value) = match stopped {
        Stopped::Timeout => {
            (ErrorKind::Timeout, "TimeoutError", format!("timed out after {} ms", asked.timeout.as_millis()))
        }
        Stopped::CpuExceeded => {
            let allowed = asked.cpu.unwrap_or_default().as_millis();
            (ErrorKind::CpuExceeded, "TimeoutError", format!("used more than {allowed} ms of CPU time"))
        }
        Stopped::Cancelled => (ErrorKind::Cancelled, "KeyboardInterrupt", "cancelled".into()),
    };
    ErrorDetail { kind, name: name.into(), value, traceback }
}

/// A guest can write to its result pipe what it likes; what we pass on is JSON that clients can parse.
fn result(payload: &[u8]) -> Option<Box<RawValue>> {
    let text = std::str::from_utf8(payload).ok()?;
    let value: Box<RawValue> = serde_json::from_str(text).ok()?;
    (!is_nested_too_deeply(value.get())).then_some(value)
}

/// Whether a valid JSON text is nested deeper than `MAX_JSON_DEPTH`.
pub fn is_nested_too_deeply(text: &str) -> bool {
    // Most have fewer brackets than that, and counting takes a tenth of the time.
    let opening = text.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count();
    opening > MAX_JSON_DEPTH && json_depth(text) > MAX_JSON_DEPTH
}

/// A number alone is 0.
fn json_depth(text: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        _ => "signal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Exited with 0, nothing said, nothing stopped it.
    const QUIET: Given = Given { exited: 0, signal: -1, said: 0, stopped: 0, cut: 0, memory: 0 };

    #[derive(Clone, Copy)]
    struct Given {
        exited: i32,
        signal: i32,
        said: u8,
        stopped: u8,
        cut: u8,
        memory: u8,
    }

    fn parse(facts: Given, payload: &str) -> Report {
        let Given { exited, signal, said, stopped, cut, memory } = facts;
        let mut bytes = [exited.to_be_bytes(), signal.to_be_bytes()].concat();
        bytes.extend([said, stopped, cut, memory]);
        bytes.extend([0; 24]);
        let part = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        let sections = [bytes.into(), part(payload), part("out"), part(""), part("[\"total 0\"]"), part("")];
        Report::parse(sections, Asked { timeout: Duration::from_secs(1), cpu: None }, 1000).unwrap()
    }

    fn kind(facts: Given, payload: &str) -> ErrorKind {
        match parse(facts, payload).outcome {
            Outcome::Failed(detail) => detail.kind,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_json_or_too_deep_is_an_invalid_result() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        let result = Given { said: 1, ..QUIET };
        for bad in ["", "nan", "{\"a\":}", "1 2", "[[", &nested(MAX_JSON_DEPTH + 1)] {
            assert_eq!(kind(result, bad), ErrorKind::ResultInvalid, "{bad}");
        }
        assert!(matches!(parse(result, &nested(MAX_JSON_DEPTH)).outcome, Outcome::Result(_)));
    }

    #[test]
    fn what_ended_a_run_counts_more_than_what_it_says() {
        let said = r#"{"kind":"raised","name":"E","value":"v","traceback":"t"}"#;
        let error = Given { said: 2, ..QUIET };
        assert_eq!(kind(error, said), ErrorKind::Raised);
        assert_eq!(kind(Given { stopped: 1, ..error }, said), ErrorKind::Timeout);
        assert_eq!(kind(Given { said: 1, stopped: 1, ..QUIET }, "3"), ErrorKind::Timeout);
        assert_eq!(kind(Given { stopped: 2, ..error }, said), ErrorKind::Cancelled);
        assert_eq!(kind(Given { signal: 11, exited: -1, ..QUIET }, ""), ErrorKind::Crashed);
        assert_eq!(kind(Given { exited: 3, ..QUIET }, ""), ErrorKind::Exited);
        assert_eq!(kind(Given { cut: 8, ..QUIET }, ""), ErrorKind::ResultTooLarge);
        let killed = parse(Given { signal: 9, exited: -1, ..QUIET }, "");
        assert!(matches!(killed.outcome, Outcome::Killed));
        assert_eq!(kind(Given { signal: 9, exited: -1, memory: 1, ..QUIET }, ""), ErrorKind::Crashed);
        assert_eq!(kind(Given { signal: 9, exited: -1, memory: 2, ..QUIET }, ""), ErrorKind::OutOfMemory);
    }

    #[test]
    fn a_forged_text_is_cut_at_its_cap() {
        let text = |length: usize| "ä".repeat(length / 2);
        for (length, cut) in [(1000, false), (1002, true), (900_000, true)] {
            let said = format!(r#"{{"kind":"raised","name":"","value":"{}","traceback":""}}"#, text(length));
            let report = parse(Given { said: 2, ..QUIET }, &said);
            assert_eq!(report.aftermath.truncated.contains(&Field::Error), cut, "{length}");
            let Outcome::Failed(detail) = report.outcome else { panic!("it has failed") };
            assert_eq!(detail.value, text(length.min(1000)));
        }
    }

    #[test]
    fn what_was_cut_is_named() {
        let report = parse(Given { cut: 7, ..QUIET }, "");
        assert_eq!(report.aftermath.truncated, [Field::Stdout, Field::Stderr, Field::WorkspaceFiles]);
        assert_eq!(parse(QUIET, "").aftermath.truncated, []);
    }

    #[test]
    fn a_kind_that_only_we_may_give_is_no_error_of_the_run() {
        let of_kind = |kind: &str| format!(r#"{{"kind":"{kind}","name":"","value":"","traceback":""}}"#);
        let forged = ["nonsense", "timeout", "cancelled", "crashed"].map(of_kind);
        for said in forged.iter().map(String::as_str).chain(["[]", ""]) {
            assert_eq!(kind(Given { said: 2, ..QUIET }, said), ErrorKind::Exited, "{said}");
        }
    }

    #[test]
    fn depth_counts_brackets_outside_of_strings() {
        for (text, depth) in
            [("1", 0), ("[]", 1), ("{\"a\":[1,{}]}", 3), ("\"[[\\\"[\"", 0), ("[[],[[]]]", 3)]
        {
            assert_eq!(json_depth(text), depth, "{text}");
        }
        for (depth, too_deep) in [(MAX_JSON_DEPTH, false), (MAX_JSON_DEPTH + 1, true)] {
            let nested = "[".repeat(depth) + &"]".repeat(depth);
            assert_eq!(is_nested_too_deeply(&nested), too_deep, "{depth}");
        }
        assert!(!is_nested_too_deeply(&"[],".repeat(1000)), "wide is not deep");
    }
}
