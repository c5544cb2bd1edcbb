//! Floor 4: proves at start what this host gives: one sandbox is made, looked at from inside, and removed.

use std::time::Duration;

use tokio::time::Instant;

use crate::runtime::{self, Engine, Layer, LayerState, Limit, SandboxId, SandboxSpec, SharedRuntime};
use crate::supervisor::{self, Caps, Supervisor};

/// What was found.
#[derive(Debug)]
pub struct Findings {
    /// The engine, its layers as tried from inside.
    pub engine: Engine,
    /// The interpreter's version.
    pub python: String,
    /// From asking the engine to the first hello.
    pub first_hello: Duration,
    /// In which they were found.
    pub sandbox: SandboxId,
    runtime: SharedRuntime,
}

/// Why the probe itself failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The engine's part.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The sandbox was made, and then its supervisor did not answer as it has to.
    #[error("the first sandbox did not come up: {source}{said}")]
    Supervisor {
        /// What was seen.
        source: supervisor::Error,
        /// What it wrote to its stderr, if anything.
        said: String,
    },
    /// No sandbox by the deadline.
    #[error("the engine did not make a sandbox within {0:?}")]
    Late(Duration),
}

/// Makes a sandbox, and tries every layer from inside. It is to be removed: see `Findings::remove`.
///
/// # Errors
/// Where no sandbox comes up. A layer that does not hold is no error: see `Findings::missing`.
pub async fn probe(
    runtime: &SharedRuntime,
    spec: &SandboxSpec,
    caps: &Caps,
    limit: Duration,
) -> Result<Findings, Error> {
    let begun = Instant::now();
    let made = tokio::time::timeout(limit, runtime.create(spec)).await;
    let sandbox = made.map_err(|_| Error::Late(limit))??;
    let id = sandbox.id;
    let looked = async {
        let (mut supervisor, hello) =
            Supervisor::attach(sandbox.stream, caps, begun + limit).await.map_err(Error::silent)?;
        let first_hello = begun.elapsed();
        let mut engine = runtime.probe(&id, spec).await?;
        engine.layers = supervisor.probe_layers(engine.layers, spec).await.map_err(Error::silent)?;
        Ok((engine, hello.python, first_hello))
    }
    .await;
    let error = match looked {
        Ok((engine, python, first_hello)) => {
            let runtime = runtime.clone();
            return Ok(Findings { engine, python, first_hello, sandbox: id, runtime });
        }
        Err(error) => error,
    };
    let fate = runtime.fate(&id).await;
    runtime.remove(&id).await?;
    Err(match (error, fate) {
        (Error::Supervisor { source, .. }, Ok(runtime::Fate::Exited { stderr, .. }))
            if !stderr.is_empty() =>
        {
            Error::Supervisor { source, said: format!("; it said: {stderr}") }
        }
        (error, _) => error,
    })
}

impl Error {
    fn silent(source: supervisor::Error) -> Error {
        Error::Supervisor { source, said: String::new() }
    }
}

impl Findings {
    /// Removes the sandbox.
    ///
    /// # Errors
    /// Where the engine does not remove it.
    pub async fn remove(&self) -> runtime::Result<()> {
        self.runtime.remove(&self.sandbox).await
    }

    /// The same in the background: nobody who waits for a server need wait for that.
    pub fn remove_beside(&self) {
        let (runtime, id) = (self.runtime.clone(), self.sandbox.clone());
        tokio::spawn(async move {
            if let Err(error) = runtime.remove(&id).await {
                tracing::warn!(sandbox = %id, %error, "cannot remove the first sandbox");
            }
        });
    }

    /// The layers that are missing and that nobody allowed to be.
    pub fn missing<'a>(&'a self, allowed: &'a [Limit]) -> impl Iterator<Item = &'a Layer> {
        self.engine.layers.iter().filter(move |layer| {
            layer.state == LayerState::Unenforced
                && !layer.limit.is_some_and(|limit| allowed.contains(&limit))
        })
    }
}
