//! Floor 7: the configuration: `config/codesandbox.toml`, a file, variables, flags, in this order.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use figment::Figment;
use figment::providers::{Env, Format, Toml};
use figment::value::{Dict, Value};
use serde::Deserialize;
use tracing_subscriber::EnvFilter;

use crate::runtime::Limit;
use crate::runtime::container::Pull;

/// The defaults, compiled in.
pub const DEFAULTS: &str = include_str!("../config/codesandbox.toml");
/// Read where it exists and no `--config` is given.
pub const SYSTEM_FILE: &str = "/etc/codesandbox/codesandbox.toml";
const PREFIX: &str = "CODESANDBOX_";
/// Below this not even the supervisor lives.
const LEAST_MEMORY: ByteSize = ByteSize::mib(32);
/// Above it sums overflow; no machine has it.
const MOST_MEMORY: ByteSize = ByteSize::pib(1);
/// The supervisor, its forker, the run itself, and one process of its own.
const LEAST_PROCESSES: u64 = 4;
/// Above this a number of seconds overflows somewhere: a hundred years.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// The whole configuration. `config/codesandbox.toml` says what each key means.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Config {
    pub listen: SocketAddr,
    pub driver: Driver,
    pub instance: String,
    pub image: String,
    pub pull: Pull,
    pub allow_unenforced: Vec<Limit>,
    pub log: String,
    pub log_format: LogFormat,
    pub audit: Audit,
    pub limits: Limits,
    pub session: Session,
    pub auth: Auth,
    pub pool: Pool,
    pub server: Server,
    pub shutdown: Shutdown,
    pub embedded: Embedded,
    pub docker: Docker,
    pub podman: Podman,
}

/// What makes sandboxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// This program itself.
    Embedded,
    /// A Docker daemon.
    Docker,
    /// A Podman service.
    Podman,
}

impl Driver {
    /// As in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Driver::Embedded => "embedded",
            Driver::Docker => "docker",
            Driver::Podman => "podman",
        }
    }
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Audit {
    pub file: PathBuf,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Limits {
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub timeout_max: Duration,
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
    #[serde(with = "humantime_serde")]
    pub create_timeout: Duration,
    pub memory: ByteSize,
    pub processes: u64,
    pub cpus: f64,
    pub open_files: u64,
    pub workspace: ByteSize,
    pub tmp: ByteSize,
    pub shm: ByteSize,
    pub inodes: u64,
    pub body: ByteSize,
    pub code: ByteSize,
    pub result: ByteSize,
    pub stdout: ByteSize,
    pub stderr: ByteSize,
    pub error: ByteSize,
    pub listing: u64,
    /// Bytes of figures and displayed values in an answer; 0 for none.
    pub artifacts: ByteSize,
    pub files: usize,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Session {
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub lifetime_max: Duration,
    pub max: usize,
    pub queue: usize,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Auth {
    pub mode: AuthMode,
    pub keys_file: PathBuf,
}

/// Who may run code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    /// Whoever reaches the address.
    None,
    /// Whoever bears a key.
    Keys,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Pool {
    pub size: usize,
    pub starting_max: usize,
    #[serde(with = "humantime_serde")]
    pub wait_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub recycle_after: Duration,
    #[serde(with = "humantime_serde")]
    pub idle_after: Duration,
    #[serde(with = "humantime_serde")]
    pub reconcile_period: Duration,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Server {
    pub connections: usize,
    pub bodies: ByteSize,
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Shutdown {
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    pub sessions: SessionsAtShutdown,
}

/// What becomes of the sandboxes of sessions at the end of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionsAtShutdown {
    /// They go with it.
    Remove,
    /// They wait for the next one, their files with them.
    Keep,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Embedded {
    pub rootfs: PathBuf,
    pub python: PathBuf,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Docker {
    pub url: String,
    pub tls_ca: PathBuf,
    pub tls_cert: PathBuf,
    pub tls_key: PathBuf,
    pub runtime: String,
    pub direct: bool,
    pub user: String,
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "each key is documented where its default stands")]
pub struct Podman {
    pub url: String,
    pub seccomp_profile: PathBuf,
    pub runtime: String,
    pub direct: bool,
    pub user: String,
    pub labels: BTreeMap<String, String>,
}

/// A configuration that stops the start: the message names key, place and what would be right.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

/// The layers, ready to be read and to be asked where a value came from.
#[derive(Debug)]
pub struct Layers(Figment);

impl Layers {
    /// Defaults, `file` or the system's, variables, then `flags` (dotted keys with values as in a variable).
    ///
    /// # Errors
    /// Where `file` is named and cannot be read, or a flag is no `key=value`.
    pub fn new(file: Option<&Path>, flags: &[(String, String)]) -> Result<Layers, Error> {
        let mut figment = Figment::from(Toml::string(DEFAULTS));
        match file {
            Some(path) if std::fs::File::open(path).is_err() || !path.is_file() => {
                return Err(Error(format!(
                    "--config {}: there is no such file, or it cannot be read",
                    path.display()
                )));
            }
            Some(path) => figment = figment.merge(Toml::file_exact(path)),
            None if Path::new(SYSTEM_FILE).exists() => figment = figment.merge(Toml::file_exact(SYSTEM_FILE)),
            None => {}
        }
        figment =
            figment.merge(Env::prefixed(PREFIX).filter(|key| !is_of_kubernetes(key.as_str())).split("__"));
        for (key, value) in flags {
            let value: Value = value.parse().expect("a value's parser takes any text");
            figment = figment.merge(Flag { key: key.clone(), value });
        }
        Ok(Layers(figment))
    }

    /// The configuration, checked.
    ///
    /// # Errors
    /// The first key that is unknown, of the wrong type, or impossible together with another.
    pub fn read(&self) -> Result<Config, Error> {
        let config: Config = self.0.extract().map_err(|errors| self.explain(errors))?;
        self.check(&config)?;
        Ok(config)
    }

    /// The effective configuration as TOML, each line with the place that its value came from.
    pub fn describe(&self) -> Result<String, Error> {
        let all: Dict = self.0.extract().map_err(|errors| self.explain(errors))?;
        let mut text = String::new();
        let (tables, plain): (Vec<_>, Vec<_>) =
            all.iter().partition(|(_, value)| matches!(value, Value::Dict(..)));
        for (key, value) in plain {
            self.describe_key(&mut text, key, key, value);
        }
        for (table, value) in tables {
            let _ = write!(text, "\n[{table}]\n"); // a String takes every byte
            for (key, value) in value.as_dict().into_iter().flatten() {
                self.describe_key(&mut text, key, &format!("{table}.{key}"), value);
            }
        }
        Ok(text)
    }

    fn describe_key(&self, text: &mut String, key: &str, path: &str, value: &Value) {
        let line = format!("{key} = {}", literal(value));
        let _ = writeln!(text, "{line:<42} # {}", self.place(path)); // a String takes every byte
    }

    /// Where a key's value comes from, in a person's words.
    fn place(&self, path: &str) -> String {
        let Some(metadata) = self.0.find_metadata(path) else { return "nowhere".into() };
        match (&metadata.source, metadata.name.as_ref()) {
            (Some(figment::Source::File(file)), _) => file.display().to_string(),
            (_, name) if name.contains("environment") => {
                format!("{PREFIX}{}", path.replace('.', "__").to_uppercase())
            }
            (_, name) if name == Flag::NAME => "command line".into(),
            _ => "default".into(),
        }
    }

    fn explain(&self, errors: figment::Error) -> Error {
        let error = errors.into_iter().next().expect("a failed extraction has an error");
        let mut key = error.path.join(".");
        if let figment::error::Kind::UnknownField(name, _) = &error.kind
            && !key.ends_with(name.as_str())
        {
            key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
        }
        let place = match error.metadata.as_ref() {
            Some(metadata) => match &metadata.source {
                Some(figment::Source::File(file)) => file.display().to_string(),
                _ if metadata.name.contains("environment") => {
                    format!("{PREFIX}{}", key.replace('.', "__").to_uppercase())
                }
                _ => metadata.name.to_string(),
            },
            None => self.place(&key),
        };
        use figment::error::Kind;
        let what = match &error.kind {
            Kind::UnknownField(_, known) => {
                format!("there is no such key; expected one of {}", known.join(", "))
            }
            Kind::UnknownVariant(given, known) => format!("{given:?} is none of {}", known.join(", ")),
            Kind::InvalidType(found, _) | Kind::InvalidValue(found, _) => format!("found {found}"),
            kind => kind.to_string(),
        };
        if key.is_empty() {
            return Error(format!("{place}: {what}")); // no TOML at all
        }
        // There is none for a key that there is not.
        let right = Figment::from(Toml::string(DEFAULTS)).find_value(&key).map_or_else(
            |_| String::new(),
            |value| format!("; of the right kind is {key} = {}", literal(&value)),
        );
        Error(format!("configuration key {key} ({place}): {what}{right}"))
    }

    fn check(&self, config: &Config) -> Result<(), Error> {
        let Config { limits, session, auth, pool, server, shutdown, instance, .. } = config;
        let need = |holds: bool, key: &str, right: &str| match holds {
            true => Ok(()),
            false => Err(Error(format!("configuration key {key} ({}): {right}", self.place(key)))),
        };
        // Of several that do not go together somebody has set one, at least.
        let set = |keys: &[&'static str]| {
            let set = keys.iter().find(|key| self.place(key) != "default");
            *set.unwrap_or(&keys[0])
        };
        need(
            is_log_filter(&config.log),
            "log",
            "must be a level (off, error, warn, info, debug, trace), or levels by target, as in \"info,codesandbox::audit=info\"",
        )?;
        for (key, time) in [
            ("limits.timeout", limits.timeout),
            ("limits.timeout_max", limits.timeout_max),
            ("limits.grace", limits.grace),
            ("limits.create_timeout", limits.create_timeout),
            ("session.idle_timeout", session.idle_timeout),
            ("session.lifetime_max", session.lifetime_max),
            ("server.header_timeout", server.header_timeout),
            ("server.body_timeout", server.body_timeout),
            ("server.write_timeout", server.write_timeout),
            ("shutdown.timeout", shutdown.timeout),
            ("pool.wait_timeout", pool.wait_timeout),
            ("pool.recycle_after", pool.recycle_after),
            ("pool.reconcile_period", pool.reconcile_period),
        ] {
            need(!time.is_zero() && time < LONGEST, key, "must be more than 0s and less than 100 years")?;
        }
        for (key, count) in [
            ("session.max", session.max),
            ("pool.starting_max", pool.starting_max),
            ("server.connections", server.connections),
        ] {
            need((1..=1_000_000).contains(&count), key, "must be from 1 to 1000000")?;
        }
        for (key, size) in [
            ("limits.body", limits.body),
            ("limits.code", limits.code),
            ("limits.result", limits.result),
            ("limits.stdout", limits.stdout),
            ("limits.stderr", limits.stderr),
            ("limits.error", limits.error),
        ] {
            need(size >= ByteSize::kib(1) && size <= ByteSize::gib(1), key, "must be from 1KiB to 1GiB")?;
        }
        let sound_name =
            |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        need(
            (1..=64).contains(&instance.len()) && sound_name(instance),
            "instance",
            "must be 1 to 64 letters, digits, \"-\" and \"_\"",
        )?;
        for (key, user) in [("docker.user", &config.docker.user), ("podman.user", &config.podman.user)] {
            let number = |text: &str| text.parse::<u32>().is_ok_and(|id| id > 0);
            let sound = user.split_once(':').is_some_and(|(uid, gid)| number(uid) && number(gid));
            need(user.is_empty() || sound, key, "must be \"uid:gid\", both numbers and neither of them 0")?;
        }
        let tls = [&config.docker.tls_ca, &config.docker.tls_cert, &config.docker.tls_key];
        let given = tls.iter().filter(|path| !path.as_os_str().is_empty()).count();
        need(
            given == 0 || given == 3,
            "docker.tls_ca",
            "needs tls_cert and tls_key beside it, or none of them",
        )?;
        need(
            limits.timeout <= limits.timeout_max,
            set(&["limits.timeout", "limits.timeout_max"]),
            "limits.timeout must not be longer than limits.timeout_max",
        )?;
        need(
            limits.memory >= LEAST_MEMORY,
            "limits.memory",
            "must be at least 32MiB: the supervisor needs it",
        )?;
        for (key, size) in [
            ("limits.memory", limits.memory),
            ("limits.workspace", limits.workspace),
            ("limits.tmp", limits.tmp),
            ("limits.shm", limits.shm),
            ("server.bodies", server.bodies),
        ] {
            need(size <= MOST_MEMORY, key, "must be at most 1PiB")?;
        }
        need(
            server.bodies >= limits.body,
            set(&["server.bodies", "limits.body"]),
            "server.bodies must not be less than limits.body",
        )?;
        let files = limits.workspace + limits.tmp + limits.shm;
        need(
            files + LEAST_MEMORY <= limits.memory,
            set(&["limits.memory", "limits.workspace", "limits.tmp", "limits.shm"]),
            "limits.memory must be 32MiB more than limits.workspace, limits.tmp and limits.shm together, which are in memory",
        )?;
        for (key, size) in
            [("limits.workspace", limits.workspace), ("limits.tmp", limits.tmp), ("limits.shm", limits.shm)]
        {
            need(size >= ByteSize::kib(64), key, "must be at least 64KiB")?;
        }
        need(
            limits.processes >= LEAST_PROCESSES,
            "limits.processes",
            "must be at least 4: two are the supervisor's",
        )?;
        need((0.01..=4096.0).contains(&limits.cpus), "limits.cpus", "must be from 0.01 to 4096")?;
        need(
            (64..=1_000_000).contains(&limits.open_files),
            "limits.open_files",
            "must be from 64 to 1000000",
        )?;
        need((64..=10_000_000).contains(&limits.inodes), "limits.inodes", "must be from 64 to 10000000")?;
        need((1..=100_000).contains(&limits.listing), "limits.listing", "must be from 1 to 100000")?;
        need((1..=1_000_000).contains(&limits.files), "limits.files", "must be from 1 to 1000000")?;
        need(
            limits.code <= limits.body,
            set(&["limits.code", "limits.body"]),
            "limits.code must not be more than limits.body",
        )?;
        let stated = self.place("pool.size") != "default"; // the default gives way
        need(pool.size <= session.max || !stated, "pool.size", "must not be more than session.max")?;
        for (key, time) in
            [("pool.recycle_after", pool.recycle_after), ("pool.reconcile_period", pool.reconcile_period)]
        {
            need(time >= Duration::from_millis(100), key, "must be at least 100ms")?;
        }
        need(pool.idle_after < LONGEST, "pool.idle_after", "must be less than 100 years")?;
        need(
            shutdown.sessions == SessionsAtShutdown::Remove || config.driver != Driver::Embedded,
            "shutdown.sessions",
            "cannot be \"keep\" with the embedded driver, whose sandboxes end with the server",
        )?;
        need(session.queue <= 100_000, "session.queue", "must be at most 100000")?;
        let keys = auth.mode == AuthMode::Keys;
        need(
            keys != auth.keys_file.as_os_str().is_empty(),
            set(&["auth.keys_file", "auth.mode"]),
            "auth.keys_file must name a file where auth.mode is \"keys\", and only there",
        )?;
        let aloud = self.place("auth.mode") != "default";
        need(
            config.listen.ip().is_loopback() || keys || aloud,
            "listen",
            "is not loopback, so that strangers reach it: set auth.mode = \"keys\" and auth.keys_file, or say \
             auth.mode = \"none\" yourself",
        )
    }
}

/// As in TOML.
fn literal(value: &Value) -> String {
    toml::Value::try_from(value).map_or_else(|_| "?".into(), |value| value.to_string())
}

/// Levels and targets with levels, as `EnvFilter` reads them. A word that it takes for a target, and so for a wish to
/// hear nothing else, is most likely a level that there is not.
fn is_log_filter(text: &str) -> bool {
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let sound = |part: &str| {
        levels.contains(&part.to_ascii_lowercase().as_str())
            || part.contains('=')
            || part.split("::").next() == Some("codesandbox")
    };
    text.split(',').map(str::trim).all(sound) && text.parse::<EnvFilter>().is_ok()
}

/// A service of our name puts CODESANDBOX_PORT…, CODESANDBOX_SERVICE_… into every pod of its namespace.
fn is_of_kubernetes(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    key == "port" || key.starts_with("port_") || key.starts_with("service_")
}

/// One flag of the command line.
struct Flag {
    key: String,
    value: Value,
}

impl Flag {
    const NAME: &str = "command line";
}

impl figment::Provider for Flag {
    fn metadata(&self) -> figment::Metadata {
        figment::Metadata::named(Flag::NAME)
    }

    fn data(&self) -> figment::Result<figment::value::Map<figment::Profile, Dict>> {
        let mut value = self.value.clone();
        for part in self.key.rsplit('.') {
            value = Value::from(Dict::from([(part.to_owned(), value)]));
        }
        let dict = value.into_dict().unwrap_or_default();
        Ok([(figment::Profile::Default, dict)].into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(flags: &[(&str, &str)]) -> Result<Config, Error> {
        let flags: Vec<_> = flags.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        Layers::new(None, &flags)?.read()
    }

    #[test]
    fn the_defaults_are_sound() {
        let config = with(&[]).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:5000");
        assert_eq!(config.limits.memory, ByteSize::mib(512));
        assert_eq!(config.session.idle_timeout, Duration::from_secs(900));
    }

    #[test]
    fn a_wrong_value_stops_the_start_and_the_message_names_the_key() {
        for (key, value, right) in [
            ("limits.timeout", "\"soon\"", "time"),
            ("limits.timeout", "400s", "limits.timeout_max"),
            ("limits.memory", "1MiB", "32MiB"),
            ("limits.memory", "100MiB", "limits.workspace"),
            ("limits.memory", "383MiB", "limits.workspace"),
            ("limits.memory", "18EiB", "1PiB"),
            ("server.bodies", "1MiB", "limits.body"),
            ("limits.memory", "many", "limits.memory = \"512MiB\""),
            ("limits.timeout", "30", "limits.timeout = \"30s\""),
            ("limits.processes", "\"few\"", "limits.processes = 64"),
            ("log", "verbose", "off, error, warn"),
            ("log", "\"info,=,,\"", "off, error, warn"),
            ("auth.keys_file", "keys", "auth.mode"),
            ("limits.cpus", "0", "0.01"),
            ("limits.processes", "3", "at least 4"),
            ("limits.grace", "0s", "0s"),
            ("limits.nonsense", "1", "expected one of"),
            ("nonsense", "1", "expected one of"),
            ("driver", "lxc", "embedded"),
            ("instance", "a b", "letters"),
            ("docker.user", "\"root\"", "uid:gid"),
            ("podman.user", "\"0:0\"", "uid:gid"),
            ("docker.tls_ca", "ca.pem", "tls_cert"),
            ("pool.size", "1001", "session.max"),
            ("session.max", "0", "from 1"),
            ("auth.mode", "keys", "keys_file"),
            ("listen", "0.0.0.0:5000", "loopback"),
            ("allow_unenforced", "[\"disk\"]", "memory"),
        ] {
            let message = with(&[(key, value)]).unwrap_err().to_string();
            assert!(message.contains(key.split('.').next_back().unwrap()), "{key}: {message}");
            assert!(message.contains(right), "{key}: {message}");
        }
    }

    #[test]
    fn of_keys_that_do_not_go_together_the_one_that_was_set_is_named() {
        for (key, value, other) in [
            ("limits.workspace", "1GiB", "limits.memory"),
            ("limits.timeout_max", "10s", "limits.timeout"),
            ("limits.body", "512MiB", "server.bodies"),
            ("limits.body", "512KiB", "limits.code"),
            ("auth.mode", "keys", "auth.keys_file"),
        ] {
            let message = with(&[(key, value)]).unwrap_err().to_string();
            assert!(message.contains(&format!("configuration key {key} (command line)")), "{message}");
            assert!(message.contains(other), "{message}");
        }
    }

    #[test]
    fn log_filters_are_levels_and_targets_with_levels() {
        for filter in
            ["info", "WARN", "off", "info,codesandbox::phase=debug", "codesandbox::audit", "hyper=warn"]
        {
            assert!(with(&[("log", &format!("\"{filter}\""))]).is_ok(), "{filter}");
        }
    }

    #[test]
    fn an_open_address_without_keys_has_to_be_said_aloud() {
        assert!(with(&[("listen", "0.0.0.0:5000"), ("auth.mode", "none")]).is_ok());
        assert!(with(&[("listen", "[::1]:5000")]).is_ok());
    }

    #[test]
    fn a_file_goes_over_the_defaults_and_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("my.toml");
        std::fs::write(&file, "[limits]\nmemory = \"1GiB\"\n").unwrap();
        let layers = Layers::new(Some(&file), &[]).unwrap();
        assert_eq!(layers.read().unwrap().limits.memory, ByteSize::gib(1));
        let shown = layers.describe().unwrap();
        let line = shown.lines().find(|line| line.starts_with("memory = ")).unwrap();
        assert!(line.contains("1GiB") && line.contains("my.toml"), "{line}");
        assert!(
            shown.lines().any(|line| line.starts_with("listen") && line.ends_with("# default")),
            "{shown}"
        );
        std::fs::write(&file, "[limits]\nmemroy = \"1GiB\"\n").unwrap();
        let message = Layers::new(Some(&file), &[]).unwrap().read().unwrap_err().to_string();
        assert!(message.contains("memroy") && message.contains("my.toml"), "{message}");
    }
}
