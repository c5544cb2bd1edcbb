//! The Podman engine, rootless or as root: through podman-api where it is right, through `raw` where it errs.
//!
//! `request` lists every security setting; this file is calls.

mod host;
mod request;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures_util::StreamExt;
use hyper::{Method, StatusCode};
use podman_api::Podman as Client;
use podman_api::opts::{
    ContainerDeleteOpts, ContainerListFilter, ContainerListOpts, ContainerListOptsBuilder, ContainerTopOpts,
    ExecCreateOpts, PullOpts, PullPolicy,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::container::{
    self, AllLastWords, Enforced, INSTANCE_LABEL, Listed, Mode, Names, Program, Settings, Uids,
};
use super::guest::{SECCOMP_PROFILE, WORKSPACE};
use super::raw::{Failure, Raw, Refusal};
use super::{
    Claiming, Duplex, Engine, Error, Fate, Found, KeySecret, Layer, Result, Runtime, Sandbox, SandboxId,
    SandboxSpec, SessionKey, detached,
};
use host::Host;
use request::{Files, container_request, cpu_quota};

const DRIVER: &str = "podman";
/// The version of the API that Podman 4 and 5 both speak.
const API: &str = "/v4.0.0/libpod";
/// A call that takes longer has failed; only a pull may.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// A sandbox's whole /etc/hosts.
const HOSTS: &str = "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n";
/// An attach that comes before conmon's socket is there is tried again, that often and that much later.
const ATTACH_ATTEMPTS: u32 = 50;
/// See `ATTACH_ATTEMPTS`.
const ATTACH_PAUSE: Duration = Duration::from_millis(20);
/// A container that has ended is looked at, or removed, again until conmon has told its exit status.
const EXIT_ATTEMPTS: u32 = 25;
/// See `EXIT_ATTEMPTS`.
const EXIT_PAUSE: Duration = Duration::from_millis(20);
/// In which a PID 1 whose server has gone kills all that is left in its sandbox: as REAP_S in the supervisor.
const DESERTED_WAIT: Duration = Duration::from_secs(5);
/// In which a container has told of the end of its stdin: a guess, a thousand times what it takes.
const END_WAIT: Duration = Duration::from_secs(2);
/// The first uid and gid of a sandbox, in the user namespace that all of this engine's containers are in.
const FIRST_UID: u32 = 10_000;
/// As root, uids that neither systemd nor useradd hands out, beside those of the other drivers.
const ROOT_UIDS: (u32, u32) = (2_140_000_000, 7_000_000);
const CGROUPS: &str = "control groups version 2, delegated to this user (memory, cpu and pids in \
                       /sys/fs/cgroup/user.slice/…/cgroup.controllers); or name the limit in allow_unenforced";
/// Gives back what it gets, tells of the end, and waits for its own.
const STDIN_PROBE: &str = "import os, signal\n\
                           while got := os.read(0, 1): os.write(1, got)\n\
                           os.write(1, b'e')\n\
                           signal.pause()";

/// Where the service reads our seccomp profile: its API takes a path on its own host, and no text.
#[derive(Debug, Clone)]
pub enum Profile {
    /// It is there already.
    There(PathBuf),
    /// To be written into this directory, which this process and the service both see.
    Into(PathBuf),
}

/// The Podman engine.
#[derive(Debug, Clone)]
pub struct Podman(Arc<Inner>);

struct Inner {
    client: Client,
    raw: Raw,
    settings: Settings,
    program: Program,
    files: Files,
    names: Names,
    secret: KeySecret,
    host: Host,
    uids: Uids,
    /// Whether a container's stdin stays open when we go: what `attach` found once.
    stdin_survives: OnceCell<bool>,
    last_words: AllLastWords,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("url", &self.settings.url).finish_non_exhaustive()
    }
}

impl Podman {
    /// Finds the service, its containers of this instance and the image. `supervisor` is the source of PID 1.
    ///
    /// # Errors
    /// `Unusable` where the operator has to act: no service there, no image, another runtime.
    pub async fn start(settings: Settings, profile: Profile, supervisor: &'static str) -> Result<Podman> {
        let unusable = |why: String| Error::Unusable {
            what: format!("reach the Podman service at {}", settings.url),
            why,
            remedy: "start it (systemctl --user start podman.socket, or podman system service -t 0), set \
                     podman.url or CONTAINER_HOST to where it listens; or use driver = \"embedded\""
                .into(),
        };
        let raw =
            Raw::new(&settings.url, API).ok_or_else(|| unusable("expected unix:// or tcp://".into()))?;
        let client = Client::new(&settings.url).map_err(|error| unusable(error.to_string()))?;
        let names = Names::new(&settings.instance);
        // podman-api's own `info` fails on fields that came after Podman 4. It takes half a second.
        let (info, left) = tokio::join!(
            within("info", raw.call(Method::GET, "/info", &Value::Null)),
            some_listed(&client, &settings.instance, &names)
        );
        let host = Host::of(&info.map_err(|error| unusable(error.to_string()))?);
        check_runtime(&host, &settings)?;
        let uids = uids(&host, &settings)?;
        ensure_image(&client, &raw, &settings).await?;
        let instance = &settings.instance;
        let files = match profile {
            Profile::There(profile) => Files { profile, hosts: None },
            Profile::Into(directory) => {
                let place = |name: &str| directory.join(format!("codesandbox-{instance}-{name}"));
                let profile = write(place("seccomp.json"), SECCOMP_PROFILE)?;
                Files { profile, hosts: Some(write(place("hosts"), HOSTS)?) }
            }
        };
        let left = left?;
        let secret = container::secret_of(&names, &left);
        let inner = Inner {
            client,
            raw,
            names,
            program: Program::new(supervisor, settings.direct),
            settings,
            files,
            secret,
            host,
            uids,
            stdin_survives: OnceCell::new(),
            last_words: AllLastWords::default(),
        };
        let podman = Podman(Arc::new(inner));
        if !left.is_empty() {
            let early = podman.clone(); // somebody is about to come back to one of them
            tokio::spawn(async move { early.knows_stdin().await });
        }
        Ok(podman)
    }
}

impl Podman {
    /// Whether a container's stdin survives, tried once. In a task of its own: however slow the engine is and whoever
    /// goes away, the container that it is tried with is removed, and the next caller gains by it.
    async fn knows_stdin(&self) -> Result<bool> {
        let inner = self.0.clone();
        let tried = tokio::spawn(async move {
            inner.stdin_survives.get_or_try_init(|| inner.stdin_survives()).await.copied()
        });
        tried.await.unwrap_or_else(|panic| {
            Err(Error::failed("try a container's stdin")(std::io::Error::other(panic)))
        })
    }
}

/// The runtime cannot be chosen by a request (podman #28429): it is the service's, and has to be the wanted one.
fn check_runtime(host: &Host, settings: &Settings) -> Result<()> {
    match &settings.runtime {
        Some(wanted) if *wanted != host.runtime => Err(Error::Unusable {
            what: format!("use the runtime {wanted}"),
            why: format!("the service uses {}", host.runtime),
            remedy: format!(
                "set runtime = \"{wanted}\" in the [engine] section of its containers.conf and restart it, or leave \
                 podman.runtime empty"
            ),
        }),
        _ => Ok(()),
    }
}

fn uids(host: &Host, settings: &Settings) -> Result<Uids> {
    if !host.rootless {
        return Ok(Uids::new(ROOT_UIDS.0, ROOT_UIDS.1));
    }
    let many = host.subordinate_ids.saturating_sub(FIRST_UID);
    if many == 0 && settings.user.is_none() {
        return Err(Error::Unusable {
            what: "give each sandbox a uid of its own".into(),
            why: format!("the service's user has {} subordinate ids", host.subordinate_ids),
            remedy: "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER, then podman system migrate"
                .into(),
        });
    }
    Ok(Uids::new(FIRST_UID, many))
}

async fn ensure_image(client: &Client, raw: &Raw, settings: &Settings) -> Result<()> {
    let image = &settings.image;
    let path = format!("/images/{}/exists", encoded(image));
    // By hand, since podman-api does not encode the slashes of a name.
    let here = match within("image exists", raw.call(Method::GET, &path, &Value::Null)).await {
        Ok(_) => true,
        Err(Failure::Refused(Refusal { status: StatusCode::NOT_FOUND, .. })) => false,
        Err(failure) => return Err(at(failure, format!("look for the image {image}"))),
    };
    match settings.wants_pull(DRIVER, here)? {
        true => pull(client, image).await,
        false => Ok(()),
    }
}

/// Takes as long as it takes, and passes on what Podman says of it.
async fn pull(client: &Client, image: &str) -> Result<()> {
    tracing::info!(image, "pulling the image");
    let options = PullOpts::builder().reference(image).policy(PullPolicy::Always).quiet(false).build();
    let images = client.images();
    let mut steps = images.pull(&options);
    while let Some(step) = steps.next().await {
        let step = step.map_err(|error| container::pull_failed(DRIVER, image, &error.to_string()))?;
        if let Some(error) = step.error {
            return Err(container::pull_failed(DRIVER, image, &error));
        }
        if let Some(said) = step.stream {
            tracing::info!(image, "{}", said.trim());
        }
    }
    tracing::info!(image, "pulled");
    Ok(())
}

/// The file of an earlier server is replaced, and never seen half written.
fn write(path: PathBuf, text: &str) -> Result<PathBuf> {
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let written = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path));
    written.map_err(|error| Error::Unusable {
        what: "write the seccomp profile where the Podman service reads it".into(),
        why: format!("{}: {error}", path.display()),
        remedy:
            "set XDG_RUNTIME_DIR, or set podman.seccomp_profile to the path of config/seccomp.json on the \
                 service's host"
                .into(),
    })?;
    Ok(path)
}

fn ours(instance: &str) -> ContainerListFilter {
    ContainerListFilter::LabelKeyVal(INSTANCE_LABEL.into(), instance.into())
}

async fn listed(client: &Client, instance: &str) -> Result<Vec<Listed>> {
    list(client, ContainerListOpts::builder().filter([ours(instance)])).await
}

/// One of the claimed and one of all, where there are any: to list all takes 10 ms for each.
async fn some_listed(client: &Client, instance: &str, names: &Names) -> Result<Vec<Listed>> {
    let claimed = [ours(instance), ContainerListFilter::Name(names.claimed_pattern())];
    let mut some = list(client, ContainerListOpts::builder().filter(claimed).limit(1)).await?;
    some.extend(list(client, ContainerListOpts::builder().filter([ours(instance)]).limit(1)).await?);
    // Podman leaves out one that is being removed, and takes no other in its place.
    if some.is_empty() { listed(client, instance).await } else { Ok(some) }
}

async fn list(client: &Client, options: ContainerListOptsBuilder) -> Result<Vec<Listed>> {
    let (containers, options) = (client.containers(), options.all(true).build());
    let listed = within_crate("list", containers.list(&options)).await;
    let listed = listed.map_err(|failure| at(failure, "list our containers"))?.into_iter();
    Ok(listed.filter_map(|container| Listed::new(container.id, container.names, container.labels)).collect())
}

impl Inner {
    async fn make(&self, name: String, spec: &SandboxSpec, program: Vec<String>) -> Result<Sandbox> {
        let made = self.begin(&name, spec, program).await;
        if made.is_err() {
            // By the name, which we know even where the answer was lost.
            container::undone(self.remove(&SandboxId(name)).await);
        }
        made
    }

    async fn begin(&self, name: &str, spec: &SandboxSpec, program: Vec<String>) -> Result<Sandbox> {
        let user = self.settings.user.clone().unwrap_or_else(|| self.uids.next());
        let mut request = container_request(
            spec,
            &self.settings,
            &self.secret,
            self.host.enforced(),
            &user,
            &self.files,
            program,
        );
        request["name"] = name.into();
        // By hand: podman-api misspells no_new_privileges and log_configuration's driver, which Podman ignores.
        let created = within("create", self.raw.call(Method::POST, "/containers/create", &request)).await;
        let created = created.map_err(|failure| match &failure {
            // 500 from Podman 4.3, 404 from 5.4.
            Failure::Refused(Refusal { message, .. })
                if message.contains("no such image") || message.contains("image not known") =>
            {
                container::image_missing(DRIVER, &self.settings.image, message)
            }
            _ => at(failure, "create a container"),
        })?;
        for warning in created["Warnings"].as_array().into_iter().flatten() {
            tracing::debug!(%warning, "created with a warning");
        }
        let id = SandboxId(created["Id"].as_str().unwrap_or(name).to_owned());
        self.start_attached(&id).await.inspect_err(|_| self.last_words.forget(&id))
    }

    /// Attached first while the image is new to us: nothing that it says can be lost then. Later afterwards: nobody
    /// is there to be heard but one who waits for us to speak, or dies, of which then only `fate` tells; and an attach
    /// that has to prepare the container costs Podman 20 ms more.
    async fn start_attached(&self, id: &SandboxId) -> Result<Sandbox> {
        if self.program.is_compiled() {
            self.start_container(id).await?;
            return self.attach(id).await;
        }
        let sandbox = self.attach(id).await?;
        self.start_container(id).await?;
        Ok(sandbox)
    }

    async fn start_container(&self, id: &SandboxId) -> Result<()> {
        let containers = self.client.containers();
        let container = containers.get(&id.0);
        let started = within_crate("start", container.start(None)).await;
        started.map_err(|failure| at(failure, "start a container"))
    }

    /// By hand: podman-api looks at the container first, with its size, which takes 45 ms.
    async fn attach(&self, id: &SandboxId) -> Result<Sandbox> {
        let words = self.last_words.begin(id);
        let path =
            format!("/containers/{id}/attach?stream=true&stdin=true&stdout=true&stderr=true&logs=false");
        let mut attempts = ATTACH_ATTEMPTS;
        let stream = loop {
            match within("attach", self.raw.stream(&path, &Value::Null, words.clone())).await {
                Ok(stream) => break stream,
                // A busy conmon makes its socket after Podman has said that the container is there.
                Err(Failure::Refused(Refusal { message, .. }))
                    if attempts > 0 && message.contains("attach socket") =>
                {
                    attempts -= 1;
                    tokio::time::sleep(ATTACH_PAUSE).await;
                }
                Err(failure) => return Err(of(failure, id, "attach to")),
            }
        };
        Ok(Sandbox { id: id.clone(), stream })
    }

    /// Waits until a parked PID 1 is alone: one that has parked never forks, so nobody is there from then on.
    ///
    /// A run that stopped the last supervisor beside it would outlive it, and look into the next one's descriptors.
    async fn is_deserted(&self, id: &SandboxId) -> Result<()> {
        let containers = self.client.containers();
        let container = containers.get(&id.0);
        let pids = ContainerTopOpts::builder().ps_args("pid").build();
        let until = Instant::now() + DESERTED_WAIT;
        loop {
            let inside = within_crate("top", container.top(&pids)).await;
            let inside = inside.map_err(|failure| of(failure, id, "look into"))?;
            if inside.processes.len() == 1 {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(Error::Gone(id.clone())); // somebody hides there: it is to be removed
            }
            tokio::time::sleep(EXIT_PAUSE).await;
        }
    }

    /// A second supervisor, beside a PID 1 whose stdin conmon has closed.
    async fn attach_beside(&self, id: &SandboxId) -> Result<Sandbox> {
        let words = self.last_words.begin(id);
        let program = Program::supervisor(Mode::Beside);
        let streams = ExecCreateOpts::builder().attach_stdin(true).attach_stdout(true).attach_stderr(true);
        let containers = self.client.containers();
        let container = containers.get(&id.0);
        let made = within_crate("exec", container.create_exec(&streams.command(program).build())).await;
        let made = made.map_err(|failure| of(failure, id, "exec in"))?;
        let path = format!("/exec/{}/start", made.id());
        // By hand: podman-api's own decoder panics at a byte that it does not know.
        let begin = json!({"Detach": false, "Tty": false});
        let attached = within("start exec", self.raw.stream(&path, &begin, words)).await;
        let stream = attached.map_err(|failure| of(failure, id, "exec in"))?;
        self.program.load(Sandbox { id: id.clone(), stream }).await
    }

    /// Whether the operator's conmon keeps a container's stdin open when a client goes (--leave-stdin-open): tried
    /// with a container of its own.
    async fn stdin_survives(self: &Arc<Self>) -> Result<bool> {
        let program = ["python3", "-I", "-S", "-c", STDIN_PROBE].map(str::to_owned).to_vec();
        let spec = SandboxSpec::smallest();
        // What befalls the helper is no word on the sandbox that somebody asks for.
        let unknown = |error: Error| Error::Unavailable { driver: DRIVER, why: error.to_string() };
        let Sandbox { id, stream } =
            self.make(self.names.helper()?, &spec, program).await.map_err(unknown)?;
        let survives = self.outlives_its_client(&id, stream).await.map_err(unknown);
        let inner = self.clone();
        tokio::spawn(async move { container::undone(inner.remove(&id).await) }); // sessions wait for the answer alone
        survives
    }

    /// Its program tells a second client: until the engine tells of a container's end, a busy host takes seconds.
    async fn outlives_its_client(&self, id: &SandboxId, mut first: Duplex) -> Result<bool> {
        let mut second = self.attach(id).await?.stream;
        let told = async {
            echoed(&mut first, b'1').await?;
            echoed(&mut second, b'2').await?;
            drop(first);
            if let Ok(end) = tokio::time::timeout(END_WAIT, second.read_u8()).await {
                return end.map(|_| false);
            }
            second.write_all(b"3").await?;
            second.flush().await?;
            Ok(second.read_u8().await? == b'3')
        };
        let told = within("try stdin", async { told.await.map_err(Failure::Broken) }).await;
        told.map_err(|failure| of(failure, id, "try the stdin of"))
    }

    async fn remove(&self, id: &SandboxId) -> Result<()> {
        let containers = self.client.containers();
        let container = containers.get(&id.0);
        let options = ContainerDeleteOpts::builder().force(true).volumes(true).timeout(0).build();
        let mut attempts = EXIT_ATTEMPTS;
        loop {
            match within_crate("remove", container.delete(&options)).await {
                Ok(()) | Err(Failure::Refused(Refusal { status: StatusCode::NOT_FOUND, .. })) => break,
                // It ended by itself, as Podman was about to kill it.
                Err(Failure::Refused(Refusal { message, .. }))
                    if attempts > 0 && message.contains("state improper") =>
                {
                    attempts -= 1;
                    tokio::time::sleep(EXIT_PAUSE).await;
                }
                Err(failure) => return Err(of(failure, id, "remove")),
            }
        }
        self.last_words.forget(id);
        Ok(())
    }

    /// By hand: podman-api asks for the size, which takes 45 ms instead of 2.
    async fn inspect(&self, id: &SandboxId) -> Result<Value> {
        let path = format!("/containers/{id}/json?size=false");
        let inspected = within("inspect", self.raw.call(Method::GET, &path, &Value::Null)).await;
        inspected.map_err(|failure| of(failure, id, "inspect"))
    }

    /// Of the container's first process, on the engine's own host.
    async fn pid(&self, id: &SandboxId) -> Result<i32> {
        let pid = self.inspect(id).await?["State"]["Pid"].as_i64();
        Ok(pid.and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0))
    }

    /// The layers as the service tells of them; `real` is what it says of the first sandbox.
    fn layers(&self, spec: &SandboxSpec, real: &Value) -> Vec<Layer> {
        let (host, config) = (&self.host, &real["HostConfig"]);
        let by = format!("control groups {}", host.cgroup_version);
        let can = host.enforced();
        let memory = config["Memory"] == spec.memory_bytes && config["MemorySwap"] == spec.memory_bytes;
        let enforced = Enforced {
            memory: can.memory && memory,
            cpus: can.cpus && config["CpuQuota"] == cpu_quota(spec),
            processes: can.processes && config["PidsLimit"] == spec.processes,
        };
        let own_uids = self.settings.user.is_none();
        let mut layers = enforced.layers(&by, "Podman", own_uids, CGROUPS).to_vec();
        layers.push(self.settings.uids_layer(DRIVER));
        layers.push(match host.rootless {
            true => Layer::on("user_namespace", "the one of rootless Podman, without rights outside"),
            false => Layer::off("user_namespace", "the service runs as root", "a rootless service"),
        });
        layers.extend(self.claimed_layers(real));
        layers
    }

    /// The layers that hold where the service says of a sandbox what it was asked for.
    fn claimed_layers(&self, real: &Value) -> Vec<Layer> {
        let config = &real["HostConfig"];
        let layer = |name, holds: bool, by: &str| match holds {
            true => Layer::on(name, by),
            false => Layer::missing(name, "the service says that the sandbox does not have it"),
        };
        let options = |wanted: &str| {
            config["SecurityOpt"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|option| option.as_str().is_some_and(|option| option.contains(wanted)))
        };
        let capabilities = real["EffectiveCaps"].as_array().is_none_or(Vec::is_empty)
            && real["BoundingCaps"].as_array().is_none_or(Vec::is_empty);
        let mounted = |place| !config["Tmpfs"][place].is_null() || real["Mounts"].to_string().contains(place);
        vec![
            layer("user", true, "not root"),
            layer("capabilities", capabilities, "none, bounding set empty"),
            layer("no_new_privileges", true, "no_new_privileges"),
            layer("seccomp", !options("seccomp=unconfined"), "config/seccomp.json"),
            layer("root_file_system", config["ReadonlyRootfs"] == true, "read-only"),
            layer(
                "workspace",
                mounted(WORKSPACE),
                match self.host.enforces("memory") {
                    true => "tmpfs with a size limit; memory bounds its inodes",
                    false => "tmpfs with a size limit, and none on inodes",
                },
            ),
            layer("network", config["NetworkMode"] == "none", "a namespace with nothing but lo"),
            layer("logs", config["LogConfig"]["Type"] == "none", "none are kept"),
            layer("supervisor", true, "not dumpable"),
        ]
    }
}

#[async_trait]
impl Runtime for Podman {
    fn name(&self) -> &'static str {
        DRIVER
    }

    fn secret(&self) -> KeySecret {
        self.0.secret.clone()
    }

    async fn probe(&self, first: &SandboxId, spec: &SandboxSpec) -> Result<Engine> {
        let real = self.0.inspect(first).await?;
        Ok(Engine {
            version: self.0.host.version.clone(),
            rootless: self.0.host.rootless,
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
        if !matches!(self.fate(id).await?, Fate::Running { .. }) {
            return Err(Error::Gone(id.clone()));
        }
        match self.knows_stdin().await? {
            true => self.0.attach(id).await,
            false => {
                self.0.is_deserted(id).await?;
                self.0.attach_beside(id).await
            }
        }
    }

    async fn claim(&self, id: &SandboxId, owner: &SessionKey) -> Result<Claiming> {
        let name = self.0.names.claimed(owner, SystemTime::now());
        let path = format!("/containers/{id}/rename?name={name}");
        // By `raw`: podman-api does not tell when the service has a request.
        let begun = within("rename", self.0.raw.begin(Method::POST, &path)).await;
        let renamed = begun.map_err(|failure| of(failure, id, "claim"))?;
        let id = id.clone();
        Ok(Box::pin(async move {
            let renamed = within("rename", renamed).await;
            renamed.map(drop).map_err(|failure| of(failure, &id, "claim"))
        }))
    }

    async fn list(&self) -> Result<Vec<Found>> {
        let containers = listed(&self.0.client, &self.0.settings.instance).await?;
        Ok(containers.into_iter().map(|container| self.0.names.found(container)).collect())
    }

    async fn fate(&self, id: &SandboxId) -> Result<Fate> {
        let mut attempts = EXIT_ATTEMPTS;
        let container = loop {
            let container = match self.0.inspect(id).await {
                Ok(container) => container,
                Err(Error::Gone(_)) => return Ok(Fate::Gone),
                Err(error) => return Err(error),
            };
            // Its end is known, and how is not yet.
            let unsettled = matches!(container["State"]["Status"].as_str(), Some("stopped" | "stopping"));
            if !unsettled || attempts == 0 {
                break container;
            }
            attempts -= 1;
            tokio::time::sleep(EXIT_PAUSE).await;
        };
        let state = &container["State"];
        let limited = self.0.host.enforces("memory");
        let code = state["ExitCode"].as_i64().unwrap_or(-1) as i32;
        Ok(match state["Status"].as_str().unwrap_or_default() {
            // Without a group nobody is killed for want of memory: a call for more fails. With one the
            // supervisor sees it.
            "running" => Fate::Running { out_of_memory_kills: (!limited).then_some(0) },
            "paused" => Fate::Paused,
            "exited" | "stopped" | "stopping" if state["OOMKilled"] == true => Fate::OutOfMemory,
            "exited" | "stopped" | "stopping" => Fate::Exited { code, stderr: self.0.last_words.of(id) },
            _ => Fate::Gone, // also where an attach that came too late has prepared it anew, and nobody starts it
        })
    }

    async fn remove(&self, id: &SandboxId) -> Result<()> {
        self.0.remove(id).await
    }
}

/// An attach is acknowledged before it is wired: what comes back proves that it is, in both directions.
async fn echoed(stream: &mut Duplex, byte: u8) -> std::io::Result<()> {
    stream.write_all(&[byte]).await?;
    stream.flush().await?;
    while stream.read_u8().await? != byte {}
    Ok(())
}

/// Every call has a deadline: a service may be stopped, and not only dead.
async fn within<T>(
    what: &'static str,
    call: impl Future<Output = std::result::Result<T, Failure>>,
) -> std::result::Result<T, Failure> {
    let late = |_| {
        Failure::Broken(std::io::Error::other(format!("no answer to \"{what}\" within {CALL_TIMEOUT:?}")))
    };
    container::timed(what, tokio::time::timeout(CALL_TIMEOUT, call)).await.map_err(late)?
}

/// The same for a call of podman-api's, whose errors become ours.
async fn within_crate<T>(
    what: &'static str,
    call: impl Future<Output = podman_api::Result<T>>,
) -> std::result::Result<T, Failure> {
    use podman_api::Error as E;
    use podman_api::conn::Error as ConnectionError;
    let call = async {
        call.await.map_err(|error| match error {
            E::Fault { code, message } | E::Error(ConnectionError::Fault { code, message }) => {
                let status = StatusCode::from_u16(code.as_u16()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                Failure::Refused(Refusal { status, message })
            }
            other => Failure::Broken(std::io::Error::other(other)),
        })
    };
    within(what, call).await
}

/// As an error of a call that is about the container `id`.
fn of(failure: Failure, id: &SandboxId, what: &str) -> Error {
    match failure {
        Failure::Refused(Refusal { status: StatusCode::NOT_FOUND, .. }) => Error::Gone(id.clone()),
        // In the middle of a removal Podman says 500.
        Failure::Refused(Refusal { message, .. }) if message.contains("no such container") => {
            Error::Gone(id.clone())
        }
        other => at(other, format!("{what} sandbox {id}")),
    }
}

fn at(failure: Failure, what: impl Into<String>) -> Error {
    match failure {
        Failure::Refused(Refusal { message, .. }) if container::is_no_space(&message) => {
            Error::NoSpace { driver: DRIVER, why: message }
        }
        Failure::Refused(Refusal { message, .. }) => Error::failed(what)(std::io::Error::other(message)),
        Failure::Broken(error) => Error::Unavailable { driver: DRIVER, why: error.to_string() },
    }
}

/// A name as one part of a path.
fn encoded(name: &str) -> String {
    percent_encoding::utf8_percent_encode(name, percent_encoding::NON_ALPHANUMERIC).to_string()
}
