//! Floor 1: what makes sandboxes, and what it promises. Begin here to write a driver.

pub mod container;
mod direct;
pub mod docker;
pub mod embedded;
mod error;
pub mod fake;
mod guest;
pub mod podman;
mod raw;
mod spec;

use std::fmt::Debug;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

pub use error::{Error, Result};
pub use spec::{Claim, Fate, Found, KeySecret, Layer, LayerState, Limit, SandboxId, SandboxSpec, SessionKey};

/// A stream of bytes to and from a supervisor's descriptors 0 and 1.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The one transport between the floors above and a sandbox, whatever the engine.
pub type Duplex = Box<dyn Stream>;

/// An engine that makes sandboxes: isolated processes whose PID 1 is a supervisor.
///
/// A driver moves bytes and tells the truth; deadlines, caps and retries are the caller's.
/// Its calls may be dropped at any await: what they hold is then cleaned up by the driver itself.
#[async_trait]
pub trait Runtime: Debug + Send + Sync {
    /// The driver's name, as in the configuration: a metric label and a log field.
    fn name(&self) -> &'static str;

    /// The secret of the session keys, the same for as long as sandboxes that it named are there.
    fn secret(&self) -> KeySecret;

    /// What the engine is, and which limits and layers it really enforces on this host: what it says itself of
    /// the sandbox `first`, which was made by `spec`.
    async fn probe(&self, first: &SandboxId, spec: &SandboxSpec) -> Result<Engine>;

    /// A new sandbox, its supervisor started and attached. A create that fails leaves nothing behind.
    async fn create(&self, spec: &SandboxSpec) -> Result<Sandbox>;

    /// Attaches again to a sandbox that outlived the server: to its PID 1, or to a second supervisor beside it.
    /// `Error::Gone` where there is none, and always by a driver whose sandboxes die with the server.
    async fn attach(&self, id: &SandboxId) -> Result<Sandbox>;

    /// Has the engine write the owner where a later `list` finds it.
    ///
    /// Returns as soon as the engine is bound to do so even if this server is killed from here on, which is long
    /// before it has done it: that is what comes back.
    async fn claim(&self, id: &SandboxId, owner: &SessionKey) -> Result<Claiming>;

    /// The sandboxes of this instance, and of no other.
    async fn list(&self) -> Result<Vec<Found>>;

    /// What became of a sandbox. Never an error for one that is not there: that is `Fate::Gone`.
    async fn fate(&self, id: &SandboxId) -> Result<Fate>;

    /// Kills all that is inside and confirms that it is gone. Idempotent: removing twice is fine.
    async fn remove(&self, id: &SandboxId) -> Result<()>;
}

/// A claim that the engine is bound to carry out; ends when it has.
pub type Claiming = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// Of a driver whose claims are carried out at once.
fn done() -> Claiming {
    Box::pin(async { Ok(()) })
}

/// The engine as found on this host.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Engine {
    /// The engine's own version.
    pub version: String,
    /// Whether it works without root on the host.
    pub rootless: bool,
    /// What the sandbox's root file system is: an image's name or a directory.
    pub image: String,
    /// Each protection, and what gives it.
    pub layers: Vec<Layer>,
}

/// A running sandbox with the stream to its supervisor.
pub struct Sandbox {
    /// The driver's name for it.
    pub id: SandboxId,
    /// The stream to its supervisor; to be dropped before `remove`.
    pub stream: Duplex,
}

impl Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A driver as the floors above hold it. A boxed call costs about 15 ns beside a run of a millisecond.
pub type SharedRuntime = Arc<dyn Runtime>;

/// Makes a sandbox in a task of its own, so that a caller who goes away leaves nothing half made: what nobody
/// takes is undone.
async fn detached<Undo: Future<Output = ()> + Send>(
    driver: &'static str,
    create: impl Future<Output = Result<Sandbox>> + Send + 'static,
    undo: impl FnOnce(SandboxId) -> Undo + Send + 'static,
) -> Result<Sandbox> {
    let (send, receive) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        if let Err(Ok(Sandbox { id, stream })) = send.send(create.await) {
            drop(stream);
            undo(id).await;
        }
    });
    receive.await.unwrap_or(Err(Error::Unavailable { driver, why: "the creation was stopped".into() }))
}
