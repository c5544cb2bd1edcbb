//! Floor 6: HTTP in, JSON out. Knows sessions, and no engine.

pub mod audit;
mod audit_file;
pub mod auth;
mod body;
mod body_room;
mod error;
mod file_headers;
mod files;
mod handlers;
mod openapi;
mod route;
mod stream;
mod stream_body;
mod tar;
mod walk;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_io_timeout::TimeoutStream;

use crate::metrics::{Counted, Metrics};
use crate::session::Sessions;
pub use audit_file::AuditFile;
use auth::Auth;
pub use body_room::BodyRoom;

/// Whether a JSON text may be the `data` of a run; else why not.
///
/// # Errors
/// What is wrong with it, naming the key where one is to blame.
pub fn check_data(text: &str) -> Result<(), String> {
    let raw = serde_json::from_str(text).map_err(|error| format!("must be a JSON object: {error}"))?;
    body::check_data(raw).map(|_| ()).map_err(|error| error.to_string())
}

/// Listings and tars that may be on their way out at once.
pub const WALKS: usize = 16;
/// From the end of the last runs, by the deadline, to that of their connections.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// After a failed accept (no descriptor left, say): others may give one back meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What hyper reads of a request's line and headers before it answers 431: that much, and up to as much again
/// of what came in one piece.
const HEADER_BYTES: usize = 64 * 1024;

/// What the server allows a client.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Connections at once.
    pub connections: usize,
    /// To the end of a request's headers.
    pub header_timeout: Duration,
    /// From there to the end of its body; of a file, from one bit to the next.
    pub body_timeout: Duration,
    /// How long an answer may stay unread.
    pub write_timeout: Duration,
    /// Bytes of a body.
    pub body_bytes: usize,
    /// Bytes of all bodies that are in memory at once.
    pub bodies_bytes: usize,
    /// Bytes of the code in it.
    pub code_bytes: usize,
    /// Wall time of a run that asks for none.
    pub timeout: Duration,
    /// The most that a run may ask for.
    pub timeout_max: Duration,
    /// The most CPU time that a run may ask for: what all its cores can give in the longest time.
    pub cpu_max: Duration,
    /// The most memory that a run may ask for.
    pub memory_bytes: u64,
    /// The most output that a run may ask for.
    pub output_bytes: u64,
    /// Entries of a listing of files, and of a tar either way.
    pub files: usize,
    /// The answer to `GET /capabilities`.
    pub capabilities: Bytes,
}

/// What every request can reach.
#[derive(Debug)]
pub struct State {
    /// What a client is allowed.
    pub settings: Settings,
    /// Who has which sandbox.
    pub sessions: Sessions,
    /// Who may come in; its sender may change it at any time.
    pub auth: watch::Receiver<Auth>,
    /// Where audit lines go, if anywhere.
    pub audit: Option<AuditFile>,
    /// Room for bodies.
    pub room: BodyRoom,
    /// Room for listings and tars on their way out, each with up to some 10 MiB: `WALKS` of them.
    pub walks: Arc<Semaphore>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// A server that listens.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    state: Arc<State>,
}

impl Server {
    /// To serve what comes to `listener`.
    pub fn new(listener: TcpListener, state: State) -> Server {
        Server { listener, state: Arc::new(state) }
    }

    /// The address that it listens on.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop` is over, then lets what goes on end within `grace` and removes every sandbox.
    pub async fn serve(self, stop: impl Future<Output = ()>, grace: Duration) {
        let Server { listener, state } = self;
        let room = Arc::new(Semaphore::new(state.settings.connections));
        let (stopping, stopped) = watch::channel(false);
        let mut connections = JoinSet::new();
        let mut stop = std::pin::pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => break,
                Some(_) = connections.join_next() => continue,
                accepted = accept(&listener, &room) => accepted,
            };
            let Some((stream, permit)) = accepted else { continue };
            let (state, stopped) = (state.clone(), stopped.clone());
            connections.spawn(async move {
                serve_connection(stream, state, stopped).await;
                drop(permit);
            });
        }
        drop(listener);
        let _ = stopping.send(true); // no receiver: no connection is open
        let deadline = Instant::now() + grace;
        let ended = async {
            let all = async { while connections.join_next().await.is_some() {} };
            if tokio::time::timeout_at(deadline + LAST_ANSWERS, all).await.is_err() {
                tracing::warn!(connections = connections.len(), "cut off what did not end in time");
                connections.shutdown().await; // with what goes on there, which holds its sandbox
            }
        };
        tokio::join!(state.sessions.drain(deadline), ended);
        if let Some(audit) = &state.audit {
            audit.close().await; // after the last run: what was cut off has its line, too
        }
    }
}

/// A connection, once there is room for it.
async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = room.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => Some((stream, permit)),
        Err(error) => {
            tracing::warn!(%error, "cannot accept a connection");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

async fn serve_connection(stream: TcpStream, state: Arc<State>, mut stopped: watch::Receiver<bool>) {
    let _counted = Counted::new(state.metrics.connections.clone());
    let _ = stream.set_nodelay(true); // slower answers, at worst
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(state.settings.write_timeout));
    let service = service_fn(|request| {
        let state = state.clone();
        async move { Ok::<_, std::convert::Infallible>(route::answer(&state, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(state.settings.header_timeout)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        done = &mut connection => return note(done),
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
    connection.as_mut().graceful_shutdown();
    note(connection.await);
}

fn note(done: hyper::Result<()>) {
    if let Err(error) = done {
        tracing::debug!(%error, "a connection ended early");
    }
}
