//! What each path does.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde::Serialize;
use serde_json::value::RawValue;
use tracing::Instrument;

use super::State;
use super::audit::Entry;
use super::body::{RunRequest, check_user_id};
use super::error::Error;
use super::route::{Answer, json, json_bytes, request_id};
use super::stream_body::Body;
use crate::phase::phase;
use crate::session::{Done, Owner, Timing};
use crate::supervisor::{Aftermath, Artifact, ErrorDetail, Field, Run, Teller};

/// The answer to a run; what has nothing to say is absent.
#[derive(Serialize)]
pub(super) struct RunAnswer<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error_detail: Option<&'a ErrorDetail>,
    pub(super) result: Option<&'a RawValue>,
    pub(super) workspace_files: &'a [String],
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(super) stdout: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(super) stderr: &'a str,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub(super) artifacts: &'a [Artifact],
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) display: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub(super) truncated: &'a [Field],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) session: Option<&'static str>,
}

impl<'a> From<&'a Done> for RunAnswer<'a> {
    fn from(done: &'a Done) -> RunAnswer<'a> {
        let Done { outcome, aftermath, lost, timing: _ } = done;
        let Aftermath { stdout, stderr, workspace_files, artifacts, display, truncated, kernel_lost, cpu: _ } =
            aftermath;
        RunAnswer {
            error: outcome.as_ref().err().map(ErrorDetail::message),
            error_detail: outcome.as_ref().err(),
            result: outcome.as_ref().ok().map(|value| &**value),
            workspace_files,
            stdout,
            stderr,
            artifacts,
            display,
            truncated,
            session: lost.then_some("lost").or(kernel_lost.then_some("kernel_lost")),
        }
    }
}

/// What a run is answered with, and where the time went.
pub(super) struct Answered {
    pub(super) answer: String,
    timing: Timing,
}

/// Runs what a request asks for; `teller` is told what goes on meanwhile.
pub(super) async fn answer(
    state: &State,
    tenant: &str,
    request: Request<Incoming>,
    teller: Option<&Teller>,
) -> Result<Answered, Error> {
    check_content_type(request.headers())?;
    let id = request_id(request.headers());
    let (body, _room) =
        state.room.read(request.into_body(), &state.settings).instrument(phase!("body")).await?;
    let asked = phase!("parse").in_scope(|| RunRequest::parse(&body, &state.settings))?;
    let mut audited = Entry::new(state, tenant, &id, &asked);
    let RunRequest { user_id, code, data, stdin, timeout, mode, narrowed } = asked;
    let run = Run { data, stdin: &stdin, mode, narrowed, teller, ..Run::new(&code, timeout) };
    let done = state.sessions.run(Owner { tenant, user_id: &user_id }, &run).await.map_err(Error::from);
    audited.conclude(done.as_ref());
    let done = done?;
    let answer = phase!("respond").in_scope(|| serde_json::to_string(&RunAnswer::from(&done)));
    let answer = answer.expect("texts and JSON texts are JSON");
    Ok(Answered { answer, timing: done.timing })
}

pub(super) async fn run(state: &State, tenant: &str, request: Request<Incoming>) -> Result<Answer, Error> {
    let Answered { answer, timing } = answer(state, tenant, request, None).await?;
    let mut response = json_bytes(answer.into());
    response.headers_mut().insert("server-timing", server_timing(&timing));
    Ok(response)
}

pub(super) fn interrupt(state: &State, tenant: &str, user_id: &str) -> Result<Answer, Error> {
    let user_id = decode(user_id)?;
    state.sessions.interrupt(Owner { tenant, user_id: &user_id })?;
    Ok(no_content())
}

fn no_content() -> Answer {
    let mut response = Response::new(Body::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

pub(super) fn describe_session(state: &State, tenant: &str, user_id: &str) -> Result<Answer, Error> {
    let user_id = decode(user_id)?;
    match state.sessions.describe(Owner { tenant, user_id: &user_id }) {
        Some(description) => Ok(json(&description)),
        None => Err(Error::NoSession),
    }
}

pub(super) async fn delete_session(state: &State, tenant: &str, user_id: &str) -> Result<Answer, Error> {
    let user_id = decode(user_id)?;
    state.sessions.delete(Owner { tenant, user_id: &user_id }).await?;
    Ok(no_content())
}

pub(super) fn ready(state: &State) -> Result<Answer, Error> {
    state.sessions.readiness().map_err(Error::NotReady)?;
    Ok(json(&serde_json::json!({"status": "ready"})))
}

pub(super) fn metrics(state: &State) -> Answer {
    let mut response = Response::new(Body::from(Bytes::from(state.metrics.render())));
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, text);
    response
}

/// JSON, or nothing said.
fn check_content_type(headers: &HeaderMap) -> Result<(), Error> {
    let Some(value) = headers.get(CONTENT_TYPE) else { return Ok(()) };
    let essence = value.to_str().ok().and_then(|text| text.split(';').next()).unwrap_or_default().trim();
    let essence = essence.to_ascii_lowercase();
    match essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
    {
        true => Ok(()),
        false => Err(Error::UnsupportedMediaType("application/json")),
    }
}

pub(super) fn decode(user_id: &str) -> Result<String, Error> {
    let decoded = percent_decode_str(user_id).decode_utf8();
    let user_id = decoded.map_err(|_| Error::invalid("user_id", "must be percent-encoded UTF-8"))?;
    check_user_id(&user_id)?;
    Ok(user_id.into_owned())
}

fn server_timing(timing: &Timing) -> HeaderValue {
    let Timing { queue, claim, run } = timing;
    let ms = |time: &Duration| time.as_secs_f64() * 1000.0;
    let text = format!("queue;dur={:.3}, claim;dur={:.3}, run;dur={:.3}", ms(queue), ms(claim), ms(run));
    HeaderValue::from_str(&text).expect("digits and ASCII words are a header's value")
}
