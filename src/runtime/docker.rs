//! The Docker engine, through bollard.
//!
//! `request` lists every security setting; this file is calls.

mod request;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bollard::Docker as Client;
use bollard::container::{AttachContainerResults, LogOutput};
use bollard::errors::Error as ClientError;
use bollard::models::{ContainerStateStatusEnum as Status, HostConfig, SystemInfo};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder,
    InspectContainerOptions, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
    RenameContainerOptionsBuilder,
};
use futures_util::{StreamExt, TryFutureExt, TryStreamExt};
use hyper::Method;

use super::container::{
    self, AllLastWords, Enforced, INSTANCE_LABEL, Listed, Mode, Names, Output, Program, Settings, Uids,
};
use super::raw::{self, Raw};
use super::{
    Claiming, Engine, Error, Fate, Found, KeySecret, Layer, Result, Runtime, Sandbox, SandboxId, SandboxSpec,
    SessionKey, detached, done,
};
use request::{claimed_layers, container_request, enforced, nano_cpus};

const DRIVER: &str = "docker";
/// A call that takes longer has failed; only a pull may.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Seconds that bollard itself waits for the head of an answer: beyond every deadline of ours.
const CLIENT_TIMEOUT_S: u64 = 120;
/// From one line on the progress of a pull to the next.
const PROGRESS: Duration = Duration::from_secs(2);
/// A removal that somebody else has begun is looked at again.
const REMOVAL_PAUSE: Duration = Duration::from_millis(50);
/// Uids that neither systemd nor useradd hands out; see `runtime::embedded`'s own range, which is beside it.
const UIDS: (u32, u32) = (2_100_000_000, 40_000_000);
/// Where the daemon maps uids (userns-remap, or rootless), these are what it has to map.
const MAPPED_UIDS: (u32, u32) = (10_000, 50_000);
const CGROUPS: &str = "a host with control groups version 2, or with memory, cpu and pids under version 1; \
                       or name the limit in allow_unenforced";

/// TLS for a daemon at `tcp://…`: the three files that Docker's own clients take.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Who signed the daemon's certificate.
    pub ca: std::path::PathBuf,
    /// Our certificate.
    pub cert: std::path::PathBuf,
    /// And its key.
    pub key: std::path::PathBuf,
}

/// The Docker engine.
#[derive(Debug, Clone)]
pub struct Docker(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    client: Client,
    /// `None` where the daemon is reached through TLS.
    raw: Option<Raw>,
    settings: Settings,
    program: Program,
    names: Names,
    secret: KeySecret,
    info: SystemInfo,
    /// Where the image declares volumes.
    volumes: Vec<String>,
    uids: Uids,
    last_words: AllLastWords,
}

impl Docker {
    /// Finds the daemon, its containers of this instance and the image. `supervisor` is the source of PID 1.
    ///
    /// # Errors
    /// `Unusable` where the operator has to act: no daemon there, no image, no such runtime.
    pub async fn start(settings: Settings, tls: Option<Tls>, supervisor: &'static str) -> Result<Docker> {
        let unusable = |why: String| Error::Unusable {
            what: format!("reach the Docker daemon at {}", settings.url),
            why,
            remedy:
                "start it (systemctl start docker), set docker.url or DOCKER_HOST to where it listens, and \
                     let this user reach its socket; or use driver = \"embedded\""
                    .into(),
        };
        let client = connect(&settings.url, tls.as_ref()).map_err(|error| unusable(causes(&error)))?;
        let client = within("negotiate the version", client.negotiate_version())
            .await
            .map_err(|error| unusable(causes(&error)))?;
        let info = within("ask for its properties", client.info())
            .await
            .map_err(|error| unusable(causes(&error)))?;
        check_runtime(&info, &settings)?;
        let volumes = ensure_image(&client, &settings).await?;
        let left = listed(&client, &settings.instance).await?;
        let names = Names::new(&settings.instance);
        let secret = container::secret_of(&names, &left);
        let (first, many) = if maps_uids(&info) { MAPPED_UIDS } else { UIDS };
        let inner = Inner {
            client,
            raw: if tls.is_none() { Raw::new(&settings.url, "") } else { None },
            names,
            program: Program::new(supervisor, settings.direct),
            settings,
            secret,
            info,
            volumes,
            uids: Uids::new(first, many),
            last_words: AllLastWords::default(),
        };
        Ok(Docker(Arc::new(inner)))
    }
}

fn connect(url: &str, tls: Option<&Tls>) -> std::result::Result<Client, ClientError> {
    let version = bollard::API_DEFAULT_VERSION;
    match tls {
        Some(Tls { ca, cert, key }) => {
            // Twice is fine: the first one stays.
            let _ = rustls::crypto::ring::default_provider().install_default();
            Client::connect_with_ssl(url, key, cert, ca, CLIENT_TIMEOUT_S, version)
        }
        None if url.starts_with("unix://") => Client::connect_with_unix(url, CLIENT_TIMEOUT_S, version),
        None if url.starts_with("tcp://") || url.starts_with("http://") => {
            Client::connect_with_http(url, CLIENT_TIMEOUT_S, version)
        }
        None => {
            Err(ClientError::UnsupportedURISchemeError { uri: format!("{url}: expected unix:// or tcp://") })
        }
    }
}

/// Whether uids in a container are others outside.
fn maps_uids(info: &SystemInfo) -> bool {
    let options = info.security_options.iter().flatten();
    options.into_iter().any(|option| option.contains("name=userns") || option.contains("name=rootless"))
}

fn check_runtime(info: &SystemInfo, settings: &Settings) -> Result<()> {
    let Some(wanted) = &settings.runtime else { return Ok(()) };
    let known: Vec<_> = info.runtimes.iter().flatten().map(|(name, _)| name.as_str()).collect();
    if known.contains(&wanted.as_str()) {
        return Ok(());
    }
    Err(Error::Unusable {
        what: format!("use the runtime {wanted}"),
        why: format!("the daemon knows {}", known.join(", ")),
        remedy:
            "add it to the daemon's \"runtimes\" (daemon.json), or set docker.runtime to one that it knows"
                .into(),
    })
}

/// Sees to it that the image is there; gives the volumes that it declares.
async fn ensure_image(client: &Client, settings: &Settings) -> Result<Vec<String>> {
    let image = &settings.image;
    let mut here = look_for(client, image).await?;
    if settings.wants_pull(DRIVER, here.is_some())? {
        pull(client, image).await?;
        here = look_for(client, image).await?;
    }
    here.ok_or_else(|| container::image_missing(DRIVER, image, "it was pulled, and is not there"))
}

async fn look_for(client: &Client, image: &str) -> Result<Option<Vec<String>>> {
    match within("look for the image", client.inspect_image(image)).await {
        Ok(found) => Ok(Some(found.config.and_then(|config| config.volumes).unwrap_or_default())),
        Err(Failure::Client(ClientError::DockerResponseServerError { status_code: 404, .. })) => Ok(None),
        Err(failure) => Err(failure.at(format!("look for the image {image}"))),
    }
}

/// Takes as long as it takes, and says how far it is.
async fn pull(client: &Client, image: &str) -> Result<()> {
    tracing::info!(image, "pulling the image");
    let tagged = match image.rsplit_once('/').map_or(image, |(_, name)| name) {
        name if name.contains([':', '@']) => image.to_owned(),
        _ => format!("{image}:latest"), // else Docker takes every tag there is
    };
    let options = CreateImageOptionsBuilder::default().from_image(&tagged).build();
    let mut steps = client.create_image(Some(options), None, None);
    let mut layers: HashMap<String, (i64, i64)> = HashMap::new();
    let mut said = tokio::time::Instant::now();
    loop {
        let step = match steps.next().await {
            None => break,
            Some(Ok(step)) => step,
            Some(Err(error)) => return Err(container::pull_failed(DRIVER, image, &error.to_string())),
        };
        if let Some(error) = step.error_detail.and_then(|detail| detail.message) {
            return Err(container::pull_failed(DRIVER, image, &error));
        }
        if let (Some(id), Some(progress)) = (step.id, step.progress_detail) {
            layers.insert(id, (progress.current.unwrap_or(0), progress.total.unwrap_or(0)));
        }
        if said.elapsed() >= PROGRESS {
            said = tokio::time::Instant::now();
            let (done, all) = layers.values().fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
            let mebibytes = |bytes: i64| bytes / (1 << 20);
            tracing::info!(image, "pulled {} of {} MiB", mebibytes(done), mebibytes(all));
        }
    }
    tracing::info!(image, "pulled");
    Ok(())
}

async fn listed(client: &Client, instance: &str) -> Result<Vec<Listed>> {
    let ours = HashMap::from([("label", vec![format!("{INSTANCE_LABEL}={instance}")])]);
    let options = ListContainersOptionsBuilder::default().all(true).filters(&ours).build();
    let listed = within("list", client.list_containers(Some(options))).await;
    let listed = listed.map_err(|failure| failure.at("list our containers"))?.into_iter();
    Ok(listed.filter_map(|container| Listed::new(container.id, container.names, container.labels)).collect())
}

impl Inner {
    async fn make(&self, name: String, spec: &SandboxSpec, program: Vec<String>) -> Result<Sandbox> {
        let user = self.settings.user.clone().unwrap_or_else(|| self.uids.next());
        let request = container_request(
            spec,
            &self.settings,
            &self.secret,
            enforced(&self.info),
            &user,
            &self.volumes,
            program,
        );
        let options = CreateContainerOptionsBuilder::default().name(&name).build();
        let created = within("create", self.client.create_container(Some(options), request)).await;
        let made = match created {
            Ok(created) => self.begin(SandboxId(created.id)).await,
            Err(Failure::Client(ClientError::DockerResponseServerError { status_code: 404, message })) => {
                Err(container::image_missing(DRIVER, &self.settings.image, &message))
            }
            Err(failure) => Err(failure.at("create a container")),
        };
        if made.is_err() {
            // By the name, which we know even where the answer was lost.
            container::undone(self.remove(&SandboxId(name)).await);
        }
        made
    }

    /// Attached first: nothing that it says can be lost then.
    async fn begin(&self, id: SandboxId) -> Result<Sandbox> {
        let sandbox = self.attach(&id).await?;
        let started = within("start", self.client.start_container(&id.0, None)).await;
        started.map_err(|failure| failure.at("start a container"))?;
        Ok(sandbox)
    }

    async fn attach(&self, id: &SandboxId) -> Result<Sandbox> {
        let options = AttachContainerOptionsBuilder::default();
        let options = options.stream(true).stdin(true).stdout(true).stderr(true).logs(false).build();
        let attached = within("attach", self.client.attach_container(&id.0, Some(options))).await;
        let AttachContainerResults { output, input } =
            attached.map_err(|failure| failure.of(id, "attach to"))?;
        let words = self.last_words.begin(id);
        let output = output.map_err(std::io::Error::other).map_ok(|output| match output {
            LogOutput::StdErr { message } => Output::Stderr(message),
            LogOutput::StdOut { message } | LogOutput::StdIn { message } | LogOutput::Console { message } => {
                Output::Stdout(message)
            }
        });
        Ok(Sandbox { id: id.clone(), stream: container::duplex(output, input, words) })
    }

    /// Gone means gone: a removal that another call has begun is awaited.
    async fn remove(&self, id: &SandboxId) -> Result<()> {
        loop {
            let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
            match within("remove", self.client.remove_container(&id.0, Some(options))).await {
                Ok(())
                | Err(Failure::Client(ClientError::DockerResponseServerError { status_code: 404, .. })) => {
                    break;
                }
                Err(Failure::Client(ClientError::DockerResponseServerError { status_code: 409, .. })) => {
                    tokio::time::sleep(REMOVAL_PAUSE).await; // ends with the caller's patience
                }
                Err(failure) => return Err(failure.of(id, "remove")),
            }
        }
        self.last_words.forget(id);
        Ok(())
    }

    async fn inspect(&self, id: &SandboxId) -> Result<bollard::models::ContainerInspectResponse> {
        let inspected =
            within("inspect", self.client.inspect_container(&id.0, None::<InspectContainerOptions>)).await;
        inspected.map_err(|failure| failure.of(id, "inspect"))
    }

    /// Of the container's first process, on the engine's own host.
    async fn pid(&self, id: &SandboxId) -> Result<i32> {
        let state = self.inspect(id).await?.state.unwrap_or_default();
        Ok(state.pid.and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0))
    }

    /// The layers as the daemon tells of them; `real` are the settings that it says the first sandbox has.
    fn layers(&self, spec: &SandboxSpec, real: &HostConfig) -> Vec<Layer> {
        let info = &self.info;
        let version = info.cgroup_version.map_or("?".into(), |version| version.to_string());
        let by = format!("control groups version {version}");
        let HostConfig { memory, memory_swap, nano_cpus: real_cpus, pids_limit, .. } = real;
        let bytes = Some(spec.memory_bytes as i64);
        let can = enforced(info);
        let enforced = Enforced {
            memory: can.memory && *memory == bytes,
            cpus: can.cpus && *real_cpus == Some(nano_cpus(spec)),
            processes: can.processes && *pids_limit == Some(spec.processes as i64),
        };
        let own_uids = self.settings.user.is_none();
        let mut layers = enforced.layers(&by, "Docker", own_uids, CGROUPS).to_vec();
        layers.push(match info.swap_limit.unwrap_or(true) && *memory_swap == bytes {
            true => Layer::on("swap", "none"),
            false => Layer::off(
                "swap",
                "not limited: the host's kernel does not count it",
                "swapaccount=1, or no swap",
            ),
        });
        layers.push(self.settings.uids_layer(DRIVER));
        layers.push(match maps_uids(info) {
            true => Layer::on("user_namespace", "the daemon maps uids"),
            false => {
                Layer::off("user_namespace", "the daemon does not map uids", "userns-remap in daemon.json")
            }
        });
        layers.extend(claimed_layers(spec, &self.settings, &self.secret, can, real));
        layers
    }
}

#[async_trait]
impl Runtime for Docker {
    fn name(&self) -> &'static str {
        DRIVER
    }

    fn secret(&self) -> KeySecret {
        self.0.secret.clone()
    }

    async fn probe(&self, first: &SandboxId, spec: &SandboxSpec) -> Result<Engine> {
        let real = self.0.inspect(first).await?.host_config.unwrap_or_default();
        let options = self.0.info.security_options.iter().flatten();
        Ok(Engine {
            version: self.0.info.server_version.clone().unwrap_or_default(),
            rootless: options.into_iter().any(|option| option.contains("name=rootless")),
            image: self.0.settings.image.clone(),
            layers: self.0.layers(spec, &real),
        })
    }

    async fn create(&self, spec: &SandboxSpec) -> Result<Sandbox> {
        let (inner, undoing) = (self.0.clone(), self.0.clone());
        let spec = spec.clone();
        let name = inner.names.unclaimed()?;
        let make = async move {
            let sandbox = inner.make(name, &spec, Program::supervisor(Mode::Park)).await?;
            let id = sandbox.id.clone();
            match inner.program.load_new(sandbox, &inner.last_words, inner.pid(&id)).await {
                Ok(sandbox) => Ok(sandbox),
                Err(error) => {
                    container::undone(inner.remove(&id).await);
                    Err(error)
                }
            }
        };
        detached(DRIVER, make, async move |id| {
            container::undone(undoing.remove(&id).await);
        })
        .await
    }

    async fn attach(&self, id: &SandboxId) -> Result<Sandbox> {
        // To a container that has ended an attach succeeds, and is silent then.
        match self.fate(id).await? {
            Fate::Running { .. } => self.0.attach(id).await,
            _ => Err(Error::Gone(id.clone())),
        }
    }

    async fn claim(&self, id: &SandboxId, owner: &SessionKey) -> Result<Claiming> {
        let name = self.0.names.claimed(owner, SystemTime::now());
        let Some(raw) = &self.0.raw else {
            let options = RenameContainerOptionsBuilder::default().name(&name).build();
            let renamed = within("rename", self.0.client.rename_container(&id.0, options)).await;
            return renamed.map(|()| done()).map_err(|failure| failure.of(id, "claim"));
        };
        // By `raw`: bollard does not tell when the daemon has a request.
        let path = format!("/containers/{id}/rename?name={name}");
        let begun = within("rename", raw.begin(Method::POST, &path).map_err(of_raw)).await;
        let renamed = begun.map_err(|failure| failure.of(id, "claim"))?;
        let id = id.clone();
        Ok(Box::pin(async move {
            let renamed = within("rename", renamed.map_err(of_raw)).await;
            renamed.map(drop).map_err(|failure| failure.of(&id, "claim"))
        }))
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let containers = listed(&self.0.client, &self.0.settings.instance).await?;
        Ok(containers.into_iter().map(|container| self.0.names.found(container)).collect())
    }

    async fn fate(&self, id: &SandboxId) -> Result<Fate> {
        let state = match self.0.inspect(id).await {
            Ok(container) => container.state.unwrap_or_default(),
            Err(Error::Gone(_)) => return Ok(Fate::Gone),
            Err(error) => return Err(error),
        };
        Ok(match state.status {
            Some(Status::RUNNING | Status::CREATED | Status::RESTARTING) => {
                Fate::Running { out_of_memory_kills: None } // the supervisor sees them itself
            }
            Some(Status::PAUSED) => Fate::Paused,
            Some(Status::EXITED | Status::DEAD)
                if state.oom_killed == Some(true) && state.exit_code == Some(Fate::KILLED.into()) =>
            {
                Fate::OutOfMemory
            }
            Some(Status::EXITED | Status::DEAD) => {
                Fate::Exited { code: state.exit_code.unwrap_or(-1) as i32, stderr: self.0.last_words.of(id) }
            }
            _ => Fate::Gone,
        })
    }

    async fn remove(&self, id: &SandboxId) -> Result<()> {
        self.0.remove(id).await
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("no answer to \"{0}\" within {CALL_TIMEOUT:?}")]
    Late(&'static str),
}

/// As bollard would have said it.
fn of_raw(failure: raw::Failure) -> ClientError {
    match failure {
        raw::Failure::Refused(raw::Refusal { status, message }) => {
            ClientError::DockerResponseServerError { status_code: status.as_u16(), message }
        }
        raw::Failure::Broken(err) => ClientError::IOError { err },
    }
}

/// Every call has a deadline: a daemon may be stopped, and not only dead.
async fn within<T>(
    what: &'static str,
    call: impl Future<Output = std::result::Result<T, ClientError>>,
) -> std::result::Result<T, Failure> {
    Ok(container::timed(what, tokio::time::timeout(CALL_TIMEOUT, call))
        .await
        .map_err(|_| Failure::Late(what))??)
}

impl Failure {
    /// As an error of a call that is about the container `id`.
    fn of(self, id: &SandboxId, what: &str) -> Error {
        match self {
            Failure::Client(ClientError::DockerResponseServerError { status_code: 404, .. }) => {
                Error::Gone(id.clone())
            }
            other => other.at(format!("{what} sandbox {id}")),
        }
    }

    fn at(self, what: impl Into<String>) -> Error {
        match self {
            Failure::Client(ClientError::DockerResponseServerError { message, .. }) => {
                match container::is_no_space(&message) {
                    true => Error::NoSpace { driver: DRIVER, why: message },
                    false => Error::failed(what)(std::io::Error::other(message)),
                }
            }
            // What is no answer of the daemon's is a sign that there is no daemon.
            Failure::Client(error) => Error::Unavailable { driver: DRIVER, why: causes(&error) },
            late @ Failure::Late(_) => Error::Unavailable { driver: DRIVER, why: late.to_string() },
        }
    }
}

/// An error and what led to it, in one line: hyper's own texts tell nothing of the cause.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
