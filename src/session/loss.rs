//! Why a session's sandbox was lost.

use crate::runtime::{self, Fate};
use crate::supervisor::{self, ErrorKind};

/// Why a session's sandbox is of no more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    Deleted,
    OutOfMemory,
    Paused,
    Gone,
    EngineGone,
    Cut,
    Killed,
    Unresponsive,
    Violation,
    Died,
}

impl Loss {
    /// What the engine saw counts more than what the conversation looked like.
    pub(super) fn of(error: &supervisor::Error, fate: &runtime::Result<Fate>, deleted: bool) -> Loss {
        use supervisor::Error as E;
        match (error, fate) {
            _ if deleted => Loss::Deleted,
            (_, Ok(Fate::OutOfMemory)) => Loss::OutOfMemory,
            (_, Ok(Fate::Paused)) => Loss::Paused,
            (E::Violation(_), _) => Loss::Violation,
            (_, Ok(Fate::Gone)) => Loss::Gone,
            (_, Err(_)) => Loss::EngineGone,
            (E::Ended, Ok(Fate::Running { .. })) => Loss::Cut,
            (_, Ok(Fate::Exited { code: Fate::KILLED, .. })) => Loss::Killed,
            (E::Unresponsive, _) => Loss::Unresponsive,
            (E::Ended | E::NotBegun | E::Layer(_) | E::Probe(_), _) => Loss::Died,
        }
    }

    /// Whether the sandbox may well live.
    pub(super) fn is_open(self) -> bool {
        matches!(self, Loss::EngineGone | Loss::Cut)
    }

    /// As in `error_detail.kind`.
    pub(super) fn kind(self) -> ErrorKind {
        match self {
            Loss::Deleted => ErrorKind::Cancelled,
            Loss::OutOfMemory => ErrorKind::OutOfMemory,
            Loss::Paused | Loss::Unresponsive => ErrorKind::Timeout,
            Loss::Gone | Loss::EngineGone | Loss::Cut | Loss::Killed | Loss::Violation | Loss::Died => {
                ErrorKind::Crashed
            }
        }
    }

    /// For a person.
    pub(super) fn text(self) -> &'static str {
        match self {
            Loss::Deleted => "the session was deleted",
            Loss::OutOfMemory => "the sandbox ran out of memory",
            Loss::Paused => "the sandbox is paused",
            Loss::Gone => "the sandbox is gone",
            Loss::EngineGone => "the engine does not answer",
            Loss::Cut => "the connection to the sandbox broke",
            Loss::Killed => "the sandbox was killed from outside",
            Loss::Unresponsive => "the sandbox did not answer in time",
            Loss::Violation => "the sandbox broke its protocol",
            Loss::Died => "the sandbox died",
        }
    }

    /// A metric label.
    pub(super) fn label(self) -> &'static str {
        match self {
            Loss::Deleted => "deleted",
            Loss::OutOfMemory => "out_of_memory",
            Loss::Paused => "paused",
            Loss::Gone => "gone",
            Loss::EngineGone => "engine_gone",
            Loss::Cut => "cut",
            Loss::Killed => "killed",
            Loss::Unresponsive => "unresponsive",
            Loss::Violation => "violation",
            Loss::Died => "died",
        }
    }
}
