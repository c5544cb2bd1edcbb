//! Every security setting of the embedded driver, to be read in a minute.
//!
//! The system calls that are allowed stand in `config/seccomp.json`, the sizes in the configuration.

use rustix::mount::MountFlags;
use rustix::process::Resource;

use crate::runtime::guest::{HOSTNAME, MEMBERSHIPS, TCP_BUFFERS, TIME_WAITS};

/// The uid and gid that everything in a sandbox has, seen from inside: not root, no capability, one group.
pub(super) const SANDBOX_ID: u32 = 1000;

/// Outside, each sandbox of a server that runs as root is an id of its own from here on: a range that
/// neither systemd (up to 0x7000_0000) nor useradd hands out.
pub(super) const FIRST_ROOT_ID: u32 = 2_000_000_000;
/// Sandboxes that are alive together have ids of their own up to this many.
pub(super) const ROOT_IDS: u32 = 100_000_000;

/// Namespaces of its own for each sandbox: all that there are but time.
pub(super) const NAMESPACES: u64 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u64;

/// In a sandbox nobody makes another namespace of any kind.
pub(super) const NAMESPACE_LIMITS: [&str; 8] = [
    "max_cgroup_namespaces",
    "max_ipc_namespaces",
    "max_mnt_namespaces",
    "max_net_namespaces",
    "max_pid_namespaces",
    "max_time_namespaces",
    "max_user_namespaces",
    "max_uts_namespaces",
];

/// What no control group may count is small.
pub(super) const NETWORK_LIMITS: [(&str, &str); 4] = [
    ("ipv4/tcp_rmem", TCP_BUFFERS),
    ("ipv4/tcp_wmem", TCP_BUFFERS),
    ("ipv4/tcp_max_tw_buckets", TIME_WAITS),
    ("ipv4/igmp_max_memberships", MEMBERSHIPS),
];

/// The host's directories that make the root file system, read-only. Nothing of /home, /var, /root, /srv.
/// Nor of /opt, where services keep what is theirs.
pub(super) const HOST_DIRECTORIES: [&str; 7] =
    ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"];

/// What a Python program needs of the host's /etc, and no more: no passwd, no shadow, no resolv.conf.
pub(super) const HOST_ETC: [&str; 12] = [
    "alternatives",
    "ca-certificates.conf",
    "fonts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "protocols",
    "services",
    "ssl/certs",
    "timezone",
];

/// The names that our own /etc adds.
pub(super) const OWN_ETC: [(&str, &str); 5] = [
    (
        "passwd",
        "root:x:0:0:root:/:/bin/false\nsandbox:x:1000:1000:sandbox:/workspace:/bin/sh\n\
         nobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    ("group", "root:x:0:\nsandbox:x:1000:\nnogroup:x:65534:\n"),
    ("hosts", "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n"),
    ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
    ("resolv.conf", ""),
];

/// Devices, bound from the host. There is no other, and nobody in a sandbox can make one.
pub(super) const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Links that programs expect in /dev.
pub(super) const DEVICE_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Parts of /proc that tell of the host, hidden: what runc and Podman mask.
pub(super) const MASKED_PROC: [&str; 11] = [
    "acpi",
    "asound",
    "interrupts",
    "kcore",
    "keys",
    "latency_stats",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
    "driver",
];

/// Parts of /proc that are read-only, though nobody in a sandbox has the right to write there.
pub(super) const READ_ONLY_PROC: [&str; 5] = ["bus", "fs", "irq", "sys", "sysrq-trigger"];

/// Flags of the file systems that a sandbox may write to.
pub(super) const WRITABLE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// What `guest::environment` leaves open: there is no image to say it.
pub(super) const ENVIRONMENT: [(&str, &str); 2] =
    [("HOSTNAME", HOSTNAME), ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")];

/// Resource limits that are the same for every sandbox; `processes` and `open_files` come from the spec.
/// Message queues and locked memory are outside every memory limit of ours, so they are small.
pub(super) const RESOURCES: [(Resource, u64); 3] =
    [(Resource::Core, 0), (Resource::Memlock, 64 * 1024), (Resource::Msgqueue, 0)];

/// Victims of the host's own out-of-memory killer are sandboxes before the server (-1000 to 1000).
pub(super) const OOM_SCORE_ADJ: &str = "500";

/// A sandbox's supervisor is the last of its own sandbox; below 0 it would go before the host's own processes.
pub(super) const SUPERVISOR_OOM_SCORE_ADJ: &str = "0";

/// Pseudo-terminals of one sandbox.
pub(super) const PTS_OPTIONS: &str = "newinstance,ptmxmode=0666,mode=0620,max=64";

/// Our own files in a sandbox: the interpreter that PID 1 runs, which nobody may read (mode 0111: the
/// kernel then holds the process non-dumpable, so that a run cannot open `/proc/1/mem` or `/proc/1/fd`),
/// and the compiled supervisor.
pub(super) const OWN_DIRECTORY: &str = "/run/codesandbox";
/// See `OWN_DIRECTORY`.
pub(super) const INTERPRETER: &str = "/run/codesandbox/python";
/// See `OWN_DIRECTORY`.
pub(super) const SUPERVISOR: &str = "/run/codesandbox/supervisor.pyc";
