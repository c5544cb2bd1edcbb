//! The audit line of a run: who, how much, how it ended, what it used. Never code, data, output or the user_id.

use std::time::{Duration, SystemTime};

use hyper::header::HeaderValue;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tracing::Level;

use super::body::RunRequest;
use super::error::Error;
use super::{AuditFile, State};
use crate::session::{Done, Owner, Timing};
use crate::supervisor::{ErrorKind, Field};

/// By this name a log filter asks for audit lines.
pub const TARGET: &str = "codesandbox::audit";

/// A run whose line is told when this is dropped, however it ended.
pub(super) struct Entry(Option<(Line, Option<AuditFile>)>);

/// What is told of a run.
#[derive(Serialize)]
struct Line {
    /// When it was asked for.
    time: String,
    request_id: String,
    tenant: String,
    session: String,
    code_bytes: usize,
    code_sha256: String,
    data_bytes: usize,
    stdin_bytes: usize,
    mode: &'static str,
    timeout_ms: u64,
    /// `ok`, the kind of its failure, the code of the refusal, or `cancelled`.
    outcome: &'static str,
    #[serde(flatten)]
    usage: Option<Usage>,
    driver: &'static str,
}

/// What is known of a run only once it came to its end.
#[derive(Serialize)]
struct Usage {
    /// Its sandbox, with the files.
    lost: bool,
    kernel_lost: bool,
    result_bytes: usize,
    stdout_bytes: usize,
    stderr_bytes: usize,
    truncated: Vec<Field>,
    queue_ms: f64,
    claim_ms: f64,
    run_ms: f64,
    cpu_ms: f64,
}

impl Entry {
    /// A run that is about to be handed over.
    pub(super) fn new(state: &State, tenant: &str, id: &HeaderValue, asked: &RunRequest<'_>) -> Entry {
        if state.audit.is_none() && !tracing::enabled!(target: TARGET, Level::INFO) {
            return Entry(None); // nobody listens: the hash of a long code takes milliseconds
        }
        let RunRequest { user_id, code, data, stdin, timeout, mode, narrowed: _ } = asked;
        let line = Line {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            request_id: id.to_str().unwrap_or_default().to_owned(),
            tenant: tenant.to_owned(),
            session: state.sessions.key(Owner { tenant, user_id }).0,
            code_bytes: code.len(),
            code_sha256: hex::encode(Sha256::digest(code.as_bytes())),
            data_bytes: data.len(),
            stdin_bytes: stdin.len(),
            mode: mode.as_str(),
            timeout_ms: timeout.as_millis() as u64,
            outcome: ErrorKind::Cancelled.as_str(), // what nobody tells otherwise: the client went away
            usage: None,
            driver: state.sessions.pool().runtime().name(),
        };
        Entry(Some((line, state.audit.clone())))
    }

    /// It came to its end, or was refused.
    pub(super) fn conclude(&mut self, done: Result<&Done, &Error>) {
        let Some((line, _)) = &mut self.0 else { return };
        match done {
            Ok(done) => {
                line.outcome = done.outcome.as_ref().err().map_or("ok", |detail| detail.kind.as_str());
                line.usage = Some(Usage::of(done));
            }
            Err(error) => line.outcome = error.status().1,
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Some((line, file)) = self.0.take() else { return };
        line.log();
        if let Some(file) = file {
            let mut text = serde_json::to_vec(&line).expect("strings and numbers are JSON");
            text.push(b'\n');
            file.append(text);
        }
    }
}

impl Line {
    /// With the fields of the file's lines, by the same names.
    fn log(&self) {
        let Line { time: _, request_id, tenant, session, code_bytes, code_sha256, .. } = self;
        let Line { data_bytes, stdin_bytes, mode, timeout_ms, outcome, usage, driver, .. } = self;
        let usage = usage.as_ref();
        let truncated = usage.map(|usage| usage.truncated.iter().map(|field| field.as_str()));
        let truncated = truncated.map(|names| names.collect::<Vec<_>>().join(","));
        tracing::info!(
            target: TARGET,
            request_id, tenant, session, code_bytes, code_sha256, data_bytes, stdin_bytes, mode, timeout_ms, outcome,
            lost = usage.map(|usage| usage.lost),
            kernel_lost = usage.map(|usage| usage.kernel_lost),
            result_bytes = usage.map(|usage| usage.result_bytes),
            stdout_bytes = usage.map(|usage| usage.stdout_bytes),
            stderr_bytes = usage.map(|usage| usage.stderr_bytes),
            truncated,
            queue_ms = usage.map(|usage| usage.queue_ms),
            claim_ms = usage.map(|usage| usage.claim_ms),
            run_ms = usage.map(|usage| usage.run_ms),
            cpu_ms = usage.map(|usage| usage.cpu_ms),
            driver,
            "run"
        );
    }
}

impl Usage {
    fn of(done: &Done) -> Usage {
        let Done { outcome, aftermath, lost, timing } = done;
        let Timing { queue, claim, run } = *timing;
        Usage {
            lost: *lost,
            kernel_lost: aftermath.kernel_lost,
            result_bytes: outcome.as_ref().map_or(0, |value| value.get().len()),
            stdout_bytes: aftermath.stdout.len(),
            stderr_bytes: aftermath.stderr.len(),
            truncated: aftermath.truncated.clone(),
            queue_ms: ms(queue),
            claim_ms: ms(claim),
            run_ms: ms(run),
            cpu_ms: ms(aftermath.cpu),
        }
    }
}

/// To the microsecond.
fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}
