//! From a request to its handler and back to a response; the same frame for every path.

use std::sync::Arc;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_RANGE, CONTENT_TYPE, HeaderName, HeaderValue, ORIGIN, RETRY_AFTER};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use serde::Serialize;
use tracing::Instrument;

use super::error::Error;
use super::stream_body::Body;
use super::{State, files, handlers, stream};

pub(super) type Answer = Response<Body>;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// Characters of a request id that a client may choose.
const REQUEST_ID_BYTES: usize = 128;

/// Every request gets an answer, with its id in it and in each line of the log.
pub(super) async fn answer(state: &Arc<State>, request: Request<Incoming>) -> Answer {
    let id = request_id(request.headers());
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
    let mut parts = path.splitn(4, '/').skip(1);
    let parts = (parts.next().unwrap_or_default(), parts.next(), parts.next());
    let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
    match (parts, method) {
        (("healthz", None, None), &Method::GET) => Ok(json(&serde_json::json!({"status": "ok"}))),
        (("readyz", None, None), &Method::GET) => handlers::ready(state),
        (("metrics", None, None), &Method::GET) => Ok(handlers::metrics(state)),
        (("capabilities", None, None), &Method::GET) => {
            tenant(state, request.headers())?;
            Ok(json_bytes(state.settings.capabilities.clone()))
        }
        (("run", None, None), &Method::POST) => {
            let tenant = tenant(state, request.headers())?;
            match stream::is_wanted(request.headers()) {
                true => stream::run(state.clone(), tenant, request).await,
                false => handlers::run(state, &tenant, request).await,
            }
        }
        (("sessions", Some(user_id), None), &Method::GET) => {
            handlers::describe_session(state, &tenant(state, request.headers())?, user_id)
        }
        (("sessions", Some(user_id), None), &Method::DELETE) => {
            handlers::delete_session(state, &tenant(state, request.headers())?, user_id).await
        }
        (("sessions", Some(user_id), Some("interrupt")), &Method::POST) => {
            handlers::interrupt(state, &tenant(state, request.headers())?, user_id)
        }
        (("sessions", Some(_), Some("interrupt")), _) => Err(Error::MethodNotAllowed("POST")),
        (("sessions", Some(user_id), Some(rest)), _) if rest == "files" || rest.starts_with("files/") => {
            files::serve(state, &tenant(state, request.headers())?, user_id, rest, request).await
        }
        (("run", None, None), _) => Err(Error::MethodNotAllowed("POST")),
        (("sessions", Some(_), None), _) => Err(Error::MethodNotAllowed("GET, HEAD, DELETE")),
        (("healthz" | "readyz" | "metrics" | "capabilities", None, None), _) => {
            Err(Error::MethodNotAllowed("GET, HEAD"))
        }
        _ => Err(Error::NotFound),
    }
}

fn tenant(state: &State, headers: &HeaderMap) -> Result<Arc<str>, Error> {
    let auth = state.auth.borrow();
    if auth.is_open() && is_from_a_page(headers) {
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

fn refuse(state: &State, error: &Error) -> Answer {
    let (status, _) = error.status();
    let mut response = json_bytes(refusal(state, error).into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if let Error::MethodNotAllowed(allowed) = error {
        headers.insert(ALLOW, HeaderValue::from_static(allowed));
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
fn request_id(headers: &HeaderMap) -> HeaderValue {
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
