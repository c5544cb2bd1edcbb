//! `codesandbox doctor`: what this host gives, layer by layer.

use std::process::ExitCode;

use super::engine::start_runtime;
use super::{Failure, caps, say, spec, stand_apart};
use crate::config::Config;
use crate::probe::probe;
use crate::runtime::LayerState;

/// Exit status 1 where a server would not start with this configuration.
pub(super) async fn doctor(mut config: Config) -> Result<ExitCode, Failure> {
    say(format_args!("driver: {}", config.driver.name()))?;
    let _others = stand_apart(&mut config)?;
    let runtime = start_runtime(&config).await?;
    let findings = probe(&runtime, &spec(&config), &caps(&config, &[]), config.limits.create_timeout).await?;
    let engine = &findings.engine;
    say(format_args!(
        "engine: version {}, {}",
        engine.version,
        if engine.rootless { "rootless" } else { "as root" }
    ))?;
    say(format_args!("image: {}, Python {}", engine.image, findings.python))?;
    say(format_args!("first sandbox: said hello after {:.1?}\n", findings.first_hello))?;
    for layer in &engine.layers {
        let state = match layer.state {
            LayerState::On => "on",
            LayerState::Off => "off",
            LayerState::Unenforced => "UNENFORCED",
        };
        say(format_args!("{:<18} {state:<11} {}", layer.name, layer.by))?;
        if let Some(remedy) = &layer.remedy {
            say(format_args!("{:30} what helps: {remedy}", ""))?;
        }
    }
    let missing: Vec<_> = findings.missing(&config.allow_unenforced).map(|layer| layer.name).collect();
    findings.remove().await?;
    if missing.is_empty() {
        say("\nA server starts with this configuration.")?;
        return Ok(ExitCode::SUCCESS);
    }
    say(format_args!("\nA server does not start with this configuration: missing {}.", missing.join(", ")))?;
    Ok(ExitCode::from(1))
}
