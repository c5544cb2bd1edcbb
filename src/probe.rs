//! Floor 4: proves at start what this host gives: one sandbox is made, looked at from inside, and removed.

use std::time::Duration;

use tokio::time::Instant;

use crate::runtime::{self, Engine, Layer, LayerState, Limit, SandboxSpec, SharedRuntime};
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

/// Makes a sandbox, tries every layer from inside and removes it.
///
/// # Errors
/// Where no sandbox comes up. A layer that does not hold is no error: see `Findings::missing`.
pub async fn probe(
    runtime: &SharedRuntime,
    spec: &SandboxSpec,
    caps: &Caps,
    limit: Duration,
) -> Result<Findings, Error> {
    let mut engine = runtime.probe().await?;
    let begun = Instant::now();
    let made = tokio::time::timeout(limit, runtime.create(spec)).await;
    let sandbox = made.map_err(|_| Error::Late(limit))??;
    let id = sandbox.id;
    let tried = async {
        let (mut supervisor, hello) = Supervisor::attach(sandbox.stream, caps, begun + limit).await?;
        let first_hello = begun.elapsed();
        let layers = supervisor.probe_layers(engine.layers.clone()).await?;
        Ok((layers, hello.python, first_hello))
    }
    .await;
    let fate = runtime.fate(&id).await;
    let removed = runtime.remove(&id).await;
    let (layers, python, first_hello) = tried.map_err(|source| {
        let said = match fate {
            Ok(runtime::Fate::Exited { stderr, .. }) if !stderr.is_empty() => format!("; it said: {stderr}"),
            _ => String::new(),
        };
        Error::Supervisor { source, said }
    })?;
    removed?;
    engine.layers = layers;
    Ok(Findings { engine, python, first_hello })
}

impl Findings {
    /// The layers that are missing and that nobody allowed to be.
    pub fn missing<'a>(&'a self, allowed: &'a [Limit]) -> impl Iterator<Item = &'a Layer> {
        self.engine.layers.iter().filter(move |layer| {
            layer.state == LayerState::Unenforced
                && !layer.limit.is_some_and(|limit| allowed.contains(&limit))
        })
    }
}
