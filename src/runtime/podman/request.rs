//! What Podman is asked for.

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::runtime::container::{self, Enforced, MASKED_PATHS, OOM_SCORE_ADJ, SYSCTLS, Settings};
use crate::runtime::guest::{self, HOSTNAME, WORKSPACE};
use crate::runtime::{KeySecret, SandboxSpec};

/// Our files, by their paths on the service's host.
pub(super) struct Files {
    pub(super) profile: PathBuf,
    /// A sandbox's /etc/hosts, where we can put it there.
    pub(super) hosts: Option<PathBuf>,
}

/// The kernel's own default: in each period of it a sandbox has its quota.
const CPU_PERIOD_US: u32 = 100_000;

/// Microseconds of CPU time in a period.
pub(super) fn cpu_quota(spec: &SandboxSpec) -> u64 {
    (spec.cpus * f64::from(CPU_PERIOD_US)) as u64
}

/// What Podman is asked for: every security setting of this driver.
///
/// `user` is `uid:gid`, and never root's.
pub(super) fn container_request(
    spec: &SandboxSpec,
    settings: &Settings,
    secret: &KeySecret,
    enforced: Enforced,
    user: &str,
    files: &Files,
    program: Vec<String>,
) -> Value {
    let tmpfs = |destination: &str, size: u64, mode: &str| {
        // Podman takes no uid and gid here, but U: the guest's own. Nor nr_inodes: memory bounds the inodes.
        let options = ["rw", "exec", "nosuid", "nodev", "U", &format!("size={size}"), mode];
        json!({"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options})
    };
    let bind = |source: &PathBuf| {
        let options = ["ro", "nosuid", "nodev", "noexec"];
        json!({"destination": "/etc/hosts", "type": "bind", "source": source, "options": options})
    };
    let mounts = [
        tmpfs(WORKSPACE, spec.workspace_bytes, "mode=0755"),
        tmpfs("/tmp", spec.tmp_bytes, "mode=1777"),
        tmpfs("/dev/shm", spec.shm_bytes, "mode=1777"),
    ];
    let mounts: Vec<_> = mounts.into_iter().chain(files.hosts.as_ref().map(bind)).collect();
    let rlimits: Vec<_> = container::resources(spec)
        .map(|(name, value)| json!({"type": name.to_uppercase(), "soft": value, "hard": value}))
        .collect();
    let memory = json!({"limit": spec.memory_bytes, "swap": spec.memory_bytes}); // of both together: no swap
    let cpu = json!({"quota": cpu_quota(spec), "period": CPU_PERIOD_US});
    let pids = json!({"limit": spec.processes});
    let limits: HashMap<_, _> = [
        ("memory", enforced.memory, memory),
        ("cpu", enforced.cpus, cpu),
        ("pids", enforced.processes, pids),
    ]
    .into_iter()
    .filter_map(|(name, enforced, limit)| enforced.then_some((name, limit)))
    .collect();
    let (program, arguments) = program.split_at(1);
    json!({
        "image": settings.image,
        "entrypoint": program,
        "command": arguments,
        "env": guest::environment(spec).collect::<HashMap<_, _>>(),
        "httpproxy": false, // else the service's own proxy variables, passwords and all
        "user": user,
        "work_dir": WORKSPACE,
        "hostname": HOSTNAME,
        "labels": container::labels(settings, secret),
        "stdin": true,
        "terminal": false,
        "systemd": "false",
        // Limits.
        "resource_limits": limits,
        "r_limits": rlimits,
        "oom_score_adj": OOM_SCORE_ADJ,
        "sysctl": HashMap::from(SYSCTLS),
        // Rights.
        "privileged": false,
        "cap_drop": ["ALL"],
        "no_new_privileges": true,
        "seccomp_profile_path": files.profile,
        // Files.
        "read_only_filesystem": true,
        "read_write_tmpfs": false,
        "image_volume_mode": "ignore",
        "mask": MASKED_PATHS,
        "mounts": mounts,
        "use_image_resolve_conf": true,
        "use_image_hosts": true, // else the host's own names, and its address
        // Namespaces.
        "netns": {"nsmode": "none"},
        "ipcns": {"nsmode": "private"},
        "pidns": {"nsmode": "private"},
        "utsns": {"nsmode": "private"},
        "cgroupns": {"nsmode": "private"},
        // Our frames run over stdout: they must not pile up on disk.
        "log_configuration": {"driver": "none"},
        "healthconfig": {"Test": ["NONE"]}, // the image's own would start processes
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::container::{INSTANCE_LABEL, Pull};

    fn request(enforced: Enforced) -> Value {
        let settings = Settings {
            url: "unix:///x".into(),
            instance: "me".into(),
            image: "python:3.13-alpine".into(),
            pull: Pull::Never,
            runtime: None,
            direct: true,
            user: None,
            labels: [("team".into(), "ml".into())].into(),
        };
        let program = ["python3", "-c", "x"].map(str::to_owned).to_vec();
        let spec = SandboxSpec { cpus: 0.5, ..SandboxSpec::smallest() };
        let files = Files { profile: "/run/profile.json".into(), hosts: Some("/run/hosts".into()) };
        container_request(&spec, &settings, &KeySecret([7; 32]), enforced, "5:6", &files, program)
    }

    #[test]
    fn every_layer_is_asked_for_by_the_names_that_podman_knows() {
        let request = request(Enforced { memory: true, cpus: true, processes: true });
        for (key, wanted) in [
            ("cap_drop", json!(["ALL"])),
            ("no_new_privileges", json!(true)),
            ("seccomp_profile_path", json!("/run/profile.json")),
            ("read_only_filesystem", json!(true)),
            ("image_volume_mode", json!("ignore")),
            ("httpproxy", json!(false)),
            ("log_configuration", json!({"driver": "none"})),
            ("user", json!("5:6")),
            ("entrypoint", json!(["python3"])),
            ("command", json!(["-c", "x"])),
        ] {
            assert_eq!(request[key], wanted, "{key}");
        }
        for (namespace, mode) in [("netns", "none"), ("ipcns", "private"), ("pidns", "private")] {
            assert_eq!(request[namespace]["nsmode"], mode, "{namespace}");
        }
        let limits = &request["resource_limits"];
        assert_eq!(limits["memory"], json!({"limit": 1 << 29, "swap": 1 << 29}));
        assert_eq!(limits["cpu"], json!({"quota": 50_000, "period": 100_000}));
        assert_eq!(limits["pids"]["limit"], 64);
        let rlimits = request["r_limits"].as_array().unwrap();
        assert!(rlimits.contains(&json!({"type": "NOFILE", "soft": 64, "hard": 64})), "{rlimits:?}");
        assert!(
            !format!("{rlimits:?}").contains("NPROC"),
            "it would count the processes of the service's own user"
        );
        assert_eq!(request["labels"][INSTANCE_LABEL], "me");
        let hosts = request["mounts"].as_array().unwrap().last().unwrap();
        assert_eq!((&hosts["destination"], &hosts["source"]), (&json!("/etc/hosts"), &json!("/run/hosts")));
        assert!(hosts["options"].as_array().unwrap().contains(&json!("ro")), "{hosts}");
    }

    #[test]
    fn what_the_service_cannot_enforce_is_not_asked_for() {
        // As systemd delegates to users where nobody has asked for more.
        let limits = &request(Enforced { memory: true, cpus: false, processes: true })["resource_limits"];
        assert!(
            limits["cpu"].is_null() && limits["memory"].is_object() && limits["pids"].is_object(),
            "{limits}"
        );
    }
}
