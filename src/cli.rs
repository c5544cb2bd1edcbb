//! Floor 7: the command line. Reads arguments, builds the floors, and says what a person needs to know.

mod doctor;
mod engine;
mod run;
mod serve;
mod slice;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use tracing_subscriber::fmt::format::FmtSpan;

use engine::Others;

use crate::config::{Config, Driver, Layers, LogFormat, SessionsAtShutdown};
use crate::runtime::{Limit, SandboxSpec};
use crate::server::audit;
use crate::server::auth::Key;
use crate::supervisor::Caps;
use crate::{phase, pool, reconciler, session};

/// Runs untrusted Python, safely and fast, behind HTTP.
///
/// Without a command it serves: POST /run takes {"user_id", "code", "data"} and gives back the value of the
/// variable `result` and the workspace's files.
#[derive(Debug, Parser)]
#[command(
    name = "codesandbox",
    version,
    after_help = "Every setting: codesandbox config. What this host gives: codesandbox doctor."
)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct Options {
    /// The configuration file [default: /etc/codesandbox/codesandbox.toml where it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to serve HTTP, e.g. 127.0.0.1:5000
    #[arg(long, global = true, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// What makes sandboxes
    #[arg(long, global = true, value_enum)]
    driver: Option<Driver>,
    /// Whose sandboxes are ours on a shared engine
    #[arg(long, global = true, value_name = "NAME")]
    instance: Option<String>,
    /// Protections that may be missing where this host cannot give them
    #[arg(long, global = true, value_enum, value_delimiter = ',', value_name = "LIMITS")]
    allow_unenforced: Vec<Limit>,
    /// Any other key, e.g. --set limits.memory=1GiB; may be repeated
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve HTTP (what happens without a command)
    Serve,
    /// Run one program in a sandbox, without a server
    Run(run::Arguments),
    /// Tell layer by layer what this host gives, and what to do about the rest
    Doctor,
    /// Print the effective configuration, and where each value came from
    Config,
    /// Make API keys
    #[command(subcommand)]
    Key(KeyCommand),
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Print a new key and its line for auth.keys_file
    New {
        /// Whose key it is: two tenants' users never share a session
        #[arg(long)]
        tenant: String,
    },
}

/// Why the program ends with an error; printed as it is.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs the program.
pub fn main() -> ExitCode {
    let Cli { options, command } = Cli::parse();
    match dispatch(&options, command.unwrap_or(Command::Serve)) {
        Ok(code) => code,
        Err(failure) if is_broken_pipe(&failure) => ExitCode::from(UNHEARD),
        Err(failure) => {
            eprintln!("codesandbox: {failure}");
            ExitCode::from(2)
        }
    }
}

/// What a shell gives a program that SIGPIPE ended.
const UNHEARD: u8 = 141;

/// Whoever read our standard output has gone, as `head` does.
fn is_broken_pipe(failure: &Failure) -> bool {
    failure
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// A line to standard output, which may be closed or full.
fn say(line: impl std::fmt::Display) -> std::io::Result<()> {
    writeln!(std::io::stdout(), "{line}")
}

fn dispatch(options: &Options, command: Command) -> Result<ExitCode, Failure> {
    if let Command::Key(KeyCommand::New { tenant }) = &command {
        return new_key(tenant);
    }
    let layers = Layers::new(options.config.as_deref(), &options.flags()?)?;
    let config = layers.read()?;
    if let Command::Config = command {
        say(layers.describe()?.trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    slice::shorten(); // this thread listens
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    let runtime = threads.on_thread_start(slice::shorten).enable_all().build()?;
    runtime.block_on(async {
        match command {
            Command::Serve => serve::serve(config).await,
            Command::Run(arguments) => run::run(config, arguments).await,
            Command::Doctor => doctor::doctor(config).await,
            Command::Config | Command::Key(_) => unreachable!("answered above"),
        }
    })
}

fn new_key(tenant: &str) -> Result<ExitCode, Failure> {
    if tenant.is_empty() || tenant.contains([':', '\n', '\r', '#']) || tenant.trim() != tenant {
        return Err("--tenant must be a name without \":\", \"#\" and line breaks".into());
    }
    let (key, line) = Key::generate(tenant);
    say(format_args!("key (shown only now): {key}"))?;
    say(format_args!("line for auth.keys_file: {line}"))?;
    Ok(ExitCode::SUCCESS)
}

impl Options {
    /// As dotted keys, the way `Layers` takes them.
    fn flags(&self) -> Result<Vec<(String, String)>, Failure> {
        let quoted = |text: &dyn std::fmt::Display| format!("\"{text}\"");
        let mut flags = Vec::new();
        for setting in &self.set {
            let (key, value) =
                setting.split_once('=').ok_or_else(|| format!("--set {setting}: expected KEY=VALUE"))?;
            flags.push((key.trim().to_owned(), value.trim().to_owned()));
        }
        if let Some(listen) = &self.listen {
            flags.push(("listen".into(), quoted(listen)));
        }
        if let Some(driver) = self.driver {
            flags.push(("driver".into(), quoted(&driver.name())));
        }
        if let Some(instance) = &self.instance {
            flags.push(("instance".into(), quoted(instance)));
        }
        if !self.allow_unenforced.is_empty() {
            let names: Vec<_> = self.allow_unenforced.iter().map(|limit| quoted(limit)).collect();
            flags.push(("allow_unenforced".into(), format!("[{}]", names.join(","))));
        }
        Ok(flags)
    }
}

fn spec(config: &Config) -> SandboxSpec {
    let limits = &config.limits;
    SandboxSpec {
        memory_bytes: limits.memory.0,
        processes: limits.processes,
        cpus: limits.cpus,
        open_files: limits.open_files,
        workspace_bytes: limits.workspace.0,
        tmp_bytes: limits.tmp.0,
        shm_bytes: limits.shm.0,
        inodes: limits.inodes,
    }
}

/// `unenforced` are the limits without a control group, for which rlimits stand in.
fn caps(config: &Config, unenforced: &[Limit]) -> Caps {
    let limits = &config.limits;
    // FSIZE for files in memory (memfd), which count as nobody's address space until they are mapped.
    let memory =
        unenforced.contains(&Limit::Memory).then_some([("AS", limits.memory.0), ("FSIZE", limits.memory.0)]);
    // It counts by uid, and so only where that is the sandbox's own; the embedded driver sets it itself.
    let own_uid = match config.driver {
        Driver::Embedded => false,
        Driver::Docker => config.docker.user.is_empty(),
        Driver::Podman => config.podman.user.is_empty(),
    };
    let processes = own_uid.then_some(("NPROC", limits.processes));
    Caps {
        stdout: limits.stdout.0,
        stderr: limits.stderr.0,
        result: limits.result.0,
        error: limits.error.0,
        listing_lines: limits.listing,
        artifacts: limits.artifacts.0,
        grace_ms: (limits.grace.as_millis() / 2) as u64,
        rlimits: memory.into_iter().flatten().chain(processes).collect(),
    }
}

fn pool_settings(config: &Config, caps: Caps) -> pool::Settings {
    pool::Settings {
        size: config.pool.size.min(config.session.max),
        starting_max: config.pool.starting_max,
        capacity: config.session.max + config.pool.size.min(config.session.max),
        create_timeout: config.limits.create_timeout,
        wait_timeout: config.pool.wait_timeout,
        recycle_after: config.pool.recycle_after,
        idle_after: Some(config.pool.idle_after).filter(|time| !time.is_zero()),
        seed: u64::from(std::process::id()),
        spec: spec(config),
        caps,
    }
}

/// What a creation may take beyond its time until the pool knows of it.
const CREATE_MARGIN: Duration = Duration::from_secs(5);

fn reconciler_settings(config: &Config) -> reconciler::Settings {
    reconciler::Settings {
        period: config.pool.reconcile_period,
        grace: config.limits.create_timeout + CREATE_MARGIN,
    }
}

fn session_settings(config: &Config) -> session::Settings {
    session::Settings {
        idle_timeout: config.session.idle_timeout,
        lifetime_max: config.session.lifetime_max,
        max: config.session.max,
        queue: config.session.queue,
        keep: config.shutdown.sessions == SessionsAtShutdown::Keep,
    }
}

/// How far an engine is with what takes long (the pull of an image), for commands that are no server.
const PROGRESS: &str = "codesandbox::runtime=info";

/// For commands that are no server: they say how far the engine is, and a server of this instance is not to take
/// their sandbox for its own.
fn stand_apart(config: &mut Config) -> Result<Others, Failure> {
    config.instance += "-run";
    log_to_stderr(config, PROGRESS)?;
    Ok(Others::join(config))
}

/// `filter` is as the configuration's `log`.
fn log_to_stderr(config: &Config, filter: &str) -> Result<(), Failure> {
    let mut wanted = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| format!("configuration key log: {error}"))?;
    for many in [audit::TARGET, phase::TARGET] {
        if !filter.contains(many) {
            let never = format!("{many}=off"); // "debug" alone does not mean them
            wanted = wanted.add_directive(never.parse().expect("a target and a level are a directive"));
        }
    }
    let ends = if filter.contains(phase::TARGET) { FmtSpan::CLOSE } else { FmtSpan::NONE };
    let builder = tracing_subscriber::fmt().with_env_filter(wanted).with_span_events(ends);
    let builder = builder.with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            builder.with_ansi(colours).with_target(false).init();
        }
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}
