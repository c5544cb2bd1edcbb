//! The Docker engine, through bollard.
//!
//! `container_request` lists every security setting; the rest of this file is calls.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bollard::Docker as Client;
use bollard::container::{AttachContainerResults, LogOutput};
use bollard::errors::Error as ClientError;
use bollard::models::{
    ContainerCreateBody, ContainerStateStatusEnum as Status, HostConfig, HostConfigCgroupnsModeEnum,
    HostConfigLogConfig, ResourcesUlimits, SystemInfo,
};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder,
    InspectContainerOptions, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
    RenameContainerOptionsBuilder,
};
use futures_util::{StreamExt, TryFutureExt, TryStreamExt};
use hyper::Method;

use super::container::{
    self, AllLastWords, Enforced, INSTANCE_LABEL, Listed, MASKED_PATHS, Mode, Names, OOM_SCORE_ADJ, Output,
    Program, SYSCTLS, Settings, Uids,
};
use super::guest::{self, HOSTNAME, WORKSPACE};
use super::raw::{self, Raw};
use super::{
    Claiming, Engine, Error, Fate, Found, KeySecret, Layer, Result, Runtime, Sandbox, SandboxId, SandboxSpec,
    SessionKey, detached, done,
};

const DRIVER: &str = "docker";
/// A call that takes longer has failed; only a pull may.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Seconds that bollard itself waits for the head of an answer: beyond every deadline of ours.
const CLIENT_TIMEOUT_S: u64 = 120;
/// From one line on the progress of a pull to the next.
const PROGRESS: Duration = Duration::from_secs(2);
/// A removal that somebody else has begun is looked at again.
const REMOVAL_PAUSE: Duration = Duration::from_millis(50);
/// Over a volume that the image declares: Docker would make a directory on disk for it, without any limit.
const NO_VOLUME: &str = "ro,noexec,nosuid,nodev,size=4096";
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

/// What Docker is asked for: every security setting of this driver.
///
/// `user` is `uid:gid`, and never root's; `volumes` are those that the image declares.
fn container_request(
    spec: &SandboxSpec,
    settings: &Settings,
    secret: &KeySecret,
    enforced: Enforced,
    user: &str,
    volumes: &[String],
    mut program: Vec<String>,
) -> ContainerCreateBody {
    let (uid, gid) = user.split_once(':').unwrap_or((user, user));
    let tmpfs = |size: u64, mode: &str| {
        let SandboxSpec { inodes, .. } = spec;
        format!("rw,exec,nosuid,nodev,size={size},nr_inodes={inodes},mode={mode},uid={uid},gid={gid}")
    };
    let no_volumes = volumes.iter().map(|place| (place.clone(), NO_VOLUME.to_owned()));
    let ours = [
        (WORKSPACE.into(), tmpfs(spec.workspace_bytes, "0755")),
        ("/tmp".into(), tmpfs(spec.tmp_bytes, "1777")),
        ("/dev/shm".into(), tmpfs(spec.shm_bytes, "1777")),
    ];
    let ulimit = |(name, value): (&str, u64)| ResourcesUlimits {
        name: Some(name.into()),
        soft: Some(value as i64),
        hard: Some(value as i64),
    };
    let strings = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    };
    let host_config = HostConfig {
        // Limits.
        memory: enforced.memory.then_some(spec.memory_bytes as i64),
        memory_swap: enforced.memory.then_some(spec.memory_bytes as i64), // of both together: no swap
        nano_cpus: enforced.cpus.then(|| nano_cpus(spec)),
        pids_limit: enforced.processes.then_some(spec.processes as i64),
        ulimits: Some(container::resources(spec).map(ulimit).collect()),
        oom_score_adj: Some(OOM_SCORE_ADJ),
        sysctls: Some(strings(&SYSCTLS)),
        // Rights.
        cap_drop: Some(vec!["ALL".into()]),
        security_opt: Some(vec![
            "no-new-privileges".into(),
            format!("seccomp={}", guest::short_seccomp_profile()),
        ]),
        privileged: Some(false),
        // Files.
        readonly_rootfs: Some(true),
        masked_paths: Some(MASKED_PATHS.map(str::to_owned).to_vec()),
        tmpfs: Some(no_volumes.chain(ours).collect()), // ours last: they go over a volume of that name
        // Namespaces.
        network_mode: Some("none".into()), // and not network_disabled, which leaves out /etc/hosts, too
        // Not the host's own servers and domain.
        dns: Some(vec!["127.0.0.1".into()]),
        dns_search: Some(vec![".".into()]),
        ipc_mode: Some("private".into()),
        cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
        // Our frames run over stdout: they must not pile up on disk.
        log_config: Some(HostConfigLogConfig { typ: Some("none".into()), config: None }),
        runtime: settings.runtime.clone(),
        init: Some(false), // PID 1 is the supervisor
        ..HostConfig::default()
    };
    let environment = guest::environment(spec).map(|(name, value)| format!("{name}={value}"));
    let arguments = program.split_off(1);
    ContainerCreateBody {
        image: Some(settings.image.clone()),
        entrypoint: Some(program),
        cmd: Some(arguments),
        env: Some(environment.collect()),
        user: Some(user.into()),
        working_dir: Some(WORKSPACE.into()),
        hostname: Some(HOSTNAME.into()),
        labels: Some(container::labels(settings, secret).into_iter().collect()),
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        open_stdin: Some(true),
        stdin_once: Some(false), // it stays open for a server that comes back
        tty: Some(false),
        healthcheck: Some(bollard::models::HealthConfig {
            test: Some(vec!["NONE".into()]), // the image's own would start processes
            ..Default::default()
        }),
        host_config: Some(host_config),
        ..ContainerCreateBody::default()
    }
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
            settings,
            program: Program::new(supervisor),
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

/// What the daemon says that it can; one that says nothing can.
fn enforced(info: &SystemInfo) -> Enforced {
    Enforced {
        memory: info.memory_limit.unwrap_or(true),
        cpus: info.cpu_cfs_quota.unwrap_or(true),
        processes: info.pids_limit.unwrap_or(true),
    }
}

/// The share of CPU time as the daemon takes it.
fn nano_cpus(spec: &SandboxSpec) -> i64 {
    (spec.cpus * 1e9) as i64
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

/// The layers that hold where the daemon says of a sandbox what it was asked for.
fn claimed_layers(
    spec: &SandboxSpec,
    settings: &Settings,
    secret: &KeySecret,
    enforced: Enforced,
    real: &HostConfig,
) -> Vec<Layer> {
    let asked = container_request(spec, settings, secret, enforced, "1:1", &[], vec!["".into()])
        .host_config
        .unwrap_or_default();
    let layer = |name, holds: bool, by: &str| match holds {
        true => Layer::on(name, by),
        false => Layer::missing(name, "the daemon says that the sandbox does not have it"),
    };
    let mounted = |place: &String| real.tmpfs.as_ref().is_some_and(|tmpfs| tmpfs.contains_key(place));
    let logs = real.log_config.as_ref().and_then(|config| config.typ.as_deref());
    vec![
        layer("user", true, "not root"),
        layer("capabilities", real.cap_drop == asked.cap_drop, "none, bounding set empty"),
        layer("no_new_privileges", real.security_opt == asked.security_opt, "no-new-privileges"),
        layer("seccomp", real.security_opt == asked.security_opt, "config/seccomp.json"),
        layer("root_file_system", real.readonly_rootfs == asked.readonly_rootfs, "read-only"),
        layer(
            "workspace",
            asked.tmpfs.unwrap_or_default().keys().all(mounted),
            "tmpfs with size and inode limits",
        ),
        layer("network", real.network_mode == asked.network_mode, "a namespace with nothing but lo"),
        layer("logs", logs == Some("none"), "none are kept"),
        layer("supervisor", true, "not dumpable"),
    ]
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
            match inner.program.load_new(sandbox, &inner.last_words).await {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::container::{Pull, SECRET_LABEL};
    use serde_json::{Value, json};

    fn settings() -> Settings {
        Settings {
            url: "unix:///x".into(),
            instance: "me".into(),
            image: "python:3.13-alpine".into(),
            pull: Pull::Never,
            runtime: Some("runsc".into()),
            user: None,
            labels: [("team".into(), "ml".into()), (INSTANCE_LABEL.into(), "forged".into())].into(),
        }
    }

    const ALL: Enforced = Enforced { memory: true, cpus: true, processes: true };

    fn request() -> Value {
        request_where(ALL)
    }

    fn request_where(enforced: Enforced) -> Value {
        let program = ["python3", "-c", "x"].map(str::to_owned).to_vec();
        let spec = SandboxSpec { cpus: 0.5, ..SandboxSpec::smallest() };
        let secret = KeySecret([7; 32]);
        serde_json::to_value(container_request(
            &spec,
            &settings(),
            &secret,
            enforced,
            "5:6",
            &["/data".into(), "/tmp".into()],
            program,
        ))
        .unwrap()
    }

    #[test]
    fn every_layer_is_asked_for() {
        let request = request();
        let host = &request["HostConfig"];
        for (key, wanted) in [
            ("Memory", json!(1 << 29)),
            ("MemorySwap", json!(1 << 29)),
            ("NanoCpus", json!(500_000_000)),
            ("PidsLimit", json!(64)),
            ("CapDrop", json!(["ALL"])),
            ("Privileged", json!(false)),
            ("ReadonlyRootfs", json!(true)),
            ("NetworkMode", json!("none")),
            ("IpcMode", json!("private")),
            ("CgroupnsMode", json!("private")),
            ("LogConfig", json!({"Type": "none"})),
            ("Runtime", json!("runsc")),
            ("Init", json!(false)),
        ] {
            assert_eq!(host[key], wanted, "{key}");
        }
        let profile = host["SecurityOpt"][1].as_str().unwrap().strip_prefix("seccomp=").unwrap();
        assert_eq!(host["SecurityOpt"][0], "no-new-privileges");
        assert!(serde_json::from_str::<Value>(profile).unwrap()["syscalls"].is_array(), "inline, not a path");
        let workspace = host["Tmpfs"]["/workspace"].as_str().unwrap();
        for option in ["nosuid", "nodev", "size=1048576", "nr_inodes=64", "uid=5", "gid=6"] {
            assert!(workspace.split(',').any(|given| given == option), "{option}: {workspace}");
        }
        assert_eq!(host["Tmpfs"]["/data"], NO_VOLUME, "a volume of the image's");
        assert!(host["Tmpfs"]["/tmp"].as_str().unwrap().contains("size=1048576"), "ours all the same");
        let limit = |name: &str| {
            let all = host["Ulimits"].as_array().unwrap().iter();
            all.filter(|limit| limit["Name"] == name).map(|limit| limit["Hard"].clone()).collect::<Vec<_>>()
        };
        assert_eq!((limit("nofile"), limit("core")), (vec![json!(64)], vec![json!(0)]));
        assert!(limit("nproc").is_empty(), "it would count the processes of the daemon's own user");
    }

    #[test]
    fn nothing_of_the_image_runs_but_its_python() {
        let request = request();
        assert_eq!(request["Entrypoint"], json!(["python3"]));
        assert_eq!(request["Cmd"], json!(["-c", "x"]));
        assert_eq!(request["Healthcheck"]["Test"], json!(["NONE"]));
        assert_eq!(request["User"], "5:6");
        assert_eq!((&request["OpenStdin"], &request["StdinOnce"]), (&json!(true), &json!(false)));
    }

    #[test]
    fn what_the_daemon_cannot_enforce_is_not_asked_for_and_told() {
        let info = SystemInfo { cpu_cfs_quota: Some(false), ..SystemInfo::default() };
        let host = &request_where(enforced(&info))["HostConfig"];
        assert!(
            host["NanoCpus"].is_null() && host["Memory"].is_u64() && host["PidsLimit"].is_u64(),
            "{host}"
        );
        let layers = enforced(&info).layers("groups", "Docker", true, "remedy");
        let told = layers.map(|layer| format!("{:?} {}", layer.state, layer.by));
        assert_eq!(told, ["On groups", "Unenforced nothing: Docker has no cpu controller here", "On groups"]);
        let none = Enforced { memory: false, cpus: true, processes: false };
        let host = &request_where(none)["HostConfig"];
        assert!(
            host["Memory"].is_null() && host["MemorySwap"].is_null() && host["PidsLimit"].is_null(),
            "{host}"
        );
        let told = none.layers("groups", "Docker", false, "remedy").map(|layer| layer.by);
        assert!(
            told[0].starts_with("RLIMIT_AS") && told[2].starts_with("RLIMIT_NPROC of the one"),
            "{told:?}"
        );
    }

    #[test]
    fn our_own_labels_cannot_be_replaced() {
        let labels = &request()["Labels"];
        assert_eq!((&labels["team"], &labels[INSTANCE_LABEL]), (&json!("ml"), &json!("me")));
        assert_eq!(labels[SECRET_LABEL], "07".repeat(32));
    }

    #[test]
    fn a_setting_that_the_daemon_denies_is_a_missing_layer() {
        let (spec, secret) = (SandboxSpec::smallest(), KeySecret([7; 32]));
        let asked = || {
            container_request(&spec, &settings(), &secret, ALL, "5:6", &[], vec!["x".into()])
                .host_config
                .unwrap()
        };
        let missing = |real: HostConfig| -> Vec<_> {
            let layers = claimed_layers(&spec, &settings(), &secret, ALL, &real).into_iter();
            layers
                .filter(|layer| layer.state == super::super::LayerState::Unenforced)
                .map(|l| l.name)
                .collect()
        };
        assert!(missing(asked()).is_empty());
        assert_eq!(missing(HostConfig { cap_drop: None, ..asked() }), ["capabilities"]);
        assert_eq!(missing(HostConfig { network_mode: Some("bridge".into()), ..asked() }), ["network"]);
        assert_eq!(missing(HostConfig { security_opt: None, ..asked() }), ["no_new_privileges", "seccomp"]);
        assert_eq!(missing(HostConfig { readonly_rootfs: Some(false), ..asked() }), ["root_file_system"]);
        assert_eq!(missing(HostConfig { tmpfs: None, ..asked() }), ["workspace"]);
        assert_eq!(missing(HostConfig { log_config: None, ..asked() }), ["logs"]);
    }
}
