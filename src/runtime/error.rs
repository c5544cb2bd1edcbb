//! What can go wrong between us and an engine: one variant for each thing that a caller does about it.

use super::SandboxId;

/// The result of a driver's call.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a driver's call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host or the engine lacks something for good: the operator has to act.
    #[error("{what}: {why}\n  what helps: {remedy}")]
    Unusable {
        /// The step that failed.
        what: String,
        /// The cause, as the system gave it.
        why: String,
        /// What the operator can do.
        remedy: String,
    },
    /// The sandboxes' image is not there (any more), and may not be fetched.
    #[error("find the image {image}: {why}\n  what helps: {remedy}")]
    ImageMissing {
        /// Its name.
        image: String,
        /// The engine's words.
        why: String,
        /// What the operator can do.
        remedy: String,
    },
    /// The engine does not answer; it may do so later.
    #[error("the {driver} engine does not answer: {why}")]
    Unavailable {
        /// The driver's name.
        driver: &'static str,
        /// What was seen.
        why: String,
    },
    /// The engine's disk is full, or its memory file systems are.
    #[error("the {driver} engine has no space left: {why}")]
    NoSpace {
        /// The driver's name.
        driver: &'static str,
        /// The engine's words.
        why: String,
    },
    /// There is no such sandbox (any more).
    #[error("there is no sandbox {0}")]
    Gone(SandboxId),
    /// This one call failed; another may well succeed.
    #[error("{what}: {source}")]
    Failed {
        /// What was attempted.
        what: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// A word for it: a metric label.
    pub fn reason(&self) -> &'static str {
        match self {
            Error::Unusable { .. } => "unusable",
            Error::ImageMissing { .. } => "image_missing",
            Error::Unavailable { .. } => "unavailable",
            Error::NoSpace { .. } => "no_space",
            Error::Gone(_) => "gone",
            Error::Failed { .. } => "failed",
        }
    }

    /// A closure for `map_err`: this call failed at `what`.
    pub fn failed(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let what = what.into();
        move |source| Error::Failed { what, source }
    }
}
