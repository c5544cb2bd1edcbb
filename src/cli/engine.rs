//! From the configuration to the engine that it names.

use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::Failure;
use crate::config::{Config, Driver};
use crate::runtime::SharedRuntime;
use crate::runtime::container;
use crate::runtime::docker::{Docker, Tls};
use crate::runtime::embedded::{self, Embedded};
use crate::runtime::podman::{Podman, Profile};
use crate::supervisor;

/// Starts the driver of the configuration; what it needs of the environment is read here.
pub(super) async fn start_runtime(config: &Config) -> Result<SharedRuntime, Failure> {
    Ok(match config.driver {
        Driver::Embedded => Arc::new(Embedded::start(embedded_settings(config), supervisor::SOURCE).await?),
        Driver::Docker => {
            let settings = docker_settings(config);
            let tls = docker_tls(config, &settings.url)?;
            Arc::new(Docker::start(settings, tls, supervisor::SOURCE).await?)
        }
        Driver::Podman => {
            let into = || Profile::Into(runtime_directory());
            let profile = given(&config.podman.seccomp_profile).map_or_else(into, Profile::There);
            Arc::new(Podman::start(podman_settings(config), profile, supervisor::SOURCE).await?)
        }
    })
}

/// Where each user can see the locks of all.
const LOCKS: &str = "/tmp";

/// Held for as long as the server lives: a second one of the same instance would take over its sandboxes.
///
/// An abstract socket, which the kernel takes back however the server ends. It is seen by all servers in the same
/// network namespace.
pub(super) fn only_one(config: &Config) -> Result<Option<UnixListener>, Failure> {
    let Some((url, name)) = instance_of(config) else { return Ok(None) };
    let name = SocketAddr::from_abstract_name(name)?;
    match UnixListener::bind_addr(&name) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Err(format!(
            "a server of the instance {:?} uses the engine at {url} already: stop it, or give this one another name \
             (configuration key instance, or --instance)",
            config.instance
        )
        .into()),
        Err(error) => Err(error.into()),
    }
}

/// The engine's URL, and a name that all have in common who use one instance on it; the embedded driver's sandboxes are
/// its own.
fn instance_of(config: &Config) -> Option<(String, String)> {
    let url = match config.driver {
        Driver::Embedded => return None,
        Driver::Docker => docker_settings(config).url,
        Driver::Podman => podman_settings(config).url,
    };
    // One socket has many names: /var/run is a link to /run.
    let socket = url.strip_prefix("unix://").and_then(|path| std::fs::canonicalize(path).ok());
    let place = socket.map_or_else(|| url.clone(), |path| path.display().to_string());
    let hash = Sha256::digest(format!("{place}\n{}", config.instance));
    Some((url, format!("codesandbox-{}", hex::encode(hash))))
}

/// Others that use the same instance at the same time, as commands that are no server do: the last one clears up.
#[derive(Debug)]
pub(super) struct Others(Option<File>);

impl Others {
    /// From now on this process is one of them. Waits for one that is clearing up.
    pub(super) fn join(config: &Config) -> Others {
        let joined = instance_of(config).and_then(|(_, name)| {
            let path = Path::new(LOCKS).join(name);
            // Whoever made it: it is only locked, and in this directory nobody but its owner may be asked to make it.
            let file =
                File::open(&path).or_else(|_| File::create_new(&path)).or_else(|_| File::open(&path)).ok()?;
            file.lock_shared().ok()?;
            Some(file)
        });
        Others(joined)
    }

    /// Whether there are none; false where that cannot be known. Nobody joins until this is dropped.
    pub(super) fn are_gone(&self) -> bool {
        self.0.as_ref().is_some_and(|file| file.try_lock().is_ok())
    }
}

fn embedded_settings(config: &Config) -> embedded::Settings {
    embedded::Settings {
        rootfs: given(&config.embedded.rootfs).filter(|path| path.as_os_str() != "host"),
        python: given(&config.embedded.python),
        launcher: "/proc/self/exe".into(),
        instance: config.instance.clone(),
    }
}

fn docker_settings(config: &Config) -> container::Settings {
    let crate::config::Docker { url, runtime, direct, user, labels, .. } = &config.docker;
    let url = stated(url).or_else(|| variable("DOCKER_HOST"));
    let url = url.unwrap_or_else(|| "unix:///var/run/docker.sock".into());
    container_settings(config, url, runtime, *direct, user, labels)
}

fn podman_settings(config: &Config) -> container::Settings {
    let crate::config::Podman { url, runtime, direct, user, labels, .. } = &config.podman;
    let url = stated(url).or_else(|| variable("CONTAINER_HOST")).unwrap_or_else(podman_socket);
    container_settings(config, url, runtime, *direct, user, labels)
}

fn container_settings(
    config: &Config,
    url: String,
    runtime: &str,
    direct: bool,
    user: &str,
    labels: &BTreeMap<String, String>,
) -> container::Settings {
    container::Settings {
        url,
        instance: config.instance.clone(),
        image: config.image.clone(),
        pull: config.pull,
        runtime: stated(runtime),
        direct,
        user: stated(user),
        labels: labels.clone(),
    }
}

/// Where `podman.socket` listens: root's, or this user's.
fn podman_socket() -> String {
    format!("unix://{}/podman/podman.sock", runtime_directory().display())
}

/// This user's directory of sockets and the like.
fn runtime_directory() -> PathBuf {
    let user = rustix::process::geteuid();
    let usual = || if user.is_root() { "/run".into() } else { format!("/run/user/{}", user.as_raw()) };
    let stated = variable("XDG_RUNTIME_DIR").filter(|_| !user.is_root());
    stated.unwrap_or_else(usual).into()
}

/// As Docker's own clients: the configuration's files, or where DOCKER_TLS_VERIFY is set those of
/// DOCKER_CERT_PATH, else of ~/.docker.
fn docker_tls(config: &Config, url: &str) -> Result<Option<Tls>, Failure> {
    let crate::config::Docker { tls_ca, tls_cert, tls_key, .. } = &config.docker;
    let tls = match given(tls_ca) {
        Some(ca) => Tls { ca, cert: tls_cert.clone(), key: tls_key.clone() },
        None if url.starts_with("tcp://") && variable("DOCKER_TLS_VERIFY").is_some() => {
            let home = || PathBuf::from(variable("HOME").unwrap_or_default()).join(".docker");
            let directory = variable("DOCKER_CERT_PATH").map_or_else(home, PathBuf::from);
            let [ca, cert, key] = ["ca.pem", "cert.pem", "key.pem"].map(|name| directory.join(name));
            Tls { ca, cert, key }
        }
        None => return Ok(None),
    };
    for (key, file) in
        [("docker.tls_ca", &tls.ca), ("docker.tls_cert", &tls.cert), ("docker.tls_key", &tls.key)]
    {
        std::fs::File::open(file).map_err(|error| format!("{key}: {}: {error}", file.display()))?;
    }
    Ok(Some(tls))
}

fn given(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

fn stated(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
