//! Floor 0: the phases of a run, as spans, so that the log can show where the time of a request went.
//!
//! `CODESANDBOX_LOG=info,codesandbox::phase=debug` logs the end of each, with its time, below its request. Otherwise
//! they cost a load and a branch each.

/// Of the spans; nothing else has it.
pub const TARGET: &str = "codesandbox::phase";

/// A span of that target: its name, and its fields if any.
macro_rules! phase {
    ($($name_and_fields:tt)+) => {
        tracing::debug_span!(target: $crate::phase::TARGET, $($name_and_fields)+)
    };
}
pub(crate) use phase;
