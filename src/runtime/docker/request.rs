//! What Docker is asked for, and what it says of what came of it.

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig,
    ResourcesUlimits, SystemInfo,
};

use crate::runtime::container::{self, Enforced, MASKED_PATHS, OOM_SCORE_ADJ, SYSCTLS, Settings};
use crate::runtime::guest::{self, HOSTNAME, WORKSPACE};
use crate::runtime::{KeySecret, Layer, SandboxSpec};

/// Over a volume that the image declares: Docker would make a directory on disk for it, without any limit.
const NO_VOLUME: &str = "ro,noexec,nosuid,nodev,size=4096";

/// What Docker is asked for: every security setting of this driver.
///
/// `user` is `uid:gid`, and never root's; `volumes` are those that the image declares.
pub(super) fn container_request(
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
        healthcheck: Some(HealthConfig {
            test: Some(vec!["NONE".into()]), // the image's own would start processes
            ..Default::default()
        }),
        host_config: Some(host_config),
        ..ContainerCreateBody::default()
    }
}

/// What the daemon says that it can; one that says nothing can.
pub(super) fn enforced(info: &SystemInfo) -> Enforced {
    Enforced {
        memory: info.memory_limit.unwrap_or(true),
        cpus: info.cpu_cfs_quota.unwrap_or(true),
        processes: info.pids_limit.unwrap_or(true),
    }
}

/// The share of CPU time as the daemon takes it.
pub(super) fn nano_cpus(spec: &SandboxSpec) -> i64 {
    (spec.cpus * 1e9) as i64
}

/// The layers that hold where the daemon says of a sandbox what it was asked for.
pub(super) fn claimed_layers(
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::runtime::LayerState;
    use crate::runtime::container::{INSTANCE_LABEL, Pull, SECRET_LABEL};

    fn settings() -> Settings {
        Settings {
            url: "unix:///x".into(),
            instance: "me".into(),
            image: "python:3.13-alpine".into(),
            pull: Pull::Never,
            runtime: Some("runsc".into()),
            direct: true,
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
            layers.filter(|layer| layer.state == LayerState::Unenforced).map(|l| l.name).collect()
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
