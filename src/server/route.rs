//! From a request to its handler and back to a response; the same frame for every path.

use std::sync::Arc;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_RANGE, CONTENT_TYPE, HOST, HeaderName, HeaderValue, ORIGIN, RETRY_AFTER};
use hyper::http::uri::Authority;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use serde::Serialize;
use tracing::Instrument;

use super::error::Error;
use super::stream_body::Body;
use super::{State, files, handlers, openapi, stream};

pub(super) type Answer = Response<Body>;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// Characters of a request id that a client may choose.
const REQUEST_ID_BYTES: usize = 128;

/// Every request gets an answer, with its id in it and in each line of the log.
pub(super) async fn answer(state: &Arc<State>, mut request: Request<Incoming>) -> Answer {
    let id = request_id(request.headers());
    request.headers_mut().insert(REQUEST_ID, id.clone()); // from here on each has one
    let span = tracing::info_span!("request", id = id.to_str().unwrap_or_default());
    let mut response = respond(state, request).instrument(span).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

async fn respond(state: &Arc<State>, request: Request<Incoming>) -> Answer {
    let begun = std::time::Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = match route(state, request).await {
        Ok(response) => response,
        Err(error) => refuse(state, &error),
    };
    let status = response.status();
    state.metrics.requests.with_label_values(&[status.as_str()]).inc();
    let elapsed_ms = begun.elapsed().as_secs_f64() * 1000.0;
    // A path may hold a user_id, so only its first part is logged.
    let first = path.split('/').nth(1).unwrap_or_default();
    tracing::debug!(%method, path = first, status = status.as_u16(), elapsed_ms, "answered");
    response
}

async fn route(state: &Arc<State>, request: Request<Incoming>) -> Result<Answer, Error> {
    let path = request.uri().path().to_owned();
    let (call, Parameters { user_id, rest }) = find(request.method(), &path)?;
    let tenant = match call.is_open() {
        true => Arc::default(),
        false => tenant(state, request.headers())?,
    };
    match call {
        Call::Run => match stream::is_wanted(request.headers()) {
            true => stream::run(state.clone(), tenant, request).await,
            false => handlers::run(state, &tenant, request).await,
        },
        Call::Interrupt => handlers::interrupt(state, &tenant, user_id),
        Call::Files => files::serve(state, &tenant, user_id, rest, request).await,
        Call::DescribeSession => handlers::describe_session(state, &tenant, user_id),
        Call::DeleteSession => handlers::delete_session(state, &tenant, user_id).await,
        Call::Health => Ok(json(&serde_json::json!({"status": "ok"}))),
        Call::Readiness => handlers::ready(state),
        Call::Metrics => Ok(handlers::metrics(state)),
        Call::Capabilities => Ok(json_bytes(state.settings.capabilities.clone())),
        Call::OpenApi => Ok(json_bytes(openapi::document())),
    }
}

/// What a request may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Run,
    DescribeSession,
    DeleteSession,
    Interrupt,
    Files,
    Health,
    Readiness,
    Metrics,
    Capabilities,
    OpenApi,
}

/// Every path and method that there is; `openapi.json` describes each of them. HEAD is answered wherever GET is.
pub(super) static ROUTES: [(&str, Method, Call); 14] = [
    ("/run", Method::POST, Call::Run),
    ("/sessions/{user_id}", Method::GET, Call::DescribeSession),
    ("/sessions/{user_id}", Method::DELETE, Call::DeleteSession),
    ("/sessions/{user_id}/interrupt", Method::POST, Call::Interrupt),
    ("/sessions/{user_id}/files", Method::GET, Call::Files),
    ("/sessions/{user_id}/files", Method::PUT, Call::Files),
    ("/sessions/{user_id}/files/{path}", Method::GET, Call::Files),
    ("/sessions/{user_id}/files/{path}", Method::PUT, Call::Files),
    ("/sessions/{user_id}/files/{path}", Method::DELETE, Call::Files),
    ("/healthz", Method::GET, Call::Health),
    ("/readyz", Method::GET, Call::Readiness),
    ("/metrics", Method::GET, Call::Metrics),
    ("/capabilities", Method::GET, Call::Capabilities),
    ("/openapi.json", Method::GET, Call::OpenApi),
];

impl Call {
    /// Whether it takes no key: it tells nothing of users.
    pub(super) fn is_open(self) -> bool {
        matches!(self, Call::Health | Call::Readiness | Call::Metrics | Call::OpenApi)
    }
}

/// What stands in a path for its template's parameters; empty where it has none.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Parameters<'p> {
    user_id: &'p str,
    /// From what follows it to the end.
    rest: &'p str,
}

fn find<'p>(method: &Method, path: &'p str) -> Result<(Call, Parameters<'p>), Error> {
    let method = if method == Method::HEAD { &Method::GET } else { method };
    let mut allowed = Vec::new();
    for (template, taken, call) in &ROUTES {
        let Some(parameters) = fit(template, path) else { continue };
        if taken == method {
            return Ok((*call, parameters));
        }
        allowed.push(if taken == Method::GET { "GET, HEAD" } else { taken.as_str() });
    }
    match allowed.is_empty() {
        true => Err(Error::NotFound),
        false => Err(Error::MethodNotAllowed(allowed.join(", "))),
    }
}

/// `{path}`, which comes last, is all that is left, slashes included.
fn fit<'p>(template: &str, path: &'p str) -> Option<Parameters<'p>> {
    let mut parameters = Parameters::default();
    let mut left = Some(path);
    for wanted in template.split('/') {
        let (part, after) = left?.split_once('/').map_or((left?, None), |(part, after)| (part, Some(after)));
        match wanted {
            "{user_id}" => (parameters.user_id, parameters.rest) = (part, after.unwrap_or_default()),
            "{path}" => return Some(parameters),
            _ if wanted == part => {}
            _ => return None,
        }
        left = after;
    }
    left.is_none().then_some(parameters)
}

fn tenant(state: &State, headers: &HeaderMap) -> Result<Arc<str>, Error> {
    let auth = state.auth.borrow();
    if auth.is_open() && (is_from_a_page(headers) || is_for_another_host(headers)) {
        return Err(Error::Forbidden);
    }
    auth.tenant(headers).ok_or(Error::Unauthorized)
}

/// Any page that a user of this machine opens can send requests to loopback. Browsers say so in these headers,
/// which a page cannot leave out of a POST.
fn is_from_a_page(headers: &HeaderMap) -> bool {
    let typed_by_the_user = |value: &HeaderValue| value == "none";
    headers.contains_key(ORIGIN)
        || headers.get("sec-fetch-site").is_some_and(|value| !typed_by_the_user(value))
}

/// A page of a stranger's domain whose address has been changed to this machine's (DNS rebinding) is no other origin's
/// to its browser. What nobody can register, a name without a dot, is none; an address needs no DNS.
fn is_for_another_host(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST) else { return false };
    let Ok(authority) = host.to_str().unwrap_or_default().parse::<Authority>() else { return true };
    let name = authority.host().trim_end_matches('.').to_ascii_lowercase();
    let is_address = name.starts_with('[') || name.parse::<std::net::Ipv4Addr>().is_ok();
    name.contains('.') && !is_address && !name.ends_with(".localhost")
}

fn refuse(state: &State, error: &Error) -> Answer {
    let (status, _) = error.status();
    let mut response = json_bytes(refusal(state, error).into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if let Error::MethodNotAllowed(allowed) = error {
        headers.insert(ALLOW, HeaderValue::from_str(allowed).expect("methods are ASCII words"));
    }
    if let Some(seconds) = error.retry_after() {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    if let Error::RangeNotSatisfiable { size } = error {
        let range = HeaderValue::from_str(&format!("bytes */{size}")).expect("digits are a header's value");
        headers.insert(CONTENT_RANGE, range);
    }
    if status == StatusCode::UNAUTHORIZED {
        headers.insert(hyper::header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// The text for the client; counted and logged here.
pub(super) fn refusal(state: &State, error: &Error) -> String {
    let (status, code) = error.status();
    state.metrics.refused.with_label_values(&[code]).inc();
    if status.is_server_error() {
        tracing::warn!(code, %error, "could not serve a request");
    }
    let mut told = serde_json::json!({"error": error.message(), "code": code});
    if let Some(bytes) = error.available_bytes() {
        told["available_bytes"] = bytes.into();
    }
    told.to_string()
}

/// The client's own id where it has a sound one, else a new one.
pub(super) fn request_id(headers: &HeaderMap) -> HeaderValue {
    let sound = |value: &&HeaderValue| {
        (1..=REQUEST_ID_BYTES).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    headers.get(REQUEST_ID).filter(sound).cloned().unwrap_or_else(|| {
        let random = getrandom::u64().expect("the kernel gives random numbers once it is up");
        HeaderValue::from_str(&format!("{random:016x}")).expect("hex digits are a header's value")
    })
}

pub(super) fn json(value: &impl Serialize) -> Answer {
    json_bytes(serde_json::to_vec(value).expect("strings, numbers and JSON texts are JSON").into())
}

pub(super) fn json_bytes(bytes: Bytes) -> Answer {
    let mut response = Response::new(Body::from(bytes));
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}
