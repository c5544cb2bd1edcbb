//! What an operator can do about a step that fails on this host.

use super::wire::Failure;
use crate::runtime::Error;

/// For limits that need a control group.
pub(super) const CGROUP: &str = "run as root, or give the server a control group of its own: \
    systemd-run --user --scope -p Delegate=yes codesandbox; or accept it by name: --allow-unenforced memory,cpus";

/// For an ordinary user with but one id.
pub(super) const UIDS: &str = "install uidmap (apt-get install uidmap) and give this user ids of its own in \
    /etc/subuid and /etc/subgid (usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER); or accept it \
    by name: --allow-unenforced uids";

const USER_NAMESPACES: &str = "this host forbids user namespaces to ordinary users. One of these helps: \
    Ubuntu 23.10 and newer: a file /etc/apparmor.d/codesandbox with `abi <abi/4.0>, include <tunables/global> \
    profile codesandbox /path/to/codesandbox flags=(unconfined) { userns, }`, then apparmor_parser -r on it; \
    sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; sysctl -w kernel.unprivileged_userns_clone=1; \
    sysctl -w user.max_user_namespaces=15000; or running as root";
const IN_A_CONTAINER: &str = "inside a container this needs CAP_SYS_ADMIN and an unmasked /proc (docker run \
    --privileged, podman run --security-opt unmask=ALL --cap-add SYS_ADMIN)";
const KERNEL: &str = "Linux 5.12 or newer";
const OWN_LIMITS: &str = "raise the server's own limits above limits.open_files and limits.processes (ulimit -Hn and \
    -Hu, or LimitNOFILE and LimitNPROC of its systemd unit), or lower those";
const PATHS: &str =
    "check that the path exists and that this user may read it (embedded.rootfs, embedded.python)";

const GROUPS: &str = "check that nobody else moves, limits or removes the control groups codesandbox-INSTANCE-PID that \
                      lie below this server's own (/proc/self/cgroup)";

/// The error of a failed step, with its remedy.
pub(super) fn of(failure: &Failure) -> Error {
    let error = failure.error();
    let (step, errno) = (failure.step.as_str(), failure.errno);
    let begins = |words: &[&str]| words.iter().any(|word| step.starts_with(word));
    let remedy = if begins(&["unshare", "clone3", "write uid_map", "write gid_map", "deny setgroups"]) {
        USER_NAMESPACES
    } else if begins(&["mount_setattr"]) || errno == libc::ENOSYS {
        KERNEL
    } else if begins(&["mount", "make mounts private", "pivot_root", "mask"]) {
        if rustix::process::geteuid().is_root() { IN_A_CONTAINER } else { USER_NAMESPACES }
    } else if begins(&["setrlimit"]) {
        OWN_LIMITS
    } else if begins(&["join its control groups"]) {
        GROUPS
    } else if begins(&["open", "read"]) {
        PATHS
    } else {
        return Error::Failed { what: format!("embedded sandbox: {step}"), source: error };
    };
    Error::Unusable {
        what: format!("embedded sandbox: {step}"),
        why: error.to_string(),
        remedy: remedy.into(),
    }
}
