//! `codesandbox serve`.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinSet;

use super::engine::{only_one, start_runtime};
use super::{Failure, caps, log_to_stderr, pool_settings, reconciler_settings, session_settings, spec};
use crate::config::{AuthMode, Config};
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::probe::{Findings, probe};
use crate::reaper::reap;
use crate::reconciler::Reconciler;
use crate::runtime::{LayerState, Limit, SharedRuntime};
use crate::server::auth::Auth;
use crate::server::{AuditFile, BodyRoom, Server, Settings, State, WALKS};
use crate::session::Sessions;

pub(super) async fn serve(config: Config) -> Result<ExitCode, Failure> {
    log_to_stderr(&config, &config.log)?;
    let _instance = only_one(&config)?;
    raise_descriptor_limit();
    let mut signals =
        Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? };
    drop(signal(SignalKind::hangup())?); // from here on it ends nobody: see `watched_auth` and `audit_file`
    // Obeyed from the first moment on: the pull of an image may take long.
    let (server, mut background) = tokio::select! {
        started = start(&config) => started?,
        () = signals.next() => return Ok(ExitCode::SUCCESS),
    };
    let (stopping, stop) = oneshot::channel::<()>();
    let mut serving = std::pin::pin!(server.serve(async { drop(stop.await) }, config.shutdown.timeout));
    tokio::select! {
        () = &mut serving => unreachable!("nobody has stopped it"),
        () = signals.next() => drop(stopping),
    }
    background.abort_all(); // what is left to a later server is not to be taken up again
    tracing::info!("stopping: runs may take {:?} to end", config.shutdown.timeout);
    tokio::select! {
        () = serving => {}
        () = signals.again() => {
            tracing::warn!("stopping at once: what is left on the engine, the next start clears up");
            std::process::exit(1); // waits for nothing
        }
    }
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// A session has up to three descriptors here, a client one, and a shell gives 1,024 of the many that may be.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }); // what is left is what there is
}

/// A person takes longer to press a key again.
const ECHO: Duration = Duration::from_millis(100);

/// Those that end a server.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// A second one. What comes along with the first is none: timeout(1) tells the process, then its group.
    async fn again(&mut self) {
        let end = tokio::time::Instant::now() + ECHO;
        while tokio::time::timeout_at(end, self.next()).await.is_ok() {}
        self.next().await;
    }
}

/// The server, and what goes on beside it.
async fn start(config: &Config) -> Result<(Server, JoinSet<()>), Failure> {
    let auth = watched_auth(config)?;
    let metrics = Arc::new(Metrics::new());
    let audit = audit_file(config, &metrics)?;
    // Before anything else: a second server must not take over the sandboxes of the one that is there.
    let listener = TcpListener::bind(config.listen).await.map_err(|error| {
        format!("cannot listen on {}: {error} (configuration key listen, or --listen)", config.listen)
    })?;
    let runtime = start_runtime(config).await?;
    let (findings, unenforced) = prove(&runtime, config).await?;
    // By an earlier server: before there is a pool, whose own would be among them; after the proof, in whose time an
    // engine has done what that server had told it last; and before the removal, for which Podman's list would wait.
    let mut left = runtime.list().await?;
    left.retain(|found| found.id != findings.sandbox);
    findings.remove_beside();
    let pool = Pool::new(runtime, pool_settings(config, caps(config, &unenforced)), metrics.clone());
    let sessions = Sessions::new(pool, session_settings(config), metrics.clone());
    let reconciler = Reconciler::new(sessions.clone(), reconciler_settings(config), left);
    let settings = server_settings(config, &findings);
    let mut background = JoinSet::new();
    background.spawn(reap(sessions.clone()));
    background.spawn(reconciler.run());
    let room = BodyRoom::new(settings.bodies_bytes);
    let walks = Arc::new(Semaphore::new(WALKS));
    let server = Server::new(listener, State { room, walks, settings, sessions, auth, audit, metrics });
    tracing::info!(
        "listening on http://{}, driver {}, Python {}",
        server.address()?,
        config.driver.name(),
        findings.python
    );
    Ok((server, background))
}

/// Who may come in. The keys file is read again at SIGHUP; one that is wrong then leaves the keys as they were.
fn watched_auth(config: &Config) -> Result<watch::Receiver<Auth>, Failure> {
    if config.auth.mode == AuthMode::None {
        return Ok(watch::channel(Auth::Open).1);
    }
    let file = config.auth.keys_file.clone();
    let keys =
        Auth::from_file(&file).map_err(|error| format!("{error} (configuration key auth.keys_file)"))?;
    let (change, auth) = watch::channel(keys);
    let mut hangup = signal(SignalKind::hangup())?;
    let reload = async move {
        while hangup.recv().await.is_some() {
            match Auth::from_file(&file) {
                Ok(keys) => {
                    tracing::info!(file = %file.display(), "read the keys again");
                    let _ = change.send(keys); // nobody listens any more: the server ends
                }
                Err(error) => tracing::error!(%error, "cannot read the keys again: they stay as they were"),
            }
        }
    };
    tokio::spawn(reload); // as long as the program
    Ok(auth)
}

/// Where audit lines go, if anywhere. Opened again at SIGHUP: logrotate has moved the file away.
fn audit_file(config: &Config, metrics: &Arc<Metrics>) -> Result<Option<AuditFile>, Failure> {
    let path = &config.audit.file;
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let file = AuditFile::open(path, metrics.clone())
        .map_err(|error| format!("cannot open {}: {error} (configuration key audit.file)", path.display()))?;
    let mut hangup = signal(SignalKind::hangup())?;
    let moved = file.clone();
    let reopen = async move {
        while hangup.recv().await.is_some() {
            moved.reopen().await;
        }
    };
    tokio::spawn(reopen); // as long as the program
    Ok(Some(file))
}

/// Fails where a protection is missing that nobody allowed to be; warns of those that somebody did.
pub(super) async fn prove(
    runtime: &SharedRuntime,
    config: &Config,
) -> Result<(Findings, Vec<Limit>), Failure> {
    let findings = probe(runtime, &spec(config), &caps(config, &[]), config.limits.create_timeout).await?;
    let missing: Vec<_> = findings.missing(&config.allow_unenforced).collect();
    if !missing.is_empty() {
        let mut text = String::from("this host does not give every protection that was asked for:");
        for layer in missing {
            let remedy = layer.remedy.as_deref().unwrap_or("see `codesandbox doctor`");
            text += &format!("\n  {}: {}\n    what helps: {remedy}", layer.name, layer.by);
        }
        findings.remove().await?;
        return Err(text.into());
    }
    let lacking = findings.engine.layers.iter().filter(|layer| layer.state == LayerState::Unenforced);
    let mut unenforced = Vec::new();
    for layer in lacking {
        tracing::warn!(
            layer = layer.name,
            by = layer.by,
            "not enforced on this host, as allow_unenforced allows"
        );
        unenforced.extend(layer.limit);
    }
    Ok((findings, unenforced))
}

fn server_settings(config: &Config, findings: &Findings) -> Settings {
    Settings {
        connections: config.server.connections,
        header_timeout: config.server.header_timeout,
        body_timeout: config.server.body_timeout,
        write_timeout: config.server.write_timeout,
        body_bytes: config.limits.body.0 as usize,
        bodies_bytes: config.server.bodies.0 as usize,
        code_bytes: config.limits.code.0 as usize,
        timeout: config.limits.timeout,
        timeout_max: config.limits.timeout_max,
        cpu_max: config.limits.timeout_max.mul_f64(config.limits.cpus.max(1.0)),
        memory_bytes: config.limits.memory.0,
        output_bytes: config.limits.stdout.0.max(config.limits.stderr.0),
        files: config.limits.files,
        capabilities: capabilities(config, findings).to_string().into(),
    }
}

/// What this server is and really enforces.
fn capabilities(config: &Config, findings: &Findings) -> serde_json::Value {
    let limits = &config.limits;
    json!({
        "name": "codesandbox",
        "version": env!("CARGO_PKG_VERSION"),
        "driver": config.driver.name(),
        "engine_version": findings.engine.version,
        "rootless": findings.engine.rootless,
        "image": findings.engine.image,
        "python": findings.python,
        "modes": ["fresh", "kernel"],
        "limits": {
            "timeout_ms": limits.timeout.as_millis() as u64,
            "timeout_max_ms": limits.timeout_max.as_millis() as u64,
            "memory_bytes": limits.memory.0,
            "processes": limits.processes,
            "cpus": limits.cpus,
            "workspace_bytes": limits.workspace.0,
            "body_bytes": limits.body.0,
            "code_bytes": limits.code.0,
            "result_bytes": limits.result.0,
            "stdout_bytes": limits.stdout.0,
            "stderr_bytes": limits.stderr.0,
            "artifacts_bytes": limits.artifacts.0,
            "session_idle_timeout_ms": config.session.idle_timeout.as_millis() as u64,
            "session_queue": config.session.queue,
        },
        "layers": findings.engine.layers,
    })
}
