//! Floor 1: what every sandbox has, whatever engine made it.

use std::sync::LazyLock;

use serde_json::Value;

use super::SandboxSpec;

/// Our own profile, the same for every driver.
pub(super) const SECCOMP_PROFILE: &str = include_str!("../../config/seccomp.json");
/// The same without its comments, for an engine that stores it with each sandbox.
pub(super) fn short_seccomp_profile() -> &'static str {
    static SHORT: LazyLock<String> = LazyLock::new(|| {
        let mut profile: Value =
            serde_json::from_str(SECCOMP_PROFILE).expect("it is compiled in, and tested");
        for rule in profile["syscalls"].as_array_mut().into_iter().flatten() {
            rule.as_object_mut().map(|rule| rule.remove("comment"));
        }
        profile.to_string()
    });
    &SHORT
}
/// What a sandbox calls itself.
pub(super) const HOSTNAME: &str = "sandbox";
/// Where runs work.
pub(super) const WORKSPACE: &str = "/workspace";
/// Bytes of one TCP connection's buffers, least, first and most: what no control group may count is small.
pub(super) const TCP_BUFFERS: &str = "4096 65536 262144";
/// TCP connections that wait after their end: none, since they outlive the run, hold its ports, and fill a table that
/// is the host's (131,072 of them in 8 s, were there no limit).
pub(super) const TIME_WAITS: &str = "0";
/// Multicast groups of one socket, which no control group counts.
pub(super) const MEMBERSHIPS: &str = "1";

/// Of the environment what is the same for every sandbox: nothing of the server's.
///
/// Two of glibc's arenas are enough for threads that share one core, and each reserves 64 MiB of address space,
/// which RLIMIT_AS counts where it stands in for a control group: with glibc's own choice 14 threads fill 512 MiB.
/// The last two are for the interpreter's own start, and the supervisor takes them away: addresses bound and
/// memory asked for once, before the first fork, are pages that no run has to copy.
const ENVIRONMENT: [(&str, &str); 9] = [
    ("HOME", WORKSPACE),
    ("LANG", "C.UTF-8"),
    ("LOGNAME", "sandbox"),
    ("TMPDIR", "/tmp"),
    ("USER", "sandbox"),
    ("MPLCONFIGDIR", "/tmp"),
    ("MALLOC_ARENA_MAX", "2"),
    ("LD_BIND_NOW", "1"),
    ("MALLOC_TOP_PAD_", "1048576"),
];
/// Thread pools of numeric libraries follow the CPU quota, not the host's cores.
const THREAD_COUNTS: [&str; 4] =
    ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"];

/// The environment of a sandbox, but for what its engine or its image adds.
pub(super) fn environment(spec: &SandboxSpec) -> impl Iterator<Item = (&'static str, String)> {
    let threads = (spec.cpus.ceil() as u64).max(1);
    let fixed = ENVIRONMENT.into_iter().map(|(name, value)| (name, value.to_owned()));
    fixed.chain(THREAD_COUNTS.into_iter().map(move |name| (name, threads.to_string())))
}
