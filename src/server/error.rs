//! What a request gets that we could not serve: one match from reason to status, and nowhere else.

use std::time::Duration;

use hyper::StatusCode;

use crate::session;
use crate::session::files::{self, Refusal};

/// Of what is wrong with a request, in an answer.
const TOLD_CHARACTERS: usize = 300;

/// A request that was not served. The guest's own failures are no such errors: they are answers.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{0}")]
    Invalid(String),
    #[error("an API key is required: Authorization: Bearer KEY, or X-API-Key: KEY")]
    Unauthorized,
    #[error("pages in a browser may not use a server without API keys (auth.mode)")]
    Forbidden,
    #[error("there is no such path")]
    NotFound,
    #[error("there is no session of this user_id")]
    NoSession,
    #[error("this path takes {0}")]
    MethodNotAllowed(String),
    #[error("the body took longer than {0:?} to come")]
    RequestTimeout(Duration),
    #[error("{what} must not be longer than {limit} bytes")]
    TooLarge { what: &'static str, limit: usize },
    #[error("the body stopped coming")]
    Stalled,
    #[error("the content type must be {0}")]
    UnsupportedMediaType(&'static str),
    #[error("the file has {size} bytes")]
    RangeNotSatisfiable { size: u64 },
    #[error(transparent)]
    Refused(Refusal),
    #[error("the sandbox was lost meanwhile")]
    Lost,
    #[error(transparent)]
    Session(#[from] session::Error),
    #[error("{0}")]
    NotReady(&'static str),
    #[error("too many large bodies or listings at once")]
    Overloaded,
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Error {
        match error {
            files::Error::NoSession => Error::NoSession,
            files::Error::Session(error) => Error::Session(error),
            files::Error::Refused(refusal) => Error::Refused(refusal),
            files::Error::Lost => Error::Lost,
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        Error::Refused(refusal)
    }
}

impl Error {
    pub(super) fn invalid(field: &str, right: impl std::fmt::Display) -> Error {
        let told = format!("{field} {right}");
        // It may quote what the client sent.
        Error::Invalid(told.chars().take(TOLD_CHARACTERS).collect())
    }

    /// What the client is told: of the engine's trouble no more than its kind.
    pub(super) fn message(&self) -> String {
        match self {
            Error::Session(session::Error::Unavailable(error)) => {
                format!("no sandbox could be had: {}; the server's log says more", error.trouble())
            }
            error => error.to_string(),
        }
    }

    /// The status, and the code for programs.
    pub(super) fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Error::Invalid(_) => (StatusCode::BAD_REQUEST, "invalid_request"),
            Error::Unauthorized => (StatusCode::UNAUTHORIZED, "unauthorized"),
            Error::Forbidden => (StatusCode::FORBIDDEN, "forbidden"),
            Error::NotFound | Error::NoSession => (StatusCode::NOT_FOUND, "not_found"),
            Error::MethodNotAllowed(_) => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Error::RequestTimeout(_) | Error::Stalled => (StatusCode::REQUEST_TIMEOUT, "request_timeout"),
            Error::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            Error::UnsupportedMediaType(_) => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            Error::Session(session::Error::NotRunning) => (StatusCode::CONFLICT, "not_running"),
            Error::Session(session::Error::Busy { .. }) => (StatusCode::TOO_MANY_REQUESTS, "session_busy"),
            Error::Session(session::Error::TooMany { .. }) => {
                (StatusCode::TOO_MANY_REQUESTS, "too_many_sessions")
            }
            Error::Session(session::Error::Crowded { .. }) => (StatusCode::SERVICE_UNAVAILABLE, "overloaded"),
            Error::Session(session::Error::Draining) => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
            Error::Session(session::Error::Unavailable(_)) => {
                (StatusCode::SERVICE_UNAVAILABLE, "engine_unavailable")
            }
            Error::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded"),
            Error::RangeNotSatisfiable { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "range_not_satisfiable"),
            Error::Refused(refusal) => match refusal {
                Refusal::NotFound => (StatusCode::NOT_FOUND, "not_found"),
                Refusal::Outside | Refusal::NotAFile | Refusal::NameTooLong => {
                    (StatusCode::BAD_REQUEST, "invalid_request")
                }
                Refusal::Denied => (StatusCode::FORBIDDEN, "forbidden"),
                Refusal::IsDirectory | Refusal::NotADirectory | Refusal::Exists | Refusal::Failed => {
                    (StatusCode::CONFLICT, "conflict")
                }
                Refusal::NoSpace { .. } => (StatusCode::INSUFFICIENT_STORAGE, "insufficient_storage"),
                Refusal::Busy => (StatusCode::TOO_MANY_REQUESTS, "session_busy"),
                Refusal::Closed => (StatusCode::SERVICE_UNAVAILABLE, "session_lost"),
            },
            Error::Lost => (StatusCode::SERVICE_UNAVAILABLE, "session_lost"),
            Error::NotReady(_) => (StatusCode::SERVICE_UNAVAILABLE, "not_ready"),
        }
    }

    /// What is left, where that was too little.
    pub(super) fn available_bytes(&self) -> Option<u64> {
        match self {
            Error::Refused(Refusal::NoSpace { available_bytes }) => Some(*available_bytes),
            _ => None,
        }
    }

    /// Seconds after which trying again makes sense.
    pub(super) fn retry_after(&self) -> Option<u64> {
        let time = match self {
            Error::Session(
                session::Error::TooMany { retry_after }
                | session::Error::Busy { retry_after }
                | session::Error::Crowded { retry_after },
            ) => *retry_after,
            Error::Session(session::Error::Unavailable(error)) => {
                error.retry_after().unwrap_or(Duration::from_secs(1))
            }
            Error::Session(session::Error::NotRunning) => return None,
            Error::Session(_)
            | Error::Overloaded
            | Error::Lost
            | Error::Refused(Refusal::Busy | Refusal::Closed) => Duration::from_secs(1),
            _ => return None,
        };
        Some(time.as_secs().saturating_add(1).min(3600))
    }
}
