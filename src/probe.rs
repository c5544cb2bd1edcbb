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
        Ok(Findings { engine, python: hello.python, first_hello })
    }
    .await;
    let fate = runtime.fate(&id).await;
    let removed = runtime.remove(&id).await;
    let findings = looked.map_err(|error| match (error, fate) {
        (Error::Supervisor { source, .. }, Ok(runtime::Fate::Exited { stderr, .. }))
            if !stderr.is_empty() =>
        {
            Error::Supervisor { source, said: format!("; it said: {stderr}") }
        }
        (error, _) => error,
    })?;
    removed?;
    Ok(findings)
}

impl Error {
    fn silent(source: supervisor::Error) -> Error {
        Error::Supervisor { source, said: String::new() }
    }
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
