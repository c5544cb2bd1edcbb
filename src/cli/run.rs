//! `codesandbox run`: one program in a sandbox, without a server.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::engine::start_runtime;
use super::serve::prove;
use super::{Failure, caps, pool_settings, say, session_settings, stand_apart};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::session::{self, Done, Owner, Sessions};
use crate::supervisor::{Field, Follower, Run, Told, teller};

/// What a shell gives a program that SIGINT ended.
const INTERRUPTED: u8 = 130;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The program; - reads it from standard input
    file: PathBuf,
    /// Variables for it, as a JSON object
    #[arg(long, value_name = "JSON", default_value = "{}")]
    data: String,
    /// The most wall time it may take, e.g. 10s [default: limits.timeout]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
}

/// Prints stdout and stderr where they belong and as they come, then the result as JSON where there is one. Exit status
/// 1 where the program failed. Ctrl-C interrupts the program, which may clean up; a second one ends at once.
pub(super) async fn run(mut config: Config, arguments: Arguments) -> Result<ExitCode, Failure> {
    let Arguments { file, data, timeout } = arguments;
    let code = read(&file)?;
    let code = code.strip_prefix('\u{feff}').unwrap_or(&code); // as Python reads a file
    crate::server::check_data(&data).map_err(|error| format!("--data: {error}"))?;
    let others = stand_apart(&mut config)?;
    let runtime = start_runtime(&config).await?;
    let (findings, unenforced) = prove(&runtime, &config).await?;
    findings.remove().await?;
    for limit in &unenforced {
        eprintln!("codesandbox: {limit}: not enforced on this host, as --allow-unenforced allows");
    }
    let metrics = Arc::new(Metrics::new());
    let settings = crate::pool::Settings { size: 0, ..pool_settings(&config, caps(&config, &unenforced)) };
    let pool = Pool::new(runtime, settings, metrics.clone());
    let sessions = Sessions::new(pool, session_settings(&config), metrics);
    let (teller, told) = teller();
    let printing = tokio::spawn(print(told));
    let timeout = timeout.unwrap_or(config.limits.timeout);
    let run = Run { data: &data, teller: Some(&teller), ..Run::new(code, timeout) };
    let (done, interrupted) = run_or_interrupt(&sessions, &run).await?;
    drop(teller);
    let printed = printing.await?;
    sessions.drain_beside(tokio::time::Instant::now() + config.limits.grace, || others.are_gone()).await;
    printed?;
    let Some(done) = done else { return Ok(ExitCode::from(INTERRUPTED)) };
    let done = done?;
    for field in &done.aftermath.truncated {
        eprintln!("codesandbox: {} was cut at its cap", field.as_str());
    }
    match &done.outcome {
        Ok(value) if value.get() == "null" => Ok(ExitCode::SUCCESS),
        Ok(value) => {
            say(value.get())?;
            Ok(ExitCode::SUCCESS)
        }
        Err(detail) => {
            eprintln!("{}", detail.message());
            Ok(ExitCode::from(if interrupted { INTERRUPTED } else { 1 }))
        }
    }
}

/// None where it was not awaited: dropped, it is being interrupted all the same.
async fn run_or_interrupt(
    sessions: &Sessions,
    run: &Run<'_>,
) -> std::io::Result<(Option<Result<Done, session::Error>>, bool)> {
    let owner = Owner { tenant: "", user_id: "run" };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut running = std::pin::pin!(sessions.run(owner, run));
    let mut interrupted = false;
    loop {
        tokio::select! {
            done = &mut running => return Ok((Some(done), interrupted)),
            _ = interrupt.recv() => {
                if interrupted || sessions.interrupt(owner).is_err() {
                    return Ok((None, true));
                }
                interrupted = true;
            }
            _ = terminate.recv() => return Ok((None, true)),
        }
    }
}

async fn print(mut told: Follower) -> std::io::Result<()> {
    while let Some(told) = told.next().await {
        let Told::Printed { stream, bytes } = told else { continue };
        if stream == Field::Stderr {
            std::io::stderr().write_all(&bytes)?;
        } else {
            let mut stdout = std::io::stdout();
            stdout.write_all(&bytes)?;
            stdout.flush()?; // half a line, too: somebody may be about to type
        }
    }
    Ok(())
}

fn read(file: &PathBuf) -> Result<String, Failure> {
    if file.as_os_str() == "-" {
        let mut code = String::new();
        std::io::stdin().read_to_string(&mut code)?;
        return Ok(code);
    }
    std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()).into())
}
