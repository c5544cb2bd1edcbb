//! codesandbox: a self-hosted HTTP service that runs untrusted Python, safely and fast.
//!
//! Each floor stands only on those below; `tests/api` checks it.
//!
//! ```text
//! 7  main, cli, config        the only readers of arguments, files and environment
//! 6  server                   HTTP in, JSON out; knows no engine
//! 5  session, reaper, reconciler    who holds which sandbox, until when
//! 4  pool, probe              how many exist, which are warm; what this host gives
//! 3  supervisor               the conversation with one sandbox; deadlines and caps
//! 2  runtime::{docker, podman, embedded, fake}    the engines; they know floor 1 only, never each other
//! 1  runtime                  the trait, its contract, the spec, the errors
//! 0  metrics, phase           leaves; metrics are handed down: no globals, so tests run in parallel
//! ```
//!
//! A request comes in at `server::route`, is parsed by `server::body`, waits its turn in `session`, gets a
//! sandbox from `pool` and talks to its PID 1, `supervisor/program/`, through `supervisor`.

pub mod cli;
pub mod config;
pub mod metrics;
pub mod phase;
pub mod pool;
pub mod probe;
pub mod reaper;
pub mod reconciler;
pub mod runtime;
pub mod server;
pub mod session;
pub mod supervisor;
